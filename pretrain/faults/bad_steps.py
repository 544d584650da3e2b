"""Steps that go wrong: a loss or gradient that is not finite, or a loss that spikes. The recipe says what follows.

All figures are the same on all ranks, so the ranks decide alike.
"""

import statistics
from collections import deque
from collections.abc import Iterable

from data_prep.errors import TrainingError
from pretrain.config import FaultConfig

WINDOW_STEPS = 64
FEWEST_STEPS = 16  # with fewer, a median says little


class BadStepError(RuntimeError):
    """A step went wrong, on all ranks alike; the optimizer has not moved on it."""


class RollBackError(RuntimeError):
    """Training is to go on from the last checkpoint, with the data from sample `next_sample` on."""

    def __init__(self, step: int, next_sample: int, reason: str) -> None:
        super().__init__(f"step {step}: {reason}")
        self.step, self.next_sample = step, next_sample


class BadSteps:
    """Knows a bad step, counts them, and says what to do about one."""

    def __init__(
        self, faults: FaultConfig, recent_losses: Iterable[float] = (), in_a_row: int = 0, skipped: int = 0
    ) -> None:
        self.faults = faults
        self.recent_losses = deque(recent_losses, maxlen=WINDOW_STEPS)
        self.in_a_row, self.skipped = in_a_row, skipped

    def refuse_spike(self, loss: float) -> None:
        """Raise `BadStepError` if `loss` is too far above what is usual of late."""
        factor = self.faults.spike_factor
        if factor is None or len(self.recent_losses) < FEWEST_STEPS:
            return
        usual = statistics.median(self.recent_losses)
        if loss > factor * usual:
            raise BadStepError(
                f"loss {loss:.4g} is {loss / usual:.1f} times the median of the last {len(self.recent_losses)}"
            )

    def count_good(self, loss: float) -> None:
        """A step went well."""
        self.in_a_row = 0
        self.recent_losses.append(loss)

    def count_bad(self, step: int, next_sample: int, error: BadStepError) -> str:
        """A step went wrong.

        Returns:
            What is told of it, where training just goes on.

        Raises:
            RollBackError: to be rolled back.
            TrainingError: one too many, or the recipe allows none.
        """
        self.in_a_row += 1
        if self.faults.bad_step == "roll_back":
            raise RollBackError(step, next_sample, str(error))
        if self.faults.bad_step == "stop":
            raise TrainingError(
                f"step {step}: {error}; the optimizer was not moved; lower optimizer.learning_rate, look at the data "
                "of this step, or choose faults.bad_step skip or roll_back, then go on with --resume"
            )
        if self.in_a_row > self.faults.max_bad_steps:
            raise TrainingError(
                f"step {step}: {error}; it is bad step {self.in_a_row} in a row, faults.max_bad_steps allows "
                f"{self.faults.max_bad_steps}; the optimizer was not moved"
            )
        self.skipped += 1
        return f"step {step}: {error}; skipped ({self.in_a_row} in a row)"
