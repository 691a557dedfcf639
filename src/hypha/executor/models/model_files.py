"""The parameter server's model: its files fetched in a thread of their own, built when it is needed."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from torch import nn

from hypha.errors import ModelError, PeerUnreachable, Refused
from hypha.executor.bridge.client import ALIVE_S, BridgeClient
from hypha.executor.files import tensors
from hypha.executor.files.theta import Theta, theta_of
from hypha.executor.models import loading as models
from hypha.messages import AggregateJob, Alive, Reference

logger = logging.getLogger("hypha.executor.parameter_server")

_FETCH_RETRY_S = 2.0


async def fetched(bridge: BridgeClient, reference: Reference) -> Path:
    """The directory of the files of ``reference``. Raises :class:`ModelError` where they are refused, and
    :class:`PeerUnreachable`.
    """
    try:
        return models.directory_of(path for path, _ in await bridge.fetch(reference))
    except Refused as exc:
        if exc.code == "no-space":
            # no fault of the model
            raise
        raise ModelError(f"the model's files cannot be fetched: {exc}") from exc


class ModelFiles:
    """A model that is to be trained from its beginning is needed at once; one that goes on from a checkpoint
    only when it is exported, and importing and building it takes longer than all the rest.
    """

    def __init__(
        self,
        bridge: BridgeClient,
        job: AggregateJob,
        too_late_within: Callable[[float], Awaitable[bool]],
        failed: Callable[[Exception], None],
    ) -> None:
        """Fetching begins. ``too_late_within`` waits so many seconds, until the job has ended: then it is too
        late for files that cannot be had. ``failed`` is called where they cannot.
        """
        self._bridge = bridge
        self._job = job
        self._too_late_within = too_late_within
        self._model: nn.Module | None = None
        #: what was chosen when the model was built, in lines for the user
        self.notes: list[str] = []
        self._changed = bridge.threads.condition()
        #: directories of what was fetched: the model's, and the preprocessor's, which is exported with it
        self._sources: tuple[Path | None, Path | None] | None = None
        self._failure: Exception | None = None

        def fail(exc: Exception) -> None:
            with self._changed:
                self._failure = exc
                self._changed.notify_all()
            failed(exc)

        bridge.threads.start("files", self._fetch, fail)

    async def first_theta(self) -> Theta:
        """That of the model, which is built. Raises :class:`ModelError`."""
        return theta_of(await self._build())

    async def export(self, theta: Theta, directory: Path) -> list[str]:
        """Write the model with ``theta`` in it, and all that belongs to it; the names of the files.

        Where it was built at the beginning, ``theta`` is that of the model. Raises :class:`ModelError`.
        """
        if self._model is None:
            place = theta_of(await self._build())
            if problem := tensors.difference(theta.specs(), place.specs()):
                raise ModelError(f"theta does not fit the model that it is to be exported with: {problem}")
            place.assign(theta)
        assert self._model is not None
        assert self._sources is not None
        source, preprocessor = self._sources
        return models.export(self._model, self._job.model, source, directory, preprocessor)

    async def _build(self) -> nn.Module:
        """The model, with its first theta if that is not in a checkpoint."""
        with self._changed:
            while not await self._changed.wait_for(
                lambda: self._sources is not None or self._failure is not None, ALIVE_S
            ):
                self._bridge.report(Alive())
        if self._sources is None:
            raise self._failure or ModelError("the model's files cannot be fetched")

        def tell(note: str) -> None:
            logger.warning("The model: %s.", note)
            self.notes.append(note)

        model = models.build(self._job.model, self._sources[0], weights=self._job.restore is None, tell=tell)
        self._model = model.requires_grad_(False)
        return model

    async def _fetch(self) -> None:
        job = self._job
        model = None if job.model.source is None else await self._fetched(job.model.source)
        preprocessor = None if job.preprocessor is None else await self._fetched(job.preprocessor.source)
        with self._changed:
            self._sources = model, preprocessor
            self._changed.notify_all()

    async def _fetched(self, reference: Reference) -> Path:
        while True:
            try:
                return await fetched(self._bridge, reference)
            except PeerUnreachable as exc:
                # only a model that is to be trained from its beginning is needed now
                if self._job.restore is None or await self._too_late_within(_FETCH_RETRY_S):
                    raise ModelError(f"the model's files cannot be fetched: {exc}") from exc
                logger.warning("The model's files, for its export, cannot be fetched yet: %s", exc)
