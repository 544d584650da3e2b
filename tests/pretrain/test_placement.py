"""Layers to pipeline stages: as good as any cut, known figures at full size, and layouts read back as written."""

import dataclasses
import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import RunConfig
from pretrain.placement import (
    Placement,
    StageLayers,
    balance,
    chain_layers,
    parse_layout,
    place_layers,
    stage_costs,
)
from pretrain.recipes import load_recipe
from tests.pretrain.tiny_runs import tiny_recipe

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PARTS = ("base", "idm", "policy")


def full_size(stage: str, pipeline_parallel_size: int) -> RunConfig:
    """The Llama-3.1-8B recipe on so many pipeline stages."""
    return load_recipe(
        CONFIGS / f"{stage}_llama31_8b.yaml",
        [f"--parallel.pipeline-parallel-size={pipeline_parallel_size}"],
    )


@pytest.mark.parametrize(
    ("stage", "size", "least"),
    [("policy", 2, 0.99), ("policy", 4, 0.99), ("idm", 2, 0.984), ("idm", 4, 0.93)],
)
def test_full_size_stages_are_balanced(stage: str, size: int, least: float) -> None:
    config = full_size(stage, size)
    assert balance(config, place_layers(config)) >= least


@pytest.mark.parametrize(("stage", "size"), [("policy", 2), ("policy", 4), ("idm", 2), ("idm", 4)])
def test_full_size_layouts_are_the_best_there_are(stage: str, size: int) -> None:
    config = full_size(stage, size)
    assert max(stage_costs(config, place_layers(config))) == pytest.approx(least_slowest(config), rel=1e-12)


def test_equal_numbers_of_layers_are_not_balanced() -> None:
    """The fault twin: frozen and trained layers counted alike."""
    config = full_size("policy", 4)
    assert (
        balance(config, parse_layout("base*11|base*11|base*10 idm*1|idm*3 policy*8", 4, chain_layers(config)))
        < 0.7
    )


def placement_of(units: list[str], cuts: tuple[int, ...]) -> Placement:
    """The chain cut before each of `cuts`."""
    ends = (0, *cuts, len(units))
    return Placement(
        tuple(
            StageLayers(*(units[first:end].count(part) for part in PARTS))
            for first, end in itertools.pairwise(ends)
        )
    )


def least_slowest(config: RunConfig) -> float:
    """Cost of the slowest stage under the best of all cuts, by trying them all.

    In stage `idm` the last stage may hold the heads only.
    """
    chain, size = chain_layers(config), config.parallel.pipeline_parallel_size
    units = [part for part in PARTS for _ in range(getattr(chain, part))]
    return min(
        max(stage_costs(config, placement_of(units, cuts)))
        for cuts in itertools.combinations(range(1, len(units) + (config.stage == "idm")), size - 1)
    )


@st.composite
def small_runs(draw: st.DrawFn) -> RunConfig:
    """Runs of any stage with up to ten layers, and a head from nothing to more than all layers together."""
    layers = st.integers(1, 4)
    config = tiny_recipe(
        draw(st.sampled_from(["base", "idm", "policy"])),
        Path("run"),
        Path("data"),
        model={"num_layers": draw(layers), "vocab_size": draw(st.sampled_from([32, 1024, 65536]))},
        actions={"num_idm_layers": draw(layers), "num_policy_layers": draw(st.integers(1, 3))},
    )
    size = draw(st.integers(1, min(5, sum(chain_layers(config)))))
    return dataclasses.replace(
        config, parallel=dataclasses.replace(config.parallel, pipeline_parallel_size=size)
    )


@settings(deadline=None, max_examples=60)
@given(small_runs())
def test_no_cut_is_better(config: RunConfig) -> None:
    """Every layer is placed once, no stage but one of heads is empty, the slowest is as fast as any cut makes it."""
    placement = place_layers(config)
    assert max(stage_costs(config, placement)) == pytest.approx(least_slowest(config), rel=1e-12)
    assert [sum(placement.layers_by_stage(part)) for part in PARTS] == list(chain_layers(config))
    assert all(sum(stage) for stage in placement.stages[: -1 if config.stage == "idm" else None])
    assert placement.stages[0].base > 0
    assert 0 < balance(config, placement) <= 1


@settings(deadline=None, max_examples=60)
@given(small_runs())
def test_a_layout_is_read_back_as_written(config: RunConfig) -> None:
    placement = place_layers(config)
    size = config.parallel.pipeline_parallel_size
    assert parse_layout(str(placement), size, chain_layers(config)) == placement
    asked = dataclasses.replace(config.parallel, pipeline_layout=str(placement))
    assert place_layers(dataclasses.replace(config, parallel=asked)) == placement


def test_a_last_stage_of_heads_only_can_be_asked_for() -> None:
    placement = parse_layout("base*2 | idm*1 |", 3, StageLayers(2, 1))
    assert placement.stages[-1] == StageLayers()
    assert parse_layout(str(placement), 3, StageLayers(2, 1)) == placement


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("base*1 | idm", "'idm' is not a run such as"),
        ("base*2 idm*1", "has 1 stages for parallel.pipeline_parallel_size 2"),
        ("base*1 idm*1 | base*1", "order base, idm, policy"),
        ("base*1 base*1 | idm*1", "'base\\*1 base\\*1' names a part twice"),
        ("base*1 | idm*1", r"places base\*1 idm\*1, the model has base\*2 idm\*1"),
        ("| base*2 idm*1", "first stage must hold base layers"),
    ],
)
def test_what_is_wrong_with_a_layout_is_said(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_layout(text, 2, StageLayers(2, 1))


def test_what_came_before_a_stage_is_told() -> None:
    placement = parse_layout("base*2 | base*1 idm*1 | idm*1", 3, StageLayers(3, 2))
    assert [placement.done_before("base", stage) for stage in range(3)] == [0, 2, 3]
    assert [placement.complete_before("base", stage) for stage in range(3)] == [False, False, True]
    assert (placement.last_stage_of("base"), placement.last_stage_of("idm")) == (1, 2)
