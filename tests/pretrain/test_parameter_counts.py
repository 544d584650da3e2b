"""Parameters of the full-size models, counted on the meta device, where tensors have shapes only."""

from pathlib import Path

import pytest
import torch

from pretrain.model.cola import ColaModel
from pretrain.parallel import ParallelContext
from pretrain.recipes import load_recipe
from pretrain.stages.registry import stage_class

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BASE, IDM, CODEBOOK, MERGE, POLICY = 8_030_261_248, 872_714_240, 262_144, 587_202_560, 1_745_162_240
RECIPES = {
    "idm_llama31_8b": IDM + CODEBOOK + MERGE,
    "idm_llama31_8b_paper": IDM + CODEBOOK + MERGE,
    "policy_llama31_8b": POLICY,
    "policy_llama31_8b_paper": POLICY,
}


def build(context: ParallelContext, name: str, *overrides: str) -> ColaModel:
    """The model of a recipe, ready to train, without memory."""
    config = load_recipe(CONFIGS / f"{name}.yaml", list(overrides))
    stage = stage_class(config)
    with torch.device("meta"):
        model = ColaModel(config, context.groups, (*stage.frozen_parts, *stage.trained_parts))
    model.freeze_all_but(stage.trained_parts)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    return model


def count(module: torch.nn.Module, trained_only: bool = False) -> int:
    """Numbers in the parameters of a module."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained_only)


@pytest.mark.parametrize("name", ["policy_llama31_8b", "policy_llama31_8b_paper"])
def test_parts_have_the_published_sizes(context: ParallelContext, name: str) -> None:
    """Of the complete model, which the policy is trained on."""
    model = build(context, name)
    assert count(model.base) == BASE
    assert count(model.idm) == IDM
    assert model.world_model.codebook_AH.numel() == CODEBOOK
    assert count(model.world_model.merge_layers) == MERGE
    assert count(model.policy) == POLICY
    assert count(model) == BASE + IDM + CODEBOOK + MERGE + POLICY == 11_235_602_432


@pytest.mark.parametrize(("name", "trained"), RECIPES.items())
def test_each_stage_trains_the_published_number_of_parameters(
    context: ParallelContext, name: str, trained: int
) -> None:
    assert count(build(context, name), trained_only=True) == trained
    assert trained in (1_460_178_944, 1_745_162_240)


def test_a_wrong_size_shows(context: ParallelContext) -> None:
    """The fault twin: key/value heads as many as query heads."""
    model = build(context, "idm_llama31_8b", "--model.num_key_value_heads", "32")
    assert count(model.base) != BASE
    assert count(model.idm) != IDM


def test_weights_are_bf16_at_full_size(context: ParallelContext) -> None:
    """16 GB of frozen base, not 32."""
    assert {parameter.dtype for parameter in build(context, "idm_llama31_8b").parameters()} == {
        torch.bfloat16
    }
