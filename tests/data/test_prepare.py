from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pytest
from tests.data.reading import read_dataset

from hypha.data import PrepareOptions, load_dataset_directory, prepare, verify
from hypha.data.manifest import MANIFEST_FILE, read_labels, read_manifest
from hypha.data.preparing import staging
from hypha.errors import ConfigError, DataError, InputUnusable
from hypha.files.disks import lock
from hypha.messages import ClassNames, Column
from hypha.rules.manifests import manifest_hash


def digits(directory: Path, samples: int = 200) -> tuple[Path, Path]:
    """NumPy files like those of scikit-learn's digits; the first pixel is the row's number."""
    directory.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    pixels = random.random((samples, 1, 8, 8), dtype=np.float32)
    pixels[:, 0, 0, 0] = np.arange(samples)
    np.save(directory / "pixel_values.npy", pixels)
    np.save(directory / "labels.npy", np.arange(samples) % 10)
    return directory / "pixel_values.npy", directory / "labels.npy"


def options(tmp_path: Path, *sources: Path, **changes: Any) -> PrepareOptions:
    changes.setdefault("output", tmp_path / "out")
    return PrepareOptions(sources=sources, **changes)


def test_digits_as_numpy_files(tmp_path: Path) -> None:
    pixels, labels = digits(tmp_path / "in")
    done = prepare(options(tmp_path, pixels, labels, slice_samples=32, name="digits", shuffle=False))
    assert done.manifest.name == "digits"
    assert done.manifest.columns == (
        Column(name="labels", dtype="I64", shape=()),
        Column(name="pixel_values", dtype="F32", shape=(1, 8, 8)),
    )
    assert [part.samples for part in done.manifest.slices] == [32] * 6 + [8]
    assert verify(tmp_path / "out") == []
    back = read_dataset(tmp_path / "out")
    assert np.array_equal(back["pixel_values"], np.load(pixels))
    assert np.array_equal(back["labels"], np.load(labels))
    loaded = load_dataset_directory(tmp_path / "out")
    assert loaded.manifest == done.manifest
    assert loaded.manifest_hash == done.manifest_hash
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_holdout_and_training_data_are_disjoint_and_complete(tmp_path: Path) -> None:
    sources = digits(tmp_path / "in")
    done = prepare(options(tmp_path, *sources, slice_samples=32, holdout=0.2, seed=5))
    assert done.holdout is not None
    assert (done.manifest.samples, done.holdout.samples) == (160, 40)
    assert done.holdout.name == "out-holdout"
    train, held = read_dataset(tmp_path / "out"), read_dataset(tmp_path / "out" / "holdout")
    rows = np.concatenate([train["pixel_values"][:, 0, 0, 0], held["pixel_values"][:, 0, 0, 0]]).astype(int)
    assert sorted(rows.tolist()) == list(range(200))
    assert np.array_equal(np.concatenate([train["labels"], held["labels"]]), rows % 10)
    assert verify(tmp_path / "out") == []


def test_the_holdout_may_go_elsewhere(tmp_path: Path) -> None:
    sources = digits(tmp_path / "in")
    prepare(options(tmp_path, *sources, holdout=0.1, holdout_output=tmp_path / "held"))
    assert len(read_dataset(tmp_path / "held")["labels"]) == 20
    assert len(read_dataset(tmp_path / "out")["labels"]) == 180
    assert not (tmp_path / "out" / "holdout").exists()


def test_the_same_options_give_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    sources = digits(tmp_path / "in")
    made = [
        prepare(
            options(
                tmp_path, *sources, output=tmp_path / str(number), slice_samples=50, holdout=0.1, seed=seed
            )
        )
        for number, seed in enumerate((1, 1, 2))
    ]
    assert made[0].manifest_hash == made[1].manifest_hash != made[2].manifest_hash
    order = read_dataset(tmp_path / "0")["pixel_values"][:, 0, 0, 0]
    assert order.tolist() != sorted(order.tolist())


def test_slices_by_megabytes(tmp_path: Path) -> None:
    sources = digits(tmp_path / "in")
    row_bytes = 8 * 8 * 4 + 8
    done = prepare(options(tmp_path, *sources, slice_mb=50 * row_bytes / 1e6))
    assert [part.samples for part in done.manifest.slices] == [50] * 4
    assert done.notes == ()


def test_too_few_slices_are_told(tmp_path: Path) -> None:
    done = prepare(options(tmp_path, *digits(tmp_path / "in")))
    assert len(done.manifest.slices) == 1
    assert "only 1 slice" in done.notes[0]


def test_all_problems_of_the_options_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(
            options(
                tmp_path,
                tmp_path / "absent",
                slice_samples=0,
                slice_mb=1,
                holdout=1.5,
                sequence_length=1,
                dtypes={"x": "F31"},
                shapes={"y": (0,)},
                features={"z": ()},
                name="a/",
            )
        )
    keys = [problem.key for problem in caught.value.problems]
    assert keys == [
        "source",
        "slice_samples",
        "slice_samples",
        "holdout",
        "sequence_length",
        "dtypes",
        "shapes",
        "features",
        "name",
    ]


def test_nothing_is_overwritten_without_force_and_foreign_files_never(tmp_path: Path) -> None:
    sources = digits(tmp_path / "in")
    first = prepare(options(tmp_path, *sources, holdout=0.5, seed=1))
    with pytest.raises(DataError, match="exists already"):
        prepare(options(tmp_path, *sources, seed=2))
    assert load_dataset_directory(tmp_path / "out").manifest_hash == first.manifest_hash
    second = prepare(options(tmp_path, *sources, seed=2, force=True))
    assert load_dataset_directory(tmp_path / "out").manifest_hash == second.manifest_hash
    assert not (tmp_path / "out" / "holdout").exists()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"thesis\.tex"):
        prepare(options(tmp_path, *sources, seed=3, force=True))
    assert (tmp_path / "out" / "thesis.tex").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_an_empty_directory_is_filled_and_a_file_is_refused(tmp_path: Path) -> None:
    sources = digits(tmp_path / "in")
    (tmp_path / "out").mkdir()
    prepare(options(tmp_path, *sources))
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is a file"):
        prepare(options(tmp_path, *sources, output=tmp_path / "file", force=True))


def test_the_source_cannot_be_the_output(tmp_path: Path) -> None:
    sources = digits(tmp_path / "in")
    with pytest.raises(DataError, match="holds the source"):
        prepare(options(tmp_path, *sources, output=tmp_path / "in", force=True))
    with pytest.raises(DataError, match="separate directories"):
        prepare(options(tmp_path, *sources, holdout=0.5, holdout_output=tmp_path / "out" / "x"))


@pytest.mark.parametrize(("umask", "directories", "files"), [(0o022, 0o755, 0o644), (0o027, 0o750, 0o640)])
def test_whoever_the_umask_lets_read_can_serve_it(
    tmp_path: Path, umask: int, directories: int, files: int
) -> None:
    (tmp_path / "in.csv").write_text("size,kind\n" + "\n".join(f"{i},{'ab'[i % 2]}" for i in range(40)))
    before = os.umask(umask)
    try:
        prepare(options(tmp_path, tmp_path / "in.csv", holdout=0.5, holdout_output=tmp_path / "held"))
        prepare(options(tmp_path, tmp_path / "in.csv", holdout=0.5, force=True))
    finally:
        os.umask(before)
    for directory in (tmp_path / "out", tmp_path / "held"):
        found = {path: path.stat().st_mode & 0o777 for path in [directory, *directory.rglob("*")]}
        assert {path.name for path in found} >= {"manifest.json", "labels.json", "slice-0000.safetensors"}
        assert {mode for path, mode in found.items() if path.is_dir()} == {directories}
        assert {mode for path, mode in found.items() if path.is_file()} == {files}


@contextlib.contextmanager
def served(directory: Path) -> Iterator[None]:
    """What a data node does with what it serves."""
    handle = lock(directory, fcntl.LOCK_SH)
    assert handle is not None
    try:
        yield
    finally:
        os.close(handle)


def test_what_is_being_served_is_not_replaced(tmp_path: Path) -> None:
    sources = digits(tmp_path / "in")
    first = prepare(options(tmp_path, *sources, seed=1))
    with served(tmp_path / "out"), served(tmp_path / "out"):
        with pytest.raises(InputUnusable, match=r"out is being served by a data node.*stop that node first"):
            prepare(options(tmp_path, *sources, seed=2, force=True))
    assert load_dataset_directory(tmp_path / "out").manifest_hash == first.manifest_hash
    with staging.Staging(tmp_path / "out", force=True) as late, served(tmp_path / "out"):
        with pytest.raises(InputUnusable, match="is being served"):
            late.publish()
    prepare(options(tmp_path, *sources, seed=2, force=True))
    assert load_dataset_directory(tmp_path / "out").manifest_hash != first.manifest_hash


def test_a_holdout_that_is_being_served_is_not_replaced_with_what_it_is_in(tmp_path: Path) -> None:
    sources = digits(tmp_path / "in")
    prepare(options(tmp_path, *sources, holdout=0.1, seed=1))
    inner = prepare(options(tmp_path, *sources, holdout=0.1, output=tmp_path / "out/holdout", force=True))
    for place in ("holdout", "holdout/holdout"):
        with served(tmp_path / "out" / place):
            with pytest.raises(InputUnusable, match=rf"out/{place} is being served by a data node"):
                prepare(options(tmp_path, *sources, seed=2, force=True))
    with staging.Staging(tmp_path / "out", force=True) as late, served(tmp_path / "out/holdout"):
        with pytest.raises(InputUnusable, match="out/holdout is being served"):
            late.publish()
    assert load_dataset_directory(tmp_path / "out/holdout").manifest_hash == inner.manifest_hash
    prepare(options(tmp_path, *sources, seed=2, force=True))
    assert not (tmp_path / "out/holdout").exists()


@pytest.mark.parametrize("place", ["", "slice-0000.safetensors"])
def test_what_may_not_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    prepare(options(tmp_path, *digits(tmp_path / "in")))
    # root reads everything; this is how the system answers anybody else
    refused = tmp_path / "out" / place
    monkeypatch.setattr(os, "access", lambda path, mode: path != refused)
    with pytest.raises(DataError, match=rf"{refused} may not be read by this user.*chmod -R a\+rX"):
        load_dataset_directory(tmp_path / "out")


@pytest.mark.parametrize(("holdout", "said"), [(0.001, "no sample in it"), (0.999, "is in the holdout")])
def test_a_holdout_that_leaves_one_side_empty_is_refused(tmp_path: Path, holdout: float, said: str) -> None:
    sources = digits(tmp_path / "in", samples=10)
    with pytest.raises(DataError, match=said):
        prepare(options(tmp_path, *sources, holdout=holdout))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_an_error_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    pixels, labels = digits(tmp_path / "in")
    broken = np.load(pixels)
    broken[150, 0, 3, 3] = np.nan
    np.save(pixels, broken)
    with pytest.raises(DataError, match=r"row 151: nan in column 'pixel_values'"):
        prepare(options(tmp_path, pixels, labels, slice_samples=10))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = digits(tmp_path / "in")

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hypha.data.slices.sync", full)
    with pytest.raises(DataError, match="No space left on device"):
        prepare(options(tmp_path, *sources))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_leftovers_of_a_dead_run_are_removed_and_those_of_a_live_one_are_not(tmp_path: Path) -> None:
    sources = digits(tmp_path / "in")
    stale = tmp_path / ".out.preparing-dead"
    stale.mkdir()
    (stale / "slice-0000.safetensors").write_bytes(b"half")
    with staging.Staging(tmp_path / "out", force=False) as other:
        prepare(options(tmp_path, *sources))
        assert not stale.exists()
        assert other.path.is_dir()
        # the other run comes second, and must not replace what is there now
        with pytest.raises(DataError, match="exists already"):
            other.publish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize(("module", "name"), [(os, "open"), (fcntl, "flock")])
def test_a_run_that_removes_leftovers_while_another_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str
) -> None:
    """Between the making of a directory, its opening, and its locking."""
    real = getattr(module, name)
    first: list[staging.Staging] = []

    def overtaken(*arguments: Any) -> Any:
        monkeypatch.setattr(module, name, real)
        first.append(staging.Staging(tmp_path / "out", force=False))
        return real(*arguments)

    monkeypatch.setattr(module, name, overtaken)
    with staging.Staging(tmp_path / "out", force=False) as second, first[0]:
        assert second.path.is_dir()
        assert lock(second.path, fcntl.LOCK_EX) is None
        assert first[0].path.is_dir()
        (second.path / MANIFEST_FILE).write_text("second")
        second.publish()
    assert (tmp_path / "out" / MANIFEST_FILE).read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_where_there_are_no_locks_nothing_is_removed_but_what_was_replaced_is_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none_here(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none_here)
    first = prepare(options(tmp_path, *digits(tmp_path / "in")))
    (tmp_path / "out").rename(tmp_path / ".out.replaced-1")
    (tmp_path / ".out.preparing-2").mkdir()
    with pytest.raises(InputUnusable, match="out exists already"):
        prepare(options(tmp_path, *digits(tmp_path / "in"), seed=1))
    assert "out is there again: a run that was replacing it was killed half-way" in caplog.text
    assert load_dataset_directory(tmp_path / "out").manifest_hash == first.manifest_hash
    prepare(options(tmp_path, *digits(tmp_path / "in"), seed=1, force=True))
    assert load_dataset_directory(tmp_path / "out").manifest_hash != first.manifest_hash
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.preparing-2", "in", "out"]


SLOW = """
import signal, sys, time
from pathlib import Path
from hypha.data import PrepareOptions, prepare
from hypha.data.preparing import pipeline

cut = pipeline.SliceWriter._cut

def slow(self):
    cut(self)
    if len(self._slices) == 3:
        print("half", flush=True)
        time.sleep(60)

pipeline.SliceWriter._cut = slow
# whoever runs the tests in the background may have had it ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
directory = Path(sys.argv[1])
prepare(PrepareOptions(
    sources=(directory / "in" / "pixel_values.npy", directory / "in" / "labels.npy"),
    output=directory / "out", slice_samples=20, holdout=0.2,
))
"""


@pytest.mark.fault
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_killed_half_way_leaves_nothing_that_can_be_used(
    tmp_path: Path, number: signal.Signals
) -> None:
    sources = digits(tmp_path / "in")
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "half\n"
        os.kill(child.pid, number)
        assert child.wait(10) != 0
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError):
        load_dataset_directory(tmp_path / "out")
    left = [path for path in tmp_path.iterdir() if path.name != "in"]
    assert [path.name.startswith(".out.preparing-") for path in left] == [True] * (number == signal.SIGKILL)
    assert not any((path / MANIFEST_FILE).exists() for path in left)
    done = prepare(options(tmp_path, *sources, slice_samples=20, holdout=0.2))
    assert done.manifest.samples == 160
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_memory_does_not_grow_with_the_source(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    shape = (256, 1_000_000)
    np.lib.format.open_memmap(tmp_path / "in" / "x.npy", mode="w+", dtype=np.uint8, shape=shape).flush()
    code = (
        "import re, sys; from pathlib import Path; from hypha.data import PrepareOptions, prepare\n"
        "status = Path('/proc/self/status')\n"
        "def peak_kb(): return int(re.search(r'VmHWM:\\s+(\\d+)', status.read_text())[1])\n"
        "before = peak_kb()\n"
        "prepare(PrepareOptions((Path(sys.argv[1]),), Path(sys.argv[2]), shuffle=False, slice_mb=8))\n"
        "print(peak_kb() - before)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "in" / "x.npy"), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 100_000


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is not what prepare writes"),
        ('{"labels": {"a": 1, "b": 2}}', "does not number the classes of labels from 0 on"),
        ('{"labels": {"a": 0, "b": 0}}', "does not number the classes"),
        ('{"labels": {"' + "a" * (1 << 20) + '": 0}}', "is larger than"),
    ],
)
def test_names_of_classes_that_cannot_be_used_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str, told: str
) -> None:
    (tmp_path / "labels.json").write_text(content)
    assert read_labels(tmp_path) == ()
    assert told in caplog.text


def test_labels_are_named_in_a_file(tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text("size,kind\n1,cat\n2,dog\n3,cat\n4,ant\n")
    done = prepare(options(tmp_path, source, rename={"kind": "labels"}, shuffle=False, holdout=0.25))
    assert done.labels == {"labels": ("ant", "cat", "dog")}
    for directory in (tmp_path / "out", tmp_path / "out" / "holdout"):
        found = msgspec.json.decode((directory / "labels.json").read_bytes())
        assert found == {"labels": {"ant": 0, "cat": 1, "dog": 2}}
        # a data node says so in its manifest, whose hash and file are as they were
        served = load_dataset_directory(directory)
        assert served.manifest.labels == (ClassNames(column="labels", names=("ant", "cat", "dog")),)
        assert read_manifest(directory).labels == ()
        assert served.manifest_hash == manifest_hash(read_manifest(directory))
    train = read_dataset(tmp_path / "out")
    held = read_dataset(tmp_path / "out" / "holdout")
    names = dict(zip([*train["size"], *held["size"]], [*train["labels"], *held["labels"]], strict=True))
    assert names == {1: 1, 2: 2, 3: 1, 4: 0}
