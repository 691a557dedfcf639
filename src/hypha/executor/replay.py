"""Run a job again from its ledger, in one process: ``python -m hypha.executor.replay LEDGER DATA MODEL``.

Every contribution is trained again, on the recorded ranges of samples and from the same seeds, with one
AdamW for each optimizer that ever lived (a process's incarnation and its restarts), and every outer step is
taken with the code of the parameter server. On like machines the result is the job's model to within
floating-point noise. Contributions that were left out of a round need no replay: their optimizers died.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from hypha.decoding import decode_json
from hypha.errors import DataError, HyphaError, Undecodable
from hypha.executor.files import tensors, updates
from hypha.executor.files.theta import Theta, theta_of
from hypha.executor.inner.local_model import LocalModel
from hypha.executor.inner.loop import Inner, round_seed
from hypha.executor.inner.slices_reader import RowStream, Slice, read_columns, slice_order
from hypha.executor.models import loading as models
from hypha.executor.models.preprocessing import Preprocessor, padding_of
from hypha.executor.outer.step import OuterStep
from hypha.messages import Contribution, LedgerFile

#: slices kept in memory; a worker's ranges mostly follow one another
_CACHED_SLICES = 8


@dataclass(frozen=True)
class Replayed:
    """theta after the last round, and its hash before the first round and after each."""

    theta: dict[str, Tensor]
    hashes: list[str]


class Replay:
    """A job being run again, from ``theta`` of its beginning, with the ``local`` model of all its workers.
    ``scratch`` takes files that are of no use afterwards.
    """

    def __init__(
        self,
        ledger: LedgerFile,
        data_dir: Path,
        scratch: Path,
        theta: Theta,
        local: LocalModel,
        preprocess: Preprocessor | None = None,
    ) -> None:
        self._ledger = ledger
        self._data_dir = data_dir
        self._scratch = scratch
        self._job = ledger.job
        self._preprocess = preprocess
        self.theta = theta
        self._local = local
        self._padding = padding_of(None, config=local.config) if preprocess is None else preprocess.padding
        self._optimizers: dict[tuple[str, int], Inner] = {}
        self._columns: OrderedDict[int, dict[str, Tensor]] = OrderedDict()

    def run(self) -> Iterator[str]:
        """The hash of theta before the first round, then after each. Raises :class:`DataError` when the
        ledger contradicts itself.
        """
        outer = OuterStep(self.theta, self._ledger.aggregate)
        whole, update = self._scratch / "theta.safetensors", self._scratch / "update.safetensors"
        yield tensors.write(whole, self.theta.all()).blake3
        for entry in self._ledger.rounds:
            if entry.discarded:
                continue
            # what each update was multiplied by
            recorded = {one.worker: one for one in entry.updates}
            for part in entry.contributors:
                updates.write_update(update, self._train(part), self.theta, self._job.update_encoding)
                outer.add(part.worker, part.samples, update, recorded.get(part.worker))
            outer.apply()
            yield tensors.write(whole, self.theta.all()).blake3

    def _train(self, part: Contribution) -> Theta:
        """The local model after one worker's share of a round."""
        local, key = self._local, (part.incarnation, part.restarts)
        local.theta().assign(self.theta)
        if key in self._optimizers:
            local.inner = self._optimizers[key]
        else:
            local.start_over(part.steps)
            self._optimizers[key] = local.inner
        local.inner.steps = part.steps
        torch.set_num_threads(part.threads)
        torch.manual_seed(round_seed(self._job.seed, part.worker, part.round))
        stream = RowStream(self._padding)
        for piece in part.ranges:
            found = self._slice(piece.epoch, piece.slice)
            stream.push(replace(found, order=found.order[piece.start : piece.stop]))
        what = f"round {part.round} of {part.worker} has"
        if stream.rows != part.samples:
            raise DataError(f"{what} {stream.rows} rows, not {part.samples}")
        batches = 0
        while stream.rows:
            columns = stream.take(min(part.batch_size, stream.rows))
            if columns is not None:
                local.batch(columns)
                batches += 1
        if batches != part.batches:
            raise DataError(f"{what} {batches} batches, not {part.batches}")
        local.flush()
        return local.theta()

    def _slice(self, epoch: int, index: int) -> Slice:
        columns = self._columns.pop(index, None)
        if columns is None:
            columns = read_columns(self._data_dir / self._ledger.manifest.slices[index].file)
            if self._preprocess is not None:
                columns = self._preprocess(columns)
        self._columns[index] = columns
        while len(self._columns) > _CACHED_SLICES:
            self._columns.popitem(last=False)
        samples = self._ledger.manifest.slices[index].samples
        order = slice_order(self._job.seed, epoch, index, samples, self._job.shuffle)
        return Slice(epoch, index, columns, order)


def replay(ledger: LedgerFile | Path, data_dir: Path, model_dir: Path | None = None) -> Replayed:
    """Run the job of ``ledger`` again. ``data_dir`` holds the dataset's slices, ``model_dir`` the model's
    files (none for a model built by an entrypoint without weights).

    Raises :class:`DataError` when the ledger contradicts itself, and what training raises.
    """
    if isinstance(ledger, Path):
        ledger = read_ledger(ledger)
    with tempfile.TemporaryDirectory(prefix="hypha-replay-") as scratch:
        job, preprocess = ledger.job, None
        if job.preprocessor is not None and model_dir is not None:
            preprocess = Preprocessor(job.preprocessor, model_dir)
        theta = theta_of(models.build(ledger.aggregate.model, model_dir).requires_grad_(False))
        local = LocalModel(job, model_dir, keeps_base=False)
        again = Replay(ledger, data_dir, Path(scratch), theta, local, preprocess)
        hashes = list(again.run())
        return Replayed(again.theta.copy().all(), hashes)


def read_ledger(path: Path) -> LedgerFile:
    """Raises :class:`DataError` when it is none."""
    try:
        return decode_json(path.read_bytes(), LedgerFile)
    except Undecodable as exc:
        raise DataError(f"{path} is no ledger: {exc}") from exc


def largest_difference(theta: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """max |theta - other| over the tensors that both have. Raises :class:`DataError` when that is none."""
    shared = theta.keys() & other.keys()
    if not shared:
        raise DataError("the two models have no tensor in common")
    return max(float((theta[name].double() - other[name].double()).abs().max()) for name in shared)


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m hypha.executor.replay", description=__doc__)
    parser.add_argument("ledger", type=Path, help="ledger.json")
    parser.add_argument("data", type=Path, help="directory of the dataset's slices")
    parser.add_argument("model", type=Path, nargs="?", help="directory with the model's files")
    parser.add_argument("--compare", type=Path, help="model.safetensors to compare the result with")
    options = parser.parse_args(arguments)
    try:
        ledger = read_ledger(options.ledger)
        replayed = replay(ledger, options.data, options.model)
        recorded = [ledger.theta, *(entry.theta for entry in ledger.rounds if not entry.discarded)]
        equal = sum(ours == theirs for ours, theirs in zip(replayed.hashes, recorded, strict=True))
        print(f"{len(recorded) - 1} rounds replayed; {equal} of {len(recorded)} thetas equal bit by bit")
        if options.compare is not None:
            print(f"max |delta theta| {largest_difference(replayed.theta, load_file(options.compare)):.3g}")
    except HyphaError as exc:
        parser.exit(exc.exit_code, f"{exc}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
