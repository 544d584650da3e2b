"""Products through oneDNN, and norms in few passes, are what they should be, gradients included.

Shapes: S sequence, B batch, I input size, O output size.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from pretrain import cpu_products
from pretrain.cpu_products import fast_on_cpu, gated_product, multiply, product
from pretrain.model.norm import RmsNorm, _Norm
from pretrain.model.specs import transformer_config
from pretrain.parallel import ParallelContext
from tests.pretrain.tiny_runs import tiny_recipe


def operands(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Input [5, 3, 24] and weight [40, 24]."""
    generator = torch.Generator().manual_seed(4)
    return (
        torch.randn(5, 3, 24, generator=generator, dtype=dtype),
        torch.randn(40, 24, generator=generator, dtype=dtype),
    )


@pytest.fixture(params=["oneDNN", "torch"], autouse=True)
def library(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test with oneDNN's products, and with torch's own."""
    if request.param == "oneDNN" and not cpu_products._HAS_ONEDNN:
        pytest.skip("this torch has no oneDNN")
    with fast_on_cpu() if request.param == "oneDNN" else nullcontext():
        yield


@pytest.mark.parametrize("library", ["torch"], indirect=True)
def test_only_what_trains_takes_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparisons with other libraries' models must not change their rounding; the twin is within the steps."""
    if not cpu_products._HAS_ONEDNN:
        pytest.skip("this torch has no oneDNN")
    input_SBI, weight_OI = operands()
    taken: list[bool] = []
    whole = cpu_products._onednn_takes

    def noted(tensor: torch.Tensor) -> bool:
        taken.append(whole(tensor))
        return taken[-1]

    monkeypatch.setattr(cpu_products, "_onednn_takes", noted)
    for context in (nullcontext(), fast_on_cpu(), nullcontext()):
        with context:
            product(input_SBI, weight_OI)
    assert taken == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_product_is_torchs(dtype: torch.dtype) -> None:
    """Of a weight as it is and of a transposed view; the twin, of rows in another order, is another."""
    input_SBI, weight_OI = operands(dtype)
    wanted = torch.nn.functional.linear(input_SBI, weight_OI)
    torch.testing.assert_close(product(input_SBI, weight_OI), wanted)
    input_TI = input_SBI.flatten(0, 1)
    torch.testing.assert_close(multiply(input_TI, weight_OI), wanted.flatten(0, 1))
    torch.testing.assert_close(multiply(input_TI, weight_OI.T.contiguous().T), wanted.flatten(0, 1))
    assert not torch.allclose(product(input_SBI, weight_OI.flip(0)), wanted)


def test_the_gated_product_is_silu_of_one_times_the_other() -> None:
    input_SBI, weight_OI = operands()
    input_TI, gate_OI, up_OI = input_SBI.flatten(0, 1), *weight_OI.chunk(2)
    wanted = torch.nn.functional.silu(input_TI @ gate_OI.T) * (input_TI @ up_OI.T)
    torch.testing.assert_close(gated_product(input_TI, gate_OI, up_OI), wanted)
    assert not torch.allclose(gated_product(input_TI, up_OI, gate_OI), wanted)


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_gradients_are_those_of_torch(wanted: tuple[bool, bool]) -> None:
    """And only those that are wanted, of a gradient that does not lie in order; its twin is one of another output."""
    gradient_SBO = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(5)).transpose(0, 1)
    found = []
    for function in (product, torch.nn.functional.linear):
        pair = [tensor.requires_grad_(wants) for tensor, wants in zip(operands(), wanted, strict=True)]
        function(*pair).backward(gradient_SBO)
        found.append([tensor.grad for tensor in pair])
    for ours, theirs, wants in zip(*found, wanted, strict=True):
        assert (ours is not None) == (theirs is not None) == wants
        if wants:
            torch.testing.assert_close(ours, theirs)
            assert not torch.allclose(ours, theirs.flip(0))


def test_the_gradient_is_that_of_finite_differences() -> None:
    pair = [tensor[:2, ..., :3].clone().requires_grad_() for tensor in operands(torch.float64)]
    assert torch.autograd.gradcheck(product, pair)


@pytest.mark.parametrize("sizes", [(24, 40), (48, 24)])
def test_products_of_attentions_order_are_those_of_the_usual_one(sizes: tuple[int, int]) -> None:
    """Sample by sample in memory, wide and narrow; output in the usual order, and the gradients of both."""
    generator = torch.Generator().manual_seed(6)
    input_BSI, weight_OI = (
        torch.randn(shape, generator=generator) for shape in ((3, 5, sizes[0]), (sizes[1], sizes[0]))
    )
    gradient_SBO = torch.randn(5, 3, sizes[1], generator=generator)
    found = []
    for function in (product, torch.nn.functional.linear):
        pair = [tensor.clone().requires_grad_() for tensor in (input_BSI, weight_OI)]
        output_SBO = function(pair[0].transpose(0, 1), pair[1])
        output_SBO.backward(gradient_SBO)
        found.append((output_SBO.detach(), *(tensor.grad for tensor in pair)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.is_contiguous() and not torch.allclose(ours, theirs.flip(0))


def norm_of(epsilon: float, context: ParallelContext) -> RmsNorm:
    """Of rows of 24, with weights of its own."""
    config = transformer_config(tiny_recipe("base", Path("run"), Path("data")), "base")
    norm = RmsNorm(config, 24, eps=epsilon)
    torch.nn.init.uniform_(norm.weight, generator=torch.Generator().manual_seed(7))
    return norm


def torchs_norm(state_SBH: torch.Tensor, weight_H: torch.Tensor) -> torch.Tensor:
    """The norm that ours must be."""
    return torch.nn.functional.rms_norm(state_SBH, (24,), weight_H, 1e-5)


@pytest.mark.parametrize("wanted", [(False, False), (True, True), (True, False), (False, True)])
def test_the_norm_is_torchs(wanted: tuple[bool, bool], context: ParallelContext) -> None:
    """Frozen and trained, gradients too, on rows of any size; the twin, with another epsilon, is another."""
    gradient_SBH = torch.randn(5, 3, 24, generator=torch.Generator().manual_seed(5))
    found = []
    for epsilon, is_ours in ((1e-5, True), (1e-3, True), (1e-5, False)):
        norm = norm_of(epsilon, context)
        state_SBH = operands()[0] * torch.logspace(-3, 2, 5)[:, None, None]
        pair = [t.requires_grad_(wants) for t, wants in zip((state_SBH, norm.weight), wanted, strict=True)]
        output_SBH = norm(state_SBH) if is_ours else torchs_norm(*pair)
        if any(wanted):
            output_SBH.backward(gradient_SBH)
        found.append([output_SBH.detach(), *(tensor.grad for tensor in pair if tensor.requires_grad)])
    for ours, other, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert not torch.allclose(other, theirs)


def test_the_norms_gradients_are_those_of_finite_differences() -> None:
    state_SBH = operands(torch.float64)[0][:2].requires_grad_()
    weight_H = torch.linspace(0.5, 2, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *pair: _Norm.apply(*pair, 1e-5), (state_SBH, weight_H))
