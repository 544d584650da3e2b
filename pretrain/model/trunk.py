"""The Llama base of Megatron's modules, opened at the hidden state that CoLA works on; or a pipeline stage's share.

Shapes: S sequence, B batch, H hidden, V vocabulary (this rank's part, padding included). Between the embedding and
the head, S is this rank's part under sequence parallelism.
"""

from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, vocab_parallel_cross_entropy
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock

from pretrain.config import RunConfig
from pretrain.cpu_products import product
from pretrain.model.action_transformer import HEAD_SEED
from pretrain.model.kernels import block_submodules
from pretrain.model.specs import seeded, transformer_config
from pretrain.model.tensor_region import enter_tensor_region
from pretrain.model.token_loss import exclude_padding, frozen_head_losses
from pretrain.placement import place_layers


class LlamaTrunk(MegatronModule):
    """Embedding (first stage), blocks and final norm (where the last block is), token head (last stage)."""

    def __init__(self, config: RunConfig, groups: ProcessGroupCollection) -> None:
        model, placement, stage = config.model, place_layers(config), groups.pp.rank()
        blocks = placement.blocks_on("base", stage)
        trunk_config = transformer_config(config, "base")
        super().__init__(config=trunk_config)
        self.tp_group = groups.tp
        self.has_embedding, self.has_head = stage == 0, stage == groups.pp.size() - 1
        self.ends_here = placement.complete_before("base", stage + 1)
        # A head beyond the last block needs the norm once more: the `reference` world model applies it to its state.
        self.norm_is_copy = self.ends_here and not blocks
        self.num_layers_here = len(blocks)
        self.tied = model.tied_embeddings
        rows = model.padded_vocab_size // groups.tp.size()
        first_row = rows * groups.tp.rank()
        self.tokens_here = min(max(model.vocab_size - first_row, 0), rows)  # the rows after these are padding
        if self.has_embedding:
            self.embedding = LanguageModelEmbedding(
                trunk_config, model.padded_vocab_size, config.data.sequence_length, "rope", tp_group=groups.tp
            )
        self.rotary_pos_emb = RotaryEmbedding(
            model.head_size,
            rotary_percent=1.0,
            rotary_base=model.rope_theta,
            rope_scaling=model.rope_scaling_factor is not None,
            rope_scaling_factor=model.rope_scaling_factor or 1.0,
            use_cpu_initialization=trunk_config.use_cpu_initialization,
            cp_group=groups.cp,
        )
        self.decoder = TransformerBlock(
            config=trunk_config,
            spec=block_submodules(blocks),
            post_process=self.ends_here,
            pg_collection=groups,
        )
        if self.has_head and not (self.tied and self.has_embedding):
            with seeded(torch.initial_seed() + (0 if self.tied else HEAD_SEED)):
                self.output_layer = ColumnParallelLinear(
                    model.hidden_size, model.padded_vocab_size, config=trunk_config,
                    init_method=trunk_config.init_method, bias=False, tp_group=groups.tp,
                )  # fmt: skip

    def hidden(self, tokens_BS: torch.Tensor, state_SBH: torch.Tensor | None = None) -> torch.Tensor:
        """Run this stage's blocks on the embedded tokens, or on the `state_SBH` of the stage before.

        Returns:
            [S, B, H], after the final norm if the last block is here.
        """
        if self.has_embedding:
            state_SBH = self.embedding(tokens_BS, position_ids=None)
        rotary = self.rotary(tokens_BS.shape[1])
        return self.decoder(hidden_states=state_SBH, attention_mask=None, rotary_pos_emb=rotary)

    def rotary(self, sequence_length: int) -> torch.Tensor:
        """Rotary angles of positions 0..S-1, shared by the action modules."""
        return self.rotary_pos_emb(sequence_length)

    def final_norm(self, state_SBH: torch.Tensor) -> torch.Tensor:
        """The base's final RMSNorm, which the `reference` world model applies a second time."""
        return self.decoder.final_layernorm(state_SBH)

    @property
    def head_weight(self) -> torch.Tensor:
        """The token head's weight [V, H]."""
        return (
            self.embedding.word_embeddings.weight
            if self.tied and self.has_embedding
            else self.output_layer.weight
        )

    def logits(self, state_SBH: torch.Tensor) -> torch.Tensor:
        """Token logits [S, B, V] of all positions and this rank's part of the vocabulary; of padded rows the lowest."""
        region_SBH = enter_tensor_region(state_SBH, self.config, self.tp_group)
        return exclude_padding(product(region_SBH, self.head_weight), self.tokens_here)

    def token_losses(self, state_SBH: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
        """Cross-entropy [S, B] of each next token, nats, fp32."""
        labels_SB = labels_BS.T.contiguous()
        if self.head_weight.requires_grad:
            return vocab_parallel_cross_entropy(self.logits(state_SBH), labels_SB)
        region_SBH = enter_tensor_region(state_SBH, self.config, self.tp_group)
        return frozen_head_losses(
            region_SBH, self.head_weight, labels_SB, self.tp_group, tokens_here=self.tokens_here
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """As Megatron's; second copies of a tensor, on another pipeline stage, are marked as such."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        copies = [f"{prefix}decoder.final_layernorm.weight"] if self.norm_is_copy else []
        if self.tied and not self.has_embedding and self.has_head:
            copies.append(f"{prefix}output_layer.weight")
            state[copies[-1]].key = f"{prefix}embedding.word_embeddings.weight"
        for name in copies:
            state[name].replica_id = (1, *state[name].replica_id[1:])
        return state
