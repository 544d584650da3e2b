"""CoLA for Hugging Face transformers: a Llama that is steered by latent actions.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.generate(ids, max_new_tokens=32)                    # the policy takes its likeliest actions
    model.generate(ids, max_new_tokens=32, do_sample_actions=True, action_temperature=2.0)
    model.generate(ids, max_new_tokens=32, action_plan=17)    # action 17 throughout; or tensors [n], [B, n]
    model.generate(ids, max_new_tokens=32, action_callback=my_search)  # asked for the action of each step
    model.forward_world_model(ids[:, :-1], model.infer_actions(ids))  # a text under its own actions

The base Llama reads the tokens into h, its hidden state after the final norm. The inverse dynamics model
(IDM) reads from h at t + 1 which action led from token t to token t + 1. The policy chooses that action from
h at t. The merge MLPs join h and the action's code into the state that predicts token t + 1: the world model.
All share the base's positions and attention mask; one cache holds the base's layers, then the policy's.

Shapes in names: B batch, S sequence, K the positions that `logits_to_keep` keeps, H hidden, V vocabulary,
A actions, C actions of one chunk. The `*_cola.py` files are copied beside exported weights: they import only
torch, transformers and each other, and run on transformers 5 and on 4.57, the last of the fours.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils import can_return_tuple

from .configuration_cola import ColaConfig
from .generation_cola import (
    ActionChooser,
    ActionGenerationMixin,
    ColaCausalLMOutput,
    choose_actions,
    expand_actions,
)


class LayerInputs(TypedDict):
    """What a decoder layer gets besides its hidden state: the same for base, IDM and policy."""

    attention_mask: object  # a tensor, or what the attention implementation wants instead
    position_ids: Tensor
    position_embeddings: tuple[Tensor, Tensor]
    past_key_values: Cache | None
    use_cache: bool
    cache_position: NotRequired[Tensor]  # transformers 4 only


class ActionCodebook(nn.Linear):
    """A code [H] for each action: the columns of a Linear(A -> H), as published, looked up by number."""

    def __init__(self, config: ColaConfig) -> None:
        super().__init__(config.num_actions, config.hidden_size, bias=False)

    def forward(self, actions: Tensor) -> Tensor:
        """Codes [..., H] of the actions [...]."""
        return nn.functional.embedding(actions, self.weight.t())


class MergeMLP(GradientCheckpointingLayer):
    """A gated MLP over state and code side by side, added to the state; no norm, no bias."""

    def __init__(self, config: ColaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(2 * config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(2 * config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, state: Tensor, code: Tensor) -> Tensor:
        """The next state [..., H] from state and code, which broadcast to it."""
        joined = torch.cat(torch.broadcast_tensors(state, code), dim=-1)
        return state + self.down_proj(self.activation(self.gate_proj(joined)) * self.up_proj(joined))


class ColaPreTrainedModel(PreTrainedModel):
    """What transformers wants to know of both model classes."""

    config_class = ColaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaDecoderLayer", "MergeMLP"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True


class ColaModel(ColaPreTrainedModel):
    """The parts without the language-model head, under the published parameter names.

    `forward` runs the base; `policy_logits`, `idm_logits` and `world_state` each run one part on its output.
    """

    def __init__(self, config: ColaConfig) -> None:
        super().__init__(config)
        num_base, num_policy = config.num_hidden_layers, config.num_policy_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = _decoder_layers(config, range(num_base))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        if config.num_idm_layers:  # never cached, so the numbers of its layers mean nothing
            self.action_layers = _decoder_layers(config, range(config.num_idm_layers))
            self.action_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.action_head = nn.Linear(config.hidden_size, config.num_actions, bias=False)
        self.action_code_book = ActionCodebook(config)
        self.action_merge_layers = nn.ModuleList(MergeMLP(config) for _ in range(config.num_merge_layers))
        if num_policy:
            self.policy_layers = _decoder_layers(config, range(num_base, num_base + num_policy))
            self.policy_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.policy_head = nn.Linear(config.hidden_size, config.num_actions, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor, output_hidden_states: bool | None = None, **layer_keywords: Any
    ) -> BaseModelOutputWithPast:
        """The base alone: `last_hidden_state` is h [B, S, H]. The other keywords are those of `embed`."""
        return self.run_base(*self.embed(input_ids, **layer_keywords), output_hidden_states)

    def embed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
    ) -> tuple[Tensor, LayerInputs]:
        """Token embeddings [B, S, H], and what the layers of all parts share.

        Positions that are not given are counted over the tokens that the mask [B, past and S] lets through.
        """
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        slots_S = torch.arange(input_ids.shape[1], device=input_ids.device) + past_length
        if position_ids is None:
            position_ids = _count_positions(slots_S, attention_mask)
        embeds_BSH = self.embed_tokens(input_ids)
        mask = _causal_mask(
            config=self.config,
            inputs_embeds=embeds_BSH,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            cache_position=slots_S,
        )
        inputs: LayerInputs = {
            "attention_mask": mask,
            "position_ids": position_ids,
            "position_embeddings": self.rotary_emb(embeds_BSH, position_ids=position_ids),
            "past_key_values": past_key_values,
            "use_cache": use_cache,
        }
        if "cache_position" in _parameters(LlamaDecoderLayer.forward):
            inputs["cache_position"] = slots_S
        return embeds_BSH, inputs

    def run_base(
        self, embeds_BSH: Tensor, inputs: LayerInputs, output_hidden_states: bool | None = None
    ) -> BaseModelOutputWithPast:
        """The base's layers and final norm; `last_hidden_state` is h [B, S, H]."""
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        trace: list[Tensor] = []
        hidden_BSH = self.norm(_run(self.layers, embeds_BSH, inputs, trace if output_hidden_states else None))
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_BSH,
            past_key_values=inputs["past_key_values"],
            hidden_states=(*trace, hidden_BSH) if output_hidden_states else None,
        )

    def policy_logits(
        self, hidden_BSH: Tensor, inputs: LayerInputs, logits_to_keep: int | Tensor = 0
    ) -> Tensor:
        """What the policy thinks of each action, [B, K, A], from h [B, S, H]."""
        if not self.config.num_policy_layers:
            raise ValueError(
                "this model has no policy (num_policy_layers is 0): say which actions to take, with "
                "actions=... or, in generate, action_plan=... or action_callback=..."
            )
        policy_BSH = _run(self.policy_layers, hidden_BSH, inputs)
        return self.policy_head(self.policy_norm(_kept(policy_BSH, logits_to_keep)))

    def idm_logits(self, hidden_BSH: Tensor, inputs: LayerInputs) -> Tensor:
        """At t, what the IDM thinks of the action that led *to* token t: [B, S, A] from h [B, S, H]."""
        if not self.config.num_idm_layers:
            raise ValueError(
                "this model has no inverse dynamics model (num_idm_layers is 0), so it cannot read the "
                "actions of a text: load an export that has one"
            )
        return self.action_head(self.action_norm(_run(self.action_layers, hidden_BSH, inputs)))

    def world_state(self, hidden: Tensor, actions: Tensor) -> Tensor:
        """What the head reads the next token from: h [..., H] under actions [...]; the two broadcast."""
        code = self.action_code_book(actions)
        state = hidden
        for merge in self.action_merge_layers:
            state = merge(state, code)
        return self.norm(state) - hidden if self.config.output_form == "reference" else state


class ColaForCausalLM(ColaPreTrainedModel, ActionGenerationMixin):
    """CoLA with its language-model head: generation under actions, and what a text says about them.

    The methods are differentiable unless they say otherwise; score under `torch.inference_mode()`.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    # save_pretrained copies the *_cola.py files and names them in config.json.
    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: ColaConfig) -> None:
        super().__init__(config)
        self.model = ColaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        actions: Tensor | int | ActionChooser | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        do_sample_actions: bool | None = None,
        action_temperature: float | None = None,
        action_top_k: int | None = None,
        action_top_p: float | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> ColaCausalLMOutput:
        """Next-token logits under the given actions ([B, S], [B, 1] or one number), or else the policy's.

        The policy takes its likeliest action, or draws one as in `choose_actions`. It sees all positions, for
        its cache; merge MLPs and head see only the last `logits_to_keep` (0: all), or those listed there.
        actions may be a function that makes such actions of the policy's logits, or None for its choice.
        labels [B, S]: token ids, -100 where not counted; position t is compared with the label at t + 1.
        """
        # The loss knows the trainer's num_items_in_batch, transformers 4 tells a position that `embed` counts
        # itself, and None stands for keywords a wrapper does not use.
        known = {"num_items_in_batch", "cache_position"}
        if unknown := {name for name in kwargs if kwargs[name] is not None} - known:
            raise TypeError(f"ColaForCausalLM does not know the keywords {', '.join(sorted(unknown))}")
        if past_key_values is not None:
            _make_room(past_key_values, self.config.num_hidden_layers + self.config.num_policy_layers)
        embeds_BSH, inputs = self.model.embed(
            input_ids, attention_mask, position_ids, past_key_values, use_cache
        )
        base = self.model.run_base(embeds_BSH, inputs, output_hidden_states)
        ask_policy = functools.partial(
            self.model.policy_logits, base.last_hidden_state, inputs, logits_to_keep
        )
        action_logits_BKA = ask_policy() if self.config.num_policy_layers else None
        given = actions(action_logits_BKA) if callable(actions) else actions
        if given is not None:
            actions_BK = _kept(expand_actions(given, self.config.num_actions, input_ids), logits_to_keep)
        else:
            sampling = (do_sample_actions, action_temperature, action_top_k, action_top_p)
            actions_BK = choose_actions(
                ask_policy() if action_logits_BKA is None else action_logits_BKA, *sampling
            )
        logits_BKV = self._world_logits(_kept(base.last_hidden_state, logits_to_keep), actions_BK)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits_BKV, labels, vocab_size=self.config.vocab_size, **kwargs)
        return ColaCausalLMOutput(
            loss=loss,
            logits=logits_BKV,
            past_key_values=base.past_key_values,
            hidden_states=base.hidden_states,
            actions=actions_BK,
            action_logits=action_logits_BKA,
        )

    def base_logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The frozen base's own next-token logits [B, S, V]: no action takes part."""
        return self.lm_head(self._read(input_ids, attention_mask)[0])

    def policy_logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The policy's action logits [B, S, A]; at t it has seen the tokens up to t."""
        return self.model.policy_logits(*self._read(input_ids, attention_mask))

    def infer_action_logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The IDM's logits [B, S-1, A] for the action at t, which leads to token t + 1 and is read there."""
        return self.model.idm_logits(*self._read(input_ids, attention_mask))[:, 1:]

    @torch.no_grad()
    def infer_actions(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The actions [B, S-1] that led from each token to the next: the IDM's likeliest (no gradient)."""
        return self.infer_action_logits(input_ids, attention_mask).argmax(dim=-1)

    def forward_world_model(
        self, input_ids: Tensor, actions: Tensor | int, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Next-token logits [B, S, V] under actions [B, S], [B, 1] or one number; the policy is not run."""
        hidden_BSH, _ = self._read(input_ids, attention_mask)
        return self._world_logits(hidden_BSH, expand_actions(actions, self.config.num_actions, input_ids))

    def policy_mixture_log_probs(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, chunk_actions: int = 8
    ) -> Tensor:
        """log sum_k policy(k | tokens) world(next token | tokens, k), [B, S, V] in float32.

        Takes `chunk_actions` actions at a time, [B, S, V] of float32 each. Sums logarithms, so that a token
        that no action makes likely keeps its finite log-probability.
        """
        hidden_BSH, inputs = self._read(input_ids, attention_mask)
        log_policy_BSA = self.model.policy_logits(hidden_BSH, inputs).float().log_softmax(dim=-1)
        log_mixture_BSV = log_policy_BSA.new_full((*input_ids.shape, self.config.vocab_size), -torch.inf)
        for actions_C in torch.arange(self.config.num_actions, device=input_ids.device).split(chunk_actions):
            logits_BSCV = self._world_logits(hidden_BSH.unsqueeze(2), actions_C).float()
            log_scale_BSC = log_policy_BSA[:, :, actions_C] - logits_BSCV.logsumexp(dim=-1)
            log_chunk_BSV = (logits_BSCV + log_scale_BSC.unsqueeze(-1)).logsumexp(dim=2)
            log_mixture_BSV = torch.logaddexp(log_mixture_BSV, log_chunk_BSV)
        return log_mixture_BSV

    def _read(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, LayerInputs]:
        embeds_BSH, inputs = self.model.embed(input_ids, attention_mask, use_cache=False)
        return self.model.run_base(embeds_BSH, inputs).last_hidden_state, inputs

    def _world_logits(self, hidden: Tensor, actions: Tensor) -> Tensor:
        return self.lm_head(self.model.world_state(hidden, actions))


def _decoder_layers(config: ColaConfig, numbers: Iterable[int]) -> nn.ModuleList:
    return nn.ModuleList(_decoder_layer(config, number) for number in numbers)


def _decoder_layer(config: ColaConfig, number: int) -> LlamaDecoderLayer:
    layer = LlamaDecoderLayer(config, number)
    if config.qkv_bias:
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.bias = nn.Parameter(torch.zeros(projection.out_features))
    return layer


@functools.cache
def _parameters(function: Callable[..., object]) -> frozenset[str]:
    # What this version of transformers' function takes.
    return frozenset(inspect.signature(function).parameters)


def _causal_mask(**keywords: Any) -> object:
    # transformers 4 calls the embeddings input_embeds, and has to be told the tokens' slots in the cache.
    keywords["input_embeds"] = keywords["inputs_embeds"]
    known = _parameters(create_causal_mask)
    return create_causal_mask(**{name: value for name, value in keywords.items() if name in known})


def _run(
    layers: Iterable[nn.Module], hidden_BSH: Tensor, inputs: LayerInputs, trace: list[Tensor] | None = None
) -> Tensor:
    for layer in layers:
        if trace is not None:
            trace.append(hidden_BSH)
        hidden_BSH = layer(hidden_BSH, **inputs)
    return hidden_BSH


def _make_room(cache: Cache, num_layers: int) -> None:
    # transformers sizes its caches by num_hidden_layers. While they are empty, a copy of one of their layers
    # is a new layer of the same kind: growing, static or quantised.
    missing = num_layers - len(cache.layers)
    if missing > 0 and cache.get_seq_length() > 0:
        raise ValueError("past_key_values was filled without this model's policy: start from an empty cache")
    if cache.layer_class_to_replicate is None:
        cache.layers.extend(copy.deepcopy(cache.layers[-1]) for _ in range(missing))


def _count_positions(slots_S: Tensor, attention_mask: Tensor | None) -> Tensor:
    if attention_mask is not None and attention_mask.dim() == 2:
        return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -len(slots_S) :]
    return slots_S.unsqueeze(0)


def _kept(values_BS: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    return values_BS[:, kept]
