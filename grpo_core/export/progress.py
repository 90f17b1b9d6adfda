"""Says how far an export is, so that minutes of writing and checking are not silence.

Owns the words and how often they are said. Invariant: a stage is reported at once, its tensors at most every
`EVERY_SECONDS`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

EVERY_SECONDS: Final = 10.0
CODE: Final = "export_progress"
"""Of the log events."""


class Progress:
    """Tells the stages of one export."""

    def __init__(
        self, tell: Callable[[str], None] = lambda _: None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._tell = tell
        self._clock = clock
        self._told = clock()
        self._total = 0
        self._done = 0

    def stage(self, message: str) -> None:
        """Begin a stage."""
        self._told = self._clock()
        self._tell(message)

    def writing(self, message: str, parameters: int) -> None:
        """Begin the stage in which this many parameters are written."""
        self._total, self._done = parameters, 0
        self.stage(message)

    def wrote(self, parameters: int) -> None:
        """Note the next tensor."""
        self._done += parameters
        if self._clock() - self._told >= EVERY_SECONDS and self._total:
            self.stage(f"{min(1.0, self._done / self._total):.0%} of the weights are written")
