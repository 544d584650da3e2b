"""Parts are named alike in every stage, start alike whatever is built with them, and freeze as told."""

import math
from pathlib import Path

import pytest
import torch

from pretrain.model.cola import PARTS, ColaModel
from pretrain.model.specs import residual_projection_std, weight_std
from pretrain.parallel import ParallelContext
from pretrain.recipes import load_recipe
from tests.pretrain.tiny_runs import tiny_recipe

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
RESIDUAL_PROJECTIONS = ("linear_proj", "linear_fc2")


def build(context: ParallelContext, *parts: str, seed: int = 0) -> ColaModel:
    """The reference form, in which no part starts with zeros."""
    recipe = tiny_recipe("policy", Path("run"), Path("data"), Path("idm"), actions={"output": "reference"})
    torch.manual_seed(99)
    return ColaModel(type(recipe)(**(vars(recipe) | {"seed": seed})), context.groups, parts)


def test_names_start_with_the_part_and_parts_left_out_are_absent(context: ParallelContext) -> None:
    model = build(context, "base", "idm")
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"base", "idm"}
    assert not hasattr(model, "policy")


@pytest.mark.parametrize("part", PARTS)
def test_a_part_starts_alike_whatever_is_built_with_it(context: ParallelContext, part: str) -> None:
    """Alone, with the others, and after them; with another seed it starts elsewhere."""
    alone = getattr(build(context, part), part).state_dict()
    after_others = getattr(build(context, *(p for p in PARTS if p != part), part), part).state_dict()
    other_seed = getattr(build(context, part, seed=1), part).state_dict()
    matrices = [name for name, value in alone.items() if torch.is_tensor(value) and value.dim() > 1]
    assert matrices
    assert all(torch.equal(alone[name], after_others[name]) for name in matrices)
    assert not any(torch.equal(alone[name], other_seed[name]) for name in matrices)


def test_the_idm_and_the_policy_do_not_start_alike(context: ParallelContext) -> None:
    """Same shapes, other seeds: else the policy would start as the untrained IDM."""
    model = build(context, "idm", "policy")
    assert not torch.equal(model.idm.head.weight, model.policy.head.weight)


def test_freezing_leaves_gradients_to_the_trained_parts_alone(context: ParallelContext) -> None:
    model = build(context, "base", "idm", "world_model")
    model.freeze_all_but(("idm", "world_model"))
    wanting = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert (wanting, frozen) == ({"idm", "world_model"}, {"base"})


def test_initial_weights_have_the_published_spread(context: ParallelContext) -> None:
    """sqrt(2 / 5H) everywhere, 1 / (sqrt(H) L) where blocks write to the residual stream, norms one."""
    recipe = tiny_recipe("idm", Path("run"), Path("data"), Path("base"))
    usual, small = math.sqrt(2 / (5 * 32)), 1 / (math.sqrt(32) * 2)
    assert (weight_std(recipe), residual_projection_std(recipe)) == pytest.approx((usual, small))
    for name, parameter in build(context, *PARTS[:3], "policy").named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        expected = small if any(word in name for word in RESIDUAL_PROJECTIONS) else usual
        tolerance = 5 / math.sqrt(2 * parameter.numel())
        assert float(parameter.detach().std()) == pytest.approx(expected, rel=tolerance), name
        assert abs(float(parameter.detach().mean())) < 5 * expected / math.sqrt(parameter.numel()), name


def test_full_size_spreads_are_those_of_the_paper() -> None:
    recipe = load_recipe(CONFIGS / "idm_llama31_8b.yaml", [])
    assert weight_std(recipe) == pytest.approx(0.00988, abs=5e-6)
    assert residual_projection_std(recipe) == pytest.approx(4.88e-4, abs=5e-7)
