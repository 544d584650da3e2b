"""Where a run stands, told from its folder alone, while it is being written to as well as after its end.

Nothing here loads torch.
"""

import json
import socket
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import yaml

from data_prep.checksum_list import find_damage
from data_prep.errors import STOPPED_EXIT_CODE, UserError
from pretrain.checkpoints.checkpoint_folder import newest_checkpoint, read_step
from pretrain.config import CONFIG_FILE, HISTORY_FILE, METRICS_FILE
from pretrain.run_record.history import Event, read_history
from pretrain.run_record.run_logs import job_folder
from pretrain.run_record.run_starts import Start, read_starts

State = Literal["running", "finished", "stopped", "failed"]

RECENT_LINES = 10  # of metrics, over which speed is told
START_SECONDS = 120  # that a start may be silent, beyond its limit for hangs, before it counts as dead


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The newest complete one."""

    step: int
    age_seconds: float
    damage: str | None
    """What is wrong with it; None: nothing, or nobody looked."""
    verified: bool
    """Whether all its bytes were read and agree with their checksums."""


@dataclass(frozen=True, kw_only=True)
class Troubles:
    """What the run got over by itself."""

    failed_saves: int
    """Checkpoints that could not be written, and were tried again."""
    skipped_steps: int
    """Bad steps that were skipped."""
    rolled_back_steps: int
    """Bad steps after which the run went back to its last checkpoint."""
    fallbacks: int
    """Damaged checkpoints that a start set aside."""


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """What `python -m pretrain.status` shows."""

    run_folder: str
    stage: str
    state: State
    why: str
    """What the state is told from."""
    step: int
    total_steps: int
    consumed_tokens: int
    loss: float | None
    """Of the newest line of metrics."""
    validation_loss: float | None
    tokens_per_second: float | None
    """Mean over the newest lines of metrics."""
    eta_seconds: float | None
    """Time of the steps to come, at that speed; None where it is not known."""
    checkpoint: Checkpoint | None
    starts: list[Start]
    lost_steps: int
    """Done twice, since a start was killed after its last checkpoint."""
    troubles: Troubles
    effective_time_ratio: float | None
    """Seconds of the training steps that count / seconds from the first start to now, or to where the run left off.

    The former is the sum of tokens / (tokens per second) over the lines of metrics.jsonl, which has each step once and
    none that was lost or rolled back. What is missing to 1 went to start-up, lost steps, validation, checkpoints and
    waiting.
    """
    start_up_seconds: dict[str, float]
    """Of the newest start that came to training, by part."""
    logs: str | None
    """Folder of the newest start's logs."""


def read_status(run_folder: Path, verify: bool = False) -> RunStatus:
    """Look at a run. With `verify`, all bytes of its newest checkpoint are read.

    Raises:
        UserError: if the folder is no run's.
    """
    recipe = _read_recipe(run_folder)
    lines = _read_metrics(run_folder / METRICS_FILE)
    train = [line for line in lines if line["split"] == "train"]
    validation = [line["loss"] for line in lines if line["split"] == "validation" and "loss" in line]
    history, starts = read_history(run_folder), read_starts(run_folder)
    work = _seconds_of_steps(train)
    recent_tokens, recent_seconds = (
        sum(column) for column in zip((0, 0.0), *work[-RECENT_LINES:], strict=True)
    )
    checkpoint = _look_at_checkpoint(run_folder, verify)
    total_steps = int(recipe["training"]["steps"])
    tokens_per_step = recipe["training"]["global_batch_size"] * recipe["data"]["sequence_length"]
    step = max([int(line["step"]) for line in train[-1:]] + [checkpoint.step if checkpoint else 0])
    logs = job_folder(run_folder, starts[-1].job) if starts and starts[-1].job else None
    worked_until = _newest_time((run_folder / METRICS_FILE, run_folder / HISTORY_FILE))
    last_sign = max(worked_until, _newest_time(logs.glob("*")) if logs else 0.0)
    state, why = _tell_state(starts, last_sign, recipe["faults"]["hang_seconds"])
    speed = recent_tokens / recent_seconds if recent_seconds else None
    wall_seconds = (time.time() if state == "running" else worked_until) - (starts[0].time if starts else 0.0)
    return RunStatus(
        run_folder=str(run_folder),
        stage=str(recipe["stage"]),
        state=state,
        why=why,
        step=step,
        total_steps=total_steps,
        consumed_tokens=step * tokens_per_step,
        loss=train[-1].get("loss") if train else None,
        validation_loss=validation[-1] if validation else None,
        tokens_per_second=speed,
        eta_seconds=(total_steps - step) * tokens_per_step / speed if speed else None,
        checkpoint=checkpoint,
        starts=starts,
        lost_steps=sum(start.lost_steps for start in starts),
        troubles=_count_troubles(history),
        effective_time_ratio=sum(seconds for _, seconds in work) / wall_seconds if starts and work else None,
        start_up_seconds=_start_up_seconds(history),
        logs=str(logs) if logs and logs.is_dir() else None,
    )


def _read_recipe(run_folder: Path) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load((run_folder / CONFIG_FILE).read_text())
        int(
            recipe["training"]["steps"] * recipe["data"]["sequence_length"] * recipe["faults"]["hang_seconds"]
        )
    except OSError:
        raise UserError(f"{run_folder}: holds no {CONFIG_FILE}, so it is no run folder") from None
    except (yaml.YAMLError, KeyError, TypeError, ValueError):
        raise UserError(f"{run_folder / CONFIG_FILE}: is not what a run writes") from None
    return recipe


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, but for one that is being written, or was cut short."""
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
            lines.append(line | {"step": int(line["step"]), "split": str(line["split"])})
        except (ValueError, KeyError, TypeError):
            continue
    return lines


def _look_at_checkpoint(run_folder: Path, verify: bool) -> Checkpoint | None:
    newest = newest_checkpoint(run_folder)
    if newest is None:
        return None
    return Checkpoint(
        step=read_step(newest),
        age_seconds=time.time() - newest.stat().st_mtime,
        verified=verify,
        damage=find_damage(newest) if verify else None,
    )


def _newest_time(paths: Iterable[Path]) -> float:
    """When one of the files was last written; 0 if none is there."""
    return max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)


def _tell_state(starts: list[Start], last_sign: float, hang_seconds: float) -> tuple[State, str]:
    if not starts:
        return "stopped", "it has not been started"
    newest = starts[-1]
    if newest.exit_code == 0:
        return "finished", newest.reason
    if newest.exit_code is not None:
        stopped = newest.exit_code == STOPPED_EXIT_CODE
        return "stopped" if stopped else "failed", f"exit code {newest.exit_code}: {newest.reason}"
    if newest.pid is not None and newest.host == socket.gethostname():
        if _is_launcher(newest.pid):
            return "running", f"its launcher is process {newest.pid} here"
        return "failed", f"its launcher, process {newest.pid} here, was killed"
    silent_seconds = time.time() - last_sign
    if silent_seconds < hang_seconds + START_SECONDS:
        return "running", f"something was written {silent_seconds:.0f} s ago"
    return "failed", f"nothing was written for {silent_seconds / 60:.0f} min, and no end was noted: killed"


def _is_launcher(pid: int) -> bool:
    try:
        return any("launch" in word for word in psutil.Process(pid).cmdline())
    except psutil.Error:
        return False


def training_seconds(run_folder: Path) -> float:
    """Seconds of the training steps in metrics.jsonl, each step once."""
    lines = _read_metrics(run_folder / METRICS_FILE)
    return sum(
        seconds for _, seconds in _seconds_of_steps([line for line in lines if line["split"] == "train"])
    )


def _seconds_of_steps(train: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """Tokens and seconds that each line of metrics stands for."""
    result, tokens_before = [], 0
    for line in train:
        tokens, tokens_before = line["consumed_tokens"] - tokens_before, line["consumed_tokens"]
        if line.get("tokens_per_second"):
            result.append((tokens, tokens / line["tokens_per_second"]))
    return result


def _count_troubles(history: list[Event]) -> Troubles:
    counts = Counter(event["event"] for event in history)
    actions = Counter(event["facts"].get("action") for event in history if event["event"] == "bad_step")
    return Troubles(
        failed_saves=counts["save_failed"],
        skipped_steps=actions["skipped"],
        rolled_back_steps=actions["rolled_back"],
        fallbacks=counts["fell_back"],
    )


def _start_up_seconds(history: list[Event]) -> dict[str, float]:
    parts = [event["facts"] for event in history if event["event"] == "training"][-1:]
    return {
        name.removesuffix("_seconds"): float(seconds)
        for facts in parts
        for name, seconds in facts.items()
        if name.endswith("_seconds") and seconds is not None
    }
