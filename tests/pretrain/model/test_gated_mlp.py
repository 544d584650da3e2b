"""The MLP in two products computes what Megatron's own does, gradients included; with halves exchanged it does not."""

import copy
from pathlib import Path

import pytest
import torch
from megatron.core.transformer.mlp import MLP

from pretrain.model.gated_mlp import GatedMlp, _GatedProducts
from pretrain.model.trunk import LlamaTrunk
from pretrain.parallel import ParallelContext
from tests.pretrain.tiny_runs import tiny_recipe

# S sequence, B batch, H hidden, F MLP width.
S, B = 5, 3


@pytest.fixture
def mlp(context: ParallelContext, tmp_path: Path) -> GatedMlp:
    """Of the first block of a base, with large weights."""
    found = LlamaTrunk(tiny_recipe("base", tmp_path, tmp_path), context.groups).decoder.layers[0].mlp
    assert isinstance(found, GatedMlp)
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return found


def outputs_and_gradients(mlp: MLP) -> list[torch.Tensor]:
    """Of one random input: output, and the gradients to it and to every weight."""
    generator = torch.Generator().manual_seed(1)
    input_SBH = torch.randn(S, B, mlp.config.hidden_size, generator=generator, requires_grad=True)
    output_SBH, bias = mlp(input_SBH)
    assert bias is None
    output_SBH.backward(torch.randn(output_SBH.shape, generator=generator))
    weights = [mlp.linear_fc1.weight, mlp.linear_fc2.weight]
    return [output_SBH.detach(), *(tensor.grad.clone() for tensor in (input_SBH, *weights))]


def megatrons(mlp: GatedMlp) -> MLP:
    """The same weights in Megatron's own class."""
    twin = copy.copy(mlp)
    twin.__class__ = MLP
    return twin


def test_outputs_and_gradients_are_those_of_megatron(mlp: GatedMlp) -> None:
    ours = outputs_and_gradients(mlp)
    mlp.zero_grad()
    for our, theirs in zip(ours, outputs_and_gradients(megatrons(mlp)), strict=True):
        torch.testing.assert_close(our, theirs, rtol=1e-5, atol=1e-5)


def test_exchanged_halves_show(mlp: GatedMlp) -> None:
    """The fault twin: up in the place of gate."""
    ours = outputs_and_gradients(mlp)
    mlp.zero_grad()
    with torch.no_grad():
        mlp.linear_fc1.weight.copy_(torch.cat(mlp.linear_fc1.weight.chunk(2)[::-1]))
    theirs = outputs_and_gradients(megatrons(mlp))
    assert all((our - their).abs().max() > 0.1 for our, their in zip(ours, theirs, strict=True))


def random_operands(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Input [2, 2, 4], the weight of gate and up, and that of down, for F = 3; all want gradients."""
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True)
        for shape in ((2, 2, 4), (6, 4), (5, 3))
    ]


def test_the_gradient_is_that_of_finite_differences() -> None:
    assert torch.autograd.gradcheck(_GatedProducts.apply, random_operands(torch.float64))


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_no_gradient_is_computed_that_nobody_wants(frozen: int) -> None:
    operands = random_operands()
    operands[frozen].requires_grad_(False)
    output = _GatedProducts.apply(*operands)
    assert output.grad_fn.next_functions[frozen][0] is None
    assert len([function for function, _ in output.grad_fn.next_functions if function is not None]) == 2


def test_frozen_products_are_the_same_and_keep_nothing() -> None:
    """Computed in another way; the twin, of another input, differs."""
    operands = random_operands()
    frozen = [operand.detach() for operand in operands]
    output = _GatedProducts.apply(*frozen)
    assert output.grad_fn is None
    torch.testing.assert_close(output, _GatedProducts.apply(*operands).detach())
    other = _GatedProducts.apply(frozen[0].flip(0), *frozen[1:])
    assert not torch.allclose(output, other)
