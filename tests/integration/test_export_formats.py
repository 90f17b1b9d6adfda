"""Merged models and GGUF files of every family: transformers reads them back, and llama.cpp itself runs them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from grpo_core.checkpoints.model_card import CardFacts
from grpo_core.errors import JobFailure
from grpo_core.export.progress import Progress
from grpo_core.hardware.models import ModelFiles
from grpo_core.spec import JobSpec, parse_spec
from grpo_core.spec.sections import ExportSection
from tests.lazy import lazy

torch = lazy("torch")
LoraConfig, PeftModel, get_peft_model = lazy("peft", "LoraConfig PeftModel get_peft_model")
transformers = lazy("transformers")
tokenizers = lazy("tokenizers")
gguf_check = lazy("grpo_core.export.gguf_check")
gguf_file = lazy("grpo_core.export.gguf_file")
gguf_tokenizer = lazy("grpo_core.export.gguf_tokenizer")
merged = lazy("grpo_core.export.merged")
model_folder = lazy("grpo_core.export.model_folder")
comparison = lazy("grpo_core.export.comparison")
export_run = lazy("grpo_core.export.run")
xllamacpp = lazy("xllamacpp")

MODEL = Path("examples/models/tiny-english").resolve()
SPEC: JobSpec = parse_spec(
    {
        "model": {"name": "tiny-english"},
        "lora": {"rank": 4, "alpha": 8},
        "optimizer": {"name": "adamw_torch"},
        "resources": {"gpus": 0},
        "data": {"system_prompt": "Work in <reasoning>, answer in <answer>."},
    }
)
TEXTS = (
    "Tom has 3 apples and buys 14 more. How many now?",
    "I'll say: “it's 12,345.67”  and\n\n\tthen 小明有15个苹果 <answer>7</answer>\r\n   don't",
)
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "smollm", {"tie_word_embeddings": True}),
    "llama 3": ("llama", "llama-bpe", {"rope_parameters": LLAMA3, "attention_bias": True}),
    "linear": ("llama", "gpt-2", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "mistral": ("mistral", "tekken", {"sliding_window": 256}),
    "qwen 2": ("qwen2", "qwen2", {"tie_word_embeddings": True}),
    "qwen 3": ("qwen3", "qwen2", {"head_dim": 32}),
}
"""A family, the way its tokenizer splits text, and settings that are particular to it."""


def split(name: str) -> dict[str, Any]:
    """The part of a tokenizer.json that llama.cpp calls by this name."""
    steps, _ = next(key for key, value in gguf_tokenizer.PRE_TOKENIZERS.items() if value == name)
    forms = {
        "bytes": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "bytes, split as GPT-2": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "single digits": {"type": "Digits", "individual_digits": True},
    }
    patterns = [
        forms.get(step) or {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}
        for step in steps
    ]
    return patterns[0] if len(patterns) == 1 else {"type": "Sequence", "pretokenizers": patterns}


def write_tokenizer(folder: Path, pre: str) -> Any:
    """A byte-level BPE that splits text as `pre` does, with a chat template."""
    parts = json.loads((MODEL / "tokenizer.json").read_text("utf-8"))
    parts |= {"normalizer": None, "pre_tokenizer": split(pre), "padding": None}
    ignores = next(key[1] for key, value in gguf_tokenizer.PRE_TOKENIZERS.items() if value == pre)
    parts["model"]["ignore_merges"] = ignores
    learner = tokenizers.Tokenizer.from_str(json.dumps(parts))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    learner.train_from_iterator(list(TEXTS) * 3, trainer)
    learner.add_tokens([tokenizers.AddedToken("<answer>", normalized=False)])
    template = (MODEL / "chat_template.jinja").read_text("utf-8")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=learner, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_model(folder: Path, name: str) -> ModelFiles:
    """A model of random weights of the family."""
    family, pre, own = FAMILIES[name]
    tokenizer = write_tokenizer(folder, pre)
    torch.manual_seed(7)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **own, **ids, "vocab_size": len(tokenizer) + 5})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias") or "norm" in parameter_name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    model.save_pretrained(folder)
    return ModelFiles(name, None, "folder", folder, 100_000)


def write_adapter(folder: Path, base: Path, *, std: float = 0.05) -> Path:
    """PEFT's two files, as another program would write them."""
    torch.manual_seed(1)
    targets = list(SPEC.lora.target_modules)
    model = get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=std)
    model.save_pretrained(folder)
    return folder


def adapted(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), adapter).eval()


def logprobs(model: Any, ids: list[int]) -> Any:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)


@contextmanager
def llama_cpp(file: Path) -> Iterator[tuple[Any, str]]:
    """llama.cpp's server in this process, and its address."""
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.warmup, params.n_ctx, params.n_parallel, params.verbosity = False, 512, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    yield server, server.listening_address


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelFiles, Path, Path]:
    """A model of the family, an adapter, and the GGUF file of both."""
    folder = tmp_path_factory.mktemp("family")
    files = write_model(folder / "base", request.param)
    adapter = write_adapter(folder / "adapter", files.path)
    file = folder / "model.gguf"
    write_gguf(files.path, adapter, file, "f16")
    return files, adapter, file


def write_gguf(base: Path, adapter: Path, file: Path, kind: str) -> None:
    architecture = export_run.read_architecture(base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    form = gguf_tokenizer.read_tokenizer(tokenizer, architecture.vocabulary)
    weights = merged.MergedWeights(base, adapter)
    gguf_file.write_gguf(weights, architecture, form, file, kind=kind, about={"name": "a test"})
    gguf_check.require_tokenizer(file, form)


def test_transformers_reads_what_was_written(family: tuple[ModelFiles, Path, Path]) -> None:
    files, adapter, file = family
    architecture = export_run.read_architecture(files.path)
    found = gguf_check.load_gguf(file, architecture, export_run.Precision("auto", "fp32", "float32", "")).eval()
    ids = list(range(40, 80))
    expected = logprobs(adapted(files.path, adapter), ids)
    assert (logprobs(found, ids) - expected).abs().mean() < 0.01
    base = transformers.AutoModelForCausalLM.from_pretrained(files.path).eval()
    assert (logprobs(base, ids) - expected).abs().mean() > 0.1


def test_llama_cpp_answers_as_the_adapter_does(family: tuple[ModelFiles, Path, Path]) -> None:
    files, adapter, file = family
    tokenizer = transformers.AutoTokenizer.from_pretrained(files.path)
    prompt, expected = ending_in_text(adapted(files.path, adapter), tokenizer)
    asked = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 20, "ignore_eos": True}
    with llama_cpp(file) as (server, address):
        for text in TEXTS:
            content = {"content": text, "parse_special": True, "add_special": False}
            wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert httpx.post(f"{address}/tokenize", json=content).json()["tokens"] == wanted
        said = server.handle_completions(asked)
    top = said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    assert len(top) == 20
    assert top[0]["id"] == int(expected.argmax())
    assert max(abs(one["logprob"] - float(expected[one["id"]])) for one in top) < 0.1


def ending_in_text(model: Any, tokenizer: Any) -> tuple[list[int], Any]:
    """A prompt and what comes next, which is text: of single bytes llama.cpp tells no probability.

    It is longer than the length from which some embeddings turn more slowly.
    """
    for shift in range(200):
        prompt = [(7 * place + shift) % 250 + 3 for place in range(100)]
        expected = logprobs(model, prompt)[-1]
        following = tokenizer.decode([int(expected.argmax())])
        if following.isascii() and following.isprintable() and "<" not in following:
            return prompt, expected
    raise AssertionError("the model says no text")


class Exporting:
    """The demo's model with an adapter, and what is exported of it."""

    def __init__(self, folder: Path) -> None:
        self.files = ModelFiles("tiny-english", None, "folder", MODEL, 500_000)
        self.adapter = write_adapter(folder / "adapter", MODEL, std=0.05)
        self.out = folder / "export"

    def __call__(self, progress: Progress | None = None, **asked: Any) -> Any:
        source = export_run.Source(adapter=self.adapter, spec=SPEC, facts=CardFacts(steps=3))
        return export_run.export(ExportSection(**asked), source, self.files, self.out, progress)


@pytest.fixture
def exporting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Exporting:
    monkeypatch.setattr("grpo_core.export.comparison.ANSWER_TOKENS", 24)
    return Exporting(tmp_path)


def test_a_merged_model_is_whole_and_tells_how_the_check_went(exporting: Exporting) -> None:
    exported = exporting(format="merged")
    assert exported.type == "bf16"
    assert 0 < exported.comparison.mean < exported.comparison.bound < exported.comparison.adapter_effect
    assert exported.kept == pytest.approx(1, abs=0.01)
    assert exported.warning is None
    names = {file.name for file in exporting.out.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "README.md"} <= names
    card = (exporting.out / "README.md").read_text("utf-8")
    assert "library_name: transformers" in card
    assert "licence unknown: see the base model" in card
    assert json.loads((exporting.out / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_export_says_how_far_it_is(exporting: Exporting, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("grpo_core.export.progress.EVERY_SECONDS", 0.0)
    exporting(Progress(said.append), format="gguf", type="q8_0")
    shares = [int(line.partition("%")[0]) for line in said if "% of the weights" in line]
    assert shares == sorted(shares)
    assert shares[-1] == 100
    assert "PARAMETER repeat_penalty 1.0" in (exporting.out / "Modelfile").read_text().splitlines()
    stages = [line for line in said if "% of the weights" not in line]
    assert [line.partition(" ")[0] for line in stages] == ["Writing", "Written;", "Reading", "Asking"]


def test_progress_is_told_now_and_then() -> None:
    said: list[str] = []
    now = iter([0.0, 0.0, 3.0, 11.0, 11.0, 12.0, 25.0, 25.0])
    progress = Progress(said.append, lambda: next(now))
    progress.writing("Writing", 100)
    for _ in range(4):
        progress.wrote(25)
    assert said == ["Writing", "50% of the weights are written", "100% of the weights are written"]


def test_a_full_disk_is_found_before_the_work(exporting: Exporting, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(exporting.out.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000_000))
    with pytest.raises(JobFailure, match=r"takes 0\.0 GB, and the worker's scratch disk has 0\.1 GB left") as failure:
        exporting(format="merged")
    assert failure.value.report.code == "disk_full"
    assert not exporting.out.exists()


def test_shards_have_an_index(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", MODEL)
    out = tmp_path / "out"
    out.mkdir()
    weights = merged.MergedWeights(MODEL, adapter)
    model_folder.write_model_folder(weights, MODEL, out, dtype=torch.float32, shard_bytes=700_000)
    assert len([*out.glob("model-*.safetensors")]) > 2
    ids = list(range(40, 60))
    found = logprobs(transformers.AutoModelForCausalLM.from_pretrained(out).eval(), ids)
    assert (found - logprobs(adapted(MODEL, adapter), ids)).abs().max() < 1e-4


@pytest.mark.parametrize("form", ["merged", "gguf"])
def test_a_model_without_its_adapter_is_refused(
    exporting: Exporting, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grpo_core.export.merged.MergedWeights._merge", lambda _self, _module, weight: weight)
    with pytest.raises(JobFailure, match="Nothing was published") as failure:
        exporting(format=form)
    assert failure.value.report.code == "export_differs"
    assert not exporting.out.exists()


def test_an_update_that_rounding_loses_is_worth_a_warning(exporting: Exporting) -> None:
    kept = merged.Kept()
    base = torch.linspace(1, 2, 1000).bfloat16().float()
    exact = base + 1e-5
    kept.add(base, exact, exact.bfloat16().float())
    assert kept.share == 0
    exported = exporting(format="merged")
    assert "Use the adapter on its base" in replace(exported, kept=kept.share).warning


def test_a_base_that_the_adapter_does_not_fit_is_refused(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", MODEL)
    other = write_model(tmp_path / "other", "llama").path
    with pytest.raises(JobFailure, match=r"has no model\.layers\.2"):
        merged.MergedWeights(other, adapter)


def spoiled(**changes: Any) -> Callable[[], dict[str, Any]]:
    def parts() -> dict[str, Any]:
        found = json.loads((MODEL / "tokenizer.json").read_text("utf-8"))
        model = {**found["model"], **changes.pop("model", {})}
        return {**found, **changes, "model": model}

    return parts


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        (spoiled(pre_tokenizer={"type": "Whitespace"}), "none that llama.cpp is known to have"),
        (spoiled(pre_tokenizer=None), "does not split text"),
        (spoiled(normalizer={"type": "Lowercase"}), "has the normalizer Lowercase"),
        (spoiled(model={"byte_fallback": True}), "SentencePiece"),
        (spoiled(model={"type": "Unigram"}), "it is Unigram"),
        (spoiled(model={"ignore_merges": True}), "none that llama.cpp is known to have"),
    ],
)
def test_a_tokenizer_that_llama_cpp_reads_otherwise_is_refused(parts: Callable[[], dict[str, Any]], why: str) -> None:
    with pytest.raises(JobFailure, match=why) as failure:
        gguf_tokenizer.pre_tokenizer_of(parts())
    assert failure.value.report.code == "export_not_possible"
