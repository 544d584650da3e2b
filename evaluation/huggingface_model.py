"""Load an exported CoLA folder for evaluation.

The folder is read the way a stranger would read it, with transformers' own `AutoModelForCausalLM` and the
model code that lies next to the weights, so that every figure is one of what was exported. Nothing is
downloaded.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from data_prep.errors import UserError

# B batch, S sequence, V vocabulary, A actions.


class ColaConfigLike(Protocol):
    """The fields of the exported configuration that evaluation reads."""

    vocab_size: int
    max_position_embeddings: int
    num_actions: int
    num_idm_layers: int
    num_policy_layers: int

    def to_dict(self) -> dict[str, object]:
        """All fields of the configuration."""
        ...


class ColaScorer(Protocol):
    """What scoring asks of an exported model; the model code exported with it says more."""

    @property
    def config(self) -> ColaConfigLike:
        """The exported configuration."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...

    def base_logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The frozen base's next-token logits, [B, S] -> [B, S, V]."""
        ...

    def infer_actions(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The IDM's actions, [B, S] -> [B, S-1]; the one at t is read at token t+1."""
        ...

    def policy_logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The policy's action logits, [B, S] -> [B, S, A]."""
        ...

    def forward_world_model(self, input_ids: torch.Tensor, actions: torch.Tensor | int) -> torch.Tensor:
        """Next-token logits under actions [B, S] or one for all, [B, S] -> [B, S, V]."""
        ...

    def policy_mixture_log_probs(
        self, input_ids: torch.Tensor, attention_mask: None = None, chunk_actions: int = 8
    ) -> torch.Tensor:
        """log sum_k pi(k|x) p(.|x, k), `chunk_actions` actions at a time, [B, S] -> [B, S, V]."""
        ...


class ColaModel(ColaScorer, Protocol):
    """A whole exported model: scores, generates, has weights."""

    def generate(
        self,
        *,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        max_new_tokens: int,
        min_new_tokens: int,
        do_sample: bool,
        do_sample_actions: bool = False,
        action_plan: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Prompt and new tokens; the policy chooses actions unless `action_plan` [B, N] does."""
        ...

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The weights by their published names."""
        ...


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """An exported folder, ready to evaluate."""

    folder: Path
    """Where it was read from."""
    model: ColaModel
    """The network in evaluation mode, float32, on the GPU where there is one."""
    tokenizer: PreTrainedTokenizerBase
    """The tokenizer that lies next to the weights."""


def load_exported_model(folder: Path) -> ExportedModel:
    """Read an exported folder; `UserError` where it is none or lacks the IDM or the policy."""
    for name in ("config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder}: no {name} there; --model must be a folder written by megatron_to_hf.py"
            )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        trust_remote_code=True,
        use_safetensors=True,
        local_files_only=True,
        dtype=torch.float32,
    )
    if not hasattr(model, "forward_world_model"):
        raise UserError(
            f"{folder}: a {type(model).__name__}, not a CoLA model; export one with megatron_to_hf.py"
        )
    # A cast, since the class comes from the code in the folder and not from this project.
    network = cast(ColaModel, model.eval())
    require_all_parts(network, folder)
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]  # a wrapper hides its type
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    return ExportedModel(folder=folder, model=network, tokenizer=tokenizer)


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    """The text of some tokens, as it is: control tokens are written out."""
    text = tokenizer.decode(token_ids, skip_special_tokens=False)
    assert isinstance(text, str), "one list of tokens gives one text"
    return text


def require_all_parts(model: ColaScorer, folder: Path) -> None:
    """`UserError` unless the model has an IDM and a policy (each may be left out of an export)."""
    for part, num_layers in (
        ("IDM", model.config.num_idm_layers),
        ("policy", model.config.num_policy_layers),
    ):
        if num_layers == 0:
            raise UserError(
                f"{folder}: exported without its {part}; evaluation needs it, so export the policy run whole"
            )
