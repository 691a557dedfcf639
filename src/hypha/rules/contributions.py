"""What an update may stand for: whoever counts it compares what its file states with what there is.

Nobody can see from outside whether a batch was trained. But a worker trains on rows of the dataset, in
batches of the size that it was told, and its numbers are numbers: what is not so is not believed. The
parameter server checks an update before it adds it to its sum, which cannot be taken back. The scheduler
checks the same of what the parameter server reports, so that the ledger has what was added, and a replay
computes the same theta. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

from hypha.messages import Contribution

#: no count is larger: beyond it JSON and floats lose the last digit, and SQLite the number
MOST_COUNT = (1 << 53) - 1
_MOST_THREADS = 4096
#: ranges of rows, and slices finished, in one round: each is kept in the ledger
_MOST_RANGES = 10_000


def is_count(number: int) -> bool:
    """Something can have been counted so often."""
    return 0 <= number <= MOST_COUNT


def contribution_problem(
    part: Contribution,
    batch_size: int | None,
    slice_rows: Sequence[int],
    most_batch_size: int | None = None,
) -> str:
    """Why an update cannot stand for ``part``; empty where it can. ``batch_size`` is that of its worker's
    job (None: not known), ``most_batch_size`` what that may grow to; ``slice_rows`` are those of each slice
    of the dataset (empty: not known). To whom the slices are assigned now is not asked: a worker that was
    left out, or cannot be reached, may have lost them, and trains on until it is told.
    """
    return _count_problem(part, batch_size, most_batch_size) or _row_problem(part, slice_rows)


def _count_problem(part: Contribution, batch_size: int | None, most_batch_size: int | None) -> str:
    done = (part.samples, part.batches, part.batch_size, part.steps)
    counts = (*done, part.round, part.attempt, part.restarts)
    if not all(is_count(count) for count in counts) or not 1 <= part.threads <= _MOST_THREADS:
        return "its counts are no counts"
    if max(len(part.ranges), len(part.finished)) > _MOST_RANGES:
        return f"it names {len(part.ranges)} ranges of rows, and {len(part.finished)} finished slices"
    # of batches that may grow, RoundStarted with the size may arrive later than the update
    grown = most_batch_size is not None and part.batch_size <= most_batch_size
    told = batch_size if batch_size is not None else most_batch_size
    if told not in (None, part.batch_size) and not grown:
        return f"it names batches of {part.batch_size} samples, and was told {told}"
    if not 0 < part.samples <= part.batches * part.batch_size:
        return f"{part.samples} samples are not what {part.batches} batches of {part.batch_size} hold"
    return ""


def _row_problem(part: Contribution, slice_rows: Sequence[int]) -> str:
    if not slice_rows:
        return ""
    ends: dict[tuple[int, int], int] = {}
    rows = 0
    for span in part.ranges:
        inside = 0 <= span.slice < len(slice_rows) and span.epoch >= 0
        if not inside or not 0 <= span.start < span.stop <= slice_rows[span.slice]:
            return f"slice {span.slice} has no rows {span.start} to {span.stop}"
        key = (span.epoch, span.slice)
        # a slice that was taken back and given again is trained on from its beginning
        ends[key] = max(ends.get(key, 0), span.stop)
        rows += span.stop - span.start
    if rows != part.samples:
        # on which of them it has trained, a replay could not tell
        return f"it names {rows} rows for {part.samples} samples"
    if any(ends.get(key) != slice_rows[key[1]] for key in part.finished):
        return "it calls slices finished whose last rows it does not name"
    return ""
