"""Generation under actions: the action of each step is planned, or chosen from the policy's logits.

Used by `modeling_cola.py` and copied beside exported weights with it: it imports only torch and transformers.
Shapes in names: B batch, S sequence, K positions whose logits are kept, A actions, N new tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.generation import (
    LogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.utils import GenerateOutput
from transformers.utils import ModelOutput

ActionPlan = int | Sequence[int] | torch.Tensor


@dataclass
class ColaCausalLMOutput(ModelOutput):
    """What `ColaForCausalLM` returns, for the K positions that `logits_to_keep` keeps (else all S).

    loss: mean next-token loss in nats, where labels were given. logits: [B, K, V]. past_key_values: cache.
    hidden_states: the base's, where asked for, [B, S, H] each: the embeddings, each layer's, and last h.
    actions: [B, K], those the logits are under. action_logits: [B, K, A], the policy's, if there is one.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    actions: torch.Tensor | None = None
    action_logits: torch.Tensor | None = None


class ActionGenerationMixin(GenerationMixin):
    """transformers' `generate` with actions, for a model whose `forward` takes and gives them.

    A plan goes in; the actions that were taken come out.
    """

    @torch.no_grad()
    def generate(
        self, *args: Any, action_plan: ActionPlan | None = None, **kwargs: Any
    ) -> GenerateOutput | torch.LongTensor:
        """Token ids, prompt included, by transformers' own keywords and the action keywords of `forward`.

        action_plan: the action for every new token (one number), or for each of the first n ([n], or [B, n]
        for a row each); after its end the policy goes on. With `return_dict_in_generate=True` the output's
        `actions` [B, new tokens] are those taken; they mean nothing where a row has ended and is padded.
        """
        steps = ActionSteps(action_plan, self.config.num_actions)  # type: ignore[attr-defined]
        result = super().generate(*args, action_steps=steps, **kwargs)  # type: ignore[misc]
        if isinstance(result, ModelOutput):
            result["actions"] = steps.taken_by(result)
        return result

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        *args: Any,
        action_steps: "ActionSteps | None" = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What `forward` gets at the next step: the usual, and the action where one is planned."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]
        if action_steps is not None:
            inputs["actions"] = action_steps.planned(input_ids.shape[0])
        return inputs

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        if (action_steps := model_kwargs.get("action_steps")) is not None:
            action_steps.taken.append(outputs["actions"][:, -1])
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)


class ActionSteps:
    """The actions of one `generate` call: those planned, and those taken so far ([B] a step)."""

    def __init__(self, plan: ActionPlan | None, num_actions: int) -> None:
        self.plan = None if plan is None else checked_actions(plan, num_actions)
        self.taken: list[torch.Tensor] = []

    def planned(self, batch_size: int) -> torch.Tensor | None:
        """The next step's action [B, 1], or None where the policy is to choose."""
        step = len(self.taken)
        if self.plan is None or (self.plan.dim() > 0 and step >= self.plan.shape[-1]):
            return None
        rows = (self.plan if self.plan.dim() == 0 else self.plan[..., step]).reshape(-1, 1)
        if batch_size % len(rows):
            raise ValueError(f"action_plan has {len(rows)} rows, the batch {batch_size}")
        # One prompt may have become several rows: beams, or several returned sequences.
        return rows.repeat_interleave(batch_size // len(rows), dim=0)

    def taken_by(self, result: ModelOutput) -> torch.Tensor:
        """Actions [B, N] of the sequences returned; a beam search says from which row each token came."""
        actions_BN = torch.stack(self.taken, dim=1)
        rows_BN = result.get("beam_indices")
        return actions_BN if rows_BN is None else actions_BN.gather(0, rows_BN.clamp(min=0))


def choose_actions(
    logits_BKA: torch.Tensor,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
) -> torch.Tensor:
    """Actions [B, K]: the likeliest, or drawn with torch's global generator.

    In the published order: the top_k likeliest, at the temperature, and of these the smallest set that holds
    top_p of the probability. Raises ValueError where these are given without do_sample, or out of range.
    """
    if not do_sample:
        if any(value is not None for value in (temperature, top_k, top_p)):
            raise ValueError("action_temperature, action_top_k and action_top_p need do_sample_actions=True")
        return logits_BKA.argmax(dim=-1)
    warpers: list[LogitsProcessor] = []
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if temperature is not None:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_p is not None:
        warpers.append(TopPLogitsWarper(top_p))
    scores = logits_BKA.float().flatten(0, 1)
    for warper in warpers:
        scores = warper(torch.empty(0, dtype=torch.long), scores)  # the tokens so far do not matter here
    return torch.multinomial(scores.softmax(dim=-1), num_samples=1).view(logits_BKA.shape[:2])


def checked_actions(actions: ActionPlan, num_actions: int) -> torch.Tensor:
    """The actions as a tensor of long; ValueError where one is no whole number from 0 to num_actions - 1."""
    actions = torch.as_tensor(actions)
    in_range = not actions.numel() or bool(0 <= actions.min() <= actions.max() < num_actions)
    if actions.is_floating_point() or not in_range:
        raise ValueError(f"actions must be whole numbers from 0 to {num_actions - 1}")
    return actions.long()


def expand_actions(actions: ActionPlan, num_actions: int, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Actions [B, S] from one a token, one a row [B, 1] or a single number; else ValueError."""
    actions = checked_actions(actions, num_actions).to(tokens_BS.device)
    batch_size, num_tokens = tokens_BS.shape
    if actions.dim() and tuple(actions.shape) not in {(batch_size, 1), (batch_size, num_tokens)}:
        raise ValueError(
            f"actions have shape {list(actions.shape)}: give [{batch_size}, {num_tokens}] (one a token), "
            f"[{batch_size}, 1] (one a row) or a single number"
        )
    return actions.expand(batch_size, num_tokens)
