"""What can happen to the run of the soak, and what has to follow.

Faults come in three groups. `passing`: the run survives it and goes on. `ending`: it ends this start, and the same
command goes on. `down`: files are damaged while the run is down, which the next start has to notice.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from data_prep.errors import HANG_EXIT_CODE, STOPPED_EXIT_CODE, InputDataError

FaultName = Literal[
    "kill_rank",
    "kill_all_ranks",
    "kill_launcher",
    "kill_rank_mid_save",
    "kill_all_ranks_mid_save",
    "kill_while_starting",
    "sigterm_rank",
    "sigusr1_launcher",
    "hang_rank",
    "flip_bit",
    "truncate_file",
    "delete_file",
    "corrupt_data",
    "nan_gradient",
    "kill_writer",
    "stop_writer",
    "fill_disk",
]
Group = Literal["passing", "ending", "down"]
KILLED_EXIT_CODE = 128 + 9


@dataclass(frozen=True, kw_only=True)
class FaultKind:
    """One kind of fault."""

    group: Group
    """See above."""
    title: str
    """What happens, for people."""
    exit_code: int | None = None
    """How the start ends that meets it; None: it does not end."""
    variants: tuple[str, ...] = ("",)
    """Taken in turn."""


# The parts of a checkpoint, each as a pattern under its folder. There is no pointer file: the listing of the run's
# checkpoints/ says which is the newest, so what can be lost are the files of a checkpoint.
CHECKPOINT_FILES = (
    "weights/*.distcp",
    "optimizer/*.distcp",
    "cola.json",
    "XXH128SUMS",
    "weights/.metadata",
    "optimizer/common.pt",
    "optimizer/.metadata",
    "weights/metadata.json",
)

KINDS: Mapping[FaultName, FaultKind] = MappingProxyType(
    {
        "kill_rank": FaultKind(group="ending", title="kill -9 of one rank", exit_code=KILLED_EXIT_CODE),
        "kill_all_ranks": FaultKind(group="ending", title="kill -9 of all ranks", exit_code=KILLED_EXIT_CODE),
        "kill_launcher": FaultKind(
            group="ending", title="kill -9 of the launcher", exit_code=KILLED_EXIT_CODE
        ),
        "kill_rank_mid_save": FaultKind(
            group="ending", title="kill -9 of one rank, mid-save", exit_code=KILLED_EXIT_CODE
        ),
        "kill_all_ranks_mid_save": FaultKind(
            group="ending", title="kill -9 of all ranks, mid-save", exit_code=KILLED_EXIT_CODE
        ),
        "kill_while_starting": FaultKind(
            group="ending", title="kill -9 of one rank, while starting", exit_code=KILLED_EXIT_CODE
        ),
        "sigterm_rank": FaultKind(group="ending", title="SIGTERM to one rank", exit_code=STOPPED_EXIT_CODE),
        "sigusr1_launcher": FaultKind(
            group="ending", title="SIGUSR1 to the launcher", exit_code=STOPPED_EXIT_CODE
        ),
        "hang_rank": FaultKind(group="ending", title="hang of one rank", exit_code=HANG_EXIT_CODE),
        "flip_bit": FaultKind(group="down", title="bit flip in a checkpoint", variants=CHECKPOINT_FILES),
        "truncate_file": FaultKind(
            group="down",
            title="truncated file of a checkpoint",
            variants=("to nothing", "to half", "by one byte"),
        ),
        "delete_file": FaultKind(
            group="down",
            title="deleted file of a checkpoint",
            variants=("cola.json", "XXH128SUMS", "weights/*.distcp"),
        ),
        "corrupt_data": FaultKind(
            group="down", title="corrupt data block (restored by hand)", exit_code=InputDataError.exit_code
        ),
        "nan_gradient": FaultKind(group="passing", title="NaN gradient on one rank"),
        "kill_writer": FaultKind(group="passing", title="kill -9 of a checkpoint writer"),
        "stop_writer": FaultKind(group="passing", title="checkpoint writer stopped (SIGSTOP)"),
        "fill_disk": FaultKind(group="passing", title="disk full while saving"),
    }
)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault of a plan."""

    name: FaultName
    variant: str = ""
    """One of the kind's."""
    after_steps: int
    """It strikes when so many new steps are done since the last fault (or, `nan_gradient`: in this step of the run)."""
    delay_seconds: float
    """And so much later."""
    rank: int
    """Whom it strikes, where it strikes one rank."""
    place: float
    """Where in a file it strikes, from 0 to 1."""

    @property
    def kind(self) -> FaultKind:
        """What it is."""
        return KINDS[self.name]
