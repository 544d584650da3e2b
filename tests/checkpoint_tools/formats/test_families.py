"""What public config.json files say is read exactly, in both spellings; what our blocks do not compute is refused."""

# ruff: noqa: E402  Megatron is imported after the redirects
import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from checkpoint_tools.formats.families import (
    LLAMA3_ROPE,
    BaseFamily,
    base_config,
    read_action_config,
    read_model_config,
)
from checkpoint_tools.formats.weight_map import weight_rules
from data_prep.errors import UserError
from pretrain import cpu_redirects
from pretrain.config import ActionConfig, ModelConfig

cpu_redirects.apply()

from pretrain.model.cola import ColaModel
from pretrain.parallel import ParallelContext, parallel_context
from tests.checkpoint_tools.formats.public_configs import (
    CONFIGS,
    FIELDS,
    KEYS,
    MODELS,
    SMALL,
    Config,
    in_transformers_5,
)
from tests.pretrain.tiny_runs import tiny_recipe

LLAMA = CONFIGS["Llama-3.1-8B"]
OF_A_TYPE = {"llama": LLAMA, "qwen2": CONFIGS["Qwen2.5-1.5B"], "mistral": CONFIGS["Mistral-7B-v0.3"]}


def read(config: Config) -> BaseFamily:
    """What is read, and that reading leaves the contents as they are."""
    before = json.dumps(config)
    family = read_model_config(config, "config.json")
    assert json.dumps(config) == before
    return family


def refusal(config: Config) -> str:
    """The message with which `config` is refused."""
    with pytest.raises(UserError) as refused:
        read_model_config(config, "folder/config.json")
    return str(refused.value)


# What is read


@pytest.mark.parametrize("name", CONFIGS)
def test_public_configs_are_read_exactly_in_both_spellings(name: str) -> None:
    for config in (CONFIGS[name], in_transformers_5(CONFIGS[name])):
        family = read(config)
        assert family.model == MODELS[name]
        assert family.model_type == CONFIGS[name]["model_type"]
        assert family.dtype == CONFIGS[name]["torch_dtype"]
        assert len(family.notices) == (name == "Mistral-7B-v0.1")


def test_numbers_are_floats_where_the_file_has_none() -> None:
    theta = read(CONFIGS["Qwen2.5-Math-1.5B"]).model.rope_theta
    assert isinstance(theta, float)


def in_transformers(config: Config) -> PretrainedConfig:
    """transformers' own object; it writes into what it is given, so it gets a copy."""
    return AutoConfig.for_model(**copy.deepcopy(config))


def differences_from_transformers(config: Config, family: BaseFamily) -> list[str]:
    """Keys that transformers' own class, built from `config`, has otherwise than we read them."""
    library = in_transformers(config)
    theirs = {name: getattr(library, key) for name, key in zip(FIELDS, KEYS, strict=True)}
    head_size = getattr(library, "head_dim", None) or library.hidden_size // library.num_attention_heads
    # Windows are the one thing read otherwise, see their tests: a context ends with its window.
    window = getattr(library, "sliding_window", None) or library.max_position_embeddings
    theirs["max_position_embeddings"] = min(library.max_position_embeddings, window)
    rope = library.rope_parameters
    theirs |= {
        "head_size": head_size,
        "rms_norm_epsilon": library.rms_norm_eps,
        "rope_theta": rope["rope_theta"],
        "rope_scaling_factor": rope.get("factor"),
        "tied_embeddings": library.tie_word_embeddings,
        "qkv_bias": library.model_type == "qwen2",
    }
    return [name for name, value in theirs.items() if getattr(family.model, name) != value]


@settings(deadline=None)
@given(st.sampled_from(sorted(CONFIGS)), st.booleans(), st.data())
def test_what_is_left_out_is_transformers_default(name: str, newer: bool, data: st.DataObject) -> None:
    config = in_transformers_5(CONFIGS[name]) if newer else CONFIGS[name]
    left_out = data.draw(st.sets(st.sampled_from(sorted(config.keys() - {"model_type"}))))
    config = {key: value for key, value in config.items() if key not in left_out}
    # A default may not go with what is left, which transformers' classes do not always say.
    heads, groups = (config.get(key, 32) for key in ("num_attention_heads", "num_key_value_heads"))
    assume(heads % groups == 0 and config.get("hidden_size", 4096) % heads == 0)
    assert not differences_from_transformers(config, read(config))


def test_differences_from_transformers_are_seen() -> None:
    """Deliberate faults: each field, read wrongly."""
    family = read(LLAMA)
    for field in dataclasses.fields(ModelConfig):
        if field.name != "vocab_padding":  # ours alone
            wrong: Any = {field.name: 3}
            misread = dataclasses.replace(family, model=dataclasses.replace(family.model, **wrong))
            assert differences_from_transformers(LLAMA, misread) == [field.name]


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    with parallel_context(tensor_parallel_size=1, seed=0) as opened:
        yield opened


POSITION = 131071
ROTARY = {"llama": LlamaRotaryEmbedding, "qwen2": Qwen2RotaryEmbedding, "mistral": MistralRotaryEmbedding}


def transformers_rotation(config: Config) -> torch.Tensor:
    """Cosines and sines of one head's angles at POSITION, as transformers turns it."""
    rotary = ROTARY[config["model_type"]](in_transformers(config))
    cosines, sines = rotary(torch.zeros(1), torch.tensor([[POSITION]]))
    return torch.cat([cosines[0, 0], sines[0, 0]])


def our_rotation(model: ModelConfig, context: ParallelContext) -> torch.Tensor:
    """The same by the base that is trained."""
    small = {"hidden_size": 32, "num_attention_heads": 1, "num_key_value_heads": 1, "num_layers": 1}
    rotary = {name: getattr(model, name) for name in ("head_size", "rope_theta", "rope_scaling_factor")}
    recipe = tiny_recipe("base", Path("run"), Path("data"), model=small | rotary)
    angles = ColaModel(recipe, context.groups, ("base",)).base.rotary_pos_emb(1, offset=POSITION)[0, 0, 0]
    return torch.cat([angles.cos(), angles.sin()])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_head_turns_as_in_transformers(name: str, context: ParallelContext) -> None:
    """To the last position of 131072; not with another scaling, nor with a slightly different theta."""
    theirs, model = transformers_rotation(CONFIGS[name]), MODELS[name]
    assert (our_rotation(model, context) - theirs).abs().max() < 1e-6
    other_factor = 8.0 if model.rope_scaling_factor in (None, 32.0) else 32.0
    faults: list[Config] = [{"rope_scaling_factor": other_factor}, {"rope_theta": model.rope_theta * 1.001}]
    for fault in faults:
        assert (our_rotation(dataclasses.replace(model, **fault), context) - theirs).abs().max() > 0.1


# Windows


def test_a_window_of_mistral_bounds_the_context() -> None:
    family = read(CONFIGS["Mistral-7B-v0.1"])
    assert family.model.max_position_embeddings == 4096
    assert "4,096" in family.notices[0] and "32768" in family.notices[0]
    # As long as the context, it is no window.
    wide = read(CONFIGS["Mistral-7B-v0.1"] | {"sliding_window": 32768})
    assert (wide.model.max_position_embeddings, wide.notices) == (32768, ())


def test_mistral_says_null_where_it_has_no_window() -> None:
    """transformers' default is a window of 4096, so a file that is silent has one."""
    silent = {key: value for key, value in CONFIGS["Mistral-7B-v0.3"].items() if key != "sliding_window"}
    assert read(silent).model.max_position_embeddings == 4096


def test_a_window_of_qwen_must_hold_the_context() -> None:
    windowed = CONFIGS["Qwen2.5-1.5B"] | {"use_sliding_window": True, "sliding_window": 4096}
    assert "set max_position_embeddings to 4096" in refusal(windowed)
    assert read(windowed | {"max_position_embeddings": 4096}).notices == ()
    listed = windowed | {"max_position_embeddings": 4096, "layer_types": ["sliding_attention"] * 28}
    assert read(listed).notices == ()


# What is refused

# Of a llama: changes, and what the message names. No two change one key.
FAULTS: dict[str, tuple[Config, str]] = {
    "vocabulary": ({"vocab_size": 0}, "vocab_size is 0"),
    "layers": ({"num_hidden_layers": "32"}, "num_hidden_layers is '32'"),
    "MLP": ({"intermediate_size": True}, "intermediate_size is True"),
    "context": ({"max_position_embeddings": None}, "max_position_embeddings is None"),
    "groups": ({"num_key_value_heads": 5}, "not a multiple of num_key_value_heads 5"),
    "odd heads": ({"head_dim": 127}, "head_dim is 127"),
    "epsilon": ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "attention bias": ({"attention_bias": True}, "attention_bias is True"),
    "MLP bias": ({"mlp_bias": True}, "mlp_bias is True"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
    "causality": ({"is_causal": False}, "is_causal is False"),
    "tying": ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
    "quantised": ({"quantization_config": {"quant_method": "awq"}}, "take the checkpoint this one was made from"),
    "unlike layers": ({"per_layer_config": {}}, "per_layer_config"),
    "chunks": ({"layer_types": ["chunked_attention"] * 32}, "layer_types"),
    "window": ({"sliding_window": -1}, "sliding_window is -1"),
    "rotary part": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "dtype": ({"torch_dtype": "float8_e4m3fn"}, "dtype is 'float8_e4m3fn'"),
}  # fmt: skip

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, **LLAMA3_ROPE}
ROPE_FAULTS: list[tuple[Config, str]] = [
    *(({"rope_scaling": {"type": kind, "factor": 4.0}}, f"rope_type is '{kind}'") for kind in ("linear", "dynamic")),
    *(({"rope_scaling": {"rope_type": kind}}, f"rope_type is '{kind}'") for kind in ("yarn", "longrope")),
    ({"rope_scaling": LLAMA3 | {"factor": 0}}, "factor of the rotary scaling is 0"),
    ({"rope_scaling": LLAMA3 | {"low_freq_factor": 2.0}}, "low_freq_factor is 2.0"),
    ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor is 1.0"),
    ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 4096}}, "is 4096, Megatron has 8192"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "3 problem(s): low_freq_factor is None"),
    ({"original_max_position_embeddings": 4096}, "is 8192 in one place, 4096 in another"),
    ({"rope_scaling": {"factor": 8.0}}, "factor: without meaning for rope_type 'default'"),
    ({"rope_scaling": {"rope_type": "default", "type": "linear"}}, "rope_type is 'default' in one place, 'linear' in"),
    ({"rope_scaling": None, "rope_parameters": {"rope_theta": 1e4}}, "rope_theta is 10000.0 in one place, 500000.0"),
    ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters and rope_scaling say two things"),
    ({"rope_scaling": None, "rope_parameters": {"full_attention": LLAMA3}}, "full_attention: without meaning"),
    ({"rope_scaling": None, "rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor is 0.25"),
    ({"rope_scaling": "llama3"}, "each must be an object or null"),
    ({"rope_theta": "500000"}, "rope_theta is '500000'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "named"),
    [*FAULTS.values(), *ROPE_FAULTS],
    ids=[named for _, named in [*FAULTS.values(), *ROPE_FAULTS]],
)
def test_what_we_do_not_compute_is_refused(changes: Config, named: str) -> None:
    message = refusal(LLAMA | changes)
    assert message.startswith("folder/config.json: ") and named in message and "\n" not in message


@settings(deadline=None)
@given(st.sets(st.sampled_from(sorted(FAULTS)), min_size=1), st.sampled_from([None, *ROPE_FAULTS[:7]]))
def test_all_problems_are_told_at_once(faults: set[str], rope: tuple[Config, str] | None) -> None:
    told = [FAULTS[name] for name in faults]
    if rope and "rotary part" not in faults:
        told.append(rope)
    config = dict(LLAMA)
    for changes, _ in told:
        config |= changes
    message = refusal(config)
    assert f": {len(told)} problem(s): " in message
    assert all(named in message for _, named in told)


@pytest.mark.parametrize("model_type", OF_A_TYPE)
def test_sizes_that_do_not_go_together_are_refused(model_type: str) -> None:
    config = OF_A_TYPE[model_type]
    assert "hidden_size is 1000, not a multiple" in refusal(
        config | {"hidden_size": 1000, "num_attention_heads": 48}
    )
    assert "num_attention_heads is 0" in refusal(config | {"num_attention_heads": 0})


@pytest.mark.parametrize("model_type", ["gemma2", "gpt2", "qwen3", "mixtral", "phi3", None, ["llama"]])
def test_other_families_are_refused_by_name(model_type: object) -> None:
    message = refusal(LLAMA | {"model_type": model_type})
    assert repr(model_type) in message and "cola, llama, mistral, qwen2" in message


def test_two_dtypes_are_refused() -> None:
    assert "torch_dtype 'bfloat16'" in refusal(LLAMA | {"dtype": "float32"})
    assert read(LLAMA | {"dtype": "bfloat16"}).dtype == "bfloat16"
    assert read({key: value for key, value in LLAMA.items() if key != "torch_dtype"}).dtype is None


# The way back


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    """Any model that a recipe may have."""
    size = st.integers(1, 10**6)
    groups, queries = draw(st.integers(1, 16)), draw(st.integers(1, 16))
    heads = groups * queries
    return ModelConfig(
        vocab_size=draw(size),
        hidden_size=heads * draw(st.integers(1, 256)),
        ffn_hidden_size=draw(size),
        num_layers=draw(st.integers(1, 4)),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_size=2 * draw(st.integers(1, 256)),
        rms_norm_epsilon=draw(st.floats(1e-12, 1e-2)),
        rope_theta=draw(st.floats(2.0, 1e9)),
        rope_scaling_factor=draw(st.none() | st.floats(1.0, 64.0)),
        max_position_embeddings=draw(size),
        qkv_bias=draw(st.booleans()),
        tied_embeddings=draw(st.booleans()),
    )


@settings(deadline=None)
@given(models(), st.sampled_from(["float32", "bfloat16"]))
def test_a_base_of_ours_is_read_back(model: ModelConfig, dtype: str) -> None:
    config = json.loads(base_config(model, dtype, eos_token_id=0).to_json_string())
    model_type = "qwen2" if model.qkv_bias else "llama"
    assert read(config) == BaseFamily(model, model_type, dtype, ())
    assert read_action_config(config, "config.json") is None


def test_rows_that_pad_the_vocabulary_are_not_exported() -> None:
    padded = dataclasses.replace(MODELS["Llama-2-7B"], vocab_padding=64)
    assert read(base_config(padded, "float32", eos_token_id=2).to_dict()).model == MODELS["Llama-2-7B"]


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("tied_embeddings", [False, True])
def test_transformers_builds_the_model_we_export(qkv_bias: bool, tied_embeddings: bool) -> None:
    model = dataclasses.replace(SMALL, qkv_bias=qkv_bias, tied_embeddings=tied_embeddings)
    built = AutoModelForCausalLM.from_config(base_config(model, "bfloat16", eos_token_id=3))
    weights = dict(built.named_parameters())
    exported = {name for rule in weight_rules(model, ActionConfig(), ("base",)) for name in rule.huggingface}
    assert weights.keys() == exported
    assert weights["model.layers.1.self_attn.k_proj.weight"].shape == (2 * 16, 32)
    assert weights["model.norm.weight"].dtype == torch.bfloat16
    assert built.config.architectures == [type(built).__name__]
    generation = built.generation_config
    assert (generation.eos_token_id, generation.pad_token_id, generation.bos_token_id) == (3, 3, None)
