"""`grpo serve` and `grpo chat`: start a session that serves a job's adapters, and talk to one.

Owns what is printed while a session starts, and the conversation of one `grpo chat`. Invariant: a session that another
command started is used as it is, and none is ended.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from grpo_client.cli.chat_row import find_row
from grpo_client.cli.output import EXIT_REFUSED, AsJson, CommandError, connected, note, print_json, say, show

if TYPE_CHECKING:
    from collections.abc import Sequence

    from grpo_client.cli.chat_row import ChosenRow
    from grpo_client.client import GrpoClient
    from grpo_client.results import ServedModel, SubmittedJob

POLL_SECONDS = 0.3
RESET = "/reset"
_LASTING = (401, 403, 404, 409)
"""Answers that the next question of a conversation would get too."""

Ttl = Annotated[int | None, Parameter(name="--ttl", help="Seconds after which serving ends; default 900.")]


def serve(
    job: str,
    /,
    *,
    steps: str = "",
    ttl: Ttl = None,
    engine: Literal["auto", "native", "vllm", "transformers"] | None = None,
    no_wait: Annotated[bool, Parameter(negative="")] = False,
    json: AsJson = False,
) -> int:
    """Serve a job's best or last adapter and its base model, and say how to reach them.

    Parameters
    ----------
    job
        The job's id.
    steps
        Checkpoints to serve too, such as 25,50.
    engine
        What computes the answers; without it the service chooses.
    no_wait
        Only start the session.
    """
    with connected() as client:
        session = client.serve(job, steps=_steps_of(steps), ttl_seconds=ttl, engine=engine)
        for warning in session.warnings:
            note(f"warning: {warning.message}")
        models = [] if no_wait else wait_until_served(client, session)
    if json:
        print_json({"session": session.raw, "models": [model.raw for model in models]})
    elif no_wait:
        say(f"{session.id}: {session.status}")
    else:
        _say_how(client.url, session, models)
    return 0


def chat(
    job: str,
    /,
    *,
    step: int | None = None,
    base: Annotated[bool, Parameter(negative="")] = False,
    prompt: str | None = None,
    row: int | None = None,
    held_out: Annotated[bool, Parameter(negative="")] = False,
    system: str | None = None,
    temperature: float = 0.0,
    max_tokens: int | None = None,
    seed: int | None = None,
    ttl: Ttl = None,
    json: AsJson = False,
) -> int:
    """Talk to a job's model. Starts a session where none serves it. In a conversation, /reset begins anew.

    Parameters
    ----------
    job
        The job's id.
    step
        Ask the adapter of this checkpoint instead of the best or last one.
    base
        Ask the base model, without an adapter.
    prompt
        Print the answer to this one question and exit.
    row
        Ask this row of the job's data set, counted from 0, print the answer with the scores of the job's rewards, and
        exit.
    held_out
        The row is one that the job holds out of training.
    system
        A system message in place of the job's own.
    temperature
        0 always takes the likeliest token, as evaluations do.
    max_tokens
        Largest number of tokens of an answer.
    seed
        The same seed gives the same answer.
    """
    if step is not None and base:
        raise CommandError("--step and --base name two different models; give one of them.", EXIT_REFUSED)
    if row is not None and prompt is not None:
        raise CommandError("--row and --prompt are two different questions; give one of them.", EXIT_REFUSED)
    if held_out and row is None:
        raise CommandError("--held-out says where the row is from: add --row N.", EXIT_REFUSED)
    if json and prompt is None and row is None:
        raise CommandError("--json prints one answer: add --prompt TEXT or --row N.", EXIT_REFUSED)
    model = job if step is None and not base else f"{job}:{'base' if base else f'step-{step}'}"
    options = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    given = {name: value for name, value in options.items() if value is not None}
    history = [] if system is None else [{"role": "system", "content": system}]
    with connected() as client:
        chosen = None if row is None else find_row(client, job, row, "held_out" if held_out else "train")
        _ensure_served(client, job, model, step, ttl)
        if chosen is not None:
            return _ask_row(client, model, chosen, system, given, json=json)
        if prompt is None:
            return _converse(client, model, history, given)
        asked = [*history, {"role": "user", "content": prompt}]
        if json:
            print_json(client.chat(model, asked, **given))
        else:
            _answer(client, model, asked, given)
    return 0


def _ensure_served(client: GrpoClient, job: str, model: str, step: int | None, ttl: int | None) -> None:
    if any(one.id == model for one in client.models()):
        return
    note(f"Nothing serves {model} now: starting a session.")
    session = client.serve(job, steps=() if step is None else (step,), ttl_seconds=ttl)
    for warning in session.warnings:
        note(f"warning: {warning.message}")
    wait_until_served(client, session)
    note(f"{session.id} serves it; it ends by itself when nobody asks. End it now: grpo cancel {session.id}")


def wait_until_served(client: GrpoClient, session: SubmittedJob) -> Sequence[ServedModel]:
    """Wait until a session answers, and return its models."""
    from grpo_client.cli.jobs import waits_for  # most conversations begin with a model that is served

    said = ""
    while True:
        models = [model for model in client.models() if model.session == session.id]
        if models:
            return models
        job = client.get(session.id)
        if job.status in ("failed", "cancelled", "succeeded"):
            why = f": {job.error.message} {job.error.hint}" if job.error else ""
            raise CommandError(f"The session has {job.status}{why}", document={"detail": why, "session": session.id})
        now = waits_for(job) or job.phase or job.status
        if now != said:
            said = now
            note(f"{session.id}: {now}")
        time.sleep(POLL_SECONDS)


def _converse(client: GrpoClient, model: str, history: list[dict[str, str]], options: dict[str, Any]) -> int:
    from grpo_client.errors import ProblemError

    begin = list(history)
    while (line := _read_line()) is not None:
        if line.strip() == RESET:
            history = list(begin)
        elif line.strip():
            asked = [*history, {"role": "user", "content": line}]
            try:
                history = [*asked, {"role": "assistant", "content": _answer(client, model, asked, options)}]
            except ProblemError as error:
                if error.status in _LASTING:
                    raise
                note(f"grpo: {error}")
    return 0


def _ask_row(
    client: GrpoClient, model: str, chosen: ChosenRow, system: str | None, options: dict[str, Any], *, json: bool
) -> int:
    asked = chosen.messages(system)
    if json:
        completion = client.chat(model, asked, **options)
        text = completion["choices"][0]["message"]["content"]
        scores = chosen.score(client, text)
        print_json({"row": chosen.row.raw, "completion": completion, "scores": scores.raw})
        return 0
    note(f"row {chosen.row.row}{' (held out)' if chosen.part == 'held_out' else ''}, answer {chosen.row.answer or '-'}")
    say(asked[-1]["content"] + "\n")
    text = _answer(client, model, asked, options)
    for line in chosen.lines(chosen.score(client, text)):
        say(line)
    return 0


def _read_line() -> str | None:
    """The next line of the user; None at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _answer(client: GrpoClient, model: str, messages: list[dict[str, str]], options: dict[str, Any]) -> str:
    """Print an answer as it comes, and return it."""
    parts: list[str] = []
    for chunk in client.stream_chat(model, messages, **options):
        for choice in chunk["choices"]:
            text = choice["delta"].get("content") or ""
            parts.append(text)
            show(text)
    say("")
    return "".join(parts)


def _steps_of(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise CommandError(f"--steps {text!r} is no list of steps, such as 25,50.", EXIT_REFUSED)
    return [int(part) for part in parts]


def _say_how(url: str, session: SubmittedJob, models: Sequence[ServedModel]) -> None:
    name = models[0].id
    for model in models:
        say(model.id)
    say(
        f"""
{session.id} serves them until nobody asks for a while. End it now: grpo cancel {session.id}

curl {url}/v1/chat/completions -H "Authorization: Bearer $GRPO_API_KEY" -H "Content-Type: application/json" \\
  -d '{{"model": "{name}", "messages": [{{"role": "user", "content": "..."}}]}}'

client = openai.OpenAI(base_url="{url}/v1", api_key=os.environ["GRPO_API_KEY"])
client.chat.completions.create(model="{name}", messages=[{{"role": "user", "content": "..."}}])"""
    )
