"""How long a start takes, by part."""

import time

import psutil


class StartUp:
    """A stopwatch that began when this process did."""

    def __init__(self) -> None:
        self._last = psutil.Process().create_time()
        self._seconds: dict[str, float] = {}

    def passed(self, part: str) -> None:
        """The part called `part` is over; only its first time counts."""
        now = time.time()
        self._seconds.setdefault(part, round(now - self._last, 3))
        self._last = now

    def after_first_step(self) -> dict[str, float]:
        """Seconds by part, the first step being the last of them."""
        self.passed("first_step_seconds")
        return self._seconds
