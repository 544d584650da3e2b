"""What crosses between pipeline stages: only what the next one needs, and back only where there is a gradient."""

from pathlib import Path

import pytest

from pretrain.config import RunConfig
from pretrain.pipeline import crossing
from pretrain.placement import place_layers
from tests.pretrain.layouts import FOUR_STAGES
from tests.pretrain.tiny_runs import MODEL, SEQUENCE_LENGTH, tiny_recipe

HIDDEN_SIZE = int(MODEL["hidden_size"])
STATE = (SEQUENCE_LENGTH, 4, HIDDEN_SIZE)


def recipe(stage: str, **parallel: object) -> RunConfig:
    """Four pipeline stages, cut within every stack."""
    return tiny_recipe(
        stage,
        Path("run"),
        Path("data"),
        None if stage == "base" else Path("start"),
        model={**MODEL, "num_layers": 4},
        actions={"num_idm_layers": 2, "num_policy_layers": 2},
        parallel={"pipeline_parallel_size": 4, "pipeline_layout": FOUR_STAGES[stage]} | parallel,
    )


def crossings(config: RunConfig, training: bool) -> list[dict[str, bool]]:
    """Fields that cross each of the three cuts, and whether a gradient comes back."""
    placement = place_layers(config)
    return [
        {wire.field: wire.has_gradient for wire in crossing(config, placement, cut, training)}
        for cut in (1, 2, 3)
    ]


def test_base_states_carry_gradients_in_a_base_run() -> None:
    assert crossings(recipe("base"), training=True) == [{"hidden_SBH": True}] * 3


def test_nothing_comes_back_into_a_frozen_base() -> None:
    """base*2 | base*2 idm*0.5 | idm*1.5 | heads: gradients for the IDM's state and logits, none for the base's."""
    assert crossings(recipe("idm"), training=True) == [
        {"hidden_SBH": False},
        {"hidden_SBH": False, "idm": True},
        {"hidden_SBH": False, "idm": True},
    ]


def test_the_policy_stage_sends_labels_and_then_only_its_own_state_back() -> None:
    """base*3 | base*1 idm*1 | idm*1 policy*0.5 | policy*1.5: the frozen IDM gets no gradient either."""
    assert crossings(recipe("policy"), training=True) == [
        {"hidden_SBH": False},
        {"hidden_SBH": False, "idm": False},
        {"labels_SB": False, "policy_SBH": True},
    ]


@pytest.mark.parametrize("stage", ["base", "idm", "policy"])
def test_evaluation_sends_no_gradients_and_the_state_to_the_world_model(stage: str) -> None:
    found = crossings(recipe(stage), training=False)
    assert not any(gradient for fields in found for gradient in fields.values())
    assert all("hidden_SBH" in fields for fields in found)


def test_shapes_follow_the_sequence_but_logits_are_whole() -> None:
    """Sequence parallelism halves the states on the wire; the logits of all positions are on every rank."""
    for sequence_parallel, length in ((False, SEQUENCE_LENGTH), (True, SEQUENCE_LENGTH // 2)):
        config = recipe("idm", tensor_parallel_size=2, sequence_parallel=sequence_parallel)
        shapes = {wire.field: wire.shape for wire in crossing(config, place_layers(config), 3, training=True)}
        assert shapes == {
            "hidden_SBH": (length, 4, HIDDEN_SIZE),
            "idm": (SEQUENCE_LENGTH, 4, config.actions.num_actions),
        }
    assert crossing(recipe("idm"), place_layers(recipe("idm")), 2, training=True)[1].shape == STATE
