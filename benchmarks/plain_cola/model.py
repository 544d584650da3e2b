"""CoLA in plain PyTorch, from the paper's description: what one would write without Megatron.

The reference that the Megatron model is compared with, tensor by tensor, and the yardstick of its speed. Nothing of
pretrain/ is in it. Parameters have the published checkpoints' names (without their leading `model.`).
Shapes: B batch, S sequence, H hidden, V vocabulary, A actions.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn

from benchmarks.plain_cola.llama import (
    Block,
    Mlp,
    Norm,
    Rotary,
    rotary_frequencies,
    rotary_tables,
    run_blocks,
)
from benchmarks.plain_cola.settings import PlainMethod, PlainSizes

PARTS = ("base", "idm", "world_model", "policy")


class PlainCola(nn.Module):
    """Base, IDM, world model and policy, as far as `parts` names them; random weights."""

    rotary_frequencies: torch.Tensor

    def __init__(self, sizes: PlainSizes, method: PlainMethod, parts: Iterable[str] = PARTS) -> None:
        super().__init__()
        self.sizes, self.method, self.parts = sizes, method, tuple(parts)
        self.activation_checkpointing = False
        self.register_buffer("rotary_frequencies", rotary_frequencies(sizes), persistent=False)
        width, actions = sizes.hidden_size, sizes.num_actions
        if "base" in self.parts:
            self.embed_tokens = nn.Embedding(sizes.vocab_size, width)
            self.layers = _blocks(sizes, sizes.num_layers)
            self.norm = Norm(width, sizes.rms_norm_epsilon)
            self.lm_head = nn.Linear(width, sizes.vocab_size, bias=False)
        if "idm" in self.parts:
            self.action_layers = _blocks(sizes, sizes.num_idm_layers)
            self.action_norm = Norm(width, sizes.rms_norm_epsilon)
            self.action_head = nn.Linear(width, actions, bias=False)
        if "world_model" in self.parts:
            self.action_code_book = nn.Linear(actions, width, bias=False)  # its columns are the codes
            self.action_merge_layers = nn.ModuleList(
                Mlp(sizes, 2 * width) for _ in range(sizes.num_merge_layers)
            )
        if "policy" in self.parts:
            self.policy_layers = _blocks(sizes, sizes.num_policy_layers)
            self.policy_norm = Norm(width, sizes.rms_norm_epsilon)
            self.policy_head = nn.Linear(width, actions, bias=False)
        self._draw_weights()
        if sizes.tied_embeddings and "base" in self.parts:
            self.lm_head.weight = self.embed_tokens.weight

    def hidden(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """The base's hidden state [B, S, H] after its final norm."""
        return self.norm(self._run(self.layers, self.embed_tokens(tokens_BS)))

    def idm_logits(self, hidden_BSH: torch.Tensor) -> torch.Tensor:
        """Action logits [B, S, A] of the IDM, fp32, not shifted."""
        return self.action_head(self.action_norm(self._run(self.action_layers, hidden_BSH))).float()

    def policy_logits(self, hidden_BSH: torch.Tensor) -> torch.Tensor:
        """Action logits [B, S, A] of the policy, fp32."""
        return self.policy_head(self.policy_norm(self._run(self.policy_layers, hidden_BSH))).float()

    def base_logits(self, hidden_BSH: torch.Tensor) -> torch.Tensor:
        """Next-token logits [B, S, V] of the base alone, fp32."""
        return self.lm_head(hidden_BSH).float()

    def world_logits(self, hidden_BSH: torch.Tensor, one_hot_BSA: torch.Tensor) -> torch.Tensor:
        """Next-token logits [B, S, V] under the given actions, fp32."""
        action_BSH = self.action_code_book(one_hot_BSA)
        state_BSH = hidden_BSH
        for merge in self.action_merge_layers:
            state_BSH = state_BSH + merge(torch.cat([state_BSH, action_BSH.to(state_BSH.dtype)], dim=-1))
        if self.method.output == "reference":
            state_BSH = self.norm(state_BSH) - hidden_BSH
        return self.lm_head(state_BSH).float()

    def _run(self, blocks: nn.ModuleList, state_BSH: torch.Tensor) -> torch.Tensor:
        rotary: Rotary = rotary_tables(self.rotary_frequencies, state_BSH.shape[1])
        return run_blocks(blocks, state_BSH, rotary, self.activation_checkpointing)

    def _draw_weights(self) -> None:
        """As the released code: sqrt(2 / 5H) everywhere, less for a block's projections into the residual stream."""
        width = self.sizes.hidden_size
        for name, weight in self.named_parameters():
            into_stream = name.endswith((".o_proj.weight", ".mlp.down_proj.weight"))
            std = (
                1 / (math.sqrt(width) * self.sizes.num_layers) if into_stream else math.sqrt(2 / (5 * width))
            )
            starts_as_base = self.method.output == "residual" and ".down_proj." in name and not into_stream
            if starts_as_base or name.endswith(".bias"):
                nn.init.zeros_(weight)
            elif weight.dim() > 1:  # norms stay at one
                nn.init.normal_(weight, std=std)


def _blocks(sizes: PlainSizes, count: int) -> nn.ModuleList:
    return nn.ModuleList(Block(sizes) for _ in range(count))
