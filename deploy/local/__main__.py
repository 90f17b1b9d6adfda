"""The background half of `grpo up`: `python -m deploy.local DATA LOCK_FD`, started by `stack.up` and by nothing else.

Runs as long as the stack and holds the data folder's lock, which it got from `up`. The stack ends with it: gracefully
after TERM, and killed by the kernel if this process is killed.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from pydantic import BaseModel, ValidationError

from deploy.local import stack
from deploy.local.errors import StackError, StartError
from deploy.local.folder import Config, Folder, Phase, ProcessState, State, write_private
from deploy.local.supervisor import StopRequestedError, Supervisor
from grpo_core.confinement.rights import hide_memory

log = logging.getLogger(__name__)


class NewKey(BaseModel):
    """The field that this module reads of the output of creating an API key."""

    key: str


class Stack:
    """The supervisor of one data folder, and the state that it publishes."""

    def __init__(self, folder: Folder, config: Config) -> None:
        self._folder = folder
        self._config = config
        self._secrets = folder.ensure_sealing_key()
        self._phase: Phase = "starting"
        self._supervisor = Supervisor(stack.waves(folder, config, self._secrets), self._report)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._supervisor.request_stop()

    def run(self) -> int:
        self._report()
        error = ""
        try:
            self._start()
            self._enter("running")
            self._supervisor.watch()
        except StopRequestedError:
            log.info("stopped while starting")
        except StackError as failure:
            log.critical("%s", failure)
            error = str(failure)
        if not error:
            self._enter("stopping")
        self._supervisor.stop()
        self._enter("failed" if error else "stopped", error)
        return 1 if error else 0

    def _start(self) -> None:
        work = self._folder.root / "work"
        work.mkdir(exist_ok=True)
        self._supervisor.start(self._config.start_s)
        if not self._secrets.api_key:
            self._secrets = self._secrets.model_copy(update={"api_key": self._create_key()})
            self._folder.save_secrets(self._secrets)
        variables = stack.client_variables(self._config, self._secrets)
        write_private(self._folder.env, "".join(f"export {name}='{value}'\n" for name, value in variables.items()))

    def _create_key(self) -> str:
        command = self._config.commands.create_key
        env = stack.service_env(self._folder, self._config, self._secrets)
        try:
            done = subprocess.run(command, env=env, cwd=stack.ROOT, capture_output=True, timeout=60, check=True)  # noqa: S603
            return NewKey.model_validate_json(done.stdout).key
        except subprocess.SubprocessError as error:
            detail = getattr(error, "stderr", None) or b""
            raise StartError(f"no API key could be created: {error}\n{detail.decode(errors='replace')}") from error
        except ValidationError as error:
            raise StartError(f"no API key could be created: the output of {' '.join(command)} has no key") from error

    def _enter(self, phase: Phase, error: str = "") -> None:
        self._phase = phase
        log.info("%s", phase)
        self._report(error)

    def _report(self, error: str = "") -> None:
        self._folder.save_state(
            State(
                phase=self._phase,
                url=self._config.url,
                pid=os.getpid(),
                processes={
                    kept.service.name: ProcessState(pid=kept.child.pid if kept.child else None, restarts=kept.restarts)
                    for kept in self._supervisor.kept
                },
                waiting_for=self._supervisor.waiting_for,
                error=error,
            )
        )


def main() -> None:
    # `up` waits only for this first process. The second has no parent, so it leaves no zombie in `up`'s process.
    if os.fork() != 0:
        os._exit(0)
    hide_memory()  # before secrets are read
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    folder = Folder(Path(sys.argv[1]))
    # The lock file was inherited open. Children of this process do not inherit it, so it is free when this process
    # ends.
    os.set_inheritable(int(sys.argv[2]), False)
    config = folder.config()
    if config is None:
        raise StackError(f"{folder.root} has no stack.json: start the stack with `grpo up`")
    sys.exit(Stack(folder, config).run())


if __name__ == "__main__":
    main()
