"""A Hugging Face folder run by transformers' modules, or by those of `modeling_cola.py`, with streamed weights.

Shapes: S sequence, K positions, H hidden, V vocabulary, A actions.
"""

from collections.abc import Mapping

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from checkpoint_tools.comparison.layerwise_model import Probe, numbered
from checkpoint_tools.comparison.layerwise_weights import logits_by_rows, rounded, stream_weights
from checkpoint_tools.formats.families import (
    ACTION_SIZES,
    is_published_layout,
    read_model_config,
    rope_parameters,
)
from checkpoint_tools.formats.opened_model import HF_CONFIG_FILE, OpenedModel
from checkpoint_tools.huggingface.configuration_cola import ColaConfig
from checkpoint_tools.huggingface.modeling_cola import ColaForCausalLM
from data_prep.output_files import read_json_object

LAYER_LISTS = {
    "base": "layers",
    "IDM": "action_layers",
    "policy": "policy_layers",
    "merge": "action_merge_layers",
}


class HuggingFaceModel:
    """A folder as a `LayerwiseModel`; `dtypes` are what its weights are rounded to, by name."""

    def __init__(self, opened: OpenedModel, probe: Probe, dtypes: Mapping[str, torch.dtype]) -> None:
        self._read = rounded(opened.reader.read, dtypes)
        self._head_name = "model.embed_tokens.weight" if opened.model.tied_embeddings else "lm_head.weight"
        config = _configuration(opened)
        with torch.device("meta"):
            self._model = (
                ColaForCausalLM(config)
                if isinstance(config, ColaConfig)
                else AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            ).eval()
        self._base = self._model.model
        # The one buffer: frequencies, which are made and not read.
        self._base.rotary_emb = type(self._base.rotary_emb)(config)
        stream_weights(self._model, self._read, but=self._model.lm_head)
        self._inputs = {
            "input_ids": probe.tokens_S[None],
            # Or a gap in the positions would be taken for the start of another text.
            "attention_mask": torch.ones(1, len(probe.tokens_S), dtype=torch.long),
            "position_ids": probe.positions()[None],
            "use_cache": False,
        }
        layers = {"embedding": self._base.embed_tokens}
        for title, attribute in LAYER_LISTS.items():
            layers |= numbered(title, getattr(self._base, attribute, ()))
        self.layers: Mapping[str, nn.Module] = layers

    def hidden(self) -> torch.Tensor:
        """h [S, H]."""
        if not isinstance(self._model, ColaForCausalLM):
            return self._base(**self._inputs).last_hidden_state[0]
        embeds_BSH, self._layer_inputs = self._base.embed(**self._inputs)
        return self._base.run_base(embeds_BSH, self._layer_inputs).last_hidden_state[0]

    def action_logits(self, part: str, hidden_SH: torch.Tensor) -> torch.Tensor:
        """Logits [S, A] of "idm" or "policy"."""
        logits = self._base.idm_logits if part == "idm" else self._base.policy_logits
        return logits(hidden_SH[None], self._layer_inputs)[0]

    def world_state(self, hidden_SH: torch.Tensor, actions_S: torch.Tensor) -> torch.Tensor:
        """What the token head reads [S, H]."""
        return self._base.world_state(hidden_SH[None], actions_S[None])[0]

    def token_logits(self, state_KH: torch.Tensor) -> torch.Tensor:
        """Logits [K, V]."""
        head = self._model.lm_head
        return logits_by_rows(head, self._read(self._head_name), lambda: head(state_KH))


def _configuration(opened: OpenedModel) -> PretrainedConfig:
    """The folder's config.json as the model's own code reads it."""
    file = opened.path / HF_CONFIG_FILE
    fields = read_json_object(file, "download or export the model again")
    if is_published_layout(fields):  # for which we have no other code than our own
        theirs = {name for name, _ in ACTION_SIZES.values()}
        kept = {key: value for key, value in fields.items() if key not in {*theirs, "model_type", "auto_map"}}
        sizes = {name: getattr(opened.actions, name) for name in ACTION_SIZES}
        config: PretrainedConfig = ColaConfig.from_dict(
            {**kept, **sizes, "output_form": opened.actions.output}
        )
    elif fields["model_type"] == ColaConfig.model_type:
        config = ColaConfig.from_pretrained(opened.path)
    else:
        config = AutoConfig.from_pretrained(opened.path)
    # Whoever opened it may have chosen to leave the scaling out.
    if opened.model.rope_scaling_factor != read_model_config(fields, str(file)).model.rope_scaling_factor:
        config.rope_parameters = rope_parameters(opened.model)
    return config
