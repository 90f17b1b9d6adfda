"""`grpo up` and `grpo down`: the whole service on this machine."""

from __future__ import annotations

import os
import webbrowser
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from api.cli.errors import needs_extra
from grpo_client.cli.output import EXIT_REFUSED, AsJson, CommandError, connected, note, print_json, say

DATA = Path(".grpo")
MOST_STEPS = 8
"""Steps that one session serves."""


def up(
    *,
    data: Path = DATA,
    port: Annotated[int | None, Parameter(name=("--port", "--api-port"))] = None,
    valkey_port: int | None = None,
    s3_port: int | None = None,
    worker: bool = True,
    model_dir: Path | None = None,
    talk: str | None = None,
    open_page: Annotated[bool, Parameter(name="--open", negative="")] = False,
    json: AsJson = False,
) -> None:
    """Start Valkey, SeaweedFS, the API and a worker in the background; returns when they answer.

    Parameters
    ----------
    data
        Folder for all data of the stack; the next `grpo up` uses it again.
    port
        The API's port; 8080 by default.
    valkey_port
        Valkey's port.
    s3_port
        SeaweedFS's port.
    worker
        Whether to start a worker.
    model_dir
        Folder of models that the worker searches before the hub.
    talk
        A job whose model to serve; returns when it answers.
    open_page
        Open the page in the browser.
    """
    if talk and not worker:
        raise CommandError("--talk needs the worker: leave out --no-worker.", EXIT_REFUSED)
    with _stack_errors():
        from deploy.local import stack

        state = stack.up(
            data,
            api_port=port,
            valkey_port=valkey_port,
            s3_port=s3_port,
            worker=worker,
            model_dir=model_dir,
            on_progress=note,
        )
        page = _serve(stack.client_env(data), talk) if talk else state.url
    env = data.resolve() / "env"
    if open_page:
        webbrowser.open(page)
    if json:
        print_json({"url": state.url, "page": page, "env": str(env), "data": str(data.resolve())})
        return
    say(f"The service answers at {state.url}.")
    say(f"For this shell: . {env}")
    say(f"The page: open {page} in a browser and log in with the key that this prints: (. {env}; echo $GRPO_API_KEY)")


def down(*, data: Path = DATA, json: AsJson = False) -> None:
    """Stop what `grpo up` started; stored data stays.

    Parameters
    ----------
    data
        The folder given to `grpo up`.
    """
    with _stack_errors():
        from deploy.local import stack

        stopped = stack.down(data)
    if json:
        print_json({"stopped": stopped})
        return
    say("Stopped." if stopped else f"Nothing was running on {data}.")


def _serve(env: dict[str, str], job: str) -> str:
    """Serve a job's model, and return the address of the page where it answers a held-out question."""
    from grpo_client.cli.chat import wait_until_served

    os.environ |= {name: env[name] for name in ("GRPO_URL", "GRPO_API_KEY")}
    with connected() as client:
        if not any(model.id == job for model in client.models()):
            session = client.serve(job, steps=[one.step for one in client.checkpoints(job)][-MOST_STEPS:])
            wait_until_served(client, session)
    return f"{env['GRPO_URL']}/#/talk/{job}?question=0"


@contextmanager
def _stack_errors() -> Generator[None]:
    from deploy.local.errors import StackError

    try:
        with needs_extra("api,local"):
            yield
    except StackError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        message = f"{error.filename or 'The folder'}: {error.strerror or error}. Choose another folder with --data."
        raise CommandError(message) from error
