"""Layers to pipeline stages: as good as any cut, known figures at full size, and layouts read back as written."""

import dataclasses
import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import RunConfig
from pretrain.flops import flops_per_token, half_block_flops
from pretrain.placement import (
    BlockHalves,
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
    [("policy", 2, 0.99), ("policy", 4, 0.99), ("idm", 2, 0.99), ("idm", 4, 0.93)],
)
def test_full_size_stages_are_balanced(stage: str, size: int, least: float) -> None:
    config = full_size(stage, size)
    assert balance(config, place_layers(config)) >= least


@pytest.mark.parametrize(("stage", "size"), [("policy", 2), ("policy", 4), ("idm", 2), ("idm", 4)])
def test_full_size_layouts_are_the_best_there_are(stage: str, size: int) -> None:
    config = full_size(stage, size)
    assert figures(config, place_layers(config)) == pytest.approx(best_figures(config), rel=1e-12)


def test_whole_blocks_are_cut_only_where_it_helps() -> None:
    """Stage idm on two stages is better for it; on four, and stage policy on two, it is not, and none is cut."""
    config = full_size("idm", 2)
    assert str(place_layers(config)) == "base*26.5 | base*5.5 idm*4"
    whole = [
        parse_layout(f"base*{cut} | base*{32 - cut} idm*4", 2, chain_layers(config)) for cut in range(1, 32)
    ]
    assert 0.984 < max(balance(config, placement) for placement in whole) < 0.985
    for config in (full_size("idm", 4), full_size("policy", 2)):
        assert "." not in str(place_layers(config))


def test_equal_numbers_of_layers_are_not_balanced() -> None:
    """The fault twin: frozen and trained layers counted alike."""
    config = full_size("policy", 4)
    assert (
        balance(config, parse_layout("base*11|base*11|base*10 idm*1|idm*3 policy*8", 4, chain_layers(config)))
        < 0.7
    )


def figures(config: RunConfig, placement: Placement) -> tuple[float, int]:
    """Cost of the slowest stage, and how many cuts are between a block's attention and its MLP."""
    stages = range(config.parallel.pipeline_parallel_size)
    within = sum(placement.done_before(part, stage) % 1 > 0 for part in PARTS for stage in stages)
    return max(stage_costs(config, placement)), within


def best_figures(config: RunConfig) -> tuple[float, int]:
    """The same of the best of all cuts, by trying them all.

    In stage `idm` the last stage may hold the heads only.
    """
    chain, size = chain_layers(config), config.parallel.pipeline_parallel_size
    halves = half_block_flops(config.model, config.data.sequence_length)
    units = [
        cost * (3 if part == config.stage else 1)
        for part in PARTS
        for cost in halves * int(getattr(chain, part))
    ]
    done = [0, *itertools.accumulate(units)]
    heads = sum(flops_per_token(config).values()) - done[-1]

    def figures_of(cuts: tuple[int, ...]) -> tuple[float, int]:
        costs = [done[end] - done[first] for first, end in itertools.pairwise((0, *cuts, len(units)))]
        costs[-1] += heads
        return max(costs), sum(cut % 2 for cut in cuts)

    places = range(1, len(units) + (config.stage == "idm"))
    return min(map(figures_of, itertools.combinations(places, size - 1)))


@st.composite
def small_runs(draw: st.DrawFn) -> RunConfig:
    """Runs of any stage with up to eight layers, and a head from nothing to more than all layers together."""
    layers = st.integers(1, 3)
    config = tiny_recipe(
        draw(st.sampled_from(["base", "idm", "policy"])),
        Path("run"),
        Path("data"),
        model={"num_layers": draw(layers), "vocab_size": draw(st.sampled_from([32, 1024, 65536]))},
        actions={"num_idm_layers": draw(layers), "num_policy_layers": draw(st.integers(1, 2))},
    )
    size = draw(st.integers(1, min(5, int(sum(chain_layers(config))))))
    return dataclasses.replace(
        config, parallel=dataclasses.replace(config.parallel, pipeline_parallel_size=size)
    )


@settings(deadline=None, max_examples=60)
@given(small_runs())
def test_no_cut_is_better(config: RunConfig) -> None:
    """Every layer is placed once, no stage but one of heads is empty, the slowest is as fast as any cut makes it.

    And no cut that is as good goes through fewer blocks.
    """
    placement = place_layers(config)
    assert figures(config, placement) == pytest.approx(best_figures(config), rel=1e-12)
    assert [sum(placement.layers_by_stage(part)) for part in PARTS] == list(chain_layers(config))
    assert all(sum(stage) for stage in placement.stages[: -1 if config.stage == "idm" else None])
    assert placement.stages[0].base > 0
    assert 0 < balance(config, placement) <= 1


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    """A chain cut anywhere, between blocks and within them."""
    chain = StageLayers(draw(st.integers(1, 6)), draw(st.integers(0, 3)), draw(st.integers(0, 3)))
    units = [part for part in PARTS for _ in range(2 * int(getattr(chain, part)))]
    cuts = draw(st.sets(st.integers(1, len(units)), max_size=min(5, len(units))))
    return Placement(
        tuple(
            StageLayers(*(units[first:end].count(part) / 2 for part in PARTS))
            for first, end in itertools.pairwise((0, *sorted(cuts), len(units)))
        )
    )


@settings(deadline=None, max_examples=60)
@given(placements())
def test_a_layout_is_read_back_as_written(placement: Placement) -> None:
    chain = StageLayers(*(sum(placement.layers_by_stage(part)) for part in PARTS))
    assert parse_layout(str(placement), len(placement.stages), chain) == placement


@settings(deadline=None, max_examples=60)
@given(placements())
def test_every_half_is_on_one_stage_under_its_number(placement: Placement) -> None:
    """As Megatron numbers the blocks of a stage: on from the MLPs on the stages before."""
    for part in PARTS:
        attentions, mlps = [], []
        for stage in range(len(placement.stages)):
            before = sum(placement.halves_on(part, earlier).mlp for earlier in range(stage))
            for block, halves in enumerate(placement.blocks_on(part, stage), start=before):
                assert any(halves)
                attentions += [block] * halves.attention
                mlps += [block] * halves.mlp
        assert attentions == mlps == list(range(int(sum(placement.layers_by_stage(part)))))


def test_a_layout_asked_for_is_taken() -> None:
    config = full_size("idm", 2)
    asked = dataclasses.replace(config.parallel, pipeline_layout="base*30.5 | base*1.5 idm*4")
    found = place_layers(dataclasses.replace(config, parallel=asked))
    assert found == Placement((StageLayers(30.5), StageLayers(1.5, 4)))
    assert found.blocks_on("base", 0)[-1] == BlockHalves(mlp=False)
    assert found.blocks_on("base", 1) == [BlockHalves(attention=False), BlockHalves()]


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
        ("base*1.25 | base*0.75 idm*1", r"'base\*1.25' is not a run such as"),
        ("base*1.5 | base*1.5 idm*1", r"places base\*3 idm\*1, the model has base\*2 idm\*1"),
        ("base*1.5 | idm*1", r"places base\*1.5 idm\*1, the model has base\*2 idm\*1"),
        ("base*1.5 idm*0.5 | base*0.5 idm*0.5", "order base, idm, policy"),
    ],
)
def test_what_is_wrong_with_a_layout_is_said(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_layout(text, 2, StageLayers(2, 1))


def test_no_stage_before_the_last_may_be_empty() -> None:
    with pytest.raises(ValueError, match="only the last stage may be without layers"):
        parse_layout("base*1.5 | | base*0.5 idm*1", 3, StageLayers(2, 1))


def test_what_came_before_a_stage_is_told() -> None:
    placement = parse_layout("base*2.5 | base*0.5 idm*1 | idm*1", 3, StageLayers(3, 2))
    assert [placement.done_before("base", stage) for stage in range(3)] == [0, 2.5, 3]
    assert [placement.complete_before("base", stage) for stage in range(3)] == [False, False, True]
    assert (placement.last_stage_of("base"), placement.last_stage_of("idm")) == (1, 2)
