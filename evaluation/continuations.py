"""Generate several continuations of each prompt: fixed, random or policy actions, or the base's own sampling.

Every function takes prompts [P, S] of one length and gives [P, M, N]: M continuations of N new tokens
each. End-of-text is held back, so that all continuations have one length and their diversity can be
compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from evaluation.huggingface_model import ColaModel

# P prompts, M continuations of a prompt, S tokens of a prompt, N new tokens.


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The beginning of a held-out document."""

    source: str
    text: str
    tokens: list[int]


def fixed_actions(
    model: ColaModel, prompts_PS: torch.Tensor, actions_M: Sequence[int], new_tokens: int
) -> torch.Tensor:
    """One continuation under each action of `actions_M`, held for the whole text; greedy tokens."""
    plan_MN = torch.tensor(actions_M, device=prompts_PS.device).unsqueeze(1).expand(-1, new_tokens)
    return _greedy_tokens(
        model, prompts_PS, len(actions_M), new_tokens, action_plan=plan_MN.repeat(prompts_PS.shape[0], 1)
    )


def first_actions(
    model: ColaModel, prompts_PS: torch.Tensor, actions_M: Sequence[int], new_tokens: int
) -> torch.Tensor:
    """One continuation under each action for its first token, then the policy's likeliest; greedy tokens."""
    plan_M1 = torch.tensor(actions_M, device=prompts_PS.device).unsqueeze(1)
    return _greedy_tokens(
        model, prompts_PS, len(actions_M), new_tokens, action_plan=plan_M1.repeat(prompts_PS.shape[0], 1)
    )


def random_actions(model: ColaModel, prompts_PS: torch.Tensor, count: int, new_tokens: int) -> torch.Tensor:
    """`count` continuations, each with an action drawn uniformly at every token; greedy tokens."""
    shape = (prompts_PS.shape[0] * count, new_tokens)
    plan = torch.randint(model.config.num_actions, shape).to(prompts_PS.device)
    return _greedy_tokens(model, prompts_PS, count, new_tokens, action_plan=plan)


def policy_actions(model: ColaModel, prompts_PS: torch.Tensor, count: int, new_tokens: int) -> torch.Tensor:
    """`count` continuations with actions sampled from the policy as it is (no temperature); greedy tokens."""
    return _greedy_tokens(model, prompts_PS, count, new_tokens, do_sample_actions=True)


def base_samples(model: ColaModel, prompts_PS: torch.Tensor, count: int, new_tokens: int) -> torch.Tensor:
    """`count` continuations of the frozen base alone, tokens sampled at temperature 1."""
    rows = prompts_PS.repeat_interleave(count, dim=0)
    output = base_language_model(model).generate(  # type: ignore[operator]  # typed by a protocol it lacks
        input_ids=rows,
        attention_mask=torch.ones_like(rows),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )
    assert isinstance(output, torch.Tensor), "plain generation gives plain ids"
    return _new_tokens(output, prompts_PS, count)


def base_language_model(model: ColaModel) -> PreTrainedModel:
    """The frozen base as an ordinary Llama or Qwen2.5 that shares the model's weights, for its cached generation."""
    own = model.config.to_dict()
    of_qwen, of_llama = (Qwen2Config, Qwen2ForCausalLM), (LlamaConfig, LlamaForCausalLM)
    plain, library = cast(tuple[Any, Any], of_qwen if own["qkv_bias"] else of_llama)
    names = plain().to_dict().keys() - {"architectures", "model_type", "transformers_version"}
    with torch.device(model.device):
        base: PreTrainedModel = library(plain.from_dict({name: own[name] for name in names if name in own}))
    weights = model.state_dict()
    base.load_state_dict({name: weights[name] for name in base.state_dict()}, assign=True)
    return base.eval()


def _greedy_tokens(
    model: ColaModel,
    prompts_PS: torch.Tensor,
    count: int,
    new_tokens: int,
    do_sample_actions: bool = False,
    action_plan: torch.Tensor | None = None,
) -> torch.Tensor:
    """`count` continuations of each prompt, actions by policy or plan ([rows, tokens]), tokens greedy."""
    rows = prompts_PS.repeat_interleave(count, dim=0)
    output = model.generate(
        input_ids=rows,
        attention_mask=torch.ones_like(rows),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        do_sample_actions=do_sample_actions,
        action_plan=action_plan,
    )
    return _new_tokens(output, prompts_PS, count)


def _new_tokens(output: torch.Tensor, prompts_PS: torch.Tensor, count: int) -> torch.Tensor:
    return output[:, prompts_PS.shape[1] :].unflatten(0, (prompts_PS.shape[0], count))
