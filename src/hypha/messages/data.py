"""Datasets, and which of their slices a worker trains on."""

from __future__ import annotations

from hypha.messages.values import FeatureNames, Id, JobStamp, Message, PeerRef, Value, VersionName


class SliceInfo(Value):
    """One slice of a manifest."""

    file: str
    samples: int
    size: int
    blake3: str


class Column(Value):
    """A column: dtype as safetensors spells it (``F32``, ``I64``), shape without the sample axis."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class ColumnRange(Value):
    """The smallest and the largest number of a column, over all samples. Without those that are -100, which
    no loss counts: there are ``ignored`` of them. ``whole``: all are whole numbers.
    """

    column: str
    low: float
    high: float
    whole: bool = True
    ignored: int = 0


class ClassNames(Value):
    """What the classes of a ``column`` are called: the first name is that of class 0, and so on."""

    column: str
    names: tuple[str, ...]


class Manifest(Value):
    """``manifest.json`` of a prepared dataset. ``ranges`` are empty, or lack columns, where nobody has looked
    (as in manifests of earlier versions); they follow from the slices, and are no part of the hash. Neither
    are ``labels``, which a data node takes from ``labels.json`` beside it.
    """

    name: str
    columns: tuple[Column, ...]
    slices: tuple[SliceInfo, ...]
    version: int = 1
    ranges: tuple[ColumnRange, ...] = ()
    labels: tuple[ClassNames, ...] = ()

    @property
    def samples(self) -> int:
        """Samples in all slices."""
        return sum(part.samples for part in self.slices)


class DescribeDataset(Message):
    """Do you serve this dataset? Send its manifest."""

    dataset: str


class DatasetDescription(Message):
    """The manifest, and its hash: replicas are interchangeable when that is the same. ``version`` and
    ``features`` are the data node's; without them it is older than these fields.
    """

    manifest: Manifest
    manifest_hash: str
    version: VersionName = ""
    features: FeatureNames = ()


class NextSlice(Message):
    """A worker asks for its next slice; the same ``seq`` gets the same answer again. ``cached`` lists
    slices of the dataset it holds. What it got for a ``seq`` before ``held_from`` it has dropped, unused
    rows and all, because it started over.
    """

    stamp: JobStamp
    incarnation: Id
    seq: int
    cached: tuple[int, ...] = ()
    held_from: int = 0


class SliceAssigned(Message):
    """Slice ``index`` of the dataset, in ``epoch``, from any of ``providers``. Up to ``ahead`` slices may be
    fetched before they are needed.
    """

    dataset: str
    index: int
    epoch: int
    samples: int
    size: int
    blake3: str
    providers: tuple[PeerRef, ...]
    ahead: int = 1


class NoSlice(Message):
    """Nothing to train on right now; ask again. ``reason`` says why."""

    retry_in_s: float
    reason: str
