"""The merge layers are the paper's formula on the concatenation [state; action], gradients included.

Shapes: S sequence, B batch, H hidden, A actions, F MLP width.
"""

from pathlib import Path

import pytest
import torch

from pretrain.model.world_model import WorldModel
from pretrain.parallel import ParallelContext
from tests.pretrain.tiny_runs import tiny_recipe

S, B, H, A = 5, 3, 32, 16
NO_FAULT = "none"
FAULTS = [
    "halves swapped",
    "no residual",
    "gate and up swapped",
    "one merge layer",
    "action of the next position",
    "norm inside",
]


def build(context: ParallelContext, output: str = "reference") -> WorldModel:
    """As at the start of training, in double precision."""
    recipe = tiny_recipe("idm", Path("run"), Path("data"), Path("base"), actions={"output": output})
    torch.manual_seed(0)
    return WorldModel(recipe, context.groups).double()


@pytest.fixture(scope="module")
def world_model(context: ParallelContext) -> WorldModel:
    """Two merge layers whose weights are all random and large enough for every term to matter."""
    model = build(context)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def random_inputs(soft: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """State [S, B, H] and choice [S, B, A], both wanting gradients; a soft choice mixes actions."""
    generator = torch.Generator().manual_seed(2)
    state_SBH = torch.randn(S, B, H, generator=generator, dtype=torch.float64)
    logits_SBA = torch.randn(S, B, A, generator=generator, dtype=torch.float64)
    hard_SBA = torch.nn.functional.one_hot(logits_SBA.argmax(-1), A).double()
    choice_SBA = torch.softmax(logits_SBA, -1) if soft else hard_SBA
    return state_SBH.requires_grad_(), choice_SBA.requires_grad_()


def papers_formula(
    model: WorldModel, hidden_SBH: torch.Tensor, choice_SBA: torch.Tensor, fault: str = NO_FAULT
) -> torch.Tensor:
    """s' = s + W_down(silu(W_gate [s; a]) * (W_up [s; a])) with explicit weights, a = the chosen code."""
    action_SBH = choice_SBA @ model.codebook_AH
    if fault == "action of the next position":
        action_SBH = action_SBH.roll(-1, dims=0)
    state_SBH = hidden_SBH
    for layer in list(model.merge_layers.children())[: 1 if fault == "one merge layer" else None]:
        pairs = [(layer.gate_state, layer.gate_action), (layer.up_state, layer.up_action)]
        if fault == "gate and up swapped":
            pairs.reverse()
        if fault == "halves swapped":
            pairs = [(action, state) for state, action in pairs]
        gate_weight, up_weight = (torch.cat([left.weight, right.weight], dim=1) for left, right in pairs)
        both_SB2H = torch.cat([state_SBH, action_SBH], dim=-1)
        if fault == "norm inside":
            both_SB2H = torch.nn.functional.rms_norm(both_SB2H, both_SB2H.shape[-1:])
        gated_SBF = torch.nn.functional.silu(both_SB2H @ gate_weight.T) * (both_SB2H @ up_weight.T)
        change_SBH = gated_SBF @ layer.down.weight.T
        state_SBH = change_SBH if fault == "no residual" else state_SBH + change_SBH
    return state_SBH


def gradients(output: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of a random weighting of `output`; zeros where an input plays no part."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = torch.autograd.grad((output * weights).sum(), inputs, allow_unused=True)
    return [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found, strict=True)]


@pytest.mark.parametrize("soft", [False, True])
def test_it_is_the_formula_on_the_concatenation(world_model: WorldModel, soft: bool) -> None:
    """Outputs, and gradients to the state, the choice, the codebook and every weight, to double precision."""
    state_SBH, choice_SBA = random_inputs(soft)
    expected, found = papers_formula(world_model, state_SBH, choice_SBA), world_model(state_SBH, choice_SBA)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    inputs = [state_SBH, choice_SBA, *world_model.parameters()]
    assert any(parameter is world_model.codebook_AH for parameter in inputs)
    pairs = zip(gradients(found, inputs), gradients(expected, inputs), strict=True)
    for found_gradient, expected_gradient in pairs:
        assert float(expected_gradient.abs().max()) > 1e-3
        torch.testing.assert_close(found_gradient, expected_gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fault", FAULTS)
def test_other_formulas_are_far_off(world_model: WorldModel, fault: str) -> None:
    """The fault twins."""
    state_SBH, choice_SBA = random_inputs()
    found = world_model(state_SBH, choice_SBA).detach()
    faulty = papers_formula(world_model, state_SBH, choice_SBA, fault).detach()
    assert float((found - faulty).norm() / found.norm()) > 0.05


def test_gradient_of_the_choice_says_what_each_action_would_change(world_model: WorldModel) -> None:
    """Its entry for an action not taken is the derivative towards it, which lets the IDM learn from all."""
    state_SBH, choice_SBA = random_inputs()
    (gradient_SBA,) = gradients(world_model(state_SBH, choice_SBA), [choice_SBA])
    before_SBH = world_model(state_SBH, choice_SBA).detach()
    step = 1e-6
    weights = torch.randn((S, B, H), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for action in range(A):
        nudged_SBA = choice_SBA.detach().clone()
        nudged_SBA[2, 1, action] += step
        change = ((world_model(state_SBH, nudged_SBA).detach() - before_SBH) * weights).sum()
        assert float(change) / step == pytest.approx(float(gradient_SBA[2, 1, action]), rel=1e-3, abs=1e-4)


def test_an_action_acts_at_its_own_position_only(world_model: WorldModel) -> None:
    state_SBH, choice_SBA = random_inputs()
    other_SBA = choice_SBA.detach().clone()
    other_SBA[2, 1] = other_SBA[2, 1].roll(1)
    before, after = world_model(state_SBH, choice_SBA), world_model(state_SBH, other_SBA)
    changed_SB = (before != after).any(-1)
    assert changed_SB.nonzero().tolist() == [[2, 1]]


def test_residual_form_starts_exactly_at_the_base(context: ParallelContext) -> None:
    """Whatever the actions, the state is h to the last bit; yet the way out of there has a gradient."""
    model = build(context, "residual")
    state_SBH, choice_SBA = random_inputs()
    state_out_SBH = model(state_SBH, choice_SBA)
    assert torch.equal(state_out_SBH, state_SBH)
    ways_out = [layer.down.weight for layer in model.merge_layers.children()]
    assert all(bool(gradient.any()) for gradient in gradients(state_out_SBH, ways_out))


def test_reference_form_does_not_start_at_the_base(context: ParallelContext) -> None:
    """The fault twin: with random down projections the first state is another one for every position."""
    state_SBH, choice_SBA = random_inputs()
    assert bool((build(context, "reference")(state_SBH, choice_SBA) != state_SBH).any(-1).all())
