"""Generation: cached, padded, under fixed, planned and drawn actions."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from checkpoint_tools.huggingface.generation_cola import choose_actions
from checkpoint_tools.huggingface.modeling_cola import ColaForCausalLM
from tests.checkpoint_tools.random_cola import (
    generate_with_actions,
    greatest_difference,
    random_cola,
    random_tokens,
)

NEW = 12


@pytest.fixture(scope="module")
def cola() -> ColaForCausalLM:
    """Not to be changed by a test."""
    return random_cola()


def replayed_actions(model: ColaForCausalLM, sequences: torch.Tensor, new: int) -> torch.Tensor:
    """The policy's likeliest action [B, new] for each of the last `new` tokens, read from the whole text."""
    return model.policy_logits(sequences).argmax(-1)[:, -new - 1 : -1]


# The cache


def test_cached_generation_equals_uncached(cola: ColaForCausalLM) -> None:
    tokens = random_tokens(2, 512)
    cached = generate_with_actions(cola, tokens, NEW, use_cache=True)
    uncached = generate_with_actions(cola, tokens, NEW, use_cache=False)
    assert torch.equal(cached[0], uncached[0])
    assert torch.equal(cached[1], uncached[1])
    assert torch.equal(cached[1], replayed_actions(cola, cached[0], NEW))


def test_a_policy_without_its_cache_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = random_cola(), random_tokens(2, 512)
    expected = generate_with_actions(model, tokens, NEW)
    with_cache = model.model.policy_logits
    monkeypatch.setattr(
        model.model,
        "policy_logits",
        lambda hidden, inputs, keep: with_cache(
            hidden, {**inputs, "past_key_values": None, "attention_mask": None}, keep
        ),
    )
    found = generate_with_actions(model, tokens, NEW)
    assert torch.equal(found[1][:, 0], expected[1][:, 0]), "the first step needs no cache"
    assert not torch.equal(found[1][:, 1:], expected[1][:, 1:])


@pytest.mark.parametrize("sized_by_transformers", [True, False])
@torch.inference_mode()
def test_logits_in_pieces_equal_logits_at_once(cola: ColaForCausalLM, sized_by_transformers: bool) -> None:
    tokens, pieces = random_tokens(2, 520), []
    whole = cola(tokens)
    cache = DynamicCache(config=cola.config) if sized_by_transformers else None
    for start, end in ((0, 300), (300, 519), (519, 520)):
        output = cola(tokens[:, start:end], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    assert cache is not None
    assert len(cache.layers) == 4, "two of the base, two of the policy"
    assert cache.get_seq_length(0) == cache.get_seq_length(3) == 520
    assert greatest_difference(torch.cat(pieces, 1), whole.logits) < 1e-3


@torch.inference_mode()
def test_a_cache_filled_by_the_base_alone_is_refused(cola: ColaForCausalLM) -> None:
    tokens = random_tokens(2, 40)
    cache = cola.model(tokens, use_cache=True).past_key_values
    again = cola.model(tokens, past_key_values=cache).past_key_values
    assert again.get_seq_length() == 80
    with pytest.raises(ValueError, match="without this model's policy"):
        cola(tokens[:, :1], past_key_values=cache)


def test_a_static_cache_gives_the_same(cola: ColaForCausalLM) -> None:
    tokens = random_tokens(2, 40)
    dynamic = generate_with_actions(cola, tokens, NEW)
    static = generate_with_actions(cola, tokens, NEW, cache_implementation="static")
    assert torch.equal(static[0], dynamic[0])
    assert torch.equal(static[1], dynamic[1])


def test_merge_and_head_see_only_the_last_position(cola: ColaForCausalLM) -> None:
    widths: dict[str, list[int]] = {"head": [], "merge": [], "base": []}

    def note(name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda module, inputs: widths[name].append(inputs[0].shape[1])

    hooks = [
        cola.lm_head.register_forward_pre_hook(note("head")),
        cola.model.action_merge_layers[0].register_forward_pre_hook(note("merge")),
        cola.model.layers[0].register_forward_pre_hook(note("base")),
    ]
    generate_with_actions(cola, random_tokens(2, 40), 3)
    for hook in hooks:
        hook.remove()
    assert widths == {"head": [1, 1, 1], "merge": [1, 1, 1], "base": [40, 1, 1]}


# Padding


def left_padded(lengths: tuple[int, ...]) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Prompts [1, n], the same as one batch filled up on the left, and its mask."""
    prompts = [random_tokens(1, length, seed=length) for length in lengths]
    longest = max(lengths)
    batch = torch.cat([torch.cat((random_tokens(1, longest - p.shape[1]), p), dim=1) for p in prompts])
    mask = torch.stack([torch.arange(longest) >= longest - length for length in lengths]).long()
    return prompts, batch, mask


@torch.inference_mode()
def test_left_padded_logits_equal_those_of_single_prompts(cola: ColaForCausalLM) -> None:
    prompts, batch, mask = left_padded((512, 300))
    padded = cola(batch, attention_mask=mask).logits
    mixture = cola.policy_mixture_log_probs(batch[:, -64:], mask[:, -64:], chunk_actions=64)
    for row, prompt in enumerate(prompts):
        length = prompt.shape[1]
        assert greatest_difference(padded[row : row + 1, -length:], cola(prompt).logits) < 1e-3
        single_actions = cola.infer_actions(prompt)
        assert torch.equal(cola.infer_actions(batch, mask)[row, 1 - length :], single_actions[0])
    single = cola.policy_mixture_log_probs(batch[:, -64:], chunk_actions=64)
    assert greatest_difference(mixture, single) < 1e-4
    # Without the mask the padding is read as text.
    assert greatest_difference(cola(batch).logits[1:, -300:], cola(prompts[1]).logits) > 1.0


def test_left_padded_generation_equals_that_of_single_prompts(cola: ColaForCausalLM) -> None:
    prompts, batch, mask = left_padded((512, 300))
    sequences, actions = generate_with_actions(cola, batch, NEW, attention_mask=mask)
    for row, prompt in enumerate(prompts):
        single, single_actions = generate_with_actions(cola, prompt, NEW)
        assert torch.equal(sequences[row, -NEW:], single[0, -NEW:])
        assert torch.equal(actions[row], single_actions[0])


@pytest.mark.parametrize("fault", ["positions", "mask"])
def test_generation_that_forgets_the_padding_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_cola()
    prompts, batch, mask = left_padded((512, 300))
    prepare = model.prepare_inputs_for_generation

    @functools.wraps(prepare)
    def forgetful(*args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = prepare(*args, **kwargs)
        past = inputs["past_key_values"].get_seq_length()
        if fault == "mask":
            inputs["attention_mask"] = None
        elif past:  # new tokens counted from the cache's length, which counts the padding
            inputs["position_ids"] = torch.full((2, 1), past)
        return inputs

    expected = generate_with_actions(model, prompts[1], NEW)[0][0, -NEW:]
    assert torch.equal(generate_with_actions(model, batch, NEW, attention_mask=mask)[0][1, -NEW:], expected)
    monkeypatch.setattr(model, "prepare_inputs_for_generation", forgetful)
    found = generate_with_actions(model, batch, NEW, attention_mask=mask)[0][1, -NEW:]
    assert not torch.equal(found, expected)


# Fixed and planned actions


def test_a_fixed_action_is_taken_at_every_step(cola: ColaForCausalLM) -> None:
    tokens = random_tokens(2, 40)
    sequences, actions = generate_with_actions(cola, tokens, NEW, action_plan=17)
    assert torch.equal(actions, torch.full((2, NEW), 17))
    by_hand = tokens
    with torch.inference_mode():
        for _ in range(NEW):
            next_token = cola.forward_world_model(by_hand, 17)[:, -1:].argmax(-1)
            by_hand = torch.cat((by_hand, next_token), dim=1)
    assert torch.equal(sequences, by_hand)
    assert not torch.equal(sequences, generate_with_actions(cola, tokens, NEW, action_plan=18)[0])


@pytest.mark.parametrize("per_row", [False, True])
def test_a_plan_is_followed_and_then_the_policy_goes_on(cola: ColaForCausalLM, per_row: bool) -> None:
    tokens, plan = random_tokens(2, 40), random_tokens(2, 5, seed=3, vocab_size=64)
    if not per_row:
        plan = plan[:1].expand(2, -1)
    sequences, actions = generate_with_actions(
        cola, tokens, NEW, action_plan=plan if per_row else plan[0].tolist()
    )
    assert torch.equal(actions[:, :5], plan)
    policy = replayed_actions(cola, sequences, NEW)
    assert torch.equal(actions[:, 5:], policy[:, 5:])
    assert not torch.equal(actions[:, :5], policy[:, :5])
    with torch.inference_mode():
        all_actions = torch.cat((policy[:, :1].expand(-1, 39), actions), dim=1)
        logits = cola.forward_world_model(sequences[:, :-1], all_actions)
    assert torch.equal(sequences[:, -NEW:], logits.argmax(-1)[:, -NEW:])


def test_a_plan_a_row_under_left_padding_equals_single_prompts(cola: ColaForCausalLM) -> None:
    prompts, batch, mask = left_padded((60, 33))
    plan_BN = random_tokens(2, 5, seed=3, vocab_size=64)
    sequences, actions = generate_with_actions(cola, batch, NEW, attention_mask=mask, action_plan=plan_BN)
    for row, prompt in enumerate(prompts):
        single, single_actions = generate_with_actions(cola, prompt, NEW, action_plan=plan_BN[row].tolist())
        assert torch.equal(sequences[row, -NEW:], single[0, -NEW:])
        assert torch.equal(actions[row], single_actions[0])
        other, _ = generate_with_actions(cola, prompt, NEW, action_plan=plan_BN[1 - row])
        assert not torch.equal(other[0, -NEW:], single[0, -NEW:])


def test_without_a_policy_actions_must_be_planned(cola: ColaForCausalLM) -> None:
    model, tokens = random_cola(num_policy_layers=0, num_idm_layers=0), random_tokens(1, 16)
    _, actions = generate_with_actions(model, tokens, 4, action_plan=3)
    assert actions.tolist() == [[3, 3, 3, 3]]
    with pytest.raises(ValueError, match=r"no policy.*action_plan"):
        model.generate(tokens, max_new_tokens=4)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (64, "from 0 to 63"),
        ([3, -1], "from 0 to 63"),
        (2.0, "whole numbers"),
        ([3, None], "whole numbers"),
        (True, "whole numbers"),
        ("7", "whole numbers"),
        ([[1, 2], [3]], "rows of one length"),
        (torch.zeros(3, 4).long(), "3 rows, the batch 2"),
        (torch.zeros(0, 4).long(), "0 rows, the batch 2"),
        (torch.zeros(2, 1, 4).long(), r"shape \[2, 1, 4\]: give a number, \[n\] or \[B, n\]"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(cola: ColaForCausalLM, plan: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cola.generate(random_tokens(2, 16), max_new_tokens=4, action_plan=plan)


def test_an_empty_plan_leaves_all_to_the_policy(cola: ColaForCausalLM) -> None:
    tokens_BS = random_tokens(2, 16)
    found = generate_with_actions(cola, tokens_BS, 4, action_plan=[])
    assert torch.equal(found[1], generate_with_actions(cola, tokens_BS, 4)[1])


def test_a_misspelt_keyword_is_refused(cola: ColaForCausalLM) -> None:
    with pytest.raises(ValueError, match="action_plans"):
        cola.generate(random_tokens(2, 16), max_new_tokens=4, action_plans=3)


# Drawn actions


def test_drawn_actions_repeat_with_the_seed(cola: ColaForCausalLM) -> None:
    tokens, runs = random_tokens(2, 40), []
    for seed, use_cache in ((0, True), (0, True), (0, False), (1, True)):
        torch.manual_seed(seed)
        runs.append(
            generate_with_actions(
                cola, tokens, NEW, do_sample_actions=True, action_temperature=5.0, use_cache=use_cache
            )
        )
    for same in runs[1:3]:
        assert torch.equal(same[0], runs[0][0])
        assert torch.equal(same[1], runs[0][1])
    assert not torch.equal(runs[3][1], runs[0][1])
    assert not torch.equal(runs[0][1], generate_with_actions(cola, tokens, NEW)[1])


def test_the_one_likeliest_drawn_is_greedy(cola: ColaForCausalLM) -> None:
    tokens = random_tokens(2, 40)
    greedy = generate_with_actions(cola, tokens, NEW)
    for option in ({"action_top_k": 1}, {"action_top_p": 1e-6}, {"action_temperature": 1e-4}):
        drawn = generate_with_actions(cola, tokens, NEW, do_sample_actions=True, **option)
        assert torch.equal(drawn[1], greedy[1])
        assert torch.equal(drawn[0], greedy[0])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.25, 0.15, 0.1]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0.0, 0.0]),
        ({"top_p": 0.8}, [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0.0]),
        ({"temperature": 0.5}, [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345]),
        # The temperature comes before top_p: at 0.5 the first two hold 0.906 of the probability.
        ({"temperature": 0.5, "top_p": 0.85}, [0.8, 0.2, 0.0, 0.0]),
        # top_k comes before top_p: of the first two, the first holds 0.667.
        ({"top_k": 2, "top_p": 0.6}, [1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_actions_are_drawn_from_the_distribution_asked_for(
    options: dict[str, Any], expected: list[float]
) -> None:
    torch.manual_seed(0)
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log().expand(100, 200, 4)
    actions = choose_actions(logits, do_sample=True, **options)
    assert actions.shape == (100, 200)
    frequencies = torch.bincount(actions.flatten(), minlength=4) / 20000
    assert frequencies.tolist() == pytest.approx(expected, abs=0.015)
    assert all((frequency > 0) == (share > 0) for frequency, share in zip(frequencies, expected, strict=True))


# Several sequences a prompt


def test_the_actions_of_a_beam_search_are_those_of_the_sequences_returned(cola: ColaForCausalLM) -> None:
    tokens = random_tokens(2, 40)
    sequences, actions = generate_with_actions(cola, tokens, NEW, num_beams=4, num_return_sequences=3)
    assert sequences.shape == (6, 40 + NEW)
    assert torch.equal(actions, replayed_actions(cola, sequences, NEW))
    assert not torch.equal(sequences[0], sequences[1])


def test_a_plan_a_row_holds_for_all_sequences_of_its_prompt(cola: ColaForCausalLM) -> None:
    torch.manual_seed(0)
    plan = torch.tensor([[5, 6], [7, 8]])
    _, actions = generate_with_actions(
        cola, random_tokens(2, 40), 4, do_sample=True, num_return_sequences=2, action_plan=plan
    )
    assert actions[:, :2].tolist() == [[5, 6], [5, 6], [7, 8], [7, 8]]


def test_generate_gives_plain_ids_unless_asked_for_more(cola: ColaForCausalLM) -> None:
    tokens = random_tokens(2, 16)
    plain = cola.generate(tokens, max_new_tokens=4)
    assert isinstance(plain, torch.Tensor)
    sequences, actions = generate_with_actions(cola, tokens, 4)
    assert torch.equal(plain, sequences)
    assert actions.shape == (2, 4)
