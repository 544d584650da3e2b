"""A stand-in for a model whose every answer is known: for tests of counting, not of computing."""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

# B batch, S sequence, V vocabulary, A actions.
SURE = 5.0


@dataclass
class KnownConfig:
    vocab_size: int
    num_actions: int
    num_idm_layers: int = 1
    num_policy_layers: int = 1
    max_position_embeddings: int = 100

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


class KnownCola:
    """The IDM reads the next token modulo A; base and policy always say 1; under action k comes token k."""

    def __init__(self, vocab_size: int, num_actions: int) -> None:
        self.config = KnownConfig(vocab_size=vocab_size, num_actions=num_actions)
        self.device = torch.device("cpu")

    def infer_actions(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids[:, 1:] % self.config.num_actions

    def base_logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self._logits(torch.ones_like(input_ids), self.config.vocab_size)

    def policy_logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self._logits(torch.ones_like(input_ids), self.config.num_actions)

    def forward_world_model(self, input_ids: torch.Tensor, actions: torch.Tensor | int) -> torch.Tensor:
        actions_BS = torch.as_tensor(actions).expand(input_ids.shape)
        return self._logits(actions_BS, self.config.vocab_size)

    def policy_mixture_log_probs(
        self, input_ids: torch.Tensor, attention_mask: None = None, chunk_actions: int = 8
    ) -> torch.Tensor:
        probs_BSV = torch.zeros(*input_ids.shape, self.config.vocab_size)
        policy_BSA = self.policy_logits(input_ids).softmax(-1)
        for action in range(self.config.num_actions):
            probs_BSV += policy_BSA[..., action, None] * self.forward_world_model(input_ids, action).softmax(
                -1
            )
        return probs_BSV.log()

    def _logits(self, choice_BS: torch.Tensor, size: int) -> torch.Tensor:
        return SURE * F.one_hot(choice_BS, size).float()
