"""What every table of a configuration file is: frozen, without unknown keys, written with ``_`` or ``-``; and
what some of its values are: paths, URLs, small tables in one line of text.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import unquote

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A table of the file: frozen, no unknown keys, ``a_b`` or ``a-b``."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        alias_generator=lambda name: name.replace("_", "-"),
        populate_by_name=True,
        allow_inf_nan=False,
        # what a key means stands below its field, and from there in templates and in the tables of docs/
        use_attribute_docstrings=True,
    )


@dataclass(frozen=True)
class PathOrUrl:
    """Marks text that is a path or a URL; as a path it is relative to its file, but for ``words``."""

    words: tuple[str, ...] = ()


def pairs_of(value: object) -> object:
    """``key=value,key=value``, which OpenTelemetry's variables and the original's files write for a small
    table, as that table, percent-encoding undone; anything else as it is. Raises ValueError.
    """
    if not isinstance(value, str):
        return value
    found: dict[str, str] = {}
    for part in value.split(","):
        if not part.strip():
            continue
        key, equals, text = part.partition("=")
        if not equals or not key.strip():
            # the text itself may be a secret
            raise ValueError("it should be a table, or text such as key=value,key=value")
        found[unquote(key.strip())] = unquote(text.strip())
    return found
