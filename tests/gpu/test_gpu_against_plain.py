"""On a GPU too, losses and gradients of every stage are those of an independent CoLA in plain PyTorch.

Both in fp32 with the same weights. Transformer Engine multiplies fp32 matrices as TF32, 10 bits of mantissa, so the
bound is wider than on a CPU (tests/pretrain/test_against_plain.py, which has the comparison and more faults).
"""

import pytest

from pretrain.parallel import ParallelContext
from tests.pretrain.plain_twin import CASES
from tests.pretrain.test_against_plain import found_differences, gate_and_up_exchanged

pytestmark = pytest.mark.gpu

TOLERANCE = 0.01
CLEARLY_WRONG = 10 * TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_loss_and_every_gradient(
    case: str, context: ParallelContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a plain model with the halves of an MLP exchanged is seen to be another."""
    assert context.device.type == "cuda"
    found = found_differences(case, context, monkeypatch)
    print(f"\n{case}: largest relative difference {max(found.values()):.1e}")
    assert max(found.values()) < TOLERANCE, found
    wrong = found_differences(case, context, monkeypatch, gate_and_up_exchanged)
    assert max(wrong.values()) > CLEARLY_WRONG, wrong
