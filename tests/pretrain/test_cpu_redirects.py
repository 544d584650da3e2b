"""Packages that need a GPU are hidden from Megatron where there is none, and only there."""

import subprocess
import sys
from pathlib import Path

import pytest

NVIDIA_FILES = [
    "apex/__init__.py",
    "apex/optimizers/__init__.py",
    "apex/optimizers/fused_adam.py",
    "amp_C.py",
]
INSTALLED = {
    "NVIDIA's apex": NVIDIA_FILES,
    "NVIDIA's apex without extensions": NVIDIA_FILES[:-1],
    "a foreign apex": ["apex/__init__.py"],
    "Transformer Engine": ["transformer_engine/__init__.py"],
}
# The optimizer that Megatron has chosen, and whether an apex is still to be found.
SCRIPT = """
import sys
from pretrain import cpu_redirects
{redirect}
from megatron.core import optimizer
from pretrain.backends import find_apex
print(optimizer.Adam.__module__.split(".")[0], find_apex()[0])
"""


def megatrons_choice(installed: str, folder: Path, redirect: str = "cpu_redirects.apply()") -> list[str]:
    """Where Megatron's AdamW comes from, and the kind of apex that is seen, in a process of its own."""
    for name in INSTALLED[installed]:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        is_optimizer = name == "apex/optimizers/__init__.py"
        file.write_text("class FusedAdam: pass\nFusedSGD = FusedAdam\n" if is_optimizer else "")
    environment = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{folder}:{Path.cwd()}", "PATH": ""}
    answer = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(redirect=redirect)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr[-2000:]
    return answer.stdout.split()


@pytest.mark.parametrize("installed", INSTALLED)
def test_megatron_takes_torchs_optimizer(installed: str, tmp_path: Path) -> None:
    """Whatever is installed; a foreign apex is left for `pretrain.backends` to refuse."""
    kind = "foreign" if installed == "a foreign apex" else "none"
    assert megatrons_choice(installed, tmp_path) == ["torch", kind]


def test_apex_would_be_chosen(tmp_path: Path) -> None:
    """The fault twin: with nothing but Transformer Engine hidden, Megatron takes apex's, which fails on a CPU."""
    hidden_before = 'sys.modules["transformer_engine"] = None'
    assert megatrons_choice("NVIDIA's apex", tmp_path, hidden_before) == ["apex", "nvidia"]
