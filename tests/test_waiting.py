"""Whatever waits for long says for what, once a minute at most, under the virtual clock."""

from __future__ import annotations

import logging
from itertools import pairwise

import pytest
import trio
from trio.testing import MockClock

from hypha.waiting import IDLE_S, SILENT_S, Reminder, in_words, log_waiting, reminded

logger = logging.getLogger("hypha.test")


async def seconds_at_which(reminder: Reminder, until_s: float) -> list[float]:
    began, found = trio.current_time(), []
    while trio.current_time() - began < until_s:
        if reminder.due():
            found.append(round(trio.current_time() - began))
        await trio.sleep(1.0)
    return found


async def test_a_reminder_speaks_once_a_minute(autojump_clock: MockClock) -> None:
    assert await seconds_at_which(Reminder(), 200) == [60, 120, 180]
    assert await seconds_at_which(Reminder(at_once=True), 200) == [0, 60, 120, 180]


async def test_an_idle_one_speaks_less_and_less_but_once_an_hour(autojump_clock: MockClock) -> None:
    spoken = await seconds_at_which(Reminder(longest_s=IDLE_S), 4 * 3600)
    pauses = [later - earlier for earlier, later in pairwise([0.0, *spoken])]
    assert pauses[:3] == [60, 60, 120]
    assert pauses == sorted(pauses)
    assert pauses[-1] == IDLE_S


async def test_whoever_goes_on_is_silent(autojump_clock: MockClock) -> None:
    reminder = Reminder()
    for _ in range(100):
        await trio.sleep(50.0)
        assert not reminder.due()
        reminder.reset()
    await trio.sleep(SILENT_S)
    assert reminder.due()


async def test_one_thing_that_is_waited_for(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def late() -> str:
        await trio.sleep(150.0)
        return "here"

    with caplog.at_level(logging.INFO, "hypha.test"):
        assert await reminded(late, log_waiting(logger, "the post", job_id="j")) == "here"
    assert caplog.messages == ["Waiting for the post since 60 s.", "Waiting for the post since 2 min."]
    assert caplog.records[0].__dict__["job_id"] == "j"


async def test_what_it_raises_comes_out_as_it_is(autojump_clock: MockClock) -> None:
    async def fail() -> None:
        await trio.sleep(90.0)
        raise KeyError("gone")

    said: list[float] = []
    with pytest.raises(KeyError, match="gone"):
        await reminded(fail, said.append)
    assert said == [60.0]


async def test_it_may_be_cancelled(autojump_clock: MockClock) -> None:
    with trio.move_on_after(70.0) as scope:
        await reminded(trio.sleep_forever, lambda seconds: None)
    assert scope.cancelled_caught


def test_times_in_words() -> None:
    assert (in_words(61.4), in_words(119.0), in_words(3600.0)) == ("61 s", "119 s", "60 min")
