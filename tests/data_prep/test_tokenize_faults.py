"""What goes wrong on the way: kills at any moment, a full disk, bad rows and files, an engine that errs."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.errors import InputDataError, IntegrityError, UserError
from data_prep.indexed_shards import bin_path
from data_prep.output_files import file_checksum
from data_prep.readers.row_batch import TooManySkippedError
from data_prep.token_encoder import FastEncoder, TokenBatch
from data_prep.tokenize_corpus import TokenizeConfig, skipped_lines, tokenize_corpus
from data_prep.unit_manifest import SkippedInput, read_unit_manifest
from tests.data_prep.folders import digest_of_files, documents_of

SCRIPT = Path(__file__).parents[2] / "data_prep" / "tokenize_corpus.py"
KILLS = 20


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A corpus of our own: 12 files of JSON lines."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    draw = random.Random(0)
    for number in range(12):
        rows = [json.dumps({"text": f"{draw.random()} some words {row} " * 30}) for row in range(60)]
        (folder / f"{number:02d}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def config(corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> TokenizeConfig:
    return TokenizeConfig(
        source="mine", input=str(corpus), tokenizer=tokenizer_folder, output=tmp_path / "mine"
    )


def command(config: TokenizeConfig, *more: str) -> list[str]:
    settings = ("source", "input", "tokenizer", "output")
    flags = [part for name in settings for part in (f"--{name}", str(getattr(config, name)))]
    return [sys.executable, str(SCRIPT), *flags, *more]


def written(folder: Path) -> set[str]:
    """Names of the shard files and parts of them that are there."""
    return {path.name for path in folder.glob("*/*")}


def test_any_number_of_workers_or_slices_and_20_kills_write_the_same_bytes(config: TokenizeConfig) -> None:
    subprocess.run(command(config), check=True, capture_output=True)
    wanted = digest_of_files(config.output)
    assert len(wanted) == 2 * 3 * 12 + 1
    times = [path.stat().st_mtime for path in config.output.rglob("*.json")]
    work_seconds = max(times) - min(times)

    for workers in (2, 4):
        again = dataclasses.replace(config, output=config.output.with_name(f"workers{workers}"))
        tokenize_corpus(dataclasses.replace(again, workers=workers))
        assert digest_of_files(again.output) == wanted

    slices = dataclasses.replace(config, output=config.output.with_name("slices"))
    for part in ("8:", ":3", "3:8"):
        tokenize_corpus(dataclasses.replace(slices, units=part))
    assert digest_of_files(slices.output) == wanted

    killed = dataclasses.replace(config, output=config.output.with_name("killed"))
    draw = random.Random(1)
    states: list[int] = []
    for kill in range(KILLS):
        before = written(killed.output)
        process = subprocess.Popen(
            command(killed, "--resume", "--workers", str(1 + kill % 2)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while written(killed.output) == before and process.poll() is None:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, work_seconds / 3))
        process.kill()
        process.wait()
        manifests = [read_unit_manifest(path) for path in killed.output.glob("*/*.json")]
        for manifest in manifests:  # where a manifest is, its shard is whole
            prefix = killed.output / manifest.split / manifest.unit
            assert file_checksum(bin_path(prefix)) == manifest.bin_xxh3_128
        states.append(len(manifests))
        if states[-1] == 24:
            assert digest_of_files(killed.output) == wanted
            shutil.rmtree(killed.output)
    print(states)
    assert len({state for state in states if 0 < state < 24}) >= 3, f"kills hit too few moments: {states}"
    subprocess.run(command(killed, "--resume"), check=True, capture_output=True)
    assert digest_of_files(killed.output) == wanted


def test_workers_die_with_a_killed_parent(config: TokenizeConfig) -> None:
    process = subprocess.Popen(
        command(config, "--workers", "2"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    session = process.pid

    def members() -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                # A zombie has died; whoever is responsible has not yet asked how.
                if entry.name.isdigit() and int(fields[3]) == session and fields[0] != "Z":
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    deadline = time.monotonic() + 60
    while len(members()) < 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)  # the parent, the resource tracker and two workers
    assert len(members()) >= 4
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while members() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not members()


def test_a_full_disk_stops_cleanly_and_goes_on_after_room_is_made(
    config: TokenizeConfig, tmp_path: Path
) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        full = dataclasses.replace(config, output=mount / "out")
        result = subprocess.run(command(full), capture_output=True, text=True, check=False)
        assert result.returncode == 4
        message = result.stderr.strip().splitlines()[-1]
        assert message.startswith("error: ")
        assert "No space left on device; make room" in message
        assert "Traceback" not in result.stderr
        assert not list(full.output.rglob("*.partial"))
        assert list((full.output / "train").glob("*.json"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(mount)], check=True)
        tokenize_corpus(dataclasses.replace(full, resume=True))
        tokenize_corpus(config)
        assert digest_of_files(full.output) == digest_of_files(config.output)
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def damage(corpus: Path) -> None:
    """One bad row in one file; one file that is no file of its kind; one row of broken Unicode."""
    rows = (corpus / "03.jsonl").read_text().splitlines()
    rows[10], rows[11] = "{broken", '{"text": "\\ud800"}'
    (corpus / "03.jsonl").write_text("\n".join(rows) + "\n")
    (corpus / "05.jsonl").unlink()
    pq.write_table(pa.table({"other": ["x"]}), corpus / "05.parquet")


def test_bad_rows_and_files_stop_by_default_with_their_own_exit_code(
    config: TokenizeConfig, corpus: Path
) -> None:
    damage(corpus)
    result = subprocess.run(command(config), capture_output=True, text=True, check=False)
    assert result.returncode == 3
    message = result.stderr.strip().splitlines()[-1]
    assert "03.jsonl: row 11 is not JSON" in message
    assert "--on-error skip" in message
    assert len(list((config.output / "train").glob("*.json"))) == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_skipping_counts_lists_and_has_a_ceiling(config: TokenizeConfig, corpus: Path, workers: int) -> None:
    damage(corpus)
    skipping = dataclasses.replace(config, on_error="skip", max_skipped=2, workers=workers)
    manifests = tokenize_corpus(skipping)
    skipped = {manifest.source_file: manifest.skipped for manifest in manifests if manifest.skipped}
    assert list(skipped) == ["03.jsonl", "05.parquet"]
    assert [entry.row for entry in skipped["03.jsonl"]] == [11]
    (whole_file,) = skipped["05.parquet"]
    assert whole_file.row is None
    assert "has no column 'text'" in whole_file.reason
    dropped = sum((Counter(manifest.dropped) for manifest in manifests), Counter())
    assert dropped == Counter(invalid_unicode=1)
    assert sum(manifest.documents for manifest in manifests) == 11 * 60 - 2
    assert [line.split(": ")[1] for line in skipped_lines(manifests)] == ["03.jsonl", "05.parquet"]
    shutil.rmtree(config.output)
    with pytest.raises(TooManySkippedError, match=r"2 rows and files were skipped.*--max-skipped 1"):
        tokenize_corpus(dataclasses.replace(skipping, max_skipped=1))


def test_long_lists_of_skipped_rows_are_cut(config: TokenizeConfig) -> None:
    manifests = tokenize_corpus(config)
    many = dataclasses.replace(
        manifests[0], skipped=[SkippedInput(row=row, reason="x") for row in range(1, 9)]
    )
    lines = skipped_lines([many])
    assert (len(lines), lines[-1]) == (6, "... and 3 more, in the manifests")


def test_an_engine_that_errs_stops_the_run_and_leaves_nothing_of_the_file(
    config: TokenizeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = FastEncoder.encode

    def wrong(self: FastEncoder, texts: list[str]) -> TokenBatch:
        ids, offsets = right(self, texts)
        ids = ids.copy()
        ids[: len(texts) > 1] += 1  # the probe is one text
        return TokenBatch(ids, offsets)

    monkeypatch.setattr(FastEncoder, "encode", wrong)
    with pytest.raises(IntegrityError, match=r"00\.jsonl: document 1: token 1 of the fast engine"):
        tokenize_corpus(config)
    assert not config.output.exists()


def test_contaminated_documents_are_dropped_and_counted(
    config: TokenizeConfig, corpus: Path, tmp_path: Path
) -> None:
    leaked = json.loads((corpus / "00.jsonl").read_text().splitlines()[7])["text"]
    benchmark = tmp_path / "benchmark.jsonl"
    benchmark.write_text(json.dumps({"problem": leaked[:300]}) + "\n")
    clean = tokenize_corpus(config)
    checked = dataclasses.replace(config, output=tmp_path / "checked", decontaminate=(benchmark,))
    manifests = tokenize_corpus(checked)
    dropped = sum((Counter(manifest.dropped) for manifest in manifests), Counter())
    assert dropped["contaminated"] >= 1
    assert (
        sum(part.documents for part in clean) - sum(part.documents for part in manifests)
        == dropped["contaminated"]
    )
    prefixes = [tmp_path / "checked" / split / "00" for split in ("train", "validation")]
    assert len(documents_of(*prefixes)) < 60
    with pytest.raises(UserError, match="decontaminated_against was"):
        tokenize_corpus(dataclasses.replace(checked, decontaminate=(), resume=True))


def test_a_file_that_was_fetched_again_is_made_again(config: TokenizeConfig, corpus: Path) -> None:
    tokenize_corpus(config)
    with (corpus / "04.jsonl").open("a") as stream:
        stream.write(json.dumps({"text": "one more"}) + "\n")
    before = (config.output / "train/03.bin").stat().st_mtime_ns
    manifests = tokenize_corpus(dataclasses.replace(config, resume=True))
    assert sum(manifest.documents for manifest in manifests) == 12 * 60 + 1
    assert (config.output / "train/03.bin").stat().st_mtime_ns == before


def test_the_text_field_of_an_own_corpus(config: TokenizeConfig, corpus: Path) -> None:
    with pytest.raises(InputDataError, match="has no text under the key 'body'"):
        tokenize_corpus(dataclasses.replace(config, text_field="body"))


def test_slurm_tasks_take_a_share_each(config: TokenizeConfig) -> None:
    for task in range(3):
        environment = {
            **os.environ,
            "SLURM_ARRAY_TASK_ID": str(task),
            "SLURM_ARRAY_TASK_MIN": "0",
            "SLURM_ARRAY_TASK_MAX": "2",
            "SLURM_ARRAY_TASK_COUNT": "3",
        }
        subprocess.run(command(config), check=True, capture_output=True, env=environment)
        assert len(list((config.output / "train").glob("*.json"))) == 4 * (task + 1)
    whole = dataclasses.replace(config, output=config.output.with_name("whole"))
    tokenize_corpus(whole)
    assert digest_of_files(config.output) == digest_of_files(whole.output)
