"""Which refusals an executor waits out, besides those that pass by themselves: it has nothing else to do."""

from __future__ import annotations

from hypha.errors import Refused


def update_waits(refused: Refused) -> bool:
    """Whether an update that was refused is sent again: of a full disk, or of a parameter server that is not
    there yet or is being restored.
    """
    return refused.retryable or refused.code in ("no-space", "not-found")


def export_waits(refused: Refused) -> bool:
    """Whether a finished model that was refused is sent again: of a scheduler whose disk is full, or that has
    begun another generation of the job, which is not known here yet.
    """
    return refused.retryable or refused.code in ("no-space", "uninvited", "stale")
