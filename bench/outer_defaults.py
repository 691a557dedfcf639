"""How the outer optimizer is best set, by task, number of rounds and number of workers: the table of
``docs/defaults.md``, which is written from here.

DiLoCo as the executors do it, with three seeds or more of everything: each worker takes inner steps of AdamW,
whose state it keeps, from the theta of the round; the mean of what they have changed goes through the outer
step. All settings, seeds and workers are trained at once, as slices of stacked tensors, on batches that are
the same for every setting. Few rounds are long and many are short, as in jobs of people. The outer step is
that of :class:`hypha.executor.outer.step.OuterStep`, on stacked tensors; that the two agree is checked before
anything is measured. One process trains on as many samples as all workers of a cell have had, in batches of
the same size.

What has been measured stays in ``bench/results/outer_defaults/``: a study that was interrupted goes on, and
only what is missing is measured. It takes a quarter of an hour of one core, and more where the core is
shared.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.outer_tasks import TASKS, Stack, Task, held_out_losses, initial, losses
from bench.report import RESULTS, Bound, Report, Row
from hypha.config.job import outer_defaults
from hypha.executor.files.theta import Theta
from hypha.executor.files.updates import write_update
from hypha.executor.outer.step import OuterStep
from hypha.messages import AggregateJob, ExecutorDescriptor, ModelSpec, OuterOptimizer, PeerRef

PAGE = Path(__file__).parent.parent / "docs" / "defaults.md"
BEGIN, END = "<!-- table: make bench ARGS=outer_defaults -->", "<!-- end of the table -->"

WORKERS = (2, 4, 8)
#: number of rounds -> inner steps a round
ROUNDS = {2: 160, 8: 40, 50: 10, 200: 5}
#: the default may be worse than the best fixed setting by this factor
LIMIT = 1.05

#: setting, or number of steps of one process -> held-out loss of each seed
Measured = dict[str, list[float]]


class Setting(NamedTuple):
    """Of the outer optimizer."""

    learning_rate: float
    momentum: float

    def __str__(self) -> str:
        return f"{self.learning_rate:g} / {self.momentum:g}"


#: what was the default before there was a choice
FORMER = Setting(0.7, 0.9)
#: among these is the best fixed setting
GRID = (
    FORMER,
    *(Setting(1.0, momentum) for momentum in (0.0, 0.3, 0.5, 0.6, 0.7, 0.8)),
)


def default_of(rounds: int) -> Setting:
    """What a job of so many rounds gets without a word about it."""
    return Setting(*outer_defaults(rounds))


# --- training -----------------------------------------------------------------------------------------


def outer_step(theta: Tensor, momentum: Tensor, mean: Tensor, rate: Tensor, mu: Tensor) -> None:
    """In place, of a stack of models; ``mean`` is that of the workers' updates."""
    momentum.mul_(mu).add_(mean)
    theta.add_(rate * (mean + mu * momentum))


def check_outer_step(setting: Setting) -> None:
    """Raise :class:`AssertionError` unless :func:`outer_step` is the product's, over three rounds."""
    scheduler = PeerRef(peer="scheduler")
    job = AggregateJob(
        job_id="check",
        generation=0,
        executor=ExecutorDescriptor(kind="aggregate", name="parameter-server"),
        me="server",
        scheduler=scheduler,
        model=ModelSpec(task="torch"),
        optimizer=OuterOptimizer(*setting),
    )
    chance = torch.Generator().manual_seed(0)
    theirs = Theta({"w": torch.randn(5, 3, generator=chance)}, {})
    ours = theirs.parameters["w"].clone()
    momentum = torch.zeros_like(ours)
    product = OuterStep(theirs, job)
    with tempfile.TemporaryDirectory(prefix="hypha-outer-") as scratch:
        for _ in range(3):
            updates = [torch.randn(5, 3, generator=chance) for _ in range(4)]
            for index, update in enumerate(updates):
                path = Path(scratch) / f"{index}"
                write_update(path, Theta({"w": theirs.parameters["w"] + update}, {}), theirs)
                product.add(f"worker {index}", 16, path)
            product.apply()
            outer_step(ours, momentum, torch.stack(updates).mean(0), *(torch.tensor(one) for one in setting))
            torch.testing.assert_close(ours, theirs.parameters["w"], rtol=1e-5, atol=1e-5)


class Trainees:
    """``count`` models of one task, by seed; each with an AdamW of its own."""

    def __init__(self, task: Task, theta: Stack) -> None:
        self.task = task
        self.model = task.build()
        self.local = {name: value.clone().requires_grad_() for name, value in theta.items()}
        # elementwise, so one optimizer over stacked tensors is one a model
        self._optimizer = torch.optim.AdamW(self.local.values(), lr=task.learning_rate, fused=True)

    def step(self, batches: dict[str, Tensor]) -> None:
        """One inner step of each model on its own batch, [models, rows, ...]."""
        # each model's gradient is that of its own loss
        losses(self.task, self.model, self.local, batches).sum().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


def _fresh(task: Task, seeds: Sequence[int]) -> Stack:
    """[seeds, ...] of each parameter."""
    each = [initial(task, seed) for seed in seeds]
    return {name: torch.stack([values[name] for values in each]) for name in each[0]}


def _generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 + seed) for seed in seeds]


def diloco(
    task: Task,
    workers: int,
    settings: list[Setting],
    rounds: int,
    inner_steps: int,
    seeds: Sequence[int],
) -> list[list[float]]:
    """The held-out losses in the end, by setting and seed."""
    shape = (len(seeds), len(settings))
    theta = {
        name: value[:, None].expand(*shape, *value.shape[1:]).clone()
        for name, value in _fresh(task, seeds).items()
    }
    momentum = {name: torch.zeros_like(value) for name, value in theta.items()}
    rates, mus = torch.tensor(settings).T
    trainees = Trainees(
        task, {name: value.repeat_interleave(workers, 1).flatten(0, 1) for name, value in theta.items()}
    )
    generators = _generators(seeds)

    def batches() -> dict[str, Tensor]:
        """The same for every setting, and another one for each seed and worker."""
        drawn = [task.draw(one, workers * task.batch_size) for one in generators]
        found = {}
        for key in drawn[0]:
            rows = torch.stack([one[key] for one in drawn])
            rows = rows.unflatten(1, (workers, task.batch_size))[:, None]
            found[key] = rows.expand(-1, len(settings), *rows.shape[2:]).flatten(0, 2)
        return found

    for _ in range(rounds):
        for _ in range(inner_steps):
            trainees.step(batches())
        with torch.no_grad():
            for name, value in theta.items():
                local = trainees.local[name].view(*shape, workers, *value.shape[2:])
                by_setting = (1, len(settings), *(1 for _ in value.shape[2:]))
                update = local.mean(2) - value
                outer_step(value, momentum[name], update, rates.view(by_setting), mus.view(by_setting))
                local.copy_(value[:, :, None].expand_as(local))
    stacked = {name: value.flatten(0, 1) for name, value in theta.items()}
    found: list[list[float]] = held_out_losses(task, trainees.model, stacked).view(shape).T.tolist()
    return found


def one_process(task: Task, steps: Iterable[int], seeds: Sequence[int]) -> Iterator[tuple[int, list[float]]]:
    """At each of ``steps``, which rise: that number of inner steps, and the held-out losses by seed."""
    trainees = Trainees(task, _fresh(task, seeds))
    generators = _generators(seeds)
    due = sorted(set(steps))
    for done in range(1, due[-1] + 1):
        drawn = [task.draw(one, task.batch_size) for one in generators]
        trainees.step({key: torch.stack([one[key] for one in drawn]) for key in drawn[0]})
        if done in due:
            local = {name: value.detach() for name, value in trainees.local.items()}
            yield done, held_out_losses(task, trainees.model, local).tolist()


# --- what has been measured ---------------------------------------------------------------------------


class Results:
    """In ``directory``, a file a cell, and one a task for one process."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self, name: str) -> Measured:
        """Nothing where there is no file yet."""
        path = self._directory / f"{name}.json"
        measured: Measured = json.loads(path.read_text()) if path.exists() else {}
        return measured

    def write(self, name: str, measured: Measured) -> None:
        """Whole, or not at all."""
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"{name}.json"
        path.with_suffix(".new").write_text(json.dumps(measured, indent=1) + "\n")
        path.with_suffix(".new").replace(path)

    def loss(self, name: str, what: object) -> float:
        """The mean over the seeds; infinite where one of them has diverged."""
        found = statistics.fmean(self.read(name)[str(what)])
        return found if found == found else float("inf")


def measure(results: Results) -> None:
    """Whatever is missing."""
    tasks = {name: make() for name, make in TASKS.items()}
    for rounds, inner_steps in ROUNDS.items():
        for workers in WORKERS:
            for name, task in tasks.items():
                cell = f"{name}-{rounds}-{workers}"
                measured = results.read(cell)
                wanted = dict.fromkeys([*GRID, default_of(rounds)])
                known = {setting: len(measured.get(str(setting), [])) for setting in wanted}
                for seen in sorted(set(known.values()) - {task.seeds}):
                    settings = [setting for setting in wanted if known[setting] == seen]
                    seeds = range(seen, task.seeds)
                    found = diloco(task, workers, settings, rounds, inner_steps, seeds)
                    for setting, by_seed in zip(settings, found, strict=True):
                        measured.setdefault(str(setting), []).extend(by_seed)
                    results.write(cell, measured)
                    print(f"{cell}: {len(settings)} settings, {len(seeds)} seeds", flush=True)
    due = [rounds * steps * workers for rounds, steps in ROUNDS.items() for workers in WORKERS]
    for name, task in tasks.items():
        measured = results.read(f"{name}-one")
        seeds = range(len(measured.get(str(max(due)), [])), task.seeds)
        if seeds:
            for steps, by_seed in one_process(task, due, seeds):
                measured.setdefault(str(steps), []).extend(by_seed)
            results.write(f"{name}-one", measured)
            print(f"{name}, one process: {len(seeds)} seeds", flush=True)


class Cell(NamedTuple):
    """Held-out losses of a task with so many rounds and workers, means over the seeds."""

    task: str
    rounds: int
    workers: int
    former: float
    best: float
    best_setting: Setting
    default: float
    one: float

    @property
    def row(self) -> str:
        """In the page's table."""
        fields = (
            self.task,
            self.rounds,
            self.workers,
            f"{self.former:.3f}",
            f"{self.best:.3f} ({self.best_setting})",
            f"{self.default:.3f} ({default_of(self.rounds)})",
            f"{self.default / self.best:.3f}",
            f"{self.one:.3f}",
        )
        return "| " + " | ".join(str(one) for one in fields) + " |"


def cells(results: Results) -> list[Cell]:
    """Of everything that was to be measured."""
    found = []
    for task in TASKS:
        for rounds, inner_steps in ROUNDS.items():
            for workers in WORKERS:
                name = f"{task}-{rounds}-{workers}"
                by_setting = {setting: results.loss(name, setting) for setting in GRID}
                best = min(by_setting, key=by_setting.__getitem__)
                default = results.loss(name, default_of(rounds))
                one = results.loss(f"{task}-one", rounds * inner_steps * workers)
                former = by_setting[FORMER]
                found.append(Cell(task, rounds, workers, former, by_setting[best], best, default, one))
    return found


def table(found: Iterable[Cell]) -> str:
    """In Markdown."""
    head = (
        f"| task | rounds | workers | {FORMER} | best fixed | default | default / best | one process |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|"
    )
    return "\n".join([head, *(cell.row for cell in found)])


def write_page(found: Iterable[Cell], page: Path = PAGE) -> None:
    """Put the table where the page has it."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{after}")


def main() -> int:
    """Measure what is missing, write the page's table, and report."""
    torch.set_num_threads(1)
    for setting in GRID:
        check_outer_step(setting)
    results = Results(RESULTS / "outer_defaults")
    measure(results)
    found = cells(results)
    write_page(found)
    report = Report("outer_defaults")
    for cell in found:
        report.add(
            Row(
                f"{cell.task}, {cell.rounds} rounds, {cell.workers} workers",
                cell.default,
                "",
                reference=cell.best,
                bound=Bound("<=", LIMIT),
                note=f"best {cell.best_setting}; {FORMER}: {cell.former:.3f}; one process: {cell.one:.3f}",
            )
        )
    return report.finish()
