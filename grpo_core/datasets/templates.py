"""Renders a model's chat template, an untrusted program, with limits on memory and time.

Owns the rendering of conversations to text and token ids for every module that prompts a model. Invariant: a template
takes at most `ROOM_BYTES` of additional memory, and `SECONDS` for a batch.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol, cast

from grpo_core.errors import JobFailure
from grpo_core.reasons import FailureCode

ROOM_BYTES: Final = 1024**3
"""Additional memory that rendering a template may take, in bytes."""
SECONDS: Final = 60.0
"""Time limit for a batch of conversations; a usual template renders thousands per second."""
MAX_CHARACTERS: Final = 4_000_000
"""Largest number of characters of a rendered prompt: more than the longest context window."""

_BATCH = 512


class ChatTokenizer(Protocol):
    """The methods of a tokenizer that this module calls; those of transformers have them."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Return the text of each conversation, with `tokenize=False`."""
        ...

    def __call__(self, text: Any, **options: Any) -> Any:
        """Return token ids."""
        ...


def render(tokenizer: ChatTokenizer, conversations: Sequence[Any]) -> list[str]:
    """Return the prompt text of each conversation. Raises a `user_config` failure if the template exceeds a limit."""
    texts: list[str] = []
    for start in range(0, len(conversations), _BATCH):
        texts += _render(tokenizer, conversations[start : start + _BATCH])
    return texts


def encode(tokenizer: ChatTokenizer, conversations: Sequence[Any]) -> list[list[int]]:
    """Return the token ids of each conversation's prompt."""
    ids: list[list[int]] = []
    for start in range(0, len(conversations), _BATCH):
        texts = _render(tokenizer, conversations[start : start + _BATCH])
        # The template has written the special tokens.
        ids += [list(one) for one in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    return ids


def _render(tokenizer: ChatTokenizer, batch: Sequence[Any]) -> list[str]:
    import jinja2

    try:
        with _bounded_memory(), _bounded_time():
            texts = cast(
                "list[str]", tokenizer.apply_chat_template(list(batch), add_generation_prompt=True, tokenize=False)
            )
    except MemoryError as error:
        raise _unbearable(f"needs more than {ROOM_BYTES // 1024**2} MiB of memory") from error
    except _TooLong as error:
        raise _unbearable(f"takes more than {SECONDS:.0f} s for {len(batch)} conversations") from error
    except (jinja2.TemplateError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise JobFailure(
            FailureCode.CHAT_TEMPLATE_FAILED,
            f"The model's chat template cannot be rendered ({type(error).__name__}).",
            hint="Use another model or revision; some templates take no system message: set data.system_prompt to ''.",
        ) from error
    longest = max(map(len, texts), default=0)
    if longest > MAX_CHARACTERS:
        raise _unbearable(f"makes a prompt of {longest} characters; at most {MAX_CHARACTERS} are accepted")
    return texts


class _TooLong(Exception):
    pass


@contextmanager
def _bounded_time() -> Generator[None]:
    """Interrupt a template after `SECONDS`, in the main thread; Python code in other threads cannot be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: object) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _bounded_memory() -> Generator[None]:
    """Limit the growth of the address space to `ROOM_BYTES`.

    The limit lasts only while a template is rendered, because CUDA reserves far more address space than it uses.
    """
    if sys.platform != "linux":
        yield
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + ROOM_BYTES
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _unbearable(what: str) -> JobFailure:
    return JobFailure(
        FailureCode.CHAT_TEMPLATE_TOO_LARGE,
        f"The model's chat template {what}.",
        hint="Use another model or revision.",
    )
