"""The table of weights: every tensor of both models exactly once, there and back without loss.

Rows of a fused query/key/value matrix stand, a key/value head at a time, as its queries, its key, its value.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_tools.formats.weight_map import to_huggingface, to_megatron, weight_rules
from checkpoint_tools.huggingface.configuration_cola import ColaConfig
from checkpoint_tools.huggingface.modeling_cola import ColaForCausalLM
from pretrain import cpu_redirects
from pretrain.config import ActionConfig, ModelConfig
from pretrain.recipes import load_recipe
from tests.pretrain.tiny_runs import tiny_recipe

FULL_SIZE = Path(__file__).resolve().parents[3] / "configs" / "policy_llama31_8b.yaml"
PARTS = ("base", "idm", "world_model", "policy")
ACTIONS = ActionConfig(num_actions=5, num_idm_layers=1, num_merge_layers=2, num_policy_layers=2)


def model_of(key_value_heads: int = 2, queries: int = 2, head_size: int = 2) -> ModelConfig:
    """A small model with `queries` query heads a key/value head."""
    return ModelConfig(
        vocab_size=11,
        hidden_size=3 * key_value_heads * queries,
        ffn_hidden_size=7,
        num_layers=2,
        num_attention_heads=key_value_heads * queries,
        num_key_value_heads=key_value_heads,
        head_size=head_size,
    )


def huggingface_model(
    model: ModelConfig, actions: ActionConfig, parts: Sequence[str] = PARTS
) -> ColaForCausalLM:
    """Shapes and names only."""
    config = ColaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        head_dim=model.head_size,
        num_actions=actions.num_actions,
        num_idm_layers=actions.num_idm_layers if "idm" in parts else 0,
        num_merge_layers=actions.num_merge_layers,
        num_policy_layers=actions.num_policy_layers if "policy" in parts else 0,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.device("meta"):
        return ColaForCausalLM(config)


def random_state(shapes: dict[str, torch.Size], seed: int = 0) -> dict[str, torch.Tensor]:
    """Numbers for tensors of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def huggingface_shapes(model: ModelConfig, actions: ActionConfig) -> dict[str, torch.Size]:
    """Of every tensor of the exported model."""
    return {name: value.shape for name, value in huggingface_model(model, actions).state_dict().items()}


def megatron_shapes(model: ModelConfig, actions: ActionConfig) -> dict[str, torch.Size]:
    """Of every tensor of our model, written down from the modules of pretrain/model/."""
    hidden, ffn, head_size = model.hidden_size, model.ffn_hidden_size, model.head_size
    query_rows = model.num_attention_heads * head_size
    block = {
        "input_layernorm": (hidden,),
        "self_attention.linear_qkv": (query_rows + 2 * model.num_key_value_heads * head_size, hidden),
        "self_attention.linear_proj": (hidden, query_rows),
        "pre_mlp_layernorm": (hidden,),
        "mlp.linear_fc1": (2 * ffn, hidden),
        "mlp.linear_fc2": (hidden, ffn),
    }
    merge = {"gate_state": (ffn, hidden), "gate_action": (ffn, hidden), "down": (hidden, ffn)}
    merge |= {"up_state": (ffn, hidden), "up_action": (ffn, hidden)}
    shapes: dict[str, tuple[int, ...]] = {
        "base.embedding.word_embeddings.weight": (model.vocab_size, hidden),
        "base.output_layer.weight": (model.vocab_size, hidden),
        "world_model.codebook_AH": (actions.num_actions, hidden),
        "idm.head.weight": (actions.num_actions, hidden),
        "policy.head.weight": (actions.num_actions, hidden),
    }
    stacks = {"base.decoder": model.num_layers, "idm.blocks": actions.num_idm_layers}
    stacks |= {"policy.blocks": actions.num_policy_layers}
    for stack, layers in stacks.items():
        shapes[f"{stack}.final_layernorm.weight"] = (hidden,)
        for layer in range(layers):
            shapes |= {f"{stack}.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    for layer in range(actions.num_merge_layers):
        shapes |= {f"world_model.merge_layers.{layer}.{name}.weight": shape for name, shape in merge.items()}
    return {name: torch.Size(shape) for name, shape in shapes.items()}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Same names, same numbers."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@settings(deadline=None, max_examples=25)
@given(
    key_value_heads=st.integers(1, 4),
    queries=st.integers(1, 4),
    head_size=st.sampled_from([2, 4]),
    seed=st.integers(0, 1000),
)
def test_there_and_back_is_the_identity(
    key_value_heads: int, queries: int, head_size: int, seed: int
) -> None:
    """From either side, for any grouping of heads, bit for bit."""
    model = model_of(key_value_heads, queries, head_size)
    rules = weight_rules(model, ACTIONS, PARTS)
    ours = random_state(megatron_shapes(model, ACTIONS), seed)
    theirs = to_huggingface(rules, ours)
    assert equal(to_megatron(rules, theirs), ours)
    assert equal(to_huggingface(rules, to_megatron(rules, theirs)), theirs)
    assert all(tensor.is_contiguous() for tensor in theirs.values())
    assert sum(tensor.numel() for tensor in theirs.values()) == sum(
        tensor.numel() for tensor in ours.values()
    )


def test_another_grouping_of_heads_is_another_model() -> None:
    """The fault twin: the same numbers, split as if there were other key/value heads."""
    ours = random_state(megatron_shapes(model_of(2, 2), ACTIONS))
    right, wrong = (
        to_huggingface(weight_rules(m, ACTIONS, PARTS), ours) for m in (model_of(2, 2), model_of(1, 6))
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(right[name], wrong[name][: len(right[name])])


@settings(deadline=None, max_examples=15)
@given(key_value_heads=st.integers(1, 3), queries=st.integers(1, 3))
def test_names_and_shapes_are_those_of_the_exported_model(key_value_heads: int, queries: int) -> None:
    model = model_of(key_value_heads, queries)
    ours = random_state(megatron_shapes(model, ACTIONS))
    theirs = to_huggingface(weight_rules(model, ACTIONS, PARTS), ours)
    assert {name: tensor.shape for name, tensor in theirs.items()} == huggingface_shapes(model, ACTIONS)


def test_names_and_shapes_are_those_of_the_megatron_model() -> None:
    """So that the shapes above, and with them these tests, are of the model that is trained."""
    cpu_redirects.apply()  # before the imports below, which load Megatron
    from pretrain.model.cola import ColaModel
    from pretrain.parallel import parallel_context

    recipe = tiny_recipe("policy", Path("run"), Path("data"), Path("start"))
    with parallel_context(tensor_parallel_size=1, seed=0) as context:
        model = ColaModel(recipe, context.groups, PARTS)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert shapes == megatron_shapes(recipe.model, recipe.actions)


def published_names() -> list[str]:
    """All names of the published checkpoint, from its description."""
    block = ["input_layernorm", "post_attention_layernorm"]
    block += [f"self_attn.{letter}_proj" for letter in "qkvo"]
    block += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    names = ["model.embed_tokens", "model.norm", "lm_head"]
    names += ["model.action_norm", "model.action_head", "model.action_code_book"]
    names += ["model.policy_norm", "model.policy_head"]
    for stack, layers in (("layers", 32), ("action_layers", 4), ("policy_layers", 8)):
        names += [f"model.{stack}.{layer}.{name}" for layer in range(layers) for name in block]
    for layer in range(2):
        names += [f"model.action_merge_layers.{layer}.{name}_proj" for name in ("gate", "up", "down")]
    return [f"{name}.weight" for name in names]


def test_all_410_published_names_occur_exactly_once() -> None:
    recipe = load_recipe(FULL_SIZE, [])
    rules = weight_rules(recipe.model, recipe.actions, PARTS)
    names = [name for rule in rules for name in rule.huggingface]
    assert len(names) == 410
    assert sorted(names) == sorted(published_names())
    ours = [name for rule in rules for name in rule.megatron]
    assert len(ours) == len(set(ours))
    assert set(ours) == megatron_shapes(recipe.model, recipe.actions).keys()


def test_full_size_shapes_are_the_published_ones() -> None:
    """On the meta device, where tensors have shapes only."""
    recipe = load_recipe(FULL_SIZE, [])
    state = {
        name: torch.empty(shape, device="meta")
        for name, shape in megatron_shapes(recipe.model, recipe.actions).items()
    }
    found = to_huggingface(weight_rules(recipe.model, recipe.actions, PARTS), state)
    published = {
        "lm_head": (128256, 4096),
        "model.layers.31.self_attn.q_proj": (4096, 4096),
        "model.action_layers.3.self_attn.k_proj": (1024, 4096),
        "model.policy_layers.7.self_attn.v_proj": (1024, 4096),
        "model.layers.0.self_attn.o_proj": (4096, 4096),
        "model.layers.0.mlp.up_proj": (14336, 4096),
        "model.layers.0.mlp.down_proj": (4096, 14336),
        "model.action_head": (64, 4096),
        "model.action_code_book": (4096, 64),
        "model.action_merge_layers.1.gate_proj": (14336, 8192),
        "model.action_merge_layers.0.down_proj": (4096, 14336),
    }
    assert {name: tuple(found[f"{name}.weight"].shape) for name in published} == published


@pytest.mark.parametrize(
    ("parts", "tensors"),
    [(("base",), 291), (("idm",), 38), (("world_model",), 7), (("policy",), 74), (PARTS, 410)],
)
def test_parts_have_their_own_tensors(parts: tuple[str, ...], tensors: int) -> None:
    recipe = load_recipe(FULL_SIZE, [])
    rules = weight_rules(recipe.model, recipe.actions, parts)
    assert sum(len(rule.huggingface) for rule in rules) == tensors
    assert {name.split(".")[0] for rule in rules for name in rule.megatron} == set(parts)


def test_queries_keys_and_values_are_grouped_by_key_value_head() -> None:
    """By hand: two groups of two queries, heads of one row, row i filled with the number i."""
    rules = weight_rules(model_of(key_value_heads=2, queries=2, head_size=1), ACTIONS, ("idm",))
    (rule,) = (rule for rule in rules if rule.megatron[0].endswith("linear_qkv.weight"))
    fused = torch.arange(8.0)[:, None].expand(8, 12)
    rows = {
        re.sub(r".*self_attn\.(\w)_proj.*", r"\1", name): tensor[:, 0].tolist()
        for name, tensor in to_huggingface([rule], {rule.megatron[0]: fused}).items()
    }
    assert rows == {"q": [0, 1, 4, 5], "k": [2, 6], "v": [3, 7]}
    assert rows["q"] != [0, 1, 2, 3], "the fault twin: all queries first"


def test_gate_and_up_and_the_halves_of_merge_layers_are_where_they_belong() -> None:
    """fc1 is gate above up; a merge projection reads [state; action]; a code is a column there."""
    model = model_of()
    ours = random_state(megatron_shapes(model, ACTIONS))
    theirs = to_huggingface(weight_rules(model, ACTIONS, PARTS), ours)
    fc1 = ours["base.decoder.layers.1.mlp.linear_fc1.weight"]
    assert torch.equal(theirs["model.layers.1.mlp.gate_proj.weight"], fc1[:7])
    assert torch.equal(theirs["model.layers.1.mlp.up_proj.weight"], fc1[7:])
    for name in ("gate", "up"):
        merged = theirs[f"model.action_merge_layers.1.{name}_proj.weight"]
        assert torch.equal(merged[:, :12], ours[f"world_model.merge_layers.1.{name}_state.weight"])
        assert torch.equal(merged[:, 12:], ours[f"world_model.merge_layers.1.{name}_action.weight"])
    assert torch.equal(theirs["model.action_code_book.weight"][:, 3], ours["world_model.codebook_AH"][3])


def test_norms_before_attention_and_before_the_mlp_are_not_exchanged() -> None:
    model = model_of()
    ours = random_state(megatron_shapes(model, ACTIONS))
    theirs = to_huggingface(weight_rules(model, ACTIONS, PARTS), ours)
    for layer in range(2):
        before = f"policy.blocks.layers.{layer}"
        after = f"model.policy_layers.{layer}"
        assert torch.equal(
            theirs[f"{after}.input_layernorm.weight"], ours[f"{before}.input_layernorm.weight"]
        )
        assert torch.equal(
            theirs[f"{after}.post_attention_layernorm.weight"], ours[f"{before}.pre_mlp_layernorm.weight"]
        )


@pytest.mark.parametrize("missing", ["policy.head.weight", "base.decoder.layers.0.mlp.linear_fc1.weight"])
def test_a_missing_tensor_is_named(missing: str) -> None:
    ours = random_state(megatron_shapes(model_of(), ACTIONS))
    del ours[missing]
    with pytest.raises(KeyError, match=re.escape(missing)):
        to_huggingface(weight_rules(model_of(), ACTIONS, PARTS), ours)
