"""A configuration's problems are all found at once, each as one line that names its field."""

import ast
import dataclasses
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pretrain.config
from pretrain.config import RunConfig
from pretrain.config_checks import find_problems
from tests.pretrain.tiny_runs import tiny_recipe

# Field, bad value, ranks launched, what the line says beside the field.
BAD_FIELDS: list[tuple[str, Any, int, str]] = [
    ("start_from", None, 1, "needs the base run"),
    ("seed", -1, 1, "got -1"),
    ("seed", 2**32, 1, "got 4294967296"),
    ("model.vocab_size", 0, 1, "must be positive, got 0"),
    ("model.vocab_padding", -1, 1, "must be 0 or more, got -1"),
    ("model.num_layers", -2, 1, "must be positive, got -2"),
    ("model.head_size", 7, 1, "even size, got 7"),
    ("model.rope_theta", math.inf, 1, "must be positive, got inf"),
    ("model.rms_norm_epsilon", math.nan, 1, "must be positive, got nan"),
    ("model.num_attention_heads", 3, 1, "3 query heads do not share 2 key/value heads"),
    ("model.hidden_size", 30, 1, "30 is not a multiple of model.num_attention_heads 4"),
    ("actions.num_merge_layers", 0, 1, "must be positive, got 0"),
    ("actions.temperature", 0.0, 1, "must be positive, got 0.0"),
    ("data.sequence_length", 1, 1, "at least 2 tokens, got 1"),
    ("data.loader_workers", -1, 1, "0 or more, got -1"),
    ("training.steps", 0, 1, "must be positive, got 0"),
    ("training.global_batch_size", 6, 1, "6 is not divisible by training.micro_batch_size 4 x 1"),
    ("training.global_batch_size", 4, 2, "4 is not divisible by training.micro_batch_size 4 x 2"),
    ("training.micro_batch_size", 0, 1, "must be positive, got 0"),
    ("validation.interval_steps", 0, 1, "must be positive, got 0"),
    ("checkpoint.keep_last", 0, 1, "must be positive, got 0"),
    ("logging.interval_steps", -10, 1, "must be positive, got -10"),
    ("optimizer.learning_rate", -1e-4, 1, "must be positive, got -0.0001"),
    ("optimizer.learning_rate", 1e-9, 1, "is above optimizer.learning_rate"),
    ("optimizer.min_learning_rate", math.nan, 1, "must be 0 or more, got nan"),
    ("optimizer.warmup_steps", -1, 1, "must be 0 or more, got -1"),
    ("optimizer.decay_steps", 2, 1, "2 must exceed optimizer.warmup_steps 2"),
    ("optimizer.weight_decay", -0.1, 1, "must be 0 or more, got -0.1"),
    ("optimizer.beta1", 1.0, 1, "below 1, got 1.0"),
    ("optimizer.beta2", -0.5, 1, "below 1, got -0.5"),
    ("optimizer.epsilon", 0.0, 1, "must be positive, got 0.0"),
    ("optimizer.clip_gradient_norm", 0.0, 1, "must be positive, got 0.0"),
    (
        "parallel.tensor_parallel_size",
        0,
        2,
        "0 x parallel.pipeline_parallel_size 1 does not divide the 2 ranks",
    ),
    (
        "parallel.tensor_parallel_size",
        2,
        3,
        "2 x parallel.pipeline_parallel_size 1 does not divide the 3 ranks",
    ),
    ("parallel.tensor_parallel_size", 4, 4, "2 is not divisible by parallel.tensor_parallel_size 4"),
    (
        "parallel.pipeline_parallel_size",
        0,
        2,
        "parallel.pipeline_parallel_size 0 does not divide the 2 ranks",
    ),
    ("parallel.pipeline_parallel_size", 4, 4, "4 stages for 3 layers"),
    ("parallel.pipeline_layout", "base*1 idm*1", 1, "places base*1 idm*1, the model has base*2 idm*1"),
    ("parallel.pipeline_layout", "base*2 | idm*1", 1, "has 2 stages for parallel.pipeline_parallel_size 1"),
    ("parallel.sequence_parallel", True, 1, "of which there is one"),
    ("actions.regulariser_coefficient", -0.1, 1, "must be 0 or more, got -0.1"),
    ("actions.regulariser_coefficient", math.nan, 1, "must be 0 or more, got nan"),
    ("model.max_position_embeddings", 16, 1, "32 exceeds model.max_position_embeddings 16"),
    ("faults.max_bad_steps", 0, 1, "must be positive, got 0"),
    ("faults.spike_factor", 1.0, 1, "must be above 1, got 1.0"),
    ("checkpoint.keep_every_steps", 0, 1, "must be positive, got 0"),
    ("training.base_micro_batch_size", 0, 1, "must be positive, got 0"),
    ("training.base_micro_batch_size", 6, 1, "6 must be a multiple of training.micro_batch_size 4"),
    ("training.base_micro_batch_size", 16, 1, "divide the 8 sequences of a rank's step"),
    ("training.fp8", "tensorwise", 1, "tensorwise needs training.precision bf16, got fp32"),
    ("training.base_fp8", "tensorwise", 1, "tensorwise needs training.precision bf16, got fp32"),
]
# Fields that are wrong only together: stage, changes, ranks, how the line begins.
BAD_TOGETHER: list[tuple[str, dict[str, Any], int, str]] = [
    (
        "idm",
        {"parallel.tensor_parallel_size": 2, "parallel.sequence_parallel": True, "data.sequence_length": 31},
        2,
        "data.sequence_length: 31 is not divisible by parallel.tensor_parallel_size 2",
    ),
    (
        "base",
        {"parallel.pipeline_parallel_size": 2, "parallel.pipeline_layout": "base*2 |"},
        2,
        "parallel.pipeline_layout: the last stage of a base run must hold base layers",
    ),
    (
        "base",
        {"parallel.pipeline_parallel_size": 2, "model.tied_embeddings": True},
        2,
        "parallel.pipeline_parallel_size: tied embeddings are trained on one pipeline stage only",
    ),
    (
        "base",
        {"training.base_micro_batch_size": 8},
        1,
        "training.base_micro_batch_size: a frozen base runs apart",
    ),
    (
        "idm",
        {"training.base_micro_batch_size": 8, "parallel.pipeline_parallel_size": 2},
        2,
        "training.base_micro_batch_size: a frozen base runs apart",
    ),
    (
        "base",
        {"training.precision": "bf16", "training.base_fp8": "tensorwise"},
        1,
        "training.base_fp8: is for a frozen base",
    ),
    (
        "idm",
        {
            "training.precision": "bf16",
            "training.base_fp8": "tensorwise",
            "checkpoint.self_contained": True,
        },
        1,
        "checkpoint.self_contained: training.base_fp8 tensorwise leaves no exact base",
    ),
    (
        "idm",
        {"model.vocab_size": 33, "model.vocab_padding": 2, "parallel.tensor_parallel_size": 2},
        2,
        "model.vocab_padding: 33 tokens + 2 rows are not divisible by parallel.tensor_parallel_size 2; re-import the "
        "base with hf_to_megatron.py --pad-vocabulary-to-multiple-of 2 (a base trained from scratch: set "
        "model.vocab_padding to 1)",
    ),
    (
        "idm",
        {"training.precision": "bf16", "training.base_fp8": "tensorwise", "training.fp8": "delayed"},
        1,
        "training.base_fp8: tensorwise beside training.fp8 delayed: one Transformer Engine recipe a run",
    ),
    (
        "idm",
        {"training.precision": "bf16", "training.fp8": "tensorwise", "model.hidden_size": 24},
        1,
        "model.hidden_size: 24 is not a multiple of 16",
    ),
    (
        "idm",
        {"training.precision": "bf16", "training.base_fp8": "blockwise"},
        1,
        "model.hidden_size: 32 is not a multiple of 128",
    ),
    (
        "idm",
        {
            "training.precision": "bf16",
            "training.fp8": "tensorwise",
            "model.ffn_hidden_size": 48,
            "parallel.tensor_parallel_size": 2,
        },
        2,
        "model.ffn_hidden_size / parallel.tensor_parallel_size: 24 is not a multiple of 16",
    ),
    (
        "idm",
        {"training.precision": "bf16", "training.fp8": "tensorwise", "data.sequence_length": 31},
        1,
        "data.sequence_length: times training.micro_batch_size must be a multiple of 16",
    ),
]
# Not by themselves, but together with two tensor-parallel ranks.
INDIVISIBLE_BY_TWO = {
    "model.vocab_size": "model.vocab_padding: 33 tokens + 0 rows are not divisible by ",
    "model.ffn_hidden_size": "model.ffn_hidden_size: 33 is not divisible by ",
    "actions.num_actions": "actions.num_actions: 33 is not divisible by ",
}


def good_recipe(stage: str = "idm") -> RunConfig:
    """Nothing is wrong with it on one, two or four ranks."""
    return tiny_recipe(stage, Path("run"), Path("data"), Path("base") if stage != "base" else None)


def with_field(config: RunConfig, name: str, value: Any) -> RunConfig:
    """`config` with the field of the dotted `name` replaced."""
    section, _, key = name.rpartition(".")
    if not section:
        return dataclasses.replace(config, **{key: value})
    return dataclasses.replace(
        config, **{section: dataclasses.replace(getattr(config, section), **{key: value})}
    )


@pytest.mark.parametrize("stage", ["base", "idm", "policy"])
@pytest.mark.parametrize(("world_size", "tensor_parallel_size"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_a_good_recipe_has_no_problems(stage: str, world_size: int, tensor_parallel_size: int) -> None:
    config = with_field(good_recipe(stage), "parallel.tensor_parallel_size", tensor_parallel_size)
    assert find_problems(with_field(config, "training.micro_batch_size", 2), world_size) == []


@pytest.mark.parametrize(("name", "value", "world_size", "says"), BAD_FIELDS)
def test_a_bad_field_is_one_line_that_names_it(name: str, value: Any, world_size: int, says: str) -> None:
    problems = find_problems(with_field(good_recipe(), name, value), world_size)
    assert any(says in problem for problem in problems), problems
    for problem in problems:
        assert "\n" not in problem and problem.split(": ")[0] in field_names()
    assert any(name in problem for problem in problems if says in problem)


@pytest.mark.parametrize(("stage", "changes", "world_size", "begins"), BAD_TOGETHER)
def test_fields_that_do_not_go_together_are_told(
    stage: str, changes: dict[str, Any], world_size: int, begins: str
) -> None:
    """In one line that begins with the field to change."""
    config = with_field(good_recipe(stage), "training.micro_batch_size", 4)
    for name, value in changes.items():
        config = with_field(config, name, value)
    if world_size > 1:  # so that the batch divides however the ranks are used
        config = with_field(config, "training.global_batch_size", 4 * world_size)
    problems = find_problems(config, world_size)
    assert any(problem.startswith(begins) for problem in problems), problems
    assert all("\n" not in problem for problem in problems)


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel.pipeline_parallel_size": 2},
        {"parallel.pipeline_parallel_size": 2, "parallel.pipeline_layout": "base*2 | idm*1"},
        {"parallel.tensor_parallel_size": 2, "parallel.sequence_parallel": True},
        {"training.base_micro_batch_size": 4},
        {"training.precision": "bf16", "training.fp8": "tensorwise", "training.base_fp8": "tensorwise"},
        {"model.tied_embeddings": True, "parallel.pipeline_parallel_size": 2},
        {"model.vocab_size": 33, "model.vocab_padding": 1, "parallel.tensor_parallel_size": 2},
        {"checkpoint.self_contained": True},
    ],
)
def test_layouts_and_fp8_are_no_problem_where_they_fit(changes: dict[str, Any]) -> None:
    """The same checks, on two ranks, with nothing to say."""
    config = with_field(good_recipe(), "training.micro_batch_size", 4)
    for name, value in changes.items():
        config = with_field(config, name, value)
    assert find_problems(config, 2) == []


def field_names() -> set[str]:
    """Dotted names of all fields that hold a value."""
    sections = {name: value for name, value in vars(good_recipe()).items() if dataclasses.is_dataclass(value)}
    nested = {f"{section}.{key}" for section, holder in sections.items() for key in vars(holder)}
    return nested | (vars(good_recipe()).keys() - sections.keys())


@pytest.mark.parametrize("name", INDIVISIBLE_BY_TWO)
def test_what_tensor_parallel_ranks_share_must_divide(name: str) -> None:
    """The same size is fine on one rank: only the layout is at fault."""
    odd = with_field(good_recipe(), name, 33)
    assert find_problems(odd, 1) == []
    problems = find_problems(with_field(odd, "parallel.tensor_parallel_size", 2), 2)
    assert len(problems) == 1
    assert problems[0].startswith(f"{INDIVISIBLE_BY_TWO[name]}parallel.tensor_parallel_size 2")


def test_all_problems_are_reported_at_once() -> None:
    """As many lines as mistakes, in one answer."""
    config = good_recipe()
    mistakes = {
        "start_from": None,
        "seed": -1,
        "training.steps": 0,
        "training.global_batch_size": 6,
        "actions.temperature": -1.0,
        "data.sequence_length": 0,
        "optimizer.beta2": 1.0,
        "model.head_size": 5,
    }
    for name, value in mistakes.items():
        config = with_field(config, name, value)
    assert {problem.split(":")[0] for problem in find_problems(config, 1)} == mistakes.keys()
    assert len(find_problems(config, 1)) == len(mistakes)


@pytest.mark.parametrize(
    ("stage", "field", "value", "says"),
    [
        ("base", "start_from", Path("runs/x"), "start_from: a base run starts from random weights"),
        ("policy", "start_from", None, "start_from: stage 'policy' needs the idm run"),
        ("policy", "actions.assignment", "vq", "actions.assignment: a policy is trained on 'gumbel'"),
    ],
)
def test_what_a_stage_cannot_have_is_said(stage: str, field: str, value: object, says: str) -> None:
    (problem,) = find_problems(with_field(good_recipe(stage), field, value), 1)
    assert problem.startswith(says)


def test_zero_is_allowed_where_it_means_something() -> None:
    config = good_recipe()
    names = ("optimizer.warmup_steps", "optimizer.min_learning_rate", "optimizer.weight_decay", "seed",
             "actions.regulariser_coefficient"  )  # fmt: skip
    for name in names:
        config = with_field(config, name, 0)
    assert find_problems(config, 1) == []


def undocumented_fields(source: str) -> Iterator[str]:
    """`Class.field` of every class field without a docstring: under it, or of the class that is its type."""
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    documented_types = {node.name for node in classes if ast.get_docstring(node)}
    for node in classes:
        for item, following in zip(node.body, [*node.body[1:], ast.Pass()], strict=True):
            if not isinstance(item, ast.AnnAssign) or ast.unparse(item.annotation) in documented_types:
                continue
            if not (isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)):
                yield f"{node.name}.{ast.unparse(item.target)}"


def test_every_field_has_its_meaning_under_it() -> None:
    """The command line's help is made of these."""
    source = Path(pretrain.config.__file__).read_text()
    assert list(undocumented_fields(source)) == []
    without_one = source.replace('    """Peak learning rate."""\n', "")
    assert list(undocumented_fields(without_one)) == ["OptimizerConfig.learning_rate"]


def test_every_config_class_is_frozen_and_keyword_only() -> None:
    sections = [value for value in vars(good_recipe()).values() if dataclasses.is_dataclass(value)]
    for part in (good_recipe(), *sections):
        assert all(field.kw_only for field in dataclasses.fields(part))
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, dataclasses.fields(part)[0].name, 1)


def test_tokens_of_a_step_are_those_of_all_ranks() -> None:
    config = with_field(good_recipe(), "training.global_batch_size", 512)
    assert with_field(config, "data.sequence_length", 2048).tokens_per_step == 1_048_576


def test_configuration_does_not_load_torch() -> None:
    """So that a recipe is checked in milliseconds."""
    probe = "import sys, pretrain.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0
