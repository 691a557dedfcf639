"""What must not leave this machine in a page or a report: tokens, passwords and keys, found by their names in
the configuration and in the environment, and taken out of any text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from urllib.parse import quote, unquote, urlsplit

from pydantic import BaseModel

from hypha.config.environment import process_environment

MARK = "[secret]"
#: shorter ones would take words out of every line
_SHORTEST = 4
_NAMES = re.compile(r"token|secret|passw|credential|headers|(?:api|access)_?key|authorization", re.IGNORECASE)
_ENVIRONMENT = re.compile(
    r"TOKEN|SECRET|PASSW|CREDENTIAL|_KEY$|_HEADERS$|CONNECTION_STRING|(?:^|_)SAS(?:$|_)", re.IGNORECASE
)
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^\s\"']+")
#: ``user:password@`` and ``token@``, up to the last @ before the path
_USERINFO = re.compile(r"://[^\s\"'/?#]*@")
#: of an address' query or fragment, the ampersand also as JSON may write it: what is before the value, the
#: parameter's name and the value
_PARAMETER = re.compile(r"((?:[?&#]|\\u0026)([^=&?#\s\"'\\]+)=)([^&#\s\"'\\]+)")
_PARAMETER_NAMES = re.compile(r"sig|token|key|credential|policy|passw|pwd|secret", re.IGNORECASE)
_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL
)


def secrets_in(config: BaseModel | None) -> frozenset[str]:
    """Every secret of ``config``, and of the environment that is known to be one by its name."""
    found = set(_secrets({} if config is None else config.model_dump(mode="json"), False))
    for name, value in process_environment().items():
        if _ENVIRONMENT.search(name):
            found.update(_connection_parts(value) if "CONNECTION_STRING" in name.upper() else _parts(value))
    return frozenset(one for one in found if len(one) >= _SHORTEST)


def redacted(text: str, secrets: Iterable[str]) -> str:
    """``text`` without ``secrets``, without private keys, and without who signs in, and with what, in
    addresses. What is no Unicode is replaced, too.
    """
    text = text.encode("utf-8", "replace").decode()
    for form in _all_forms(frozenset(secrets)):
        text = text.replace(form, MARK)
    text = _PRIVATE_KEY.sub(MARK, text)
    text = _USERINFO.sub(f"://{MARK}@", text)
    return _PARAMETER.sub(_without_value, text)


# asked for with every look of every viewer, and for every fault
@lru_cache(maxsize=4)
def _all_forms(secrets: frozenset[str]) -> tuple[str, ...]:
    """As they stand in text, in JSON and in addresses; longer ones first: one may be part of another."""
    forms = set(secrets)
    for secret in secrets:
        forms |= {json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]}
        forms.add(quote(secret, safe=""))
    return tuple(sorted(forms, key=len, reverse=True))


def redacted_config(value: object, secret: bool = False) -> object:
    """A configuration as plain values, each secret replaced; what is not set stays None."""
    if isinstance(value, Mapping):
        return {
            key: redacted_config(one, secret or bool(_NAMES.search(str(key)))) for key, one in value.items()
        }
    if isinstance(value, list | tuple):
        return [redacted_config(one, secret) for one in value]
    return MARK if secret and value is not None else value


def _secrets(value: object, secret: bool) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _secrets(one, secret or bool(_NAMES.search(str(key))))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _secrets(one, secret)
    elif isinstance(value, str):
        if secret:
            yield from _parts(value)
        for url in _URL.findall(value):
            yield from _passwords(url)


def _parts(value: str) -> Iterator[str]:
    """The whole of it, and of ``Bearer x``, ``name=x,name=y`` and ``?sv=x&sig=y`` each value."""
    yield value
    for part in re.split(r"[\s,;]+", value):
        yield part.partition("=")[2] or part
    yield from _values(value if value.startswith("?") else f"?{value}")


def _connection_parts(value: str) -> Iterator[str]:
    """Of ``Protocol=https;AccountKey=x`` what is secret: ``https`` stands in many a line."""
    yield value
    for part in value.split(";"):
        name, _, one = part.partition("=")
        if one and _PARAMETER_NAMES.search(name):
            yield one
            yield from _values(f"?{one}")
    for url in _URL.findall(value):
        yield from _passwords(url)


def _passwords(url: str) -> Iterator[str]:
    try:
        parts = urlsplit(url)
    except ValueError:
        return
    # a name without a password is one on most servers, and a token in addresses of the web
    word = parts.password or (parts.username if parts.scheme in ("http", "https") else None)
    if word:
        yield from (word, unquote(word))
    yield from _values(url)


def _values(query: str) -> Iterator[str]:
    """Of the parameters whose names say that they are secret."""
    for _, name, value in _PARAMETER.findall(query):
        if _PARAMETER_NAMES.search(name):
            yield from (value, unquote(value))


def _without_value(found: re.Match[str]) -> str:
    return f"{found[1]}{MARK}" if _PARAMETER_NAMES.search(found[2]) else found[0]
