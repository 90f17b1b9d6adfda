"""`up`, `down` and `status` with the real servers; the API and the worker are small stand-ins."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypedDict

import pytest
import redis

from deploy.local import stack
from deploy.local.errors import AlreadyRunningError, PortInUseError, StackError, StartError
from deploy.local.folder import Commands, Folder, State
from deploy.local.ports import pick_port, pick_s3_port, seaweedfs_ports
from deploy.local.seaweedfs import SeaweedFS
from tests.clock import patience

FAKE_API = """
    import http.server, os, signal, sys

    open("{folder}/sealing-keys", "w").write(os.environ["GRPO_SEALING_KEYS"])

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/readyz" else 404)
            self.end_headers()

    def stop(*_):
        open("{folder}/ended", "a").write("api ")
        sys.exit(0)

    signal.signal(signal.SIGTERM, stop)
    http.server.HTTPServer(("127.0.0.1", {port}), Handler).serve_forever()
"""
FAKE_WORKER = """
    import json, os, signal, subprocess, sys, time

    open("{folder}/worker-env", "w").write(json.dumps(dict(os.environ)))
    # A child in the worker's group, which must go with it.
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)  # {folder}"])

    def stop(*_):
        open("{folder}/ended", "a").write("worker ")
        sys.exit(0)

    signal.signal(signal.SIGTERM, stop)
    while True:
        time.sleep(0.1)
"""
FAKE_CREATE_KEY = """
    import json
    open("{folder}/keys-created", "a").write("x")
    print(json.dumps({{"key": "grpo_test_key_of_the_local_owner", "id": "k1"}}))
"""


class Ports(TypedDict):
    api_port: int
    valkey_port: int
    s3_port: int


class Local:
    """A stack on ports and in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.change_ports()

    def change_ports(self) -> None:
        self.ports = Ports(api_port=pick_port(), valkey_port=pick_port(), s3_port=pick_s3_port())

    def commands(
        self, *, api: str = FAKE_API, worker: str = FAKE_WORKER, create_key: str = FAKE_CREATE_KEY
    ) -> Commands:
        return Commands(
            api=self._script("api.py", api),
            worker=self._script("worker.py", worker),
            create_key=self._script("create_key.py", create_key),
        )

    def _script(self, name: str, text: str) -> tuple[str, ...]:
        path = self.folder / name
        path.write_text(textwrap.dedent(text).format(folder=self.folder, port=self.ports["api_port"]))
        return (sys.executable, str(path))

    def up(self, **programs: str) -> State:
        return stack.up(self.data, **self.ports, commands=self.commands(**programs))

    def processes(self) -> list[str]:
        """Every process on this machine that belongs to the stack, as `ps` shows it."""
        return [line for line in ps() if str(self.folder) in line or f"-s3.port={self.ports['s3_port']}" in line]

    def s3(self) -> SeaweedFS:
        env = stack.client_env(self.data)
        return SeaweedFS(
            data=self.data,
            port=self.ports["s3_port"],
            access_key=env["AWS_ACCESS_KEY_ID"],
            secret_key=env["AWS_SECRET_ACCESS_KEY"],
            log=self.data / "unused",
        )

    def valkey(self) -> redis.Redis:
        return redis.Redis.from_url(stack.client_env(self.data)["REDIS_URL"], decode_responses=True)

    def answers(self) -> bool:
        with suppress(redis.ConnectionError):
            return bool(self.valkey().ping())
        return False

    def store(self) -> None:
        self.valkey().set("kept", "yes")
        self.s3().client().put_object(Bucket=stack.BUCKET, Key="kept", Body=b"yes" * 1_000_000)

    def check_stored(self) -> None:
        assert self.valkey().get("kept") == "yes"
        stored = self.s3().client().get_object(Bucket=stack.BUCKET, Key="kept")["Body"].read()
        assert stored == b"yes" * 1_000_000


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Local]:
    local = Local(tmp_path)
    try:
        yield local
    finally:
        stack.down(local.data)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    """A stack that the tests share: it is up before and after each."""
    running = Local(tmp_path_factory.mktemp("running"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_SESSION_TOKEN", "of another account")
        patch.setenv("GRPO_QUEUES", "big")
        patch.setenv("GRPO_API_KEY", "of another service")
        patch.setenv("GRPO_SEALING_KEYS", "of another stack")
        patch.setenv("HF_HOME", "/models")
        try:
            running.up()
            yield running
        finally:
            stack.down(running.data)


def ps() -> list[str]:
    return subprocess.run(["ps", "-eo", "pid,args", "-ww"], capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )


def eventually(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + patience(timeout_s)
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def pids(state: State) -> list[int]:
    return [process.pid for process in state.processes.values() if process.pid is not None]


def test_down_leaves_nothing_running_and_up_finds_everything(local: Local) -> None:
    shown: list[str] = []
    state = stack.up(local.data, **local.ports, commands=local.commands(), on_progress=shown.append)
    assert state.phase == "running"
    assert state.url == f"http://127.0.0.1:{local.ports['api_port']}"
    assert list(state.processes) == ["valkey", "seaweedfs", "api", "worker"]
    assert any("waiting for" in line and "seaweedfs" in line for line in shown)
    before = stack.client_env(local.data)
    local.store()

    assert stack.down(local.data)
    assert not any(map(alive, pids(state)))
    assert local.processes() == []
    assert (local.folder / "ended").read_text() == "worker api "
    assert stack.status(local.data).phase == "stopped"
    assert not stack.down(local.data)

    # Without ports, those of the last time.
    again = stack.up(local.data, commands=local.commands(), worker=False)
    assert list(again.processes) == ["valkey", "seaweedfs", "api"]
    assert stack.client_env(local.data) == before
    local.check_stored()
    assert (local.folder / "keys-created").read_text() == "x"


def test_killed_supervisor_takes_every_child_with_it(local: Local) -> None:
    # The kernel's promise covers the supervisor's own children; what these start is theirs to bind.
    state = local.up(worker="import time; time.sleep(600)")
    local.store()
    assert state.pid is not None
    os.kill(state.pid, signal.SIGKILL)
    eventually(lambda: not any(map(alive, pids(state))))
    assert local.processes() == []
    assert stack.status(local.data).phase == "stopped"
    # What was answered is there, also on other ports.
    local.change_ports()
    assert local.up().phase == "running"
    local.check_stored()


def test_secrets_are_for_the_owner_only(running: Local) -> None:
    # Root's training processes, which are other users, go through it to `work`; nobody lists it.
    assert running.data.stat().st_mode & 0o777 == (0o711 if os.geteuid() == 0 else 0o700)
    assert (running.data / "logs").stat().st_mode & 0o777 == 0o700
    ours = [path for path in [*running.data.iterdir(), *(running.data / "logs").iterdir()] if path.is_file()]
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in ours} == {path.name: "0o600" for path in ours}
    secrets = json.loads((running.data / "secrets.json").read_text())
    assert secrets["api_key"] == "grpo_test_key_of_the_local_owner"
    assert all(len(value) >= 16 for value in secrets.values())
    del secrets["s3_access_key"]  # A name, not a secret; SeaweedFS logs it.
    for path in ours:
        if path.name not in ("secrets.json", "env"):
            text = path.read_text(errors="replace")
            assert [name for name, value in secrets.items() if value in text] == [], path
    shown = "\n".join(ps())
    assert [name for name, value in secrets.items() if value in shown] == []


def test_env_file_can_be_sourced(running: Local) -> None:
    script = f". {running.data}/env && exec {sys.executable} -c 'import json, os; print(json.dumps(dict(os.environ)))'"
    run = subprocess.run(["sh", "-c", script], env={"PATH": os.defpath}, capture_output=True, text=True, check=True)
    sourced = json.loads(run.stdout)
    expected = stack.client_env(running.data)
    assert {name: sourced[name] for name in expected} == expected
    assert set(expected) == {
        *("GRPO_URL", "GRPO_API_KEY", "REDIS_URL", "S3_ENDPOINT", "S3_BUCKET", "S3_REGION"),
        *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL_S3", "GRPO_SEALING_KEYS"),
    }


def test_services_get_their_settings_and_nothing_misleading(running: Local) -> None:
    eventually((running.folder / "worker-env").exists)
    env = json.loads((running.folder / "worker-env").read_text())
    client = stack.client_env(running.data)
    shared = set(client) - {"GRPO_URL", "GRPO_API_KEY", "AWS_ENDPOINT_URL_S3", "GRPO_SEALING_KEYS"}
    assert {name: env[name] for name in shared} == {name: client[name] for name in shared}
    assert env["HF_HOME"] == "/models"
    assert env["GRPO_WORK_DIR"] == str(running.data / "work")
    assert not {"AWS_SESSION_TOKEN", "GRPO_QUEUES", "GRPO_API_KEY", "GRPO_SEALING_KEYS"} & set(env)
    assert (running.folder / "sealing-keys").read_text() == client["GRPO_SEALING_KEYS"]


def test_a_folder_of_an_earlier_release_gets_a_sealing_key_once(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    before = folder.secrets()
    assert before.sealing_keys == ""
    made = folder.ensure_sealing_key()
    assert len(made.sealing_keys) >= 32
    assert made == before.model_copy(update={"sealing_keys": made.sealing_keys})
    assert folder.ensure_sealing_key() == folder.secrets() == made
    assert (tmp_path / "secrets.json").stat().st_mode & 0o777 == 0o600


def test_second_up_is_refused_with_the_url_of_the_first(running: Local) -> None:
    before = stack.status(running.data)
    with pytest.raises(AlreadyRunningError, match=before.url):
        running.up()
    assert stack.status(running.data) == before


def test_of_two_ups_at_once_one_waits_for_the_other(local: Local) -> None:
    commands = local.commands()
    shown: list[str] = []

    def up() -> State | str:
        try:
            return stack.up(local.data, **local.ports, commands=commands, on_progress=shown.append)
        except StackError as error:
            return f"{type(error).__name__} while {stack.status(local.data).phase}"

    with ThreadPoolExecutor(2) as pool:
        ended = [done.result() for done in [pool.submit(up), pool.submit(up)]]
    assert "AlreadyRunningError while running" in ended
    assert [state.phase for state in ended if isinstance(state, State)] == ["running"]
    assert any("waiting for another `grpo up`" in line for line in shown)


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (State(phase="stopping"), "being stopped"),
        (State(phase="starting"), "has been starting"),
        (None, "has been starting"),
    ],
)
def test_a_locked_folder_says_what_goes_on_there(
    local: Local, state: State | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stack, "_SLACK_S", 0.3)
    folder = Folder(local.data)
    folder.create()
    with folder.lock():  # type: ignore[union-attr] - nobody else has it
        if state is not None:
            folder.save_state(state)
        with pytest.raises(StackError, match=says):
            stack.up(local.data, **local.ports, commands=local.commands(), start_s=0.0)


def test_an_up_that_waited_for_one_that_failed_says_to_try_again(local: Local) -> None:
    folder = Folder(local.data)
    folder.create()
    lock = folder.lock()
    assert lock is not None
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(local.up)
        time.sleep(1.0)
        lock.close()
        with pytest.raises(StackError, match="try again"):
            waiting.result()


@pytest.mark.parametrize("name", ["valkey", "seaweedfs", "api", "worker"])
def test_dead_process_is_started_again(running: Local, name: str) -> None:
    before = stack.status(running.data).processes[name]
    assert before.pid is not None
    os.kill(before.pid, signal.SIGKILL)
    eventually(lambda: stack.status(running.data).processes[name].pid not in (before.pid, None))
    after = stack.status(running.data)
    assert after.processes[name].restarts == before.restarts + 1
    assert after.phase == "running"
    if name == "seaweedfs":
        eventually(lambda: running.s3().missing() is None)
    if name == "valkey":
        eventually(running.answers)


def test_two_stacks_side_by_side(running: Local, local: Local) -> None:
    eventually(lambda: running.s3().missing() is None)
    running.store()
    local.up(worker="import time; time.sleep(600)")
    assert "Contents" not in local.s3().client().list_objects_v2(Bucket=stack.BUCKET)
    running.check_stored()


def test_service_that_keeps_dying_ends_up_with_its_log(local: Local) -> None:
    with pytest.raises(StartError, match=r"api died 5 times in a row\n(.*\n)+.*no settings, no service"):
        local.up(api="import sys; sys.exit('no settings, no service')")
    assert local.processes() == []
    failed = stack.status(local.data)
    assert failed.phase == "failed"
    assert "no settings, no service" in failed.error


def test_interrupted_up_leaves_nothing_running(local: Local) -> None:
    commands = local.commands(api="import time; time.sleep(600)").model_dump_json()
    script = f"""
        import signal
        from pathlib import Path
        from deploy.local import stack
        from deploy.local.folder import Commands
        # As on a terminal: a shell's background jobs are started with the signal ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        commands = Commands.model_validate_json({commands!r})
        stack.up(Path({str(local.data)!r}), **{local.ports!r}, commands=commands)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=stack.ROOT, stderr=subprocess.PIPE, text=True
    )
    eventually(lambda: "api" in stack.status(local.data).processes)
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate()[1]
    assert local.processes() == []


def test_no_key_no_stack(local: Local) -> None:
    with pytest.raises(StartError, match=r"no API key could be created.*\n.*no storage"):
        local.up(create_key="import sys; sys.exit('no storage')")
    assert local.processes() == []


@pytest.mark.parametrize(
    ("option", "nth", "owner"),
    [
        ("api_port", 0, "the API"),
        ("valkey_port", 0, "Valkey"),
        ("s3_port", 0, "SeaweedFS"),
        ("s3_port", 7, "SeaweedFS"),
    ],
)
def test_port_in_use_is_named(
    local: Local, option: Literal["api_port", "valkey_port", "s3_port"], nth: int, owner: str
) -> None:
    port = seaweedfs_ports(local.ports[option])[nth]
    with socket.create_server(("127.0.0.1", port)), pytest.raises(PortInUseError) as caught:
        local.up()
    assert f"port {port} " in str(caught.value)
    assert owner in str(caught.value)
    assert f"--{option.replace('_', '-')}" in str(caught.value)
    assert local.processes() == []


@pytest.mark.parametrize("option", ["api_port", "valkey_port", "s3_port"])
def test_port_0_is_refused_and_not_another_in_its_place(
    local: Local, option: Literal["api_port", "valkey_port", "s3_port"]
) -> None:
    local.ports[option] = 0
    with pytest.raises(StackError, match=f"port 0: choose --{option.replace('_', '-')}"):
        local.up()


def test_two_services_cannot_share_a_port(local: Local) -> None:
    local.ports["valkey_port"] = local.ports["s3_port"] + 2
    with pytest.raises(StackError, match="Valkey and SeaweedFS both need port"):
        local.up()


def test_folder_of_something_else_is_left_alone(local: Local) -> None:
    local.data.mkdir(mode=0o755)
    (local.data / "thesis.tex").write_text("...")
    with pytest.raises(StackError, match="holds something else"):
        local.up()
    assert local.data.stat().st_mode & 0o777 == 0o755
    assert [path.name for path in local.data.iterdir()] == ["thesis.tex"]


def test_down_and_status_where_nothing_is(tmp_path: Path) -> None:
    assert not stack.down(tmp_path / "nothing")
    assert stack.status(tmp_path / "nothing").phase == "stopped"
    assert not (tmp_path / "nothing").exists()
