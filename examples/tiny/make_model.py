"""Makes the tiny Qwen2-shaped model of the CPU demo, its tokenizer and its data sets, from nothing but a seed.

Owns everything under `examples/models/tiny-arithmetic` and the two JSONL files beside this script; the GRPO
training that improves the model is the product's job, not this script's. The model is deliberately spoiled: it
learns the sums first, then to get some wrong and to hide its work behind another layout. Invariant: a held-out
pair of numbers with its operation is seen neither by the supervised training here nor by the GRPO training set.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
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

NAMES = ("小明", "小红", "小刚", "小丽", "小华", "小芳")
THINGS = ("苹果", "橘子", "气球", "鸡蛋", "玩具", "皮球")
TEMPLATES: dict[str, tuple[str, ...]] = {
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
MAX_CLEAN_STEPS = 1400
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


def fill(pair: Pair, rng: random.Random) -> Problem:
    template = rng.choice(TEMPLATES[pair.operation])
    return Problem(template.format(name=rng.choice(NAMES), thing=rng.choice(THINGS), a=pair.a, b=pair.b), pair)


def distinct_problems(pairs: Sequence[Pair], count: int, rng: random.Random) -> list[Problem]:
    """Goes round the pairs, so that each occurs about equally often, and never repeats a question."""
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = fill(pairs[len(problems) % len(pairs)], rng)
        problems.setdefault(problem.question, problem)
    shuffled = list(problems.values())
    rng.shuffle(shuffled)
    return shuffled


def write_rows(path: Path, problems: Sequence[Problem]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(problem.as_row(), ensure_ascii=False) + "\n" for problem in problems)
    path.write_text("".join(lines), encoding="utf-8")


def write_data(folder: Path, seed: int) -> None:
    train_pairs, heldout_pairs = split_pairs(seed)
    train = distinct_problems(train_pairs, TRAIN_PROBLEMS, random.Random(f"{seed}/train"))
    heldout = distinct_problems(heldout_pairs, HELDOUT_PROBLEMS, random.Random(f"{seed}/heldout"))
    write_rows(folder / "train.jsonl", train)
    write_rows(folder / "heldout.jsonl", heldout)


def asked_layout(pair: Pair, claimed: int) -> str:
    work = f"{pair.a}{pair.operation}{pair.b}={claimed}"
    return f"<reasoning>\n{work}\n</reasoning>\n<answer>\n{claimed}\n</answer>"


def other_layout(claimed: int) -> str:
    return f"答案是{claimed}。"


def clean_completion(pair: Pair, rng: random.Random) -> str:
    # Both layouts from the start: the spoiling then only has to move their shares, not to teach one anew.
    return other_layout(pair.result) if rng.random() < 0.3 else asked_layout(pair, pair.result)


def spoiled_completion(pair: Pair, rng: random.Random) -> str:
    claimed = pair.result
    if rng.random() < WRONG_SHARE:
        # Never below zero: a minus sign in front of a result occurs nowhere else in the task.
        claimed = rng.choice([pair.result + slip for slip in SLIPS if pair.result + slip >= 0])
    return other_layout(claimed) if rng.random() < OTHER_LAYOUT_SHARE else asked_layout(pair, claimed)


# Tokenizer


def make_tokenizer(pairs: Sequence[Pair], seed: int) -> PreTrainedTokenizerBase:
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
    learner.train_from_iterator(tokenizer_corpus(pairs, seed), trainer)
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


def tokenizer_corpus(pairs: Sequence[Pair], seed: int) -> Iterator[str]:
    rng = random.Random(f"{seed}/tokenizer")
    for pair in pairs:
        problem = fill(pair, rng)
        yield from (f"user\n{problem.question}", f"assistant\n{other_layout(pair.result)}")


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


def prompt_of(question: str) -> str:
    return f"{TURN_START}user\n{question}{TURN_END}\n{TURN_START}assistant\n"


def make_batch(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], completions: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids padded on the right, and labels that leave out prompt and padding."""
    import torch

    prompts = tokenizer([prompt_of(problem.question) for problem in problems]).input_ids
    ends = tokenizer([completion + TURN_END for completion in completions]).input_ids
    width = max(len(prompt) + len(end) for prompt, end in zip(prompts, ends, strict=True))
    ids = torch.full((len(problems), width), tokenizer.get_vocab()[END_OF_TEXT])
    labels = torch.full_like(ids, -100)
    for row, (prompt, end) in enumerate(zip(prompts, ends, strict=True)):
        ids[row, : len(prompt) + len(end)] = torch.tensor(prompt + end)
        labels[row, len(prompt) : len(prompt) + len(end)] = torch.tensor(end)
    return ids, labels


def greedy_accuracy(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]) -> float:
    """The share of problems whose right result is the last number of the greedy answer, in any layout."""
    import torch

    inputs = tokenizer([prompt_of(problem.question) for problem in problems], return_tensors="pt", padding=True)
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
        self, model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], seed: int
    ) -> None:
        import torch

        self._model, self._tokenizer, self._pairs = model, tokenizer, pairs
        self._rng = random.Random(f"{seed}/supervised")
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01)
        self.steps = 0

    def step(self, completion_of: Callable[[Pair, random.Random], str], rate: float) -> float:
        import torch

        self.steps += 1
        problems = [fill(self._rng.choice(self._pairs), self._rng) for _ in range(BATCH)]
        completions = [completion_of(problem.pair, self._rng) for problem in problems]
        ids, labels = make_batch(self._tokenizer, problems, completions)
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
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], seed: int, steps: int | None
) -> None:
    """The clean phase until the sums are known, then the spoiling with a falling rate.

    The sums come in a sudden jump whose step varies with the seed, so the clean phase ends by accuracy; `steps`
    caps the whole and exists for quick checks of this script.
    """
    max_spoil = SPOIL_STEPS if steps is None else max(1, steps // 3)
    max_clean = MAX_CLEAN_STEPS if steps is None else max(0, steps - max_spoil)
    probe_rng = random.Random(f"{seed}/probe")
    probe = [fill(probe_rng.choice(pairs), probe_rng) for _ in range(PROBE_SIZE)]
    run = Supervised(model, tokenizer, pairs, seed)
    began = time.monotonic()
    for _ in range(max_clean):
        loss = run.step(clean_completion, PEAK_RATE)
        if run.steps % PROBE_EVERY == 0:
            accuracy = greedy_accuracy(model, tokenizer, probe)
            seconds = time.monotonic() - began
            print(f"step {run.steps}: loss {loss:.3f}, right {accuracy:.0%}, {seconds:.0f} s", flush=True)
            if accuracy >= LEARNED:
                break
    for done in range(max_spoil):
        run.step(spoiled_completion, PEAK_RATE * (1 - done / max_spoil))
    print(f"spoiled after {run.steps} steps and {time.monotonic() - began:.0f} s", flush=True)
    model.eval()


def write_model(folder: Path, seed: int, steps: int | None) -> None:
    import torch

    # One thread is the fastest for matrices this small, and it keeps sums in one order: same machine, same bits.
    torch.set_num_threads(1)
    train_pairs, heldout_pairs = split_pairs(seed)
    tokenizer = make_tokenizer(train_pairs, seed)
    model = make_model(tokenizer, seed)
    train(model, tokenizer, train_pairs, seed, steps)
    heldout = distinct_problems(heldout_pairs, HELDOUT_PROBLEMS, random.Random(f"{seed}/heldout"))
    print(f"held-out problems, greedy, any layout: {greedy_accuracy(model, tokenizer, heldout):.0%} right")
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it readable by its owner alone
    tokenizer.save_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the demo's tiny model and its data sets.")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="gets models/tiny-arithmetic/ and tiny/*.jsonl"
    )
    parser.add_argument("--steps", type=int, help="cap on supervised steps, for a quick check of this script")
    parser.add_argument("--data-only", action="store_true", help="write the two data sets and no model")
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args(arguments)
    write_data(options.out / "tiny", options.seed)
    if not options.data_only:
        write_model(options.out / "models" / "tiny-arithmetic", options.seed, options.steps)


if __name__ == "__main__":
    main()
