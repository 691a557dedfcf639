"""Everything that can be known of a job before anybody is leased, from its configuration, its model's files
and its dataset's manifest.

What is certain to fail is an error and ends the job with exit code 2, as any other error of its configuration
does. What is likely, or could not be found out, is advice, and the job goes on.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from hypha.config.job import DEFAULT_EXECUTOR, JobConfig, ModelConfig, PreprocessorConfig
from hypha.decoding import decode
from hypha.errors import ConfigError, Problem, Undecodable
from hypha.messages import HuggingFace, Manifest, PeerRef, Trial, TrialReport
from hypha.runtime import in_thread
from hypha.scheduler.descriptions import described
from hypha.scheduler.preflight.findings import findings
from hypha.scheduler.preflight.known import JOB, ModelDescription, PreflightFinding, describe_model, printable
from hypha.scheduler.preflight.trial import ModelTrial

logger = logging.getLogger(__name__)

#: has a batch tried
RunTrial = Callable[[Trial], Awaitable[TrialReport]]
#: a job's start may be delayed so long by the trial of a batch
START_S = 10.0
#: one request to the hub may take this long
_HUB_S = 5.0


@dataclass(frozen=True)
class Checked:
    """What was found, errors first, and what came of the trial, if there was one."""

    findings: tuple[PreflightFinding, ...]
    trial: TrialReport | None = None

    @property
    def errors(self) -> list[Problem]:
        """Those for which every worker would fail."""
        return [one for one in self.findings if one.error]


async def check_before_leasing(job: JobConfig, manifest: Manifest, trial: ModelTrial | None) -> None:
    """Say what is found. Raises :class:`ConfigError` with all errors."""
    run = None if trial is None else partial(trial.run, timeout_s=START_S)
    checked = await check_job(job, manifest, run)
    for finding in checked.findings:
        log = logger.error if finding.error else logger.warning
        log("Before anybody is leased: %s", finding)
    if errors := checked.errors:
        hint = Problem(f"{JOB}.check", 'where this is wrong, "none" (or run --no-check) goes on nevertheless')
        raise ConfigError([*errors, hint])


async def check_job(job: JobConfig, manifest: Manifest, run_trial: RunTrial | None) -> Checked:
    """Compare, and where nothing is wrong so far try a batch. Without ``run_trial`` nothing but the files of
    this machine is looked at.
    """
    if job.resources.worker_executor != DEFAULT_EXECUTOR:
        # what another executor makes of models and columns is its own affair
        return Checked(())
    with tempfile.TemporaryDirectory(prefix="hypha-check-") as scratch:
        files = _Files(job, Path(scratch))
        found = await in_thread(files.unreadable)
        if run_trial is not None:
            found += await files.ask_hub()
        model, preprocessor = await in_thread(files.described), await in_thread(files.preprocessor_config)
        found += findings(job, manifest, model, preprocessor)
        found.sort(key=lambda one: not one.error)
        if run_trial is None or any(one.error for one in found):
            return Checked(tuple(map(printable, found)))
        report = await run_trial(_trial(job, manifest, files))
    if report.outcome == "passed":
        found = [one for one in found if not one.refutable]
    return Checked(tuple(map(printable, (*_told(report), *found))), report)


def _trial(job: JobConfig, manifest: Manifest, files: _Files) -> Trial:
    train, _ = described(job, PeerRef(peer=""), "")
    return Trial(
        job=train,
        model=None if files.model is None else str(files.model),
        preprocessor=None if files.preprocessor is None else str(files.preprocessor),
        # of a repository only its config.json is here
        weights=job.model.repository is None,
        columns=manifest.columns,
        ranges=manifest.ranges,
        rows=1 if job.rounds.batch_size == 1 else 2,
    )


def _told(report: TrialReport) -> list[PreflightFinding]:
    key = f"{JOB}.model"
    found = [PreflightFinding(key, note, error=False) for note in report.notes]
    if report.outcome == "failed":
        found.insert(0, PreflightFinding(key, report.reason))
    elif report.outcome == "unknown":
        text = f"no batch could be tried here: {report.reason}; the first worker tries one"
        found.append(PreflightFinding(key, text, error=False))
    return found


class _Files:
    """The model's and the preprocessor's files on this machine. ``model`` is the model's directory, which may
    hold no more than a config.json.
    """

    def __init__(self, job: JobConfig, scratch: Path) -> None:
        self._job = job
        self._scratch = scratch
        self.model = job.model.path
        self.preprocessor = None if job.preprocessor is None else job.preprocessor.path

    def unreadable(self) -> list[PreflightFinding]:
        """Files that the scheduler is to serve and may not read."""
        found = []
        for name, path in (("model", self._job.model.path), ("preprocessor", self.preprocessor)):
            if path is None:
                continue
            refused = [file for file in sorted(path.rglob("*")) if not os.access(file, os.R_OK)]
            if refused:
                more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
                text = f"{refused[0]}{more} may not be read by this user; have it made readable (chmod a+r)"
                found.append(PreflightFinding(f"{JOB}.{name}.path", text))
        return found

    async def ask_hub(self) -> list[PreflightFinding]:
        """Look for repositories on the hub; the model's config.json is here afterwards, if it has one."""
        found = []
        for name, given in (("model", self._job.model), ("preprocessor", self._job.preprocessor)):
            if given is None or given.repository is None:
                continue
            directory = self._scratch if name == "model" else None
            key = f"{JOB}.{name}.repository"
            text = f"the hub did not answer within {2 * _HUB_S:g} s; workers fetch it themselves"
            problem: PreflightFinding | None = PreflightFinding(key, text, error=False)
            with trio.move_on_after(2 * _HUB_S):
                problem = await in_thread(ask_hub, key, given, directory, abandon_on_cancel=True)
            if problem is not None:
                found.append(problem)
            elif directory is not None and (directory / "config.json").exists():
                self.model = directory
        return found

    def described(self) -> ModelDescription | None:
        """What the model's config.json states; ``None`` where there is none."""
        if self.model is None or self._job.model.entrypoint is not None:
            return None
        described = _json_in(self.model / "config.json")
        return None if described is None else describe_model(described, self._job.model.arguments)

    def preprocessor_config(self) -> Mapping[str, object] | None:
        path = self.preprocessor
        return None if path is None else _json_in(path / "preprocessor_config.json")


def _json_in(path: Path) -> dict[str, object] | None:
    try:
        content = decode(json.loads, path.read_bytes())
    except (OSError, Undecodable):
        return None
    return content if isinstance(content, dict) else None


def ask_hub(
    key: str,
    given: ModelConfig | PreprocessorConfig | HuggingFace,
    directory: Path | None,
    endpoint: str | None = None,
) -> PreflightFinding | None:
    """Look for the repository and its files, which ``key`` names; its config.json, if it has one, comes to
    ``directory``. Blocks. ``endpoint``: default as huggingface_hub has it (``HF_ENDPOINT``). Workers fetch
    the files themselves, so a hub that cannot be reached from here proves nothing. That it refuses the
    repository does.
    """
    # imported here: it takes half a second, and most jobs never need it
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub
    from huggingface_hub.utils._http import get_session
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    repository = given.repository or ""
    name = f"{repository}@{given.revision}"
    # a token of whoever runs the scheduler is not the job's: workers do not have it
    api = HfApi(endpoint=endpoint, token=given.token or False)
    client = sys.modules[type(get_session()).__module__.partition(".")[0]]
    http_error: type[Exception] = getattr(client, "HTTPError", OSError)
    try:
        info = api.model_info(repository, revision=given.revision, timeout=_HUB_S)
        files = {sibling.rfilename for sibling in info.siblings or ()}
        if missing := [file for file in given.filenames if file not in files]:
            return PreflightFinding(key, f"{name} has no file {', '.join(missing)}; correct filenames")
        if directory is not None and "config.json" in files:
            revision = info.sha or given.revision
            api.hf_hub_download(
                repository, "config.json", revision=revision, local_dir=directory, etag_timeout=_HUB_S
            )
        return None
    except hub.GatedRepoError:
        problem = f"{name} needs a token that was granted access; set token"
    except hub.RevisionNotFoundError:
        problem = f"the hub has no revision {name}; correct revision"
    except hub.RepositoryNotFoundError:
        problem = f"{name} is not on the hub, or private; correct repository, or set a token that may read it"
    except hub.HFValidationError as exc:
        problem = f"{name} is no name of a repository: {_first_line(exc)}"
    except (hub.HfHubHTTPError, hub.LocalEntryNotFoundError, http_error, OSError) as exc:
        text = (
            f"the hub cannot be asked for {name} from here ({_first_line(exc)}); workers fetch it themselves"
        )
        return PreflightFinding(key, text, error=False)
    return PreflightFinding(key, problem)


def _first_line(exc: BaseException) -> str:
    return next((line for line in str(exc).splitlines() if line.strip()), type(exc).__name__)
