"""What the soak does to a checkpoint is damage, of the kind that was planned."""

import shutil
from pathlib import Path

import pytest

from data_prep.checksum_list import find_damage
from pretrain.checkpoints.checkpoint_folder import newest_checkpoint
from soak.damage import corrupt_file, damage_checkpoint
from soak.faults import KINDS, Fault, FaultName

DAMAGES: list[tuple[FaultName, str]] = [
    (name, variant)
    for name in ("flip_bit", "truncate_file", "delete_file")
    for variant in KINDS[name].variants
]


@pytest.mark.parametrize(("name", "variant"), DAMAGES)
def test_every_damage_is_one(trained_run: Path, tmp_path: Path, name: FaultName, variant: str) -> None:
    newest = newest_checkpoint(trained_run)
    assert newest is not None and find_damage(newest) is None
    checkpoint = Path(shutil.copytree(newest, tmp_path / newest.name))
    fault = Fault(name=name, variant=variant, after_steps=0, delay_seconds=0.0, rank=0, place=0.4)
    told = damage_checkpoint(checkpoint, fault)
    assert find_damage(checkpoint) is not None
    changed = {
        path.relative_to(newest)
        for path in newest.rglob("*")
        if path.is_file()
        and not (
            (copy := checkpoint / path.relative_to(newest)).exists()
            and copy.read_bytes() == path.read_bytes()
        )
    }
    assert len(changed) == 1 and str(changed.pop()) in told


def test_corrupt_file_is_made_whole_again(tmp_path: Path) -> None:
    file = tmp_path / "shard.bin"
    file.write_bytes(bytes(1000))
    with corrupt_file(file, 0.5) as told:
        assert sum(file.read_bytes()) == 1 << 0 and "byte 500" in told
    assert file.read_bytes() == bytes(1000) and list(tmp_path.iterdir()) == [file]
