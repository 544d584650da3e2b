"""The planner's parameters are those of the model that is built, part by part and rank by rank."""

import json
from pathlib import Path

import pytest
import torch

from pretrain.config import RunConfig
from pretrain.model.cola import ColaModel
from pretrain.parallel import ParallelContext
from pretrain.placement import place_layers
from pretrain.planning.parameters import (
    built_parts,
    groups_on_stage,
    parameters_by_part,
    rank_count,
    trained_parts,
)
from pretrain.recipes import load_recipe
from pretrain.stages.registry import stage_class
from tests.forked_ranks import start_program
from tests.pretrain.planning.rank_parameters import LAYOUTS, layout_recipe
from tests.pretrain.tiny_runs import UNLIKE_SIZES as MODEL
from tests.pretrain.tiny_runs import tiny_recipe

ROOT = Path(__file__).resolve().parents[3]
KNOWN = {"base": 8_030_261_248, "idm": 872_714_240, "world_model": 587_464_704, "policy": 1_745_162_240}
ACTIONS = {"num_actions": 24, "num_idm_layers": 2, "num_merge_layers": 3, "num_policy_layers": 4}
VARIANTS = [
    ("base", {}, {}),
    ("idm", {}, {}),
    ("policy", {}, {}),
    ("idm", {}, {"assignment": "vq"}),
    ("idm", {"qkv_bias": True}, {}),
    ("policy", {"qkv_bias": True, "tied_embeddings": True}, {}),
    ("base", {"vocab_padding": 16}, {}),
    ("idm", {"vocab_padding": 16, "tied_embeddings": True}, {}),
]


def recipe(stage: str, model: dict[str, object], actions: dict[str, object]) -> RunConfig:
    """A tiny run of the stage."""
    start = None if stage == "base" else Path("start")
    return tiny_recipe(
        stage, Path("run"), Path("data"), start, model={**MODEL, **model}, actions={**ACTIONS, **actions}
    )


def built_counts(config: RunConfig, context: ParallelContext) -> dict[str, int]:
    """Parameters of the real model, by part, on the meta device."""
    stage = stage_class(config)
    with torch.device("meta"):
        model = ColaModel(config, context.groups, (*stage.frozen_parts, *stage.trained_parts))
    return {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in model.parts}


@pytest.mark.parametrize(("stage", "model", "actions"), VARIANTS)
def test_parts_have_the_parameters_of_the_model(
    context: ParallelContext, stage: str, model: dict[str, object], actions: dict[str, object]
) -> None:
    config = recipe(stage, model, actions)
    assert parameters_by_part(config) == built_counts(config, context)


@pytest.mark.parametrize(
    "fault",
    [{"qkv_bias": True}, {"tied_embeddings": True}, {"num_key_value_heads": 6}, {"vocab_padding": 16}],
)
def test_another_model_has_others(context: ParallelContext, fault: dict[str, object]) -> None:
    """The fault twin: a plan for a model that differs in one choice."""
    planned = parameters_by_part(recipe("idm", fault, {}))
    assert planned["base"] != built_counts(recipe("idm", {}, {}), context)["base"]


@pytest.mark.parametrize(("stage", "model", "actions"), VARIANTS)
def test_parts_are_those_of_the_stage(
    stage: str, model: dict[str, object], actions: dict[str, object]
) -> None:
    config = recipe(stage, model, actions)
    real = stage_class(config)
    assert trained_parts(config) == real.trained_parts
    assert set(built_parts(config)) == {*real.frozen_parts, *real.trained_parts}


@pytest.mark.parametrize("stage", ["idm", "policy"])
def test_full_size_counts_are_the_known_ones(stage: str) -> None:
    counts = parameters_by_part(load_recipe(ROOT / f"configs/{stage}_llama31_8b.yaml", []))
    assert counts == {part: KNOWN[part] for part in counts}


@pytest.mark.parametrize("stage", ["base", "idm", "policy"])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_pipeline_stages_share_every_parameter_once(stage: str, size: int) -> None:
    """In whichever layout: the groups of all stages add up to the model and the copies of the base's final norm."""
    config = tiny_recipe(
        stage,
        Path("run"),
        Path("data"),
        model={**MODEL, "num_layers": 5},
        actions=ACTIONS,
        parallel={"pipeline_parallel_size": size},
    )
    placement = place_layers(config)
    groups = [g for stage in range(size) for g in groups_on_stage(config, placement, stage)]
    copies = {"base": MODEL["hidden_size"] * (size - 1 - placement.last_stage_of("base"))}
    for part, count in parameters_by_part(config).items():
        placed = sum(group.parameters for group in groups if group.part == part)
        assert placed == count + copies.get(part, 0)


@pytest.mark.distributed
def test_each_rank_has_the_parameters_planned_for_it(tmp_path: Path) -> None:
    """Two ranks, as tensor and as pipeline parallel, count what they have built."""
    start_program("tests.pretrain.planning.rank_parameters", tmp_path)
    for name, layout in LAYOUTS.items():
        config = layout_recipe(name)
        for rank in range(2):
            stage = rank if layout.get("pipeline_parallel_size") else 0
            found = json.loads((tmp_path / f"{name}_{rank}.json").read_text())
            planned = dict.fromkeys(found, 0.0)
            for group in groups_on_stage(config, place_layers(config), stage):
                planned[group.part] += rank_count(group, config.parallel.tensor_parallel_size)
            assert planned == found, (name, rank)
