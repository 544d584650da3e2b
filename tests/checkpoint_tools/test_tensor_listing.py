"""The whole layout of Llama-3.1-8B and of CoLA on it, from meta tensors."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from checkpoint_tools.tensor_listing import ListingConfig, list_recipe
from data_prep.errors import UserError
from pretrain.config import StageName

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def listing(recipe: str, stage: StageName | None = None) -> list[str]:
    """The lines that are printed, each cell's spaces made one."""
    output = io.StringIO()
    list_recipe(ListingConfig(CONFIGS / recipe, stage), Console(file=output, soft_wrap=True))
    return [" ".join(line.replace("\u2502", " ").split()) for line in output.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("stage", "tensors", "parameters"),
    [("base", 291, 8_030_261_248), ("idm", 336, 9_490_440_192), ("policy", 410, 11_235_602_432)],
)
def test_llama_31_8b(stage: StageName, tensors: int, parameters: int) -> None:
    """Tensors and parameters of the published models, with the shapes of the published files."""
    lines = listing("policy_llama31_8b.yaml", stage)
    assert any(
        line.startswith(f"Hugging Face: {tensors} tensors, {parameters:,} parameters") for line in lines
    )
    assert any(line.startswith("model.layers.31.mlp.down_proj.weight 4096 x 14336 ") for line in lines)
    assert any(line.startswith("lm_head.weight 128256 x 4096 ") for line in lines)
    merge = [
        line
        for line in lines
        if line.startswith("model.action_merge_layers.1.gate_proj.weight 14336 x 8192 ")
    ]
    assert len(merge) == (stage != "base")


def test_tied_embeddings_have_no_head() -> None:
    lines = listing("idm_qwen25_math_1_5b.yaml", "base")
    assert not any("lm_head" in line for line in lines)
    assert any(line.startswith("model.layers.0.self_attn.q_proj.bias 1536 ") for line in lines)


def test_a_missing_recipe_is_one_line() -> None:
    with pytest.raises(UserError, match="no such recipe"):
        listing("nowhere.yaml")
