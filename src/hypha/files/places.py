"""A directory at an fsspec URL, on file systems and object stores alike.

All methods block, and raise what the URL's back end raises, which differs from one to the next: callers
translate. Nothing is remembered between calls, as others write to the same place.
"""

from __future__ import annotations

from pathlib import Path

import fsspec

#: There is nothing to make before an object is written; s3fs would make the bucket, too.
_WITHOUT_DIRECTORIES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss"})


class UrlPlace:
    """The directory at ``url``. File names are relative to it."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._files, path = fsspec.url_to_fs(self.url)
        self._path = str(path).rstrip("/")
        self._directories = self.url.partition("://")[0] not in _WITHOUT_DIRECTORIES

    def _at(self, name: str) -> str:
        self._files.invalidate_cache()
        return f"{self._path}/{name}" if name else self._path

    def _writable(self, name: str) -> str:
        path = self._at(name)
        if self._directories:
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
        return path

    def exists(self, name: str) -> bool:
        return bool(self._files.exists(self._at(name)))

    def read(self, name: str) -> bytes:
        return bytes(self._files.cat_file(self._at(name)))

    def write(self, name: str, data: bytes) -> None:
        self._files.pipe_file(self._writable(name), data)

    def put(self, path: Path, name: str) -> None:
        self._files.put_file(str(path), self._writable(name))

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        path = self._at(name)
        if self._files.exists(path):
            self._files.rm_file(path)

    def remove_directory(self, name: str) -> None:
        """Delete a directory and all that is in it, if it is there."""
        path = self._at(name)
        if self._files.exists(path):
            self._files.rm(path, recursive=True)

    def list(self) -> list[str]:
        """Names of the files and directories in it; none when it is not there."""
        path = self._at("")
        if not self._files.exists(path):
            return []
        return [str(one).rstrip("/").rpartition("/")[2] for one in self._files.ls(path, detail=False)]
