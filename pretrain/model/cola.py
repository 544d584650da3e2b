"""The CoLA model: base, IDM, world model and policy as named parts of one Megatron module.

A stage builds the parts it needs; parameter and checkpoint names start with the part's name, whatever the stage.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule

from pretrain.config import RunConfig
from pretrain.model.action_transformer import ActionTransformer
from pretrain.model.specs import transformer_config
from pretrain.model.trunk import LlamaTrunk
from pretrain.model.vq import VectorQuantiser
from pretrain.model.world_model import WorldModel

if TYPE_CHECKING:
    from pretrain.stages.contract import Batch, Stage, StageLoss

PARTS = ("base", "idm", "world_model", "quantiser", "policy")


class ColaModel(MegatronModule):
    """The parts a stage asks for; absent parts are None."""

    base: LlamaTrunk
    idm: ActionTransformer
    world_model: WorldModel
    quantiser: VectorQuantiser
    policy: ActionTransformer

    def __init__(self, config: RunConfig, groups: ProcessGroupCollection, parts: Iterable[str]) -> None:
        super().__init__(config=transformer_config(config, config.model.num_layers))
        self.model_type = ModelType.encoder_or_decoder  # asked for by Megatron's schedules
        self.tp_group = groups.tp
        self.parts = tuple(parts)
        for part in self.parts:
            # A seed of its own, so that a part starts alike whichever others are built with it.
            part_seed = config.seed + 1000 * (1 + PARTS.index(part))
            torch.manual_seed(part_seed)
            tensor_parallel.model_parallel_cuda_manual_seed(part_seed)
            setattr(self, part, _build_part(part, config, groups))
        if config.training.precision == "bf16":
            self.bfloat16()

    def forward(self, stage: "Stage", batch: "Batch") -> "StageLoss":
        """One micro-batch of `stage`; through forward, so that Megatron's DDP hooks see it."""
        return stage.loss(self, batch)

    def set_input_tensor(self, input_tensor: object) -> None:
        """Part of the contract with Megatron's schedules; nothing arrives without pipeline stages."""

    def freeze_all_but(self, trained_parts: Iterable[str]) -> None:
        """Let only `trained_parts` require gradients. Call before wrapping in DDP, which skips frozen tensors."""
        trained = set(trained_parts)
        for part in self.parts:
            getattr(self, part).requires_grad_(part in trained)


def _build_part(part: str, config: RunConfig, groups: ProcessGroupCollection) -> MegatronModule:
    if part == "base":
        return LlamaTrunk(config, groups)
    if part == "world_model":
        return WorldModel(config, groups)
    if part == "quantiser":
        return VectorQuantiser(transformer_config(config, 1), config.actions.num_actions)
    layers = config.actions.num_idm_layers if part == "idm" else config.actions.num_policy_layers
    return ActionTransformer(config, layers, groups)
