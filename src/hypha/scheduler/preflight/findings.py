"""What of a job does not go with its dataset, found by comparing what both state of themselves.

Nothing is read or asked here. An *error* is certain: every worker would fail on it. Everything else is
*advice*. What is not known (an old manifest lacks the numbers, config.json a default) is not judged. All
are one module, as they share one comparison, and some findings leave others without a meaning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from shlex import quote

from hypha.config.job import JobConfig
from hypha.config.tasks import ALIASES, IGNORED, ONE_LABEL_A_ROW
from hypha.messages import Column, ColumnRange, Manifest
from hypha.scheduler.descriptions import inputs_of
from hypha.scheduler.preflight.known import JOB, ModelDescription, PreflightFinding, described, number

_ARGUMENTS = f"{JOB}.model.arguments"
_INPUTS = f"{JOB}.model.input_names"
_DATASET = f"{JOB}.dataset.dataset"
_PREPROCESSOR = f"{JOB}.preprocessor"

_LABELS = ("labels", "label")
#: tasks whose labels are tokens
_TOKEN_LABELS = frozenset(("causal-lm", "masked-lm", "seq2seq-lm"))
#: others have a class a place as well, and call it otherwise
_A_LABEL_A_PLACE = frozenset(("token-classification", "semantic-segmentation"))
_IMAGES = frozenset(("image-classification", "semantic-segmentation", "image-segmentation"))
_TEXTS = frozenset(
    (
        *("causal-lm", "masked-lm", "seq2seq-lm", "sequence-classification", "token-classification"),
        *("question-answering", "multiple-choice", "next-sentence-prediction"),
    )
)
#: without one of these a model of images, or of texts, has nothing to begin with
_IMAGE_INPUTS = ("pixel_values", "inputs", "flattened_patches")
_TEXT_INPUTS = ("input_ids", "inputs_embeds", "inputs")
#: models with a learnt table of positions, which has no row for a longer text; others compute theirs
_LEARNT_POSITIONS = frozenset(
    ("gpt2", "openai-gpt", "gpt_neo", "bert", "distilbert", "electra", "albert", "opt")
)
#: models that refuse images of another size
_ONE_SIZE = frozenset(("vit", "deit", "vit_msn"))


def findings(
    job: JobConfig,
    manifest: Manifest,
    model: ModelDescription | None,
    preprocessor: Mapping[str, object] | None = None,
) -> list[PreflightFinding]:
    """All that is found, errors first. ``model`` is ``None`` where there is no config.json to read, as of
    plain PyTorch; ``preprocessor`` is the content of preprocessor_config.json, where that can be read.
    """
    if not manifest.columns:
        return []
    compared = _Comparison(job, manifest, model or ModelDescription(), preprocessor or {})
    found = list(dict.fromkeys(compared.all()))
    return sorted(found, key=lambda one: not one.error)


class _Comparison:
    def __init__(
        self, job: JobConfig, manifest: Manifest, model: ModelDescription, preprocessor: Mapping[str, object]
    ) -> None:
        self._job = job
        self._task = ALIASES.get(job.model.type, job.model.type)
        self._model = model
        self._preprocessor_file = preprocessor
        self._slices = len(manifest.slices)
        self._all = {column.name: column for column in manifest.columns}
        self._ranges = {one.column: one for one in manifest.ranges}
        self._given = inputs_of(job.model.input_names)
        self._consumes = {} if job.preprocessor is None else inputs_of(job.preprocessor.input_names)
        #: what is left for the model; a preprocessor adds more, nobody knows what
        self._columns = {
            name: column for name, column in self._all.items() if name not in self._consumes.values()
        }

    def all(self) -> Iterator[PreflightFinding]:
        yield from self._names()
        yield from self._preprocessor()
        main_input, meant = list(self._main_input()), self._model.task
        if main_input and meant not in (None, self._task):
            # nothing that is found for the other task would help
            text = f"it is {self._task}, but config.json names a model for {meant}; set it to {meant}"
            yield PreflightFinding(f"{JOB}.model.type", text)
            return
        yield from main_input
        yield from self._labels()
        yield from self._tokens()
        yield from self._images()
        workers = self._job.resources.num_workers
        if self._slices < workers:
            yield PreflightFinding(
                f"{JOB}.resources.num_workers",
                f"the dataset has {self._slices} slices for {workers} workers, and a slice goes to one "
                "worker at a time: some will wait; prepare it with a smaller --slice-samples",
                error=False,
            )

    def _column(self, *arguments: str) -> Column | None:
        """The column of the dataset that is the first of those arguments to be given."""
        names = [self._given.get(argument, "") for argument in arguments] if self._given else arguments
        return next((self._columns[name] for name in names if name in self._columns), None)

    def _names(self) -> Iterator[PreflightFinding]:
        if self._job.preprocessor is not None:
            return
        for argument, name in self._given.items():
            if name not in self._columns:
                yield self._absent(_INPUTS, argument, name)

    def _absent(self, key: str, argument: str, name: str) -> PreflightFinding:
        return PreflightFinding(
            key,
            f"{argument} is to be the column {name}, but the dataset has none of that name; it has "
            f"{described(self._all)}",
        )

    def _main_input(self) -> Iterator[PreflightFinding]:
        """Of the tasks whose models all begin with the same argument."""
        wanted = _IMAGE_INPUTS if self._task in _IMAGES else _TEXT_INPUTS if self._task in _TEXTS else ()
        if not wanted or self._job.preprocessor is not None:
            return
        if self._given.keys() & set(wanted) or (not self._given and self._columns.keys() & set(wanted)):
            return
        text = (
            f"a model of the task {self._task} takes {wanted[0]}, but the dataset has "
            f"{described(self._all)}, and no input name says which of these it is"
        )
        flat = next(
            (one for one in self._columns.values() if one.dtype == "U8" and len(one.shape) == 1), None
        )
        if flat is not None and wanted is _TEXT_INPUTS:
            advice = (
                f"{flat.name} seems to be text as bytes: give the job a preprocessor of type tokenizer, or "
                "prepare the dataset with --tokenizer"
            )
            yield PreflightFinding(_PREPROCESSOR, f"{text}; {advice}")
        elif flat is not None:
            advice = (
                f"{flat.name} seems to be files of images as bytes: have `hypha-data prepare` decode them, "
                "from an image folder or a Parquet file"
            )
            yield PreflightFinding(_DATASET, f"{text}; {advice}")
        else:
            yield PreflightFinding(
                _INPUTS, f"{text}; set it, or prepare the dataset with --rename COLUMN={wanted[0]}"
            )

    def _preprocessor(self) -> Iterator[PreflightFinding]:
        given = self._job.preprocessor
        if given is None:
            return
        if not self._consumes:
            yield PreflightFinding(
                f"{_PREPROCESSOR}.input_names",
                "it names no columns for the preprocessor to work on; of "
                f"{described(self._all)} say which is which argument, such as {{text = 'COLUMN'}}",
            )
        for argument, name in self._consumes.items():
            column = self._all.get(name)
            if column is None:
                yield self._absent(f"{_PREPROCESSOR}.input_names", argument, name)
            elif argument.startswith("text") and (column.dtype != "U8" or len(column.shape) != 1):
                yield PreflightFinding(
                    _PREPROCESSOR,
                    f"a tokenizer takes text (U8, a row of bytes), but the column {name} is "
                    f"{described({name: column})}: tokens already, it seems; leave the preprocessor out, or "
                    "name another column",
                )
            elif argument == "images":
                yield from self._processed_images(column)

    def _processed_images(self, column: Column) -> Iterator[PreflightFinding]:
        if len(column.shape) < 2:
            yield PreflightFinding(
                f"{_PREPROCESSOR}.input_names",
                f"images are to be the column {described({column.name: column})}, whose rows are flat; have "
                "`hypha-data prepare` decode them, or give them a shape (--shape)",
            )
        found = self._ranges.get(column.name)
        rescales = self._preprocessor_file.get("do_rescale", bool(self._preprocessor_file))
        if found is not None and found.high <= 1 and column.dtype.startswith(("F", "BF")) and rescales:
            yield PreflightFinding(
                _PREPROCESSOR,
                f"it divides pixels by 255, but those of {column.name} run from {number(found.low)} to "
                f"{number(found.high)} already; prepare them with --dtype {quote(column.name)}=U8, or set "
                "do_rescale to false in its preprocessor_config.json",
                error=False,
            )

    def _labels(self) -> Iterator[PreflightFinding]:
        given = self._job.model
        labels = self._column("labels") if self._given else self._column(*_LABELS)
        by_row, by_place = self._task in ONE_LABEL_A_ROW, self._task in _A_LABEL_A_PLACE
        if labels is None:
            # a preprocessor may make labels of a text, or of an image, but no class of a row
            made = self._job.preprocessor is not None and not by_row
            # that of a name which the dataset does not have is reported already
            missing = self._given.get("labels", "") not in ("", *self._columns)
            if (given.loss is not None or by_row or by_place) and not made and not missing:
                yield self._no_labels()
            return
        found = self._ranges.get(labels.name)
        if given.loss in ("mse", "l1"):
            return
        if given.loss == "bce-with-logits":
            yield from self._probable(labels, found, "the loss bce-with-logits")
        elif given.loss == "cross-entropy":
            yield from self._whole(labels, found, "cross-entropy chooses among classes")
        elif by_row:
            yield from self._of_a_row(labels, found)
        elif self._task == "token-classification" and found is not None:
            # of pixels one class more is often left out, and which one only the model knows
            yield from self._classes(labels, found)

    def _no_labels(self) -> PreflightFinding:
        if self._given:
            return PreflightFinding(
                _INPUTS,
                f"it names {', '.join(sorted(self._given))}, but no labels, without which there is no loss; "
                f"the dataset has {described(self._all)}",
            )
        return PreflightFinding(
            _DATASET,
            "it has no column labels or label, without which there is no loss; it has "
            f"{described(self._all)}; prepare it with --rename COLUMN=labels, or set model.input_names",
        )

    def _of_a_row(self, labels: Column, found: ColumnRange | None) -> Iterator[PreflightFinding]:
        """As transformers chooses a loss: by ``problem_type``, else by how many labels a row has."""
        classes, problem = self._model.num_labels, self._model.problem_type
        if classes is None or problem == "regression" or (problem is None and classes == 1):
            return
        many = len(labels.shape) == 1 and labels.shape[0] > 1
        if problem == "multi_label_classification" or (problem is None and many):
            if labels.shape != (classes,):
                have = f"{labels.shape[0]} columns" if many else "one number a row"
                yield PreflightFinding(
                    _ARGUMENTS,
                    f"the column {labels.name} has {have}, but with several labels a row the model wants "
                    f"{classes}, each 0 or 1; set num_labels to the number of columns, or problem_type to "
                    "single_label_classification",
                )
            else:
                yield from self._probable(labels, found, "multi_label_classification")
            return
        yield from self._whole(labels, found, f"the model chooses among {classes} classes")
        if found is not None and found.whole:
            yield from self._classes(labels, found)

    def _probable(self, labels: Column, found: ColumnRange | None, what: str) -> Iterator[PreflightFinding]:
        if found is None or labels.dtype == "BOOL":
            return
        low = min(found.low, IGNORED) if found.ignored else found.low
        if low < 0 or found.high > 1:
            yield PreflightFinding(
                f"{JOB}.model.loss",
                f"the column {labels.name} runs from {number(low)} to {number(found.high)}, but {what} "
                "takes 0 to 1; for classes by number set model.loss to cross-entropy, or model.arguments "
                "problem_type to single_label_classification",
            )

    def _whole(self, labels: Column, found: ColumnRange | None, told: str) -> Iterator[PreflightFinding]:
        # rows of several numbers may be a class's probabilities
        if found is not None and not found.whole and not labels.shape:
            yield PreflightFinding(
                f"{JOB}.model.loss",
                f"the column {labels.name} ({labels.dtype}, {number(found.low)} to {number(found.high)}) "
                f"does not hold whole numbers, but {told}; for regression set model.arguments num_labels = "
                "1, or model.loss to mse",
            )

    def _classes(self, labels: Column, found: ColumnRange) -> Iterator[PreflightFinding]:
        classes = self._model.num_labels
        if classes is None:
            return
        low, high = found.low, found.high
        text = (
            f"the column {labels.name} runs from {number(low)} to {number(high)}, but the model has "
            f"{classes} classes, 0 to {classes - 1}"
        )
        if low >= 0 and high < classes:
            if high + 1 < classes:
                yield PreflightFinding(
                    _ARGUMENTS,
                    f"{text}: some are never trained; if that is not meant set num_labels to the number of "
                    f"classes, {number(high + 1)}",
                    error=False,
                )
        elif low < 0:
            yield PreflightFinding(
                _DATASET, f"{text}; number the classes from 0 when preparing it ({IGNORED} is left out)"
            )
        elif low > 0 and high - low < classes:
            yield PreflightFinding(_DATASET, f"{text}; number the classes from 0 when preparing it")
        else:
            yield PreflightFinding(
                _ARGUMENTS, f"{text}; set num_labels to the number of classes, {number(high + 1)} at least"
            )

    def _tokens(self) -> Iterator[PreflightFinding]:
        names = self._given or {name: name for name in self._columns}
        for argument, name in names.items():
            column = self._columns.get(name)
            if column is not None and argument.endswith("input_ids"):
                yield from self._ids(column, may_be_ignored=False)
        labels = self._column("labels")
        if labels is not None and self._task in _TOKEN_LABELS and self._job.model.loss is None:
            yield from self._ids(labels, may_be_ignored=True)
        yield from self._positions()

    def _ids(self, column: Column, may_be_ignored: bool) -> Iterator[PreflightFinding]:
        if column.dtype.startswith(("F", "BF")):
            yield PreflightFinding(
                _DATASET,
                f"the column {column.name} is {column.dtype}, but ids of tokens are whole numbers; prepare "
                f"it with --dtype {quote(column.name)}=I64",
            )
            return
        found, rows = self._ranges.get(column.name), self._model.vocab_size
        if found is None or rows is None:
            return
        low = min(found.low, IGNORED) if found.ignored and not may_be_ignored else found.low
        if low < 0 or found.high >= rows:
            yield PreflightFinding(
                _DATASET,
                f"the column {column.name} holds ids of tokens from {number(low)} to {number(found.high)}, "
                f"but the model's vocabulary has {rows}; prepare it with the model's own tokenizer, or, of "
                f"a model from scratch, set model.arguments vocab_size = {number(found.high + 1)}",
            )

    def _positions(self) -> Iterator[PreflightFinding]:
        ids, longest = self._column("input_ids"), self._model.positions
        if ids is None or longest is None or len(ids.shape) != 1 or ids.shape[0] <= longest:
            return
        certain = self._model.kind in _LEARNT_POSITIONS
        yield PreflightFinding(
            _DATASET,
            f"its rows have {ids.shape[0]} tokens, but the model has {longest} positions; prepare it with "
            f"--sequence-length {longest} or less",
            error=certain,
            refutable=not certain,
        )

    def _images(self) -> Iterator[PreflightFinding]:
        pixels = self._column("pixel_values")
        if pixels is None or self._task not in _IMAGES:
            return
        if len(pixels.shape) != 3:
            yield PreflightFinding(
                _DATASET,
                f"the column {described({pixels.name: pixels})} holds no images of channels, height and "
                f"width; prepare it with --shape {quote(pixels.name)}=CHANNELS,HEIGHT,WIDTH",
            )
            return
        channels, height, width = pixels.shape
        wanted, size = self._model.channels, self._model.image_size
        if wanted is not None and channels != wanted:
            last = ", with the channels last" if width == wanted else ""
            yield PreflightFinding(
                _DATASET,
                f"its images ({pixels.name} {list(pixels.shape)}) have {channels} channels{last}, but the "
                f"model takes {wanted}; prepare them with --image-channels {wanted}, or, of a model from "
                f"scratch, set model.arguments num_channels = {channels}",
            )
        elif size is not None and size != (height, width):
            certain = self._model.kind in _ONE_SIZE
            yield PreflightFinding(
                _DATASET,
                f"its images are {height}x{width}, but the model takes {size[0]}x{size[1]}; prepare them "
                f"with --image-size {size[0]}x{size[1]}, or, of a model from scratch, set model.arguments "
                "image_size",
                error=certain,
                refutable=not certain,
            )
