"""What a Hugging Face config.json says, as sizes of our model, and the way back.

Our blocks compute Llama, Qwen2.5 and Mistral exactly, and nothing else: whatever a config.json asks for beyond them is
refused by name, all of it at once, since ignoring it would train actions for another model than the one given. What a
config.json leaves out is what transformers' own class for that model type has there. Both spellings are read, that of
transformers 4 (rope_theta, rope_scaling, torch_dtype) and that of 5 (rope_parameters, dtype).
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeGuard

from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config

from data_prep.errors import UserError
from pretrain.config import ActionConfig, ModelConfig

# What Llama 3.1's scaling is beside its factor; Megatron has the same numbers built in.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# By model_type, the class whose defaults fill in what a config.json leaves out. "cola" is our own export.
FAMILIES: dict[str, type[LlamaConfig] | type[MistralConfig] | type[Qwen2Config]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "cola": LlamaConfig,
}
DTYPES = ("float32", "bfloat16", "float16")

# Fields of ModelConfig that are whole numbers, and their keys in config.json.
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
}
# Fields of ActionConfig, their keys in the published config.json, and the least each may be; without layers, the part
# is left out.
ACTION_SIZES = {
    "num_actions": ("num_code", 1),
    "num_idm_layers": ("num_action_layer", 0),
    "num_merge_layers": ("num_dyna_layer", 1),
    "num_policy_layers": ("num_policy_layer", 0),
}
# `v` of the published layout: the model class that is served. With 0 it has no inverse dynamics model.
PUBLISHED_VERSIONS = (0, 1, 2)
WITHOUT_IDM = 0


@dataclasses.dataclass(frozen=True)
class BaseFamily:
    """A base as its config.json describes it."""

    model: ModelConfig
    """Its sizes and rotary positions."""
    model_type: str
    """transformers' name of the family; "cola" for our own export."""
    dtype: str | None
    """Type of the stored weights, torch's name for it; None where the file does not say."""
    notices: tuple[str, ...]
    """What the user should know, a line each."""


def read_model_config(config: Mapping[str, object], source: str) -> BaseFamily:
    """The base that `config`, the contents of the config.json at `source`, describes.

    Raises:
        UserError: listing everything in it that our model would not compute as transformers does.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f"{source}: model_type is {model_type!r}; bases of these types can be read: {known}")
    facts = _with_defaults(config, model_type)
    rope, rope_contradictions = _rope_facts(facts)
    _raise_problems(
        source,
        [
            *_size_problems(facts),
            *_form_problems(facts, model_type),
            *_window_problems(facts, model_type),
            *rope_contradictions,
            *_rope_problems(rope),
            *_dtype_problems(facts),
        ],
    )

    sizes = {name: value for name, key in SIZES.items() if _is_size(value := facts[key])}
    notices = []
    window = _window(facts, model_type)
    if _is_size(window) and window < sizes["max_position_embeddings"]:
        notices.append(
            f"{source}: attention reaches {window:,} tokens back, ours is full: contexts up to {window:,} tokens are "
            f"exact, so max_position_embeddings is {window}, not {sizes['max_position_embeddings']}"
        )
        sizes["max_position_embeddings"] = window
    model = ModelConfig(
        **sizes,
        rms_norm_epsilon=_number(facts["rms_norm_eps"]),
        rope_theta=_number(rope["rope_theta"]),
        rope_scaling_factor=_number(rope["factor"]) if rope["rope_type"] == "llama3" else None,
        qkv_bias=model_type == "qwen2" or (model_type == "cola" and facts.get("qkv_bias") is True),
        tied_embeddings=facts["tie_word_embeddings"] is True,
    )
    dtype = next(iter(_dtypes(facts)), None)
    return BaseFamily(model, model_type, None if dtype is None else str(dtype), tuple(notices))


def is_published_layout(config: Mapping[str, object]) -> bool:
    """Whether `config` is of the authors' release: a Llama's, with the sizes of the action parts under their names."""
    names = (theirs for theirs, _ in ACTION_SIZES.values())
    return config.get("model_type") != "cola" and any(name in config for name in names)


def read_action_config(config: Mapping[str, object], source: str) -> ActionConfig | None:
    """The action parts that the config.json `config` at `source` describes; None for a plain base.

    A part that was left out has 0 layers. How the actions were trained is not in the file: those fields have their
    defaults.

    Raises:
        UserError: listing every size that is missing or wrong, or an output form or version that nobody can compute.
    """
    published = is_published_layout(config)
    if not published and config.get("model_type") != "cola":
        return None
    problems, sizes = [], {}
    for ours, (theirs, least) in ACTION_SIZES.items():
        value = config.get(theirs) if published else config.get(ours)
        if isinstance(value, int) and not isinstance(value, bool) and value >= least:
            sizes[ours] = value
        else:
            problems.append(f"{theirs if published else ours} is {value!r}, must be at least {least}")
    if published and config.get("v", 1) not in PUBLISHED_VERSIONS:
        problems.append(f"v is {config['v']!r}, the published models have one of {PUBLISHED_VERSIONS}")
    output = "reference" if published else config.get("output_form")
    if output not in ("reference", "residual"):
        problems.append(f"output_form is {output!r}, must be reference or residual")
    _raise_problems(source, problems)
    return ActionConfig(
        num_actions=sizes["num_actions"],
        num_idm_layers=0 if published and config.get("v") == WITHOUT_IDM else sizes["num_idm_layers"],
        num_merge_layers=sizes["num_merge_layers"],
        num_policy_layers=sizes["num_policy_layers"],
        output="residual" if output == "residual" else "reference",
    )


def rope_parameters(model: ModelConfig) -> dict[str, str | float]:
    """The rotary positions of `model` in the spelling of transformers 5."""
    if model.rope_scaling_factor is None:
        return {"rope_type": "default", "rope_theta": model.rope_theta}
    return {
        "rope_type": "llama3",
        "rope_theta": model.rope_theta,
        "factor": model.rope_scaling_factor,
        **LLAMA3_ROPE,
    }


def base_config(model: ModelConfig, dtype: str, eos_token_id: int) -> PretrainedConfig:
    """transformers' configuration of a base trained here: a Llama's, or a Qwen2.5's if it has QKV biases.

    `dtype` is torch's name of the weights' type. Generation begins without a special token, ends with `eos_token_id`
    and pads with it.
    """
    library, architecture = (
        (Qwen2Config, "Qwen2ForCausalLM") if model.qkv_bias else (LlamaConfig, "LlamaForCausalLM")
    )
    return library(
        **{key: getattr(model, name) for name, key in SIZES.items()},
        rms_norm_eps=model.rms_norm_epsilon,
        rope_parameters=rope_parameters(model),
        tie_word_embeddings=model.tied_embeddings,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
        dtype=dtype,
        architectures=[architecture],
    )


def published_config(
    model: ModelConfig,
    actions: ActionConfig,
    *,
    num_idm_layers: int,
    num_policy_layers: int,
    dtype: str,
    eos_token_id: int,
) -> dict[str, object]:
    """The config.json that the authors' code reads, in the spelling of transformers 4.44, which it needs.

    `num_idm_layers` and `num_policy_layers` are those that are exported: 0 for a part that is not.

    Raises:
        UserError: listing what the authors' model has no place for.
    """
    problems = []
    if actions.output != "reference":
        problems.append(f"its output form is {actions.output}, the authors' code computes reference only")
    if model.qkv_bias:
        problems.append("it has QKV biases, which the authors' model has not")
    if model.head_size * model.num_attention_heads != model.hidden_size:
        problems.append(
            f"its {model.num_attention_heads} heads of {model.head_size} are not the hidden size "
            f"{model.hidden_size}, from which transformers 4.44 takes the size of a head"
        )
    _raise_problems("this model has no published layout; use our own", problems)
    scaling = {key: value for key, value in rope_parameters(model).items() if key != "rope_theta"}
    action_sizes = dataclasses.replace(
        actions, num_idm_layers=num_idm_layers, num_policy_layers=num_policy_layers
    )
    return {
        "architectures": ["IntentionForCausalLM"],
        "model_type": "llama",
        **{key: getattr(model, name) for name, key in SIZES.items() if key != "head_dim"},
        **{theirs: getattr(action_sizes, ours) for ours, (theirs, _) in ACTION_SIZES.items()},
        "v": 1 if num_idm_layers else WITHOUT_IDM,
        "hidden_act": "silu",
        "rms_norm_eps": model.rms_norm_epsilon,
        "rope_theta": model.rope_theta,
        "rope_scaling": None if model.rope_scaling_factor is None else scaling,
        "tie_word_embeddings": model.tied_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": eos_token_id,
        "torch_dtype": dtype,
    }


def _raise_problems(source: str, problems: list[str]) -> None:
    if problems:
        raise UserError(f"{source}: {len(problems)} problem(s): " + "; ".join(problems))


def _is_size(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _number(value: object) -> float:
    assert _is_number(value), f"{value!r} was to be refused before"
    return float(value)


def _with_defaults(config: Mapping[str, object], model_type: str) -> dict[str, object]:
    """`config` and what transformers puts where it is silent, sizes that follow from others included."""
    library = FAMILIES[model_type]
    facts = {field.name: field.default for field in dataclasses.fields(library)} | dict(config)
    if facts["num_key_value_heads"] is None:
        facts["num_key_value_heads"] = facts["num_attention_heads"]
    hidden_size, heads = facts["hidden_size"], facts["num_attention_heads"]
    if facts.get("head_dim") is None and _is_size(hidden_size) and _is_size(heads):
        facts["head_dim"] = hidden_size // heads
    return facts


def _size_problems(facts: Mapping[str, object]) -> Iterator[str]:
    for key in SIZES.values():
        # A head size that is not given follows from two others; if it does not, one of those is wrong.
        if not _is_size(value := facts.get(key)) and not (key == "head_dim" and value is None):
            yield f"{key} is {value!r}, must be a whole number above 0"
    if not _is_number(facts["rms_norm_eps"]):
        yield f"rms_norm_eps is {facts['rms_norm_eps']!r}, must be a number above 0"
    heads, groups = facts["num_attention_heads"], facts["num_key_value_heads"]
    hidden_size, head_size = facts["hidden_size"], facts.get("head_dim")
    if _is_size(heads) and _is_size(groups) and heads % groups:
        yield f"num_attention_heads is {heads}, not a multiple of num_key_value_heads {groups}"
    if _is_size(heads) and _is_size(hidden_size) and hidden_size % heads:
        yield f"hidden_size is {hidden_size}, not a multiple of num_attention_heads {heads}"
    elif _is_size(head_size) and head_size % 2:
        yield f"head_dim is {head_size}, rotary positions need an even size"


def _form_problems(facts: Mapping[str, object], model_type: str) -> Iterator[str]:
    """Everything in the blocks, rotary positions aside, that ours do not have."""
    if facts.get("quantization_config") is not None:
        yield "quantization_config: the weights are quantised; take the checkpoint this one was made from"
    if facts.get("per_layer_config") is not None:
        yield "per_layer_config: its layers differ in form, ours are all alike"
    if facts["hidden_act"] != "silu":
        yield f"hidden_act is {facts['hidden_act']!r}, our MLPs have silu"
    if facts["attention_dropout"] != 0:
        yield f"attention_dropout is {facts['attention_dropout']!r}, we train without; set it to 0 if that is meant"
    if facts.get("is_causal") not in (None, True):
        yield f"is_causal is {facts['is_causal']!r}, our attention is causal"
    if model_type in ("llama", "cola"):
        for key, place in {"attention_bias": "output projection", "mlp_bias": "MLPs"}.items():
            if facts[key] is not False:
                yield f"{key} is {facts[key]!r}, our {place} have no bias"
    for key in ("tie_word_embeddings", "qkv_bias"):
        if not isinstance(facts.get(key, False), bool):
            yield f"{key} is {facts[key]!r}, must be true or false"


def _window(facts: Mapping[str, object], model_type: str) -> object:
    """Tokens that attention reaches back, itself included; None: all."""
    if model_type == "qwen2" and not facts["use_sliding_window"]:
        return None
    return facts.get("sliding_window")


def _window_problems(facts: Mapping[str, object], model_type: str) -> Iterator[str]:
    window, longest = _window(facts, model_type), facts["max_position_embeddings"]
    if window is not None and not _is_size(window):
        yield f"sliding_window is {window!r}, must be a whole number above 0 or null"
    elif model_type == "qwen2" and _is_size(window) and _is_size(longest) and window < longest:
        yield (
            f"use_sliding_window is {facts['use_sliding_window']!r} with sliding_window {window} of "
            f"{longest} tokens, our attention is full; set max_position_embeddings to {window}"
        )
    layer_types = facts.get("layer_types")
    allowed = ("full_attention",) if window is None else ("full_attention", "sliding_attention")
    if layer_types is not None and not (
        isinstance(layer_types, Iterable) and all(kind in allowed for kind in layer_types)
    ):
        yield f"layer_types has more than {' and '.join(allowed)}, which is all our blocks compute"


def _rope_facts(facts: Mapping[str, object]) -> tuple[dict[str, object], list[str]]:
    """Rotary positions in the spelling of transformers 5, from wherever they are said; and what is said in two ways."""
    said, problems = [facts.get("rope_parameters"), facts.get("rope_scaling")], []
    nested = [place for place in said if isinstance(place, Mapping) and place]
    if any(place is not None and not isinstance(place, Mapping) for place in said):
        problems.append("rope_parameters and rope_scaling: each must be an object or null")
    if len(nested) == 2 and nested[0] != nested[1]:
        problems.append("rope_parameters and rope_scaling say two things; keep the one that is meant")
    beside = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    rope: dict[str, object] = {}
    for place in [*nested[:1], {key: facts.get(key) for key in beside}]:
        for key, value in place.items():
            name = "rope_type" if key == "type" else key
            if value is not None and rope.setdefault(name, value) != value:
                problems.append(f"{name} is {rope[name]!r} in one place, {value!r} in another")
    return {"rope_type": "default", "rope_theta": PretrainedConfig.default_theta} | rope, problems


def _rope_problems(rope: Mapping[str, object]) -> Iterator[str]:
    if rope["rope_type"] not in ("default", "llama3"):
        yield f"rope_type is {rope['rope_type']!r}, our rotary positions are default or llama3"
        return
    if not _is_number(rope["rope_theta"]):
        yield f"rope_theta is {rope['rope_theta']!r}, must be a number above 0"
    if rope.get("partial_rotary_factor", 1) != 1:
        yield f"partial_rotary_factor is {rope['partial_rotary_factor']!r}, we rotate whole heads"
    has_meaning = {"rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
    if rope["rope_type"] == "llama3":
        has_meaning |= {"factor", *LLAMA3_ROPE}
        if not _is_number(rope.get("factor")):
            yield f"factor of the rotary scaling is {rope.get('factor')!r}, must be a number above 0"
        for key, built_in in LLAMA3_ROPE.items():
            if rope.get(key) != built_in:
                yield f"{key} is {rope.get(key)!r}, Megatron has {built_in} built in"
    if unknown := sorted(rope.keys() - has_meaning):
        yield f"{', '.join(unknown)}: without meaning for rope_type {rope['rope_type']!r}"


def _dtypes(facts: Mapping[str, object]) -> list[object]:
    return [value for key in ("dtype", "torch_dtype") if (value := facts.get(key)) is not None]


def _dtype_problems(facts: Mapping[str, object]) -> Iterator[str]:
    said = _dtypes(facts)
    if any(value != said[0] for value in said):
        yield f"dtype is {said[0]!r}, torch_dtype {said[1]!r}; keep the one that is meant"
    if said and said[0] not in DTYPES:
        yield f"dtype is {said[0]!r}, must be one of {', '.join(DTYPES)}"
