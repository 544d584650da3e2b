"""One start of the soak's run as it is seen from outside: its processes, and what its folder says."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from data_prep.output_files import PARTIAL_SUFFIX
from pretrain.checkpoints.checkpoint_folder import CHECKPOINTS_FOLDER
from pretrain.config import METRICS_FILE
from soak.soak_recipe import ENVIRONMENT, ROOT

METRICS_TAIL_BYTES = 16_384
LEFT_BEHIND_SECONDS = 20.0


class RunProcess:
    """The launcher and the ranks of one start."""

    def __init__(self, recipe: Path, ranks: int, module: str, log: Path) -> None:
        """Start `module` with the arguments of the trainer on `ranks` ranks, output to `log`."""
        self.log = log
        self.module, self.rank_count = module, ranks
        self._ranks: dict[int, psutil.Process] = {}
        self._seen: set[psutil.Process] = set()
        with log.open("ab") as stream:
            self.launcher = psutil.Popen(
                start_command(recipe, ranks, module),
                cwd=ROOT,
                env=os.environ | ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def exit_code(self) -> int | None:
        """None while it runs; 128 + N after signal N, as a shell says it."""
        code = self.launcher.poll()
        return code if code is None or code >= 0 else 128 - code

    def ranks(self) -> dict[int, psutil.Process]:
        """The ranks there are, by number."""
        if len(self._ranks) < self.rank_count:
            for process in _children(self.launcher):
                number = _rank_number(process, self.module)
                if number is not None:
                    self._ranks[number] = process
                    self._seen.add(process)
        return {number: process for number, process in self._ranks.items() if _is_alive(process)}

    def writers(self) -> dict[int, psutil.Process]:
        """The processes that write checkpoints just now, by rank."""
        found = {}
        for number, rank in self.ranks().items():
            for process in filter(_is_alive, _children(rank)):
                found[number] = process
                self._seen.add(process)
        return found

    def left_behind(self) -> list[int]:
        """Processes of a start that has ended which do not end by themselves; they are killed then."""
        _, alive = psutil.wait_procs(self._seen, timeout=LEFT_BEHIND_SECONDS)
        for process in alive:
            process.kill()
        return [process.pid for process in alive]

    def end(self) -> None:
        """Kill whatever runs."""
        self.ranks()
        self.writers()
        for process in [self.launcher, *self._seen]:
            if process.is_running():
                process.send_signal(signal.SIGKILL)
        self.launcher.wait()


def start_command(recipe: Path, ranks: int, module: str) -> list[str]:
    """The one command that starts the run and goes on with it."""
    return [sys.executable, "-m", "soak.start_run", module, str(ranks), str(recipe)]


def last_step(run_folder: Path) -> int:
    """The last training step that the run has logged; 0 without any."""
    try:
        with (run_folder / METRICS_FILE).open("rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - METRICS_TAIL_BYTES))
            lines = stream.read().splitlines()
    except FileNotFoundError:
        return 0
    return next((step for line in reversed(lines) if (step := _train_step(line))), 0)


def is_saving(run_folder: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any((run_folder / CHECKPOINTS_FOLDER).glob(f"*{PARTIAL_SUFFIX}"))


def _train_step(line: bytes) -> int | None:
    try:
        fields: dict[str, Any] = json.loads(line)
    except ValueError:  # cut short
        return None
    return fields["step"] if isinstance(fields, dict) and fields.get("split") == "train" else None


def _children(process: psutil.Process) -> list[psutil.Process]:
    """As the kernel lists them; psutil would look at every process there is, too long beside a writer's life."""
    children = []
    for tasks in Path(f"/proc/{process.pid}/task").glob("*/children"):
        with contextlib.suppress(OSError, psutil.Error):  # ended meanwhile
            children += [psutil.Process(int(number)) for number in tasks.read_text().split()]
    return children


def _is_alive(process: psutil.Process) -> bool:
    """It has not ended; one that has may be listed until its parent asks."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _rank_number(process: psutil.Process, module: str) -> int | None:
    try:
        if module not in process.cmdline():
            return None
        return int(process.environ().get("RANK", ""))
    except (psutil.Error, ValueError):
        return None
