"""`grpo up` and `grpo down`: starts the supervisor of a data folder in the background, reads its state, and stops it.

Owns which services the stack has and the environment they get. State lives in the data folder (see `folder`), so an
`up` after a `down` finds the same jobs, secrets and ports.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from deploy.local import ports
from deploy.local.errors import AlreadyRunningError, StackError, StartError
from deploy.local.folder import Commands, Config, Folder, Secrets, State
from deploy.local.process import Service, log_tail, open_log
from deploy.local.seaweedfs import SeaweedFS
from deploy.local.valkey import Valkey

BUCKET = "grpo-jobs"
REGION = "us-east-1"

ROOT = Path(__file__).resolve().parents[2]
"""The folder with the packages, in which `python -m api` works even if they are not installed."""
USUAL_PORTS = (8080, 6380, 8333)
_POLL_S = 0.1
_STOP_S = 120.0
_SLACK_S = 30.0
"""Seconds added to the supervisor's time limit for the start, in case the supervisor hangs."""
_NOT_INHERITED = (
    # Another stack's or AWS's own: they would win over, or not fit, what is set here.
    *("AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"),
    *("S3_PUBLIC_ENDPOINT", "GRPO_QUEUES", "GRPO_SEALING_KEYS", "GRPO_SEALING_KEYS_FILE"),
    # The client's, of no use to the servers.
    *("GRPO_URL", "GRPO_API_KEY"),
)


_SCOPES = tuple(
    word
    for name in ("jobs:read", "jobs:write", "datasets:write", "operator", "keys:write")
    for word in ("--scope", name)
)
"""Of the key that `up` creates: who starts the service on this machine operates it."""


def up(
    data: Path,
    *,
    api_port: int | None = None,
    valkey_port: int | None = None,
    s3_port: int | None = None,
    worker: bool = True,
    model_dir: Path | None = None,
    start_s: float = 90.0,
    on_progress: Callable[[str], None] = lambda _: None,
    commands: Commands | None = None,
) -> State:
    """Start the stack of `data` and return once everything answers. After a failure nothing is left running.

    Ports that are not given are those of the last `up`, or 8080, 6380 and 8333. If another `up` is running, this one
    waits for its end and then raises.
    """
    folder = Folder(data)
    folder.create()
    lock = folder.lock()
    if lock is None:
        raise _refusal(folder, start_s + _SLACK_S, on_progress)
    is_spawned = False
    try:
        with lock:
            folder.forget_state()
            api_port, valkey_port, s3_port = _choose_ports(folder.config(), api_port, valkey_port, s3_port)
            config = Config(
                api_port=api_port,
                valkey_port=valkey_port,
                s3_port=s3_port,
                worker=worker,
                model_dir=_find_models(model_dir),
                start_s=start_s,
                commands=commands or _default_commands(api_port),
            )
            _check_ports(config)
            folder.save_config(config)
            is_spawned = True  # set first, because an interruption may come at once
            _spawn_supervisor(folder, lock.fileno())
        # This process closes the lock, so only the supervisor holds it, and it is free once the supervisor has ended.
        return _wait_until_running(folder, start_s, on_progress)
    except BaseException:  # also for Ctrl-C
        if is_spawned:
            down(data)
        raise


def down(data: Path, *, stop_s: float = _STOP_S) -> bool:
    """Stop the stack of `data`; False if none was running. Stored data stays."""
    folder = Folder(data)
    deadline = time.monotonic() + stop_s
    asked = False
    while folder.locked():
        state = folder.state()
        if state is not None and state.pid is not None and not asked:
            _signal(state.pid, signal.SIGTERM)
            asked = True
        if time.monotonic() > deadline:
            if state is not None and state.pid is not None:
                _signal(state.pid, signal.SIGKILL)  # its children die with it
            raise StackError(f"the stack did not end within {stop_s:.0f} s and was killed: see {folder.logs}")
        time.sleep(_POLL_S)
    return asked


def status(data: Path) -> State:
    """Return the current state of the stack of `data`."""
    folder = Folder(data)
    state = folder.state()
    if folder.locked():
        return state or State(phase="starting")
    return State(phase="failed", error=state.error) if state and state.error else State(phase="stopped")


def client_env(data: Path) -> dict[str, str]:
    """Return the variables in `data/env`, which a client of the stack needs."""
    folder = Folder(data)
    config = folder.config()
    if config is None:
        raise StackError(f"{folder.root} holds no stack: start one with `grpo up`")
    return client_variables(config, folder.secrets())


def client_variables(config: Config, secrets: Secrets) -> dict[str, str]:
    storage = _storage_variables(config, secrets)
    return {
        "GRPO_URL": config.url,
        "GRPO_API_KEY": secrets.api_key,
        **storage,
        "AWS_ENDPOINT_URL_S3": storage["S3_ENDPOINT"],
        "REDIS_URL": _redis_url(config, secrets),
        "GRPO_SEALING_KEYS": secrets.sealing_keys,  # for `grpo admin seal`
    }


def service_env(folder: Folder, config: Config, secrets: Secrets) -> dict[str, str]:
    """Return the environment of the API, the worker and admin commands: this process's, and the stack's addresses."""
    env = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    for name in ("NO_PROXY", "no_proxy"):
        env[name] = ",".join(filter(None, [env.get(name), "127.0.0.1", "localhost"]))
    if config.model_dir is not None:
        env["GRPO_MODEL_DIR"] = str(config.model_dir)
    return {
        **env,
        **_storage_variables(config, secrets),
        "REDIS_URL": _redis_url(config, secrets),
        "GRPO_WORK_DIR": str(folder.root / "work"),
        "PYTHONUNBUFFERED": "1",
    }


def waves(folder: Folder, config: Config, secrets: Secrets) -> list[list[Service]]:
    """Return the services in the order of their start. Those of one wave do not need each other."""
    valkey = Valkey(
        data=folder.root / "valkey",
        port=config.valkey_port,
        password=secrets.valkey_password,
        log=folder.log("valkey"),
    )
    seaweedfs = SeaweedFS(
        data=folder.root / "seaweedfs",
        port=config.s3_port,
        access_key=secrets.s3_access_key,
        secret_key=secrets.s3_secret_key,
        log=folder.log("seaweedfs"),
        bucket=BUCKET,
        region=REGION,
    )
    env = service_env(folder, config, secrets)
    api = Service(
        name="api",
        argv=config.commands.api,
        # Not for the worker, which reads no sealed secret.
        env={**env, "GRPO_SEALING_KEYS": secrets.sealing_keys},
        cwd=ROOT,
        log=folder.log("api"),
        probe=lambda: _not_ready(config.api_port),
        # Open event streams end at once; requests may finish.
        stop_s=10.0,
    )
    worker = Service(
        name="worker",
        argv=config.commands.worker,
        env=env,
        cwd=ROOT,
        log=folder.log("worker"),
        settle_s=3.0,
        # The worker finishes its step and stores a checkpoint.
        stop_s=60.0,
    )
    return [[valkey.service(), seaweedfs.service()], [api, worker] if config.worker else [api]]


def _refusal(folder: Folder, patience_s: float, on_progress: Callable[[str], None]) -> StackError:
    """Wait for another `up`, and return why nothing can be started in a folder that is locked."""
    deadline = time.monotonic() + patience_s
    shown = False
    while folder.locked():
        state = folder.state()
        if state is not None and state.phase == "running":
            return AlreadyRunningError(_already_running(folder))
        if state is not None and state.phase == "stopping":
            return StackError(f"the stack on {folder.root} is being stopped: try again when that is done")
        if time.monotonic() > deadline:
            log = folder.log("supervisor")
            return StackError(f"another `grpo up` has been starting {folder.root} for {patience_s:.0f} s: see {log}")
        if not shown:
            on_progress(f"waiting for another `grpo up` that is starting {folder.root}")
            shown = True
        time.sleep(_POLL_S)
    return StackError(f"another `grpo up` or `grpo down` of {folder.root} has just ended and nothing runs: try again")


def _choose_ports(last: Config | None, *asked: int | None) -> list[int]:
    """Return the ports of the API, Valkey and SeaweedFS: as given, as last time, or the defaults."""
    usual = (last.api_port, last.valkey_port, last.s3_port) if last else USUAL_PORTS
    return [other if port is None else port for port, other in zip(asked, usual, strict=True)]


def _find_models(model_dir: Path | None) -> Path | None:
    """Return the folder of local models: as given, from the environment, or the repository's."""
    if model_dir is not None:
        if not model_dir.is_dir():
            raise StackError(f"{model_dir} is not a folder: give --model-dir a folder that holds models")
        return model_dir.resolve()
    if os.environ.get("GRPO_MODEL_DIR"):
        return None
    samples = ROOT / "examples" / "models"
    return samples if samples.is_dir() else None


def _default_commands(api_port: int) -> Commands:
    python = (sys.executable, "-m")
    return Commands(
        api=(*python, "api", "api", "--host", "127.0.0.1", "--port", str(api_port)),
        worker=(*python, "jobs"),
        create_key=(*python, "api", "keys", "create", "--owner", "local", "--json", *_SCOPES),
    )


def _check_ports(config: Config) -> None:
    wanted = [
        ("the API", "--api-port", [config.api_port]),
        ("Valkey", "--valkey-port", [config.valkey_port]),
        ("SeaweedFS", "--s3-port", ports.seaweedfs_ports(config.s3_port)),
    ]
    taken: dict[int, str] = {}
    for name, option, numbers in wanted:
        ports.check_free(numbers, wanted_by=name, option=option)
        for number in numbers:
            if number in taken:
                raise StackError(f"{taken[number]} and {name} both need port {number}: change {option}")
            taken[number] = name


def _spawn_supervisor(folder: Folder, lock_fd: int) -> None:
    with open_log(folder.log("supervisor")) as log:
        code = subprocess.call(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-m", "deploy.local", str(folder.root), str(lock_fd)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=ROOT,
            pass_fds=[lock_fd],
            start_new_session=True,
            umask=0o077,
        )
    if code != 0:
        raise StartError(f"the supervisor did not start\n{log_tail(folder.log('supervisor'))}")


def _wait_until_running(folder: Folder, start_s: float, on_progress: Callable[[str], None]) -> State:
    deadline = time.monotonic() + start_s + _SLACK_S
    shown = ""
    while True:
        alive = folder.locked()
        state = folder.state()
        if state is not None and state.phase == "running":
            return state
        if state is not None and state.phase == "failed":
            raise StartError(state.error)
        if not alive or time.monotonic() > deadline:
            raise StartError(f"the supervisor ended or hangs\n{log_tail(folder.log('supervisor'))}")
        waiting = f"waiting for {' and '.join(state.waiting_for)}" if state and state.waiting_for else ""
        if waiting and waiting != shown:
            on_progress(waiting)
            shown = waiting
        time.sleep(_POLL_S)


def _already_running(folder: Folder) -> str:
    config = folder.config()
    where = f" at {config.url}" if config else ""
    use = f"use it (. {folder.root}/env), or end it with `grpo down --data {folder.root}`"
    return f"a stack is already running{where} on {folder.root}: {use}"


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
        os.kill(pid, number)


def _not_ready(api_port: int) -> str | None:
    connection = http.client.HTTPConnection("127.0.0.1", api_port, timeout=5)
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        body = answer.read(500).decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        return str(error)
    finally:
        connection.close()
    return None if answer.status == 200 else f"GET /readyz answers {answer.status} {body}"


def _redis_url(config: Config, secrets: Secrets) -> str:
    return f"redis://:{secrets.valkey_password}@127.0.0.1:{config.valkey_port}/0"


def _storage_variables(config: Config, secrets: Secrets) -> dict[str, str]:
    return {
        "S3_ENDPOINT": f"http://127.0.0.1:{config.s3_port}",
        "S3_BUCKET": BUCKET,
        "S3_REGION": REGION,
        "AWS_ACCESS_KEY_ID": secrets.s3_access_key,
        "AWS_SECRET_ACCESS_KEY": secrets.s3_secret_key,
    }
