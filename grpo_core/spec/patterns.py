"""Regular expressions that users write, compiled so that no text makes them slow.

Owns the choice of engine (RE2: linear in the text, no look-around, no back-references) and its bounds. Invariant: what
`compile_pattern` returns matches in time linear in the text, whatever the pattern.
"""

from __future__ import annotations

from typing import Any, Final

_MAX_MEMORY: Final = 8 * 1024**2


def compile_pattern(pattern: str) -> Any:
    """The pattern, ready to match; raises `ValueError` that says what is wrong with it."""
    import re2

    options = re2.Options()
    options.log_errors = False
    options.max_mem = _MAX_MEMORY
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        said = error.args[0] if error.args else "it cannot be read"
        text = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
        raise ValueError(f"is no regular expression that RE2 reads: {text}") from None
