"""Generation under actions: the action of each step is planned, asked of the caller, or the policy's choice.

Used by `modeling_cola.py` and copied beside exported weights with it: it imports only torch and transformers.
Shapes in names: B batch, S sequence, K positions whose logits are kept, A actions, N new tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache
from transformers.generation import (
    LogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.utils import GenerateOutput
from transformers.utils import ModelOutput

ActionPlan = int | Sequence[int] | Sequence[Sequence[int]] | torch.Tensor
# From the number of new tokens so far, the policy's logits [B, A] (None without a policy) and all tokens so far
# [B, S] to the next actions ([B], or one number for all), or None to let the policy choose.
ActionCallback = Callable[[int, torch.Tensor | None, torch.Tensor], int | torch.Tensor | None]
# From the policy's logits [B, K, A] (None without a policy) to actions of any shape that `expand_actions` takes,
# or None to let the policy choose.
ActionChooser = Callable[[torch.Tensor | None], int | torch.Tensor | None]

# How the policy draws actions: keywords of `forward`, and of `generate`, which also finds them stored in a
# model's generation_config.json.
ACTION_SAMPLING = ("do_sample_actions", "action_temperature", "action_top_k", "action_top_p")


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
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        action_plan: ActionPlan | None = None,
        action_callback: ActionCallback | None = None,
        **kwargs: Any,
    ) -> GenerateOutput | torch.LongTensor:
        """Token ids, prompt included, by transformers' own keywords and the action keywords of `forward`.

        action_plan: the action for every new token (one number), or for each of the first n ([n], or [B, n]
        for a row each). Where the plan has ended, action_callback(step, action_logits_BA, input_ids_BS) is
        asked, and where that gives None, or there is none, the policy goes on. Beams and several returned
        sequences are rows of the callback's batch; of a prompt read in pieces (prefill_chunk_size) it sees one
        piece at a time. Action sampling that is not given is that of the
        generation config, if stored there.

        With `return_dict_in_generate=True` the output's `actions` [B, N] are those taken, and
        `action_log_probs` [B, N] what the policy itself (before temperature, top_k and top_p) thought of them;
        absent without a policy. Both mean nothing where a row has ended and is padded.
        """
        given = {name: kwargs.pop(name, None) for name in ACTION_SAMPLING}
        sampling = _with_stored(given, generation_config, self.generation_config)
        num_actions = self.config.num_actions  # type: ignore[attr-defined]
        steps = ActionSteps(action_plan, action_callback, sampling, num_actions)
        result = super().generate(  # type: ignore[misc]
            inputs, generation_config, *args, action_steps=steps, **kwargs
        )
        if isinstance(result, ModelOutput):
            for name, steps_B in (("actions", steps.taken), ("action_log_probs", steps.log_probs)):
                if steps_B:
                    result[name] = _of_returned_sequences(steps_B, result)
        return result

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        *args: Any,
        action_steps: "ActionSteps | None" = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What `forward` gets at the next step: the usual, and how its actions are chosen."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]
        if action_steps is not None:
            inputs |= action_steps.sampling
            inputs["actions"] = action_steps.next_actions(input_ids)
        return inputs

    def _update_model_kwargs_for_generation(
        self,
        outputs: ModelOutput,
        model_kwargs: dict[str, Any],
        is_encoder_decoder: bool = False,
        num_new_tokens: int = 1,
    ) -> dict[str, Any]:
        if (action_steps := model_kwargs.get("action_steps")) is not None:
            action_steps.note(outputs["actions"], outputs.get("action_logits"), num_new_tokens)
        return super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder, num_new_tokens
        )


class ActionSteps:
    """The actions of one `generate` call: how the next are chosen, and those taken so far ([B] a step)."""

    def __init__(
        self,
        plan: ActionPlan | None,
        callback: ActionCallback | None,
        sampling: dict[str, Any],
        num_actions: int,
    ) -> None:
        self.plan = None if plan is None else checked_actions(plan, num_actions)
        if self.plan is not None and self.plan.dim() > 2:
            raise ValueError(f"action_plan has shape {list(self.plan.shape)}: give a number, [n] or [B, n]")
        self.callback = callback
        self.sampling = sampling
        self.num_actions = num_actions
        self.taken: list[torch.Tensor] = []
        self.log_probs: list[torch.Tensor] = []

    def next_actions(self, tokens_BS: torch.Tensor) -> torch.Tensor | ActionChooser | None:
        """The next step's actions [B, 1], a function that asks for them, or None: the policy is to choose."""
        step, batch_size = len(self.taken), len(tokens_BS)
        if self.plan is not None and (self.plan.dim() == 0 or step < self.plan.shape[-1]):
            rows = (self.plan if self.plan.dim() == 0 else self.plan[..., step]).reshape(-1, 1)
            if not len(rows) or batch_size % len(rows):
                raise ValueError(f"action_plan has {len(rows)} rows, the batch {batch_size}")
            # One prompt may have become several rows: beams, or several returned sequences.
            return rows.repeat_interleave(batch_size // len(rows), dim=0)
        if self.callback is None:
            return None
        return lambda logits_BKA: self._asked(logits_BKA, tokens_BS)

    def _asked(self, logits_BKA: torch.Tensor | None, tokens_BS: torch.Tensor) -> torch.Tensor | None:
        assert self.callback is not None, "next_actions asks only where there is one"
        logits_BA = None if logits_BKA is None else logits_BKA[:, -1]
        answer = self.callback(len(self.taken), logits_BA, tokens_BS)
        if answer is None:
            return None
        actions_B = checked_actions(answer, self.num_actions)
        if actions_B.dim() and actions_B.shape != tokens_BS.shape[:1]:
            raise ValueError(
                f"action_callback gave actions of shape {list(actions_B.shape)}: give [{len(tokens_BS)}], "
                "a single number or None"
            )
        return actions_B.expand(len(tokens_BS)).unsqueeze(1)

    def note(self, actions_BK: torch.Tensor, logits_BKA: torch.Tensor | None, num_new: int) -> None:
        """Add the actions of the tokens just made: of the first `num_new` positions of K."""
        by_step = self.callback is not None or (self.plan is not None and self.plan.dim() > 0)
        if by_step and actions_BK.shape[1] > 1:
            raise ValueError(
                "assisted generation tries several tokens at once, and an action_callback or a plan of several "
                "actions goes token by token: leave out one or the other"
            )
        self.taken += actions_BK[:, :num_new].unbind(dim=1)
        if logits_BKA is not None:
            self.log_probs += action_log_probs(logits_BKA, actions_BK)[:, :num_new].unbind(dim=1)


def _of_returned_sequences(steps_B: list[torch.Tensor], result: ModelOutput) -> torch.Tensor:
    # [B, N] of the sequences returned; a beam search says from which row each token came.
    values_BN = torch.stack(steps_B, dim=1)
    rows_BN = result.get("beam_indices")
    return values_BN if rows_BN is None else values_BN.gather(0, rows_BN.clamp(min=0))


def _with_stored(given: dict[str, Any], *configs: GenerationConfig | None) -> dict[str, Any]:
    # What is given, or else stored in the first config that has it; all that is stored, or nothing.
    if given["do_sample_actions"] is False:
        return given
    stored = {
        name: next((value for c in configs if (value := getattr(c, name, None)) is not None), None)
        for name in ACTION_SAMPLING
    }
    return {name: stored[name] if value is None else value for name, value in given.items()}


def action_log_probs(logits_BKA: torch.Tensor, actions_BK: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [B, K] of the actions under the policy itself, in float32: no temperature, all actions."""
    log_probs_BKA = logits_BKA.float().log_softmax(dim=-1)
    return log_probs_BKA.gather(-1, actions_BK.unsqueeze(-1).to(logits_BKA.device)).squeeze(-1)


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
    wrong = ValueError(f"actions must be whole numbers from 0 to {num_actions - 1}, in rows of one length")
    try:
        tensor = torch.as_tensor(actions)
    except (TypeError, ValueError, RuntimeError) as error:
        raise wrong from error
    if not tensor.numel():
        return tensor.long()
    is_whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool)
    if not is_whole or not bool(0 <= tensor.min() <= tensor.max() < num_actions):
        raise wrong
    return tensor.long()


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
