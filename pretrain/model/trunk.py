"""The Llama base: Megatron's GPTModel, opened at the hidden state that CoLA works on.

Shapes: S sequence, B batch, H hidden, V vocabulary (this rank's part).
"""

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from pretrain.config import RunConfig
from pretrain.model.specs import layer_spec, transformer_config


class LlamaTrunk(GPTModel):
    """Llama whose forward gives the hidden state after the final norm; the head is a separate step."""

    def __init__(self, config: RunConfig, groups: ProcessGroupCollection) -> None:
        model = config.model
        scaling = model.rope_scaling_factor
        super().__init__(
            config=transformer_config(config, model.num_layers),
            transformer_layer_spec=layer_spec(),
            vocab_size=model.vocab_size,
            max_sequence_length=config.data.sequence_length,
            parallel_output=True,
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
            rotary_base=model.rope_theta,
            rope_scaling=scaling is not None,
            rope_scaling_factor=scaling or 1.0,
            pg_collection=groups,
        )

    def _postprocess(self, hidden_states: torch.Tensor, **_: object) -> torch.Tensor:
        return hidden_states

    def hidden(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """Hidden states [S, B, H] after the final norm."""
        positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
        return self(tokens_BS, positions_BS, attention_mask=None)

    def rotary(self, sequence_length: int) -> torch.Tensor:
        """Rotary angles of positions 0..S-1, shared by the action modules."""
        return self.rotary_pos_emb(sequence_length)

    def final_norm(self, state_SBH: torch.Tensor) -> torch.Tensor:
        """The base's final RMSNorm, which the `reference` world model applies a second time."""
        return self.decoder.final_layernorm(state_SBH)

    def logits(self, state_SBH: torch.Tensor) -> torch.Tensor:
        """Token logits [S, B, V] of this rank's part of the vocabulary."""
        return self.output_layer(state_SBH)[0]

    def token_losses(self, state_SBH: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
        """Cross-entropy [S, B] of each next token, nats."""
        return self.compute_language_model_loss(labels_BS, self.logits(state_SBH)).transpose(0, 1)
