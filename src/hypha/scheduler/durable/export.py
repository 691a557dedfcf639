"""Where the trained model goes: a local directory, an fsspec URL or a Hugging Face repository.

Whether the place can be written is found out before anything else is done. A model appears there whole:
locally by one rename, on the hub by one commit, elsewhere with its ``config.json`` and ``hypha.json``
last, so that nothing half-written looks complete. An earlier local result is moved aside, never
overwritten. All methods block (call them in a thread) and raise :class:`OutputError`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from hypha.decoding import decode_json
from hypha.errors import OutputError, Undecodable
from hypha.files.places import UrlPlace
from hypha.files.staging import StagedDirectory
from hypha.runtime import new_id

logger = logging.getLogger(__name__)

#: written last where there is no rename: with it the model is complete
MARKER = "hypha.json"
#: what makes a directory a model for its users
_ENTRY_POINTS = ("config.json",)


class PublishedFile(Struct, frozen=True):
    name: str
    size: int


class Published(Struct, frozen=True):
    """``hypha.json`` beside a model: where it comes from, and all its files."""

    job: str
    job_id: str
    rounds: int
    samples: int
    theta: str
    files: tuple[PublishedFile, ...] = ()


def local_directory(place: str) -> Path | None:
    """The directory that ``place`` names; ``None`` for a URL or the hub."""
    scheme, separator, rest = place.partition("://")
    return None if separator and scheme != "file" else Path(rest if separator else place)


def absolute_place(place: str) -> str:
    """``place``, a directory from the root on."""
    directory = local_directory(place)
    return place if directory is None else str(directory.absolute())


def output_for(place: str, token: str | None = None) -> Output:
    """The one whose ``check`` finds out whether ``place`` can be written, and leaves nothing there; and whose
    ``publish`` takes the files of a directory, and returns where they are now, in words a user can copy.
    """
    directory = local_directory(place)
    if directory is not None:
        return LocalOutput(directory)
    if place.startswith("hf://"):
        return HubOutput(place.removeprefix("hf://").rstrip("/"), token)
    return UrlOutput(place.rstrip("/"))


@contextmanager
def _translated(place: str, doing: str) -> Iterator[None]:
    try:
        yield
    except OutputError:
        raise
    except Exception as exc:
        text = f"{doing} {place} failed: {type(exc).__name__}: {exc}"
        if exc.__cause__ is not None:  # the hub's library tells only there what went wrong
            text += f" ({exc.__cause__})"
        raise OutputError(text) from exc


def _staged_files(staged: Path) -> list[Path]:
    return sorted(path for path in staged.rglob("*") if path.is_file())


def _about(about: Published, staged: Path) -> bytes:
    files = tuple(
        PublishedFile(path.relative_to(staged).as_posix(), path.stat().st_size)
        for path in _staged_files(staged)
    )
    return msgspec.json.format(msgspec.json.encode(msgspec.structs.replace(about, files=files)), indent=1)


class LocalOutput:
    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.abspath(path))

    def check(self) -> None:
        """Its parent is created if need be; the directory itself appears with the model."""
        with _translated(str(self.path), "writing to"):
            if self.path.exists() and not self.path.is_dir():
                raise OutputError(f"the output {self.path} is a file; give a directory")
            if Path.cwd().is_relative_to(self.path):
                raise OutputError(
                    f"the output {self.path} is the directory in which the scheduler runs, or one above "
                    "it, and what is in there would be moved aside; give the model a directory of its own"
                )
            self.path.parent.mkdir(parents=True, exist_ok=True)
            probe = self.path.parent / f".hypha-probe-{new_id()}"
            probe.write_bytes(b"probe")
            probe.unlink()

    def publish(self, staged: Path, about: Published) -> str:
        """Copied next to the place, made durable, renamed."""
        with _translated(str(self.path), "publishing the model to"):
            with StagedDirectory(self.path, durable=True) as part:
                part.copy_tree(staged)
                (part.path / MARKER).write_bytes(_about(about, staged))
                # the state directory is private, the result is not
                for path in (part.path, *part.path.rglob("*")):
                    path.chmod(0o755 if path.is_dir() else 0o644)
                part.publish(replace=False, before=self._make_space)
        return str(self.path)

    def _make_space(self) -> None:
        if not self.path.exists():
            return
        if not any(self.path.iterdir()):
            self.path.rmdir()
            return
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.previous-{number}")).exists():
            number += 1
        self.path.rename(aside)
        logger.warning("What was in %s is kept in %s", self.path, aside)


class UrlOutput:
    """Any place fsspec can write: ``s3://bucket/prefix``, ``memory://`` ..."""

    def __init__(self, url: str) -> None:
        self.url = url

    def check(self) -> None:
        with _translated(self.url, "writing to"):
            place = UrlPlace(self.url)
            probe = f".hypha-probe-{new_id()}"
            place.write(probe, b"probe")
            place.remove(probe)

    def publish(self, staged: Path, about: Published) -> str:
        """What makes an earlier model complete goes first, what makes this one complete comes last; files
        of the earlier one that this one lacks, such as surplus shards, go too.
        """
        with _translated(self.url, "publishing the model to"):
            place = UrlPlace(self.url)
            last = [name for name in _ENTRY_POINTS if (staged / name).is_file()]
            names = [file.relative_to(staged).as_posix() for file in _staged_files(staged)]
            earlier = self._published(place)
            for name in (MARKER, *_ENTRY_POINTS):
                place.remove(name)
            for name in sorted(earlier - set(names)):
                place.remove(name)
            for name in [*(name for name in names if name not in last), *last]:
                place.put(staged / name, name)
            place.write(MARKER, _about(about, staged))
        return self.url

    @staticmethod
    def _published(place: UrlPlace) -> set[str]:
        if not place.exists(MARKER):
            return set()
        try:
            about = decode_json(place.read(MARKER), Published)
        except Undecodable:
            return set()
        return {file.name for file in about.files if ".." not in file.name.split("/")}


class HubOutput:
    """``hf://owner/name``: a repository on the Hugging Face hub."""

    def __init__(self, repository: str, token: str | None) -> None:
        self.repository, _, revision = repository.partition("@")
        self.revision = revision or None
        self._token = token

    def _api(self) -> Any:
        from huggingface_hub import HfApi
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
        return HfApi(token=self._token)

    def check(self) -> None:
        """Who are we, and may we write there? The repository is created if it is not there."""
        with _translated(f"hf://{self.repository}", "writing to"):
            api = self._api()
            api.whoami()
            api.create_repo(self.repository, repo_type="model", exist_ok=True)
            if self.revision is not None:
                api.create_branch(self.repository, branch=self.revision, exist_ok=True)

    def publish(self, staged: Path, about: Published) -> str:
        with _translated(f"hf://{self.repository}", "publishing the model to"):
            (staged / MARKER).write_bytes(_about(about, staged))
            self._api().upload_folder(
                repo_id=self.repository,
                folder_path=str(staged),
                revision=self.revision,
                commit_message=f"{about.job}: {about.rounds} rounds, {about.samples} samples",
            )
        return f"hf://{self.repository}"


#: a place for the model
Output = LocalOutput | UrlOutput | HubOutput
