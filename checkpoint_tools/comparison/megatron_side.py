"""A checkpoint of the trainer run by the modules that trained it, with streamed weights, on one rank.

Shapes: B batch (of one), S sequence, K positions, H hidden, V vocabulary, A actions.
"""

# ruff: noqa: E402  Megatron is imported after the redirects
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from checkpoint_tools.comparison.layerwise_model import ACTION_PARTS, Probe, numbered
from checkpoint_tools.comparison.layerwise_weights import logits_by_rows, rounded, stream_weights
from checkpoint_tools.formats.opened_model import OpenedCheckpoint
from checkpoint_tools.formats.weight_map import weight_rules
from pretrain import cpu_redirects

cpu_redirects.apply()

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP

from pretrain.config import ParallelConfig, RunConfig
from pretrain.model.cola import ColaModel
from pretrain.model.gated_mlp import GatedMlp
from pretrain.model.kernels import local_name


class MegatronModel:
    """`parts` of a checkpoint as a `LayerwiseModel`; `dtypes` are what its weights are rounded to, by HF name."""

    def __init__(
        self,
        source: OpenedCheckpoint,
        parts: tuple[str, ...],
        probe: Probe,
        dtypes: Mapping[str, torch.dtype],
        groups: ProcessGroupCollection,
    ) -> None:
        self._recipe, self._probe = source.recipe, probe
        rules = weight_rules(self._recipe.model, self._recipe.actions, parts)
        own_dtypes = {ours: dtypes[rule.huggingface[0]] for rule in rules for ours in rule.megatron}
        self._read = rounded(source.weights.read, own_dtypes)
        with torch.device("meta"):
            self._model = ColaModel(_in_fp32(self._recipe), groups, parts).eval()
        for module in self._model.modules():
            # It reads the weights of its layers, which have them only while they run.
            if isinstance(module, GatedMlp):
                module.__class__ = MLP
        stream_weights(self._model, lambda name: self._read(local_name(name)))
        base = self._model.base
        base.rotary_pos_emb.register_forward_hook(self._angles_of_probe)
        layers = {"embedding": base.embedding, **numbered("base", base.decoder.layers)}
        for part in (part for part in ACTION_PARTS if part in parts):
            layers |= numbered(ACTION_PARTS[part], getattr(self._model, part).blocks.layers)
        if "world_model" in parts:
            layers |= numbered("merge", self._model.world_model.merge_layers.children())
        self.layers: Mapping[str, nn.Module] = layers

    def hidden(self) -> torch.Tensor:
        """h [S, H]."""
        return self._model.base.hidden(self._probe.tokens_S[None])[:, 0]

    def action_logits(self, part: str, hidden_SH: torch.Tensor) -> torch.Tensor:
        """Logits [S, A] of "idm" or "policy"."""
        rotary = self._model.base.rotary(len(hidden_SH))
        return getattr(self._model, part)(hidden_SH[:, None], rotary)[:, 0]

    def world_state(self, hidden_SH: torch.Tensor, actions_S: torch.Tensor) -> torch.Tensor:
        """What the token head reads [S, H], in the recipe's output form."""
        hidden_SBH = hidden_SH[:, None]
        one_hot_SBA = nn.functional.one_hot(actions_S, self._recipe.actions.num_actions)[:, None]
        state_SBH = self._model.world_model(hidden_SBH, one_hot_SBA)
        if self._recipe.actions.output == "reference":
            state_SBH = self._model.base.final_norm(state_SBH) - hidden_SBH
        return state_SBH[:, 0]

    def token_logits(self, state_KH: torch.Tensor) -> torch.Tensor:
        """Logits [K, V]."""
        base = self._model.base
        if base.tied:
            head, name = base.embedding.word_embeddings, "base.embedding.word_embeddings.weight"
        else:
            head, name = base.output_layer, "base.output_layer.weight"
        logits_KV = logits_by_rows(head, self._read(name), lambda: base.logits(state_KH[:, None])[:, 0])
        return logits_KV[:, : self._recipe.model.vocab_size]

    def _angles_of_probe(self, module: nn.Module, asked: object, angles: object) -> torch.Tensor:
        """In place of the angles of positions 0 to S - 1."""
        return torch.cat([module.forward(len(run), offset=run.start) for run in self._probe.runs])


def _in_fp32(recipe: RunConfig) -> RunConfig:
    """`recipe` for one rank and full precision."""
    training = replace(recipe.training, precision="fp32", fp8="off", base_fp8="off")
    return replace(recipe, training=training, parallel=ParallelConfig())
