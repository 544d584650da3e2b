"""Where a run goes on: at its newest checkpoint that is still what was written."""

import shutil
from pathlib import Path

import torch.distributed as dist

from data_prep.checksum_list import CHECKSUM_LIST, find_damage, read_checksum_list
from data_prep.errors import IntegrityError, UserError
from data_prep.output_files import file_checksum
from pretrain.checkpoints.checkpoint_folder import (
    DAMAGED_SUFFIX,
    DESCRIPTION_FILE,
    checkpoint_folders,
    find_checkpoints,
    read_description,
    read_step,
)
from pretrain.parallel import ParallelContext
from pretrain.run_record.history import History, read_history


def newest_described(run_folder: Path) -> Path | None:
    """The newest checkpoint whose description is what was written, whatever the rest of it; None if there is none."""
    for checkpoint in reversed(find_checkpoints(run_folder)):
        try:
            listed = read_checksum_list(checkpoint / CHECKSUM_LIST)
            if listed.get(DESCRIPTION_FILE) == file_checksum(checkpoint / DESCRIPTION_FILE):
                return checkpoint
        except (OSError, UserError):
            continue
    return None


def newest_whole(run_folder: Path, context: ParallelContext, history: History) -> Path | None:
    """The newest checkpoint of which every byte is what was written; None where none was ever saved. Collective.

    The ranks share the reading. A damaged one is set aside under another name, told and recorded.

    Raises:
        IntegrityError: on all ranks, if checkpoints were saved, and none is whole any more.
    """
    damaged: list[tuple[Path, str]] = []
    for checkpoint in context.from_first_rank(list(reversed(checkpoint_folders(run_folder)))):
        damages: list[str | None] = [None] * context.world_size
        dist.all_gather_object(damages, _damage(checkpoint, context))
        damage = next((damage for damage in damages if damage is not None), None)
        if damage is None:
            _report(damaged, checkpoint, context, history)
            return checkpoint
        damaged.append((checkpoint, damage))
    _report(damaged, None, context, history)
    saved = context.from_first_rank(any(event["event"] == "saved" for event in read_history(run_folder)))
    if damaged or saved:
        raise IntegrityError(
            f"{run_folder}: was saved before, but no checkpoint is whole any more; bring one back, or pass --overwrite "
            "to start from the beginning"
        )
    return None


def _damage(checkpoint: Path, context: ParallelContext) -> str | None:
    damage = find_damage(checkpoint, context.rank, context.world_size)
    if damage is None:
        try:
            read_description(checkpoint)
        except UserError as error:  # whole, but of another version
            return str(error)
    return damage


def _report(
    damaged: list[tuple[Path, str]], instead: Path | None, context: ParallelContext, history: History
) -> None:
    """Set damaged checkpoints aside, and say so."""
    if not context.is_first_rank:
        return
    for checkpoint, damage in damaged:
        aside = checkpoint.with_name(checkpoint.name + DAMAGED_SUFFIX)
        shutil.rmtree(aside, ignore_errors=True)
        history.record(
            "fell_back",
            step=read_step(checkpoint),
            reason=damage,
            to_step=None if instead is None else read_step(instead),
        )
        checkpoint.rename(aside)
        print(
            f"warning: {checkpoint} is damaged: {damage}; it is now {aside.name}, and training goes on from "
            f"{'nothing' if instead is None else instead.name}",
            flush=True,
        )
