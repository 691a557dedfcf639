"""An executor of several processes: how rank 0 hears of the end of another, and what the others run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from hypha.executor.bridge.client import BridgeClient
from hypha.executor.inner.local_model import LocalModel, TrainedModel
from hypha.executor.inner.process_group import (
    HEARD_WITHIN_S,
    WORDS_WITHIN_S,
    LastWords,
    ProcessGroup,
    ProcessLost,
    is_lost,
)
from hypha.executor.running import FLUSH_S, exit_code_of, last_words, leave, set_up_log
from hypha.messages import TrainJob

logger = logging.getLogger("hypha.executor.training")


def trained_model(group: ProcessGroup | None, job: TrainJob, source: Path | None) -> TrainedModel:
    """The model that is trained: on this process's device, or spread over those of ``group``."""
    if group is None:
        return LocalModel(job, source)
    # what it imports few executors need
    from hypha.executor.inner.spread_model import SpreadModel

    return SpreadModel(group, job, source)


def with_others(group: ProcessGroup, work: Callable[[BridgeClient], None]) -> Callable[[BridgeClient], None]:
    """``work``, that says of another process's end what that one said."""

    def working(bridge: BridgeClient) -> None:
        try:
            work(bridge)
        except RuntimeError as exc:
            if not is_lost(exc):
                raise
            if (words := group.last_words(WORDS_WITHIN_S)) is not None:
                end_with(bridge, words)
            raise ProcessLost(
                f"one of the {group.size} processes of this executor was ended from outside, or crashed: "
                "what the executor wrote says which"
            ) from exc

    return working


def end_with(bridge: BridgeClient, words: LastWords) -> NoReturn:
    """Report why another process cannot go on, as the end of the executor."""
    bridge.report(words.error)
    bridge.flush(FLUSH_S)
    leave(words.exit_code)


def follow_rank_zero(group: ProcessGroup) -> int:
    """The life of another process than rank 0."""
    from hypha.executor.inner.spread_model import follow

    set_up_log()
    try:
        follow(group)
    except Exception as exc:
        if is_lost(exc):
            # it has said why, or the launcher does
            logger.warning("Process %d of this executor ends, as another one has.", group.rank)
            return 1
        logger.exception("Process %d of this executor cannot go on.", group.rank)
        code = exit_code_of(exc)
        group.say_last(last_words(exc), code)
        # rank 0 reports it, and with its end the launcher ends this one
        time.sleep(HEARD_WITHIN_S)
        return code
    return 0
