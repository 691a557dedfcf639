"""What must not leave this machine in a page or a report: tokens, passwords and keys, found by their names in
the configuration and in the environment, and taken out of any text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from urllib.parse import quote, unquote, urlsplit

from pydantic import BaseModel

from hypha.config.environment import process_environment

MARK = "[secret]"
#: shorter ones would take words out of every line
_SHORTEST = 4
_NAMES = re.compile(r"token|secret|passw|credential|headers|(?:api|access)_?key|authorization", re.IGNORECASE)
_ENVIRONMENT = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|_KEY$|_HEADERS$", re.IGNORECASE)
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^\s\"']+")
_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL
)


def secrets_in(config: BaseModel | None) -> frozenset[str]:
    """Every secret of ``config``, and of the environment that is known to be one by its name."""
    found = set(_secrets({} if config is None else config.model_dump(mode="json"), False))
    for name, value in process_environment().items():
        if _ENVIRONMENT.search(name):
            found.update(_parts(value))
    return frozenset(one for one in found if len(one) >= _SHORTEST)


def redacted(text: str, secrets: Iterable[str]) -> str:
    """``text`` without ``secrets``, without private keys and without passwords in addresses."""
    # longer ones first: one may be part of another
    forms = {form for secret in secrets for form in _forms(secret)}
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, MARK)
    text = _PRIVATE_KEY.sub(MARK, text)
    return _URL.sub(lambda found: _without_password(found.group()), text)


def _forms(secret: str) -> set[str]:
    """As it stands in text, in JSON and in an address."""
    written = {json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]}
    return {secret, *written, quote(secret, safe="")}


def redacted_config(value: object, secret: bool = False) -> object:
    """A configuration as plain values, each secret replaced; what is not set stays None."""
    if isinstance(value, Mapping):
        return {key: redacted_config(one, secret or _is_secret(str(key))) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [redacted_config(one, secret) for one in value]
    return MARK if secret and value is not None else value


def _is_secret(name: str) -> bool:
    return _NAMES.search(name) is not None


def _secrets(value: object, secret: bool) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _secrets(one, secret or _is_secret(str(key)))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _secrets(one, secret)
    elif isinstance(value, str):
        if secret:
            yield from _parts(value)
        for url in _URL.findall(value):
            yield from _passwords(url)


def _parts(value: str) -> Iterator[str]:
    """The whole of it, and of ``Bearer x`` and ``name=x,name=y`` each value."""
    yield value
    for part in re.split(r"[\s,;]+", value):
        yield part.partition("=")[2] or part


def _passwords(url: str) -> Iterator[str]:
    try:
        password = urlsplit(url).password
    except ValueError:
        return
    if password:
        yield from (password, unquote(password))


def _without_password(url: str) -> str:
    try:
        password = urlsplit(url).password
    except ValueError:
        return url
    return url.replace(f":{password}@", f":{MARK}@") if password else url
