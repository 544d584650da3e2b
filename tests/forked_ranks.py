"""Ranks as forked processes of a program that a test starts, so that torch and Megatron are imported once for all."""

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from tests.repository_rules import ROOT

COLLECTIVE_SECONDS = 120
PROGRAM_SECONDS = 900


def start_program(module: str, *arguments: Path) -> None:
    """Run `main()` of `module` in a process of its own, since the tests' own may hold process groups and threads.

    By `-c`: what is started by its file is imported anew by every process that `spawn` starts, as each rank that
    saves a checkpoint does.

    Raises:
        AssertionError: with the end of what it said, if it fails
    """
    command = [sys.executable, "-c", f"from {module} import main; main()", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PROGRAM_SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]


def run_ranks(count: int, rendezvous: Path, run: Callable[..., None], *arguments: object) -> None:
    """Call `run(*arguments)` on `count` forked ranks of one process group, which meet at the new file `rendezvous`.

    Raises:
        SystemExit: if a rank fails; the others are stopped
    """
    import torch._dynamo  # noqa: F401  torch's optimizers import it when they are made: half a second on every rank

    fork = multiprocessing.get_context("fork")
    ranks = [
        fork.Process(target=_run_rank, args=(rank, count, rendezvous, run, arguments))
        for rank in range(count)
    ]
    for process in ranks:
        process.start()
    while any(process.is_alive() for process in ranks):
        if any(process.exitcode for process in ranks):
            for process in ranks:
                process.terminate()
        time.sleep(0.05)
    if any(process.exitcode for process in ranks):
        raise SystemExit(f"{rendezvous}: exit codes {[process.exitcode for process in ranks]}")


def _run_rank(
    rank: int, count: int, rendezvous: Path, run: Callable[..., None], arguments: tuple[object, ...]
) -> None:
    import torch.distributed as dist

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count)}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
    )
    run(*arguments)
    dist.destroy_process_group()
