"""What a user would run instead of this service: a GRPO script with Unsloth, or with TRL (and vLLM).

    python benchmarks/baseline.py unsloth|trl MODEL [--prompts 1 --generations 6 ...]

Uses the settings of the published recipe and, on a GPU, nothing from this repository but a file of word problems.
Prints one line, `RESULT {...}`, with the median step in seconds, completions per second and mean completion length.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from pathlib import Path
from typing import Any

PROBLEMS = Path(__file__).resolve().parents[1] / "examples" / "smollm2" / "train.jsonl"
SYSTEM = "Answer in this form:\n<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>\n"
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WARM_UP = 3
"""First steps, in which kernels are compiled; left out of the medians."""


def answer_of(text: str) -> str:
    """The text between the answer tags."""
    return text.rpartition("<answer>")[2].partition("</answer>")[0].strip()


def correctness(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """2 for the right answer."""
    return [2.0 * (answer_of(text_of(one)) == right) for one, right in zip(completions, answer, strict=True)]


def form(completions: list[Any], **_: Any) -> list[float]:
    """0.5 for the requested format."""
    pattern = re.compile(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>", re.DOTALL)
    return [0.5 * bool(pattern.match(text_of(one))) for one in completions]


def text_of(completion: Any) -> str:
    """A completion's text, from a chat message or as it is."""
    return completion if isinstance(completion, str) else completion[0]["content"]


def main() -> None:
    """Train for some steps and print how fast they were."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("library", choices=("unsloth", "trl"))
    parser.add_argument("model", help="hub name or folder")
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--generations", type=int, default=6)
    parser.add_argument("--parts", type=int, default=1, help="gradient accumulation")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--completion", type=int, default=200, help="tokens")
    parser.add_argument("--beta", type=float, default=0.04, help="weight of the KL term")
    parser.add_argument("--bits", type=int, choices=(4, 16), default=16)
    parser.add_argument("--vllm", action="store_true", help="trl: generate with vLLM in the same process")
    parser.add_argument("--memory", type=float, default=0.5, help="vLLM's share of the GPU's memory")
    train(parser.parse_args())


def train(options: argparse.Namespace) -> None:
    """Build the trainer, run it and print the result."""
    model, tokenizer, adapter = (unsloth_model if options.library == "unsloth" else trl_model)(options)
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    on_gpu = torch.cuda.is_available()
    if not on_gpu:  # TRL scores tokens with a Triton kernel; this stands in for it in a rehearsal
        from grpo_core.engines.logprobs import install

        install()
    rows = [json.loads(line) for line in PROBLEMS.read_text(encoding="utf-8").splitlines()]
    chats = [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["question"]}] for row in rows]
    data = Dataset.from_dict({"prompt": chats, "answer": [str(row["answer"]) for row in rows]})
    size = options.prompts * options.generations
    config = GRPOConfig(
        output_dir="runs/baseline",
        max_steps=options.steps,
        per_device_train_batch_size=size // options.parts,
        gradient_accumulation_steps=options.parts,
        num_generations=options.generations,
        max_completion_length=options.completion,
        temperature=0.9,
        beta=options.beta,
        learning_rate=5e-6,
        adam_beta2=0.99,
        weight_decay=0.1,
        max_grad_norm=0.1,
        warmup_steps=1,
        lr_scheduler_type="cosine",
        optim="paged_adamw_8bit" if on_gpu else "adamw_torch",
        bf16=on_gpu,
        use_cpu=not on_gpu,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        **vllm_settings(options),
    )
    ends: list[float] = []
    lengths: list[float] = []

    class Clock(TrainerCallback):
        """Notes when each step ended and how long its completions were."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

        def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
            lengths.extend(logs[name] for name in ("completions/mean_length",) if logs and name in logs)

    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=[correctness, form],
        args=config,
        train_dataset=data,
        callbacks=[Clock()],
        peft_config=adapter,
    )
    began = time.perf_counter()
    trainer.train()
    steps = [end - start for start, end in zip([began, *ends], ends, strict=False)]
    median = statistics.median(steps[WARM_UP:] or steps)
    tokens = round(statistics.mean(lengths[WARM_UP:] or lengths), 1)
    result = {"step_s": round(median, 3), "completions_per_s": round(size / median, 2), "tokens": tokens}
    print("RESULT", json.dumps(result), flush=True)


def unsloth_model(options: argparse.Namespace) -> tuple[Any, Any, None]:
    """Model, tokenizer and adapter by Unsloth, with vLLM in the same process."""
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=options.model,
        max_seq_length=1024,
        load_in_4bit=options.bits == 4,
        fast_inference=True,
        max_lora_rank=32,
        gpu_memory_utilization=options.memory,
    )
    model = FastLanguageModel.get_peft_model(
        model, r=32, lora_alpha=32, target_modules=MODULES, use_gradient_checkpointing="unsloth", random_state=3407
    )
    return model, tokenizer, None


def trl_model(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Model and tokenizer by transformers, the adapter's settings for PEFT."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kind = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=kind)
    if torch.cuda.is_available():
        model = model.to("cuda")
    adapter = LoraConfig(r=32, lora_alpha=32, target_modules=MODULES, task_type="CAUSAL_LM")
    return model, AutoTokenizer.from_pretrained(options.model), adapter


def vllm_settings(options: argparse.Namespace) -> dict[str, Any]:
    """How TRL is to generate."""
    if options.library == "unsloth" or not options.vllm:
        return {}
    return {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": options.memory}


if __name__ == "__main__":
    main()
