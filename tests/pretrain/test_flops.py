"""FLOPs a token, against the published sizes and against what torch counts on a model that runs.

Shapes: S sequence, B batch.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config import RunConfig
from pretrain.flops import flops_per_token, half_block_flops
from pretrain.model.cola import ColaModel
from pretrain.parallel import ParallelContext
from pretrain.recipes import load_recipe
from pretrain.stages.contract import Batch
from pretrain.stages.registry import stage_class
from tests.pretrain.tiny_runs import UNLIKE_SIZES as MODEL
from tests.pretrain.tiny_runs import tiny_recipe

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
S, B = 48, 2
ACTIONS = {"num_actions": 24, "num_idm_layers": 2, "num_merge_layers": 2, "num_policy_layers": 1}


def full_size_gigaflops(name: str) -> dict[str, float]:
    """GFLOP a token by module of a recipe in configs/."""
    return {key: value / 1e9 for key, value in flops_per_token(load_recipe(CONFIGS / name, [])).items()}


def test_full_size_figures_are_the_known_ones() -> None:
    """For Llama-3.1-8B at 2048 tokens; the known figures leave out the action heads, 0.02 % of a stack."""
    idm = full_size_gigaflops("idm_llama31_8b.yaml")
    policy = full_size_gigaflops("policy_llama31_8b.yaml")
    action_head = 2 * 4096 * 64 / 1e9
    known = {
        14.496: [idm["base forward"], policy["base forward"]],
        1.812: [idm["idm forward"] - action_head, policy["idm forward"] - action_head],
        3.624: [idm["idm backward"] - 2 * action_head, policy["policy forward"] - action_head],
        7.248: [policy["policy backward"] - 2 * action_head],
        1.051: [idm["head forward"], idm["head input gradient"]],
    }
    for figure, found in known.items():
        assert found == pytest.approx([figure] * len(found), abs=0.0006)
    assert sum(policy.values()) == pytest.approx(27.18, abs=0.01)


def test_a_block_is_mostly_its_mlp() -> None:
    """Llama-3.1-8B at 2048 tokens: 4 x 4096 x 5120 products and 2048 x 8192 of scores, beside 6 x 4096 x 14336."""
    config = load_recipe(CONFIGS / "idm_llama31_8b.yaml", [])
    attention, mlp = half_block_flops(config.model, config.data.sequence_length)
    assert (attention, mlp) == (4 * 4096 * 5120 + 2048 * 8192, 6 * 4096 * 14336)
    assert 32 * (attention + mlp) == flops_per_token(config)["base forward"]


def test_merge_layers_need_less_than_on_the_concatenation() -> None:
    """Multiplying [state; action] costs 1.174 GFLOP a token.

    There are only 64 actions, so the action's half of the gate and up projections is made once a
    micro-batch, and a token's share of it is a product of width 64 instead of 4096.
    """
    idm = full_size_gigaflops("idm_llama31_8b.yaml")
    on_the_concatenation = 2 * 2 * 14336 * (2 * 2 * 4096 + 4096) / 1e9
    assert on_the_concatenation == pytest.approx(1.174, abs=0.0006)
    saved = 2 * 2 * 14336 * 2 * (4096 - 64) / 1e9
    assert idm["merge forward"] == pytest.approx(on_the_concatenation - saved)
    input_gradients_of_the_first_layer = 2 * 2 * 14336 * 4096 / 1e9
    assert idm["merge backward"] == pytest.approx(
        2 * idm["merge forward"] - input_gradients_of_the_first_layer
    )
    assert sum(idm.values()) == pytest.approx(23.935, abs=0.001)


def recipe(stage: str, vocab_padding: int = 0) -> RunConfig:
    """A tiny run of the stage."""
    start = None if stage == "base" else Path("start")
    model = {**MODEL, "vocab_padding": vocab_padding}
    config = tiny_recipe(stage, Path("run"), Path("data"), start, model=model, actions=ACTIONS)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=S))


def counted(config: RunConfig, context: ParallelContext) -> tuple[float, float]:
    """FLOPs a token that torch counts in the forward and in the backward pass of one micro-batch."""
    stage = stage_class(config)
    model = ColaModel(config, context.groups, (*stage.frozen_parts, *stage.trained_parts))
    model.freeze_all_but(stage.trained_parts)
    generator = torch.Generator().manual_seed(0)
    tokens_BS, labels_BS = torch.randint(MODEL["vocab_size"], (2, B, S), generator=generator)
    # The counter knows matrix products; this attention is made of them, on the whole square of positions.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = model(
                stage(config, context.data_parallel_mean), Batch(tokens_BS, labels_BS, torch.arange(B))
            ).loss
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    return forward.get_total_flops() / (B * S), backward.get_total_flops() / (B * S)


def not_needed(config: RunConfig) -> tuple[float, float]:
    """What torch counts beyond the method's needs, forward and backward, a token."""
    model, actions = config.model, config.actions
    masked_half = (
        2 * model.num_attention_heads * model.head_size * S
    )  # of the scores and of the weighted values
    if config.stage == "base":
        return model.num_layers * masked_half, 2 * model.num_layers * masked_half
    if config.stage == "policy":
        blocks = model.num_layers + actions.num_idm_layers + actions.num_policy_layers
        return blocks * masked_half, 2 * actions.num_policy_layers * masked_half
    # The action's rows of gate and up, made once a micro-batch: 8192 tokens at full size, 96 here.
    table = 2 * 2 * model.hidden_size * model.ffn_hidden_size * actions.num_actions
    tables = actions.num_merge_layers * table / (B * S)
    return (
        (model.num_layers + actions.num_idm_layers) * masked_half + tables,
        2 * actions.num_idm_layers * masked_half + 2 * tables,
    )


def split(flops: dict[str, float]) -> tuple[float, float]:
    """Sums of what runs in the forward and in the backward pass; the frozen head makes its gradient beside its loss."""
    forward = sum(
        value for name, value in flops.items() if "forward" in name or name == "head input gradient"
    )
    return forward, sum(flops.values()) - forward


@pytest.mark.parametrize(
    ("stage", "vocab_padding"), [("base", 0), ("base", 48), ("idm", 0), ("idm", 48), ("policy", 0)]
)
def test_a_running_model_does_what_is_said(context: ParallelContext, stage: str, vocab_padding: int) -> None:
    """Forward and backward separately, exactly, once what the method does not need is taken off."""
    config = recipe(stage, vocab_padding)
    needed = [
        count - extra for count, extra in zip(counted(config, context), not_needed(config), strict=True)
    ]
    assert split(flops_per_token(config)) == pytest.approx(needed, rel=1e-9)


@pytest.mark.parametrize("stage", ["idm", "policy"])
@pytest.mark.parametrize(
    "fault",
    ["full attention", "base trained too", "no input gradient of the first product", "one layer more"],
)
def test_a_wrong_convention_shows(context: ParallelContext, stage: str, fault: str) -> None:
    """The fault twins: each is outside of one per cent of what is counted."""
    config = recipe(stage)
    needed = [
        count - extra for count, extra in zip(counted(config, context), not_needed(config), strict=True)
    ]
    flops = flops_per_token(config)
    query_size = config.model.num_attention_heads * config.model.head_size
    if fault == "full attention":
        flops["base forward"] += config.model.num_layers * 2 * query_size * S
    elif fault == "base trained too":
        flops["base backward"] = 2 * flops["base forward"]
    elif fault == "no input gradient of the first product":
        key_value_size = config.model.num_key_value_heads * config.model.head_size
        flops[f"{stage} backward"] -= 2 * config.model.hidden_size * (query_size + 2 * key_value_size)
    else:
        wider = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=4))
        flops = flops_per_token(wider)
    forward, backward = split(flops)
    assert abs(forward / needed[0] - 1) > 0.01 or abs(backward / needed[1] - 1) > 0.01


def test_a_head_without_its_padding_shows(context: ParallelContext) -> None:
    """The fault twin of a padded vocabulary: rows that are no tokens are multiplied all the same."""
    padded = recipe("idm", vocab_padding=48)
    needed = counted(padded, context)[0] - not_needed(padded)[0]
    assert split(flops_per_token(recipe("idm")))[0] < 0.99 * needed
