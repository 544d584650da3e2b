"""The sizes of the action parts, in our export's config.json and in the authors' own."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
from transformers import AutoConfig

from checkpoint_tools.formats.families import (
    BaseFamily,
    base_config,
    is_published_layout,
    published_config,
    read_action_config,
    read_model_config,
    rope_parameters,
)
from checkpoint_tools.huggingface.configuration_cola import ColaConfig
from data_prep.errors import UserError
from pretrain.config import ActionConfig
from tests.checkpoint_tools.formats.public_configs import CONFIGS, MODELS, SMALL, Config

ACTIONS = ActionConfig(
    num_actions=32, num_idm_layers=3, num_merge_layers=1, num_policy_layers=5, output="reference"
)
PUBLISHED_MODEL = MODELS["Llama-3.1-8B"]


def published(idm_layers: int = 3, policy_layers: int = 5, **changes: Any) -> Config:
    config = published_config(
        dataclasses.replace(PUBLISHED_MODEL, **changes.pop("model", {})),
        dataclasses.replace(ACTIONS, **changes.pop("actions", {})),
        num_idm_layers=idm_layers,
        num_policy_layers=policy_layers,
        dtype="bfloat16",
        eos_token_id=7,
    )
    return config | changes


def test_a_plain_base_has_no_actions() -> None:
    assert read_action_config(CONFIGS["Llama-3.1-8B"], "config.json") is None
    assert not is_published_layout(CONFIGS["Llama-3.1-8B"])


@pytest.mark.parametrize("output", ["reference", "residual"])
def test_our_own_export_is_read_back(output: Any) -> None:
    actions = dataclasses.replace(ACTIONS, output=output)
    sizes_of_actions = {name: getattr(actions, name) for name in vars(actions) if name.startswith("num_")}
    exported = ColaConfig(
        **base_config(SMALL, "bfloat16", 3).to_dict() | {"model_type": "cola"},
        **sizes_of_actions,
        output_form=output,
    )
    config = json.loads(exported.to_json_string())
    assert read_action_config(config, "config.json") == actions
    assert read_model_config(config, "config.json") == BaseFamily(SMALL, "cola", "bfloat16", ())
    assert read_model_config(config | {"qkv_bias": True}, "config.json").model.qkv_bias
    assert not is_published_layout(config)


def test_the_published_layout_is_read_back() -> None:
    config = json.loads(json.dumps(published()))
    assert is_published_layout(config) and config["v"] == 1
    assert not config.keys() & {"head_dim", "rope_parameters", "dtype"}, "unknown to transformers 4.44"
    assert read_action_config(config, "config.json") == ACTIONS
    assert read_model_config(config, "config.json") == BaseFamily(PUBLISHED_MODEL, "llama", "bfloat16", ())
    assert AutoConfig.for_model(**config).rope_parameters == rope_parameters(PUBLISHED_MODEL)


def test_parts_left_out_have_no_layers() -> None:
    without_idm, without_policy = published(idm_layers=0), published(policy_layers=0)
    assert (without_idm["v"], without_policy["v"]) == (0, 1)
    no_idm, no_policy = (
        dataclasses.replace(ACTIONS, num_idm_layers=0),
        dataclasses.replace(ACTIONS, num_policy_layers=0),
    )
    assert read_action_config(without_idm, "config.json") == no_idm
    assert read_action_config(without_policy, "config.json") == no_policy
    # The authors' files keep the size of the IDM that their version 0 does not build.
    assert read_action_config(without_idm | {"num_action_layer": 4}, "config.json") == no_idm


def test_rows_that_pad_the_vocabulary_are_not_published() -> None:
    assert published(model={"vocab_padding": 64}) == published()


def without(config: Config, key: str) -> Config:
    return {name: value for name, value in config.items() if name != key}


def action_faults() -> Iterator[tuple[Config, str]]:
    yield without(published(), "num_code"), "1 problem(s): num_code is None"
    yield published(num_dyna_layer=0, num_policy_layer=-1), "2 problem(s): num_dyna_layer is 0"
    yield published(v=3), "v is 3"
    ours = {"num_actions": 64, "num_idm_layers": 4, "num_merge_layers": 2, "num_policy_layers": 8}
    cola = {"model_type": "cola", **ours, "output_form": "residual"}
    yield cola | {"output_form": "other"}, "output_form is 'other'"
    yield without(cola, "output_form"), "output_form is None"
    yield without(cola, "num_idm_layers"), "num_idm_layers is None"
    yield cola | {"num_actions": True}, "num_actions is True"


@pytest.mark.parametrize(("config", "named"), list(action_faults()))
def test_wrong_action_sizes_are_refused(config: Config, named: str) -> None:
    with pytest.raises(UserError, match=r"^folder/config.json: ") as refused:
        read_action_config(config, "folder/config.json")
    assert named in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"actions": {"output": "residual"}}, "1 problem(s): its output form is residual"),
        ({"model": {"qkv_bias": True}}, "1 problem(s): it has QKV biases"),
        ({"model": {"head_size": 64}}, "1 problem(s): its 32 heads of 64"),
        ({"model": {"head_size": 64, "qkv_bias": True}, "actions": {"output": "residual"}}, "3 problem(s)"),
    ],
)
def test_what_the_authors_code_cannot_play_is_not_written(changes: Config, named: str) -> None:
    with pytest.raises(UserError) as refused:
        published(**changes)
    assert named in str(refused.value)
