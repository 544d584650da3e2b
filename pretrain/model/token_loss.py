"""Next-token cross-entropy through a frozen head, without ever holding the logits of more than a chunk of tokens.

The head gets no gradient, and each token's loss depends on its own logits alone, so the gradient of the loss to the
state is computed beside the loss, chunk by chunk, for the price of the two products that any backward pass needs. In
training nothing of the vocabulary's width is kept. Between the products Transformer Engine's kernel, where it is there,
passes over the logits three times; a dozen operations of torch's, in fp32, take as long as a fifth of the products.

Shapes: S sequence, B batch, H hidden, T tokens of a chunk, V vocabulary (this tensor-parallel rank's
part, padding included).
"""

import torch
import torch.distributed as dist
from torch.autograd.function import BackwardCFunction

from pretrain.cpu_products import multiply
from pretrain.model.specs import uses_transformer_engine

CHUNK_TOKENS = 1024


def frozen_head_losses(
    state_SBH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_SB: torch.Tensor,
    group: dist.ProcessGroup,
    tokens_here: int | None = None,
) -> torch.Tensor:
    """Losses [S, B] in nats, fp32, the same on all ranks of the tensor-parallel `group`.

    `state_SBH` is in the tensor region (`pretrain.model.tensor_region`): its gradient is this rank's part. Only the
    first `tokens_here` rows of `weight_VH` are tokens (None: all of them).
    """
    tokens_here = len(weight_VH) if tokens_here is None else tokens_here
    return _FrozenHeadLosses.apply(state_SBH, weight_VH, labels_SB, group, tokens_here)


@torch.no_grad()
def exclude_padding(logits: torch.Tensor, tokens_here: int) -> torch.Tensor:
    """Set, in place, the logits [..., V] after the first `tokens_here` so low that a softmax gives them no probability.

    Nor does its gradient reach them, being their probability; so this need not be known to autograd. Not to -inf, of
    which a rank's logits must not be made up.
    """
    logits[..., tokens_here:] = torch.finfo(logits.dtype).min
    return logits


class _FrozenHeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: BackwardCFunction,
        state_SBH: torch.Tensor,
        weight_VH: torch.Tensor,
        labels_SB: torch.Tensor,
        group: dist.ProcessGroup,
        tokens_here: int,
    ) -> torch.Tensor:
        states, labels = state_SBH.flatten(0, 1), labels_SB.flatten()
        losses = torch.empty(labels.shape, dtype=torch.float32, device=states.device)
        gradients = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        for first in range(0, len(labels), CHUNK_TOKENS):
            chunk = slice(first, first + CHUNK_TOKENS)
            logits_TV = exclude_padding(multiply(states[chunk], weight_VH), tokens_here)
            losses[chunk], gradients_TV = _losses_and_gradients(logits_TV, labels[chunk], group)
            if gradients is not None:
                gradients[chunk] = multiply(gradients_TV.to(weight_VH.dtype), weight_VH.T)
        if gradients is not None:
            ctx.save_for_backward(gradients.view_as(state_SBH))
        return losses.view_as(labels_SB)

    @staticmethod
    def backward(ctx: BackwardCFunction, *loss_gradients_SB: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (unit_SBH,) = ctx.saved_tensors
        return unit_SBH * loss_gradients_SB[0].unsqueeze(-1).to(unit_SBH.dtype), None, None, None, None


def _losses_and_gradients(
    logits_TV: torch.Tensor, labels_T: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses [T] and their gradients to the logits [T, V], in whose memory they may be."""
    if not uses_transformer_engine():
        probabilities_TV = logits_TV.float()
        return _losses_to_probabilities(probabilities_TV, labels_T, group), probabilities_TV
    # Not its public function, whose backward pass waits for the GPU and goes over the logits once more.
    from transformer_engine.pytorch.triton.cross_entropy import cross_entropy_forward

    losses, gradients = cross_entropy_forward(
        logits_TV[None], labels_T[None], label_smoothing=0.0, reduce_loss=False,
        dist_process_group=group if group.size() > 1 else None, ignore_idx=-100,
    )  # fmt: skip
    return losses[0], gradients[0]


def _losses_to_probabilities(
    logits_TV: torch.Tensor, labels_T: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    """The losses [T]; in place, logits become probabilities minus one-hot labels, the losses' gradients to them."""
    size = logits_TV.shape[1]
    local_T = labels_T - size * group.rank()
    elsewhere_T = (local_T < 0) | (local_T >= size)
    local_T = local_T.masked_fill(elsewhere_T, 0)[:, None]
    shared = group.size() > 1

    largest_T = logits_TV.amax(1)
    if shared:
        dist.all_reduce(largest_T, op=dist.ReduceOp.MAX, group=group)
    logits_TV -= largest_T[:, None]
    label_logit_T = logits_TV.gather(1, local_T)[:, 0].masked_fill(elsewhere_T, 0.0)
    sum_T = logits_TV.exp_().sum(1)
    if shared:
        both = torch.stack([label_logit_T, sum_T])
        dist.all_reduce(both, group=group)
        label_logit_T, sum_T = both
    logits_TV /= sum_T[:, None]
    logits_TV.scatter_add_(1, local_T, elsewhere_T[:, None].float() - 1.0)
    return sum_T.log() - label_logit_T
