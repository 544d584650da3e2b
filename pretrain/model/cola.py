"""The CoLA model: base, IDM, world model and policy as named parts of one Megatron module.

A stage builds the parts it needs; parameter and checkpoint names start with the part's name, whatever the stage.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule

from pretrain.config import RunConfig
from pretrain.model.action_transformer import ActionTransformer
from pretrain.model.specs import is_frozen_base, seeded, transformer_config
from pretrain.model.trunk import LlamaTrunk
from pretrain.model.vq import VectorQuantiser
from pretrain.model.world_model import WorldModel
from pretrain.placement import place_layers

if TYPE_CHECKING:
    from pretrain.stages.contract import Batch, Carry, Stage, StageLoss

PARTS = ("base", "idm", "world_model", "quantiser", "policy")


class ColaModel(MegatronModule):
    """The parts a stage asks for, as far as they are on this pipeline stage (`parts` names them)."""

    base: LlamaTrunk
    idm: ActionTransformer
    world_model: WorldModel
    quantiser: VectorQuantiser
    policy: ActionTransformer

    def __init__(self, config: RunConfig, groups: ProcessGroupCollection, parts: Iterable[str]) -> None:
        # The trained stack's: Megatron's schedule asks it whether FP8 weights change from step to step.
        super().__init__(config=transformer_config(config, config.stage))
        self.model_type = ModelType.encoder_or_decoder  # asked for by Megatron's schedules
        self.tp_group = groups.tp
        on_last_stage = groups.pp.rank() == groups.pp.size() - 1
        placement = place_layers(config)
        here = {part for part in ("idm", "policy") if placement.layers_by_stage(part)[groups.pp.rank()]}
        here |= {"base"} | ({"world_model", "quantiser"} if on_last_stage else set())
        self.parts = tuple(part for part in parts if part in here)
        for part in self.parts:
            # A seed of its own, so that a part starts alike whichever others are built with it.
            # Without gradients an FP8 base keeps neither transposed weights nor those it was quantised from.
            trained = torch.set_grad_enabled(not is_frozen_base(config, part))
            with seeded(config.seed + 1000 * (1 + PARTS.index(part))), trained:
                setattr(self, part, _build_part(part, config, groups))

    def forward(self, stage: "Stage", batch: "Batch", carry: "Carry | None" = None) -> "Carry | StageLoss":
        """One micro-batch of `stage` on this pipeline stage; through forward, so that Megatron's DDP hooks see it."""
        return stage.forward(self, batch, carry)

    def set_input_tensor(self, input_tensor: object) -> None:
        """Part of the contract with Megatron's schedules; `pretrain.pipeline` hands over what arrives."""

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
        return VectorQuantiser(transformer_config(config, "world_model"), config.actions.num_actions)
    return ActionTransformer(config, part, groups)
