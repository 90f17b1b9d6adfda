"""`grpo up` and `grpo down`: the whole service on this machine."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from api.cli.errors import needs_extra
from grpo_client.cli.output import AsJson, CommandError, note, print_json, say

DATA = Path(".grpo")


def up(
    *,
    data: Path = DATA,
    port: Annotated[int | None, Parameter(name=("--port", "--api-port"))] = None,
    valkey_port: int | None = None,
    s3_port: int | None = None,
    worker: bool = True,
    model_dir: Path | None = None,
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
    """
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
    env = data.resolve() / "env"
    if json:
        print_json({"url": state.url, "env": str(env), "data": str(data.resolve())})
        return
    say(f"The service answers at {state.url}.")
    say(f"For this shell: . {env}")
    say(
        f"The page: open {state.url} in a browser and log in with the key that this prints: "
        f"(. {env}; echo $GRPO_API_KEY)"
    )


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
