"""Models of Transformer Engine's modules, or of the local ones, built without a GPU in a process of their own.

    python kernels_worker.py transformer_engine|local FOLDER

Prints one JSON line. `local` loads FOLDER/transformer_engine, a checkpoint of all parts, if it is there, and writes
FOLDER/local unless that is there; `transformer_engine` the other way round. Transformer Engine's modules can be
constructed, loaded and saved on a CPU once torch says that there is CUDA; only their kernels need it.
"""

# ruff: noqa: E402  Megatron is imported after the redirects
import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pretrain import cpu_redirects

WITH_TRANSFORMER_ENGINE = sys.argv[1:2] == ["transformer_engine"]
if WITH_TRANSFORMER_ENGINE:
    import transformer_engine.pytorch  # noqa: F401  first, so that the redirects do not hide it
cpu_redirects.apply()

from megatron.core import dist_checkpointing
from megatron.core.fp8_utils import get_fp8_context, get_fp8_recipe
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

from data_prep.errors import UserError
from pretrain.backends import Backends
from pretrain.checkpoints import checkpoint_folder, checkpointing
from pretrain.config import RunConfig
from pretrain.model import kernels, specs
from pretrain.model.cola import ColaModel
from pretrain.optimization import build_optimizer, wrap_for_data_parallel
from pretrain.parallel import ParallelContext, parallel_context
from pretrain.placement import BlockHalves
from pretrain.recipes import recipe_fields
from pretrain.stages.registry import stage_class
from tests.pretrain.tiny_runs import save_now, tiny_recipe

PARTS = ("base", "idm", "world_model", "policy")
SIZES: dict[str, dict[str, Any]] = {"actions": {"output": "reference"}, "model": {"qkv_bias": True}}


def pretend_cuda() -> None:
    """What Transformer Engine's constructors ask for; ours go on making weights on the CPU."""
    torch.cuda.is_available = lambda: True
    cpu_redirects.on_cuda = specs.on_cuda = lambda: False
    specs.find_backends = lambda: Backends(cuda=True, transformer_engine="found")


def recipe(stage: str, **training: Any) -> RunConfig:
    """A tiny BF16 recipe of `stage`."""
    training = {"precision": "bf16", **training}
    start = None if stage == "base" else Path("start")
    return tiny_recipe(stage, Path("run"), Path("data"), start, training=training, **SIZES)


def build(context: ParallelContext, config: RunConfig) -> ColaModel:
    """The model of a stage, frozen where the stage says so."""
    stage = stage_class(config)
    model = ColaModel(config, context.groups, (*stage.frozen_parts, *stage.trained_parts))
    model.freeze_all_but(stage.trained_parts)
    return model


def save(model: ColaModel, config: RunConfig, parts: tuple[str, ...], folder: Path, **changes: Any) -> None:
    """A checkpoint of `parts`, with scales but without an optimizer; `changes` replace fields of its description."""
    (folder / "weights").mkdir(parents=True)
    weights = checkpointing.sharded_weights(model, parts, scales=True)
    dist_checkpointing.save(weights, str(folder / "weights"))
    description = {
        "format_version": checkpoint_folder.FORMAT_VERSION, "stage": config.stage, "step": 1, "consumed_samples": 0,
        "consumed_tokens": 0, "parts": parts, "start_from": None, "tokenizer_fingerprint": "",
        "data_fingerprint": "", "recipe": recipe_fields(config), "loop": {}, "megatron_version": "",
        "fingerprints": checkpointing.model_fingerprints(model, parts), **changes,
    }  # fmt: skip
    (folder / checkpoint_folder.DESCRIPTION_FILE).write_text(json.dumps(description))


def exchange(model: ColaModel, config: RunConfig, folder: Path, own: str, other: str) -> dict[str, Any]:
    """Load what the other kind saved, or make random weights; save them, and a twin with one bit flipped."""
    result: dict[str, Any] = {"initial": checkpointing.model_fingerprints(model, PARTS)}
    if (folder / other).is_dir():
        result["refused"] = error_of_loading(model, PARTS, folder / f"{other}_fault")
        result["loaded"] = checkpointing.load_checked(model, PARTS, folder / other)
    else:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    result["held"], result["checksum"] = checkpointing.model_fingerprints(model, PARTS), checksum(model)
    if not (folder / own).is_dir():
        save(model, config, PARTS, folder / own)
        model.world_model.merge_layers.get_parameter("0.gate_state.weight").data.view(torch.int16)[0, 0] ^= 1
        save(model, config, PARTS, folder / f"{own}_fault", fingerprints=result["held"])
    return result


def exchange_optimizer(context: ParallelContext, folder: Path, own: str, other: str) -> dict[str, Any]:
    """Load the state of the other kind's AdamW, or take a step from random gradients; save it unless that was done."""
    config = replace(recipe("base"), run_folder=folder / f"{own}_optimizer")
    model = build(context, config)
    ddp = wrap_for_data_parallel(model, context)
    optimizer = build_optimizer(config, ddp)
    result: dict[str, Any] = {"fresh": optimizer_sums(optimizer)}
    if (folder / f"{other}_optimizer").is_dir():
        checkpoint = checkpoint_folder.resolve_checkpoint(folder / f"{other}_optimizer")
        checkpointing.load_optimizer(model, optimizer, ("base",), checkpoint)
    else:
        for buffer in ddp.buffers:
            buffer.grad_data.normal_(generator=torch.Generator().manual_seed(6))
        optimizer.step()
    result["held"] = optimizer_sums(optimizer)
    if not config.run_folder.is_dir():
        save_now(
            config,
            context,
            step=1,
            model=model,
            optimizer=optimizer,
            trained_parts=("base",),
            fingerprints={},
        )
    return result


def optimizer_sums(optimizer: MegatronOptimizer) -> dict[str, Any]:
    """Kind of AdamW, its step, and for each master weight the sums of it and of its two moments, in any order."""
    sums, steps, kinds = [], set(), set()
    for distributed in getattr(optimizer, "chained_optimizers", [optimizer]):
        adamw = distributed.optimizer
        kinds.add(type(adamw).__name__)
        for group in adamw.param_groups:
            for master in group["params"]:
                state = adamw.state.get(master, {})
                steps.add(int(state.get("step", group.get("step", 0))))
                tensors = (master, *(state[name] for name in ("exp_avg", "exp_avg_sq") if name in state))
                sums.append([float(tensor.detach().double().sum()) for tensor in tensors])
    return {"kinds": sorted(kinds), "steps": sorted(steps), "sums": sorted(sums)}


def error_of_loading(model: ColaModel, parts: tuple[str, ...], checkpoint: Path, scales: bool = False) -> str:
    """What is said against `checkpoint`."""
    try:
        checkpointing.load_checked(model, parts, checkpoint, scales)
    except UserError as error:
        return str(error)
    return "nothing was refused"


def checksum(model: ColaModel) -> dict[str, float]:
    """Sum of squares by parameter, under the local modules' names; independent of the fingerprints."""
    return {
        kernels.local_name(name): float(parameter.detach().double().square().sum())
        for name, parameter in model.named_parameters()
    }


def describe(model: ColaModel) -> dict[str, Any]:
    """Classes of the modules by name, sizes by part, and keys, shapes and dtypes of a checkpoint of it."""
    state = checkpointing.sharded_weights(model, model.parts)
    return {
        "modules": {name: type(module).__name__ for name, module in model.named_modules()},
        "devices": sorted({f"{value.device.type} {value.dtype}" for value in model.parameters()}),
        "parameters": {
            part: sum(value.numel() for value in getattr(model, part).parameters()) for part in model.parts
        },
        "trained": sum(value.numel() for value in model.parameters() if value.requires_grad),
        "checkpoint": sorted(
            f"{value.key} {tuple(getattr(value, 'global_shape', value.data.shape))} {value.data.dtype}"
            for value in state.values()
        ),
    }


def fp8_of(config: TransformerConfig) -> str:
    """The recipe of the context that Megatron opens around a layer of `config`; `off` where it opens none."""
    context = get_fp8_context(config)
    return "off" if isinstance(context, nullcontext) else type(get_fp8_recipe(config)).__name__


def fp8_parts(context: ParallelContext, stage: str, **training: Any) -> dict[str, Any]:
    """FP8 by part, what a step quantises anew, and whose scales are saved, for a model that can be built here."""
    model_recipe = recipe(stage, **training)
    model = build(context, model_recipe)
    flags = {name: module for name, module in model.named_modules() if hasattr(module, "is_first_microbatch")}
    for module in flags.values():
        module.is_first_microbatch = False
    ddp = wrap_for_data_parallel(model, context)
    ddp.set_is_first_microbatch()
    states = checkpointing.sharded_weights(model, model.parts, scales=True)
    reduced = {parameter for buffer in ddp.buffers for parameter in buffer.params}
    return {
        "config": fp8_of(model.config),
        "contexts": {part: fp8_of(getattr(model, part).config) for part in model.parts},
        "quantised_anew": sorted({name.split(".")[0] for name, m in flags.items() if m.is_first_microbatch}),
        "scales": sorted({name.split(".")[0] for name in states if name.endswith("_extra_state")}),
        "reduced": sorted(
            {name.split(".")[0] for name, value in model.named_parameters() if value in reduced}
        ),
        "trained": sorted(stage_class(model_recipe).trained_parts),
    }


def resume_delayed(context: ParallelContext, folder: Path) -> dict[str, Any]:
    """A checkpoint with scales, loaded by the run that goes on and by one without FP8; and the first without any."""
    config = recipe("idm", fp8="delayed")
    trained = stage_class(config).trained_parts
    model = build(context, config)
    without = build(context, recipe("idm"))
    save(model, config, trained, folder / "delayed")
    save(without, recipe("idm"), trained, folder / "without_scales")
    return {
        "saved": checkpointing.model_fingerprints(model, trained),
        "resumed": checkpointing.load_checked(model, trained, folder / "delayed", scales=True),
        "without": checkpointing.load_checked(without, trained, folder / "delayed"),
        "refused": error_of_loading(model, trained, folder / "without_scales", scales=True),
    }


def half_parameters(context: ParallelContext) -> dict[str, list[str]]:
    """Names of the parameters of a base block and of its halves, as local modules have them."""
    config, held = specs.transformer_config(recipe("base"), "base"), {}
    kinds = {"whole": BlockHalves(), "attention": BlockHalves(mlp=False), "mlp": BlockHalves(attention=False)}
    for name, halves in kinds.items():
        spec = kernels.block_submodules([halves])
        block = TransformerBlock(config, spec, post_process=False, pg_collection=context.groups)
        held[name] = sorted(kernels.local_name(f"block.{key}") for key, _ in block.named_parameters())
    return held


def main() -> None:
    """Entry point."""
    kind, folder = sys.argv[1], Path(sys.argv[2])
    other = "local" if WITH_TRANSFORMER_ENGINE else "transformer_engine"
    with parallel_context(tensor_parallel_size=1, seed=0) as context:
        if WITH_TRANSFORMER_ENGINE:
            pretend_cuda()
        config = recipe("policy")
        model = build(context, config)
        result = {"exchange": exchange(model, config, folder, kind, other)}
        result["optimizer"] = exchange_optimizer(context, folder, kind, other)
        result["stages"] = {stage: describe(build(context, recipe(stage))) for stage in ("base", "idm")}
        result["stages"]["policy"] = describe(model)
        result["halves"] = half_parameters(context)
        if WITH_TRANSFORMER_ENGINE:
            choices = [("idm", "off"), ("idm", "tensorwise"), ("idm", "delayed"), ("policy", "tensorwise"),
                       ("policy", "blockwise"), ("base", "tensorwise")]  # fmt: skip
            result["fp8"] = {f"{s} {fp8}": fp8_parts(context, s, fp8=fp8) for s, fp8 in choices}
            result["delayed"] = resume_delayed(context, folder)
            quantised = specs.transformer_config(recipe("idm", base_fp8="tensorwise"), "base")
            result["base_fp8"] = {"context": fp8_of(quantised), "weights": quantised.fp8_param}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
