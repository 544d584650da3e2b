"""Models with streamed weights compute what they compute when loaded whole; memory is a layer's, not the model's."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoint_tools.comparison.huggingface_side import HuggingFaceModel
from checkpoint_tools.comparison.layerwise_model import LayerwiseModel, Probe
from checkpoint_tools.comparison.megatron_side import MegatronModel
from checkpoint_tools.formats.opened_model import OpenedCheckpoint, open_model
from checkpoint_tools.huggingface.modeling_cola import ColaForCausalLM
from pretrain.checkpoints.checkpointing import load_parts
from pretrain.model.cola import ColaModel
from pretrain.parallel import parallel_context
from tests.checkpoint_tools.tiny_models import cola_folder, save_as_checkpoint
from tests.pretrain.megatron_outputs import MegatronOutputs

ROOT = Path(__file__).resolve().parents[3]
PARTS = ("base", "idm", "world_model", "policy")
TOKENS, VOCABULARY = 96, 320
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cola_folder(tmp_path_factory.mktemp("layerwise") / "hf", output_form="reference")


@pytest.fixture(scope="module")
def probe() -> Probe:
    """Positions as models count them themselves."""
    generator = torch.Generator().manual_seed(1)
    return Probe(
        tokens_S=torch.randint(VOCABULARY, (TOKENS,), generator=generator),
        actions_S=torch.randint(64, (TOKENS,), generator=generator),
        runs=(range(TOKENS),),
    )


@torch.no_grad()
def outputs(model: LayerwiseModel, probe: Probe) -> dict[str, torch.Tensor]:
    """What a streamed model computes."""
    hidden_SH = model.hidden()
    return {
        "base": model.token_logits(hidden_SH),
        "idm": model.action_logits("idm", hidden_SH),
        "policy": model.action_logits("policy", hidden_SH),
        "world_model": model.token_logits(model.world_state(hidden_SH, probe.actions_S)),
    }


def differing(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> set[str]:
    """Outputs that are not the expected ones."""
    return {
        name
        for name, tensor in expected.items()
        if not torch.allclose(found[name], tensor, rtol=0, atol=TOLERANCE * float(tensor.abs().max()))
    }


@torch.no_grad()
def test_a_folder_computes_what_it_computes_when_loaded_whole(folder: Path, probe: Probe) -> None:
    opened, tokens_BS = open_model(folder), probe.tokens_S[None]
    dtypes = {name: facts.dtype for name, facts in opened.reader.facts.items()}
    found = outputs(HuggingFaceModel(opened, probe, dtypes), probe)
    whole = ColaForCausalLM.from_pretrained(folder).eval()
    expected = {
        "base": whole.base_logits(tokens_BS)[0],
        "policy": whole.policy_logits(tokens_BS)[0],
        "world_model": whole.forward_world_model(tokens_BS, probe.actions_S[None])[0],
    }
    assert differing(found, expected) == set()
    assert differing({"idm": found["idm"][1:]}, {"idm": whole.infer_action_logits(tokens_BS)[0]}) == set()
    rounded = HuggingFaceModel(opened, probe, dict.fromkeys(dtypes, torch.bfloat16))
    assert differing(outputs(rounded, probe), expected) == set(expected)


@torch.no_grad()
def test_a_checkpoint_computes_what_it_computes_when_loaded_whole(
    folder: Path, probe: Probe, tmp_path: Path
) -> None:
    """At the positions of the probe: the twin, at others, computes something else."""
    source = open_model(save_as_checkpoint(folder, tmp_path / "run", vocab_padding=64)).source
    assert isinstance(source, OpenedCheckpoint)
    dtypes = {name: facts.dtype for name, facts in open_model(folder).reader.facts.items()}
    gap = replace(probe, runs=(range(TOKENS // 2), range(1000, 1000 + TOKENS // 2)))
    with parallel_context(tensor_parallel_size=1, seed=0) as context:
        found = outputs(MegatronModel(source, PARTS, probe, dtypes, context.groups), probe)
        with_gap = outputs(MegatronModel(source, PARTS, gap, dtypes, context.groups), gap)
        model = ColaModel(source.recipe, context.groups, PARTS)
        load_parts(model, PARTS, source.folder)
        whole = MegatronOutputs(model, "reference", probe.tokens_S[None])
        expected = {
            "base": whole.base_logits_BSV[0, :, :VOCABULARY],
            "idm": whole.idm_logits_SBA[:, 0],
            "policy": whole.policy_logits_BSA[0],
            "world_model": whole.world_logits(probe.actions_S[None])[0, :, :VOCABULARY],
        }
    assert differing(found, expected) == set()
    assert differing(with_gap, expected) == set(expected)


# Prints by how many MiB comparing folders with checkpoints raises the peak of memory: a shallow model, a deep one, and
# the deep one by a reader that holds on to what it reads.
MEASURE = """
import sys
from dataclasses import replace
from pathlib import Path
from checkpoint_tools.compare import verify_conversion
from checkpoint_tools.formats.opened_model import open_model

def memory_mib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

def raised_mib(name, hoard=None):
    folder, run = open_model(root / name), open_model(root / f"{name}_run")
    if hoard is not None:
        read = folder.source.read
        folder.source.read = lambda name: hoard.append(read(name)) or hoard[-1]
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts anew
    before = memory_mib("VmRSS:")
    verify_conversion(folder, run)
    return memory_mib("VmHWM:") - before

root = Path(sys.argv[1])
raised_mib("shallow")  # loads what is loaded once
print(raised_mib("shallow"), raised_mib("deep"), raised_mib("deep", hoard=[]))
"""


def test_memory_is_that_of_a_layer(tmp_path: Path) -> None:
    """24 layers need hardly more than 2 of the same width, of 7 MiB each."""
    for name, layers in (("shallow", 2), ("deep", 24)):
        config = LlamaConfig(
            vocab_size=1000,
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=layers,
            num_attention_heads=6,
        )
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
        save_as_checkpoint(tmp_path / name, tmp_path / f"{name}_run")
    # What is freed goes back to the system, else the allocator's own habits are measured.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        cwd=ROOT,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    shallow_mib, deep_mib, hoard_mib = map(float, done.stdout.split())
    assert deep_mib < shallow_mib + 14
    assert hoard_mib > shallow_mib + 140
