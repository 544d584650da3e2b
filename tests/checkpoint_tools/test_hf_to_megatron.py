"""A base of every family comes in, is held by any layout of ranks, and goes out again byte for byte; faults do not."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoint_tools.formats.opened_model import OpenedCheckpoint, open_model
from checkpoint_tools.formats.safetensors_files import open_safetensors
from checkpoint_tools.hf_to_megatron import ImportConfig, import_model, main
from checkpoint_tools.megatron_to_hf import ExportConfig, export
from data_prep.errors import UserError, run_cli
from tests.checkpoint_tools.random_bases import FAMILIES, VOCAB_SIZE, published_folder, random_base
from tests.forked_ranks import start_program

LAYOUTS = ["one_rank", "tp2_pp1", "tp1_pp2", "tp2_pp2"]
# What goes through every layout: each family, RoPE scaling, biases, tied embeddings, head sizes; and the whole of CoLA.
RESAVED = ["llama31", "llama32", "mistral", "qwen25_tied", "published"]
POSITIONS = 512


@pytest.fixture(scope="module")
def tokenizer(tiny_blend: Path) -> Path:
    return tiny_blend / "tokenizer"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """A random folder of every family, and one in the published layout."""
    folder = tmp_path_factory.mktemp("bases")
    for family in FAMILIES:
        random_base(folder / family, family, tokenizer)
    published_folder(folder / "published", tokenizer)
    return folder


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory, bases: Path) -> Path:
    """All of them, imported, with every check on."""
    folder = tmp_path_factory.mktemp("imported")
    for source in sorted(bases.iterdir()):
        import_model(ImportConfig(source=source, output=folder / source.name))
    return folder


@pytest.fixture(scope="module")
def resaved(tmp_path_factory: pytest.TempPathFactory, imported: Path) -> Path:
    """Loaded and saved again by the trainer's own code under every layout."""
    folder = tmp_path_factory.mktemp("resaved")
    start_program("tests.checkpoint_tools.layout_worker", folder, *(imported / name for name in RESAVED))
    return folder


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every tensor's data."""
    opened = open_safetensors(folder)
    return {name: opened.read(name).view(torch.uint8).numpy().tobytes() for name in opened.facts}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", RESAVED)
def test_out_again_from_any_layout_it_is_byte_for_byte_what_came_in(
    bases: Path, imported: Path, resaved: Path, tmp_path: Path, name: str, layout: str
) -> None:
    run = imported / name if layout == "one_rank" else resaved / layout / name
    options: dict[str, Any] = {"layout": "lamda-rl" if name == "published" else "cola", "verify": False}
    export(ExportConfig(run=run, output=tmp_path / "hf", shard_gib=0.001, **options))
    assert bytes_of(tmp_path / "hf") == bytes_of(bases / name)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    if name != "published":
        before, after = (
            json.loads((folder / "config.json").read_text()) for folder in (bases / name, tmp_path / "hf")
        )
        assert before == after
        assert len(AutoTokenizer.from_pretrained(tmp_path / "hf")) == VOCAB_SIZE


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - set(RESAVED)))
def test_the_other_forms_come_out_as_they_came_in(
    bases: Path, imported: Path, tmp_path: Path, name: str
) -> None:
    export(ExportConfig(run=imported / name, output=tmp_path / "hf", verify=False))
    assert bytes_of(tmp_path / "hf") == bytes_of(bases / name)


def test_the_layouts_did_share_the_work(resaved: Path) -> None:
    """Each of four ranks held a part of the model only."""
    held = json.loads((resaved / "tp2_pp2" / "llama31" / "parameters_by_rank.json").read_text())
    whole = sum(facts.numel for facts in open_model(resaved / "tp2_pp2" / "llama31").reader.facts.values())
    assert len(held) == 4 and max(held) < 0.5 * whole


@torch.inference_mode()
def megatron_logits(run: Path, tokens_BS: torch.Tensor) -> torch.Tensor:
    """[B, S, V] in fp32 of the imported checkpoint, by the trainer's model."""
    from dataclasses import replace

    from pretrain.checkpoints.checkpointing import load_parts
    from pretrain.model.cola import ColaModel
    from pretrain.parallel import parallel_context

    source = open_model(run).source
    assert isinstance(source, OpenedCheckpoint)
    recipe = replace(source.recipe, training=replace(source.recipe.training, precision="fp32"))
    with parallel_context(tensor_parallel_size=1, seed=0) as context:
        model = ColaModel(recipe, context.groups, ("base",))
        load_parts(model, ("base",), source.folder)
        return model.base.logits(model.base.hidden(tokens_BS)).transpose(0, 1).float()


def logit_differences(base: Path, run: Path) -> torch.Tensor:
    """Largest difference at each position, by the largest logit: [S]."""
    tokens_BS = torch.randint(0, VOCAB_SIZE, (1, POSITIONS), generator=torch.Generator().manual_seed(1))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected_BSV = model(tokens_BS).logits
    assert expected_BSV.std() > 0.5
    return (megatron_logits(run, tokens_BS) - expected_BSV).abs().amax((0, 2)) / expected_BSV.abs().max()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_logits_are_those_of_transformers(bases: Path, imported: Path, family: str) -> None:
    """Over 512 positions, in fp32, to 1e-5 of the largest logit."""
    assert logit_differences(bases / family, imported / family).max() < 1e-5


def test_another_rope_scaling_shows(bases: Path, tmp_path: Path) -> None:
    """The twin of the test above: the tensors are the same, only the rotation is not."""
    run = tmp_path / "run"
    import_model(ImportConfig(source=bases / "llama31", output=run, ignore_rope_scaling=True, verify=False))
    by_position_S = logit_differences(bases / "llama31", run)
    assert by_position_S[0] < 1e-5 < 1e-3 < by_position_S[-64:].max()


def test_what_was_imported_without_scaling_goes_out_without(bases: Path, tmp_path: Path) -> None:
    """The export's config.json says what the model is, not what the source's said; verification agrees."""
    import_model(
        ImportConfig(
            source=bases / "llama31", output=tmp_path / "run", ignore_rope_scaling=True, verify=False
        )
    )
    export(ExportConfig(run=tmp_path / "run", output=tmp_path / "hf"))
    assert (
        json.loads((tmp_path / "hf" / "config.json").read_text())["rope_parameters"]["rope_type"] == "default"
    )


def test_heads_in_another_order_show(bases: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    changed = tmp_path / "changed"
    shutil.copytree(bases / "llama", changed)
    weights = load_file(changed / "model.safetensors")
    query = weights["model.layers.1.self_attn.q_proj.weight"]
    weights["model.layers.1.self_attn.q_proj.weight"] = (
        query.unflatten(0, (4, -1)).flip(0).flatten(0, 1).contiguous()
    )
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    import_model(ImportConfig(source=changed, output=tmp_path / "run"))
    assert logit_differences(bases / "llama", tmp_path / "run").max() > 1e-3


def test_a_padded_vocabulary_comes_out_as_it_came_in(bases: Path, tmp_path: Path) -> None:
    """Rows are added for tensor parallelism and gone again in the export; the model computes the same."""
    run = tmp_path / "run"
    import_model(ImportConfig(source=bases / "llama", output=run, pad_vocabulary_to_multiple_of=1000))
    source = open_model(run).source
    assert isinstance(source, OpenedCheckpoint)
    assert source.weights.facts["base.output_layer.weight"].shape == (2000, 512)
    assert not source.weights.read("base.output_layer.weight")[VOCAB_SIZE:].any()
    export(ExportConfig(run=run, output=tmp_path / "hf"))
    assert bytes_of(tmp_path / "hf") == bytes_of(bases / "llama")


def test_half_precision_needs_a_choice(bases: Path, tmp_path: Path) -> None:
    """fp16 is no training precision; as fp32 every bit is kept."""
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(bases / "llama").half().save_pretrained(half)
    for file in (bases / "llama").glob("tokenizer*"):
        shutil.copyfile(file, half / file.name)
    with pytest.raises(
        UserError, match=r"its tensors are float16, runs are bf16 or fp32; choose with --precision"
    ):
        import_model(ImportConfig(source=half, output=tmp_path / "run"))
    import_model(ImportConfig(source=half, output=tmp_path / "run", precision="fp32"))
    tensors, theirs = open_model(tmp_path / "run").reader, open_safetensors(half)
    assert all(torch.equal(tensors.read(name), theirs.read(name).float()) for name in theirs.facts)


def test_dry_run_lists_and_writes_nothing(
    bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_model(ImportConfig(source=bases / "qwen25", output=tmp_path / "run", dry_run=True))
    printed = capsys.readouterr().out
    assert "base.decoder.layers.3.self_attention.linear_qkv.bias" in printed
    assert "Hugging Face: 51 tensors" in printed
    assert list(tmp_path.iterdir()) == []


def edit_config(**changes: object) -> Callable[[Path], None]:
    """A fault in config.json."""

    def edit(folder: Path) -> None:
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**fields, **changes}))

    return edit


def truncate_shard(folder: Path) -> None:
    """Lose the last bytes."""
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def flip_a_bit(folder: Path) -> None:
    """Decay, where the folder has checksums."""
    shard = folder / "model.safetensors"
    content = shard.read_bytes()
    sums = subprocess.run(
        ["sha256sum", shard.name], cwd=folder, capture_output=True, text=True, check=True
    ).stdout
    (folder / "SHA256SUMS").write_text(sums)
    shard.write_bytes(content[:-100] + bytes([content[-100] ^ 4]) + content[-99:])


def lose_shard(folder: Path) -> None:
    """One of several shards is gone."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="1MB")
    min(folder.glob("model-*.safetensors")).unlink()


def integer_weights(folder: Path) -> None:
    """A quantised checkpoint in disguise."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"].to(torch.int8)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def other_tokenizer(folder: Path) -> None:
    """More tokens than the model has."""
    fields = json.loads((folder / "config.json").read_text())
    small = AutoModelForCausalLM.from_pretrained(folder)
    small.resize_token_embeddings(512)
    small.save_pretrained(folder)
    assert fields["vocab_size"] == VOCAB_SIZE


def lose_tokenizer(folder: Path) -> None:
    """As a folder of weights alone."""
    for file in folder.glob("tokenizer*"):
        file.unlink()


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped bit": (flip_a_bit, r"model.safetensors: is not what its checksum says"),
    "missing shard": (lose_shard, r"model-00001-of-000\d\d.safetensors: is missing"),
    "truncated shard": (truncate_shard, r"model.safetensors: "),
    "wrong dtype": (integer_weights, r"its tensors are float32, int8"),
    "wrong vocabulary": (edit_config(vocab_size=1000), r"embed_tokens|word_embeddings"),
    "wrong number of layers": (
        edit_config(num_hidden_layers=3),
        r"9 unexpected tensor\(s\), first model.layers.3",
    ),
    "wrong family": (edit_config(model_type="gpt2"), r"model_type is 'gpt2'"),
    "wrong rope": (
        edit_config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}),
        r"yarn",
    ),
    "other tokenizer": (other_tokenizer, r"the tokenizer has 1024 tokens, the model only 512"),
    "no tokenizer": (lose_tokenizer, r"holds neither tokenizer.json nor tokenizer.model"),
    "no config": (lambda f: (f / "config.json").unlink(), r"is no model; name a run folder"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_bad_input_is_refused_in_one_line(bases: Path, tmp_path: Path, fault: str) -> None:
    """Each names the thing, and nothing is written."""
    source = tmp_path / "source"
    shutil.copytree(bases / "llama", source)
    plant, message = FAULTS[fault]
    plant(source)
    with pytest.raises(UserError, match=message) as caught:
        import_model(ImportConfig(source=source, output=tmp_path / "run"))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_full_disk_leaves_nothing(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk is full when the written file is to reach it: one line, its exit code, no output."""

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(
        sys, "argv", ["", "--source", str(bases / "llama"), "--output", str(tmp_path / "run")]
    )
    with pytest.raises(SystemExit) as caught:
        run_cli(main)
    assert caught.value.code == 4
    assert (
        capsys.readouterr().err.strip().splitlines()[-1].startswith("error: the output folder: No space left")
    )
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_is_left_alone(bases: Path, imported: Path, tmp_path: Path) -> None:
    """Only an earlier import is replaced, and only when told so."""
    source = bases / "llama"
    import_model(ImportConfig(source=source, output=tmp_path / "run", verify=False))
    with pytest.raises(UserError, match=r"run exists; choose another folder or pass --overwrite"):
        import_model(ImportConfig(source=source, output=tmp_path / "run"))
    import_model(ImportConfig(source=source, output=tmp_path / "run", overwrite=True, verify=False))
    (tmp_path / "thesis").mkdir()
    with pytest.raises(UserError, match=r"was not written by this command"):
        import_model(ImportConfig(source=source, output=tmp_path / "thesis", overwrite=True))
    with pytest.raises(UserError, match=r"is no Hugging Face folder but a checkpoint of ours"):
        import_model(ImportConfig(source=imported / "llama", output=tmp_path / "again"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "thesis"]
