"""The folder of a blend: the same bytes however the work is shared out, interrupted, killed or out of space."""

import dataclasses
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from data_prep.blend import BlendConfig, blend
from data_prep.blended_data import read_blend_manifest
from data_prep.blending.writer import BlendWriter
from data_prep.block_checksums import blocks_path
from data_prep.errors import UserError
from data_prep.indexed_shards import ShardWriter, bin_path, manifest_path
from data_prep.output_files import read_sealed_json, write_sealed_json
from tests.data_prep.folders import digest_of_files
from tests.data_prep.token_sources import make_world

SCRIPT = Path(__file__).parents[3] / "data_prep" / "blend.py"


@pytest.fixture(scope="module")
def blend_config(tmp_path_factory: pytest.TempPathFactory) -> BlendConfig:
    """Four sources of documents that are all different, in four shards with the published weights."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def blend_folder(blend_config: BlendConfig) -> Path:
    """The blend, written by one process."""
    assert blend(blend_config) is not None
    return blend_config.output


def test_resume_after_an_interruption_gives_the_same_bytes(
    blend_config: BlendConfig, blend_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(blend_config, output=tmp_path / "blend")
    plain_add, calls = ShardWriter.add_documents, 0

    def add_until_interrupted(writer: ShardWriter, tokens: np.ndarray, lengths: np.ndarray) -> None:
        nonlocal calls
        calls += 1
        plain_add(writer, tokens, lengths)
        if calls > 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add_documents", add_until_interrupted)
        with pytest.raises(KeyboardInterrupt):
            blend(config)
    names = {path.name for path in config.output.rglob("*")}
    assert "blend.json" not in names
    assert not [name for name in names if name.endswith(".partial")]
    assert 0 < len(list(config.output.rglob("*.bin"))) < 8
    with pytest.raises(UserError, match="--resume"):
        blend(config)
    with pytest.raises(UserError, match=r"other settings.*--overwrite"):
        blend(dataclasses.replace(config, seed=1, resume=True))
    with pytest.raises(UserError, match=r"shard_00001\.json: was written from other settings.*--overwrite"):
        blend(dataclasses.replace(config, shard_tokens=10**9, resume=True))
    blend(dataclasses.replace(config, resume=True))
    assert digest_of_files(config.output) == digest_of_files(blend_folder)
    damaged = bin_path(config.output / "train/shard_00001")
    damaged.write_bytes(damaged.read_bytes()[:-2])
    blend(dataclasses.replace(config, resume=True))
    assert digest_of_files(config.output) == digest_of_files(blend_folder)
    blend(dataclasses.replace(config, overwrite=True, weights={"wudao": 1.0}, total_tokens=20_000))
    assert {path.name for path in (config.output / "validation").glob("*.bin")} == {"wudao.bin"}


def test_a_finished_blend_is_resumed_without_a_look_at_the_index(
    blend_config: BlendConfig, blend_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(blend_folder, tmp_path / "blend")
    (tmp_path / "blend/blend.json").unlink()
    monkeypatch.setattr(BlendWriter, "_write", None)
    monkeypatch.setattr("data_prep.blending.plan.check_units", None)
    blend(dataclasses.replace(blend_config, output=tmp_path / "blend", resume=True))
    assert digest_of_files(tmp_path / "blend") == digest_of_files(blend_folder)


def test_slices_give_the_same_bytes_as_one_process(
    blend_config: BlendConfig,
    blend_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = dataclasses.replace(blend_config, output=tmp_path / "slices")
    assert blend(dataclasses.replace(config, shards="2:")) is None
    assert (
        "2 of 4 train shards are done; parts of the blend that are still missing: 7, the"
        in capsys.readouterr().out
    )
    assert {path.name for path in config.output.iterdir()} == {"train"}
    assert blend(dataclasses.replace(config, shards="1:2")) is None
    assert "still missing: 6, the first is tokenizer" in capsys.readouterr().out
    assert not (config.output / "blend.json").exists()
    assert blend(dataclasses.replace(config, shards=":1")) == read_blend_manifest(blend_folder)
    assert digest_of_files(config.output) == digest_of_files(blend_folder)
    with pytest.raises(UserError, match="slice '4:9' holds nothing of the 4 there are"):
        blend(dataclasses.replace(config, shards="4:9"))
    with pytest.raises(UserError, match="--overwrite would delete other tasks' shards"):
        blend(dataclasses.replace(config, shards="0:1", overwrite=True))
    array = dataclasses.replace(blend_config, output=tmp_path / "array")
    for name, value in {"MIN": "1", "MAX": "5", "STEP": "2", "COUNT": "3"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    for task in ("5", "1", "3"):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
        result = blend(array)
    assert result is not None
    assert digest_of_files(array.output) == digest_of_files(blend_folder)


def test_whoever_finishes_last_tidies_up(
    blend_config: BlendConfig, blend_folder: Path, tmp_path: Path
) -> None:
    config = dataclasses.replace(blend_config, output=tmp_path / "blend", resume=True)
    shutil.copytree(blend_folder, config.output)
    manifest_path(config.output / "train/shard_00002").unlink()
    blocks_path(config.output / "train/shard_00001").unlink()
    (config.output / "tokenizer.partial").mkdir()
    for name in (
        "train/shard_00002.bin.partial",
        "validation/wudao.json.partial",
        "blend.json.node.1.partial",
    ):
        (config.output / name).write_text("left by a killed process")
    assert blend(config) is not None
    assert digest_of_files(config.output) == digest_of_files(blend_folder)


def test_shards_of_an_older_version_are_not_mixed_with_new_ones(
    blend_config: BlendConfig, blend_folder: Path, tmp_path: Path
) -> None:
    config = dataclasses.replace(blend_config, output=tmp_path / "blend", resume=True)
    shutil.copytree(blend_folder, config.output)
    path = manifest_path(config.output / "train/shard_00002")
    write_sealed_json(path, read_sealed_json(path, "") | {"format_version": 2})
    with pytest.raises(
        UserError, match=r"shard_00002\.json: was written by another version; pass --overwrite"
    ):
        blend(config)


KILLED_RUN = """
import sys
sys.path.insert(0, {root!r})
from data_prep.blend import blend, parse_arguments
config = parse_arguments(sys.argv[1:])
print("ready", flush=True)
blend(config)
print("done", flush=True)
"""


def test_kill_at_any_moment_and_resume(blend_config: BlendConfig, blend_folder: Path, tmp_path: Path) -> None:
    """The last blend.json is the whole run's, though each run before was killed without a chance to tidy up."""
    whole = dataclasses.replace(blend_config, output=tmp_path / "whole", shard_tokens=4_000)
    start = time.monotonic()
    blend(whole)
    seconds = time.monotonic() - start
    recipe = tmp_path / "recipe.yaml"
    fields = {"tokenized": whole.tokenized, "tokenizer": whole.tokenizer, "output": tmp_path / "killed"}
    recipe.write_text(
        yaml.safe_dump(
            {name: str(path) for name, path in fields.items()}
            | {"total_tokens": whole.total_tokens, "shard_tokens": 4_000, "validation_tokens": 5_000}
        )
    )
    code = KILLED_RUN.format(root=str(SCRIPT.parents[1]))
    chance = random.Random(0)
    kills = 0
    while True:
        command = [sys.executable, "-c", code, "--config", str(recipe), "--resume"]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            if kills < 5:
                time.sleep(chance.uniform(0.05, 0.4) * seconds)
                process.kill()
            output = process.stdout.read()
        if process.returncode == 0:
            break
        kills += 1
    assert kills >= 3
    assert output.endswith("done\n")
    assert digest_of_files(tmp_path / "killed") == digest_of_files(whole.output)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 100 kB, which holds a part of the blend."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mount.returncode:
        pytest.skip(f"cannot mount a small file system: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_leaves_finished_shards_and_nothing_half_written(
    blend_config: BlendConfig, blend_folder: Path, small_disk: Path
) -> None:
    recipe = small_disk.parent / "recipe.yaml"
    fields = {"tokenized": blend_config.tokenized, "tokenizer": blend_config.tokenizer}
    recipe.write_text(
        yaml.safe_dump(
            {name: str(path) for name, path in fields.items()}
            | {"output": str(small_disk / "blend"), "total_tokens": blend_config.total_tokens}
            | {"shard_tokens": blend_config.shard_tokens, "validation_tokens": blend_config.validation_tokens}
        )
    )
    command = [sys.executable, str(SCRIPT), "--config", str(recipe)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 4
    assert re.fullmatch(
        r"error: .*No space left on device; make room.*--resume.*", result.stderr.splitlines()[-1]
    )
    assert "Traceback" not in result.stderr
    left = digest_of_files(small_disk / "blend")
    assert not [name for name in left if name.endswith(".partial")]
    finished = [name for name in left if name.endswith(".json") and name.startswith(("train", "validation"))]
    assert finished
    assert left.items() <= digest_of_files(blend_folder).items()
    subprocess.run(["mount", "-o", "remount,size=10m", str(small_disk)], check=True)
    before = {name: (small_disk / "blend" / name).stat().st_mtime_ns for name in finished}
    blend(dataclasses.replace(blend_config, output=small_disk / "blend", resume=True))
    assert digest_of_files(small_disk / "blend") == digest_of_files(blend_folder)
    assert {name: (small_disk / "blend" / name).stat().st_mtime_ns for name in finished} == before


def test_a_tokenized_corpus_is_not_overwritten(blend_config: BlendConfig, tmp_path: Path) -> None:
    shutil.copytree(blend_config.tokenized, tmp_path / "tokenized")
    before = digest_of_files(tmp_path)
    with pytest.raises(UserError, match="is a tokenized corpus"):
        blend(dataclasses.replace(blend_config, output=tmp_path / "tokenized/wudao", overwrite=True))
    assert digest_of_files(tmp_path) == before
