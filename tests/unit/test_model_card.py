"""A model's card: what it says of the base, its licence, the rewards and the results, in words that a hub takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_core.checkpoints.licence import Licence, licence_in
from grpo_core.checkpoints.model_card import CardFacts, model_card
from grpo_core.spec import parse_spec

LENGTH = {"type": "length", "minimum": 10, "maximum": 60}


def card(facts: CardFacts | None = None, **sections: Any) -> str:
    spec = parse_spec({"model": {"name": "Qwen/Qwen2.5-3B-Instruct"}, **sections})
    return model_card(spec, facts or CardFacts(steps=6))


def head(text: str) -> dict[str, Any]:
    """The fields that a hub reads."""
    return yaml.safe_load(text.split("---")[1])


def paired(before: float, after: float) -> dict[str, Any]:
    return {"before": before, "after": after, "difference": after - before, "interval": [0, 1], "p_value": 0.01}


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ("license: apache-2.0", Licence("apache-2.0")),
        ("license: other\nlicense_name: qwen-research", Licence("qwen-research", is_listed=False)),
        (
            "license: other\nlicense_name: qwen\nlicense_link: https://huggingface.co/Qwen/x/blob/main/LICENSE",
            Licence("qwen", is_listed=False, link="https://huggingface.co/Qwen/x/blob/main/LICENSE"),
        ),
        ("license: other\nlicense_name: qwen\nlicense_link: LICENSE", Licence("qwen", is_listed=False)),
        ("license: other", None),
        ("license: 'mit\n  tags: x'", None),
        ("license: [mit]", None),
        ("tags: []", None),
    ],
)
def test_a_licence_is_what_the_base_names(tmp_path: Path, named: str, found: Licence | None) -> None:
    (tmp_path / "README.md").write_text(f"---\n{named}\n---\n\n# Model\n")
    assert licence_in(tmp_path) == found


def test_without_a_card_there_is_no_licence(tmp_path: Path) -> None:
    assert licence_in(tmp_path) is None
    assert "licence unknown: see the base model" in card()


def test_a_licence_that_a_hub_does_not_list_is_named_as_it_wants() -> None:
    licence = Licence("qwen-research", is_listed=False, link="https://huggingface.co/Qwen/x/blob/main/LICENSE")
    text = card(CardFacts(steps=6, licence=licence))
    fields = head(text)
    assert (fields["license"], fields["license_name"], fields["license_link"]) == ("other", licence.name, licence.link)
    assert f"licence [{licence.name}]({licence.link})" in text
    assert head(card(CardFacts(steps=6, licence=Licence("apache-2.0"))))["license"] == "apache-2.0"


def test_a_base_that_others_cannot_find_is_no_repository() -> None:
    public, local = card(), card(CardFacts(steps=6, is_public=False), model={"name": "our-model"})
    assert head(public)["base_model"] == "Qwen/Qwen2.5-3B-Instruct"
    assert "base_model" not in head(local)
    assert "`our-model`, a folder of models of the service that trained it" in local
    assert 'from_pretrained("our-model")  # the path of that folder' in local


def test_results_are_those_of_what_was_rewarded() -> None:
    evaluation = {"questions": 8, "held_out": "last rows", "metric": "total"}
    recipe = {"strict": paired(0.1, 0.5), "lenient": paired(0.2, 0.6), "format": paired(0.3, 0.7)}
    own = card(
        CardFacts(steps=6, evaluation={**evaluation, "paired": {"metric": paired(0.004, 0.625), **recipe}}),
        rewards={"graders": {"short": LENGTH}},
    )
    assert "| mean of total | 0.004 | 0.625 | +0.621" in own
    assert "required format" not in own
    assert "weights short 1, graders short (length)" in own
    plain = card(CardFacts(steps=6, evaluation={**evaluation, "paired": recipe}))
    for measure in ("correct, in the required format", "correct, in any format", "in the required format"):
        assert f"| {measure} | 0." in plain


def test_one_step_is_one_step() -> None:
    rewards = {"start": 0.84, "end": 0.76, "steps_averaged": 1}
    assert "(over 1 step each)" in card(CardFacts(steps=6, rewards=rewards))
    assert "(over 3 steps each)" in card(CardFacts(steps=6, rewards={**rewards, "steps_averaged": 3}))


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_what_the_card_tells_to_do_leaves_the_bases_sampling_out(form: Any) -> None:
    text = card(CardFacts(steps=6, form=form))
    assert "do_sample=False, repetition_penalty=1.0" in text
    assert "--generation-config vllm\n```" in text
    code = next(block for block in text.split("```") if block.startswith("python"))
    compile(code.removeprefix("python"), "<card>", "exec")
