"""The model computes what the authors' own code computes, to 1e-3; with the usual mistakes it does not."""

from collections.abc import Callable, Iterator

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaAttention

from checkpoint_tools.huggingface.configuration_cola import ColaConfig
from checkpoint_tools.huggingface.modeling_cola import ColaForCausalLM
from tests.checkpoint_tools.random_cola import generate_with_actions, greatest_difference
from tests.reference_vectors import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    ROPES,
    Vectors,
    needs_vectors,
    read_vectors,
    wrong,
)

WORLD_MODEL = {"logits_idm_actions", "logits_greedy_policy", "logits_action3_last"}

pytestmark = needs_vectors


@pytest.fixture(scope="module")
def vectors() -> Vectors:
    return read_vectors()


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def build(vectors: Vectors, rope: str, attn_implementation: str = "eager") -> ColaForCausalLM:
    """Our model with the authors' weights and either rotary embedding."""
    sizes = dict(vectors.sizes)
    if rope == "plain":
        del sizes["rope_scaling"]
    config = ColaConfig(**sizes, output_form="reference", bos_token_id=None, eos_token_id=None)
    config._attn_implementation = attn_implementation
    model = ColaForCausalLM(config).eval()
    model.load_state_dict(vectors.weights())
    return model


def differences(
    model: ColaForCausalLM, vectors: Vectors, rope: str, action_shift: int = 1
) -> dict[str, float]:
    """By the name of the output: its greatest difference from the authors' (of integers, how many differ)."""
    tokens_BS = vectors.tensors["input_ids"].long()
    ours: dict[str, torch.Tensor] = {
        "hidden": model.model(tokens_BS).last_hidden_state,
        "policy_logits": model.policy_logits(tokens_BS),
        "idm_action_unshifted": model.infer_actions(tokens_BS),
        "logits_greedy_policy": model(tokens_BS).logits,
        "logits_action3_last": model(tokens_BS, actions=3, logits_to_keep=1).logits,
    }
    expected = {key: vectors.tensors[f"{rope}.{key}"] for key in (*ours, "generated", "generated_actions")}
    # Ours has no action for the last position, whose next token is unknown, and none that led to the first.
    expected["idm_action_unshifted"] = expected["idm_action_unshifted"][:, 1:]
    expected["logits_idm_actions"] = vectors.tensors[f"{rope}.logits_idm_actions"][:, :-1]
    actions_BS = ours["idm_action_unshifted"].roll(1 - action_shift, dims=1)
    ours["logits_idm_actions"] = model.forward_world_model(tokens_BS[:, :-1], actions_BS)
    ours["generated"], ours["generated_actions"] = generate_with_actions(
        model, tokens_BS[:, :PROMPT_TOKENS], NEW_TOKENS
    )
    return {key: greatest_difference(ours[key], expected[key].to(ours[key].dtype)) for key in expected}


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("rope", ROPES)
def test_every_output_is_the_authors(vectors: Vectors, rope: str, attn_implementation: str) -> None:
    found = differences(build(vectors, rope, attn_implementation), vectors, rope)
    assert len(found) == 8
    assert not wrong(found), found


@pytest.mark.parametrize("rope", ROPES)
def test_the_other_rope_scaling_is_seen_everywhere(vectors: Vectors, rope: str) -> None:
    other = ROPES[1 - ROPES.index(rope)]
    found = differences(build(vectors, other), vectors, rope)
    assert wrong(found) == set(found), found
    assert found["logits_greedy_policy"] > 1.0


def swap_keys_and_values(attention: LlamaAttention) -> None:
    attention.k_proj, attention.v_proj = attention.v_proj, attention.k_proj


def swap_query_heads(attention: LlamaAttention) -> None:
    attention.q_proj.weight.copy_(attention.q_proj.weight.unflatten(0, (2, -1)).flip(0).flatten(0, 1))


def rotate_fused_order(attention: LlamaAttention) -> None:
    """As if the fused [query, query, key, value] had been split as [key, query, query, value]."""
    fused = torch.cat((attention.q_proj.weight, attention.k_proj.weight))
    attention.k_proj.weight.copy_(fused[:64])
    attention.q_proj.weight.copy_(fused[64:])


SEEN_IN = {
    "layers": {"hidden", "policy_logits", "idm_action_unshifted", "generated", *WORLD_MODEL},
    "action_layers": {"idm_action_unshifted", "logits_idm_actions"},
    "policy_layers": {"policy_logits", "logits_greedy_policy", "generated_actions"},
}


@pytest.mark.parametrize("fault", [swap_keys_and_values, swap_query_heads, rotate_fused_order])
@pytest.mark.parametrize("part", list(SEEN_IN))
def test_a_wrong_order_of_queries_keys_and_values_is_seen(
    vectors: Vectors, part: str, fault: Callable[[LlamaAttention], None]
) -> None:
    model = build(vectors, "llama3")
    fault(getattr(model.model, part)[0].self_attn)
    found = differences(model, vectors, "llama3")
    assert SEEN_IN[part] <= wrong(found), found


@pytest.mark.parametrize("shift", [0, 2])
def test_actions_shifted_by_another_step_are_seen(vectors: Vectors, shift: int) -> None:
    found = differences(build(vectors, "plain"), vectors, "plain", action_shift=shift)
    assert wrong(found) == {"logits_idm_actions"}, found
    assert found["logits_idm_actions"] > 1.0


def test_forgetting_to_subtract_the_hidden_state_is_seen(
    vectors: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(vectors, "plain")
    with_subtraction = model.model.world_state
    monkeypatch.setattr(model.model, "world_state", lambda h, actions: with_subtraction(h, actions) + h)
    found = differences(model, vectors, "plain")
    assert wrong(found) >= WORLD_MODEL, found
    assert wrong(found).isdisjoint({"hidden", "policy_logits", "idm_action_unshifted"}), found
