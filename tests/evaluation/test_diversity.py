"""The diversity command continues held-out prompts in every mode."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.errors import UserError
from evaluation.diversity import MODE_TITLES, DiversityConfig, run, spaced_actions
from tests.evaluation.tiny_demo import NUM_ACTIONS, WEIGHTS


@pytest.fixture(scope="module")
def config(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> DiversityConfig:
    return DiversityConfig(
        model=demo_folder / "hf",
        data=demo_folder / "data",
        output=tmp_path_factory.mktemp("diversity") / "diversity.json",
        prompts_per_source=1,
        prompt_tokens=6,
        new_tokens=8,
        continuations=4,
    )


def test_every_mode_continues_every_prompt(config: DiversityConfig) -> None:
    result = run(config)
    written = json.loads(config.output.read_text())
    assert [prompt["source"] for prompt in written["prompts"]] == list(WEIGHTS)
    assert [mode["name"] for mode in written["modes"]] == list(MODE_TITLES)
    for mode in written["modes"]:
        assert [len(texts) for texts in mode["texts"]] == [4] * len(WEIGHTS)
        assert 0 <= mode["figures"]["self_bleu"] <= 1
    assert written["modes"][0]["labels"] == ["action 0", "action 4", "action 8", "action 12"]
    again = run(replace(config, overwrite=True))
    assert again == result, "the same seed gives the same texts"
    other = run(replace(config, overwrite=True, seed=1))
    assert other.modes[0] == result.modes[0], "fixed actions leave nothing to chance"
    assert all(a.texts != b.texts for a, b in zip(other.modes[2:], result.modes[2:], strict=True))


def test_actions_can_be_chosen(config: DiversityConfig, tmp_path: Path) -> None:
    result = run(replace(config, output=tmp_path / "out.json", actions=(2, 9, 5)))
    assert result.modes[0].labels == ["action 2", "action 9", "action 5"]


def test_spaced_actions_are_different() -> None:
    assert spaced_actions(4, 64) == [0, 16, 32, 48]
    assert spaced_actions(5, 5) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"new_tokens": 3}, "--new-tokens 3: must be at least 4"),
        ({"continuations": 1}, "--continuations 1: must be at least 2"),
        ({"continuations": NUM_ACTIONS + 1}, f"the model has {NUM_ACTIONS} actions"),
        ({"actions": (1,)}, "--actions 1: give at least 2"),
        ({"actions": (1, NUM_ACTIONS)}, f"from 0 to {NUM_ACTIONS - 1}"),
    ],
)
def test_bad_flags_are_refused(
    config: DiversityConfig, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    output = tmp_path / "out.json"
    with pytest.raises(UserError, match=message):
        run(replace(config, output=output, **change))  # type: ignore[arg-type]
    assert not output.exists()
