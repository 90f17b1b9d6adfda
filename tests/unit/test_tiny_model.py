"""The committed tiny model and its data are what the demo needs, and the script that makes them still works.

Owns no claim about how well the model answers: that costs a minute and is the demo's own gate. Everything is
checked through stock `transformers` classes, as a user of the folder would load it.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

from grpo_core.row_warnings import warnings_of_lines
from grpo_core.spec import parse_spec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MODEL = EXAMPLES / "models" / "tiny-arithmetic"
DATA = EXAMPLES / "tiny"
LANGUAGES = {"chinese": ("tiny", "tiny-arithmetic"), "english": ("english", "tiny-english")}
TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")


@pytest.fixture(scope="module")
def make_model() -> ModuleType:
    spec = importlib.util.spec_from_file_location("examples_tiny_make_model", DATA / "make_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(MODEL)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


def load_model(folder: Path) -> PreTrainedModel:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def rows(language: str, name: str) -> list[dict[str, str]]:
    path = EXAMPLES / LANGUAGES[language][0] / name
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sum_in(question: str) -> tuple[int, ...]:
    """The numbers of a question in their order; with the answer they tell which sum it is."""
    return tuple(int(part) for part in "".join(c if c.isdecimal() else " " for c in question).split())


@pytest.mark.parametrize("name", ["tiny-arithmetic", "tiny-english"])
def test_committed_weights_are_small_and_load(name: str) -> None:
    folder = EXAMPLES / "models" / name
    model = load_model(folder)
    assert (folder / "model.safetensors").stat().st_size <= 4_000_000
    assert 500_000 <= model.num_parameters() <= 2_000_000
    assert model.config.model_type == "qwen2"
    assert {str(parameter.dtype) for parameter in model.parameters()} == {"torch.float32"}


def test_model_and_tokenizer_agree_on_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    model = load_model(MODEL)
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side) == ("<|im_end|>", "<|endoftext|>", "left")


@pytest.mark.parametrize(
    "text",
    [
        "小明有7个苹果，又买了5个，现在有几个？",
        "罕见字：龘䶮😀 and Latin, tabs\tand  spaces",
        "一行\n两行\n\n四行\r\n",
        "<reasoning>\n7+5=12\n</reasoning>\n<answer>\n12\n</answer>",
    ],
)
def test_tokenizer_round_trips(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text).input_ids
    # The trainer decodes without special tokens, so the tags must survive that too.
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_each_tag_is_one_token(tokenizer: PreTrainedTokenizerBase) -> None:
    assert [len(tokenizer(tag).input_ids) for tag in TAGS] == [1, 1, 1, 1]
    assert not set(TAGS) & set(tokenizer.all_special_tokens)


def test_chat_template_adds_no_system_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    turn = {"role": "user", "content": "7加5？"}
    asked = "<|im_start|>user\n7加5？<|im_end|>\n"
    assert tokenizer.apply_chat_template([turn], tokenize=False) == asked
    prompt = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    assert prompt == asked + "<|im_start|>assistant\n"


@pytest.mark.parametrize("language", LANGUAGES)
def test_training_prompts_are_the_chat_template_with_the_job_s_system_prompt(
    tokenizer: PreTrainedTokenizerBase, make_model: ModuleType, language: str
) -> None:
    job = json.loads((EXAMPLES / LANGUAGES[language][0] / "job.json").read_text())
    system = job["data"]["system_prompt"]
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": "7加5？"})
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert make_model.LANGUAGES[language].system_prompt == system
    assert make_model.prompt_of("7加5？", system) == prompt


def test_the_english_job_has_no_warning_about_its_rows() -> None:
    folder = EXAMPLES / LANGUAGES["english"][0]
    spec = parse_spec(json.loads((folder / "job.json").read_text()))
    assert warnings_of_lines(spec, (folder / "train.jsonl").read_bytes()) == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_heldout_is_disjoint_from_train(language: str) -> None:
    train, heldout = rows(language, "train.jsonl"), rows(language, "heldout.jsonl")
    assert len(heldout) == 200
    assert len(train) >= 2000
    questions = [row["question"] for row in train + heldout]
    assert len(questions) == len(set(questions))
    seen = {(sum_in(row["question"]), row["answer"]) for row in train}
    assert not seen & {(sum_in(row["question"]), row["answer"]) for row in heldout}


@pytest.mark.parametrize("language", LANGUAGES)
def test_answers_are_right_and_text(language: str) -> None:
    for row in rows(language, "train.jsonl") + rows(language, "heldout.jsonl"):
        a, b = sum_in(row["question"])
        assert row.keys() == {"question", "answer"}
        assert row["answer"] in (str(a + b), str(a - b))


@pytest.mark.parametrize("language", LANGUAGES)
def test_script_remakes_the_committed_data(make_model: ModuleType, tmp_path: Path, language: str) -> None:
    make_model.main([language, "--out", str(tmp_path), "--data-only"])
    folder = LANGUAGES[language][0]
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / folder / name).read_bytes() == (EXAMPLES / folder / name).read_bytes()
    assert not (tmp_path / "models").exists()


def test_script_makes_a_loadable_model(make_model: ModuleType, tmp_path: Path) -> None:
    committed = load_model(MODEL)
    make_model.main(["chinese", "--out", str(tmp_path), "--steps", "3"])
    folder = tmp_path / "models" / "tiny-arithmetic"
    made = load_model(folder)
    assert {name: value.shape for name, value in made.state_dict().items()} == {
        name: value.shape for name, value in committed.state_dict().items()
    }
    text = "7+5=12，答案是12。<answer>"
    assert load_tokenizer(folder)(text).input_ids == load_tokenizer(MODEL)(text).input_ids
