"""Whether to compress a file's blocks on their way: where that saves more time on the line than it costs.

:class:`Packing` is pure: it is told how long blocks took to compress and to send, and says whether to
compress the next one. A line is measured first, on blocks as they are; then a block is tried. Where it pays,
the following ones are compressed too, for as long as it does; where it does not, another block is tried after
a while, and later each time. Time is what counts, so a fast line, data that does not shrink and a cap of the
line (``[limits]``) all have their say without being asked about.

The receiver says in its ``Go`` that it takes blocks of which some are compressed; who does not say so, as
earlier versions, gets them as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: Kinds of files of which blocks are tried. What is left are floats, which do not shrink.
KINDS = frozenset({"slice"})
#: A line is known after so many seconds of writing, or so many bytes.
MEASURE_S = 0.1
MEASURE_BYTES = 8 << 20
#: What was measured longer ago than so many seconds of writing counts less and less.
MEMORY_S = 2.0
#: So much of a block is compressed to see whether that pays.
SAMPLE_BYTES = 64 << 10
#: The time that is saved must be so many times that which compressing takes: the other end has to unpack, and
#: the processor is wanted for training.
MARGIN = 1.5
#: After a sample that did not pay the next one is due after so many bytes, doubled each time.
SAMPLE_AGAIN_BYTES = 4 << 20
MOST_AGAIN_BYTES = 256 << 20
#: Compressing has held up the line for so many bytes: it is measured anew, as it may be faster than it was.
MEASURE_ANEW_BYTES = 256 << 20


@dataclass(frozen=True)
class Known:
    """What is known of the way to a peer, from one file to the next."""

    #: bytes a second
    rate: float | None = None
    #: whether compressing paid last
    pays: bool = False
    #: since the last sample, and after how many the next one is due
    unsampled: int = 0
    again_bytes: int = SAMPLE_AGAIN_BYTES
    #: for how many bytes it was compressing, and not the line, that took the time
    held_up: int = 0


class Packing:
    """Of one file, with zstd's ``level``. ``always``: each block is compressed, and sent so if it shrank."""

    def __init__(self, mode: Literal["auto", "always"], level: int = 3, known: Known | None = None) -> None:
        known = known or Known()
        self.level = level
        self._always = mode == "always"
        self._rate = known.rate
        self._pays = known.pays
        self._unsampled = known.unsampled
        self._again_bytes = known.again_bytes
        self._held_up = known.held_up
        self._sent_bytes, self._sent_s = 0.0, 0.0
        #: what compressing the present block took
        self._took_s = 0.0
        #: of what was compressed
        self.plain_bytes, self.packed_bytes = 0, 0

    @property
    def known(self) -> Known:
        """For the next file to the same peer."""
        return Known(self._rate, self._pays, self._unsampled, self._again_bytes, self._held_up)

    @property
    def pays(self) -> bool:
        """Whether to compress the next block."""
        return self._always or self._pays

    def wants_sample(self, size: int) -> bool:
        """Whether to compress ``SAMPLE_BYTES`` of the next block, of ``size`` bytes, and see."""
        if self._always or self._pays or self._rate is None or size < SAMPLE_BYTES:
            return False
        return self._unsampled >= self._again_bytes

    def sampled(self, plain: int, packed: int, took_s: float) -> None:
        """So many bytes were compressed to so many, within ``took_s``, to see."""
        self._unsampled = 0
        self._judge(plain, packed, took_s)
        # where it does not pay it is looked at less and less, and soon where it may end to
        again = SAMPLE_AGAIN_BYTES if self._pays else 2 * self._again_bytes
        self._again_bytes = min(again, MOST_AGAIN_BYTES)

    def packed(self, plain: int, packed: int, took_s: float) -> bool:
        """A block was compressed within ``took_s``; whether to send it so."""
        self._judge(plain, packed, took_s)
        if packed >= plain:
            return False
        self._took_s = took_s
        self.plain_bytes += plain
        self.packed_bytes += packed
        return True

    def sent(self, plain: int, wire: int, took_s: float) -> None:
        """A block of ``plain`` bytes went as ``wire`` bytes, and writing them took so long."""
        if self._always:
            return
        packing_s, self._took_s = self._took_s, 0.0
        if packing_s:
            if took_s < packing_s / 2:
                # the kernel's buffer ran empty meanwhile: this says what we can do, and not what the line can
                self._held_up += plain
                if self._held_up >= MEASURE_ANEW_BYTES:
                    self._forget()
                return
            # the buffer was being emptied while the block was compressed
            took_s += packing_s
        else:
            self._unsampled += plain
        self._held_up = 0
        self._sent_bytes += wire
        self._sent_s += took_s
        if self._sent_s >= MEASURE_S or self._sent_bytes >= MEASURE_BYTES:
            if self._rate is None:
                self._unsampled = self._again_bytes  # now it can be judged
            self._rate = self._sent_bytes / max(self._sent_s, 1e-6)
            if self._sent_s > MEMORY_S:
                self._sent_bytes /= 2
                self._sent_s /= 2

    def _judge(self, plain: int, packed: int, took_s: float) -> None:
        self._pays = self._rate is not None and (plain - packed) / self._rate > MARGIN * took_s

    def _forget(self) -> None:
        self._rate, self._pays, self._held_up = None, False, 0
        self._sent_bytes, self._sent_s = 0.0, 0.0
