"""The plan of a soak: a pure function of the number of faults, the seed and what this machine can do."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from soak.faults import KINDS, Fault, FaultName, Group

CHECKPOINT_INTERVAL_STEPS = 10
# A turn of 25: each kind, and the commoner ones more often. However many of them are taken from the front, every
# fault of group `down` has one of group `ending` before it that brings the run down.
TURN: tuple[FaultName, ...] = (
    "kill_rank", "flip_bit", "nan_gradient", "kill_writer", "sigterm_rank", "truncate_file", "kill_all_ranks_mid_save",
    "delete_file", "hang_rank", "corrupt_data", "fill_disk", "kill_launcher", "flip_bit", "stop_writer",
    "sigusr1_launcher", "truncate_file", "kill_while_starting", "kill_all_ranks", "delete_file", "kill_rank_mid_save",
    "flip_bit", "nan_gradient", "kill_rank", "kill_writer", "sigterm_rank",
)  # fmt: skip
# Steps that a fault may take beyond those that it waits for: until a save comes, fails and is made good.
SPARE_STEPS = {"passing": 4 * CHECKPOINT_INTERVAL_STEPS, "ending": 2 * CHECKPOINT_INTERVAL_STEPS, "down": 0}
STOPPED_WRITER_STEPS = 300  # until its time is up
LAST_DELAY_SECONDS = 0.2
LONGEST_START_SECONDS = 6.0


@dataclass(frozen=True, kw_only=True)
class StartPlan:
    """What happens from one start to the next."""

    passing: Fault | None
    """First."""
    ending: Fault
    """Then."""
    down: Fault | None
    """Before the next start."""


@dataclass(frozen=True, kw_only=True)
class SoakPlan:
    """All faults of a soak."""

    steps: int
    """Optimizer steps of the run: enough for all of them."""
    starts: tuple[StartPlan, ...]
    """One after another; a last start without faults follows."""
    nan_gradients: tuple[Fault, ...]
    """In their steps; these are in the uninterrupted run too."""

    @property
    def faults(self) -> list[Fault]:
        """All of them."""
        planned = [(start.passing, start.ending, start.down) for start in self.starts]
        return [fault for start in planned for fault in start if fault] + list(self.nan_gradients)

    @property
    def nan_steps(self) -> list[int]:
        """Steps of the run whose gradient is made NaN."""
        return [fault.after_steps for fault in self.nan_gradients]


def make_plan(faults: int, seed: int, ranks: int, left_out: Sequence[FaultName] = ()) -> SoakPlan:
    """A plan of `faults` faults on a run of `ranks` ranks, without the kinds that are `left_out`.

    One start more than the faults ask for where a fault of group `down` or `passing` would have none.
    """
    generator = random.Random(seed)
    turn = [name for name in TURN if name not in left_out]
    names = [turn[index % len(turn)] for index in range(faults)]
    counts: Counter[FaultName] = Counter()
    groups: dict[Group, list[Fault]] = {"passing": [], "ending": [], "down": []}
    nan_gradients: list[Fault] = []
    for name in names:
        fault = _draw(name, counts[name], ranks, generator)
        counts[name] += 1
        (nan_gradients if name == "nan_gradient" else groups[KINDS[name].group]).append(fault)
    for group in groups.values():
        generator.shuffle(group)
    starts = _in_starts(groups, ranks, generator)
    steps = CHECKPOINT_INTERVAL_STEPS * 3 + sum(_steps_of(start) for start in starts)
    free = range(3, steps - 2, 3)  # two in a row might be one too many
    nan_steps = sorted(generator.sample(free, len(nan_gradients)))
    return SoakPlan(
        steps=steps,
        starts=tuple(starts),
        nan_gradients=tuple(
            Fault(
                name="nan_gradient", after_steps=step, delay_seconds=0.0, rank=fault.rank, place=fault.place
            )
            for step, fault in zip(nan_steps, nan_gradients, strict=True)
        ),
    )


def _draw(name: FaultName, turn: int, ranks: int, generator: random.Random) -> Fault:
    """One fault of a kind; `turn`: how many of the kind came before."""
    variants = KINDS[name].variants
    starting = name == "kill_while_starting"
    return Fault(
        name=name,
        variant=variants[turn % len(variants)],
        after_steps=0 if starting else generator.randint(2, 2 * CHECKPOINT_INTERVAL_STEPS),
        delay_seconds=generator.uniform(0.0, LONGEST_START_SECONDS if starting else LAST_DELAY_SECONDS),
        rank=generator.randrange(ranks),
        place=generator.random(),
    )


def _in_starts(groups: dict[Group, list[Fault]], ranks: int, generator: random.Random) -> list[StartPlan]:
    """Every start has an end; the others are spread over the starts, one of each group at most."""
    endings, passing, down = groups["ending"], groups["passing"], groups["down"]
    # Nothing else fits into a start that ends before its first step.
    places = [place for place, fault in enumerate(endings) if fault.name != "kill_while_starting"]
    while len(places) < max(len(passing), len(down)):
        places.append(len(endings))
        endings.append(_draw("kill_rank", 0, ranks, generator))
    passing_at = dict(zip(generator.sample(places, len(passing)), passing, strict=True))
    down_at = dict(zip(generator.sample(places, len(down)), down, strict=True))
    return [
        StartPlan(passing=passing_at.get(place), ending=ending, down=down_at.get(place))
        for place, ending in enumerate(endings)
    ]


def _steps_of(start: StartPlan) -> int:
    """Steps that a start may take."""
    faults = [fault for fault in (start.passing, start.ending) if fault]
    steps = sum(fault.after_steps + SPARE_STEPS[fault.kind.group] for fault in faults)
    return steps + STOPPED_WRITER_STEPS * sum(fault.name == "stop_writer" for fault in faults)
