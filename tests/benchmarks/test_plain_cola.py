"""The plain CoLA by itself: its base beside transformers, its actions beside the authors' outputs, its trainer.

Shapes: B batch, S sequence, A actions.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from benchmarks.plain_cola import losses, trainer
from benchmarks.plain_cola.losses import PlainBatch
from benchmarks.plain_cola.model import PlainCola
from benchmarks.plain_cola.settings import PlainMethod, PlainOptimizer, PlainSizes, Stage
from benchmarks.plain_cola.trainer import PlainTrainer, learning_rate
from tests import repository_rules as rules
from tests.reference_vectors import ROPES, Vectors, needs_vectors, read_vectors, wrong

# Heads and length as large as the rotary scaling needs to show: at head size 8 and 32 tokens it hardly does.
LLAMA = PlainSizes(
    vocab_size=128, hidden_size=128, ffn_hidden_size=192, num_attention_heads=2, num_key_value_heads=1,
    head_size=64, rms_norm_epsilon=1e-5, rope_theta=500000.0, rope_scaling_factor=8.0, qkv_bias=False,
    tied_embeddings=False, num_layers=2, num_idm_layers=1, num_merge_layers=2, num_policy_layers=1,
    num_actions=8,
)  # fmt: skip
QWEN = dataclasses.replace(LLAMA, rope_scaling_factor=None, qkv_bias=True, tied_embeddings=True)
RESIDUAL = PlainMethod(output="residual", temperature=2.0, regulariser="usage", regulariser_coefficient=0.1)
SEQUENCE_LENGTH = 512
TOLERANCE = 1e-5
SETTINGS = PlainOptimizer(
    learning_rate=1e-2, min_learning_rate=1e-3, warmup_steps=10, decay_steps=110, weight_decay=0.1, beta1=0.9,
    beta2=0.999, epsilon=1e-8, clip_gradient_norm=1.0,
)  # fmt: skip


def huggingface_twin(sizes: PlainSizes) -> PreTrainedModel:
    """transformers' model of the same sizes, large random weights."""
    scaling = {"factor": sizes.rope_scaling_factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    rope = {"rope_type": "llama3", **scaling} if sizes.rope_scaling_factor else {"rope_type": "default"}
    fields: dict[str, Any] = {
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.ffn_hidden_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_attention_heads,
        "num_key_value_heads": sizes.num_key_value_heads,
        "rms_norm_eps": sizes.rms_norm_epsilon,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_theta": sizes.rope_theta, **rope},
        "tie_word_embeddings": sizes.tied_embeddings,
    }
    torch.manual_seed(0)
    twin = (
        Qwen2ForCausalLM(Qwen2Config(**fields)) if sizes.qkv_bias else LlamaForCausalLM(LlamaConfig(**fields))
    )
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2)
    return twin


def differences_from(twin: PreTrainedModel, model: PlainCola) -> dict[str, float]:
    """Relative difference of the logits, and of every gradient of the next-token loss."""
    weights = {name.removeprefix("model."): tensor for name, tensor in twin.state_dict().items()}
    model.load_state_dict(weights)
    tokens_BS = torch.randint(0, LLAMA.vocab_size, (2, SEQUENCE_LENGTH + 1))
    inputs_BS, labels_BS = tokens_BS[:, :-1], tokens_BS[:, 1:]
    expected, found = twin(inputs_BS).logits, model.base_logits(model.hidden(inputs_BS))
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels_BS.flatten()).backward()
    losses.next_token_losses(found, labels_BS).mean().backward()
    theirs = {name.removeprefix("model."): p.grad for name, p in twin.named_parameters()}
    ours = {name: p.grad for name, p in model.named_parameters()}
    pairs = {name: (theirs[name], ours[name]) for name in ours} | {"logits": (expected, found)}
    return {name: float((a - b).detach().norm() / a.detach().norm()) for name, (a, b) in pairs.items()}


@pytest.mark.parametrize("sizes", [LLAMA, dataclasses.replace(LLAMA, rope_scaling_factor=None), QWEN])
def test_the_base_and_its_gradients_are_those_of_transformers(sizes: PlainSizes) -> None:
    found = differences_from(huggingface_twin(sizes), PlainCola(sizes, RESIDUAL, ["base"]))
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize(
    "changed", [{"rope_scaling_factor": None}, {"rope_theta": 400000.0}, {"rms_norm_epsilon": 1e-2}]
)
def test_another_base_shows(changed: dict[str, float | None]) -> None:
    """The fault twins; the scaling's effect is the one that small tests miss."""
    model = PlainCola(dataclasses.replace(LLAMA, **changed), RESIDUAL, ["base"])  # type: ignore[arg-type]
    assert differences_from(huggingface_twin(LLAMA), model)["logits"] > 100 * TOLERANCE


def sizes_in(vectors: Vectors, rope: str) -> PlainSizes:
    sizes = vectors.sizes
    return PlainSizes(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        ffn_hidden_size=sizes["intermediate_size"],
        num_attention_heads=sizes["num_attention_heads"],
        num_key_value_heads=sizes["num_key_value_heads"],
        head_size=sizes["hidden_size"] // sizes["num_attention_heads"],
        rms_norm_epsilon=sizes["rms_norm_eps"],
        rope_theta=sizes["rope_theta"],
        rope_scaling_factor=sizes["rope_scaling"]["factor"] if rope == "llama3" else None,
        qkv_bias=False,
        tied_embeddings=False,
        num_layers=sizes["num_hidden_layers"],
        num_idm_layers=sizes["num_action_layer"],
        num_merge_layers=sizes["num_dyna_layer"],
        num_policy_layers=sizes["num_policy_layer"],
        num_actions=sizes["num_code"],
    )


@torch.no_grad()
def differences_from_the_authors(rope: str, output: str, swap_gate_and_up: bool = False) -> dict[str, float]:
    """Greatest difference of each output from the authors' (for actions: how many differ)."""
    vectors = read_vectors()
    method = dataclasses.replace(RESIDUAL, output=output)  # type: ignore[arg-type]
    model = PlainCola(sizes_in(vectors, rope), method)
    weights = {name.removeprefix("model."): tensor for name, tensor in vectors.weights().items()}
    if swap_gate_and_up:
        gate, up = (f"action_merge_layers.0.{name}_proj.weight" for name in ("gate", "up"))
        weights |= {gate: weights[up], up: weights[gate]}
    model.load_state_dict(weights)
    hidden_BSH = model.hidden(vectors.tensors["input_ids"].long())
    idm_BSA, policy_BSA = model.idm_logits(hidden_BSH), model.policy_logits(hidden_BSH)

    def world(logits_BSA: torch.Tensor) -> torch.Tensor:
        one_hot_BSA = torch.nn.functional.one_hot(logits_BSA.argmax(-1), model.sizes.num_actions).float()
        return model.world_logits(hidden_BSH, one_hot_BSA)

    theirs = {name: vectors.tensors[f"{rope}.{name}"] for name in (
        "hidden", "policy_logits", "idm_action_unshifted", "logits_idm_actions", "logits_greedy_policy")}  # fmt: skip
    pairs = {
        "hidden": (hidden_BSH, theirs["hidden"]),
        "policy_logits": (policy_BSA, theirs["policy_logits"]),
        # the last position has no next token; theirs repeats the action before it
        "logits_idm_actions": (
            world(losses.shift_to_previous(idm_BSA))[:, :-1],
            theirs["logits_idm_actions"][:, :-1],
        ),
        "logits_greedy_policy": (world(policy_BSA), theirs["logits_greedy_policy"]),
    }
    found = {name: float((ours - authors).abs().max()) for name, (ours, authors) in pairs.items()}
    return found | {"actions": float((idm_BSA.argmax(-1) != theirs["idm_action_unshifted"]).sum())}


@needs_vectors
@pytest.mark.parametrize("rope", ROPES)
def test_every_output_is_the_authors(rope: str) -> None:
    found = differences_from_the_authors(rope, "reference")
    assert not wrong(found), found


@needs_vectors
def test_another_world_model_shows() -> None:
    """The fault twins: the other output form, and gate and up exchanged."""
    world = {"logits_idm_actions", "logits_greedy_policy"}
    assert wrong(differences_from_the_authors("plain", "residual")) == world
    assert wrong(differences_from_the_authors("plain", "reference", swap_gate_and_up=True)) == world


def small_model(method: PlainMethod = RESIDUAL) -> PlainCola:
    torch.manual_seed(0)
    return PlainCola(LLAMA, method)


def random_batch(sequence_length: int = 64) -> PlainBatch:
    generator = torch.Generator().manual_seed(1)
    tokens_BS = torch.randint(0, LLAMA.vocab_size, (2, sequence_length + 1), generator=generator)
    uniform_BSA = torch.rand(2, sequence_length, LLAMA.num_actions, generator=generator)
    return PlainBatch(tokens_BS[:, :-1], tokens_BS[:, 1:], -torch.log(-torch.log(uniform_BSA)))


def saved_bytes(work: Callable[[], torch.Tensor]) -> int:
    """What autograd keeps for the backward pass of `work`, each storage once."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = work()
    loss.backward()
    return sum(kept.values())


@pytest.mark.parametrize("stage", ["base", "policy"])
def test_activation_checkpointing_keeps_less_and_changes_nothing(stage: Stage) -> None:
    """Same gradients to the last bit; twice the blocks' activations would not go unseen."""
    found = []
    for checkpointing in (False, True):
        run = PlainTrainer(small_model(), stage, SETTINGS, activation_checkpointing=checkpointing)
        kept_bytes = saved_bytes(lambda run=run: losses.stage_loss(run.model, stage, random_batch()))  # type: ignore[misc]
        found.append((kept_bytes, {name: p.grad for name, p in run.trained_parameters().items()}))
    (whole, gradients), (less, again) = found
    assert less < whole / 2
    assert all(torch.equal(gradients[name], again[name]) for name in gradients)  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", ["base", "idm", "policy"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stage_learns_and_leaves_the_rest_alone(stage: Stage, precision: str) -> None:
    """The loss falls on a batch seen again and again; frozen tensors keep every bit, trained ones are fp32."""
    run = PlainTrainer(small_model(), stage, SETTINGS, precision=precision)  # type: ignore[arg-type]
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    reports = [run.step([random_batch(), random_batch()]) for _ in range(12)]
    assert float(reports[-1].loss) < 0.97 * float(reports[0].loss)
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(run.trained_parameters())
    assert {p.dtype for p in run.trained_parameters().values()} == {torch.float32}


def test_mixed_precision_computes_the_same_loss_coarsely() -> None:
    exact, coarse = (
        float(PlainTrainer(small_model(), "idm", SETTINGS, precision=precision).accumulate([random_batch()]))
        for precision in ("fp32", "bf16")
    )
    assert 0 < abs(coarse - exact) < 0.01 * exact


def test_what_each_stage_trains_is_a_partition() -> None:
    model = small_model()
    trained = [
        set(PlainTrainer(model, stage, SETTINGS).trained_parameters()) for stage in trainer.TRAINED_PREFIXES
    ]
    assert sum(map(len, trained)) == len(set.union(*trained)) == len(list(model.parameters()))


def test_only_the_codebook_is_spared_weight_decay() -> None:
    run = PlainTrainer(small_model(), "idm", SETTINGS)
    decays = {id(p): group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    spared = {name for name, p in run.trained_parameters().items() if decays[id(p)] == 0}
    assert spared == {trainer.NO_WEIGHT_DECAY}
    assert set(decays.values()) == {0, SETTINGS.weight_decay}


def test_the_optimizer_sees_the_schedule_of_its_step() -> None:
    """The first step has 1 / warm-up of the peak; the scheduler's own count, from zero, would make it nothing."""
    run = PlainTrainer(small_model(), "policy", SETTINGS)
    rates = []
    for _ in range(3):
        rates.append(run.optimizer.param_groups[0]["lr"])
        run.step([random_batch()])
    assert rates == pytest.approx(
        [SETTINGS.learning_rate * step / SETTINGS.warmup_steps for step in (1, 2, 3)]
    )


def test_learning_rates_at_the_corners_of_the_schedule() -> None:
    half_way = (SETTINGS.learning_rate + SETTINGS.min_learning_rate) / 2
    assert [learning_rate(SETTINGS, step) for step in (1, 10, 60, 110, 1000)] == pytest.approx(
        [1e-3, 1e-2, half_way, 1e-3, 1e-3]
    )
    assert math.isclose(learning_rate(dataclasses.replace(SETTINGS, warmup_steps=0), 1), 1e-2, rel_tol=1e-3)


def foreign_imports(source: str) -> set[str]:
    """Modules of the project, or Megatron's, beyond sizes and the table of published names."""
    allowed = ("benchmarks.plain_cola", "pretrain.config", "checkpoint_tools.formats.weight_map")
    ours = {
        name for name in rules.imported_modules(source) if name.split(".")[0] in (*rules.LAYERS, "megatron")
    }
    return {name for name in ours if not f"{name}.".startswith(tuple(f"{prefix}." for prefix in allowed))}


def test_nothing_of_the_megatron_model_is_in_it() -> None:
    files = [path for path in rules.package_files() if path.parent == Path("benchmarks/plain_cola")]
    assert len(files) > 3
    assert not set().union(*(foreign_imports((rules.ROOT / path).read_text()) for path in files))
    assert foreign_imports("from pretrain.actions import masked_mean\n")
