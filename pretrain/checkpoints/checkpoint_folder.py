"""Checkpoint folders: what is where, and whether it is whole. Nothing here loads torch.

Layout of a run:  checkpoints/step_00000500/{weights/, optimizer/, cola.json, XXH128SUMS}
weights/ and optimizer/ are Megatron distributed checkpoints, loadable on any layout of ranks. cola.json describes
them and holds the fingerprints of the trained and the frozen tensors; XXH128SUMS has a checksum of every file. A
checkpoint is written under a name ending in `.partial` and renamed when complete, so a folder with the final name was
whole once; whether it still is, `find_damage` says. One that is not is set aside under a name ending in `.damaged`.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.errors import UserError

FORMAT_VERSION = 3
DESCRIPTION_FILE = "cola.json"
CHECKPOINTS_FOLDER = "checkpoints"
DAMAGED_SUFFIX = ".damaged"


@dataclass(frozen=True, kw_only=True)
class LoopState:
    """Where the training loop stands, besides weights, optimizer and samples."""

    skipped_steps: int = 0
    """Bad steps of the run that were skipped."""
    bad_steps_in_a_row: int = 0
    """Bad steps since the last good one."""
    recent_losses: list[float] = field(default_factory=list)
    """Losses of the last good steps, against which a spike is measured."""
    interval_steps: int = 0
    """Good steps since the last line of metrics."""
    interval_seconds: float = 0.0
    """Their time."""
    interval_sums: dict[str, float] = field(default_factory=dict)
    """Sums of their metrics."""
    interval_action_counts: list[float] | None = None
    """How often each action was chosen in them, averaged over the data-parallel ranks; None: no actions here."""


@dataclass(frozen=True, kw_only=True)
class CheckpointDescription:
    """Contents of cola.json."""

    format_version: int
    """Layout of the checkpoint; readers refuse one they do not know."""
    stage: str
    """Stage that wrote it."""
    step: int
    """Optimizer steps done."""
    consumed_samples: int
    """Sequences read so far, those of steps that were rolled back included: the place in the data."""
    consumed_tokens: int
    """Tokens of the steps done."""
    parts: list[str]
    """Model parts whose weights are inside."""
    start_from: str | None
    """Checkpoint the frozen parts came from, relative to the run folder; a fact, even if they are inside too."""
    tokenizer_fingerprint: str
    """Of the tokenizer that made the training data."""
    data_fingerprint: str
    """Of the blended shards, which together with the seed decide the order of samples."""
    recipe: dict[str, Any]
    """The resolved run configuration."""
    loop: LoopState
    """Where the training loop stood."""
    fingerprints: dict[str, str]
    """Of every trained and frozen tensor of the model, by checkpoint key."""
    megatron_version: str
    """megatron-core that wrote the files."""


def step_folder(run_folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return run_folder / CHECKPOINTS_FOLDER / f"step_{step:08d}"


def checkpoint_folders(run_folder: Path) -> list[Path]:
    """Folders with a checkpoint's name, whatever is in them, oldest first."""
    return sorted((run_folder / CHECKPOINTS_FOLDER).glob("step_*[0-9]"))


def find_checkpoints(run_folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return [folder for folder in checkpoint_folders(run_folder) if is_checkpoint(folder)]


def read_step(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step_"))


def newest_checkpoint(run_folder: Path) -> Path | None:
    """The newest complete checkpoint of a run; None if it has none yet."""
    return next(reversed(find_checkpoints(run_folder)), None)


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint meant by `path`: itself, or the newest of the run folder `path`."""
    if is_checkpoint(path):
        return path
    checkpoint = newest_checkpoint(path)
    if checkpoint is None:
        raise UserError(
            f"{path}: holds no complete checkpoint; name a run folder or a checkpoints/step_* folder"
        )
    return checkpoint


def read_description(checkpoint: Path) -> CheckpointDescription:
    """cola.json of `checkpoint`.

    Raises:
        UserError: if it is missing, damaged or of another format version.
    """
    file = checkpoint / DESCRIPTION_FILE
    try:
        fields = json.loads(file.read_text())
        if fields.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{file}: format {fields.get('format_version')}, this code reads {FORMAT_VERSION}"
            )
        return CheckpointDescription(**fields | {"loop": LoopState(**fields["loop"])})
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{file}: not found; {checkpoint} is not a complete checkpoint") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file}: damaged ({error}); use another checkpoint of the run") from None


def locate_parts(checkpoint: Path, wanted: Iterable[str] | None = None) -> dict[str, Path]:
    """Which checkpoint holds each part of the model: `checkpoint` itself, then what it started from, and so on.

    What a checkpoint started from is looked at only while a part is missing; it may be gone otherwise.

    Args:
        checkpoint: where to begin.
        wanted: parts to look for; None: all parts of the model that was saved.

    Returns:
        The parts found; those that are nowhere are left out.

    Raises:
        UserError: if a wanted part should be in a checkpoint that is gone.
    """
    current, description = checkpoint, read_description(checkpoint)
    places = dict.fromkeys(description.parts, checkpoint)
    sought = {name.split(".")[0] for name in description.fingerprints} if wanted is None else set(wanted)
    seen = {checkpoint.resolve()}
    while missing := sorted(sought - places.keys()):
        start = start_of(current, description)
        if start is None:
            break
        if not is_checkpoint(start):
            raise UserError(
                f"{current}: takes {', '.join(missing)} from {start}, which it started from and which holds no "
                "checkpoint any more; bring it back, or use a checkpoint saved with checkpoint.self_contained"
            )
        if start in seen:
            raise UserError(
                f"{current}: starts from itself, by way of {start}; its {DESCRIPTION_FILE} is wrong"
            )
        seen.add(start)
        current, description = start, read_description(start)
        places |= {part: start for part in description.parts if part not in places}
    return places


def is_checkpoint(folder: Path) -> bool:
    """Whether a complete checkpoint lies in `folder` itself."""
    return (folder / DESCRIPTION_FILE).is_file()


def start_of(checkpoint: Path, description: CheckpointDescription) -> Path | None:
    """The checkpoint that the run of `checkpoint` started from; None for a base run."""
    if description.start_from is None:
        return None
    return (checkpoint.parent.parent / description.start_from).resolve()
