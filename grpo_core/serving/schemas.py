"""Whether a JSON Schema can guide answers, found out in a process that may take a second and little memory.

Owns the grammar of a schema, its limits and what is said of one that is refused. llguidance has its own limits, but
`minItems` of a billion or a few `multipleOf` get around them, so a session is sent no schema before this process has
compiled it. Invariant: whatever the schema, the answer comes within `WAIT_SECONDS` and the caller only waits for it.
Imports no torch.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MAX_BYTES: Final = 64 * 1024
SECONDS: Final = 1
"""Of processor time, a tenth of which the start of the process takes."""
WAIT_SECONDS: Final = 10.0
MEMORY_BYTES: Final = 512 * 1024**2
LIMITS: Final = LLParserLimits(step_lexer_fuel=50_000, verbose_errors=False)
"""With a quarter of llguidance's own fuel, the slowest known mask of 150,000 tokens takes 0.1 s instead of 0.5 s."""
_TOO_COMPLEX: Final = f"is too complex: it was not compiled within {SECONDS} s and {MEMORY_BYTES // 1024**2} MiB"


def fault_of(schema: Mapping[str, Any]) -> str:
    """What is wrong with a schema, in words that follow its name; empty if nothing is."""
    text = json.dumps(schema)
    if len(text) > MAX_BYTES:
        return f"has {len(text)} bytes of {MAX_BYTES} that it may have"
    try:
        return _fault_of(text)
    except subprocess.TimeoutExpired:
        return _TOO_COMPLEX


def matcher(schema: str, tokenizer: LLTokenizer) -> LLMatcher:
    """Compile a schema."""
    given = json.loads(schema)
    if isinstance(given, dict):
        given.pop("x-guidance", None)  # settings of the library, not of the answer
    # On one line: where any white space is allowed, a weak model writes newlines until its answer is cut off.
    grammar = LLMatcher.grammar_from_json_schema(
        given,
        overrides={"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?", "lenient": False},
    )
    return LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)


@lru_cache(maxsize=256)
def _fault_of(schema: str) -> str:
    command = [sys.executable, "-I", "-m", __name__]
    ended = subprocess.run(  # noqa: S603 - no part of the command is given
        command, input=schema.encode(), capture_output=True, timeout=WAIT_SECONDS, env={}, check=False
    )
    return ended.stdout.decode() if ended.returncode == 0 else _TOO_COMPLEX


def main() -> None:
    """Compile the schema on standard input and print what is wrong with it."""
    for what, most in ((resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(what, (most, most))
    made = matcher(sys.stdin.read(), LLTokenizer("byte"))
    made.compute_bitmask()
    if fault := made.get_error():
        sys.stdout.write(f"cannot guide an answer: {fault.splitlines()[0]}")


if __name__ == "__main__":
    main()
