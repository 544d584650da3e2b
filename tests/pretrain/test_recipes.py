"""What is read is what was written, and whatever is wrong with a recipe is said in one clear line."""

import dataclasses
import io
import itertools
import json
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from pretrain.config import RunConfig
from pretrain.config_checks import find_problems
from pretrain.recipes import dump_recipe, load_recipe, parse_recipe, recipe_fields, recipe_from_fields

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = sorted(path for path in CONFIGS.glob("*.yaml") if not path.name.startswith("blend_"))
DEMO = CONFIGS / "demo_idm.yaml"
FAMILIES = [
    ("demo_base", "demo_idm", "demo_policy"),
    ("idm_llama31_8b", "policy_llama31_8b"),
    ("idm_llama31_8b_paper", "policy_llama31_8b_paper"),
    ("idm_llama31_70b", "policy_llama31_70b"),
    ("idm_qwen25_math_1_5b", "policy_qwen25_math_1_5b"),
]


def leaf_fields() -> dict[str, Any]:
    """Type of every field that holds a value, by dotted name."""
    leaves: dict[str, Any] = {}
    for outer in dataclasses.fields(RunConfig):
        if dataclasses.is_dataclass(outer.type):
            types = typing.get_type_hints(outer.type)
            leaves |= {
                f"{outer.name}.{inner.name}": types[inner.name] for inner in dataclasses.fields(outer.type)
            }
        else:
            leaves[outer.name] = outer.type
    return leaves


def flat(config: RunConfig) -> dict[str, object]:
    """Value of every leaf."""
    return {
        f"{section}.{key}" if section else key: value
        for section, holder in {"": config, **vars(config)}.items()
        if dataclasses.is_dataclass(holder)
        for key, value in vars(holder).items()
        if not dataclasses.is_dataclass(value)
    }


def values_of(annotation: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type, also those that no run would have."""
    if typing.get_origin(annotation) is typing.Literal:
        return st.sampled_from(typing.get_args(annotation))
    strategies: dict[Any, st.SearchStrategy[Any]] = {
        int: st.integers(-(10**12), 10**12),
        float: st.floats(allow_nan=False, allow_infinity=False),
        bool: st.booleans(),
        str: st.text("bdelo*1 |", min_size=1, max_size=12),
        Path: st.text("ab -_.#:'", min_size=1, max_size=8).map(lambda name: Path("runs", name)),
        type(None): st.none(),
    }
    kinds = typing.get_args(annotation) or (annotation,)
    return st.one_of([strategies[kind] for kind in kinds])


def replaced(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """`config` with other values under dotted names."""
    for name, value in changes.items():
        section, _, key = name.rpartition(".")
        if section:
            value = dataclasses.replace(getattr(config, section), **{key: value})
        config = dataclasses.replace(config, **{section or key: value})
    return config


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("copies", [1, 2])
def test_every_recipe_loads_and_has_no_problems(path: Path, copies: int) -> None:
    """On as few ranks as it needs, and on twice as many."""
    recipe = load_recipe(path, [])
    ranks = recipe.parallel.tensor_parallel_size * recipe.parallel.pipeline_parallel_size
    assert find_problems(recipe, copies * ranks) == []


def test_the_recipes_are_those_of_the_families() -> None:
    """A recipe that belongs to none is not checked against its neighbours below."""
    assert [path.stem for path in RECIPES] == sorted(name for family in FAMILIES for name in family)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family[-1])
def test_recipes_of_a_family_build_on_each_other(family: tuple[str, ...]) -> None:
    """Each starts from the run of the one before and has its model; a policy has its IDM's actions."""
    recipes = [load_recipe(CONFIGS / f"{name}.yaml", []) for name in family]
    for before, after in itertools.pairwise(recipes):
        assert after.start_from == before.run_folder
        assert after.model == before.model
        assert after.training.precision == before.training.precision
        if after.stage == "policy":
            assert after.actions == before.actions


@pytest.mark.parametrize("name", FAMILIES[1] + FAMILIES[2] + FAMILIES[4])
def test_full_size_recipes_run_on_8_to_64_gpus(name: str) -> None:
    recipe = load_recipe(CONFIGS / f"{name}.yaml", [])
    for gpus in (8, 16, 32, 64):
        assert find_problems(recipe, gpus) == []


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_a_written_recipe_is_read_back_equal(data: st.DataObject) -> None:
    """As YAML, as plain values, and through JSON, which checkpoints hold."""
    leaves = leaf_fields()
    names = data.draw(st.lists(st.sampled_from(sorted(leaves)), max_size=8, unique=True))
    config = replaced(
        parse_recipe(DEMO.read_text(), "demo"),
        {name: data.draw(values_of(leaves[name]), name) for name in names},
    )
    assert parse_recipe(dump_recipe(config), "dump") == config
    assert recipe_from_fields(recipe_fields(config), "fields") == config
    assert recipe_from_fields(json.loads(json.dumps(recipe_fields(config))), "json") == config


def override(name: str, value: object) -> str:
    """The argument that sets a field; a switch is turned on by its name alone, and off with `no-` before it."""
    if isinstance(value, bool):
        section, _, key = name.rpartition(".")
        return f"--{section}.{key if value else 'no-' + key}"
    return f"--{name}={value}"


@settings(deadline=None, max_examples=15)
@given(st.data())
def test_an_override_changes_its_field_and_nothing_else(data: st.DataObject) -> None:
    leaves = leaf_fields()
    names = data.draw(st.lists(st.sampled_from(sorted(leaves)), min_size=1, max_size=6, unique=True))
    changes = {name: data.draw(values_of(leaves[name]), name) for name in names}
    arguments = [override(name, value) for name, value in changes.items()]
    assert load_recipe(DEMO, arguments) == replaced(load_recipe(DEMO, []), changes)


def test_overrides_may_be_written_with_hyphens() -> None:
    assert load_recipe(DEMO, ["--training.global-batch-size", "32"]).training.global_batch_size == 32


def complaint(fields: dict[str, Any]) -> str:
    """The error for a recipe of these fields."""
    with pytest.raises(UserError) as error:
        parse_recipe(yaml.safe_dump(fields), "my.yaml")
    return str(error.value)


def demo_fields() -> dict[str, Any]:
    """The demo recipe, to be spoiled."""
    return yaml.safe_load(DEMO.read_text())


def test_an_unknown_key_is_named_wherever_it_is() -> None:
    """A misspelt field must not become a silent default."""
    fields = demo_fields()
    fields["trainin"] = {}
    fields["logging"]["interval_step"] = 5
    text = complaint(fields)
    assert "trainin: " in text and "logging.interval_step: " in text


def test_a_missing_key_is_named() -> None:
    fields = demo_fields()
    del fields["model"]["hidden_size"], fields["stage"]
    text = complaint(fields)
    assert "model.hidden_size: Field required" in text and "stage: Field required" in text


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("training", "steps", 1.5),
        ("training", "steps", "many"),
        ("training", "precision", "fp16"),
        ("actions", "output", "residue"),
        ("optimizer", "learning_rate", [1e-3]),
        ("data", "path", 7),
        ("model", "num_layers", None),
    ],
)
def test_a_wrong_type_is_named(section: str, key: str, value: object) -> None:
    fields = demo_fields()
    fields[section][key] = value
    assert f"{section}.{key}: " in complaint(fields)


def test_all_wrong_keys_are_in_one_line_that_names_the_file() -> None:
    fields = demo_fields()
    fields["extra"] = 1
    fields["training"]["steps"] = "many"
    del fields["optimizer"]["decay_steps"]
    text = complaint(fields)
    assert text.startswith("my.yaml: 3 problem(s): ")
    assert all(name in text for name in ("extra", "training.steps", "optimizer.decay_steps"))
    assert "\n" not in text


@pytest.mark.parametrize("text", ["", "- a list", "just words", "3"])
def test_a_file_that_is_no_recipe_says_so(text: str) -> None:
    with pytest.raises(UserError, match=r"^my\.yaml: 1 problem\(s\): recipe: .*dictionary[^\n]*$"):
        parse_recipe(text, "my.yaml")


def test_broken_yaml_is_said_in_one_line_with_its_place() -> None:
    with pytest.raises(UserError, match=r"^my\.yaml: not valid YAML: [^\n]*line 2[^\n]*$"):
        parse_recipe("stage: idm\nmodel: [1, 2\n", "my.yaml")


def test_missing_and_binary_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such recipe"):
        load_recipe(tmp_path / "nowhere.yaml", [])
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary\.yaml: not a text file"):
        load_recipe(binary, [])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--training.steps", "many"], "--training.steps"),
        (["--training.steps", "1.5"], "--training.steps"),
        (["--training.steps"], "--training.steps"),
        (["--training.step", "5"], "--training.step"),
        (["--no.such", "5"], "--no.such"),
        (["--actions.output", "residue"], "--actions.output"),
        (["stray"], "stray"),
    ],
)
def test_a_bad_override_is_one_line_that_names_it(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing is printed beside the error, which the caller prints."""
    with pytest.raises(UserError) as error:
        load_recipe(DEMO, arguments)
    text = str(error.value)
    assert text.startswith("command line: ") and named in text and "\n" not in text
    assert capsys.readouterr() == ("", "")


def test_a_bad_override_is_said_the_same_way_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tyro draws a frame and uses colours, which cut words apart: none of it is left."""
    with pytest.raises(UserError) as plain:
        load_recipe(DEMO, ["--training.steps", "many"])
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(UserError) as framed:
        load_recipe(DEMO, ["--training.steps", "many"])
    assert str(framed.value) == str(plain.value)
    assert str(framed.value).isascii() and str(framed.value).isprintable()


def test_help_tells_each_field_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    """The docstrings of pretrain/config.py and the recipe's values reach the user."""
    with pytest.raises(SystemExit) as exit_request:
        load_recipe(DEMO, ["--help"])
    assert not exit_request.value.code
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name in leaf_fields():
        assert f"--{name.replace('_', '-')}" in text
    assert "Peak learning rate. (default: 0.003)" in text
