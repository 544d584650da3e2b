"""Everything of a Hugging Face folder but its weights and its model card: configurations, model code, tokenizer."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from transformers import GenerationConfig
from transformers.dynamic_module_utils import custom_object_save

from checkpoint_tools.formats.families import (
    SIZES,
    base_config,
    published_config,
    read_model_config,
    rope_parameters,
)
from checkpoint_tools.huggingface.configuration_cola import ColaConfig
from checkpoint_tools.huggingface.modeling_cola import ColaForCausalLM
from data_prep.output_files import read_json_object, write_json_whole
from pretrain.config import ActionConfig, ModelConfig

HF_CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
# Of a tokenizer: what transformers reads of it, in any family.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass(frozen=True, kw_only=True)
class ExportFacts:
    """What the configuration of an export is made from."""

    model: ModelConfig
    """Sizes of the base."""
    actions: ActionConfig
    """Sizes of the other parts."""
    parts: tuple[str, ...]
    """Those that are exported."""
    dtype: torch.dtype
    """Of the weights."""
    eos_id: int
    """Token that ends a document."""
    base_files: Path | None
    """Configuration files of the base that was imported, if it was."""

    @property
    def num_idm_layers(self) -> int:
        """0 where the IDM is left out."""
        return self.actions.num_idm_layers if "idm" in self.parts else 0

    @property
    def num_policy_layers(self) -> int:
        """0 where the policy is left out."""
        return self.actions.num_policy_layers if "policy" in self.parts else 0

    @property
    def dtype_name(self) -> str:
        """torch's name of the type."""
        return str(self.dtype).removeprefix("torch.")


def write_folder(
    folder: Path, facts: ExportFacts, layout: Literal["cola", "lamda-rl"], tokenizer: Path
) -> None:
    """Write configurations, the model's code where it needs its own, and the tokenizer's files into `folder`.

    Raises:
        UserError: if the model has no place in the `layout`.
    """
    if facts.parts == ("base",):
        _write_base(folder, facts)
    elif layout == "lamda-rl":
        layers = {"num_idm_layers": facts.num_idm_layers, "num_policy_layers": facts.num_policy_layers}
        config = published_config(
            facts.model, facts.actions, **layers, dtype=facts.dtype_name, eos_token_id=facts.eos_id
        )
        write_json_whole(folder / HF_CONFIG_FILE, config)
        _generation_config(facts).save_pretrained(folder)
    else:
        _write_cola(folder, facts)
    copy_files(tokenizer, folder, TOKENIZER_FILES)


def copy_files(source: Path, folder: Path, names: tuple[str, ...]) -> None:
    """Copy those of the files `names` that are there."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def cola_config(facts: ExportFacts) -> ColaConfig:
    """Configuration of our own layout."""
    model, actions = facts.model, facts.actions
    return ColaConfig(
        **{key: getattr(model, name) for name, key in SIZES.items()},
        rms_norm_eps=model.rms_norm_epsilon,
        rope_parameters=rope_parameters(model),
        tie_word_embeddings=model.tied_embeddings,
        qkv_bias=model.qkv_bias,
        num_actions=actions.num_actions,
        num_idm_layers=facts.num_idm_layers,
        num_merge_layers=actions.num_merge_layers,
        num_policy_layers=facts.num_policy_layers,
        output_form=actions.output,
        dtype=facts.dtype_name,
        bos_token_id=None,
        eos_token_id=facts.eos_id,
        pad_token_id=facts.eos_id,
        architectures=[ColaForCausalLM.__name__],
    )


def _write_cola(folder: Path, facts: ExportFacts) -> None:
    config = cola_config(facts)
    with torch.device("meta"):
        custom_object_save(ColaForCausalLM(config), folder, config=config)  # type: ignore[arg-type]
    config.save_pretrained(folder)
    _generation_config(facts).save_pretrained(folder)


def _write_base(folder: Path, facts: ExportFacts) -> None:
    """The files that were imported, as they were but for the type of the weights; else new ones."""
    imported = _imported_config(facts)
    if imported is None:
        base_config(facts.model, facts.dtype_name, facts.eos_id).save_pretrained(folder)
        _generation_config(facts).save_pretrained(folder)
        return
    assert facts.base_files is not None, "that is where it comes from"
    copy_files(facts.base_files, folder, (HF_CONFIG_FILE, GENERATION_CONFIG_FILE))
    written = _with_dtype(imported, facts.dtype_name)
    if written != imported:
        write_json_whole(folder / HF_CONFIG_FILE, written)


def _imported_config(facts: ExportFacts) -> dict[str, object] | None:
    """The config.json that came with the base, if it still says what the model is: RoPE scaling may be left out."""
    if facts.base_files is None:
        return None
    file = facts.base_files / HF_CONFIG_FILE
    config = read_json_object(file, "import the base again")
    same = read_model_config(config, str(file)).model == replace(facts.model, vocab_padding=0)
    return config if same else None


def _with_dtype(config: Mapping[str, object], dtype: str) -> dict[str, object]:
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    return {**config, key: dtype}


def _generation_config(facts: ExportFacts) -> GenerationConfig:
    return GenerationConfig(do_sample=False, eos_token_id=facts.eos_id, pad_token_id=facts.eos_id)
