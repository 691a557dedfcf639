"""Every fact has its time, and what is not known holds up nothing."""

from __future__ import annotations

import time

import pytest
import trio

from hypha.cli.doctor.gathered import Unknown
from hypha.cli.doctor.gathering import Gathering, readable
from hypha.errors import NetworkError
from hypha.runtime import in_thread


async def test_what_takes_too_long_is_noted_and_left(autojump_clock: trio.testing.MockClock) -> None:
    gathering = Gathering()
    assert await gathering.within(5, "the disk", trio.sleep_forever) is None
    assert trio.current_time() == pytest.approx(5)
    assert gathering.unknown == [Unknown("the disk", "it took longer than 5 s")]


async def test_a_thread_that_hangs_is_left_behind() -> None:
    gathering = Gathering()
    began = time.monotonic()

    async def hang() -> None:
        await in_thread(time.sleep, 2.0, abandon_on_cancel=True)

    assert await gathering.within(0.05, "the disk", hang) is None
    assert time.monotonic() - began < 1.5


async def test_what_fails_is_noted_and_defects_are_not_hidden() -> None:
    gathering = Gathering()

    async def fail(exc: Exception) -> None:
        raise exc

    assert await gathering.within(5, "the way", lambda: fail(NetworkError("nobody answers"))) is None
    assert await gathering.within(5, "the file", lambda: fail(OSError("no such file"))) is None
    assert [one.why for one in gathering.unknown] == ["nobody answers", "no such file"]
    with pytest.raises(ZeroDivisionError):
        await gathering.within(5, "a defect", lambda: fail(ZeroDivisionError()))


def test_what_peers_write_is_one_line_that_controls_nothing() -> None:
    assert readable("\x1b[31mred\nand more" + "x" * 1000).startswith("[31mred and more")
    assert len(readable("x" * 1000)) == 500
