"""The README of a trained adapter: what it is, how it came about and how to load it.

Owns the card's text. Invariant: it names the base model and the job's settings, never a path of the machine.
"""

from __future__ import annotations

from collections.abc import Mapping

from grpo_core.spec import JobSpec

_CARD = """\
---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
tags:
- lora
- grpo
- reinforcement-learning
---

# {title}

A LoRA adapter for `{base}`{revision}, trained with GRPO by grpo-jobs.

| | |
|---|---|
| steps | {steps} |
| completions a step | {prompts} prompts × {generations} |
| data | `{dataset}` |
| rewards | mode `{mode}`, weights {weights} |
| mean reward | {start} at the start, {end} at the end (over {window} steps each) |
| LoRA | rank {rank}, alpha {alpha}, dropout {dropout} |
| learning rate | {rate} |
| loss | {loss}, beta {beta} |
| job spec (SHA-256) | `{digest}` |

## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

adapter = "."  # this folder
base = AutoModelForCausalLM.from_pretrained("{base}"{revision_argument})
model = PeftModel.from_pretrained(base, adapter)
tokenizer = AutoTokenizer.from_pretrained(adapter)
```

Ask as in training: {asking}, rendered with the tokenizer's chat template.
{system_prompt}"""


def model_card(spec: JobSpec, *, steps: int, rewards: Mapping[str, float | int | None]) -> str:
    """The card in Markdown, with the front matter the hub reads."""
    revision = spec.model.revision
    weights = spec.rewards.weights.by_name
    return _CARD.format(
        base=spec.model.name,
        title=spec.name or "GRPO adapter",
        revision=f" (revision `{revision}`)" if revision else "",
        revision_argument=f', revision="{revision}"' if revision else "",
        steps=steps,
        prompts=spec.sampling.prompts_per_step,
        generations=spec.sampling.generations,
        dataset=_dataset(spec),
        mode=spec.rewards.mode,
        weights=", ".join(f"{name} {weight:g}" for name, weight in weights.items()),
        start=_number(rewards["start"]),
        end=_number(rewards["end"]),
        window=rewards["steps_averaged"],
        rank=spec.lora.rank,
        alpha=spec.lora.alpha,
        dropout=f"{spec.lora.dropout:g}",
        rate=f"{spec.optimizer.learning_rate:g}",
        loss=spec.loss.type,
        beta=f"{spec.loss.beta:g}",
        digest=spec.digest(),
        asking=_asking(spec),
        system_prompt=f"\n```text\n{spec.data.system_prompt.rstrip()}\n```\n" if spec.data.system_prompt else "",
    )


def _dataset(spec: JobSpec) -> str:
    """The data set's public name; a local file has none."""
    return "a local file" if spec.data.source == "file" else spec.data.dataset


def _asking(spec: JobSpec) -> str:
    system = "the system prompt below, " if spec.data.system_prompt else "no system prompt, "
    examples = f"{len(spec.data.examples)} worked examples, " if spec.data.examples else ""
    return f"{system}{examples}then the question as the user's turn"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"
