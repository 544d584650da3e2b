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
from data_prep.errors import UserError
from data_prep.indexed_shards import bin_path
from data_prep.output_files import file_checksum, write_sealed_json
from data_prep.unit_manifest import UNITS_FILE
from tests.data_prep.folders import digest_of_files, documents_of, unit_prefixes
from tests.data_prep.token_sources import Document, make_world, random_documents, write_source

CONFIGS = Path(__file__).parents[2] / "configs"
SCRIPT = Path(__file__).parents[2] / "data_prep" / "blend.py"


@pytest.fixture(scope="module")
def blend_config(tmp_path_factory: pytest.TempPathFactory) -> BlendConfig:
    """Four sources of documents that are all different, in four shards with the published weights."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def blend_folder(blend_config: BlendConfig) -> Path:
    """The blend, written by one process."""
    assert blend(blend_config) is not None
    return blend_config.output


@pytest.fixture(scope="module")
def tokenized(blend_config: BlendConfig) -> Path:
    """The tokenized sources."""
    return blend_config.tokenized


@pytest.fixture(scope="module")
def source_documents(tokenized: Path) -> dict[str, set[Document]]:
    """All train documents of each source."""
    return {
        source: set(documents_of(*unit_prefixes(tokenized / source / "train"))) for source in COLA_WEIGHTS
    }


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
    assert manifest.tokenizer.files == {
        "tokenizer.json": file_checksum(blend_config.tokenizer / "tokenizer.json")
    }
    for shard in (*manifest.train.shards, *manifest.validation.values()):
        for ending, checksum in (
            ("bin", shard.bin_xxh3_128),
            ("idx", shard.idx_xxh3_128),
            ("xxh", shard.blocks_xxh3_128),
        ):
            assert file_checksum(blend_folder / f"{shard.prefix}.{ending}") == checksum
    for name, source in manifest.sources.items():
        assert source.weight == pytest.approx(COLA_WEIGHTS[name])
        assert source.tokens_wanted == round(COLA_WEIGHTS[name] * blend_config.total_tokens)
        assert abs(source.tokens_realised - source.tokens_wanted) <= 40  # half of the longest document
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
    for source in COLA_WEIGHTS:
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


@pytest.fixture
def leaking(blend_config: BlendConfig, tmp_path: Path) -> tuple[BlendConfig, set[Document]]:
    """A blend of two sources, one of which has all of the other's validation documents in its train units."""
    stolen = documents_of(*unit_prefixes(blend_config.tokenized / "proof_pile_2/validation"))
    own = random_documents(7, [40] * 100)
    mixed = [document for pair in zip(stolen, own * 2, strict=True) for document in pair]
    shutil.copytree(blend_config.tokenized / "proof_pile_2", tmp_path / "tokenized/proof_pile_2")
    held_out = {"v": random_documents(8, [30] * 9)}
    write_source(tmp_path / "tokenized", "own", blend_config.tokenizer, {"u": mixed}, held_out)
    tokens = 2 * sum(map(len, mixed))
    config = dataclasses.replace(
        blend_config,
        tokenized=tmp_path / "tokenized",
        output=tmp_path / "blend",
        weights={"own": 0.5, "proof_pile_2": 0.5},
        total_tokens=tokens,
        shard_tokens=tokens // 3,
        validation_tokens=100,  # far fewer than there are: what is not chosen must not be trained on either
        allow_repeats=True,
    )
    return config, set(stolen)


def leaked(config: BlendConfig, stolen: set[Document]) -> set[Document]:
    return stolen & set(documents_of(*unit_prefixes(config.output / "train")))


@pytest.mark.parametrize("segment_tokens", [1, 500, 10**6])
def test_train_documents_that_stand_in_validation_are_left_out(
    leaking: tuple[BlendConfig, set[Document]], monkeypatch: pytest.MonkeyPatch, segment_tokens: int
) -> None:
    config, stolen = leaking
    monkeypatch.setattr("data_prep.blending.writer.SEGMENT_BYTES", 2 * segment_tokens)
    result = blend(config)
    assert result is not None
    assert result.left_out == {"in_validation": len(stolen)}
    assert leaked(config, stolen) == set()
    records = [json.loads(path.read_text()) for path in sorted((config.output / "train").glob("*.json"))]
    assert sum(record["left_out"]["in_validation"] for record in records) == len(stolen)
    written = Counter(documents_of(*unit_prefixes(config.output / "train")))
    own = set(documents_of(config.tokenized / "own/train/u")) - stolen
    assert {written[document] for document in own} == {2}  # 100 documents that stand in the unit twice
    assert sum(record["shard"]["tokens"] for record in records) == sum(
        len(document) * count for document, count in written.items()
    )


def test_without_the_check_the_leak_is_there(
    leaking: tuple[BlendConfig, set[Document]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, stolen = leaking
    monkeypatch.setattr(
        "data_prep.blending.leaks.ValidationDocuments.contain",
        lambda documents, tokens, lengths: np.zeros(len(lengths), bool),
    )
    blend(config)
    assert leaked(config, stolen) == stolen


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


def test_plan_only_writes_nothing(
    blend_config: BlendConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert blend(dataclasses.replace(blend_config, output=tmp_path / "blend", plan_only=True)) is None
    assert list(tmp_path.iterdir()) == []
    table = capsys.readouterr().out
    assert all(source in table for source in COLA_WEIGHTS)


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
    content = json.loads(original)
    write_sealed_json(path, {**content, "tokenizer_fingerprint": "another"})
    refused(r"\.json: made with another tokenizer.*tokenize starcoder again")
    write_sealed_json(path, {**content, "format_version": 99})
    refused("format version 99")
    write_sealed_json(path, {})
    refused("format version None")
    path.write_text(json.dumps({**content, "tokens": 1}))
    refused("was changed after it was written")
    write_sealed_json(path, {**content, "tokens": content["tokens"] + 1})
    refused("does not hold what its manifest says")
    path.unlink()
    refused("is not finished; run data_prep/tokenize_corpus.py --source starcoder.*--resume")
    path.write_text(original)
    bin_path(path.with_suffix("")).write_bytes(b"")
    refused(r"\.bin has 0 bytes")
    (copy / "starcoder" / UNITS_FILE).write_text((copy / "wudao" / UNITS_FILE).read_text())
    refused("is of source wudao, not starcoder")
    shutil.rmtree(copy / "starcoder")
    refused(r"starcoder holds no tokenized corpus; run data_prep/tokenize_corpus\.py --source starcoder")


def test_all_problems_of_the_settings_at_once(blend_config: BlendConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(
        blend_config, output=tmp_path, total_tokens=0, weights={"wudao": -1.0, "../x": 0.0}, shard_tokens=0
    )
    with pytest.raises(UserError) as refusal:
        blend(config)
    for part in (
        "--total-tokens 0",
        "--shard-tokens 0",
        "--weights.../x: a source is named by its folder",
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
    arguments = ["--tokenizer", str(tmp_path / "none"), "--output", str(tmp_path / "out")]
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: --tokenizer")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
