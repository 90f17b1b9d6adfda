"""The client's wheel, installed by itself: what lands beside it, and that it runs where POSIX's modules are missing."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from grpo_client.cli.commands import CLIENT

ROOT = Path(__file__).resolve().parents[2]
UV = Path(sys.executable).with_name("uv")

AS_ON_WINDOWS = """
import os, signal, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in {"fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

for name in ("fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty"):
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Missing())
KEPT = {"SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM", "SIG_DFL", "SIG_IGN"}
POSIX = ("alarm", "pause", "pthread_kill", "pthread_sigmask", "setitimer", "sigpending", "sigtimedwait", "sigwait")
for name in [name for name in vars(signal) if name.startswith("SIG") and name not in KEPT] + [*POSIX]:
    delattr(signal, name)
for name in ("O_DIRECTORY", "O_NOFOLLOW", "chown", "fchmod", "fchown", "fork", "getegid", "geteuid", "getgid",
             "getpgid", "getuid", "killpg", "mkfifo", "setsid", "uname"):
    delattr(os, name)
"""
"""Run at the start of each interpreter below: takes away what Windows lacks."""


@pytest.fixture(scope="module")
def site_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment in which only the wheel was installed, at the versions of the lock."""
    folder = tmp_path_factory.mktemp("client")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    subprocess.run(build, cwd=ROOT / "grpo_client", check=True, capture_output=True)
    (wheel,) = folder.glob("grpo_client-*.whl")
    assert wheel.name.startswith(f"grpo_client-{version('grpo-jobs')}-"), "client and service have one version"
    locked = folder / "locked.txt"
    export = ["export", "--quiet", "--frozen", "--package", "grpo-client", "--no-dev", "--no-emit-workspace"]
    subprocess.run([UV, *export, "--no-hashes", "--output-file", locked], cwd=ROOT, check=True, capture_output=True)
    subprocess.run([UV, "venv", "--quiet", "--python", sys.executable, folder / "venv"], check=True)
    install = [UV, "pip", "install", "--quiet", "--python", folder / "venv", "--constraint", locked, wheel]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"Needs a package index or uv's cache of `make setup`. {done.stderr}"
    (folder / "venv" / "as_on_windows.py").write_text(AS_ON_WINDOWS)
    (found,) = (folder / "venv").glob("lib/python3.*/site-packages")
    return found


def run(site_packages: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in the environment, without what Windows lacks and without this checkout."""
    venv = site_packages.parents[2]
    script = f"import sys; sys.path.insert(0, {str(venv)!r}); import as_on_windows; sys.path.pop(0)\n{code}"
    command = [venv / "bin" / "python", "-I", "-c", script, *arguments]
    environment = {"GRPO_URL": "http://127.0.0.1:9", "GRPO_API_KEY": "grpo_key", "PATH": "/nowhere"}
    return subprocess.run(command, cwd=venv, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_nothing_of_the_service_is_installed(site_packages: Path) -> None:
    names = {path.name for path in site_packages.iterdir()}
    assert {"grpo_client", "httpx"} <= names
    assert names & {"api", "jobs", "deploy", "grpo_core", "tests", "scripts", "examples", "cli", "client.py"} == set()
    (information,) = site_packages.glob("grpo_client-*.dist-info")
    files = {line.partition(",")[0] for line in (information / "RECORD").read_text().splitlines()}
    assert {name.split("/")[0] for name in files} == {"grpo_client", information.name, ".."}
    assert "grpo_client/py.typed" in files
    assert [name for name in files if name.startswith("..")] == ["../../../bin/grpo"]


def test_every_module_is_imported_where_posix_is_missing(site_packages: Path) -> None:
    code = """
import importlib, pkgutil, grpo_client
for module in pkgutil.walk_packages(grpo_client.__path__, "grpo_client."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from grpo_client import *
print(grpo_client.__version__, GrpoClient.__name__)
"""
    done = run(site_packages, code)
    assert (done.stdout, done.stderr) == (f"{version('grpo-jobs')} GrpoClient\n", "")


COMMAND = "from grpo_client.cli import main; main()"


def test_help_lists_the_client_s_commands_and_no_other(site_packages: Path) -> None:
    done = run(site_packages, COMMAND, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    listed = [line.split("  ")[1] for line in done.stdout.splitlines() if line.startswith("  ") and "  --" not in line]
    assert listed == [command.words for command in CLIENT.commands]


@pytest.mark.parametrize("words", [command.words for command in CLIENT.commands])
def test_every_command_starts(site_packages: Path, words: str) -> None:
    done = run(site_packages, COMMAND, *words.split(), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"grpo {words}" in done.stdout


def test_a_command_reports_that_no_service_is_there(site_packages: Path) -> None:
    done = run(site_packages, COMMAND, "list")
    assert done.returncode == 1
    assert done.stderr.startswith("grpo: The service at http://127.0.0.1:9 cannot be reached")


def test_a_command_of_the_service_says_what_to_install(site_packages: Path) -> None:
    done = run(site_packages, COMMAND, "up")
    assert done.returncode == 2
    assert "pip install ./grpo_client '.[api,local]'" in done.stderr
