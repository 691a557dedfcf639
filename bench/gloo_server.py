"""The reference for one outer synchronisation: a plain parameter server over torch.distributed's gloo.

Rank 0 serves, the others are workers with a pseudo-gradient in memory. One synchronisation: every worker
sends its flat fp32 tensor, the server takes the mean, makes the Nesterov step and sends theta back. No
encryption, no hash, no file: what a person writes in an afternoon on one trusted machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import statistics
import time
from multiprocessing.queues import Queue

SERVER_THREADS = 2


def serve(
    rank: int, world: int, port: int, parameters: int, repeats: int, results: Queue[list[float]]
) -> None:
    """One rank; rank 0 puts its seconds per synchronisation into ``results``."""
    import torch
    import torch.distributed as dist

    # as many as our parameter server and our workers have
    torch.set_num_threads(SERVER_THREADS if rank == 0 else 1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    taken = []
    theta = torch.zeros(parameters)
    momentum = torch.zeros(parameters)
    received = torch.zeros(parameters)
    delta = torch.full((parameters,), 1e-3 * rank)
    for turn in range(repeats):
        dist.barrier()
        started = time.perf_counter()
        if rank == 0:
            mean = torch.zeros(parameters)
            for worker in range(1, world):
                dist.recv(received, src=worker)
                mean.add_(received, alpha=1 / (world - 1))
            if turn:
                momentum.mul_(0.9).add_(mean)
            else:
                momentum.copy_(mean)
            theta.add_(mean.add_(momentum, alpha=0.9), alpha=0.7)
            sends = [dist.isend(theta, dst=worker) for worker in range(1, world)]
            for send in sends:
                if send is not None:
                    send.wait()
        else:
            dist.send(delta, dst=0)
            dist.recv(theta, src=0)
        dist.barrier()
        taken.append(time.perf_counter() - started)
    if rank == 0:
        results.put(taken)
    dist.destroy_process_group()


def measure(parameters: int, workers: int = 2, repeats: int = 6) -> list[float]:
    """Seconds of each synchronisation of ``parameters`` fp32 values, the first (warm-up) left out."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results: Queue[list[float]] = context.Queue()
    world = workers + 1
    ranks = [
        context.Process(target=serve, args=(rank, world, port, parameters, repeats, results))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    taken = results.get(timeout=300)
    for process in ranks:
        process.join(timeout=60)
    return taken[1:]


def main() -> None:
    """Print the median and the single times as JSON."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--parameters", type=int, default=25_000_000)
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument("--repeats", type=int, default=6)
    given = arguments.parse_args()
    taken = measure(given.parameters, given.workers, given.repeats)
    print(json.dumps({"median_s": statistics.median(taken), "all_s": taken}))


if __name__ == "__main__":
    main()
