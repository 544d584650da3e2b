"""The model class: parameters, the base, actions, the mixture, losses, precision and errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from checkpoint_tools.huggingface.configuration_cola import ColaConfig
from checkpoint_tools.huggingface.modeling_cola import ColaForCausalLM
from tests.checkpoint_tools.random_cola import (
    generate_with_actions,
    greatest_difference,
    random_cola,
    random_tokens,
)

LLAMA_3_1_8B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
LONG = 520


@pytest.fixture(scope="module")
def cola() -> ColaForCausalLM:
    """Published output form. Not to be changed by a test."""
    return random_cola()


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    """[2, LONG]"""
    return random_tokens(2, LONG)


# Parameters


def meta_parameters(**parts: Any) -> dict[str, int]:
    with torch.device("meta"):
        model = ColaForCausalLM(ColaConfig(**LLAMA_3_1_8B, **parts))
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()], (
        "buffers would be saved"
    )
    return {name: weight.numel() for name, weight in model.named_parameters()}


def test_parameter_counts_are_the_papers() -> None:
    sizes = meta_parameters()
    parts = {
        "model.action_code_book": 0,
        "model.action_merge": 0,
        "model.action": 0,
        "model.policy": 0,
        "": 0,
    }
    for name, size in sizes.items():
        parts[next(part for part in parts if name.startswith(part))] += size
    assert parts == {
        "": 8_030_261_248,
        "model.action": 872_714_240,
        "model.action_code_book": 262_144,
        "model.action_merge": 587_202_560,
        "model.policy": 1_745_162_240,
    }
    assert sum(sizes.values()) == 11_235_602_432
    assert len(sizes) == 410


@pytest.mark.parametrize(
    ("left_out", "parameters", "keys"),
    [("num_policy_layers", 9_490_440_192, 336), ("num_idm_layers", 10_362_888_192, 372)],
)
def test_a_part_left_out_has_no_parameters(left_out: str, parameters: int, keys: int) -> None:
    sizes = meta_parameters(**{left_out: 0})
    assert (sum(sizes.values()), len(sizes)) == (parameters, keys)


def test_keys_have_the_published_names_and_shapes(cola: ColaForCausalLM) -> None:
    shapes = {name: list(weight.shape) for name, weight in cola.state_dict().items()}
    assert shapes["model.action_code_book.weight"] == [128, 64]
    assert shapes["model.action_head.weight"] == shapes["model.policy_head.weight"] == [64, 128]
    assert shapes["model.action_merge_layers.1.gate_proj.weight"] == [192, 256]
    assert shapes["model.action_merge_layers.1.down_proj.weight"] == [128, 192]
    for stack in ("layers", "action_layers", "policy_layers"):
        assert shapes[f"model.{stack}.1.self_attn.k_proj.weight"] == [64, 128]
    assert {"model.norm.weight", "model.action_norm.weight", "model.policy_norm.weight"} <= set(shapes)


# The base


@torch.inference_mode()
def test_sdpa_and_eager_attention_agree(cola: ColaForCausalLM, tokens: torch.Tensor) -> None:
    eager = random_cola(attn_implementation="eager")
    assert eager.config._attn_implementation != cola.config._attn_implementation
    assert greatest_difference(eager(tokens).logits, cola(tokens).logits) < 1e-3
    actions_BS = cola.infer_actions(tokens)
    assert greatest_difference(eager.infer_actions(tokens), actions_BS) == 0


@torch.inference_mode()
def test_hidden_states_are_those_of_the_base(cola: ColaForCausalLM, tokens: torch.Tensor) -> None:
    states = cola(tokens, output_hidden_states=True).hidden_states
    assert len(states) == cola.config.num_hidden_layers + 1
    assert torch.equal(states[0], cola.model.embed_tokens(tokens))
    assert torch.equal(states[-1], cola.model(tokens).last_hidden_state)
    assert torch.equal(cola.lm_head(states[-1]), cola.base_logits(tokens))
    assert cola(tokens).hidden_states is None


# Actions


@torch.inference_mode()
def test_an_action_depends_on_the_next_token_and_on_none_after_it(
    cola: ColaForCausalLM, tokens: torch.Tensor
) -> None:
    changed, t = tokens.clone(), 300
    changed[:, t + 1 :] = (changed[:, t + 1 :] + 7) % 320
    before, after = cola.infer_action_logits(tokens), cola.infer_action_logits(changed)
    assert before.shape == (2, LONG - 1, 64)
    assert greatest_difference(before[:, :t], after[:, :t]) < 1e-4
    # The same comparison one position on, where the action does see the first changed token, must fail.
    assert greatest_difference(before[:, t], after[:, t]) > 0.1
    assert torch.equal(cola.infer_actions(tokens), before.argmax(-1))


@torch.inference_mode()
def test_the_policy_does_not_see_the_next_token(cola: ColaForCausalLM, tokens: torch.Tensor) -> None:
    changed, t = tokens.clone(), 300
    changed[:, t + 1 :] = (changed[:, t + 1 :] + 7) % 320
    before, after = cola.policy_logits(tokens), cola.policy_logits(changed)
    assert greatest_difference(before[:, : t + 1], after[:, : t + 1]) < 1e-4
    assert greatest_difference(before[:, t + 1], after[:, t + 1]) > 0.1


@torch.inference_mode()
def test_forward_is_the_world_model_under_the_policys_likeliest_action(
    cola: ColaForCausalLM, tokens: torch.Tensor
) -> None:
    output = cola(tokens)
    assert torch.equal(output.action_logits, cola.policy_logits(tokens))
    assert torch.equal(output.actions, output.action_logits.argmax(-1))
    under_actions = cola.forward_world_model(tokens, output.actions)
    assert torch.equal(output.logits, under_actions)
    assert torch.equal(cola(tokens, actions=output.actions).logits, under_actions)
    other_actions = (output.actions + 1) % 64
    assert greatest_difference(cola.forward_world_model(tokens, other_actions), under_actions) > 1.0


@torch.inference_mode()
def test_actions_are_given_one_a_token_one_a_row_or_one_for_all(cola: ColaForCausalLM) -> None:
    tokens = random_tokens(2, 40)
    full = torch.tensor([[5], [9]]).expand(2, 40)
    per_row = cola.forward_world_model(tokens, torch.tensor([[5], [9]]))
    assert torch.equal(per_row, cola.forward_world_model(tokens, full))
    assert torch.allclose(per_row[1:], cola.forward_world_model(tokens[1:], 9), atol=1e-5)
    assert greatest_difference(per_row[:1], cola.forward_world_model(tokens[:1], 9)) > 1.0


@torch.inference_mode()
def test_actions_may_be_a_function_of_the_policys_logits(cola: ColaForCausalLM) -> None:
    tokens_BS = random_tokens(2, 40)
    least_likely = cola.policy_logits(tokens_BS).argmin(-1)
    output = cola(tokens_BS, actions=lambda logits_BKA: logits_BKA.argmin(-1))
    assert torch.equal(output.actions, least_likely)
    assert torch.equal(output.logits, cola(tokens_BS, actions=least_likely).logits)
    assert torch.equal(cola(tokens_BS, actions=lambda _: None).logits, cola(tokens_BS).logits)


@torch.inference_mode()
def test_logits_to_keep_keeps_exactly_those(cola: ColaForCausalLM, tokens: torch.Tensor) -> None:
    full, last = cola(tokens), cola(tokens, logits_to_keep=3)
    listed = cola(tokens, logits_to_keep=torch.tensor([0, 511]), actions=full.actions)
    for name in ("logits", "actions", "action_logits"):
        assert torch.allclose(last[name], full[name][:, -3:], atol=1e-4)
        assert torch.allclose(listed[name], full[name][:, [0, 511]], atol=1e-4)


@pytest.mark.parametrize(("output_form", "is_base"), [("residual", True), ("reference", False)])
@torch.inference_mode()
def test_residual_form_with_silent_merge_is_exactly_the_base(
    tokens: torch.Tensor, output_form: str, is_base: bool
) -> None:
    model = random_cola(output_form=output_form)
    for merge in model.model.action_merge_layers:
        torch.nn.init.zeros_(merge.down_proj.weight)
    actions_BS = random_tokens(2, LONG, seed=1, vocab_size=64)
    under_actions = model.forward_world_model(tokens, actions_BS)
    assert torch.equal(under_actions, model.base_logits(tokens)) is is_base


# The mixture


@pytest.mark.parametrize("chunk_actions", [1, 7, 64])
@torch.inference_mode()
def test_mixture_is_the_sum_over_all_actions(cola: ColaForCausalLM, chunk_actions: int) -> None:
    tokens = random_tokens(2, 30)
    log_mixture = cola.policy_mixture_log_probs(tokens, chunk_actions=chunk_actions)
    policy = cola.policy_logits(tokens).double().softmax(-1)
    worlds = [cola.forward_world_model(tokens, action).double().softmax(-1) for action in range(64)]
    expected = sum(policy[..., action, None] * world for action, world in enumerate(worlds))
    assert log_mixture.shape == (2, 30, 320)
    assert greatest_difference(log_mixture.double().exp().sum(-1), torch.ones(2, 30)) < 1e-5
    assert greatest_difference(log_mixture, torch.log(torch.as_tensor(expected)).float()) < 1e-3
    # Without the policy's weights it is another distribution.
    assert greatest_difference(log_mixture.exp(), torch.stack(worlds).mean(0).float()) > 0.1


@torch.inference_mode()
def test_mixture_keeps_tokens_that_no_action_makes_likely() -> None:
    model = random_cola()
    model.lm_head.weight.mul_(50.0)
    tokens = random_tokens(1, 8)
    worlds = [model.forward_world_model(tokens, action).softmax(-1) for action in range(64)]
    assert torch.stack(worlds).mean(0).log().isinf().any(), "the plain sum was to lose some tokens"
    assert model.policy_mixture_log_probs(tokens).isfinite().all()


# Loss and gradients


@torch.inference_mode()
def test_labels_give_the_mean_next_token_loss(cola: ColaForCausalLM, tokens: torch.Tensor) -> None:
    labels = tokens.clone()
    labels[0, :400] = -100
    for actions in (None, random_tokens(2, LONG, seed=1, vocab_size=64)):
        output = cola(tokens, actions=actions, labels=labels)
        expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        unshifted = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
        assert output.loss == pytest.approx(expected.item(), abs=1e-5)
        assert output.loss != pytest.approx(unshifted.item(), abs=1e-2)


def enable_checkpointing(model: PreTrainedModel) -> None:
    """transformers 5.23 has another name for it than the versions before."""
    new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"
    getattr(model, new if hasattr(model, new) else old)()


def test_gradient_checkpointing_recomputes_and_changes_no_gradient() -> None:
    plain, checkpointed = random_cola().train(), random_cola().train()
    enable_checkpointing(checkpointed)
    kept_plain, passes_plain = one_backward_pass(plain)
    kept, passes = one_backward_pass(checkpointed)
    assert passes_plain == {"layers": 1, "policy_layers": 1, "action_merge_layers": 1}
    assert passes == {"layers": 2, "policy_layers": 2, "action_merge_layers": 2}, "again for the gradients"
    assert kept < 0.2 * kept_plain
    for (name, weight), (_, expected) in zip(
        checkpointed.named_parameters(), plain.named_parameters(), strict=True
    ):
        is_idm = any(part in name for part in ("action_layers", "action_norm", "action_head"))
        assert (weight.grad is None) == (expected.grad is None) == is_idm
        if weight.grad is not None and expected.grad is not None:
            assert greatest_difference(weight.grad, expected.grad) < 1e-5 * float(expected.grad.abs().max())


def one_backward_pass(model: ColaForCausalLM) -> tuple[int, dict[str, int]]:
    """Bytes kept for the backward pass besides weights, and how often a layer of each stack was computed."""
    tokens_BS, kept = random_tokens(2, 24), {}
    weights = {weight.data_ptr() for weight in model.parameters()}
    passes = {"layers": 0, "policy_layers": 0, "action_merge_layers": 0}

    def count(stack: str) -> Callable[..., None]:
        return lambda *_: passes.update({stack: passes[stack] + 1})

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    for stack in passes:
        last = getattr(model.model, stack)[1]
        getattr(last, "mlp", last).down_proj.register_forward_pre_hook(count(stack))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(tokens_BS, actions=3, labels=tokens_BS)
        loss = output.loss + output.action_logits.logsumexp(-1).mean()
    loss.backward()
    return sum(kept.values()), passes


# Embeddings


@pytest.mark.parametrize("tied", [False, True])
@torch.inference_mode()
def test_a_resized_vocabulary_leaves_the_old_tokens_as_they_were(tied: bool) -> None:
    model, tokens_BS = random_cola(tie_word_embeddings=tied), random_tokens(2, 16)
    before = model(tokens_BS, actions=3).logits
    model.resize_token_embeddings(330, mean_resizing=False)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    output = model(tokens_BS, actions=3, labels=tokens_BS)
    assert output.logits.shape == (2, 16, 330)
    assert greatest_difference(output.logits[..., :320], before) < 1e-4
    assert output.loss.isfinite()
    assert model.policy_mixture_log_probs(tokens_BS).shape == (2, 16, 330)


@torch.inference_mode()
def test_input_embeddings_can_be_exchanged() -> None:
    model, tokens_BS = random_cola(), random_tokens(2, 16)
    backwards = torch.nn.Embedding.from_pretrained(model.model.embed_tokens.weight.flip(0))
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    before = model(tokens_BS).logits
    model.set_input_embeddings(backwards)
    assert greatest_difference(model(319 - tokens_BS).logits, before) == 0
    assert greatest_difference(model(tokens_BS).logits, before) > 1.0


# Precision and errors


@torch.inference_mode()
def test_bfloat16_runs_and_stays_near_float32(cola: ColaForCausalLM) -> None:
    tokens = random_tokens(2, 64)
    model = random_cola().bfloat16()
    output = model(tokens, labels=tokens)
    assert output.logits.dtype is torch.bfloat16
    assert output.loss.isfinite()
    reference, half = cola.base_logits(tokens), model.base_logits(tokens).float()
    assert float((half - reference).std()) < 0.1 * float(reference.std())
    log_mixture = model.policy_mixture_log_probs(tokens)
    assert log_mixture.dtype is torch.float32
    assert greatest_difference(log_mixture.exp().sum(-1), torch.ones(2, 64)) < 1e-4
    assert generate_with_actions(model, tokens, 4)[0].shape == (2, 68)


@torch.inference_mode()
def test_a_part_that_is_left_out_says_so() -> None:
    tokens = random_tokens(1, 8)
    model = random_cola(num_idm_layers=0, num_policy_layers=0)
    for without_policy in (model, model.policy_logits, model.policy_mixture_log_probs):
        with pytest.raises(ValueError, match="no policy"):
            without_policy(tokens)
    with pytest.raises(ValueError, match="no inverse dynamics model"):
        model.infer_actions(tokens)
    output = model(tokens, actions=3)
    assert torch.equal(output.logits, model.forward_world_model(tokens, 3))
    assert output.action_logits is None


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"actions": 64}, ValueError, "from 0 to 63"),
        ({"actions": torch.full((1, 8), -1)}, ValueError, "from 0 to 63"),
        ({"actions": torch.full((1, 8), 0.5)}, ValueError, "whole numbers"),
        ({"actions": torch.zeros(1, 7, dtype=torch.long)}, ValueError, r"shape \[1, 7\]: give \[1, 8\]"),
        ({"action_top_k": 3}, ValueError, "need do_sample_actions=True"),
        ({"do_sample_action": True}, TypeError, "do_sample_action"),
    ],
)
def test_forward_refuses_what_it_cannot_use(
    cola: ColaForCausalLM, keywords: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        cola(random_tokens(1, 8), **keywords)
