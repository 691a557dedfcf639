"""What the doctor reports: a check is what may be found anywhere, a finding is what was found here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

#: a note is no fault; a warning costs time or will be an error; with an error something does not work
Severity = Literal["note", "warning", "error"]
SEVERITIES: tuple[Severity, ...] = ("note", "warning", "error")
#: of ``hypha doctor``, see :mod:`hypha.errors`
EXIT_CODES: dict[Severity, int] = {"note": 0, "warning": 7, "error": 8}


@dataclass(frozen=True)
class Symptom:
    """What somebody sees who has one of the faults: a section of the page."""

    title: str


@dataclass(frozen=True)
class Check:
    """``what`` is found, ``why`` it matters, what ``mend``\\ s it; with <places> for what differs."""

    name: str
    severity: Severity
    symptom: Symptom
    what: str
    why: str
    mend: str

    def found(self, what: str, mend: str | None = None, severity: Severity | None = None) -> Finding:
        """That it is so here: ``what`` exactly, and the very command that mends it."""
        return Finding(self, what, self.mend if mend is None else mend, severity or self.severity)


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's."""

    check: Check
    what: str
    mend: str
    severity: Severity = field(default="error")

    def __str__(self) -> str:
        return f"{self.severity}: {self.check.name}: {self.what}. {self.check.why}. To mend it: {self.mend}"


def exit_code_of(findings: Iterable[Finding]) -> int:
    """That of the gravest of them; 0 where there is none."""
    return max((EXIT_CODES[one.severity] for one in findings), default=0)


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """The gravest first, each once."""
    return sorted(dict.fromkeys(findings), key=lambda one: -SEVERITIES.index(one.severity))
