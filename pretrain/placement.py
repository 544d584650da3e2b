"""Which layers each pipeline stage holds, so that all stages take equally long.

The layers of a training stage form one chain, base then IDM then policy, cut into consecutive runs, between two blocks
or between a block's attention and its MLP: the same state crosses either way. The embedding is on the first pipeline
stage; world model, token head and losses are on the last. A frozen layer costs its forward pass, a trained one about
three times as much; costs are the FLOPs of `pretrain.flops`.
"""

import re
from functools import cache
from itertools import accumulate, pairwise
from math import ceil, floor, inf
from typing import NamedTuple

from pretrain.config import RunConfig
from pretrain.flops import flops_per_token, half_block_flops

PARTS_IN_ORDER = ("base", "idm", "policy")
_ITEM = re.compile(r"(base|idm|policy)\*(\d+(?:\.5)?)")


class BlockHalves(NamedTuple):
    """Which halves of a decoder block a pipeline stage holds."""

    attention: bool = True
    mlp: bool = True


class HalfCounts(NamedTuple):
    """Numbers of halves of blocks."""

    attention: int
    mlp: int


class StageLayers(NamedTuple):
    """Numbers of decoder blocks of each part on one pipeline stage; attention and MLP are half a block each."""

    base: float = 0
    idm: float = 0
    policy: float = 0

    def __str__(self) -> str:
        return (
            " ".join(f"{part}*{count:g}" for part, count in self._asdict().items() if count) or "(heads only)"
        )


class Placement(NamedTuple):
    """The layers of every pipeline stage, first to last."""

    stages: tuple[StageLayers, ...]

    def __str__(self) -> str:
        return " | ".join("" if stage == StageLayers() else str(stage) for stage in self.stages)

    def layers_by_stage(self, part: str) -> list[float]:
        """Blocks of `part` on each stage."""
        return [getattr(stage, part) for stage in self.stages]

    def blocks_on(self, part: str, stage: int) -> list[BlockHalves]:
        """The blocks of `part` that are on `stage`, wholly or by half, in order."""
        begin, end = self.done_before(part, stage), self.done_before(part, stage + 1)
        return [
            BlockHalves(attention=begin <= block, mlp=block + 1 <= end)
            for block in range(floor(begin), ceil(end))
        ]

    def halves_on(self, part: str, stage: int) -> HalfCounts:
        """How many attentions and how many MLPs of `part` are on `stage`."""
        blocks = self.blocks_on(part, stage)
        return HalfCounts(sum(block.attention for block in blocks), sum(block.mlp for block in blocks))

    def done_before(self, part: str, stage: int) -> float:
        """Blocks of `part` on the stages before `stage`."""
        return sum(self.layers_by_stage(part)[:stage])

    def complete_before(self, part: str, stage: int) -> bool:
        """Whether the stages before `stage` hold all of `part`."""
        return self.done_before(part, stage) == sum(self.layers_by_stage(part))

    def last_stage_of(self, part: str) -> int:
        """The stage that holds the last block of `part`."""
        return max(stage for stage, layers in enumerate(self.layers_by_stage(part)) if layers)


def chain_layers(config: RunConfig) -> StageLayers:
    """Blocks of each part that the stage of `config` runs."""
    actions = config.actions
    return StageLayers(
        base=config.model.num_layers,
        idm=actions.num_idm_layers if config.stage != "base" else 0,
        policy=actions.num_policy_layers if config.stage == "policy" else 0,
    )


@cache  # a plan asks dozens of times, and 90 layers on 8 stages take 50 ms
def place_layers(config: RunConfig) -> Placement:
    """The layout the recipe asks for, else the one whose slowest pipeline stage is fastest.

    Raises:
        ValueError: if `parallel.pipeline_layout` is not a layout of this model.
    """
    size = config.parallel.pipeline_parallel_size
    if config.parallel.pipeline_layout is not None:
        return parse_layout(config.parallel.pipeline_layout, size, chain_layers(config))
    return _balanced(config, size)


def parse_layout(text: str, pipeline_parallel_size: int, chain: StageLayers) -> Placement:
    """Read "base*28 | base*4 idm*4": a run of layers for each pipeline stage.

    In "base*27.5 | base*4.5 idm*4" the 28th block's attention is on the first stage, its MLP on the second.

    Raises:
        ValueError: with what is wrong.
    """
    stages, order = [], []
    for stage_text in text.split("|"):
        items = stage_text.split()
        matches = [_ITEM.fullmatch(item) for item in items]
        if not all(matches):
            raise ValueError(f"'{stage_text.strip()}' is not a run such as 'base*4.5 idm*4'")
        pairs = [(match[1], float(match[2])) for match in matches if match]
        if len(dict(pairs)) < len(pairs):
            raise ValueError(f"'{stage_text.strip()}' names a part twice; add its layers up")
        order += [PARTS_IN_ORDER.index(part) for part, _ in pairs]
        stages.append(StageLayers(**dict(pairs)))
    if len(stages) != pipeline_parallel_size:
        raise ValueError(
            f"has {len(stages)} stages for parallel.pipeline_parallel_size {pipeline_parallel_size}"
        )
    if order != sorted(order):
        raise ValueError("layers must stand in the order base, idm, policy")
    placement = Placement(tuple(stages))
    sums = StageLayers(*(sum(placement.layers_by_stage(part)) for part in PARTS_IN_ORDER))
    if sums != chain:
        raise ValueError(f"places {sums}, the model has {chain}")
    if stages[0].base == 0:
        raise ValueError("the first stage must hold base layers")
    if not all(map(any, stages[:-1])):
        raise ValueError("only the last stage may be without layers")
    return placement


def stage_costs(config: RunConfig, placement: Placement) -> list[float]:
    """FLOPs a token of each pipeline stage, forward and backward."""
    half_costs = _half_costs(config)
    costs = [
        sum(
            count * cost
            for part in PARTS_IN_ORDER
            for count, cost in zip(placement.halves_on(part, stage), half_costs[part], strict=True)
        )
        for stage in range(len(placement.stages))
    ]
    costs[-1] += last_stage_extra(config)
    return costs


def balance(config: RunConfig, placement: Placement) -> float:
    """Mean over maximum of the stages' costs: the part of the pipeline's time that is not waiting."""
    costs = stage_costs(config, placement)
    return sum(costs) / len(costs) / max(costs)


def _half_costs(config: RunConfig) -> dict[str, tuple[float, float]]:
    """FLOPs a token of a block's attention and of its MLP, by part."""
    attention, mlp = half_block_flops(config.model, config.data.sequence_length)
    factors = {part: 3 if part == config.stage else 1 for part in PARTS_IN_ORDER}
    return {part: (factor * attention, factor * mlp) for part, factor in factors.items()}


def last_stage_extra(config: RunConfig) -> float:
    """FLOPs a token of what always is on the last pipeline stage: world model, heads, losses."""
    half_costs = _half_costs(config)
    layers = sum(count * sum(half_costs[part]) for part, count in chain_layers(config)._asdict().items())
    return sum(flops_per_token(config).values()) - layers


def _balanced(config: RunConfig, size: int) -> Placement:
    """Cut the chain into `size` runs with the least possible maximum cost.

    Ties go to fewer cuts within blocks, then to later cuts.
    """
    chain, half_costs = chain_layers(config), _half_costs(config)
    halves = [part for part in PARTS_IN_ORDER for _ in range(2 * int(getattr(chain, part)))]
    costs = [half_costs[part][index % 2] for index, part in enumerate(halves)]
    sums = list(accumulate(costs, initial=0.0))
    # World model and token head can fill a last stage without layers in stage `idm`, where they are trained through.
    least_on_last = 0 if config.stage == "idm" else 1
    extra = last_stage_extra(config)
    least = _best_cut(sums, extra, size, least_on_last, goal=0.0).slowest
    ends = _best_cut(sums, extra, size, least_on_last, goal=least).ends
    runs = [halves[first:end] for first, end in pairwise((0, *ends))]
    return Placement(tuple(StageLayers(*(run.count(part) / 2 for part in PARTS_IN_ORDER)) for run in runs))


class _Cut(NamedTuple):
    slowest: float
    """Cost of the slowest stage, or the goal if that is more."""
    within_blocks: int
    """Cuts between attention and MLP."""
    ends: tuple[int, ...]
    """Half blocks that are done at the end of each stage."""


def _best_cut(sums: list[float], last_extra: float, size: int, least_on_last: int, goal: float) -> _Cut:
    """The cut into `size` runs of half blocks whose first i cost `sums[i]`; what is below `goal` is fast enough.

    So with the least possible cost as `goal`, the fewest cuts within blocks that reach it.
    """
    last = len(sums) - 1

    @cache
    def best(first: int, stages: int) -> _Cut:
        """Of the half blocks from `first` on, on `stages` stages."""
        if stages == 1:
            cost = sums[last] - sums[first] + last_extra if last - first >= least_on_last else inf
            return _Cut(max(cost, goal), 0, (last,))
        found = _Cut(inf, 0, ())
        for end in range(first + 1, last + 1):  # no stage but the last may be without layers
            cost = sums[end] - sums[first]
            if cost > found.slowest:
                break
            rest = best(end, stages - 1)
            option = _Cut(max(cost, rest.slowest), rest.within_blocks + end % 2, (end, *rest.ends))
            if option[:2] <= found[:2]:
                found = option
        return found

    return best(0, size)
