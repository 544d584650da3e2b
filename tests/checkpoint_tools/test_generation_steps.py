"""Generation step by step: a callback that chooses actions, their log-probabilities, stored settings, other modes."""

import copy
from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.utils import ModelOutput

from checkpoint_tools.huggingface.modeling_cola import ColaForCausalLM
from tests.checkpoint_tools.random_cola import (
    generate_with_actions,
    greatest_difference,
    random_cola,
    random_tokens,
)

NEW = 8


@pytest.fixture(scope="module")
def cola() -> ColaForCausalLM:
    """Not to be changed by a test."""
    return random_cola()


# A callback


class SecondChoice:
    """Takes the policy's second choice at even steps and leaves odd ones to it; notes what it was told."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.logits: list[torch.Tensor] = []
        self.lengths: list[tuple[int, ...]] = []

    def __call__(
        self, step: int, action_logits_BA: torch.Tensor | None, input_ids_BS: torch.Tensor
    ) -> torch.Tensor | None:
        assert action_logits_BA is not None
        self.steps.append(step)
        self.logits.append(action_logits_BA)
        self.lengths.append(tuple(input_ids_BS.shape))
        return None if step % 2 else action_logits_BA.topk(2).indices[:, 1]


@pytest.mark.parametrize("keywords", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}])
def test_a_callback_chooses_each_action(cola: ColaForCausalLM, keywords: dict[str, Any]) -> None:
    tokens_BS, callback = random_tokens(2, 20), SecondChoice()
    sequences, actions = generate_with_actions(cola, tokens_BS, NEW, action_callback=callback, **keywords)
    rows = 2 * keywords.get("num_beams", 1)
    assert callback.steps == list(range(NEW))
    assert callback.lengths == [(rows, 20 + step) for step in range(NEW)]
    choices = cola.policy_logits(sequences).topk(2).indices[:, 19:-1]
    assert torch.equal(actions[:, 0::2], choices[:, 0::2, 1])
    assert torch.equal(actions[:, 1::2], choices[:, 1::2, 0])
    assert not torch.equal(sequences, generate_with_actions(cola, tokens_BS, NEW, **keywords)[0])


def test_a_callbacks_actions_and_the_same_planned_give_the_same_text(cola: ColaForCausalLM) -> None:
    tokens_BS = random_tokens(2, 20)
    asked = generate_with_actions(cola, tokens_BS, NEW, action_callback=SecondChoice())
    planned = generate_with_actions(cola, tokens_BS, NEW, action_plan=asked[1])
    assert torch.equal(asked[0], planned[0])


def test_a_callback_is_asked_where_the_plan_has_ended(cola: ColaForCausalLM) -> None:
    callback = SecondChoice()
    _, actions = generate_with_actions(
        cola, random_tokens(2, 20), NEW, action_plan=[5, 6, 7], action_callback=callback
    )
    assert callback.steps == list(range(3, NEW))
    assert actions[:, :3].tolist() == [[5, 6, 7], [5, 6, 7]]


def test_a_callback_sees_the_logits_of_single_prompts_under_left_padding(cola: ColaForCausalLM) -> None:
    prompts = [random_tokens(1, length, seed=length) for length in (20, 13)]
    batch_BS = torch.cat([prompts[0], torch.cat((random_tokens(1, 7), prompts[1]), dim=1)])
    mask_BS = torch.ones_like(batch_BS)
    mask_BS[1, :7] = 0
    padded = SecondChoice()
    generate_with_actions(cola, batch_BS, NEW, attention_mask=mask_BS, action_callback=padded)
    for row, prompt in enumerate(prompts):
        single = SecondChoice()
        generate_with_actions(cola, prompt, NEW, action_callback=single)
        for found, expected in zip(padded.logits, single.logits, strict=True):
            assert greatest_difference(found[row], expected[0]) < 1e-3
    unmasked = SecondChoice()
    generate_with_actions(cola, batch_BS, NEW, action_callback=unmasked)
    assert greatest_difference(unmasked.logits[0][1], padded.logits[0][1]) > 0.1


def test_a_callback_can_stand_in_for_a_policy() -> None:
    model = random_cola(num_policy_layers=0, num_idm_layers=0)
    tokens_BS = random_tokens(2, 16)
    output = model.generate(
        tokens_BS,
        max_new_tokens=4,
        return_dict_in_generate=True,
        action_callback=lambda step, logits, _: step if logits is None else None,
    )
    assert isinstance(output, ModelOutput)
    assert output["actions"].tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert "action_log_probs" not in output
    with pytest.raises(ValueError, match="no policy"):
        model.generate(tokens_BS, max_new_tokens=4, action_callback=lambda *_: None)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (64, "from 0 to 63"),
        (torch.tensor([0.0, 1.0]), "whole numbers"),
        (torch.tensor([1, 2, 3]), r"shape \[3\]: give \[2\]"),
        (torch.tensor([[1], [2]]), r"shape \[2, 1\]: give \[2\]"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused(cola: ColaForCausalLM, answer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cola.generate(random_tokens(2, 16), max_new_tokens=4, action_callback=lambda *_: answer)


# Log-probabilities


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"do_sample_actions": True, "action_temperature": 5.0, "action_top_k": 20},
        {"action_plan": 17},
        {"num_beams": 3, "num_return_sequences": 2},
    ],
)
@torch.inference_mode()
def test_log_probs_are_the_policys_own(cola: ColaForCausalLM, keywords: dict[str, Any]) -> None:
    torch.manual_seed(0)
    output = cola.generate(random_tokens(2, 20), max_new_tokens=NEW, return_dict_in_generate=True, **keywords)
    assert isinstance(output, ModelOutput)
    sequences, actions_BN = output["sequences"], output["actions"]
    logits_BNA = cola.policy_logits(sequences)[:, 19:-1]

    def expected(logits: torch.Tensor) -> torch.Tensor:
        return logits.log_softmax(-1).gather(-1, actions_BN.unsqueeze(-1)).squeeze(-1)

    assert output["action_log_probs"].dtype is torch.float32
    assert greatest_difference(output["action_log_probs"], expected(logits_BNA)) < 1e-3
    assert greatest_difference(output["action_log_probs"], expected(logits_BNA / 5.0)) > 0.1
    assert greatest_difference(output["action_log_probs"], expected(logits_BNA.roll(1, dims=1))) > 0.1


# Stored settings


def test_action_sampling_stored_in_the_generation_config_is_used(cola: ColaForCausalLM) -> None:
    model, tokens_BS = copy.deepcopy(cola), random_tokens(2, 20)
    model.generation_config = GenerationConfig(
        do_sample=False, do_sample_actions=True, action_temperature=5.0, action_top_k=20
    )

    def actions(of: ColaForCausalLM, **keywords: Any) -> torch.Tensor:
        torch.manual_seed(0)
        return generate_with_actions(of, tokens_BS, NEW, **keywords)[1]

    drawn = {"do_sample_actions": True, "action_temperature": 5.0, "action_top_k": 20}
    stored, greedy = actions(model), actions(cola)
    assert torch.equal(stored, actions(cola, **drawn))
    assert not torch.equal(stored, greedy)
    # What is given counts more than what is stored; greedy actions have no use for the rest.
    assert torch.equal(actions(model, do_sample_actions=False), greedy)
    assert torch.equal(actions(model, action_top_k=1), greedy)
    given = GenerationConfig(do_sample=False, action_temperature=2.0)
    assert torch.equal(
        actions(model, generation_config=given), actions(cola, **drawn | {"action_temperature": 2.0})
    )


# Other ways of transformers to generate


def test_a_prompt_read_in_pieces_gives_the_same(cola: ColaForCausalLM) -> None:
    tokens_BS = random_tokens(2, 20)
    whole = generate_with_actions(cola, tokens_BS, NEW)
    pieces = generate_with_actions(cola, tokens_BS, NEW, prefill_chunk_size=7)
    assert torch.equal(pieces[0], whole[0])
    assert torch.equal(pieces[1], whole[1])


def test_assisted_generation_gives_the_same_but_takes_no_action_step_by_step(cola: ColaForCausalLM) -> None:
    repeating = random_tokens(1, 5).repeat(1, 6)
    model, widths = copy.deepcopy(cola), []
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 319
    assisted = {"prompt_lookup_num_tokens": 3}
    for plan in (None, 17):
        hook = model.lm_head.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[1]))
        found = generate_with_actions(model, repeating, NEW, action_plan=plan, **assisted)
        hook.remove()
        expected = generate_with_actions(model, repeating, NEW, action_plan=plan)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
    assert max(widths) > 1, "several tokens were tried at once"
    for by_step in ({"action_plan": [1, 2, 3]}, {"action_callback": SecondChoice()}):
        with pytest.raises(ValueError, match="assisted generation"):
            generate_with_actions(model, repeating, NEW, **by_step, **assisted)
