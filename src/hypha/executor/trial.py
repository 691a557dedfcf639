"""A child process of the scheduler that tries a batch on a job's model before anybody is leased.

The batch is made up: rows of the dataset's columns with their smallest and their largest numbers. A small
model is built as the parameter server would build it, with its weights, and goes forward and back in the code
that trains. Of a large one only the shapes and types are gone through, without memory for its numbers.

What any worker would say, too, is a failure. Whatever else goes wrong here (a package that this machine
lacks, an operation that needs numbers) means that it could not be tried, never that the job is wrong.
Standard input has one line with the :class:`~hypha.messages.Trial`, standard output gets one with the report.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import os
import re
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from hypha.errors import BatchFailed, DataError, HyphaError, ModelError
from hypha.executor.files.tensors import DTYPES
from hypha.executor.inner.loop import Inner, Processor
from hypha.executor.models import loading as models
from hypha.executor.models.diagnosis import explain, out_of_range
from hypha.executor.models.forward import Forward
from hypha.executor.models.preprocessing import Preprocessor
from hypha.executor.models.weights import weight_file
from hypha.messages import Column, ColumnRange, Trial, TrialReport

#: models with more parameters are not built just for this, nor are larger files of weights read
SMALL_PARAMETERS = 30_000_000
SMALL_BYTES = 200 << 20
#: nor is a larger batch made up
MOST_NUMBERS = 1 << 25
#: whoever asks has given up, or was killed
_LIMIT_S = 120
#: what torch says of shapes and types, which it knows without any numbers
_OF_SHAPES = re.compile(
    r"shapes? cannot be multiplied|reduction dim|size mismatch|must match|doesn't match|but got"
    r"|scalar type|same dtype|should be the same|unexpected keyword|missing \d+ required"
)
#: what torch's errors about a device without numbers have in common
_META = re.compile(r"\bmeta (device|tensor)", re.IGNORECASE)
#: how transformers says that an architecture may be younger than itself
_NEWER = "Transformers does not recognize this architecture"
#: a text that is short for every tokenizer and model: how long the real ones are, only they tell
_TEXT = b"a"


class _UntriedError(Exception):
    """It cannot be tried here; says why."""


def try_batch(trial: Trial) -> TrialReport:
    """Build the model and give it a batch. Whatever goes wrong is in the report."""
    notes: list[str] = []
    try:
        return _tried(trial, notes)
    except _UntriedError as exc:
        return TrialReport(outcome="unknown", reason=str(exc), notes=tuple(notes))
    except (ModelError, DataError) as exc:
        outcome: Literal["failed", "unknown"] = "unknown" if _is_of_this_machine(exc, trial) else "failed"
        return TrialReport(outcome=outcome, reason=" ".join(str(exc).split()), notes=tuple(notes))
    except Exception as exc:  # noqa: BLE001 - a service's edge: what nobody foresaw judges nothing
        told = " ".join(str(exc).split())
        return TrialReport(outcome="unknown", reason=f"{type(exc).__name__}: {told}", notes=tuple(notes))


def _tried(trial: Trial, notes: list[str]) -> TrialReport:
    spec = trial.job.model
    source = None if trial.model is None else Path(trial.model)
    if spec.trust_remote_code:
        raise _UntriedError("the model's repository has code of its own, which is run by workers only")
    if spec.entrypoint is not None:
        _find_package(spec.entrypoint)
    elif source is None:
        raise _UntriedError("the model's files are not on this machine")
    columns = _rows_of(trial)
    if trial.job.preprocessor is not None:
        if trial.preprocessor is None:
            raise _UntriedError("the preprocessor's files are not on this machine")
        columns = Preprocessor(trial.job.preprocessor, Path(trial.preprocessor))(columns)
    file = None if source is None or not trial.weights else weight_file(source, spec.task)
    skeleton = _skeleton(trial, source)
    # those that take their size from the first batch are refused when it is built
    known = (one for one in skeleton.parameters() if not isinstance(one, UninitializedParameter))
    parameters = sum(one.numel() for one in known)
    notes += _unexpected(skeleton, trial, columns)
    small = parameters <= SMALL_PARAMETERS and (file is None or _size_of(file) <= SMALL_BYTES)
    if not small:
        _shapes(skeleton, trial, columns)
        return TrialReport(outcome="passed", parameters=parameters, shapes_only=True, notes=tuple(notes))
    model = models.build(spec, source, weights=trial.weights, tell=notes.append)
    # the optimizer takes no step: its first one is after two batches
    job = msgspec.structs.replace(trial.job, gradient_accumulation=2)
    Inner(model, Forward(model, spec), job, Processor(), 0).batch(columns)
    return TrialReport(outcome="passed", parameters=parameters, notes=tuple(notes))


def _find_package(entrypoint: str) -> None:
    package = entrypoint.partition(":")[0].partition(".")[0]
    try:
        found = importlib.util.find_spec(package)
    except ValueError:
        found = None
    if found is None:
        raise _UntriedError(f"the package {package} of {entrypoint} is not installed on this machine")


def _skeleton(trial: Trial, source: Path | None) -> nn.Module:
    try:
        return models.skeleton(trial.job.model, source)
    except (ModelError, NotImplementedError, RuntimeError) as exc:
        told = " ".join(str(exc).split())
        of_device = isinstance(exc.__cause__, NotImplementedError | RuntimeError) or _META.search(told)
        if isinstance(exc, ModelError) and not of_device:
            raise
        raise _UntriedError(f"the model cannot be built without numbers: {told}") from exc


def _size_of(file: Path) -> int:
    """Of a weight file, or of all that lie beside an index of them."""
    beside = file.parent.glob("*.safetensors") if file.suffix == ".json" else (file,)
    return sum(path.stat().st_size for path in beside)


def _unexpected(model: nn.Module, trial: Trial, columns: Mapping[str, Tensor]) -> list[str]:
    """What was meant for the model, and the model does not take. Raises :class:`BatchFailed`."""
    forward, inputs = Forward(model, trial.job.model), trial.job.model.inputs
    takes = ", ".join(forward.names)
    unknown = sorted(set(inputs) - set(forward.names) - {"labels"})
    if unknown and not forward.takes_any:
        name = unknown[0]
        raise BatchFailed(
            f"model.input_names gives the column {inputs[name]} as {name}, but the model's forward takes "
            f"{takes}; correct the name"
        )
    if inputs:
        return (
            [f"the model's forward does not name {', '.join(unknown)}; it takes {takes}"] if unknown else []
        )
    used = set(forward.used(columns).values())
    left = sorted(set(columns) - used)
    if not left:
        return []
    return [
        f"the model does not use the column{'s' if len(left) > 1 else ''} {', '.join(left)}; its forward "
        f"takes {takes}"
    ]


def _shapes(model: nn.Module, trial: Trial, columns: Mapping[str, Tensor]) -> None:
    """Raises :class:`BatchFailed`."""
    spec = trial.job.model
    forward = Forward(model, spec)
    try:
        forward.check(columns)
        if wrong := out_of_range(model, spec, columns, forward.classes):
            raise BatchFailed(wrong)
        forward.loss(model, {name: value.to("meta") for name, value in columns.items()})
    except (ModelError, BatchFailed):
        raise
    except DataError as exc:
        raise BatchFailed(str(exc)) from exc
    except Exception as exc:
        told = " ".join(str(exc).split())
        # what a model says of shapes in words of its own is a ValueError
        known = isinstance(exc, ValueError) or _OF_SHAPES.search(told)
        if isinstance(exc, NotImplementedError) or _META.search(told) or not known:
            raise _UntriedError(f"the model cannot be gone through without numbers: {told}") from exc
        raise BatchFailed(explain(exc, model, spec, columns, forward.classes)) from exc


def _is_of_this_machine(exc: HyphaError, trial: Trial) -> bool:
    """Might a worker do better: with a package or a file that this machine lacks, or a newer transformers?"""
    cause = exc.__cause__
    module = (trial.job.model.entrypoint or "").partition(":")[0]
    if isinstance(cause, ModuleNotFoundError) and cause.name and module:
        # where the package is here, and it has no such module, it is the job that is wrong
        return not f"{module}.".startswith(f"{cause.name}.")
    if isinstance(cause, OSError) and str(exc).startswith("the preprocessor"):
        return False
    return isinstance(cause, ImportError | MemoryError | OSError) or _NEWER in str(exc)


def _rows_of(trial: Trial) -> dict[str, Tensor]:
    texts = {
        column
        for argument, column in (trial.job.preprocessor.inputs if trial.job.preprocessor else {}).items()
        if argument.startswith("text")
    }
    ranges = {one.column: one for one in trial.ranges}
    # what a data node says of its columns need not be true
    if sum(trial.rows * math.prod(column.shape) for column in trial.columns) > MOST_NUMBERS:
        raise _UntriedError(f"a row of the dataset has more than {MOST_NUMBERS // trial.rows} numbers")
    return {
        column.name: _text(column, trial.rows)
        if column.name in texts and column.dtype == "U8" and len(column.shape) == 1
        else _extremes(column, ranges.get(column.name), trial.rows)
        for column in trial.columns
    }


def _text(column: Column, rows: int) -> Tensor:
    return torch.tensor(list(_TEXT.ljust(column.shape[0], b"\0")), dtype=torch.uint8).repeat(rows, 1)


def _extremes(column: Column, found: ColumnRange | None, rows: int) -> Tensor:
    """The largest numbers in the first row, the smallest in the others; ones where nothing is known."""
    dtype = DTYPES.get(column.dtype)
    if dtype is None:
        raise _UntriedError(f"the column {column.name} is {column.dtype}, of which no numbers are made up")
    low, high = (0.0, 1.0) if found is None else (found.low, found.high)
    if found is None and not dtype.is_floating_point:
        high = 0.0
    values = torch.full((rows, *column.shape), low, dtype=torch.float64)
    values[0] = high
    return values.to(dtype)


def _import_early(task: str) -> None:
    """What a model of the task needs, while the trial itself is not known yet. Errors come again then."""
    if task != "torch":
        with contextlib.suppress(HyphaError, ImportError):
            models.auto_class(task)
            importlib.import_module("transformers.modeling_utils")


def main() -> None:
    """The program, with the task as its argument. Standard input and output are its line to the scheduler,
    which libraries do not get.
    """
    request, reply = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    signal.alarm(_LIMIT_S)
    _import_early(sys.argv[1])
    line = request.readline()
    if not line:
        return
    report = try_batch(msgspec.json.decode(line, type=Trial))
    with contextlib.suppress(BrokenPipeError), reply:
        reply.write(msgspec.json.encode(report) + b"\n")


if __name__ == "__main__":
    main()
    # a library's threads are not waited for
    sys.stdout.flush()
    os._exit(0)
