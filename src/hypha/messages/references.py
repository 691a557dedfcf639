"""Where an executor's input comes from, and where its output goes."""

from __future__ import annotations

from typing import Literal

from hypha.messages.values import Message, PeerRef


class Uri(Message, tag="uri"):
    """An http(s) address."""

    value: str


class HuggingFace(Message, tag="huggingface"):
    """Files of a repository on the Hugging Face hub; all files when ``filenames`` is empty."""

    repository: str
    revision: str = "main"
    filenames: tuple[str, ...] = ()
    token: str | None = None


class Peers(Message, tag="peers"):
    """Named things at peers: ``resource`` is ``model`` (the model directory that a scheduler serves),
    ``checkpoint/<round>``, ``update``, ``theta``, ``export``.
    """

    peers: tuple[PeerRef, ...]
    strategy: Literal["all", "random", "one"] = "one"
    resource: str | None = None


class SchedulerData(Message, tag="scheduler"):
    """The next slice of ``dataset`` that the scheduler ``peer`` assigns."""

    peer: str
    dataset: str


class Local(Message, tag="local"):
    """A path on the worker, or any fsspec URL the worker can open."""

    url: str


Reference = Uri | HuggingFace | Peers | SchedulerData | Local
