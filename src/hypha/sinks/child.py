"""The process of one metric sink: lines of JSON in, one line of JSON back for each; and the tools that it
writes to, whose libraries are imported when a sink is opened: each is an extra.

The first line is a ``Begin``, every other one a ``RoundValues``; the reply says what went wrong, if anything
did. At the end of its input the sink is closed, and the process ends, as when its scheduler was killed.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import httpx
import msgspec

from hypha.config.environment import set_variable
from hypha.errors import HyphaError
from hypha.sinks.interface import Begin, Destination, RoundValues, RunInfo

#: a library that hangs for so long ends with the process: whoever waits has given up before, or was killed
_LIMIT_S = 90
#: longer than that nobody waits for the server of Weights & Biases
_WANDB_TIMEOUT_S = 20
_BRIDGE_IDLE_S = 1.0
_BRIDGE_TIMEOUT_S = 10


class MetricSink(Protocol):
    """May block, and may raise anything: it is started again then, and told the same round once more."""

    def open(self, destination: Destination, run: RunInfo) -> None:
        """Begin the run, or go on with it if it is there."""

    def record(self, values: RoundValues) -> None:
        """Write one round; what is written is safe with the tool when this returns, as far as it allows."""

    def close(self) -> None:
        """End the run; called once, when it was opened."""


def _made(*parts: str) -> str:
    path = Path(*parts)
    path.mkdir(parents=True, exist_ok=True)
    return str(path)


class TensorBoard:
    """Event files in ``<directory>/<job>``, written with the ``tensorboard`` package alone. Each run of the
    scheduler adds a file. What it says first is that rounds from its first one on replace those that were
    written before, so a job that went back shows each round once.
    """

    def open(self, destination: Destination, run: RunInfo) -> None:
        self._events = import_module("tensorboard.compat.proto.event_pb2")
        self._summaries = import_module("tensorboard.compat.proto.summary_pb2")
        writing = import_module("tensorboard.summary.writer.event_file_writer")
        self._writer: Any = writing.EventFileWriter(_made(destination.directory, run.job_id))
        self._last: int | None = None

    def record(self, values: RoundValues) -> None:
        if self._last is None or values.round <= self._last:
            log = self._events.SessionLog
            self._add(values, session_log=log(status=log.START))
        self._last = values.round
        scalars = [
            self._summaries.Summary.Value(tag=tag, simple_value=value) for tag, value in values.flat().items()
        ]
        self._add(values, summary=self._summaries.Summary(value=scalars))
        self._writer.flush()

    def _add(self, values: RoundValues, **content: Any) -> None:
        self._writer.add_event(self._events.Event(wall_time=values.at, step=values.round, **content))

    def close(self) -> None:
        self._writer.close()


class Trackio:
    """A local SQLite file in ``directory``, which trackio calls ``TRACKIO_DIR``, or a trackio server of one's
    own. Of a job that went back it shows a round twice.
    """

    def open(self, destination: Destination, run: RunInfo) -> None:
        """Go on with the run of that name: a job's id, as trackio tells runs apart by their names."""
        # read when it is imported
        set_variable("TRACKIO_DIR", _made(destination.directory))
        if destination.token:
            set_variable("TRACKIO_WRITE_TOKEN", destination.token)
        self._run: Any = import_module("trackio").init(
            project=destination.project,
            name=run.job_id,
            group=destination.name,
            server_url=destination.url,
            config=run.settings,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def record(self, values: RoundValues) -> None:
        """Its own thread writes the row within a second."""
        self._run.log(values.flat(), step=values.round)

    def close(self) -> None:
        """Have all rows written."""
        self._run.finish()


class WandB:
    """Weights & Biases: a run with the job's id, online or offline. Its history can only be added to, and its
    steps only grow: charts are over ``round``, and of a job that went back they show a round twice. Offline,
    every run of the scheduler leaves a directory of its own with the same run's id; ``wandb sync`` brings
    them together.
    """

    def open(self, destination: Destination, run: RunInfo) -> None:
        wandb = import_module("wandb")
        server = {"base_url": destination.url} if destination.url else {}
        key = {"api_key": destination.token} if destination.token else {}
        settings = wandb.Settings(
            mode="offline" if destination.offline else "online",
            silent=True,
            console="off",
            init_timeout=_WANDB_TIMEOUT_S,
            login_timeout=_WANDB_TIMEOUT_S,
            finish_timeout=_WANDB_TIMEOUT_S,
            # the job's metrics, and nothing about this machine
            disable_git=True,
            disable_code=True,
            x_disable_stats=True,
            x_disable_meta=True,
            **server,
            **key,
        )
        self._run: Any = wandb.init(
            project=destination.project,
            name=destination.name,
            id=run.job_id,
            resume="allow",
            dir=_made(destination.directory),
            config=run.settings,
            settings=settings,
        )
        self._run.define_metric("round")
        self._run.define_metric("*", step_metric="round")

    def record(self, values: RoundValues) -> None:
        """Hand a row to its service, which writes it to the disk and uploads it."""
        self._run.log({"round": values.round, **values.flat()})

    def close(self) -> None:
        """Wait for what is left to upload."""
        self._run.finish()


class Aim:
    """AIM's own repository in ``directory``, or an ``aim://`` server. A round that is told again replaces
    what was tracked at that step. The driver that came with the Rust Hypha takes the figures over HTTP, see
    :class:`StatusBridge`.
    """

    def open(self, destination: Destination, run: RunInfo) -> None:
        """Go on with the run that has the job's id among its parameters; AIM makes up hashes itself."""
        aim = import_module("aim")
        if destination.url:
            repo = aim.Repo(destination.url)
        else:
            repo = aim.Repo.from_path(_made(destination.directory), init=True)
        query = f"run.hypha_job == {run.job_id!r}"
        earlier = [found.run.hash for found in repo.query_runs(query).iter_runs()]
        self._run: Any = aim.Run(
            run_hash=earlier[0] if earlier else None,
            repo=repo,
            experiment=destination.project,
            # of the job, not of this machine
            system_tracking_interval=None,
            log_system_params=False,
            capture_terminal_logs=False,
        )
        if not earlier:
            self._run.name = destination.name
            self._run["hypha_job"] = run.job_id
            self._run["hparams"] = run.settings

    def record(self, values: RoundValues) -> None:
        """Track each figure; a worker's has its PeerID as context."""
        for name, value in values.values.items():
            self._run.track(value, name=name, step=values.round, epoch=values.round)
        for worker, figures in values.workers.items():
            for name, value in figures.items():
                context = {"worker": worker}
                self._run.track(value, name=name, step=values.round, epoch=values.round, context=context)

    def close(self) -> None:
        self._run.close()


class StatusBridge:
    """The status bridge of the Rust Hypha: ``POST <url>/status`` with one metric of one worker, as JSON. Its
    AIM driver listens to that, and so can any small server. Figures of the whole job are sent with the job's
    name as ``worker_id``.
    """

    def open(self, destination: Destination, run: RunInfo) -> None:
        """Nothing is sent yet."""
        headers = {"Authorization": f"Bearer {destination.token}"} if destination.token else {}
        self._url = f"{(destination.url or '').rstrip('/')}/status"
        self._job = destination.name
        # the bridge that was named, and no proxy of the environment. Rounds are further apart than servers
        # keep idle connections, mostly five seconds: one that is being closed would cost a figure
        limits = httpx.Limits(keepalive_expiry=_BRIDGE_IDLE_S)
        self._client = httpx.Client(
            headers=headers, timeout=_BRIDGE_TIMEOUT_S, trust_env=False, limits=limits
        )

    def record(self, values: RoundValues) -> None:
        """Send one request for each figure, over one connection."""
        for worker, figures in ((self._job, values.values), *values.workers.items()):
            for name, value in figures.items():
                body = {"worker_id": worker, "round": values.round, "metric_name": name, "value": value}
                response = self._client.post(self._url, json=body)
                if not response.is_success:
                    raise HyphaError(f"the bridge answered {response.status_code} to {name}")

    def close(self) -> None:
        self._client.close()


#: by what ``type`` says
SINKS: dict[str, Callable[[], MetricSink]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WandB,
    "aim": Aim,
    "http": StatusBridge,
}


def serve(lines: BinaryIO, replies: BinaryIO) -> None:
    """Until ``lines`` ends. An error of the sink is a reply, and the caller's affair."""

    def answer(error: str) -> None:
        replies.write(msgspec.json.encode(error) + b"\n")
        replies.flush()

    first = lines.readline()
    if not first:
        return
    begin = msgspec.json.decode(first, type=Begin)
    secret = begin.destination.token
    sink = SINKS[begin.destination.type]()

    def attempt(what: Callable[[], None]) -> bool:
        signal.alarm(_LIMIT_S)
        try:
            what()
        except Exception as exc:  # noqa: BLE001 - the edge of a service: whatever a foreign library raises
            # third parties quote addresses and headers
            text = f"{type(exc).__name__}: {exc}"
            answer(text.replace(secret, "(the token)") if secret else text)
            return False
        finally:
            signal.alarm(0)
        answer("")
        return True

    if not attempt(lambda: sink.open(begin.destination, begin.run)):
        return
    for line in lines:
        values = msgspec.json.decode(line, type=RoundValues)
        attempt(lambda values=values: sink.record(values))  # type: ignore[misc]
    attempt(sink.close)


def main() -> None:
    """The program: standard input and output are its line to the scheduler, which libraries do not get."""
    lines, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    try:
        serve(lines, replies)
    except BrokenPipeError:
        # the scheduler is gone
        sys.exit(1)


if __name__ == "__main__":
    main()
