"""What an update may stand for: whoever counts it holds what its worker says of it against what there is.

Nobody can see from outside whether a batch was trained. But a worker trains on rows of the dataset, in
batches of the size that it was told, and its numbers are numbers: what is not so is not believed. The
parameter server asks before it adds an update to its sum, which cannot be taken back, the scheduler before
its books have it: so that what was added is in the books, and a replay of them comes to the same. Pure.
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
    part: Contribution, batch_size: int, slice_rows: Sequence[int], most_batch_size: int | None = None
) -> str:
    """Why an update cannot stand for what ``part`` says; empty where it can. ``batch_size`` is that of its
    worker's job, ``most_batch_size`` what that may grow to; ``slice_rows`` are those of each slice of the
    dataset. Whose the slices are now says nothing: one that was left out, or out of reach, may have been
    relieved of them, and trains on until it hears of it.
    """
    return count_problem(part, batch_size, most_batch_size) or _row_problem(part, slice_rows)


def count_problem(part: Contribution, batch_size: int, most_batch_size: int | None = None) -> str:
    """What no worker that is well would say of its update, whatever happened; empty where there is none."""
    counts = (part.round, part.samples, part.batches, part.steps, part.restarts, part.attempt)
    if not all(is_count(count) for count in counts) or not 1 <= part.threads <= _MOST_THREADS:
        return "its counts are no counts"
    if max(len(part.ranges), len(part.finished)) > _MOST_RANGES:
        return f"it names {len(part.ranges)} ranges of rows, and {len(part.finished)} finished slices"
    if most_batch_size is not None and 0 < part.batch_size <= most_batch_size:
        # which size it was in that round nobody need have heard yet
        batch_size = part.batch_size
    if part.batch_size != batch_size:
        return f"it names batches of {part.batch_size} samples, and was told {batch_size}"
    if not 0 < part.samples <= part.batches * batch_size:
        return f"{part.samples} samples are not what {part.batches} batches of {batch_size} hold"
    return ""


def _row_problem(part: Contribution, slice_rows: Sequence[int]) -> str:
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
    if rows < part.samples:
        return f"it names {rows} rows for {part.samples} samples"
    if any(ends.get(key) != slice_rows[key[1]] for key in part.finished):
        return "it calls slices finished whose last rows it does not name"
    return ""
