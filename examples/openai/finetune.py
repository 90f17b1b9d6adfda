"""Fine-tune a model with OpenAI's package, as with OpenAI; only the address and the key are this service's.

    pip install openai
    export OPENAI_BASE_URL="$GRPO_URL/v1" OPENAI_API_KEY="$GRPO_API_KEY"
    python examples/openai/finetune.py

Trains the tiny English model that comes with this project, which a CPU does in minutes. For your own model change
`MODEL`, the files and the grader, and leave `SETTINGS` out.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from openai import OpenAI

HERE = Path(__file__).parent
MODEL = os.environ.get("MODEL", "tiny-english")
POLL_SECONDS = float(os.environ.get("POLL_SECONDS", "5"))
GRADER = {
    "type": "string_check",
    "name": "right",
    "input": "{{sample.output_text}}",
    "reference": "<answer>\n{{item.answer}}\n</answer>",
    "operation": "like",
}
SETTINGS = {
    "model": {"max_sequence": 256},
    "lora": {"rank": 16, "alpha": 16, "gradient_checkpointing": "off"},
    "optimizer": {"weight_decay": 0.0, "schedule": "constant", "max_grad_norm": 1.0},
    "training": {"checkpoint_every": 25, "save_steps": 25},
    "sampling": {"max_prompt_tokens": 128, "max_completion_tokens": 48, "temperature": 1.0},
    "loss": {"type": "dapo", "beta": 0.0},
    "evaluation": {"max_completion_tokens": 48},
}
"""What OpenAI has no field for: sections of a job spec."""


def main() -> None:
    """Upload, train, follow, and say what came out."""
    client = OpenAI()
    training = client.files.create(file=HERE / "train.jsonl", purpose="fine-tune")
    validation = client.files.create(file=HERE / "valid.jsonl", purpose="fine-tune")
    client.files.wait_for_processing(training.id)
    job = client.fine_tuning.jobs.create(
        model=MODEL,
        training_file=training.id,
        validation_file=validation.id,
        suffix="sums",
        seed=7,
        method={
            "type": "reinforcement",
            "reinforcement": {
                "grader": GRADER,
                "hyperparameters": {
                    "batch_size": 8,
                    "n_epochs": 1,
                    "compute_multiplier": 1.3,
                    "learning_rate_multiplier": 400,
                    "eval_interval": 25,
                    "eval_samples": 32,
                },
            },
        },
        extra_body={"grpo": SETTINGS},
    )
    print(f"{job.id}: {job.status}")

    seen: set[str] = set()
    while True:
        job = client.fine_tuning.jobs.retrieve(job.id)
        for event in reversed(list(client.fine_tuning.jobs.list_events(job.id, limit=100))):
            if event.id not in seen:
                seen.add(event.id)
                print(f"  {event.level:5} {event.message}")
        if job.status in ("succeeded", "failed", "cancelled"):
            break
        time.sleep(POLL_SECONDS)

    if job.error and job.error.message:
        raise SystemExit(f"{job.id} failed: {job.error.message}")
    for checkpoint in client.fine_tuning.jobs.checkpoints.list(job.id):
        print(f"{checkpoint.fine_tuned_model_checkpoint}: {checkpoint.metrics.to_dict()}")
    for name in job.result_files:
        table = client.files.content(name).read().decode()
        print(f"{name}: {len(table.splitlines()) - 1} steps, columns {table.splitlines()[0][:60]}...")
    print(f"{job.status}: {job.fine_tuned_model}")


if __name__ == "__main__":
    main()
