"""Only a whole CoLA export is evaluated."""

from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from data_prep.errors import UserError
from evaluation.huggingface_model import ExportedModel, decode, load_exported_model
from tests.checkpoint_tools.random_cola import random_cola
from tests.evaluation.tiny_demo import CHINESE_WORDS, NUM_ACTIONS


def test_an_export_is_loaded_from_its_own_code(exported: ExportedModel) -> None:
    assert type(exported.model).__module__.startswith("transformers_modules.")
    assert exported.model.config.num_actions == NUM_ACTIONS
    assert decode(exported.tokenizer, [2, 1]) == CHINESE_WORDS[0] + "</s>"


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config.json there; --model must be"):
        load_exported_model(tmp_path)


@pytest.mark.parametrize("part", ["idm", "policy"])
def test_an_export_without_a_part_is_refused(tmp_path: Path, part: str) -> None:
    layers = {"idm": 1, "policy": 1, part: 0}
    random_cola(
        vocab_size=8,
        hidden_size=16,
        num_attention_heads=1,
        num_idm_layers=layers["idm"],
        num_policy_layers=layers["policy"],
    ).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match=f"exported without its {part}".replace("idm", "IDM")):
        load_exported_model(tmp_path)


def test_an_ordinary_llama_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="a LlamaForCausalLM, not a CoLA model"):
        load_exported_model(tmp_path)
