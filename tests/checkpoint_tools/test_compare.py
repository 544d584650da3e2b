"""Models that are the same pass, whatever their format and family; each fault is found, and named by where it is."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoint_tools.compare import (
    CompareConfig,
    Comparison,
    compare,
    compare_models,
    main,
    verify_conversion,
)
from checkpoint_tools.formats import weight_map
from checkpoint_tools.formats.opened_model import open_model
from checkpoint_tools.formats.weight_map import Rule
from data_prep.errors import IntegrityError, UserError, run_cli
from tests.checkpoint_tools.random_bases import published_folder, random_base
from tests.checkpoint_tools.tiny_models import cola_folder, edit_config, edit_weights, save_as_checkpoint

TOKENS = 64
QUERIES = "model.layers.1.self_attn.q_proj.weight"
KEYS = "model.layers.1.self_attn.k_proj.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All parts, as a Hugging Face folder."""
    return cola_folder(tmp_path_factory.mktemp("compare") / "hf")


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """The same model as a checkpoint, with a padded vocabulary."""
    return save_as_checkpoint(folder, folder.parent / "run", vocab_padding=64)


def compared(left: Path, right: Path, tokens: int | None = TOKENS) -> Comparison:
    return compare_models(open_model(left), open_model(right), tokens)


def first_wrong_module(comparison: Comparison) -> str:
    wrong = comparison.first_wrong_output()
    return wrong.module if wrong else ""


# With biases and tied embeddings; llama3's rotary scaling and head size 128; bf16 and fp32.
@pytest.mark.parametrize("family", ["llama31", "qwen25_tied", "mistral"])
def test_a_base_and_its_conversion_are_the_same(family: str, tmp_path: Path) -> None:
    """All tensors equal, and outputs that differ by no more than the order of sums, up to the last position."""
    folder = random_base(tmp_path / "hf", family, tokenizer=tmp_path)
    run = save_as_checkpoint(folder, tmp_path / "run")
    comparison = compared(folder, run)
    assert comparison.problems() == []
    assert [output.module for output in comparison.outputs] == [
        "embedding",
        *(f"base layer {number}" for number in range(4)),
        "h",
        "base logits",
    ]
    assert comparison.outputs[0].at[-1].position == open_model(folder).model.max_position_embeddings - 1
    assert verify_conversion(open_model(folder), open_model(run)).startswith("verified: ")


@pytest.mark.parametrize("form", ["residual", "reference"])
def test_a_cola_model_and_its_conversion_are_the_same(form: str, tmp_path: Path) -> None:
    """Every part is run, in both forms of the output, and between checkpoints too."""
    folder = cola_folder(tmp_path / "hf", output_form=form)
    run = save_as_checkpoint(folder, tmp_path / "run", vocab_padding=64)
    comparison = compared(run, folder)
    assert comparison.problems() == []
    assert [output.module for output in comparison.outputs if "layer" not in output.module] == [
        "embedding", "h", "IDM logits", "world-model state", "policy logits", "base logits", "world-model logits",
    ]  # fmt: skip
    assert verify_conversion(open_model(run), open_model(run)).startswith(
        "verified: 59 tensors equal, outputs"
    )


def test_the_published_layout_and_its_conversion_are_the_same(tmp_path: Path) -> None:
    folder = published_folder(tmp_path / "hf", tokenizer=tmp_path)
    assert compared(folder, save_as_checkpoint(folder, tmp_path / "run")).problems() == []


def test_a_folder_is_run_with_the_rotary_scaling_it_was_opened_with(tmp_path: Path) -> None:
    """An import that leaves the scaling out is verified against a source opened so, and is not the folder itself."""
    folder = random_base(tmp_path / "hf", "llama31", tokenizer=tmp_path)
    converted = open_model(save_as_checkpoint(folder, tmp_path / "run", rope_scaling_factor=None))
    source = open_model(folder)
    unscaled = replace(source, model=replace(source.model, rope_scaling_factor=None))
    assert verify_conversion(unscaled, converted).startswith("verified: ")
    with pytest.raises(IntegrityError, match=r"rope_scaling_factor is 8\.0 against None"):
        verify_conversion(source, converted)


def one_element(weights: Weights) -> None:
    weights[QUERIES][3, 5] += 0.01


def heads_permuted(weights: Weights) -> None:
    for name, heads in ((QUERIES, 4), (KEYS, 2)):
        weights[name] = weights[name].unflatten(0, (heads, -1)).flip(0).flatten(0, 1)


def gate_and_up_swapped(weights: Weights) -> None:
    weights[GATE], weights[UP] = weights[UP], weights[GATE]


def other_policy_head(weights: Weights) -> None:
    weights["model.policy_head.weight"][0] += 1


def not_a_number(weights: Weights) -> None:
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan


@pytest.mark.parametrize(
    ("fault", "tensor", "words", "module"),
    [
        (one_element, QUERIES, "differs by at most 0.01, in 1 element", "base layer 1"),
        (heads_permuted, QUERIES, "the same numbers in another order", "base layer 1"),
        (gate_and_up_swapped, GATE, f"its numbers are in {UP}", "base layer 0"),
        (
            other_policy_head,
            "model.policy_head.weight",
            "differs by at most 1, in 256 element",
            "policy logits",
        ),
        (
            not_a_number,
            "model.layers.1.mlp.down_proj.weight",
            "differs by at most inf, in 1 element",
            "base layer 1",
        ),
    ],
)
def test_a_wrong_tensor_is_named(
    run: Path,
    folder: Path,
    tmp_path: Path,
    fault: Callable[[Weights], None],
    tensor: str,
    words: str,
    module: str,
) -> None:
    """The first in the model's order, with what its numbers tell, and the module whose output is wrong by it."""
    faulty = shutil.copytree(folder, tmp_path / "faulty")
    edit_weights(faulty, fault)
    comparison = compared(run, faulty)
    assert comparison.tensors.differences[0].name == tensor
    assert words in comparison.problems()[0]
    assert first_wrong_module(comparison) == module
    with pytest.raises(IntegrityError, match=f"tensors differ, first {tensor}"):
        verify_conversion(open_model(run), open_model(faulty))


def test_two_checkpoints_are_compared(run: Path, folder: Path, tmp_path: Path) -> None:
    faulty = shutil.copytree(folder, tmp_path / "faulty")
    edit_weights(faulty, heads_permuted)
    comparison = compared(run, save_as_checkpoint(faulty, tmp_path / "run"))
    assert [tensor.name for tensor in comparison.tensors.differences] == [QUERIES, KEYS]
    assert first_wrong_module(comparison) == "base layer 1"


def test_a_fault_in_the_table_itself_shows_in_the_outputs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong there and back again, every tensor is equal; but each model runs on its own names, so one babbles."""
    monkeypatch.setattr(weight_map, "_gate_up", _exchanged(weight_map._gate_up))
    run = save_as_checkpoint(folder, tmp_path / "run")
    comparison = compared(folder, run)
    assert comparison.tensors.equal
    assert first_wrong_module(comparison) == "base layer 0"
    with pytest.raises(IntegrityError, match="outputs differ from base layer 0 on"):
        verify_conversion(open_model(folder), open_model(run))


def _exchanged(rule: Callable[[str, str], Rule]) -> Callable[[str, str], Rule]:
    """`rule`, with its two Hugging Face tensors one for the other."""

    def exchanged(megatron: str, huggingface: str) -> Rule:
        right = rule(megatron, huggingface)
        return replace(right, huggingface=right.huggingface[::-1])

    return exchanged


def other_theta(fields: dict[str, Any]) -> None:
    fields["rope_parameters"]["rope_theta"] = 10000.0


def other_factor(fields: dict[str, Any]) -> None:
    fields["rope_parameters"]["factor"] = 32.0


def other_epsilon(fields: dict[str, Any]) -> None:
    fields["rms_norm_eps"] = 1e-3


def other_form(fields: dict[str, Any]) -> None:
    fields["output_form"] = "reference"


ROTARY = "as by other rotary positions"


@pytest.mark.parametrize(
    ("fault", "setting", "module", "says_rotary"),
    [
        (other_theta, "rope_theta is 500000.0 against 10000.0", "base layer 0", True),
        (other_factor, "rope_scaling_factor is 8.0 against 32.0", "base layer 0", True),
        (other_epsilon, "rms_norm_epsilon is 1e-05 against 0.001", "base layer 0", False),
        (other_form, "output is residual against reference", "world-model state", False),
    ],
)
def test_a_wrong_setting_shows_in_what_is_computed(
    run: Path,
    folder: Path,
    tmp_path: Path,
    fault: Callable[[dict[str, Any]], None],
    setting: str,
    module: str,
    says_rotary: bool,
) -> None:
    """With equal tensors the outputs differ, from the first module on that uses the setting."""
    faulty = shutil.copytree(folder, tmp_path / "faulty")
    edit_config(faulty, fault)
    comparison = compared(run, faulty)
    assert comparison.tensors.equal
    assert first_wrong_module(comparison) == module
    assert comparison.problems()[0] == setting
    assert (ROTARY in comparison.problems()[1]) == says_rotary
    with pytest.raises(IntegrityError, match=setting):
        verify_conversion(open_model(run), open_model(faulty))


def test_a_rotary_fault_is_nothing_at_position_0_and_more_later(
    run: Path, folder: Path, tmp_path: Path
) -> None:
    faulty = shutil.copytree(folder, tmp_path / "faulty")
    edit_config(faulty, other_theta)
    by_module = {output.module: output for output in compared(run, faulty).outputs}
    first, middle, last = by_module["base logits"].at
    assert (first.position, last.position) == (0, 131071)
    assert first.kl_nats is not None and middle.kl_nats is not None and last.kl_nats is not None
    assert first.kl_nats < 1e-9 < 1e-3 < min(middle.kl_nats, last.kl_nats)


def test_a_missing_tensor_is_named(run: Path, folder: Path, tmp_path: Path) -> None:
    """By the one who opens the folder; and one model with a layer more by the comparison."""
    faulty = shutil.copytree(folder, tmp_path / "faulty")
    edit_weights(faulty, lambda weights: weights.pop(KEYS))
    with pytest.raises(UserError, match=f"1 missing tensor.*first {KEYS}"):
        open_model(faulty)
    comparison = compared(run, cola_folder(tmp_path / "deeper", num_hidden_layers=3))
    assert "9 tensor(s) are in" in comparison.problems()[0] and "model.layers.2." in comparison.problems()[0]
    assert comparison.outputs == ()


def test_rounding_is_no_difference_but_other_digits_are(folder: Path, tmp_path: Path) -> None:
    """An export to bf16 is its fp32 source, rounded; the other way round digits have appeared from nowhere."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.bfloat16().save_pretrained(tmp_path / "bf16")
    narrow, wide = open_model(tmp_path / "bf16"), open_model(folder)
    assert "59 of them after rounding" in verify_conversion(wide, narrow)
    assert compare_models(narrow, wide, TOKENS).problems() == []
    with pytest.raises(IntegrityError, match="59 tensors have digits that the source's have not"):
        verify_conversion(narrow, wide)
    edit_weights(tmp_path / "bf16", lambda weights: weights[QUERIES].view(torch.int16)[0, 0].add_(1))
    with pytest.raises(IntegrityError, match=QUERIES):
        verify_conversion(wide, open_model(tmp_path / "bf16"))


def test_only_shared_parts_are_compared(run: Path, folder: Path, tmp_path: Path) -> None:
    """An export without IDM is as good as the run; a fault in what it has is found all the same."""
    without = shutil.copytree(folder, tmp_path / "without")
    edit_config(without, lambda fields: fields.update(num_idm_layers=0))
    edit_weights(
        without,
        lambda w: [
            w.pop(name)
            for name in list(w)
            if name.startswith(("model.action_layers", "model.action_norm", "model.action_head"))
        ],
    )
    assert "(base, world_model, policy)" in verify_conversion(open_model(run), open_model(without))
    edit_weights(without, other_policy_head)
    assert first_wrong_module(compared(run, without)) == "policy logits"


def test_the_command_prints_and_ends_with_an_exit_code(
    run: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same: 0 and a summary; not the same: 5, tables and one line; --json has the same facts."""
    compare(CompareConfig(left=run, right=folder, tokens=TOKENS))
    printed = capsys.readouterr().out
    assert "the same: 59 tensors equal" in printed and "merge layer 1" in printed

    faulty = shutil.copytree(folder, tmp_path / "faulty")
    edit_weights(faulty, one_element)
    monkeypatch.setattr(sys, "argv", ["compare", str(run), str(faulty), "--tokens", "1"])
    with pytest.raises(SystemExit) as ended:
        run_cli(main)
    printed, complaint = capsys.readouterr()
    assert ended.value.code == 5
    assert QUERIES in printed and "1 of 59 tensors differ" in printed
    assert complaint.splitlines()[-1].startswith("error: ") and QUERIES in complaint

    with pytest.raises(IntegrityError):
        compare(CompareConfig(left=run, right=faulty, tensors_only=True, json=True))
    facts = json.loads(capsys.readouterr().out)
    assert [tensor["name"] for tensor in facts["tensors"]["differences"]] == [QUERIES]
    assert facts["outputs"] == []


def test_bad_input_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--tokens is 0, must be at least 1"):
        compare(CompareConfig(left=run, right=run, tokens=0))
    with pytest.raises(UserError, match="is no model; name a run folder"):
        compare(CompareConfig(left=run, right=tmp_path))
