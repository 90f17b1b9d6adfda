"""Makes the tiny Qwen2-shaped model of the CPU demo, its tokenizer and its data sets, from nothing but a seed.

Owns the models `tiny-arithmetic` (Chinese) and `tiny-english` and their JSONL files; the GRPO
training that improves the model is the product's job, not this script's. The model is deliberately spoiled: it
learns the sums first, then to get some wrong and to hide its work behind another layout. Invariant: a held-out
pair of numbers with its operation is seen neither by the supervised training here nor by the GRPO training set.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # the heavy imports happen inside functions, so that --data-only and --help stay instant
    import torch
    from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM

SEED = 20261122
MAX_NUMBER = 20
HELDOUT_PROBLEMS = 200
HELDOUT_SUMS, HELDOUT_DIFFERENCES = 40, 20
TRAIN_PROBLEMS = 4000


@dataclass(frozen=True, kw_only=True)
class Language:
    """The words of the problems and the answers, and where the files go."""

    folder: str
    """Of the data sets, below `--out`."""
    model: str
    """Name of the model's folder below `models`."""
    names: tuple[str, ...]
    things: tuple[str, ...]
    templates: Mapping[str, tuple[str, ...]]
    """Questions by operation."""
    other_layout: str
    """The answer that the model is spoiled with, in place of the format."""
    system_prompt: str
    """Asks for the format, in every prompt of the training and of the job; empty: the model never saw one."""


LANGUAGES = {
    "english": Language(
        folder="english",
        model="tiny-english",
        names=("Tom", "Ann", "Ben", "Mia", "Sam", "Eva"),
        things=("apples", "pears", "balls", "eggs", "toys", "pens"),
        templates={
            "+": (
                "{name} has {a} {thing} and buys {b} more. How many now?",
                "{name} counts {a} {thing} before lunch and {b} after. How many in all?",
                "A box has {a} {thing}. {name} adds {b}. How many are in it?",
            ),
            "-": (
                "{name} has {a} {thing} and gives {b} away. How many are left?",
                "A box has {a} {thing}. {name} takes {b}. How many are left?",
                "{name} wants {a} {thing} and has {b}. How many are missing?",
            ),
        },
        other_layout="The answer is {claimed}.",
        system_prompt="Work in <reasoning>, answer in <answer>.",
    ),
    "chinese": Language(
        folder="tiny",
        model="tiny-arithmetic",
        names=("小明", "小红", "小刚", "小丽", "小华", "小芳"),
        things=("苹果", "橘子", "气球", "鸡蛋", "玩具", "皮球"),
        templates={
            "+": (
                "{name}有{a}个{thing}，又买了{b}个，现在有几个？",
                "{name}上午数了{a}个{thing}，下午数了{b}个，一共几个？",
                "盒子里有{a}个{thing}，{name}放进{b}个，盒子里有几个？",
            ),
            "-": (
                "{name}有{a}个{thing}，送走了{b}个，还剩几个？",
                "盒子里有{a}个{thing}，{name}拿走{b}个，还剩几个？",
                "{name}要数{a}个{thing}，已经数了{b}个，还差几个？",
            ),
        },
        other_layout="答案是{claimed}。",
        system_prompt="",
    ),
}

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCABULARY = 480
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

BATCH = 64
PEAK_RATE = 3e-3
WARMUP_STEPS = 50
PROBE_EVERY = 50
PROBE_SIZE = 128
# The clean phase ends once the model answers this share of unseen questions over the training pairs, greedily.
LEARNED = 0.95
MAX_CLEAN_STEPS = 2400
SPOIL_STEPS = 400
WRONG_SHARE = 0.18
OTHER_LAYOUT_SHARE = 0.72
# Off by one most often, as with a tired pupil; the far errors keep the wrong answers from being one neighbour.
SLIPS = (-10, -5, -3, -2, -2, -1, -1, -1, 1, 1, 1, 2, 2, 3, 5, 10)

Operation = Literal["+", "-"]


@dataclass(frozen=True)
class Pair:
    """Two numbers and the operation between them; the unit that is held out."""

    a: int
    operation: Operation
    b: int

    @property
    def result(self) -> int:
        return self.a + self.b if self.operation == "+" else self.a - self.b


@dataclass(frozen=True)
class Problem:
    question: str
    pair: Pair

    def as_row(self) -> dict[str, str]:
        return {"question": self.question, "answer": str(self.pair.result)}


# Data


def split_pairs(seed: int) -> tuple[list[Pair], list[Pair]]:
    """All sums and all differences above zero, as (training pairs, held-out pairs)."""
    numbers = range(1, MAX_NUMBER + 1)
    sums = [Pair(a, "+", b) for a in numbers for b in numbers]
    differences = [Pair(a, "-", b) for a in numbers for b in numbers if a > b]
    rng = random.Random(f"{seed}/pairs")
    rng.shuffle(sums)
    rng.shuffle(differences)
    heldout = sums[:HELDOUT_SUMS] + differences[:HELDOUT_DIFFERENCES]
    return sums[HELDOUT_SUMS:] + differences[HELDOUT_DIFFERENCES:], heldout


def fill(language: Language, pair: Pair, rng: random.Random) -> Problem:
    template = rng.choice(language.templates[pair.operation])
    name, thing = rng.choice(language.names), rng.choice(language.things)
    return Problem(template.format(name=name, thing=thing, a=pair.a, b=pair.b), pair)


def distinct_problems(language: Language, pairs: Sequence[Pair], count: int, rng: random.Random) -> list[Problem]:
    """Goes round the pairs, so that each occurs about equally often, and never repeats a question."""
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = fill(language, pairs[len(problems) % len(pairs)], rng)
        problems.setdefault(problem.question, problem)
    shuffled = list(problems.values())
    rng.shuffle(shuffled)
    return shuffled


def write_rows(path: Path, problems: Sequence[Problem]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(problem.as_row(), ensure_ascii=False) + "\n" for problem in problems)
    path.write_text("".join(lines), encoding="utf-8")


def write_data(language: Language, folder: Path, seed: int) -> None:
    train_pairs, heldout_pairs = split_pairs(seed)
    train = distinct_problems(language, train_pairs, TRAIN_PROBLEMS, random.Random(f"{seed}/train"))
    heldout = distinct_problems(language, heldout_pairs, HELDOUT_PROBLEMS, random.Random(f"{seed}/heldout"))
    write_rows(folder / "train.jsonl", train)
    write_rows(folder / "heldout.jsonl", heldout)


def asked_layout(pair: Pair, claimed: int) -> str:
    work = f"{pair.a}{pair.operation}{pair.b}={claimed}"
    return f"<reasoning>\n{work}\n</reasoning>\n<answer>\n{claimed}\n</answer>"


def clean_completion(language: Language, pair: Pair, rng: random.Random) -> str:
    # Both layouts from the start: the spoiling then only has to move their shares, not to teach one anew.
    if rng.random() < 0.3:
        return language.other_layout.format(claimed=pair.result)
    return asked_layout(pair, pair.result)


def spoiled_completion(language: Language, pair: Pair, rng: random.Random) -> str:
    claimed = pair.result
    if rng.random() < WRONG_SHARE:
        # Never below zero: a minus sign in front of a result occurs nowhere else in the task.
        claimed = rng.choice([pair.result + slip for slip in SLIPS if pair.result + slip >= 0])
    if rng.random() < OTHER_LAYOUT_SHARE:
        return language.other_layout.format(claimed=claimed)
    return asked_layout(pair, claimed)


# Tokenizer


def make_tokenizer(language: Language, pairs: Sequence[Pair], seed: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE built through Qwen2's own class.

    Loading anything of model type qwen2 rebuilds its split pattern and its NFC normalizer; a tokenizer trained
    with others would change silently between saving and loading.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import AddedToken, Qwen2Tokenizer

    blank = Qwen2Tokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE())
    learner.normalizer = blank.normalizer
    learner.pre_tokenizer = blank.pre_tokenizer
    added = [END_OF_TEXT, TURN_START, TURN_END, *TAGS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(added),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(tokenizer_corpus(language, pairs, seed), trainer)
    learned = json.loads(learner.to_str())["model"]
    merges: list[Any] = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab={**learned["vocab"], END_OF_TEXT: len(learned["vocab"])},
        merges=merges,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        extra_special_tokens=[TURN_START],
        padding_side="left",
        model_max_length=512,
    )
    # Not special: decoding with skip_special_tokens must leave the tags in the text that the rewards read.
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tokenizer_corpus(language: Language, pairs: Sequence[Pair], seed: int) -> Iterator[str]:
    rng = random.Random(f"{seed}/tokenizer")
    for pair in pairs:
        answer = language.other_layout.format(claimed=pair.result)
        yield from (f"user\n{fill(language, pair, rng).question}", f"assistant\n{answer}")


# Supervised training


def make_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> Qwen2ForCausalLM:
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    ids = tokenizer.get_vocab()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=None,
        eos_token_id=ids[TURN_END],
        pad_token_id=ids[END_OF_TEXT],
    )
    config.architectures = ["Qwen2ForCausalLM"]
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=48,
        eos_token_id=ids[TURN_END],
        pad_token_id=ids[END_OF_TEXT],
    )
    return model


def prompt_of(question: str, system_prompt: str = "") -> str:
    system = f"{TURN_START}system\n{system_prompt}{TURN_END}\n" if system_prompt else ""
    return f"{system}{TURN_START}user\n{question}{TURN_END}\n{TURN_START}assistant\n"


def make_batch(
    tokenizer: PreTrainedTokenizerBase, asked: Sequence[str], completions: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids padded on the right, and labels that leave out prompt and padding."""
    import torch

    prompts = tokenizer([*asked]).input_ids
    ends = tokenizer([completion + TURN_END for completion in completions]).input_ids
    width = max(len(prompt) + len(end) for prompt, end in zip(prompts, ends, strict=True))
    ids = torch.full((len(asked), width), tokenizer.get_vocab()[END_OF_TEXT])
    labels = torch.full_like(ids, -100)
    for row, (prompt, end) in enumerate(zip(prompts, ends, strict=True)):
        ids[row, : len(prompt) + len(end)] = torch.tensor(prompt + end)
        labels[row, len(prompt) : len(prompt) + len(end)] = torch.tensor(end)
    return ids, labels


def greedy_accuracy(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], system_prompt: str
) -> float:
    """The share of problems whose right result is the last number of the greedy answer, in any layout."""
    import torch

    prompts = [prompt_of(problem.question, system_prompt) for problem in problems]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    model.eval()
    with torch.inference_mode():
        # The stub of `generate` asks for attributes that no plain model has.
        output = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
            **inputs, do_sample=False, temperature=None, top_p=None, top_k=None
        )
    model.train()
    texts = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return sum(last_number(t) == p.pair.result for t, p in zip(texts, problems, strict=True)) / len(problems)


def last_number(text: str) -> int | None:
    digits = "".join(character if character in "0123456789" else " " for character in text).split()
    return int(digits[-1]) if digits else None


class Supervised:
    """One optimizer over both phases; knows the step count, the rate and nothing of when to stop."""

    def __init__(
        self,
        language: Language,
        model: Qwen2ForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        pairs: Sequence[Pair],
        seed: int,
    ) -> None:
        import torch

        self._language, self._model, self._tokenizer, self._pairs = language, model, tokenizer, pairs
        self._rng = random.Random(f"{seed}/supervised")
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01)
        self.steps = 0

    def step(self, completion_of: Callable[[Language, Pair, random.Random], str], rate: float) -> float:
        import torch

        self.steps += 1
        language, rng = self._language, self._rng
        problems = [fill(language, rng.choice(self._pairs), rng) for _ in range(BATCH)]
        asked = [prompt_of(problem.question, language.system_prompt) for problem in problems]
        completions = [completion_of(language, problem.pair, rng) for problem in problems]
        ids, labels = make_batch(self._tokenizer, asked, completions)
        # No attention mask: with the padding on the right, causality already hides it from every counted token.
        loss = self._model(input_ids=ids, labels=labels).loss
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * min(1.0, self.steps / WARMUP_STEPS)
        self._optimizer.step()
        return float(loss.detach())


def train(
    language: Language,
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    seed: int,
    steps: int | None,
) -> None:
    """The clean phase until the sums are known, then the spoiling with a falling rate.

    The sums come in a sudden jump whose step varies with the seed, so the clean phase ends by accuracy; `steps`
    caps the whole and exists for quick checks of this script.
    """
    max_spoil = SPOIL_STEPS if steps is None else max(1, steps // 3)
    max_clean = MAX_CLEAN_STEPS if steps is None else max(0, steps - max_spoil)
    probe_rng = random.Random(f"{seed}/probe")
    probe = [fill(language, probe_rng.choice(pairs), probe_rng) for _ in range(PROBE_SIZE)]
    run = Supervised(language, model, tokenizer, pairs, seed)
    began = time.monotonic()
    for _ in range(max_clean):
        loss = run.step(clean_completion, PEAK_RATE)
        if run.steps % PROBE_EVERY == 0:
            accuracy = greedy_accuracy(model, tokenizer, probe, language.system_prompt)
            seconds = time.monotonic() - began
            print(f"step {run.steps}: loss {loss:.3f}, right {accuracy:.0%}, {seconds:.0f} s", flush=True)
            if accuracy >= LEARNED:
                break
    for done in range(max_spoil):
        run.step(spoiled_completion, PEAK_RATE * (1 - done / max_spoil))
    print(f"spoiled after {run.steps} steps and {time.monotonic() - began:.0f} s", flush=True)
    model.eval()


def write_model(language: Language, folder: Path, seed: int, steps: int | None) -> None:
    import torch

    # One thread is the fastest for matrices this small, and it keeps sums in one order: same machine, same bits.
    torch.set_num_threads(1)
    train_pairs, heldout_pairs = split_pairs(seed)
    tokenizer = make_tokenizer(language, train_pairs, seed)
    model = make_model(tokenizer, seed)
    train(language, model, tokenizer, train_pairs, seed, steps)
    heldout = distinct_problems(language, heldout_pairs, HELDOUT_PROBLEMS, random.Random(f"{seed}/heldout"))
    right = greedy_accuracy(model, tokenizer, heldout, language.system_prompt)
    print(f"held-out problems, greedy, any layout: {right:.0%} right")
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it readable by its owner alone
    tokenizer.save_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the demo's tiny model and its data sets, for one language.")
    parser.add_argument("language", choices=LANGUAGES)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="gets the model below models/, and the data sets"
    )
    parser.add_argument("--steps", type=int, help="cap on supervised steps, for a quick check of this script")
    parser.add_argument("--data-only", action="store_true", help="write the two data sets and no model")
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args(arguments)
    language = LANGUAGES[options.language]
    write_data(language, options.out / language.folder, options.seed)
    if not options.data_only:
        write_model(language, options.out / "models" / language.model, options.seed, options.steps)


if __name__ == "__main__":
    main()
