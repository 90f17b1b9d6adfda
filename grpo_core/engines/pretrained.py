"""What every engine and the serving process read of a base model besides its weights: tokenizer and stop tokens.

Imports transformers, and neither TRL nor PEFT, which take seconds. Invariant: no code of a model is run.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from grpo_core.errors import JobFailure
from grpo_core.hardware.models import ModelFiles
from grpo_core.reasons import FailureCode


def load_tokenizer(files: ModelFiles) -> Any:
    """Load the model's tokenizer. Raises a `user_config` failure if it has no chat template."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(files.path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise model_unreadable(files, "tokenizer", error) from error
    if not tokenizer.chat_template:
        raise JobFailure(
            FailureCode.NO_CHAT_TEMPLATE,
            f"The tokenizer of {files.name} has no chat template.",
            hint="Use an instruction-tuned model.",
        )
    return tokenizer


def stop_tokens(files: ModelFiles, tokenizer: Any) -> int | list[int]:
    """Return the stop tokens, from the model's configuration or its tokenizer."""
    try:
        ends: Any = GenerationConfig.from_pretrained(files.path).eos_token_id
    except OSError:
        ends = AutoConfig.from_pretrained(files.path).eos_token_id
    return tokenizer.eos_token_id if ends is None else ends


def model_unreadable(files: ModelFiles, what: str, error: Exception) -> JobFailure:
    """The failure of a model whose files cannot be loaded."""
    reason = str(error).splitlines()[0].replace(str(files.path), files.name) if str(error) else type(error).__name__
    return JobFailure(
        FailureCode.MODEL_UNREADABLE,
        f"The {what} of {files.name} cannot be loaded: {reason[:300]}",
        hint="Use a causal language model that transformers supports without remote code, with safetensors weights.",
    )
