"""What is shown is what is there: facts, tensors and values, of checkpoints and of Hugging Face folders."""

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoint_tools.formats.contents import GONE, Shown, ShownTensor, TensorValues, describe_values, show
from checkpoint_tools.formats.megatron_files import MegatronWeights
from checkpoint_tools.show_checkpoint import fold_layers, main
from data_prep.errors import IntegrityError, UserError, run_cli
from pretrain.checkpoints.checkpoint_folder import find_checkpoints, read_description
from pretrain.recipes import recipe_from_fields
from tests.pretrain.tiny_runs import MODEL, tiny_recipe, train_in_process

STEPS = 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_blend: Path) -> Path:
    """base/ and idm/ on it, two checkpoints each; and hf/, the base's weights as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("show")
    for stage, start in (("base", None), ("idm", folder / "base")):
        recipe = tiny_recipe(
            stage,
            folder / stage,
            tiny_blend,
            start,
            training={"steps": STEPS},
            checkpoint={"interval_steps": 1},
        )
        train_in_process(recipe)
    write_huggingface(folder / "base", folder / "hf")
    return folder


def write_huggingface(run: Path, folder: Path) -> None:
    """A Llama with the embedding and the norms of the base of `run`, which both formats store alike."""
    checkpoint = find_checkpoints(run)[-1]
    sizes = recipe_from_fields(read_description(checkpoint).recipe, "checkpoint").model
    config = LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.ffn_hidden_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=sizes.num_key_value_heads,
    )
    model = LlamaForCausalLM(config)
    weights = weights_of(checkpoint, "base")
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(weights.read("base.embedding.word_embeddings.weight"))
        model.model.norm.weight.copy_(weights.read("base.decoder.final_layernorm.weight"))
    model.save_pretrained(folder)


def weights_of(checkpoint: Path, *parts: str) -> MegatronWeights:
    recipe = recipe_from_fields(read_description(checkpoint).recipe, str(checkpoint))
    return MegatronWeights(recipe, checkpoint, parts)


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path
) -> tuple[int, str, str]:
    """Exit code, and what was printed on stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["show_checkpoint.py", *map(str, arguments)])
    capsys.readouterr()
    try:
        run_cli(main)
    except SystemExit as end:
        return int(end.code or 0), *capsys.readouterr()
    return 0, *capsys.readouterr()


def values_by_name(shown: Shown) -> dict[str, TensorValues]:
    return {tensor.name: tensor.values for tensor in shown.tensors if tensor.values is not None}


def copy_with_a_flipped_bit(runs: Path, target: Path, stage: str, name: str) -> Path:
    """All runs once more, one bit of the tensor `name` in the newest checkpoint of `stage` being another."""
    shutil.copytree(runs, target)
    checkpoint = find_checkpoints(target / stage)[-1]
    data = weights_of(checkpoint, stage).read(name).view(torch.uint8).numpy().tobytes()
    for file in (checkpoint / "weights").glob("*.distcp"):
        file.write_bytes(file.read_bytes().replace(data, bytes([data[0] ^ 1]) + data[1:]))
    return target


def test_a_checkpoint_says_where_it_comes_from(runs: Path) -> None:
    """Chain, places, sizes and fingerprints are those of its description."""
    shown = show(runs / "idm")
    newest, base = find_checkpoints(runs / "idm")[-1], find_checkpoints(runs / "base")[-1]
    description = read_description(newest)
    assert shown.places == {"base": str(base), "idm": str(newest), "world_model": str(newest)}
    expected = {
        "kind": "checkpoint",
        "path": str(newest),
        "steps_of_the_run": [1, 2],
        "stage": "idm",
        "step": STEPS,
        "tokens": description.consumed_tokens,
        "precision": "fp32",
        "start_from": [f"{base}: base, step 2"],
        "optimizer_state": True,
        "tokenizer_fingerprint": description.tokenizer_fingerprint,
        "data_fingerprint": description.data_fingerprint,
        "megatron_version": description.megatron_version,
    }
    assert expected.items() <= shown.head.items()
    files = [path for path in newest.rglob("*") if path.is_file()]
    assert (shown.head["files"], shown.head["bytes"]) == (len(files), sum(f.stat().st_size for f in files))
    assert shown.head["model"]["num_layers"] == MODEL["num_layers"]  # type: ignore[index]
    assert shown.head["actions"]["num_actions"] == 16  # type: ignore[index]
    assert show(runs / "base").head["actions"] == {}
    assert show(find_checkpoints(runs / "idm")[0]).head["step"] == 1


def test_every_tensor_is_ok_and_is_what_it_is_said_to_be(runs: Path) -> None:
    """Values are those that torch computes of the tensors themselves; every part has its own."""
    shown = show(runs / "idm", values=True)
    weights = weights_of(find_checkpoints(runs / "idm")[-1], "base", "idm", "world_model")
    assert [tensor.name for tensor in shown.tensors] == list(weights.facts)
    for tensor in shown.tensors:
        data, values = weights.read(tensor.name), tensor.values
        assert values is not None and values.check == "ok"
        assert (tensor.part, tensor.shape) == (tensor.name.split(".")[0], tuple(data.shape))
        assert (tensor.parameters, tensor.bytes, tensor.dtype) == (data.numel(), data.nbytes, "float32")
        assert values.norm == pytest.approx(float(data.norm()), rel=1e-5)
        assert (values.min, values.max, values.non_finite) == (float(data.min()), float(data.max()), 0)


@pytest.mark.parametrize(
    ("stage", "name"), [("idm", "idm.head.weight"), ("base", "base.output_layer.weight")]
)
def test_one_flipped_bit_is_damage(runs: Path, tmp_path: Path, stage: str, name: str) -> None:
    """The fault twin: that tensor alone is not ok, be it the checkpoint's own or of the one it started from."""
    damaged = copy_with_a_flipped_bit(runs, tmp_path / "runs", stage, name)
    found = values_by_name(show(damaged / "idm", values=True))
    assert [name for name, values in found.items() if values.check != "ok"] == [name]
    assert found[name].check == "DAMAGED"
    assert found[name].hash != values_by_name(show(runs / "idm", values=True))[name].hash


def test_a_tensor_that_cannot_be_read_does_not_hide_the_others(runs: Path, tmp_path: Path) -> None:
    """A file cut short: what lies beyond the cut is damaged, the rest is read."""
    shutil.copytree(runs, tmp_path / "runs")
    weights = find_checkpoints(tmp_path / "runs" / "base")[-1] / "weights"
    file = max(weights.glob("*.distcp"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    checks = [
        values.check for values in values_by_name(show(tmp_path / "runs" / "base", values=True)).values()
    ]
    assert set(checks) == {"ok", "DAMAGED"}


def test_the_command_fails_on_damage_and_json_is_json(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code of a checksum that does not hold, one line on stderr, and stdout is one JSON object all the same."""
    damaged = copy_with_a_flipped_bit(runs, tmp_path / "runs", "idm", "idm.head.weight")
    code, output, errors = command(monkeypatch, capsys, damaged / "idm", "--values", "--json")
    assert code == IntegrityError.exit_code
    assert "step_00000002: 1 tensor(s) are DAMAGED, first idm.head.weight; " in errors.splitlines()[-1]
    content = json.loads(output)
    assert [t["name"] for t in content["tensors"] if t["check"] == "DAMAGED"] == ["idm.head.weight"]
    assert sum(part["parameters"] for part in content["parts"].values()) == content["total"]["parameters"]
    assert content["tensors"][0]["shape"] == [MODEL["vocab_size"], MODEL["hidden_size"]]
    code, output, _ = command(monkeypatch, capsys, damaged / "idm", "--no-tensors", "--json")
    assert code == 0
    assert json.loads(output) == {name: value for name, value in content.items() if name != "tensors"}


def test_the_tables_are_readable(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Layers are folded unless values are shown, names are whole, and numbers are in place."""
    code, output, _ = command(monkeypatch, capsys, runs / "idm")
    rows = [line.split() for line in output.splitlines()]
    assert code == 0
    assert ["base.decoder.layers.0-1.mlp.linear_fc1.weight", "128", "x", "32", "float32", "8,192"] in rows
    assert "start from" in output and ": base, step 2" in output
    code, output, _ = command(monkeypatch, capsys, runs / "idm", "--values")
    rows = [line.split() for line in output.splitlines() if "base.decoder.layers.1.mlp.linear_fc1." in line]
    assert code == 0
    assert len(rows) == 1 and rows[0][:6] == [
        "base.decoder.layers.1.mlp.linear_fc1.weight", "128", "x", "32", "float32", "4,096"
    ] and rows[0][-1] == "ok"  # fmt: skip
    _, output, _ = command(monkeypatch, capsys, runs / "hf", "--no-tensors")
    assert "Hugging Face folder" in output and "LlamaForCausalLM" in output and "embed_tokens" not in output


def test_a_huggingface_folder_has_the_same_hashes(runs: Path) -> None:
    """Equal tensors have equal hashes in both formats, others do not; nothing is recorded to check against."""
    ours, theirs = (values_by_name(show(runs / name, values=True)) for name in ("base", "hf"))
    pairs = {
        "base.embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "base.decoder.final_layernorm.weight": "model.norm.weight",
    }
    for our_name, their_name in pairs.items():
        assert ours[our_name].hash == theirs[their_name].hash
        assert ours[our_name].norm == theirs[their_name].norm
    assert ours["base.output_layer.weight"].hash != theirs["lm_head.weight"].hash
    assert {values.check for values in theirs.values()} == {None}
    shown = show(runs / "hf")
    assert {tensor.part for tensor in shown.tensors} == {"base"}
    assert shown.head["model_type"] == "llama"


def test_a_start_that_is_gone_is_said_to_be(runs: Path, tmp_path: Path) -> None:
    """The rest is shown."""
    shutil.copytree(runs / "idm", tmp_path / "idm")
    shown = show(tmp_path / "idm", values=True)
    assert shown.places["base"] == GONE
    assert str(shown.head["start_from"]).endswith(f"step_00000002: {GONE}']")
    assert {tensor.part for tensor in shown.tensors} == {"idm", "world_model"}
    assert {values.check for values in values_by_name(shown).values()} == {"ok"}


def test_a_checkpoint_that_starts_from_itself_is_shown(runs: Path, tmp_path: Path) -> None:
    """Such a one is not ours, and must not keep the command busy for ever."""
    shutil.copytree(runs / "base", tmp_path / "base")
    checkpoint = find_checkpoints(tmp_path / "base")[-1]
    described = json.loads((checkpoint / "cola.json").read_text())
    described["start_from"] = str(checkpoint.relative_to(tmp_path / "base"))
    (checkpoint / "cola.json").write_text(json.dumps(described))
    assert show(checkpoint).head["start_from"] == []


def test_layers_are_folded_by_number(runs: Path) -> None:
    """Those of one shape become one row; a layer of another shape keeps its own."""
    shown = show(runs / "base")
    folded = {tensor.name: tensor for tensor in fold_layers(shown.tensors)}
    assert folded["base.decoder.layers.0-1.input_layernorm.weight"].parameters == 2 * MODEL["hidden_size"]
    assert sum(tensor.parameters for tensor in folded.values()) == sum(t.parameters for t in shown.tensors)
    layers = [t for t in shown.tensors if t.name.endswith("0.input_layernorm.weight")] * 5
    named = [as_layer(layer, number, other=number == 3) for number, layer in enumerate(layers)]
    assert [tensor.name for tensor in fold_layers(named)] == [
        "base.decoder.layers.0-2,4.input_layernorm.weight",
        "base.decoder.layers.3.input_layernorm.weight",
    ]


def as_layer(tensor: ShownTensor, number: int, other: bool) -> ShownTensor:
    """The tensor of layer 0 as that of another, with another shape if it is to be unlike."""
    name = tensor.name.replace("layers.0.", f"layers.{number}.")
    return replace(tensor, name=name, shape=(1,) if other else tensor.shape)


def test_values_count_what_is_not_finite() -> None:
    """Across the border of chunks; extremes and norm are of the finite elements."""
    tensor = torch.zeros(3, (1 << 20) - 1, dtype=torch.bfloat16)
    tensor[0, 0], tensor[2, 5], tensor[1, 7], tensor[2, -1] = 3.0, -4.0, math.nan, math.inf
    values = describe_values(tensor)
    assert (values.norm, values.min, values.max, values.non_finite) == (5.0, -4.0, 3.0, 2)
    assert describe_values(torch.full((3,), math.nan)).norm is None
    assert describe_values(torch.empty(0)).non_finite == 0


def test_nothing_to_show_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no model; name a run folder"):
        show(tmp_path)
