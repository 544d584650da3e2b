"""The exported folder computes what the Megatron run computes; with the usual mistakes it does not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep.errors import UserError
from tests.pretend_secrets import files_with_secrets, pretend_secrets
from tests.pretrain.tiny_runs import STARTS, tiny_recipe, train_in_process

SEQUENCE_LENGTH = 512
TOLERANCE = 1e-4
# A head size and weights that make rotary positions and head order matter.
MODEL = {
    "hidden_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_size": 64,
    "rope_scaling_factor": 8.0,
}

# Far from the start within two steps; the merge layers multiply, so they get less.
LEARNING_RATES = {"base": 0.1, "idm": 0.01, "policy": 0.1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_blend: Path) -> Path:
    """Two steps of each stage, as runs/<stage>."""
    folder = tmp_path_factory.mktemp("export_runs")
    for stage, start in STARTS.items():
        train_in_process(
            tiny_recipe(
                stage,
                folder / stage,
                tiny_blend,
                folder / start if start else None,
                model=MODEL,
                training={"steps": 2},
                optimizer={"learning_rate": LEARNING_RATES[stage], "warmup_steps": 1},
            )
        )
    return folder


def export(run: Path, output: Path, **options: object) -> Path:
    from checkpoint_tools.megatron_to_hf import ExportConfig
    from checkpoint_tools.megatron_to_hf import export as export_run

    export_run(ExportConfig(run=run, output=output, **options))  # type: ignore[arg-type]
    return output


@pytest.fixture(scope="module")
def folder(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pretend_secrets():
        return export(runs / "policy", tmp_path_factory.mktemp("export") / "hf")


def test_an_export_holds_no_secret(folder: Path) -> None:
    """Of the environment that it was made in; the twin is in tests/test_security.py."""
    assert not files_with_secrets(folder)


@pytest.fixture
def megatron(runs: Path, folder: Path):  # type: ignore[no-untyped-def]
    """Outputs of the policy run's Megatron model on random tokens (after the export: one set of groups at a time)."""
    from pretrain.checkpoints.checkpoint_folder import read_description, resolve_checkpoint
    from pretrain.checkpoints.checkpointing import load_parts
    from pretrain.model.cola import ColaModel
    from pretrain.parallel import parallel_context
    from pretrain.recipes import recipe_from_fields
    from tests.pretrain.megatron_outputs import MegatronOutputs

    checkpoint = resolve_checkpoint(runs / "policy")
    recipe = recipe_from_fields(read_description(checkpoint).recipe, "checkpoint")
    parts = ("base", "idm", "world_model", "policy")
    with parallel_context(tensor_parallel_size=1, seed=0) as context:
        model = ColaModel(recipe, context.groups, parts)
        load_parts(model, parts, checkpoint)
        generator = torch.Generator().manual_seed(0)
        tokens_BS = torch.randint(0, recipe.model.vocab_size, (2, SEQUENCE_LENGTH), generator=generator)
        yield MegatronOutputs(model, recipe.actions.output, tokens_BS)


@torch.inference_mode()
def differences(megatron, folder: Path, action_shift: int = 1) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """Greatest difference of each output between the run and the exported folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokens_BS = megatron.tokens_BS
    actions_BS = model.infer_actions(tokens_BS).roll(1 - action_shift, dims=1)
    ours = megatron.world_logits(megatron.inferred_actions())[:, :-1]
    return {
        "base": float((model.base_logits(tokens_BS) - megatron.base_logits_BSV).abs().max()),
        "policy": float((model.policy_logits(tokens_BS) - megatron.policy_logits_BSA).abs().max()),
        "actions": float((model.infer_actions(tokens_BS) != megatron.inferred_actions()[:, :-1]).sum()),
        "world_model": float((model.forward_world_model(tokens_BS[:, :-1], actions_BS) - ours).abs().max()),
    }


def test_exported_model_equals_the_run(megatron, folder: Path) -> None:  # type: ignore[no-untyped-def]
    """Logits agree to 1e-4 in fp32 over 512 positions, actions exactly; and the logits are not all alike."""
    found = differences(megatron, folder)
    assert max(found.values()) < TOLERANCE, found
    assert 0.1 < megatron.world_logits(megatron.inferred_actions()).std() < 30
    assert len(megatron.inferred_actions().unique()) > 1


def without_rope_scaling(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": config["rope_parameters"]["rope_theta"],
    }
    (folder / "config.json").write_text(json.dumps(config))


def with_query_heads_swapped(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    weights[name] = weights[name].unflatten(0, (2, -1)).flip(0).flatten(0, 1).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("fault", [without_rope_scaling, with_query_heads_swapped])
def test_a_fault_in_the_folder_shows(  # type: ignore[no-untyped-def]
    megatron, folder: Path, tmp_path: Path, fault: Callable[[Path], None]
) -> None:
    faulty = tmp_path / "faulty"
    shutil.copytree(folder, faulty)
    fault(faulty)
    found = differences(megatron, faulty)
    assert found["base"] > TOLERANCE, found


@pytest.mark.parametrize("shift", [0, 2])
def test_another_action_shift_shows(megatron, folder: Path, shift: int) -> None:  # type: ignore[no-untyped-def]
    found = differences(megatron, folder, action_shift=shift)
    assert found["world_model"] > TOLERANCE
    assert found["base"] < TOLERANCE


def test_the_folder_is_complete(folder: Path, tiny_blend: Path) -> None:
    """Tokenizer, model card and code are there; the tokenizer is the data's; nothing half-written is left."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert (
        tokenizer.eos_token_id
        == config["eos_token_id"]
        == json.loads((tiny_blend / "blend.json").read_text())["tokenizer"]["eos_id"]
    )
    assert tokenizer.decode(tokenizer("def f(x):\n    return x").input_ids) == "def f(x):\n    return x"
    assert "| stage | policy |" in (folder / "README.md").read_text()
    assert [path.name for path in folder.parent.iterdir()] == ["hf"]


def test_a_run_without_policy_exports_what_it_has(runs: Path, tmp_path: Path) -> None:
    """An idm run plays and infers actions; only the policy is missing."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        export(runs / "idm", tmp_path / "hf"), trust_remote_code=True
    )
    tokens_BS = torch.arange(20)[None]
    assert model.config.num_policy_layers == 0
    assert model.infer_actions(tokens_BS).shape == (1, 19)
    assert model.forward_world_model(tokens_BS, 3).shape == (1, 20, model.config.vocab_size)


def test_a_base_becomes_a_plain_llama(runs: Path, tmp_path: Path) -> None:
    """transformers' own class runs it, without code of ours, and its logits are the CoLA export's base logits."""
    base = AutoModelForCausalLM.from_pretrained(export(runs / "base", tmp_path / "base")).eval()
    cola: Any = AutoModelForCausalLM.from_pretrained(
        export(runs / "idm", tmp_path / "idm"), trust_remote_code=True
    )
    tokens_BS = torch.randint(0, base.config.vocab_size, (1, 64))
    with torch.inference_mode():
        assert torch.equal(base(tokens_BS).logits, cola.eval().base_logits(tokens_BS))
    assert base.config.model_type == "llama" and not list((tmp_path / "base").glob("*.py"))


def test_parts_are_left_out_when_told_so(runs: Path, folder: Path, tmp_path: Path) -> None:
    """Without the IDM the model generates the same and cannot read actions."""
    small: Any = AutoModelForCausalLM.from_pretrained(
        export(runs / "policy", tmp_path / "hf", without=("idm",)), trust_remote_code=True
    )
    whole: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokens_BS = torch.arange(20)[None]
    assert torch.equal(
        small.generate(tokens_BS, max_new_tokens=8), whole.generate(tokens_BS, max_new_tokens=8)
    )
    with pytest.raises(ValueError, match="no inverse dynamics model"):
        small.infer_actions(tokens_BS)
    assert small.num_parameters() < whole.num_parameters()


def test_shards_and_types(runs: Path, tmp_path: Path) -> None:
    """bf16 is the rounded run; shards hold no more than they may; the index names them all."""
    output = export(runs / "policy", tmp_path / "hf", dtype="bf16", shard_gib=100 / 2**20)
    shards = list(output.glob("model-*.safetensors"))
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert {shard.name for shard in shards} == set(index["weight_map"].values()) and len(shards) > 3
    model = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
    assert model.dtype == torch.bfloat16


def test_the_model_card_says_what_was_measured(runs: Path, folder: Path) -> None:
    """Figures of the run's own last validation, and none that it did not write."""
    lines = [json.loads(line) for line in (runs / "policy" / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["split"] == "validation"][-1]
    card = (folder / "README.md").read_text()
    assert f"| validation action accuracy, step 2 | {last['action_accuracy']:.4g} |" in card
    assert f"| validation loss, step 2 | {last['loss']:.4g} |" in card
    assert "perplexity" not in card


def test_dry_run_lists_and_writes_nothing(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(runs / "policy", tmp_path / "hf", dry_run=True)
    printed = capsys.readouterr().out
    assert "model.action_merge_layers.1.gate_proj.weight" in printed
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_refused_in_one_line(runs: Path, folder: Path, tmp_path: Path) -> None:
    """Each mistake names the thing; nothing is written."""
    with pytest.raises(UserError, match=r"hf exists; choose another folder or pass --overwrite"):
        export(runs / "policy", folder)
    with pytest.raises(UserError, match=r"is a base alone, which has one layout; leave --layout out"):
        export(runs / "base", tmp_path / "hf", layout="lamda-rl")
    with pytest.raises(UserError, match=r"has no policy to leave out; drop --without policy"):
        export(runs / "idm", tmp_path / "hf", without=("policy",))
    with pytest.raises(
        UserError, match=r"its output form is residual, the authors' code computes reference only"
    ):
        export(runs / "policy", tmp_path / "hf", layout="lamda-rl")
    with pytest.raises(UserError, match=r"is no model; name a run folder"):
        export(tmp_path, tmp_path / "hf")
    with pytest.raises(UserError, match=r"is a Hugging Face folder already"):
        export(folder, tmp_path / "hf")
    with pytest.raises(UserError, match=r"no tokenizer there; name its folder with --tokenizer"):
        export(runs / "policy", tmp_path / "hf", tokenizer=tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "thesis.txt").write_text("keep me")
    with pytest.raises(UserError, match=r"was not written by this command"):
        export(runs / "policy", tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "keep me"


def test_a_flipped_bit_in_a_frozen_part_is_refused(runs: Path, tmp_path: Path) -> None:
    """A checkpoint that decayed on disk is not exported: its fingerprint tells."""
    damaged = tmp_path / "runs"
    shutil.copytree(runs, damaged)
    shard = max(
        (damaged / "base" / "checkpoints").glob("*/weights/*.distcp"), key=lambda path: path.stat().st_size
    )
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"not what was saved, first base\."):
        export(damaged / "policy", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
