"""The model's code runs on transformers 4 as well, and folders go back and forth.

Two majors of transformers do not fit into one environment: TRANSFORMERS_4_PYTHON names the interpreter of another one
that has torch, safetensors, accelerate, pytest and the last transformers 4. Without it these tests are skipped.
"""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, dynamic_module_utils

from tests.checkpoint_tools.random_cola import (
    generate_with_actions,
    greatest_difference,
    random_cola,
    random_tokens,
)

ROOT = Path(__file__).resolve().parents[2]
BEHAVIOUR = (
    "test_configuration_cola.py",
    "test_modeling_cola.py",
    "test_modeling_cola_bases.py",
    "test_generation.py",
    "test_generation_steps.py",
)
# Loads a folder as a stranger would, writes what it computes, and saves the folder again.
LOAD_AND_SAVE = """
import sys
import torch
import transformers
from transformers import AutoModelForCausalLM
assert transformers.__version__.startswith("4."), transformers.__version__
source, target, tokens, outputs = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True).eval()
tokens_BS = torch.load(tokens)
with torch.inference_mode():
    generated = model.generate(tokens_BS, max_new_tokens=8, action_plan=[1, 2], return_dict_in_generate=True)
    torch.save({"logits": model(tokens_BS).logits, "actions": generated.actions}, outputs)
model.save_pretrained(target)
"""

python_4 = os.environ.get("TRANSFORMERS_4_PYTHON", "")
pytestmark = pytest.mark.skipif(
    not python_4, reason="TRANSFORMERS_4_PYTHON names no interpreter with transformers 4 (see this file)"
)


def run(*arguments: str) -> str:
    """What that interpreter prints."""
    done = subprocess.run([python_4, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_every_test_of_the_model_passes_on_transformers_4() -> None:
    assert run("-c", "import transformers; print(transformers.__version__)").startswith("4.")
    folder = Path(__file__).parent
    files = [str(folder / name) for name in BEHAVIOUR]
    summary = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *files).splitlines()[-1]
    assert "passed" in summary
    assert "skipped" not in summary


@pytest.mark.parametrize("qwen", [False, True])
def test_a_folder_goes_to_transformers_4_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, qwen: bool
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules_4"))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules_5"))
    monkeypatch.syspath_prepend(tmp_path / "modules_5")
    ours, theirs, tokens_BS = tmp_path / "ours", tmp_path / "theirs", random_tokens(2, 64)
    model = random_cola(qkv_bias=qwen, tie_word_embeddings=qwen)
    model.save_pretrained(ours)
    torch.save(tokens_BS, tmp_path / "tokens.pt")
    files = (str(ours), str(theirs), str(tmp_path / "tokens.pt"), str(tmp_path / "outputs.pt"))
    run("-c", LOAD_AND_SAVE, *files)
    outputs = torch.load(tmp_path / "outputs.pt")
    returned = AutoModelForCausalLM.from_pretrained(theirs, trust_remote_code=True).eval()
    with torch.inference_mode():
        expected = model(tokens_BS).logits
        assert greatest_difference(outputs["logits"], expected) < 1e-4
        assert greatest_difference(returned(tokens_BS).logits, expected) < 1e-4
        unscaled = random_cola(qkv_bias=qwen, tie_word_embeddings=qwen, rope_parameters=None)
        assert greatest_difference(unscaled(tokens_BS).logits, expected) > 0.1, "wrong angles would be seen"
    assert torch.equal(outputs["actions"], generate_with_actions(model, tokens_BS, 8, action_plan=[1, 2])[1])
    assert (returned.get_output_embeddings().weight is returned.get_input_embeddings().weight) is qwen
