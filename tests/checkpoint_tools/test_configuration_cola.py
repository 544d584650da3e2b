"""The configuration's fields and errors, and model folders: saved, loaded, run by the code they bring."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, dynamic_module_utils

from checkpoint_tools.huggingface import modeling_cola
from checkpoint_tools.huggingface.configuration_cola import ColaConfig
from checkpoint_tools.huggingface.modeling_cola import ColaForCausalLM
from tests.checkpoint_tools.random_cola import random_cola, random_tokens, randomise, tiny_config

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
        ColaConfig(num_actions=0, num_merge_layers=0, num_idm_layers=-1, output_form="sum")
    for field in ("num_actions", "num_merge_layers", "num_idm_layers", "output_form"):
        assert field in str(error.value)


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


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model = ColaForCausalLM(tiny_config(tie_word_embeddings=True))
    randomise(model, seed=0)
    model.save_pretrained(tmp_path)
    loaded = ColaForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.model.embed_tokens.weight)
    assert random_cola().lm_head.weight is not random_cola().model.embed_tokens.weight
