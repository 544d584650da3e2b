"""Blending on disk: nothing lost, weights kept in every shard, validation apart, resume, and bad input."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from data_prep.blend import COLA_WEIGHTS, BlendConfig, blend, parse_arguments, read_config
from data_prep.blended_data import read_blend_manifest
from data_prep.corpus_readers import SOURCES
from data_prep.errors import UserError
from data_prep.indexed_shards import ShardWriter, bin_path, read_unit_manifest
from tests.data_prep.folders import digest_of_files, documents_of, unit_prefixes

Document = tuple[int, ...]
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def source_documents(tokenized: Path) -> dict[str, set[Document]]:
    """All train documents of each source."""
    return {source: set(documents_of(*unit_prefixes(tokenized / source / "train"))) for source in SOURCES}


@pytest.fixture(scope="module")
def shards(blend_folder: Path) -> list[list[Document]]:
    """The documents of each train shard."""
    return [documents_of(prefix) for prefix in unit_prefixes(blend_folder / "train")]


def test_every_shard_is_a_correct_blend(
    shards: list[list[Document]], source_documents: dict[str, set[Document]], blend_config: BlendConfig
) -> None:
    assert len(shards) == 4
    for shard in shards:
        for source, weight in COLA_WEIGHTS.items():
            lengths = [len(document) for document in shard if document in source_documents[source]]
            longest = max(map(len, source_documents[source]))
            assert abs(sum(lengths) - weight * blend_config.shard_tokens) <= longest


def test_realised_amounts(
    shards: list[list[Document]], blend_folder: Path, blend_config: BlendConfig
) -> None:
    manifest = read_blend_manifest(blend_folder)
    assert sum(shard.tokens for shard in manifest.train.shards) == sum(
        len(document) for shard in shards for document in shard
    )
    for name, source in manifest.sources.items():
        assert source.weight == pytest.approx(COLA_WEIGHTS[name])
        assert source.tokens_wanted == round(COLA_WEIGHTS[name] * blend_config.total_tokens)
        assert source.epochs == source.tokens_realised / source.tokens_available
    assert sum(source.documents for source in manifest.sources.values()) == sum(map(len, shards))
    assert sum(source.tokens_realised for source in manifest.sources.values()) == sum(
        shard.tokens for shard in manifest.train.shards
    )


def test_no_document_twice_and_none_of_validation(
    shards: list[list[Document]], blend_folder: Path, tokenized: Path
) -> None:
    train = Counter(document for shard in shards for document in shard)
    assert max(train.values()) == 1
    for source in SOURCES:
        validation = documents_of(*unit_prefixes(tokenized / source / "validation"))
        chosen = documents_of(blend_folder / "validation" / source)
        assert chosen
        assert set(chosen) <= set(validation)
        assert train.keys().isdisjoint(validation)


def test_whole_corpus_is_used_exactly_once(
    blend_config: BlendConfig, source_documents: dict[str, set[Document]], tmp_path: Path, tokenized: Path
) -> None:
    tokens = {source: sum(map(len, source_documents[source])) for source in ("wudao", "proof_pile_2")}
    config = dataclasses.replace(
        blend_config, output=tmp_path / "whole", weights=dict(tokens), total_tokens=sum(tokens.values())
    )
    blend(config)
    written = documents_of(*unit_prefixes(tmp_path / "whole/train"))
    everything = [document for source in tokens for document in source_documents[source]]
    assert Counter(written) == Counter(everything)
    with pytest.raises(UserError, match=r"wudao has .* wanted; lower --total-tokens to .* --allow-repeats"):
        blend(dataclasses.replace(config, output=tmp_path / "more", total_tokens=config.total_tokens + 1000))
    assert not (tmp_path / "more").exists()
    repeated = dataclasses.replace(
        config, output=tmp_path / "twice", total_tokens=2 * config.total_tokens, allow_repeats=True
    )
    blend(repeated)
    assert Counter(documents_of(*unit_prefixes(tmp_path / "twice/train"))) == Counter(everything * 2)


def test_train_documents_that_stand_in_validation_are_left_out(
    blend_config: BlendConfig, tokenized: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "tokenized"
    shutil.copytree(tokenized, copy)
    stolen = documents_of(*unit_prefixes(tokenized / "proof_pile_2/validation"))[:40]
    prefix = unit_prefixes(copy / "wudao/train")[0]
    manifest = read_unit_manifest(prefix.with_name(prefix.name + ".json"))
    with ShardWriter(prefix, np.dtype(np.uint16)) as writer:
        for document in stolen:
            writer.add(np.array(document, dtype=np.uint16))
        summary = writer.publish()
    dataclasses.replace(manifest, **dataclasses.asdict(summary)).write(prefix)
    tokens = sum(
        manifest.tokens for manifest in map(read_unit_manifest, (copy / "wudao/train").glob("*.json"))
    )
    config = dataclasses.replace(
        blend_config,
        tokenized=copy,
        output=tmp_path / "blend",
        weights={"wudao": 0.5, "proof_pile_2": 0.5},
        total_tokens=2 * tokens,
        validation_tokens=10**9,
        allow_repeats=True,
    )
    result = blend(config)
    assert result is not None
    assert result.left_out == {"in_validation": len(stolen)}
    assert set(documents_of(*unit_prefixes(tmp_path / "blend/train"))).isdisjoint(stolen)


def test_same_plan_same_bytes_other_seed_other_order(
    blend_config: BlendConfig, blend_folder: Path, tmp_path: Path
) -> None:
    blend(dataclasses.replace(blend_config, output=tmp_path / "again"))
    assert digest_of_files(tmp_path / "again") == digest_of_files(blend_folder)
    blend(dataclasses.replace(blend_config, output=tmp_path / "other", seed=1))
    other, first = (
        documents_of(folder / "train/shard_00000") for folder in (tmp_path / "other", blend_folder)
    )
    assert other != first


def test_resume_after_an_interruption_gives_the_same_bytes(
    blend_config: BlendConfig, blend_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(blend_config, output=tmp_path / "blend")
    plain_add, calls = ShardWriter.add, 0

    def add_until_interrupted(writer: ShardWriter, tokens: np.ndarray) -> None:
        nonlocal calls
        calls += 1
        if calls > 150:
            raise KeyboardInterrupt
        plain_add(writer, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", add_until_interrupted)
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
    blend(dataclasses.replace(config, resume=True))
    assert digest_of_files(config.output) == digest_of_files(blend_folder)
    damaged = bin_path(config.output / "train/shard_00001")
    damaged.write_bytes(damaged.read_bytes()[:-2])
    blend(dataclasses.replace(config, resume=True))
    assert digest_of_files(config.output) == digest_of_files(blend_folder)
    blend(dataclasses.replace(config, overwrite=True, weights={"wudao": 1.0}, total_tokens=20_000))
    assert {path.name for path in (config.output / "validation").glob("*.bin")} == {"wudao.bin"}


def test_plan_only_writes_nothing(
    blend_config: BlendConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert blend(dataclasses.replace(blend_config, output=tmp_path / "blend", plan_only=True)) is None
    assert list(tmp_path.iterdir()) == []
    table = capsys.readouterr().out
    assert all(source in table for source in SOURCES)


def test_sources_that_do_not_fit_are_refused(
    blend_config: BlendConfig, tokenized: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "tokenized"
    shutil.copytree(tokenized, copy)
    config = dataclasses.replace(blend_config, tokenized=copy, output=tmp_path / "blend")

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            blend(config)
        assert not config.output.exists()

    path = next((copy / "starcoder/train").glob("*.json"))
    original = path.read_text()
    path.write_text(json.dumps({**json.loads(original), "tokenizer_fingerprint": "another"}))
    refused(r"\.json: made with another tokenizer.*tokenize starcoder again")
    path.write_text(json.dumps({**json.loads(original), "format_version": 99}))
    refused("format version 99")
    path.write_text("{}")
    refused("format version None")
    path.write_text(json.dumps({**json.loads(original), "tokens": 1}))
    refused("does not hold what its manifest says")
    path.unlink()
    refused("is not finished; run data_prep/tokenize_corpus.py --source starcoder.*--resume")
    path.write_text(original)
    bin_path(path.with_suffix("")).write_bytes(b"")
    refused(r"\.bin has 0 bytes")
    (copy / "starcoder/units.json").write_text((copy / "wudao/units.json").read_text())
    refused("is of source wudao, not starcoder")
    shutil.rmtree(copy / "starcoder")
    refused(r"starcoder holds no tokenized corpus; run data_prep/tokenize_corpus\.py --source starcoder")


def test_all_problems_of_the_settings_at_once(blend_config: BlendConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(
        blend_config, output=tmp_path, total_tokens=0, weights={"wudao": -1.0}, shard_tokens=0
    )
    with pytest.raises(UserError) as refusal:
        blend(config)
    for part in (
        "--total-tokens 0",
        "--shard-tokens 0",
        "--weights.wudao -1.0",
        f"--output {tmp_path} exists",
    ):
        assert part in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_source_of_weight_zero_is_left_out(blend_config: BlendConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(
        blend_config,
        output=tmp_path / "blend",
        total_tokens=20_000,
        weights={"wudao": 0.0, "slimpajama": 3.0, "proof_pile_2": 1.0},
    )
    result = blend(config)
    assert result is not None
    assert {name: source.weight for name, source in result.sources.items()} == {
        "slimpajama": 0.75,
        "proof_pile_2": 0.25,
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("tokenized: [", "is not YAML"),
        ("", "content: "),
        ("tokenized: a\ntokenizer: b\noutput: c\ntotal_token: 5\n", "total_tokens: .*total_token: "),
        ("tokenized: a\ntokenizer: b\noutput: c\ntotal_tokens: many\n", "total_tokens: .*integer"),
        (
            "tokenized: a\ntokenizer: b\noutput: c\ntotal_tokens: 5\nweights: {wudao: x}\n",
            r"weights\.wudao: ",
        ),
    ],
)
def test_bad_recipes_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        read_config(tmp_path / "recipe.yaml")


def test_flags_override_the_recipe(tmp_path: Path) -> None:
    recipe = {"tokenized": "a", "tokenizer": "b", "output": "c", "total_tokens": 5, "weights": {"wudao": 1.0}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = [
        "--config",
        str(tmp_path / "recipe.yaml"),
        "--total-tokens",
        "7",
        "--weights.wudao",
        "0.5",
        "--resume",
    ]
    config = parse_arguments(arguments)
    assert (config.total_tokens, config.weights, config.resume) == (7, {"wudao": 0.5}, True)
    with pytest.raises(UserError, match=r"none\.yaml does not exist"):
        parse_arguments(["--config", "none.yaml"])


def test_shipped_recipes_have_the_published_weights() -> None:
    for name, tokens in {"blend_demo.yaml": 5_000_000, "blend_200g.yaml": 200_000_000_000}.items():
        config = read_config(CONFIGS / name)
        # The large one has a little more: whole steps of whole sequences end earlier than the shards.
        assert tokens <= config.total_tokens <= 1.002 * tokens
        assert config.weights == COLA_WEIGHTS
        assert sum(config.weights.values()) == pytest.approx(1.0)
    assert read_config(CONFIGS / "blend_200g.yaml").shard_tokens == 1_000_000_000


def test_command_line_ends_in_one_line(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "data_prep" / "blend.py"
    arguments = ["--tokenizer", str(tmp_path / "none"), "--output", str(tmp_path / "out")]
    result = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: --tokenizer")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
