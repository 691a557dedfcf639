"""The one door to the process environment: nothing else in Hypha reads or changes ``os.environ``."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Mapping


def process_environment() -> Mapping[str, str]:
    """A copy of this process's environment variables."""
    return dict(os.environ)


def variable(name: str, default: str | None = None) -> str | None:
    """One variable of this process's environment; ``default`` when it is unset or empty."""
    return os.environ.get(name) or default


def goes_by_proxy(scheme: str, host: str) -> bool:
    """Whether the environment (``HTTPS_PROXY``, ``NO_PROXY``) sends requests to ``host`` through a proxy."""
    proxies = urllib.request.getproxies()
    return bool(proxies.get(scheme) or proxies.get("all")) and not urllib.request.proxy_bypass(host)


def set_variable(name: str, value: str) -> None:
    """For libraries that are yet to be loaded, and for child processes."""
    os.environ[name] = value


def replace_environment(variables: Mapping[str, str]) -> None:
    """``variables`` become all that there is. The C library's copies are made anew, so that nobody reads the
    memory any more in which this process was given its environment.
    """
    os.environ.clear()
    os.environ.update(variables)
