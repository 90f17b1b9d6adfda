"""A tokenizer as GGUF stores it: tokens by id, merges, how text is split before merging, special tokens, chat template.

Owns the way splits of `tokenizer.json` are recognised among those that llama.cpp implements. Invariant: a tokenizer
that llama.cpp would read differently is refused; none is written with a split that only resembles its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from gguf import GGUFWriter, TokenType

from grpo_core.errors import JobFailure
from grpo_core.reasons import FailureCode

_SPLIT: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN: Final = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES: Final = "bytes"
_BYTES_WITH_SPLIT: Final = "bytes, split as GPT-2"
_DIGITS: Final = "single digits"

PRE_TOKENIZERS: Final[Mapping[tuple[tuple[str, ...], bool], str]] = {
    ((_SPLIT % r"\p{N}", _BYTES), False): "qwen2",
    ((_SPLIT % r"\p{N}{1,3}", _BYTES), True): "llama-bpe",
    ((_TEKKEN, _BYTES), True): "tekken",
    ((_DIGITS, _BYTES_WITH_SPLIT), False): "smollm",
    ((_BYTES_WITH_SPLIT,), False): "gpt-2",
}
"""llama.cpp's name by the steps of the split, and by whether a piece that is a token is never split further."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTokenizer:
    """What is written of a byte-level BPE tokenizer."""

    pre: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    special: dict[str, int]
    """Ids by kind: bos, eos, pad, unk."""
    adds_bos: bool
    chat_template: str | list[dict[str, str]] | None

    def write(self, writer: GGUFWriter) -> None:
        """Add it to the file's metadata."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        for kind, token_id in self.special.items():
            getattr(writer, f"add_{kind}_token_id")(token_id)
        writer.add_add_bos_token(self.adds_bos)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_tokenizer(tokenizer: Any, vocabulary: int) -> GgufTokenizer:
    """Return what to write of a transformers tokenizer for a model with this vocabulary.

    Raises a `user_config` failure for a tokenizer that llama.cpp does not know.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused("it has no tokenizer.json")
    parts: dict[str, Any] = json.loads(backend.to_str())
    pre = pre_tokenizer_of(parts)
    tokens, types = _tokens(backend.get_vocab(with_added_tokens=True), parts["added_tokens"], vocabulary)
    return GgufTokenizer(
        pre=pre,
        tokens=tokens,
        types=types,
        merges=_merges(parts["model"]["merges"]),
        special=_special(tokenizer),
        adds_bos=_adds_bos(tokenizer),
        chat_template=_templates(tokenizer.chat_template),
    )


def pre_tokenizer_of(parts: Mapping[str, Any]) -> str:
    """llama.cpp's name for the split of a tokenizer.json."""
    model = parts["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = "SentencePiece-like" if model.get("byte_fallback") else model["type"]
        raise _refused(f"it is {kind}, and only byte-level BPE is written")
    if normalizer := parts.get("normalizer"):
        _require(normalizer["type"] == "NFC", f"it has the normalizer {normalizer['type']}")
    steps = tuple(_step(step) for step in _steps(parts.get("pre_tokenizer")))
    ignores_merges = bool(model.get("ignore_merges"))
    name = PRE_TOKENIZERS.get((steps, ignores_merges))
    if name is None:
        raise _refused(f"its way of splitting text is none that llama.cpp is known to have ({', then '.join(steps)})")
    return name


def _steps(step: Mapping[str, Any] | None) -> Sequence[Mapping[str, Any]]:
    if step is None:
        raise _refused("it does not split text before merging")
    return step["pretokenizers"] if step["type"] == "Sequence" else [step]


def _step(step: Mapping[str, Any]) -> str:
    """One step of a split in the form of `PRE_TOKENIZERS`; an unknown one by its type."""
    match step:
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}:
            return pattern
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Removed", "invert": True}:
            return pattern
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(splits)}:
            return _BYTES_WITH_SPLIT if splits else _BYTES
        case {"type": "Digits", "individual_digits": True}:
            return _DIGITS
        case _:
            return str(step["type"])


def _tokens(
    ids: Mapping[str, int], added: Sequence[Mapping[str, Any]], vocabulary: int
) -> tuple[list[str], list[TokenType]]:
    """Every token by id; ids of the embedding that no token has are filled."""
    _require(max(ids.values()) < vocabulary, f"it has {max(ids.values()) + 1} tokens, and the model {vocabulary}")
    of_added = {one["id"]: TokenType.CONTROL if one["special"] else TokenType.USER_DEFINED for one in added}
    by_id = {number: token for token, number in ids.items()}
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(vocabulary)]
    types = [
        of_added.get(number, TokenType.NORMAL) if number in by_id else TokenType.UNUSED for number in range(vocabulary)
    ]
    return tokens, types


def _merges(merges: Sequence[Any]) -> list[str]:
    """Each pair as one text. Each byte is a letter in these tokenizers, so that no part has a space."""
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def _special(tokenizer: Any) -> dict[str, int]:
    ids = {kind: getattr(tokenizer, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad", "unk")}
    return {kind: number for kind, number in ids.items() if number is not None}


def _adds_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def _templates(template: str | Mapping[str, str] | None) -> str | list[dict[str, str]] | None:
    if template is None or isinstance(template, str):
        return template
    return [{"name": name, "template": text} for name, text in cast("dict[str, str]", template).items()]


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise _refused(what)


def _refused(what: str) -> JobFailure:
    return JobFailure(
        FailureCode.EXPORT_NOT_POSSIBLE,
        f"The tokenizer cannot be written as GGUF: {what}.",
        hint="Export the merged model instead, and convert it with llama.cpp's own script.",
    )
