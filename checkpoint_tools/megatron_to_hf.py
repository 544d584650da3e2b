"""Export a run as a Hugging Face folder that anyone can load.

    python checkpoint_tools/megatron_to_hf.py --run runs/demo/policy --output runs/demo/hf [--overwrite]

Takes a run of stage idm (actions can be inferred and played) or policy (the whole model), gathers the parts from the
runs it started from, checks every tensor against its recorded fingerprint, and writes model.safetensors, config.json,
the tokenizer, the model's own code (for `trust_remote_code=True`) and a model card.
"""

# ruff: noqa: E402  Megatron is imported after the redirects
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from transformers import GenerationConfig

from checkpoint_tools.huggingface.configuration_cola import ColaConfig
from checkpoint_tools.huggingface.modeling_cola import ColaForCausalLM
from checkpoint_tools.weight_map import to_huggingface, weight_rules
from data_prep.errors import UserError, run_cli
from data_prep.output_files import folder_written_whole
from data_prep.text_tokenizer import TextTokenizer, load_tokenizer
from pretrain import cpu_redirects

cpu_redirects.apply()

from pretrain.checkpointing import (
    CheckpointDescription,
    load_checked,
    locate_parts,
    read_description,
    resolve_checkpoint,
)
from pretrain.config import ParallelConfig, RunConfig
from pretrain.model.cola import ColaModel
from pretrain.model.kernels import local_name
from pretrain.parallel import parallel_context
from pretrain.recipes import recipe_from_fields

# What Llama 3.1's scaling is beside its factor; Megatron has the same numbers built in.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

MODEL_CARD = """---
library_name: transformers
pipeline_tag: text-generation
---
# A CoLA model: a frozen Llama steered by latent actions

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
model.generate(ids, max_new_tokens=32)                  # the policy chooses the actions
model.generate(ids, max_new_tokens=32, action_plan=17)  # action 17 throughout
model.infer_actions(ids)                                # the actions that led from token to token
```

| | |
|---|---|
{rows}

Method: Controlling Large Language Model with Latent Action, ICML 2025, arXiv 2503.21383.
"""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Export a CoLA run to a Hugging Face folder."""

    run: Path
    """Run folder (its newest checkpoint is taken) or one of its checkpoints/step_* folders."""
    output: Path
    """Folder to write."""
    tokenizer: Path | None = None
    """Tokenizer folder; default: the one that lies with the run's training data."""
    overwrite: bool = False
    """Replace the output folder if it exists."""


def export(config: ExportConfig) -> None:
    """Write the folder, complete or not at all.

    Raises:
        UserError: if the run cannot be exported, files are damaged, or the output exists.
    """
    if config.output.exists() and not config.overwrite:
        raise UserError(f"{config.output} exists; pass --overwrite or another --output")
    if config.output.exists() and not (config.output / "config.json").is_file():
        raise UserError(f"{config.output} holds no exported model, so --overwrite will not delete it")
    checkpoint = resolve_checkpoint(config.run)
    description = read_description(checkpoint)
    recipe = recipe_from_fields(description.recipe, str(checkpoint))
    if description.stage == "base":
        raise UserError(f"{checkpoint} is of stage base and knows no actions; export an idm or policy run")
    if recipe.actions.assignment != "gumbel":
        raise UserError(
            f"{checkpoint} assigns actions by '{recipe.actions.assignment}'; only 'gumbel' has an export"
        )
    if recipe.model.qkv_bias or recipe.model.tied_embeddings:
        raise UserError(
            f"{checkpoint} is of the Qwen2.5 form (model.qkv_bias, model.tied_embeddings), which has no export yet"
        )
    parts = [part for part in ("base", "idm", "world_model", "policy") if part in locate_parts(checkpoint)]
    tokenizer_folder = config.tokenizer or recipe.data.path / "tokenizer"
    tokenizer = _open_tokenizer(tokenizer_folder, description.tokenizer_fingerprint)
    weights = gather_weights(recipe, checkpoint, tuple(parts))

    with folder_written_whole(config.output) as folder:
        write_model(folder, huggingface_config(recipe, parts), weights, tokenizer.eos_id)
        for file in tokenizer_folder.glob("tokenizer*"):
            shutil.copyfile(file, folder / file.name)
        (folder / "README.md").write_text(model_card(description))
    print(
        f"{config.output}: {sum(w.numel() for w in weights.values()):,} parameters in {len(weights)} tensors"
    )


def gather_weights(recipe: RunConfig, checkpoint: Path, parts: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """All tensors of `parts` under their Hugging Face names, from `checkpoint` and the runs it started from."""
    # Without FP8: on a GPU the base would be quantised as it is loaded.
    in_precision = replace(recipe.training, fp8="off", base_fp8="off")
    on_one_rank = replace(recipe, parallel=ParallelConfig(), training=in_precision)
    with parallel_context(tensor_parallel_size=1, seed=recipe.seed) as context:
        model = ColaModel(on_one_rank, context.groups, parts)
        load_checked(model, parts, checkpoint)
        state = {local_name(name): value.detach() for name, value in model.named_parameters()}
    return to_huggingface(weight_rules(recipe.model, recipe.actions, parts), state)


def _open_tokenizer(folder: Path, fingerprint: str) -> TextTokenizer:
    if not folder.is_dir():
        raise UserError(f"{folder}: no tokenizer there; name its folder with --tokenizer")
    tokenizer = load_tokenizer(folder)
    if tokenizer.fingerprint != fingerprint:
        raise UserError(
            f"{folder} is not the tokenizer of this run's data; name the right one with --tokenizer"
        )
    return tokenizer


def huggingface_config(recipe: RunConfig, parts: Sequence[str]) -> ColaConfig:
    """The exported model's configuration: sizes, rotary positions and output form of `recipe`."""
    model, actions = recipe.model, recipe.actions
    rope = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling_factor is not None:
        rope |= {"rope_type": "llama3", "factor": model.rope_scaling_factor, **LLAMA3_ROPE}
    return ColaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        head_dim=model.head_size,
        rms_norm_eps=model.rms_norm_epsilon,
        max_position_embeddings=model.max_position_embeddings,
        rope_parameters=rope,
        tie_word_embeddings=False,
        num_actions=actions.num_actions,
        num_idm_layers=actions.num_idm_layers if "idm" in parts else 0,
        num_merge_layers=actions.num_merge_layers,
        num_policy_layers=actions.num_policy_layers if "policy" in parts else 0,
        output_form=actions.output,
    )


def write_model(folder: Path, config: ColaConfig, weights: dict[str, torch.Tensor], eos_id: int) -> None:
    """Weights, configurations and the model's own code, as transformers itself saves them."""
    with torch.device("meta"):
        model = ColaForCausalLM(config)
    model.load_state_dict(weights, strict=True, assign=True)
    model.config.dtype = next(iter(weights.values())).dtype
    model.config.eos_token_id = model.config.pad_token_id = eos_id
    model.config.bos_token_id = None
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=eos_id, pad_token_id=eos_id)
    model.save_pretrained(folder)


def model_card(description: CheckpointDescription) -> str:
    """A README that says only what the checkpoint records."""
    recipe = description.recipe
    facts = {
        "stage": description.stage,
        "steps": f"{description.step:,}",
        "tokens of this stage": f"{description.consumed_tokens:,}",
        "training data": recipe["data"]["path"],
        "output form": recipe["actions"]["output"],
        "regulariser": recipe["actions"]["regulariser"],
        "actions": recipe["actions"]["num_actions"],
        "written by": f"megatron-core {description.megatron_version}",
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return MODEL_CARD.format(rows=rows)


def main() -> None:
    """Command line."""
    export(tyro.cli(ExportConfig, description=__doc__))


if __name__ == "__main__":
    run_cli(main)
