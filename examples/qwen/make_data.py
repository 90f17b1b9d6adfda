"""Writes the two files beside this script: word problems to train on, and others never trained on.

    python examples/qwen/make_data.py GSM8K_TRAIN.jsonl GSM8K_TEST.jsonl MSVAMP_CHINESE.json MGSM_ZH.tsv

- train.jsonl: the 7,473 training problems of GSM8K in English, and the 1,000 of MSVAMP in Chinese, shuffled
- heldout.jsonl: the 250 problems of MGSM in Chinese, then rows 251 to 1,319 of GSM8K's test set in English,
  and one more problem

MGSM is a translation of the first 250 test problems of GSM8K, so each of those is used in one language only. MSVAMP is
a translation of SVAMP: neither may examine a model that was trained here. Sources and licences are in README.md.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TRANSLATED = 250
LIBRARY = "图书馆原有 120 本书，上午借出 45 本，下午还回 18 本，又新买了 30 本。现在图书馆里有多少本书？"


def main() -> None:
    train, test, msvamp, mgsm = (Path(given) for given in sys.argv[1:])
    exam = gsm8k(test, "gsm8k-test")
    chinese = mgsm_zh(mgsm)
    if [row["answer"] for row in chinese] != [row["answer"] for row in exam[:TRANSLATED]]:
        sys.exit(f"The answers of {mgsm} are not those of the first {TRANSLATED} rows of {test}.")
    problems = [*gsm8k(train, "gsm8k-train"), *msvamp_zh(msvamp)]
    random.Random(0).shuffle(problems)
    write(HERE / "train.jsonl", problems)
    write(HERE / "heldout.jsonl", [*chinese, *exam[TRANSLATED:], to_row("ours", 1, LIBRARY, "123")])


def gsm8k(path: Path, name: str) -> list[dict[str, str]]:
    """Questions with the number after `####`, without its commas."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").strip().split("\n")]
    return [to_row(name, at, row["question"], row["answer"].partition("####")[2]) for at, row in enumerate(rows, 1)]


def msvamp_zh(path: Path) -> list[dict[str, str]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").strip().split("\n")]
    return [to_row("msvamp-zh", at, row["m_query"], number(row["response"])) for at, row in enumerate(rows, 1)]


def number(text: str) -> str:
    """`"12.0"` as `"12"`."""
    value = float(text)
    return str(int(value)) if value.is_integer() else str(value)


def mgsm_zh(path: Path) -> list[dict[str, str]]:
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").strip().split("\n")]
    return [to_row("mgsm-zh", at, question, answer) for at, (question, answer) in enumerate(lines, 1)]


def to_row(name: str, number: int, question: str, answer: str) -> dict[str, str]:
    """A row of either file; `set` and `problem` say where it is from."""
    return {
        "question": question.strip(),
        "answer": answer.strip().replace(",", ""),
        "set": name,
        "problem": f"{name}-{number}",
    }


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
