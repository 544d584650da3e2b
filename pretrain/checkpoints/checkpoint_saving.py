"""Saving checkpoints beside training: begun at a step, written in the background, complete or not there.

What fails is told, counted and tried again, with training going on; the ranks agree on all of it, once a step. Only a
save that the end of the run waits for can end it.
"""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Self

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.optimizer import MegatronOptimizer

from data_prep.checksum_list import list_whole_folder
from data_prep.errors import StorageError
from data_prep.output_files import PARTIAL_SUFFIX, partial_path, write_json_whole
from pretrain.checkpoints.checkpoint_folder import (
    CHECKPOINTS_FOLDER,
    DESCRIPTION_FILE,
    FORMAT_VERSION,
    CheckpointDescription,
    LoopState,
    find_checkpoints,
    read_step,
    step_folder,
)
from pretrain.checkpoints.checkpoint_writer import (
    BACKEND,
    BACKEND_VERSION,
    FolderPlan,
    WriterProcess,
    Written,
    describe_failure,
    plan_folder,
)
from pretrain.checkpoints.checkpointing import OPTIMIZER_FORMAT, sharded_weights
from pretrain.config import RunConfig
from pretrain.model.cola import ColaModel
from pretrain.optimization import make_savable
from pretrain.parallel import ParallelContext
from pretrain.planning.parameters import built_parts
from pretrain.recipes import recipe_fields
from pretrain.run_record.history import History

POLL_SECONDS = 0.02
LAST_ATTEMPTS_AFTER_SECONDS = (1, 10, 60)


@dataclass(frozen=True, kw_only=True)
class RunOrigin:
    """What a run is made from; the same for all its checkpoints."""

    start: Path | None
    """Checkpoint whose parts are frozen in it."""
    tokenizer_fingerprint: str
    """As in `CheckpointDescription`."""
    data_fingerprint: str
    """As in `CheckpointDescription`."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a checkpoint is made of, at the end of a step."""

    began: float
    """When it was begun to be taken, by the clock of `time.monotonic`."""
    step: int
    consumed_samples: int
    model: ColaModel
    optimizer: MegatronOptimizer
    trained_parts: tuple[str, ...]
    loop: LoopState
    fingerprints: dict[str, str]


@dataclass(kw_only=True)
class _Save:
    """A save under way."""

    description: CheckpointDescription
    plans: list[FolderPlan]
    process: WriterProcess
    blocked_seconds: float
    began: float


class CheckpointSaver:
    """Writes the checkpoints of a run, one at a time. The same calls on all ranks, at the same steps."""

    def __init__(
        self,
        config: RunConfig,
        context: ParallelContext,
        origin: RunOrigin,
        history: History,
        beat: Callable[[], None],
    ) -> None:
        """`beat` is called while training waits for a save, so that it does not look like a hang."""
        self.config, self.context, self.origin, self.history = config, context, origin, history
        self.beat = beat
        self._recipe = recipe_fields(config)  # once, not in every save, for which training waits
        self._owed_from: int | None = None
        self._current: _Save | None = None
        self._failures_in_a_row = 0
        self._last_failure = ""
        self._saved_step: int | None = None
        if context.is_first_rank:
            _remove_partial(config.run_folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End this rank's writer, if it is still at work: the run ends without its checkpoint."""
        if self._current is not None:
            self._current.process.kill()

    def is_owed(self, step: int) -> bool:
        """A save that failed or was put off is to be begun after `step`."""
        return self._owed_from is not None and step >= self._owed_from and self.is_idle

    def put_off(self, step: int) -> None:
        """Have the save of `step` wait for the one that is under way."""
        assert self._current is not None
        self._owed_from = step + 1
        if self.context.is_first_rank:
            print(
                f"warning: step {step}: the checkpoint of step {self._current.description.step} is still being "
                "written, so the next one comes later; lengthen checkpoint.interval_steps, or find a faster disk",
                flush=True,
            )

    @property
    def is_idle(self) -> bool:
        """No save is under way."""
        return self._current is None

    def local_state(self) -> tuple[int, int]:
        """Whether this rank's writer is at work, and whether it has failed; the ranks take the highest of each."""
        if self._current is None:
            return 0, 0
        running = self._current.process.poll()
        return int(running), int(bool(self._current.process.failure))

    def advance(self, step: int, any_running: bool, any_failed: bool) -> None:
        """Complete the save under way, or give it up, as the ranks agreed after `step`. Collective."""
        if self._current is None or (any_running and not any_failed):
            return
        began = time.monotonic()
        failure = self._agreed_failure() if any_failed else self._commit(self._current)
        save, self._current = self._current, None
        if failure is None:
            self._succeeded(save, time.monotonic() - began)
        else:
            self._failed(save, step, failure)

    def begin(self, snapshot: Snapshot) -> None:
        """Start saving; returns as soon as training may change the tensors. Collective."""
        assert self._current is None, "one save at a time"
        self._owed_from = None
        partial = partial_path(step_folder(self.config.run_folder, snapshot.step))
        problem = self._make_folders(partial)
        if problem is not None:
            self._record_failure(snapshot.step, snapshot.step, problem)
            return
        parts = built_parts(self.config) if self.config.checkpoint.self_contained else snapshot.trained_parts
        weights = sharded_weights(snapshot.model, parts, scales=True)
        make_savable(snapshot.optimizer)
        optimizer = snapshot.optimizer.sharded_state_dict(
            sharded_weights(snapshot.model, snapshot.trained_parts), metadata=OPTIMIZER_FORMAT
        )
        plans = [
            plan_folder(state, partial, name, self.context.is_first_rank)
            for name, state in (("weights", weights), ("optimizer", {"optimizer": optimizer}))
        ]
        description = self._describe(snapshot, parts)
        process = WriterProcess(plans, partial, self.config.checkpoint.write_timeout_seconds)
        self._current = _Save(
            description=description,
            plans=plans,
            process=process,
            blocked_seconds=time.monotonic() - snapshot.began,
            began=snapshot.began,
        )

    def save_and_wait(self, take_snapshot: Callable[[], Snapshot], step: int) -> None:
        """Have the checkpoint of `step` complete, whatever it takes; training stands. Collective.

        Raises:
            StorageError: on all ranks, if it cannot be written after several attempts.
        """
        self.wait(step)
        for pause_seconds in (*LAST_ATTEMPTS_AFTER_SECONDS, None):
            if self._saved_step == step:
                return
            self.begin(take_snapshot())
            self.wait(step)
            if self._saved_step == step:
                return
            if pause_seconds is not None:
                self._pause(pause_seconds)
        newest = find_checkpoints(self.config.run_folder)
        raise StorageError(
            f"{step_folder(self.config.run_folder, step)}: could not be written ({self._last_failure}); the newest "
            f"checkpoint is {newest[-1].name if newest else 'none'}; make room, then start again with --resume"
        )

    def wait(self, step: int) -> None:
        """Wait until no save is under way. Collective."""
        while self._current is not None:
            running, failed = self.context.highest(self.local_state())
            self.advance(step, bool(running), bool(failed))
            if self._current is not None:
                self._pause(POLL_SECONDS)

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.beat()
            time.sleep(POLL_SECONDS)

    def _describe(self, snapshot: Snapshot, parts: tuple[str, ...]) -> CheckpointDescription:
        config, origin = self.config, self.origin
        return CheckpointDescription(
            format_version=FORMAT_VERSION,
            stage=config.stage,
            step=snapshot.step,
            consumed_samples=snapshot.consumed_samples,
            consumed_tokens=snapshot.step * config.tokens_per_step,
            parts=list(parts),
            start_from=os.path.relpath(origin.start, config.run_folder) if origin.start else None,
            tokenizer_fingerprint=origin.tokenizer_fingerprint,
            data_fingerprint=origin.data_fingerprint,
            recipe=self._recipe,
            loop=snapshot.loop,
            fingerprints=snapshot.fingerprints,
            megatron_version=version("megatron-core"),
        )

    def _make_folders(self, partial: Path) -> str | None:
        """Empty folders to write into; what is wrong, if they cannot be had. Collective."""
        problem = None
        if self.context.is_first_rank:
            try:
                shutil.rmtree(partial, ignore_errors=True)
                for name in ("weights", "optimizer"):
                    (partial / name).mkdir(parents=True)
            except OSError as error:
                problem = describe_failure(error)
        return self.context.from_first_rank(problem)

    def _commit(self, save: _Save) -> str | None:
        """Put the parts together and give the checkpoint its name; what went wrong, if something did. Collective."""
        assert save.process.written is not None
        shares: list[Written | None] = [None] * self.context.world_size
        dist.gather_object(save.process.written, shares if self.context.is_first_rank else None)
        problem = None
        if self.context.is_first_rank:
            try:
                self._publish(save, [share for share in shares if share is not None])
            except OSError as error:
                problem = describe_failure(error)
        return self.context.from_first_rank(problem)

    def _publish(self, save: _Save, shares: list[Written]) -> None:
        final = step_folder(self.config.run_folder, save.description.step)
        partial = partial_path(final)
        checksums = {name: checksum for share in shares for name, checksum in share.checksums.items()}
        for number, plan in enumerate(save.plans):
            plan.writer.finish(plan.metadata, [share.results[number] for share in shares])
            save_config(CheckpointingConfig(BACKEND, BACKEND_VERSION), str(partial / plan.name))
        write_json_whole(partial / DESCRIPTION_FILE, asdict(save.description))
        list_whole_folder(partial, known=checksums)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _remove_old(self.config)

    def _agreed_failure(self) -> str:
        """What went wrong on the first rank that has failed; ends the other writers. Collective."""
        assert self._current is not None
        failures: list[str] = [""] * self.context.world_size
        dist.all_gather_object(failures, self._current.process.failure)
        self._current.process.kill()
        return next(f"rank {rank}: {failure}" for rank, failure in enumerate(failures) if failure)

    def _succeeded(self, save: _Save, commit_seconds: float) -> None:
        self._failures_in_a_row = 0
        self._saved_step = save.description.step
        if self.context.is_first_rank:
            final = step_folder(self.config.run_folder, save.description.step)
            self.history.record(
                "saved",
                step=save.description.step,
                blocked_seconds=round(save.blocked_seconds + commit_seconds, 3),
                seconds=round(time.monotonic() - save.began, 3),
                bytes=sum(path.stat().st_size for path in final.rglob("*") if path.is_file()),
            )

    def _failed(self, save: _Save, step: int, failure: str) -> None:
        if self.context.is_first_rank:
            _remove_partial(self.config.run_folder)
        self._record_failure(save.description.step, step, failure)

    def _record_failure(self, saved_step: int, step: int, failure: str) -> None:
        """Tell it, and try again after 1, 2, 4 ... steps: at once if it was an accident, seldom if it lasts."""
        self._failures_in_a_row += 1
        self._last_failure = failure
        self._owed_from = step + 2 ** min(self._failures_in_a_row - 1, 16)
        self.history.record("save_failed", step=saved_step, reason=failure)
        if self.context.is_first_rank:
            print(
                f"warning: the checkpoint of step {saved_step} could not be written: {failure}; training goes on, "
                f"and saves again after step {self._owed_from}",
                flush=True,
            )


def _remove_partial(run_folder: Path) -> None:
    """Remove what was not completed."""
    for path in (run_folder / CHECKPOINTS_FOLDER).glob(f"step_*{PARTIAL_SUFFIX}"):
        shutil.rmtree(path, ignore_errors=True)


def _remove_old(config: RunConfig) -> None:
    """Keep the newest checkpoints and those kept for good; one that cannot be removed is left."""
    every = config.checkpoint.keep_every_steps
    for old in find_checkpoints(config.run_folder)[: -config.checkpoint.keep_last]:
        if every is None or read_step(old) % every:
            shutil.rmtree(old, ignore_errors=True)
