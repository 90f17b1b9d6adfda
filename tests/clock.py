"""How long a test waits before it calls something broken.

A limit costs nothing where the thing happens, and where other work holds the cores up it must not be the judge. Tests
state the seconds that a quiet machine needs at most; this multiplies them. A limit that the
product itself promises (a lease, a job's time limit) is not multiplied.
"""

from __future__ import annotations

SLOWEST = 4
"""How many times slower than a quiet machine of two cores the tests still pass."""


def patience(seconds: float) -> float:
    """The limit in seconds for what takes at most `seconds` on a quiet machine."""
    return seconds * SLOWEST
