"""Where a run stands: progress, speed, checkpoints, and what happened to it.

    python -m pretrain.status RUN_FOLDER [--watch] [--json] [--verify]
    python -m pretrain.status RUN_FOLDER --made-progress N

Reads the run folder only, so it works on any machine that sees it, while the run goes on and after its end.
"""

import contextlib
import json
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from data_prep.errors import UserError, run_cli
from pretrain.run_record.run_starts import Start, made_progress, read_starts
from pretrain.run_record.run_status import Checkpoint, RunStatus, read_status

WATCH_SECONDS = 3.0
SHOWN_STARTS = 6
NO_PROGRESS_EXIT_CODE = 1
STATE_COLOURS = {"running": "green", "finished": "bold green", "stopped": "yellow", "failed": "bold red"}


@dataclass(frozen=True, kw_only=True)
class StatusOptions:
    """Where a run stands: progress, speed, checkpoints, and what happened to it."""

    run: tyro.conf.Positional[Path]
    """The run folder."""
    watch: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show the page anew every few seconds, until Ctrl-C."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print everything as JSON instead."""
    verify: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Read all of the newest checkpoint, and say whether it is whole."""
    made_progress: int | None = None
    """For job scripts: exit code 1 if each of the last N starts ended without a new checkpoint, else 0."""


def show(options: StatusOptions) -> int:
    """Do what the options ask for; returns the exit code.

    Raises:
        UserError: if the folder is no run's.
    """
    if options.made_progress is not None:
        return _answer_made_progress(options.run, options.made_progress)
    status = read_status(options.run, options.verify)
    if options.json:
        print(json.dumps(asdict(status), indent=2))
        return 0
    console = Console()
    if not options.watch:
        console.print(status_page(status))
        return 0
    with contextlib.suppress(KeyboardInterrupt), Live(status_page(status), console=console) as live:
        while True:
            time.sleep(WATCH_SECONDS)
            live.update(status_page(read_status(options.run)), refresh=True)
    return 0


def _answer_made_progress(run_folder: Path, last: int) -> int:
    if last < 1:
        raise UserError(f"--made-progress {last}: needs a number of starts, at least 1")
    starts = read_starts(run_folder)
    if not starts:
        read_status(run_folder)  # is it a run at all?
    if made_progress(starts, last):
        return 0
    print(f"{run_folder}: each of its last {last} starts ended without a new checkpoint", file=sys.stderr)
    return NO_PROGRESS_EXIT_CODE


def status_page(status: RunStatus) -> Table:
    """The page for the terminal."""
    page = Table.grid(padding=(0, 2))
    page.add_column(style="bold", no_wrap=True)
    page.add_column()
    colour = STATE_COLOURS[status.state]
    page.add_row("run", f"{status.run_folder} (stage {status.stage})")
    page.add_row("state", f"[{colour}]{status.state}[/{colour}]  {_escaped(status.why)}")
    page.add_row("step", _progress(status))
    page.add_row("tokens", f"{status.consumed_tokens:,}")
    page.add_row("loss", f"{_number(status.loss, '.4f')} (held-out {_number(status.validation_loss, '.4f')})")
    page.add_row("speed", f"{_number(status.tokens_per_second, ',.0f')} tokens/s{_eta(status)}")
    page.add_row("last checkpoint", _describe_checkpoint(status.checkpoint))
    troubles = status.troubles
    page.add_row(
        "got over",
        f"{status.lost_steps} lost steps, {troubles.failed_saves} failed saves, {troubles.skipped_steps} skipped "
        f"steps, {troubles.rolled_back_steps} roll-backs, {troubles.fallbacks} damaged checkpoints",
    )
    page.add_row(
        "effective time", f"{_number(status.effective_time_ratio, '.1%')} of the time since the first start"
    )
    if status.start_up_seconds:
        parts = ", ".join(
            f"{part.replace('_', ' ')} {s:.1f} s" for part, s in status.start_up_seconds.items()
        )
        page.add_row("last start-up", parts)
    page.add_row("restarts", str(max(len(status.starts) - 1, 0)))
    for start in status.starts[-SHOWN_STARTS:]:
        page.add_row("", _describe_start(start))
    page.add_row("logs", status.logs or "none: it was not started by pretrain.launch")
    return page


def _progress(status: RunStatus) -> Table:
    row = Table.grid(padding=(0, 2))
    share = status.step / status.total_steps
    bar = ProgressBar(total=status.total_steps, completed=status.step, width=30)
    row.add_row(f"{status.step:,} of {status.total_steps:,}", bar, f"{share:.1%}")
    return row


def _eta(status: RunStatus) -> str:
    if status.eta_seconds is None or status.step >= status.total_steps:
        return ""
    words = "to go" if status.state == "running" else "of training to go"
    return f", {timedelta(seconds=round(status.eta_seconds))} {words}"


def _describe_checkpoint(checkpoint: Checkpoint | None) -> str:
    if checkpoint is None:
        return "none yet"
    age = timedelta(seconds=round(checkpoint.age_seconds))
    state = "not verified now (--verify does)"
    if checkpoint.verified:
        state = (
            "verified"
            if checkpoint.damage is None
            else f"[bold red]damaged[/]: {_escaped(checkpoint.damage)}"
        )
    return f"step {checkpoint.step:,}, {age} ago, {state}"


def _describe_start(start: Start) -> str:
    when = datetime.fromtimestamp(start.time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    job = f", job {start.job}" if start.job else ""
    begun = "never came to training" if start.from_step is None else f"from step {start.from_step:,}"
    lost = f", {start.lost_steps} steps lost" if start.lost_steps else ""
    end = "no end noted" if start.exit_code is None else f"exit code {start.exit_code}: {start.reason}"
    return f"{when}{job}: {begun}{lost}, {start.saved} saved; {_escaped(end)}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _escaped(words: str) -> str:
    return words.replace("[", "\\[")


def main() -> None:
    """Command line."""
    sys.exit(show(tyro.cli(StatusOptions, description=__doc__)))


if __name__ == "__main__":
    run_cli(main)
