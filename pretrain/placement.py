"""Which layers each pipeline stage holds, so that all stages take equally long.

The layers of a training stage form one chain, base then IDM then policy, cut into consecutive runs. The embedding is
on the first pipeline stage; world model, token head and losses are on the last. A frozen layer costs its forward
pass, a trained one about three times as much; costs are the FLOPs of `pretrain.flops`.
"""

import re
from functools import cache
from typing import NamedTuple

from pretrain.config import RunConfig
from pretrain.flops import block_flops, flops_per_token

PARTS_IN_ORDER = ("base", "idm", "policy")
_ITEM = re.compile(r"(base|idm|policy)\*(\d+)")


class StageLayers(NamedTuple):
    """Numbers of decoder blocks of each part on one pipeline stage."""

    base: int = 0
    idm: int = 0
    policy: int = 0

    def __str__(self) -> str:
        return (
            " ".join(f"{part}*{count}" for part, count in self._asdict().items() if count) or "(heads only)"
        )


class Placement(NamedTuple):
    """The layers of every pipeline stage, first to last."""

    stages: tuple[StageLayers, ...]

    def __str__(self) -> str:
        return " | ".join("" if stage == StageLayers() else str(stage) for stage in self.stages)

    def layers_by_stage(self, part: str) -> list[int]:
        """Blocks of `part` on each stage."""
        return [getattr(stage, part) for stage in self.stages]

    def done_before(self, part: str, stage: int) -> int:
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


def place_layers(config: RunConfig) -> Placement:
    """The layout the recipe asks for, else the one whose slowest pipeline stage is fastest.

    Raises:
        ValueError: if `parallel.pipeline_layout` is not a layout of this model.
    """
    size = config.parallel.pipeline_parallel_size
    if config.parallel.pipeline_layout is not None:
        return parse_layout(config.parallel.pipeline_layout, size, chain_layers(config))
    costs, extra = _layer_costs(config), last_stage_extra(config)
    return _balanced(chain_layers(config), costs, extra, size, config.stage == "idm")


def parse_layout(text: str, pipeline_parallel_size: int, chain: StageLayers) -> Placement:
    """Read "base*28 | base*4 idm*4": a run of layers for each pipeline stage.

    Raises:
        ValueError: with what is wrong.
    """
    stages, order = [], []
    for stage_text in text.split("|"):
        items = stage_text.split()
        matches = [_ITEM.fullmatch(item) for item in items]
        if not all(matches):
            raise ValueError(f"'{stage_text.strip()}' is not a run such as 'base*4 idm*4'")
        pairs = [(match[1], int(match[2])) for match in matches if match]
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
    return placement


def stage_costs(config: RunConfig, placement: Placement) -> list[float]:
    """FLOPs a token of each pipeline stage, forward and backward."""
    layer_cost = _layer_costs(config)
    costs: list[float] = [
        sum(count * cost for count, cost in zip(stage, layer_cost, strict=True)) for stage in placement.stages
    ]
    costs[-1] += last_stage_extra(config)
    return costs


def balance(config: RunConfig, placement: Placement) -> float:
    """Mean over maximum of the stages' costs: the part of the pipeline's time that is not waiting."""
    costs = stage_costs(config, placement)
    return sum(costs) / len(costs) / max(costs)


def _layer_costs(config: RunConfig) -> StageLayers:
    block = block_flops(config.model, config.data.sequence_length)
    return StageLayers(*(block * (3 if part == config.stage else 1) for part in PARTS_IN_ORDER))  # type: ignore[arg-type]


def last_stage_extra(config: RunConfig) -> float:
    """FLOPs a token of what always is on the last pipeline stage: world model, heads, losses."""
    layers = sum(count * cost for count, cost in zip(chain_layers(config), _layer_costs(config), strict=True))
    return sum(flops_per_token(config).values()) - layers


def _balanced(
    chain: StageLayers, costs: StageLayers, last_extra: float, size: int, last_may_be_heads: bool
) -> Placement:
    """Cut the chain into `size` runs with the least possible maximum cost; ties go to later cuts.

    World model and token head can fill a last stage without layers in stage `idm`, where they are trained through.
    """
    units = [part for part, count in zip(PARTS_IN_ORDER, chain, strict=True) for _ in range(count)]
    prefix = [0.0]
    for part in units:
        prefix.append(prefix[-1] + getattr(costs, part))

    @cache
    def best(first: int, stages: int) -> tuple[float, tuple[int, ...]]:
        """Least maximum of units[first:] on `stages` stages, and where they end."""
        if stages == 1:
            if first == len(units) and not last_may_be_heads:
                return float("inf"), (first,)
            return prefix[-1] - prefix[first] + last_extra, (len(units),)
        options = []
        for end in range(len(units), first, -1):  # no stage but the last may be without layers
            rest, ends = best(end, stages - 1)
            options.append((max(prefix[end] - prefix[first], rest), (end, *ends)))
        return min(options, key=lambda option: option[0], default=(float("inf"), ()))

    ends = best(0, size)[1]
    stages, first = [], 0
    for end in ends:
        stages.append(StageLayers(*(units[first:end].count(part) for part in PARTS_IN_ORDER)))
        first = end
    return Placement(tuple(stages))
