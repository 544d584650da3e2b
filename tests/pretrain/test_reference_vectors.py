"""The Megatron model computes what the authors' own code computes, to 1e-3; with the usual mistakes it does not."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoint_tools.formats.weight_map import to_megatron, weight_rules
from pretrain.config import RunConfig
from pretrain.model.cola import ColaModel
from pretrain.parallel import ParallelContext
from tests.pretrain.megatron_outputs import MegatronOutputs
from tests.pretrain.tiny_runs import tiny_recipe
from tests.reference_vectors import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    ROPES,
    Vectors,
    needs_vectors,
    read_vectors,
    wrong,
)

PARTS = ("base", "idm", "world_model", "policy")

pytestmark = needs_vectors


@pytest.fixture(scope="module")
def vectors() -> Vectors:
    return read_vectors()


def recipe_of(vectors: Vectors, rope: str) -> RunConfig:
    sizes = vectors.sizes
    return tiny_recipe(
        "policy",
        Path("unused"),
        Path("unused"),
        Path("unused"),
        model={
            "vocab_size": sizes["vocab_size"],
            "hidden_size": sizes["hidden_size"],
            "ffn_hidden_size": sizes["intermediate_size"],
            "num_layers": sizes["num_hidden_layers"],
            "num_attention_heads": sizes["num_attention_heads"],
            "num_key_value_heads": sizes["num_key_value_heads"],
            "head_size": sizes["hidden_size"] // sizes["num_attention_heads"],
            "rope_scaling_factor": sizes["rope_scaling"]["factor"] if rope == "llama3" else None,
        },
        actions={
            "num_actions": sizes["num_code"],
            "num_idm_layers": sizes["num_action_layer"],
            "num_merge_layers": sizes["num_dyna_layer"],
            "num_policy_layers": sizes["num_policy_layer"],
            "output": "reference",
        },
    )


Weights = dict[str, torch.Tensor]


def found_differences(
    context: ParallelContext,
    vectors: Vectors,
    rope: str,
    *,
    build_rope: str | None = None,
    output_form: str = "reference",
    action_shift: int = 1,
    fault: Callable[[Weights], Weights] = lambda weights: weights,
) -> dict[str, float]:
    """Greatest difference of each output from the authors' (for actions: how many differ)."""
    recipe = recipe_of(vectors, build_rope or rope)
    model = ColaModel(recipe, context.groups, PARTS)
    weights = to_megatron(weight_rules(recipe.model, recipe.actions, PARTS), fault(vectors.weights()))
    answer = model.load_state_dict(weights, strict=False)
    assert not answer.unexpected_keys
    assert all(name.endswith("_extra_state") for name in answer.missing_keys)
    ours = MegatronOutputs(model, output_form, vectors.tensors["input_ids"].long(), action_shift)
    theirs = {
        key.removeprefix(f"{rope}."): v for key, v in vectors.tensors.items() if key.startswith(f"{rope}.")
    }
    greedy_BS = ours.policy_logits_BSA.argmax(-1)
    generated, generated_actions = generate(model, output_form, ours.tokens_BS[:, :PROMPT_TOKENS], NEW_TOKENS)
    return {
        "generated": float((generated != theirs["generated"]).sum()),
        "generated_actions": float((generated_actions != theirs["generated_actions"]).sum()),
        "hidden": float((ours.hidden_BSH - theirs["hidden"]).abs().max()),
        "policy_logits": float((ours.policy_logits_BSA - theirs["policy_logits"]).abs().max()),
        "actions": float((theirs["idm_action_unshifted"] != ours.idm_logits_SBA.argmax(-1).T).sum()),
        # the last position has no next token; theirs repeats the action before it
        "logits_idm_actions": float(
            (ours.world_logits(ours.inferred_actions()) - theirs["logits_idm_actions"])[:, :-1].abs().max()
        ),
        "logits_greedy_policy": float(
            (ours.world_logits(greedy_BS) - theirs["logits_greedy_policy"]).abs().max()
        ),
        "logits_action3_last": float(
            (ours.world_logits(torch.full_like(greedy_BS, 3))[:, -1:] - theirs["logits_action3_last"])
            .abs()
            .max()
        ),
    }


def generate(
    model: ColaModel, output_form: str, tokens_BS: torch.Tensor, new_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy actions and tokens, one whole forward pass a token."""
    actions = []
    for _ in range(new_tokens):
        outputs = MegatronOutputs(model, output_form, tokens_BS)
        greedy_BS = outputs.policy_logits_BSA.argmax(-1)
        actions.append(greedy_BS[:, -1:])
        tokens_BS = torch.cat([tokens_BS, outputs.world_logits(greedy_BS)[:, -1:].argmax(-1)], dim=1)
    return tokens_BS, torch.cat(actions, dim=1)


@pytest.mark.parametrize("rope", ROPES)
def test_every_output_is_the_authors(context: ParallelContext, vectors: Vectors, rope: str) -> None:
    found = found_differences(context, vectors, rope)
    assert not wrong(found), found


@pytest.mark.parametrize("rope", ROPES)
def test_the_other_rope_scaling_shows(context: ParallelContext, vectors: Vectors, rope: str) -> None:
    found = found_differences(context, vectors, rope, build_rope=ROPES[1 - ROPES.index(rope)])
    assert wrong(found) == set(found), found


def swap_query_heads(weights: Weights) -> Weights:
    name = "model.layers.0.self_attn.q_proj.weight"
    return {**weights, name: weights[name].unflatten(0, (2, -1)).flip(0).flatten(0, 1)}


def swap_keys_and_values(weights: Weights) -> Weights:
    key, value = (f"model.layers.0.self_attn.{letter}_proj.weight" for letter in "kv")
    return {**weights, key: weights[value], value: weights[key]}


@pytest.mark.parametrize("fault", [swap_query_heads, swap_keys_and_values])
def test_a_wrong_order_of_queries_keys_and_values_shows(
    context: ParallelContext, vectors: Vectors, fault: Callable[[Weights], Weights]
) -> None:
    assert "hidden" in wrong(found_differences(context, vectors, "llama3", fault=fault))


@pytest.mark.parametrize("shift", [0, 2])
def test_another_action_shift_shows(context: ParallelContext, vectors: Vectors, shift: int) -> None:
    assert wrong(found_differences(context, vectors, "plain", action_shift=shift)) == {"logits_idm_actions"}


def test_the_other_output_form_shows(context: ParallelContext, vectors: Vectors) -> None:
    found = wrong(found_differences(context, vectors, "plain", output_form="residual"))
    assert found >= {"logits_idm_actions", "logits_greedy_policy", "logits_action3_last"}
    assert found.isdisjoint({"hidden", "policy_logits", "actions"})
