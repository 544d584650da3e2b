"""Where the ranks of a run write what they say: logs/<job>/rank_00000.log in the run folder, a folder for each start.

A job is named by Slurm's number and how often Slurm has restarted it, without Slurm by the time of the start (UTC).
Beside the logs, in launches.jsonl, the launcher of the first node notes when it started the ranks and how they ended:
what a rank that is killed cannot write into the run's history any more.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from data_prep.output_files import append_line
from pretrain.config import LOGS_FOLDER

LAUNCHES_FILE = "launches.jsonl"
FOLLOW_SECONDS = 0.1
JOB_VARIABLE = "COLA_JOB"  # how the launcher tells its ranks


def job_name() -> str:
    """The name of this start: what the launcher said, else one made now."""
    slurm_job = os.environ.get("SLURM_JOB_ID")
    if slurm_job:
        return f"{slurm_job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    return os.environ.get(JOB_VARIABLE) or time.strftime("%Y-%m-%dT%H-%M-%SZ", time.gmtime())


def job_folder(run_folder: Path, job: str) -> Path:
    """The folder with the logs of one start."""
    return run_folder / LOGS_FOLDER / job


def rank_log(folder: Path, rank: int) -> Path:
    """The log of one rank, counted over all nodes, in the folder of a start."""
    return folder / f"rank_{rank:05d}.log"


def record_launch(folder: Path, event: str, **facts: str | int) -> None:
    """Append a line to the launches of `folder`, a start's; like the logs, it may be lost where the disk is full."""
    line = json.dumps({"event": event, "time": round(time.time(), 3), "job": folder.name, **facts})
    with contextlib.suppress(OSError):
        append_line(folder / LAUNCHES_FILE, line)


@contextlib.contextmanager
def shown(log: Path) -> Iterator[None]:
    """While open, show on stdout what is written to `log`, byte for byte, so that a bar redraws itself in place."""
    start = log.stat().st_size if log.exists() else 0
    ended = threading.Event()
    follower = threading.Thread(target=_follow, args=(log, start, ended), daemon=True)
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join()


def _follow(log: Path, start: int, ended: threading.Event) -> None:
    with contextlib.suppress(OSError):  # a terminal that is gone must not end the run
        while not log.exists():
            if ended.wait(FOLLOW_SECONDS) and not log.exists():  # it may have come meanwhile
                return
        with log.open("rb", buffering=0) as stream:
            stream.seek(start)
            while True:
                no_more_to_come = ended.is_set()
                if written := stream.read(1 << 16):
                    sys.stdout.buffer.write(written)
                    sys.stdout.buffer.flush()
                elif no_more_to_come:
                    return
                else:
                    ended.wait(FOLLOW_SECONDS)
