"""The README of a trained model: what it is, how it came about, what it learnt and how to load it.

Owns the card's text, of the adapter and of its exports. Invariant: it names the base model and the job's settings,
never a path of the machine, and nothing that is not known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from grpo_core.checkpoints.licence import Licence
from grpo_core.spec import JobSpec

Form = Literal["adapter", "merged", "gguf"]

UNKNOWN_LICENCE: Final = "unknown: see the base model"
_LIBRARY: Final[Mapping[Form, str | None]] = {"adapter": "peft", "merged": "transformers", "gguf": None}
_RELATION: Final[Mapping[Form, str]] = {"adapter": "adapter", "merged": "finetune", "gguf": "quantized"}
_MEASURES: Final[Mapping[str, str]] = {
    "strict": "correct, in the required format",
    "lenient": "correct, in any format",
    "format": "in the required format",
}
"""The pairs of an evaluation's report."""
_WHAT: Final[Mapping[Form, str]] = {
    "adapter": "A LoRA adapter for",
    "merged": "The whole model, with a LoRA adapter merged into",
    "gguf": "The whole model in GGUF, with a LoRA adapter merged into",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """What is known of the model, besides the job's spec."""

    steps: int | None
    """Optimizer steps behind these weights; None where they are unknown."""
    rewards: Mapping[str, float | int | None] | None = None
    """Mean rewards of the first and last steps."""
    evaluation: Mapping[str, Any] | None = None
    """The report's `evaluation`. It is of the weights at the end of training."""
    licence: Licence | None = None
    """The base model's, as its own card says."""
    is_public: bool = True
    """Whether the base model's name leads others to it; else it is a folder that only the service knows."""
    form: Form = "adapter"
    file: str = ""
    """Of a GGUF file: its name."""
    comparison: Mapping[str, Any] | None = None
    """Of an export: how far its answers are from the adapter's."""


_ANSWER: Final = """
chat = [{"role": "user", "content": "..."}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**prompt, max_new_tokens=256, do_sample=False, repetition_penalty=1.0)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))"""
"""Greedy, as evaluations are: the settings of the base may have a temperature and a repetition penalty."""
_OWN_SAMPLING: Final = " --generation-config vllm"
_GREEDY: Final = (
    "Evaluations take the likeliest token each time, without the sampling settings that the base model may have in "
    "`generation_config.json`."
)


def model_card(spec: JobSpec, facts: CardFacts) -> str:
    """The card in Markdown, with the front matter the hub reads."""
    sections = [
        _front_matter(spec, facts),
        f"# {spec.name or 'GRPO adapter'}",
        f"{_WHAT[facts.form]} `{spec.model.name}`{_revision(spec)}, trained with GRPO by grpo-jobs.",
        _table(_settings(spec, facts)),
        _results(facts),
        _comparison(facts),
        f"## Use\n\n{_use(spec, facts)}",
        f"Ask as in training: {_asking(spec)}, rendered with the tokenizer's chat template. {_GREEDY}",
        f"```text\n{spec.data.system_prompt.rstrip()}\n```" if spec.data.system_prompt else "",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(spec: JobSpec, facts: CardFacts) -> str:
    library = _LIBRARY[facts.form]
    tags = [*(["gguf"] if facts.form == "gguf" else []), "lora", "grpo", "reinforcement-learning"]
    lines = [
        # A hub takes the name for that of a repository.
        *([f"base_model: {spec.model.name}"] if facts.is_public else []),
        *([f"base_model_relation: {_RELATION[facts.form]}"] if facts.is_public else []),
        *(facts.licence.front_matter if facts.licence else []),
        *([f"library_name: {library}"] if library else []),
        *([f"datasets:\n- {spec.data.dataset}"] if spec.data.source == "hub" else []),
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {tag}" for tag in tags),
    ]
    return "---\n" + "\n".join(lines) + "\n---"


def _settings(spec: JobSpec, facts: CardFacts) -> list[tuple[str, str]]:
    return [
        ("base model", f"`{spec.model.name}`{_revision(spec)}{_folder(facts)}, licence {_licence(facts)}"),
        ("steps", "unknown" if facts.steps is None else str(facts.steps)),
        ("completions a step", f"{spec.sampling.prompts_per_step} prompts × {spec.sampling.generations}"),
        ("data", _dataset(spec)),
        ("rewards", _rewards(spec)),
        *([("mean reward", _rise(facts.rewards))] if facts.rewards else []),
        ("LoRA", f"rank {spec.lora.rank}, alpha {spec.lora.alpha}, dropout {spec.lora.dropout:g}"),
        ("learning rate", f"{spec.optimizer.learning_rate:g}"),
        ("loss", f"{spec.loss.type}, beta {spec.loss.beta:g}"),
        ("job spec (SHA-256)", f"`{spec.digest()}`"),
    ]


def _rise(rewards: Mapping[str, float | int | None]) -> str:
    start, end, steps = _number(rewards["start"]), _number(rewards["end"]), rewards["steps_averaged"]
    return f"{start} at the start, {end} at the end (over {steps} step{'' if steps == 1 else 's'} each)"


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _results(facts: CardFacts) -> str:
    """What the job's evaluation found, before and after, with its intervals."""
    found = facts.evaluation
    if not found:
        return "## Results\n\nThis job did not ask held-out questions."
    paired: Mapping[str, Mapping[str, Any]] = found.get("paired", {})
    # Own graders decide what is right; the recipe's measures say nothing about such a job.
    shown = {name: one for name, one in paired.items() if name == "metric" or "metric" not in paired}
    rows = [
        f"| {_measure(name, found)} | {one['before']:.3g} | {one['after']:.3g} | {one['difference']:+.3g} "
        f"({one['interval'][0]:+.3g} to {one['interval'][1]:+.3g}) | {one['p_value']:.2g} |"
        for name, one in shown.items()
    ]
    head = ["| measure | before | after | difference (95 % interval) | p |", "|---|---|---|---|---|"]
    asked = (
        f"{found['questions']} questions that were not trained on ({found['held_out']}), asked at the end of training."
    )
    return "## Results\n\n" + "\n".join([*head, *rows]) + f"\n\n{asked}"


def _measure(name: str, evaluation: Mapping[str, Any]) -> str:
    """A measure in words; an own reward, or the total, by its name."""
    return f"mean of {evaluation['metric']}" if name == "metric" else _MEASURES.get(name, name)


def _comparison(facts: CardFacts) -> str:
    found = facts.comparison
    if not found:
        return ""
    return (
        f"Checked when it was exported: on {found['questions']} questions, its log-probabilities of the adapter's "
        f"answers are {found['mean']:.2g} apart from the adapter's on average, where the adapter itself changes "
        f"{found['adapter_effect']:.2g}; {found['same_answers']} greedy answers are the same."
    )


def _use(spec: JobSpec, facts: CardFacts) -> str:
    return {"adapter": _use_adapter, "merged": _use_merged, "gguf": _use_gguf}[facts.form](spec, facts)


def _use_adapter(spec: JobSpec, facts: CardFacts) -> str:
    base, revision = spec.model.name, spec.model.revision
    where = "" if facts.is_public else "  # the path of that folder"
    of_revision = f', revision="{revision}"' if revision else ""
    return f"""\
With transformers and PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

adapter = "."  # this folder
base = AutoModelForCausalLM.from_pretrained("{base}"{of_revision}){where}
model = PeftModel.from_pretrained(base, adapter)
tokenizer = AutoTokenizer.from_pretrained(adapter)
{_ANSWER}
```

With vLLM, where the model is called `adapter`:

```sh
vllm serve {base}{f" --revision {revision}" if revision else ""} --enable-lora --max-lora-rank {_served_rank(spec)} \
--lora-modules adapter=.{_OWN_SAMPLING}
```

For llama.cpp and Ollama, export it as GGUF first."""


def _use_merged(_spec: JobSpec, _facts: CardFacts) -> str:
    return f"""\
With transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")  # this folder
tokenizer = AutoTokenizer.from_pretrained(".")
{_ANSWER}
```

With vLLM:

```sh
vllm serve .{_OWN_SAMPLING}
```"""


def _use_gguf(_spec: JobSpec, facts: CardFacts) -> str:
    return f"""\
With llama.cpp:

```sh
llama-server --model {facts.file} --jinja
```

With Ollama, by the `Modelfile` in this folder:

```sh
ollama create grpo-model --file Modelfile
ollama run grpo-model
```"""


def _served_rank(spec: JobSpec) -> int:
    """The smallest limit of vLLM's that this adapter fits into."""
    return next((limit for limit in (8, 16, 32, 64, 128, 256) if spec.lora.rank <= limit), spec.lora.rank)


def _revision(spec: JobSpec) -> str:
    return f" (revision `{spec.model.revision}`)" if spec.model.revision else ""


def _folder(facts: CardFacts) -> str:
    return "" if facts.is_public else ", a folder of models of the service that trained it"


def _licence(facts: CardFacts) -> str:
    if facts.licence is None:
        return UNKNOWN_LICENCE
    return f"[{facts.licence.name}]({facts.licence.link})" if facts.licence.link else facts.licence.name


def _dataset(spec: JobSpec) -> str:
    """The data set's public name, with where its licence is; a local file has no name."""
    match spec.data.source:
        case "file":
            return "a local file, licence unknown"
        case "hub":
            return f"`{spec.data.dataset}`, licence: see its page on the hub"
        case _:
            return f"`{spec.data.dataset}`, an upload, licence unknown"


def _rewards(spec: JobSpec) -> str:
    """The recipe's rewards by their weights, and own graders by name and type."""
    counted = spec.rewards.weights.by_name.items()
    weights = ", ".join(f"{name} {weight:g}" for name, weight in counted if weight or not spec.rewards.graders)
    graders = ", ".join(f"{name} ({grader.type})" for name, grader in spec.rewards.graders.items())
    said = [f"mode `{spec.rewards.mode}`", f"weights {weights}", f"graders {graders}" if graders else ""]
    formula = f"formula `{json.dumps(spec.rewards.formula)[1:-1]}`" if spec.rewards.formula else ""
    return ", ".join(part for part in (*said, formula) if part).replace("|", "\\|").replace("\n", " ")


def _asking(spec: JobSpec) -> str:
    system = "the system prompt below, " if spec.data.system_prompt else "no system prompt, "
    examples = f"{len(spec.data.examples)} worked examples, " if spec.data.examples else ""
    return f"{system}{examples}then the question as the user's turn"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"
