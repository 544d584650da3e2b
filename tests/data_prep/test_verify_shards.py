"""Verification finds every kind of damage in every kind of file, and nothing where there is none."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from data_prep import verify_shards
from data_prep.errors import UserError, run_cli
from data_prep.indexed_shards import bin_path, idx_path, manifest_path
from data_prep.unit_manifest import read_unit_manifest
from data_prep.verify_shards import verify
from tests.data_prep.small_shards import VOCAB_SIZE, write_blend, write_source, write_unit

FLIPS_PER_FILE = 20
MAKERS: dict[str, Callable[[Path], Path]] = {
    "source": lambda folder: write_source(folder, "wudao"),
    "blend": write_blend,
}


@pytest.fixture(params=list(MAKERS))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A source or a blend, as written."""
    return MAKERS[request.param](tmp_path / request.param)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source", "wudao")


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def names(problems: list[str], path: Path) -> bool:
    """Whether a line is about `path`."""
    return any(line.startswith(f"{path}: ") for line in problems)


def flip(path: Path, bit: int) -> bytes:
    """Flip one bit; return what the file held before."""
    before = path.read_bytes()
    after = bytearray(before)
    after[bit // 8] ^= 1 << bit % 8
    path.write_bytes(after)
    return before


def exchange(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def test_what_was_written_passes(folder: Path) -> None:
    verdict = verify(folder)
    assert verdict.problems == []
    assert verdict.files == len(files_of(folder))
    assert verdict.bytes_read == sum(path.stat().st_size for path in files_of(folder))
    assert verify(folder, workers=3).problems == []


def test_every_flipped_bit_is_found(folder: Path) -> None:
    generator = np.random.default_rng(0)
    files = files_of(folder)
    assert len(files) * FLIPS_PER_FILE >= 200  # in a source, and more in a blend
    for path in files:
        bits = 8 * path.stat().st_size
        for bit in (0, bits - 1, *generator.integers(0, bits, FLIPS_PER_FILE - 2).tolist()):
            before = flip(path, bit)
            assert names(verify(folder).problems, path), f"bit {bit} of {path.name}"
            path.write_bytes(before)
    assert verify(folder).problems == []


def test_without_the_checksum_flips_go_unnoticed(monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    tokens = bin_path(source / "train" / "part.0")
    flip(tokens, 0)  # the lowest bit of a token: another one of the vocabulary
    assert names(verify(source).problems, tokens)
    monkeypatch.setattr(verify_shards, "check_checksum", lambda *arguments: None)
    assert verify(source).problems == []


def test_every_cut_and_every_added_byte_is_found(folder: Path) -> None:
    for path in files_of(folder):
        content = path.read_bytes()
        for damaged in (b"", content[: len(content) // 2], content[:-1], content + b"\n", content + content):
            path.write_bytes(damaged)
            assert names(verify(folder).problems, path), f"{len(damaged)} bytes of {path.name}"
        path.write_bytes(content)


def test_other_ends_of_lines_are_found(folder: Path) -> None:
    for path in (path for path in files_of(folder) if path.suffix == ".json"):
        content = path.read_bytes()
        for damaged in (content.replace(b"\n", b"\r", 1), content.replace(b"\n", b"\r\n")):
            path.write_bytes(damaged)
            assert names(verify(folder).problems, path)
        path.write_bytes(content)


def test_every_missing_file_is_found(folder: Path) -> None:
    for path in files_of(folder):
        content = path.read_bytes()
        path.unlink()
        problems = verify(folder).problems
        named = folder if path.name == "blend.json" else path
        assert any(line.startswith(str(named)) for line in problems), problems
        path.write_bytes(content)


def test_exchanged_files_are_found(folder: Path) -> None:
    files = [path for path in files_of(folder) if path.parent.name in ("train", "validation")]
    for suffix in (".bin", ".idx", ".json"):
        for one, other in combinations([path for path in files if path.suffix == suffix], 2):
            exchange(one, other)
            problems = verify(folder).problems
            assert names(problems, one) and names(problems, other)
            exchange(one, other)


@pytest.mark.parametrize("paths_of", [(bin_path, idx_path), (bin_path, idx_path, manifest_path)])
def test_exchanged_shards_are_found(folder: Path, paths_of: tuple[Callable[[Path], Path], ...]) -> None:
    prefixes = [path.with_suffix("") for path in files_of(folder) if path.suffix == ".bin"]
    assert len(prefixes) == 3
    for one, other in combinations(prefixes, 2):
        for path_of in paths_of:
            exchange(path_of(one), path_of(other))
        problems = verify(folder).problems
        assert any(str(one) in line for line in problems) and any(str(other) in line for line in problems)
        for path_of in paths_of:
            exchange(path_of(one), path_of(other))


def test_stray_files_and_folders_are_found(folder: Path) -> None:
    for parent in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        for name in ("part.7.bin", "part.0.bin.partial", "part.0.json.partial", "notes.txt", ".hidden"):
            (parent / name).write_text("x")
            assert verify(folder).problems == [
                f"{parent / name}: is no file of this folder; delete it or move it elsewhere"
            ]
            (parent / name).unlink()
        (parent / "x.partial").mkdir()
        (parent / "x.partial" / "inside").write_text("x")
        assert len(verify(folder).problems) == 1
        shutil.rmtree(parent / "x.partial")


def test_all_problems_are_listed(folder: Path) -> None:
    bins = [path for path in files_of(folder) if path.suffix == ".bin"]
    for path in bins:
        flip(path, 77)
    idx_path(bins[0].with_suffix("")).unlink()
    (folder / "stray").write_text("x")
    problems = verify(folder, workers=2).problems
    assert len(problems) == 5
    assert all("\n" not in line and "; " in line for line in problems)


@pytest.mark.parametrize(
    ("vocab_size", "bad_id"), [(300, 300), (300, 65_535), (128_256, 128_256), (128_256, -1)]
)
def test_ids_outside_the_vocabulary_are_found_in_spite_of_right_checksums(
    source: Path, vocab_size: int, bad_id: int
) -> None:
    write_source(source, "wudao", vocab_size)
    assert verify(source).problems == []
    lengths = np.full(9, 7, np.int32)
    write_unit(source, "wudao", "train", "part.1", lengths=lengths, vocab_size=vocab_size, largest_id=bad_id)
    unsigned = f"{bad_id % (1 << (16 if vocab_size == 300 else 32)):,}"
    (problem,) = verify(source).problems
    assert f"part.1.bin: holds the token id {unsigned}, but the vocabulary has {vocab_size:,}" in problem


def test_a_whole_manifest_that_belongs_elsewhere_is_found(source: Path, tmp_path: Path) -> None:
    prefix = source / "train" / "part.1"
    manifest = read_unit_manifest(manifest_path(prefix))
    for change, message in (
        ({"source": "starcoder"}, "manifest of starcoder train part.1 in the place of wudao train part.1"),
        ({"split": "validation"}, "manifest of wudao validation part.1 in the place of wudao train part.1"),
        ({"unit": "part.2"}, "manifest of wudao train part.2 in the place of wudao train part.1"),
        ({"tokenizer_fingerprint": "0"}, "tokenizer_fingerprint is 0, but f"),
        ({"settings": {}}, "settings is {}, but {'text_field': 'text'} in train/part.0.json"),
        ({"documents": 7}, "counts 30 documents"),
        ({"format_version": 1}, "format version 1"),
    ):
        replace(manifest, **change).write(prefix)
        (problem,) = verify(source).problems
        assert message in problem


def test_a_folder_of_sources_is_verified_whole(tmp_path: Path) -> None:
    for name in ("wudao", "starcoder"):
        write_source(tmp_path / name, name)
    (tmp_path / "summary.json").write_text("{}")
    assert verify(tmp_path).problems == []
    flip(bin_path(tmp_path / "wudao" / "train" / "part.0"), 5)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    problems = verify(tmp_path).problems
    assert len(problems) == 3
    assert sum("empty: is no folder of tokenized data" in line for line in problems) == 1


def test_blocks_of_every_size_are_read_whole(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    for block_bytes in (4, 64, 4096):
        monkeypatch.setattr(verify_shards, "BLOCK_BYTES", block_bytes)
        assert verify(folder).problems == []


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int | str | None:
    monkeypatch.setattr("sys.argv", ["verify_shards.py", *map(str, arguments)])
    try:
        run_cli(verify_shards.main)
    except SystemExit as exit_:
        return exit_.code
    return 0


def test_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path
) -> None:
    assert run(monkeypatch, source) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("10 files, 0.000 GB in ")
    path = bin_path(source / "train" / "part.0")
    path.write_bytes(path.read_bytes()[:-2])
    assert run(monkeypatch, source, "--workers", "2") == 5
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0].startswith(f"{path}: has ")
    assert "delete part.0.json and tokenize the source again with --resume" in printed.out
    assert printed.out.splitlines()[-1].endswith(": 1 problem")
    assert f"error: {source}: 1 problem" in printed.err
    (tmp_path / "other").mkdir()
    assert run(monkeypatch, tmp_path / "other") == 2
    assert run(monkeypatch, tmp_path / "nothing") == 2
    assert "no folder of these" in capsys.readouterr().err


def test_bad_settings(source: Path) -> None:
    with pytest.raises(UserError, match="--workers 0 must be at least 1"):
        verify(source, workers=0)
    assert VOCAB_SIZE < 65_500  # two bytes a token, so that both widths are tested
