"""The parameter server's model: its files fetched in a thread of their own, built when it is needed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import nn

from hypha.errors import ModelError, PeerUnreachable, Refused
from hypha.executor.bridge.client import BridgeClient
from hypha.executor.files import tensors
from hypha.executor.files.theta import Theta, theta_of
from hypha.executor.models import loading as models
from hypha.messages import AggregateJob, Reference

logger = logging.getLogger("hypha.executor.parameter_server")

_FETCH_RETRY_S = 2.0


def fetched(bridge: BridgeClient, reference: Reference) -> Path:
    """The directory of the files of ``reference``. Raises :class:`ModelError` where they are refused, and
    :class:`PeerUnreachable`.
    """
    try:
        return models.directory_of(path for path, _ in bridge.fetch(reference))
    except Refused as exc:
        if exc.code == "no-space":
            # no fault of the model
            raise
        raise ModelError(f"the model's files cannot be fetched: {exc}") from exc


class ModelFiles:
    """A model that is to be trained from its beginning is needed at once; one that goes on from a checkpoint
    only when it is exported, and importing and building it takes longer than all the rest.
    """

    def __init__(self, bridge: BridgeClient, job: AggregateJob, finishing: threading.Event) -> None:
        """Fetching begins. ``finishing``: it is too late for files that cannot be had."""
        self._bridge = bridge
        self._job = job
        self._finishing = finishing
        self._model: nn.Module | None = None
        #: what was chosen when the model was built, in lines for the user
        self.notes: list[str] = []
        threads = ThreadPoolExecutor(1, thread_name_prefix="files")
        self._fetching = threads.submit(self._fetch)

    def when_fetched(self, call: Callable[[Future[Any]], None]) -> None:
        """``call`` it once the files are here, or cannot be had."""
        self._fetching.add_done_callback(call)

    def build(self) -> nn.Module:
        """The model, with its first theta if that is not in a checkpoint. Raises :class:`ModelError`."""
        source, _ = self._sources()
        model = models.build(self._job.model, source, weights=self._job.restore is None, tell=self._tell)
        self._model = model.requires_grad_(False)
        return model

    def export(self, theta: Theta, directory: Path) -> list[str]:
        """Write the model with ``theta`` in it, and all that belongs to it; the names of the files.

        Where it was built at the beginning, ``theta`` is that of the model. Raises :class:`ModelError`.
        """
        if self._model is None:
            place = theta_of(self.build())
            if problem := tensors.difference(theta.specs(), place.specs()):
                raise ModelError(f"theta does not fit the model that it is to be exported with: {problem}")
            place.assign(theta)
        assert self._model is not None
        source, preprocessor = self._sources()
        return models.export(self._model, self._job.model, source, directory, preprocessor)

    def _tell(self, note: str) -> None:
        logger.warning("The model: %s.", note)
        self.notes.append(note)

    def _sources(self) -> tuple[Path | None, Path | None]:
        """Directories of what was fetched: the model's, and the preprocessor's, which is exported with it."""
        return self._bridge.patiently(self._fetching.result)

    def _fetch(self) -> tuple[Path | None, Path | None]:
        job = self._job
        model = None if job.model.source is None else self._fetched(job.model.source)
        return model, None if job.preprocessor is None else self._fetched(job.preprocessor.source)

    def _fetched(self, reference: Reference) -> Path:
        while True:
            try:
                return fetched(self._bridge, reference)
            except PeerUnreachable as exc:
                # only a model that is to be trained from its beginning is needed now
                if self._job.restore is None or self._finishing.wait(_FETCH_RETRY_S):
                    raise ModelError(f"the model's files cannot be fetched: {exc}") from exc
                logger.warning("The model's files, for its export, cannot be fetched yet: %s", exc)
