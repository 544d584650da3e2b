"""Which modules the model is made of, what is FP8 in them, and that either kind reads the other's checkpoints.

Transformer Engine's modules are constructed here, not run: their kernels need a GPU.
Shapes: S sequence, B batch, H hidden.
"""

import json
import os
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_block import TransformerBlock

from pretrain.model import kernels, specs
from pretrain.model.cola import ColaModel
from pretrain.parallel import ParallelContext
from pretrain.placement import BlockHalves
from tests.pretrain.tiny_runs import tiny_recipe
from tests.repository_rules import ROOT

WORKER = Path(__file__).with_name("kernels_worker.py")
STAGES = ("base", "idm", "policy")
# Classes of (attention's input, attention, its output, MLP's input, its output) and of (gate and up, down) of a merge.
BLOCK = ("self_attention.linear_qkv", "self_attention.core_attention", "self_attention.linear_proj",
         "mlp.linear_fc1", "mlp.linear_fc2")  # fmt: skip
MERGE = ("gate_state", "up_state", "down", "gate_action", "up_action")
KINDS = {
    "local": (
        ["ColumnParallelLinear", "ScaledDotProductCoreAttention", "RowParallelLinear", "ColumnParallelLinear",
         "RowParallelLinear"],
        ["RegionLinear", "RegionLinear", "RowParallelLinear", "RegionLinear", "RegionLinear"],
        "RmsNorm",
    ),
    "transformer_engine": (
        ["TELayerNormColumnParallelLinear", "TEDotProductAttention", "TERowParallelLinear",
         "TELayerNormColumnParallelLinear", "TERowParallelLinear"],
        ["TEColumnParallelLinear", "TEColumnParallelLinear", "TERowParallelLinear", "RegionLinear", "RegionLinear"],
        "RMSNorm",
    ),
}  # fmt: skip
OFF = {"base": "off", "idm": "off", "world_model": "off", "policy": "off"}
# What (training.fp8, training.base_fp8) mean for the parts of a stage.
FP8_CASES = {
    ("base", "tensorwise", "off"): {"base": "tensorwise"},
    ("idm", "off", "tensorwise"): {"base": "tensorwise"},
    ("idm", "delayed", "off"): {"idm": "delayed", "world_model": "delayed"},
    ("idm", "blockwise", "blockwise"): {"base": "blockwise", "idm": "blockwise", "world_model": "blockwise"},
    ("policy", "tensorwise", "tensorwise"): {"base": "tensorwise", "policy": "tensorwise"},
    ("policy", "delayed", "off"): {"policy": "delayed"},
    ("policy", "off", "off"): {},
}


@pytest.mark.parametrize(("stage", "fp8", "base_fp8"), FP8_CASES)
def test_fp8_by_part(stage: str, fp8: str, base_fp8: str) -> None:
    """Trained parts by `fp8`, a frozen base by `base_fp8` and with FP8 weights only, frozen action modules never."""
    training = {"precision": "bf16", "fp8": fp8, "base_fp8": base_fp8}
    config = tiny_recipe(stage, Path("run"), Path("data"), Path("start"), training=training)
    expected = OFF | FP8_CASES[stage, fp8, base_fp8]
    for part, name in expected.items():
        answer = specs.transformer_config(config, part)
        assert specs.fp8_recipe(config, part) == name
        assert (answer.fp8, answer.fp8_recipe if answer.fp8 else "off") == (
            None if name == "off" else "hybrid",
            name,
        )
        assert answer.fp8_param == (part == "base" and stage != "base" and base_fp8 != "off")


def test_two_halves_are_the_block(context: ParallelContext) -> None:
    """The same initial weights, each once, and the same state to the last bit; the twin runs the MLP first."""
    recipe = tiny_recipe("base", Path("run"), Path("data"))
    config = specs.transformer_config(recipe, "base")

    def built(halves: BlockHalves) -> TransformerBlock:
        with specs.seeded(1):
            spec = kernels.block_submodules([halves])
            return TransformerBlock(config, spec, post_process=False, pg_collection=context.groups)

    whole, attention, mlp = (
        built(BlockHalves()), built(BlockHalves(mlp=False)), built(BlockHalves(attention=False))
    )  # fmt: skip
    halves = [*attention.named_parameters(), *mlp.named_parameters()]
    expected = dict(whole.named_parameters())
    assert sorted(name for name, _ in halves) == sorted(expected)
    assert all(torch.equal(weight, expected[name]) for name, weight in halves)
    rotary = ColaModel(recipe, context.groups, ("base",)).base.rotary(8)

    def run(state_SBH: torch.Tensor, *blocks: TransformerBlock) -> torch.Tensor:
        for block in blocks:
            state_SBH = block(hidden_states=state_SBH, attention_mask=None, rotary_pos_emb=rotary)
        return state_SBH

    state_SBH = torch.randn(8, 2, config.hidden_size)
    assert torch.equal(run(state_SBH, attention, mlp), run(state_SBH, whole))
    assert not torch.allclose(run(state_SBH, mlp, attention), run(state_SBH, whole), rtol=1e-3)


def check_kinds(modules: dict[str, str], kind: str) -> None:
    """Assert the classes of `modules` by name, of a policy stage with all its parts."""
    block, merge, norm = KINDS[kind]
    for blocks in ("base.decoder", "idm.blocks", "policy.blocks"):
        assert [modules[f"{blocks}.layers.0.{name}"] for name in BLOCK] == block
        assert modules[f"{blocks}.final_layernorm"] == norm
    for layer in range(2):
        assert [modules[f"world_model.merge_layers.{layer}.{name}"] for name in MERGE] == merge
    assert modules["base.output_layer"] == modules["policy.head"] == "ColumnParallelLinear"


def test_modules_of_this_machine(context: ParallelContext) -> None:
    """As `pretrain.backends` decides; the other kind's classes are not found."""
    config = tiny_recipe("policy", Path("run"), Path("data"), Path("start"))
    model = ColaModel(config, context.groups, ("base", "idm", "world_model", "policy"))
    modules = {name: type(module).__name__ for name, module in model.named_modules()}
    kind = "transformer_engine" if kernels.uses_transformer_engine() else "local"
    check_kinds(modules, kind)
    with pytest.raises(AssertionError):
        check_kinds(modules, next(other for other in KINDS if other != kind))


def run_worker(kind: str, folder: Path) -> dict[str, Any]:
    """What `kernels_worker.py` says."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(
        [sys.executable, str(WORKER), kind, str(folder)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr[-3000:]
    result: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Local models, Transformer Engine's that load their checkpoint, and local ones that load theirs."""
    # Not find_spec: on a CPU the package is hidden from this process.
    if PathFinder.find_spec("transformer_engine") is None:
        pytest.skip("Transformer Engine is not installed")
    folder = tmp_path_factory.mktemp("kernels")
    names = {"first": "local", "transformer_engine": "transformer_engine", "last": "local"}
    return {name: run_worker(kind, folder) for name, kind in names.items()}


def test_transformer_engines_modules(built: dict[str, dict[str, Any]]) -> None:
    """Its linear layers, norms and attention in every block and merge layer; embedding and heads are Megatron's."""
    check_kinds(built["transformer_engine"]["stages"]["policy"]["modules"], "transformer_engine")
    check_kinds(built["first"]["stages"]["policy"]["modules"], "local")
    names = {
        name for stage in built["transformer_engine"]["stages"].values() for name in stage["modules"].values()
    }
    assert not names & {"RmsNorm", "RowParallelLinear", "ScaledDotProductCoreAttention"}


@pytest.mark.parametrize("stage", STAGES)
def test_same_parameters_and_checkpoint(stage: str, built: dict[str, dict[str, Any]]) -> None:
    """Counts by part, trained counts, and every checkpoint key with its shape and dtype; the twin is another stage."""
    local, theirs = (built[name]["stages"][stage] for name in ("first", "transformer_engine"))
    compared = ("parameters", "trained", "checkpoint", "devices")
    assert {name: theirs[name] for name in compared} == {name: local[name] for name in compared}
    assert theirs["devices"] == ["cpu torch.bfloat16"]
    other = built["transformer_engine"]["stages"][STAGES[STAGES.index(stage) - 1]]
    assert other["checkpoint"] != local["checkpoint"]


def test_same_initial_weights(built: dict[str, dict[str, Any]]) -> None:
    """From the same seed; the twin are the random weights given afterwards."""
    local, theirs = built["first"]["exchange"], built["transformer_engine"]["exchange"]
    assert theirs["initial"] == local["initial"]
    assert theirs["initial"] != local["held"]


@pytest.mark.parametrize(
    ("reader", "writer"), [("transformer_engine", "first"), ("last", "transformer_engine")]
)
def test_either_reads_the_others_checkpoints(
    reader: str, writer: str, built: dict[str, dict[str, Any]]
) -> None:
    """Bit for bit, by fingerprints and by sums over the parameters; the twin, one bit flipped, is refused."""
    read, written = built[reader]["exchange"], built[writer]["exchange"]
    assert read["loaded"] == read["held"] == written["held"]
    assert read["checksum"] == written["checksum"]
    assert (
        "1 tensor(s) are not what was saved, first world_model.merge_layers.0.gate_state" in read["refused"]
    )


@pytest.mark.parametrize(
    ("reader", "writer"), [("transformer_engine", "first"), ("last", "transformer_engine")]
)
def test_either_goes_on_with_the_others_optimizer(
    reader: str, writer: str, built: dict[str, dict[str, Any]]
) -> None:
    """The step, master weights and moments of torch's AdamW and of Transformer Engine's; the twin is a new one."""
    read, written = built[reader]["optimizer"], built[writer]["optimizer"]
    kinds = {"transformer_engine": ["FusedAdam"]}
    assert read["held"]["kinds"] == kinds.get(reader, ["AdamW"]) != written["held"]["kinds"]
    for name in ("steps", "sums"):
        assert read["held"][name] == written["held"][name]
        assert read["fresh"][name] != read["held"][name]
    assert read["held"]["steps"] == [1]


def test_halves_of_transformer_engines_blocks(built: dict[str, dict[str, Any]]) -> None:
    """Attention and MLP, each with the norm before it, and together the block; the same as of local modules."""
    halves = built["transformer_engine"]["halves"]
    assert halves == built["first"]["halves"]
    assert sorted(halves["attention"] + halves["mlp"]) == halves["whole"]
    assert all("attention" in name or "input_layernorm" in name for name in halves["attention"])
    assert len(halves["attention"]) == 4 and len(halves["mlp"]) == 3


CLASSES = {
    "tensorwise": "Float8CurrentScaling",
    "blockwise": "Float8BlockScaling",
    "delayed": "TEDelayedScaling",
}


@pytest.mark.parametrize(
    ("case", "parts", "scales"),
    [
        ("base tensorwise", ["base"], []),
        ("idm off", [], []),
        ("idm tensorwise", ["idm", "world_model"], []),
        ("idm delayed", ["idm", "world_model"], ["idm", "world_model"]),
        ("policy tensorwise", ["policy"], []),
        ("policy blockwise", ["policy"], []),
    ],
)
def test_fp8_contexts(
    case: str, parts: list[str], scales: list[str], built: dict[str, dict[str, Any]]
) -> None:
    """FP8 contexts round trained parts only, whose weights are quantised anew each step and scales saved if delayed.

    Gradients are reduced for what is trained, whatever is FP8.
    """
    result = built["transformer_engine"]["fp8"][case]
    recipe = CLASSES.get(case.split()[1], "off")
    assert {part for part, name in result["contexts"].items() if name != "off"} == set(parts)
    assert {result["contexts"][part] for part in parts} <= {recipe}
    assert result["config"] == recipe  # which Megatron's schedule asks
    assert set(parts) <= set(result["quantised_anew"])
    assert bool(parts) == bool(result["quantised_anew"])
    assert result["scales"] == scales
    assert result["reduced"] == result["trained"]


def test_a_frozen_fp8_base(built: dict[str, dict[str, Any]]) -> None:
    """Its configuration; an FP8 weight cannot be made without a GPU."""
    assert built["transformer_engine"]["base_fp8"] == {"context": CLASSES["tensorwise"], "weights": True}


def test_delayed_scales_belong_to_the_run(built: dict[str, dict[str, Any]]) -> None:
    """A resumed run reads them, others need none; a resumed run that finds none is refused."""
    delayed = built["transformer_engine"]["delayed"]
    assert delayed["resumed"] == delayed["without"] == delayed["saved"]
    assert "_extra_state" in delayed["refused"]
