"""What a CoLA model is worth on held-out blocks: the computation behind `held_out.py`.

Next-token losses over the same positions (base; world model with the IDM's argmax actions, under the
policy's mixture, with its likeliest action, with random actions), the divergence of the mixture from the
base in both directions, and how well the policy guesses the IDM's action. A block of S tokens has S-1
positions with a next token (t <= S-2); nothing else is scored. All numbers are measured on the blocks
given; nothing is written.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from data_prep.progress import progress_bar
from evaluation.huggingface_model import ColaScorer

# N blocks, B batch, S sequence, V vocabulary, A actions. C = S-1: the positions that have a next token.

FLOAT32_BYTES = 4
GIB = 1024**3


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Mean next-token losses in nats."""

    tokens: int
    """Scored positions."""
    base_loss: float
    """The frozen base model."""
    idm_loss: float
    """World model with the action that the IDM reads from the next token (argmax)."""
    mixture_loss: float
    """World model with the actions summed out under the policy."""
    greedy_loss: float
    """World model with the policy's most likely action."""
    random_loss: float
    """World model with actions drawn uniformly."""


@dataclass(frozen=True, kw_only=True)
class HeldOutFigures(Losses):
    """Every figure of the held-out table; losses and divergences in nats a token, accuracies from 0 to 1."""

    sequence_length_tokens: int
    """Tokens in a block."""
    num_actions: int
    """Size of the codebook."""
    alive_actions: int
    """Different actions that the IDM used (argmax) on the scored positions."""
    action_perplexity: float
    """exp of the entropy of the IDM's action usage; `num_actions` where all are used alike."""
    action_counts: list[int]
    """How often the IDM used each action."""
    kl_mixture_base: float
    """KL(policy mixture || base)."""
    kl_base_mixture: float
    """KL(base || policy mixture)."""
    policy_action_loss: float
    """Cross-entropy of the policy against the IDM's action."""
    policy_action_accuracy: float
    """Share of positions where the policy's most likely action is the IDM's."""
    greedy_accuracy: float
    """Share of next tokens that greedy action + greedy token gets right."""
    base_accuracy: float
    """Share of next tokens that the base's most likely token gets right."""
    per_source: dict[str, Losses]
    """The losses of each source alone."""


@dataclass(frozen=True, kw_only=True)
class ChunkPlan:
    """How much is computed at once, so that the logits held at one time stay below a limit."""

    blocks: int
    """Blocks in one forward pass."""
    actions: int
    """Actions of the mixture computed at once."""


def plan_chunks(chunk_gib: float, sequence_length: int, vocab_size: int, num_actions: int) -> ChunkPlan:
    """Split `chunk_gib` GiB of logits into blocks x actions, at least one of each."""
    block_logits = chunk_gib * GIB / (sequence_length * vocab_size * FLOAT32_BYTES)
    actions = min(num_actions, max(1, int(block_logits)))
    return ChunkPlan(blocks=max(1, int(block_logits / actions)), actions=actions)


def kl_divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats over the last axis, from log-probabilities [..., V] -> [...]."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log softmax(logits)[target] in nats, [B, C], from logits (or log-softmax) and targets [B, C]."""
    return F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")


def random_actions(num_blocks: int, positions: int, num_actions: int, seed: int) -> torch.Tensor:
    """Uniform actions [num_blocks, positions]; drawn all at once, so that chunking cannot change them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(num_actions, (num_blocks, positions), generator=generator)


@torch.no_grad()
def score_positions(
    model: ColaScorer, tokens_BS: torch.Tensor, random_actions_BC: torch.Tensor, chunk_actions: int
) -> dict[str, torch.Tensor]:
    """Score one batch of blocks; each value is [B, S-1], one number a position, named as in `HeldOutFigures`.

    All parts but the IDM get the first S-1 tokens only: the last has no next token to score, and a causal
    model says the same about the others without it. The IDM sees all S: it reads the action at t from t+1.
    """
    context_BC, targets_BC = tokens_BS[:, :-1], tokens_BS[:, 1:]
    actions_BC = model.infer_actions(tokens_BS)
    policy_logits_BCA = model.policy_logits(context_BC).float()
    base_log_probs_BCV = model.base_logits(context_BC).float().log_softmax(-1)
    greedy_logits_BCV = model.forward_world_model(context_BC, policy_logits_BCA.argmax(-1))
    mixture_log_probs_BCV = model.policy_mixture_log_probs(context_BC, chunk_actions=chunk_actions).float()
    return {
        "base_loss": token_losses(base_log_probs_BCV, targets_BC),
        "idm_loss": token_losses(model.forward_world_model(context_BC, actions_BC), targets_BC),
        "mixture_loss": token_losses(mixture_log_probs_BCV, targets_BC),
        "greedy_loss": token_losses(greedy_logits_BCV, targets_BC),
        "random_loss": token_losses(model.forward_world_model(context_BC, random_actions_BC), targets_BC),
        "kl_mixture_base": kl_divergence(mixture_log_probs_BCV, base_log_probs_BCV),
        "kl_base_mixture": kl_divergence(base_log_probs_BCV, mixture_log_probs_BCV),
        "policy_action_loss": token_losses(policy_logits_BCA, actions_BC),
        "policy_action_accuracy": policy_logits_BCA.argmax(-1) == actions_BC,
        "greedy_accuracy": greedy_logits_BCV.argmax(-1) == targets_BC,
        "base_accuracy": base_log_probs_BCV.argmax(-1) == targets_BC,
        "action": actions_BC,
    }


def measure(
    model: ColaScorer,
    blocks: Mapping[str, torch.Tensor],
    *,
    chunk_gib: float,
    seed: int,
    progress: bool = True,
) -> HeldOutFigures:
    """Measure every figure on `blocks` ({source: tokens [N, S]}).

    `chunk_gib` bounds the logits held at once, `seed` draws the random actions. Means are over positions, so
    a source counts as much as it has blocks.
    """
    num_actions = model.config.num_actions
    scores: dict[str, dict[str, torch.Tensor]] = {source: {} for source in blocks}
    for source, batch in _scored_batches(model, blocks, chunk_gib, seed, progress):
        for name, values in batch.items():
            so_far = scores[source].get(name)
            flat = values.flatten().to("cpu", torch.float64)
            scores[source][name] = flat if so_far is None else torch.cat([so_far, flat])

    together = {
        name: torch.cat([one[name] for one in scores.values()]) for name in next(iter(scores.values()))
    }
    counts_A = torch.bincount(together["action"].long(), minlength=num_actions)
    means = {name: values.mean().item() for name, values in together.items()}
    return HeldOutFigures(
        **asdict(_losses(together)),
        sequence_length_tokens=next(iter(blocks.values())).shape[1],
        num_actions=num_actions,
        alive_actions=int((counts_A > 0).sum()),
        action_perplexity=usage_perplexity(counts_A),
        action_counts=counts_A.tolist(),
        kl_mixture_base=means["kl_mixture_base"],
        kl_base_mixture=means["kl_base_mixture"],
        policy_action_loss=means["policy_action_loss"],
        policy_action_accuracy=means["policy_action_accuracy"],
        greedy_accuracy=means["greedy_accuracy"],
        base_accuracy=means["base_accuracy"],
        per_source={source: _losses(one) for source, one in scores.items()},
    )


def usage_perplexity(counts_A: torch.Tensor) -> float:
    """exp of the entropy of a usage histogram: 1 where one action does all, A where all are used alike."""
    shares_A = counts_A.double() / counts_A.sum()
    return math.exp(torch.special.entr(shares_A).sum().item())


def _scored_batches(
    model: ColaScorer, blocks: Mapping[str, torch.Tensor], chunk_gib: float, seed: int, progress: bool
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Every block once, in batches that fit `chunk_gib`, with its source."""
    sequence_length = next(iter(blocks.values())).shape[1]
    plan = plan_chunks(chunk_gib, sequence_length, model.config.vocab_size, model.config.num_actions)
    total_blocks = sum(tokens_NS.shape[0] for tokens_NS in blocks.values())
    actions_NC = random_actions(total_blocks, sequence_length - 1, model.config.num_actions, seed)
    with progress_bar("held-out", total_blocks, unit="block", shown=progress) as bar:
        for source, tokens_NS in blocks.items():
            source_actions_NC, actions_NC = actions_NC.split(
                [tokens_NS.shape[0], len(actions_NC) - len(tokens_NS)]
            )
            for tokens_BS, actions_BC in zip(
                tokens_NS.split(plan.blocks), source_actions_NC.split(plan.blocks), strict=True
            ):
                moved = tokens_BS.to(model.device), actions_BC.to(model.device)
                yield source, score_positions(model, *moved, chunk_actions=plan.actions)
                bar.update(tokens_BS.shape[0])


def _losses(scores: Mapping[str, torch.Tensor]) -> Losses:
    """The means of one set of positions."""
    return Losses(
        tokens=scores["base_loss"].numel(),
        base_loss=scores["base_loss"].mean().item(),
        idm_loss=scores["idm_loss"].mean().item(),
        mixture_loss=scores["mixture_loss"].mean().item(),
        greedy_loss=scores["greedy_loss"].mean().item(),
        random_loss=scores["random_loss"].mean().item(),
    )
