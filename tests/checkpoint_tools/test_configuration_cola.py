"""The configuration's fields and errors, and model folders: saved, loaded, run by the code they bring."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    dynamic_module_utils,
    pipeline,
)

from checkpoint_tools.huggingface import modeling_cola
from checkpoint_tools.huggingface.configuration_cola import ColaConfig
from checkpoint_tools.huggingface.modeling_cola import ColaForCausalLM
from tests.checkpoint_tools.random_cola import (
    DEFAULT_ROPE,
    LLAMA3_ROPE,
    generate_with_actions,
    greatest_difference,
    random_cola,
    random_tokens,
    save_with_tokenizer,
    tiny_config,
)

CODE = Path(modeling_cola.__file__).parent


@pytest.fixture(scope="module")
def cola() -> ColaForCausalLM:
    """Not to be changed by a test."""
    return random_cola()


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    """[2, 64]"""
    return random_tokens(2, 64)


def test_the_authors_names_for_the_sizes_are_understood() -> None:
    config = ColaConfig(num_code=32, num_action_layer=3, num_dyna_layer=1, num_policy_layer=5)
    assert (config.num_actions, config.num_idm_layers) == (32, 3)
    assert (config.num_merge_layers, config.num_policy_layers) == (1, 5)
    assert ColaConfig.from_dict(config.to_dict()).num_actions == 32


def test_a_wrong_configuration_names_every_wrong_field() -> None:
    with pytest.raises(ValueError) as error:
        ColaConfig(
            num_actions=0,
            num_merge_layers=0,
            num_idm_layers=-1,
            output_form="sum",
            qkv_bias=1,  # type: ignore[arg-type]
            attention_bias=True,
        )
    for field in (
        "num_actions",
        "num_merge_layers",
        "num_idm_layers",
        "output_form",
        "qkv_bias",
        "attention_bias",
    ):
        assert field in str(error.value)


def test_rotary_fields_are_understood_under_their_old_and_new_names() -> None:
    scaling = {name: value for name, value in LLAMA3_ROPE.items() if name != "rope_theta"}
    old = tiny_config(rope_theta=LLAMA3_ROPE["rope_theta"], rope_scaling=scaling, rope_parameters=None)
    saved = ColaConfig.from_dict(tiny_config().to_dict())
    angles = [ColaForCausalLM(config).model.rotary_emb.inv_freq for config in (tiny_config(), old, saved)]
    assert torch.equal(angles[0], angles[1])
    assert torch.equal(angles[0], angles[2])
    for other in (DEFAULT_ROPE, LLAMA3_ROPE | {"rope_theta": 10000.0}, None):
        turned = ColaForCausalLM(tiny_config(rope_parameters=other)).model.rotary_emb.inv_freq
        assert not torch.equal(turned, angles[0])


@pytest.fixture
def _own_module_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers copies a folder's code into a cache in the home folder and imports it from there."""
    _forget_imported_code()
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield
    _forget_imported_code()


def _forget_imported_code() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]


def test_save_and_load_round_trip(cola: ColaForCausalLM, tmp_path: Path, tokens: torch.Tensor) -> None:
    cola.save_pretrained(tmp_path)
    loaded = ColaForCausalLM.from_pretrained(tmp_path)
    weights = loaded.state_dict()
    assert weights.keys() == cola.state_dict().keys()
    assert all(torch.equal(weights[name], weight) for name, weight in cola.state_dict().items())
    assert loaded.config.to_diff_dict() == cola.config.to_diff_dict()
    with torch.inference_mode():
        assert torch.equal(loaded(tokens).logits, cola(tokens).logits)


@pytest.mark.usefixtures("_own_module_cache")
def test_auto_classes_load_a_folder_that_brings_its_own_code(
    cola: ColaForCausalLM, tmp_path: Path, tokens: torch.Tensor
) -> None:
    saved, saved_again = tmp_path / "saved", tmp_path / "saved_again"
    cola.save_pretrained(saved)
    config = json.loads((saved / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_cola.ColaConfig",
        "AutoModelForCausalLM": "modeling_cola.ColaForCausalLM",
    }
    for code in CODE.glob("*_cola.py"):
        assert (saved / code.name).read_text() == code.read_text()
    assert AutoConfig.from_pretrained(saved, trust_remote_code=True).model_type == "cola"
    loaded = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
    assert type(loaded).__module__ != ColaForCausalLM.__module__
    with torch.inference_mode():
        assert torch.equal(loaded(tokens).logits, cola(tokens).logits)
    loaded.save_pretrained(saved_again)
    reloaded = AutoModelForCausalLM.from_pretrained(saved_again, trust_remote_code=True)
    assert torch.equal(reloaded.lm_head.weight, cola.lm_head.weight)


@pytest.mark.usefixtures("_own_module_cache")
def test_auto_classes_load_a_folder_put_together_by_hand(cola: ColaForCausalLM, tmp_path: Path) -> None:
    folder = tmp_path / "by_hand"
    cola.save_pretrained(tmp_path / "saved")
    folder.mkdir()
    shutil.copy(tmp_path / "saved" / "model.safetensors", folder)
    for code in CODE.glob("*_cola.py"):
        shutil.copy(code, folder)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    assert loaded.dtype is torch.bfloat16
    assert torch.equal(loaded.lm_head.weight, cola.lm_head.weight.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_in_pieces_and_in_half_precision(
    tmp_path: Path, tokens: torch.Tensor, dtype: torch.dtype
) -> None:
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    random_cola(qkv_bias=True).save_pretrained(whole)
    model = ColaForCausalLM.from_pretrained(whole, dtype=dtype)
    model.save_pretrained(pieces, max_shard_size="300KB")
    assert len(list(pieces.glob("*.safetensors"))) > 2
    for keywords in ({"dtype": dtype}, {"dtype": "auto"}, {"dtype": dtype, "low_cpu_mem_usage": True}):
        loaded = ColaForCausalLM.from_pretrained(pieces, **keywords)
        assert loaded.dtype is dtype
        weights = loaded.state_dict()
        assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
        with torch.inference_mode():
            assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_tied_embeddings_stay_tied_and_are_saved_once(tmp_path: Path, tokens: torch.Tensor) -> None:
    model = random_cola(tie_word_embeddings=True, qkv_bias=True)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in saved
    assert "lm_head.weight" in ColaForCausalLM(tiny_config()).state_dict()
    assert set(saved) == set(model.state_dict()) - {"lm_head.weight"}
    loaded = ColaForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.model.embed_tokens.weight)
    with torch.inference_mode():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert random_cola().lm_head.weight is not random_cola().model.embed_tokens.weight


def test_the_generation_config_keeps_greedy_tokens_and_the_policys_settings(tmp_path: Path) -> None:
    model, tokens_BS = random_cola(eos_token_id=1, pad_token_id=1), random_tokens(2, 16)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=1, pad_token_id=1, do_sample_actions=True, action_temperature=5.0
    )
    model.save_pretrained(tmp_path)
    loaded = ColaForCausalLM.from_pretrained(tmp_path)
    assert not loaded.generation_config.do_sample
    assert loaded.generation_config.eos_token_id == 1
    runs = []
    for of, keywords in ((model, {}), (loaded, {}), (loaded, {"do_sample_actions": False})):
        torch.manual_seed(0)
        runs.append(generate_with_actions(of, tokens_BS, 8, **keywords))
    assert torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][1], runs[2][1])


@pytest.mark.usefixtures("_own_module_cache")
def test_a_text_generation_pipeline_runs_on_the_folder(tmp_path: Path) -> None:
    model = random_cola(eos_token_id=1, pad_token_id=1)
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=1, pad_token_id=1)
    save_with_tokenizer(model, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    writer = pipeline("text-generation", model=str(tmp_path), trust_remote_code=True)
    prompts = [" w5 w9 w100", " w7"]
    for keywords in ({}, {"action_plan": 17}):
        # Said outright: the pipeline of transformers 4 draws tokens whatever the folder says.
        texts = writer(prompts, max_new_tokens=6, do_sample=False, **keywords)
        for prompt, text in zip(prompts, texts, strict=True):
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            expected = generate_with_actions(model, ids, 6, **keywords)[0]
            assert text[0]["generated_text"] == tokenizer.decode(expected[0], skip_special_tokens=True)
            assert text[0]["generated_text"].startswith(prompt)


ON_DISK = ("model.policy_layers", "model.action_merge_layers", "model.action_code_book")


@pytest.mark.parametrize("device_map", ["auto", "cpu", "disk"])
@pytest.mark.usefixtures("_own_module_cache")
def test_weights_are_placed_by_accelerate(
    cola: ColaForCausalLM, tmp_path: Path, tokens: torch.Tensor, device_map: str
) -> None:
    pytest.importorskip("accelerate", reason="device_map needs accelerate, which requirements.txt leaves out")
    cola.save_pretrained(tmp_path / "saved")
    parts = ["lm_head", *(f"model.{name}" for name, _ in cola.model.named_children())]
    by_part = {part: "disk" if part in ON_DISK else "cpu" for part in parts}
    loaded = cast(
        ColaForCausalLM,  # by name: it comes from the folder's code
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "saved",
            trust_remote_code=True,
            device_map=by_part if device_map == "disk" else device_map,
            offload_folder=str(tmp_path / "disk"),
        ),
    )
    on_disk = {name for name, weight in loaded.named_parameters() if weight.device.type == "meta"}
    assert on_disk == {
        name for name in cola.state_dict() if device_map == "disk" and name.startswith(ON_DISK)
    }
    with torch.inference_mode():
        assert greatest_difference(loaded(tokens).logits, cola(tokens).logits) == 0
    assert torch.equal(generate_with_actions(loaded, tokens, 4)[0], generate_with_actions(cola, tokens, 4)[0])
