"""Writing checkpoints."""

import os
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer

from data_prep.checksum_list import list_whole_folder
from data_prep.output_files import partial_path, write_json_whole
from pretrain.checkpoint_folder import (
    DESCRIPTION_FILE,
    FORMAT_VERSION,
    CheckpointDescription,
    LoopState,
    find_checkpoints,
    step_folder,
)
from pretrain.checkpointing import OPTIMIZER_FORMAT, sharded_weights
from pretrain.config import RunConfig
from pretrain.model.cola import ColaModel
from pretrain.optimization import make_savable
from pretrain.planning.parameters import built_parts
from pretrain.recipes import recipe_fields


@dataclass(frozen=True, kw_only=True)
class RunOrigin:
    """What a run is made from; the same for all its checkpoints."""

    start: Path | None
    """Checkpoint whose parts are frozen in it."""
    tokenizer_fingerprint: str
    """As in `CheckpointDescription`."""
    data_fingerprint: str
    """As in `CheckpointDescription`."""


def save(
    config: RunConfig,
    model: ColaModel,
    optimizer: MegatronOptimizer,
    trained_parts: tuple[str, ...],
    step: int,
    origin: RunOrigin,
    fingerprints: dict[str, str],
) -> Path:
    """Write the checkpoint of `step`, the frozen parts too if it is to need no other. Collective."""
    final = step_folder(config.run_folder, step)
    partial = partial_path(final)
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        for name in ("weights", "optimizer"):
            (partial / name).mkdir(parents=True)
    dist.barrier()
    parts = built_parts(config) if config.checkpoint.self_contained else trained_parts
    weights = sharded_weights(model, parts, scales=True)
    make_savable(optimizer)
    optimizer_state = optimizer.sharded_state_dict(
        sharded_weights(model, trained_parts), metadata=OPTIMIZER_FORMAT
    )
    dist_checkpointing.save(weights, str(partial / "weights"))
    dist_checkpointing.save({"optimizer": optimizer_state}, str(partial / "optimizer"))
    if dist.get_rank() == 0:
        description = CheckpointDescription(
            format_version=FORMAT_VERSION,
            stage=config.stage,
            step=step,
            consumed_samples=step * config.training.global_batch_size,
            consumed_tokens=step * config.tokens_per_step,
            parts=list(parts),
            start_from=os.path.relpath(origin.start, config.run_folder) if origin.start else None,
            tokenizer_fingerprint=origin.tokenizer_fingerprint,
            data_fingerprint=origin.data_fingerprint,
            recipe=recipe_fields(config),
            loop=LoopState(),
            fingerprints=fingerprints,
            megatron_version=version("megatron-core"),
        )
        write_json_whole(partial / DESCRIPTION_FILE, asdict(description))
        list_whole_folder(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in find_checkpoints(config.run_folder)[: -config.checkpoint.keep_last]:
            shutil.rmtree(old)
    dist.barrier()
    return final
