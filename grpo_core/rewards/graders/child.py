"""The process that runs a job's own code: `python -I [-S] child.py PLAN`, the plan being JSON.

This process permanently drops most of its rights and forks a worker, which drops the rest and loads the grader. It
sends the worker one row at a time with a time limit. If the worker exceeds the limit or dies, that row gets an error, a
new worker is forked, and grading continues with the next row. No code of a job runs in this process, so it can neither
answer for another row nor run longer than allowed. A grader that is part of the product is loaded here once, before the
rights are dropped. Uses the standard library alone.

    in   {"name", "source"}, then for each batch {"rows": n, "row_seconds", "seconds", "fair"} and n rows, a line each
    out  {"ready": ...} or {"failed": {"type", "message"}}, then for each batch {"results": [...]}

A result is a number or {"type", "message", "at"}. The grader prints to this process's standard output.
"""

from __future__ import annotations

import json
import linecache
import math
import numbers
import os
import random
import select
import signal
import sys
import time
import traceback
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

_HERE = Path(__file__).resolve()
if __name__ == "__main__":
    sys.path.append(str(_HERE.parents[3]))  # with -I, only the standard library and installed packages are found

from grpo_core.confinement import landlock, rights, seccomp  # noqa: E402 - sys.path is complete only here

MAX_LINE = 64 * 1024
"""Largest size of a worker's answer in bytes."""
MAX_MESSAGE = 500
LEAST_SECONDS = 0.1
SHARE = 0.1
"""Largest part of the remaining time that one row gets if rows share it; it gets `LEAST_SECONDS` at least."""
TOGETHER_SECONDS = 0.0005
"""Seconds for which answers are collected before they are read: to wake up for each would take longer than most take
to compute."""
OPEN_FILES = 64
_ROWS_IN, _ANSWERS_OUT = 3, 4
_BUILD_SETTINGS = "_sysconfigdata_"
_READ = 64 * 1024

Result = float | dict[str, Any]
Loaded = Any
"""The function `grade` of a job."""


def failure(kind: str, message: str, at: Sequence[str] = ()) -> dict[str, Any]:
    """The result of a row without a score."""
    return {"type": kind, "message": message[:MAX_MESSAGE], "at": list(at)}


class Worker:
    """A forked process that runs the grader. `run` sends it rows until one of them ends it."""

    def __init__(self, head: dict[str, Any], plan: dict[str, Any]) -> None:
        rows_in, self._write = os.pipe()
        self._read, answers_out = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            _become_worker(rows_in, answers_out, head, plan)
        os.close(rows_in)
        os.close(answers_out)
        os.set_blocking(self._write, False)
        self._held = b""
        self._answered = 0

    def hello(self, seconds: float) -> dict[str, Any] | None:
        """Wait until the grader is loaded. Returns None, or why it could not be loaded."""
        line = self._next(time.monotonic() + seconds)
        if line is None:
            return failure("Timeout", f"loading took more than {seconds:g} s")
        try:
            said = json.loads(line)
        except ValueError:
            return failure("Crash", "the process broke the protocol while loading")
        return said.get("failed") if isinstance(said, dict) else failure("Crash", "the process broke the protocol")

    def run(
        self, rows: Sequence[bytes], row_seconds: float, deadline: float, *, fair: bool
    ) -> tuple[list[Result], bool]:
        """Return the results of the first rows, and whether the worker can take more rows."""
        results: list[Result] = []
        unsent = memoryview(b"".join(rows))
        while len(results) < len(rows):
            limit = row_seconds
            if fair:
                limit = min(row_seconds, max(LEAST_SECONDS, SHARE * (deadline - time.monotonic())))
            end = min(time.monotonic() + limit, max(deadline, time.monotonic() + LEAST_SECONDS))
            line, unsent = self._exchange(unsent, end)
            if line is None:
                return [*results, failure("Timeout", f"no answer within {limit:.3g} s")], False
            answer = _answer(line, self._answered)
            self._answered += 1
            results.append(answer)
            if isinstance(answer, dict) and answer["type"] == "Crash":
                return results, False
        return results, True

    def end(self) -> None:
        """Kill the process and wait for its end."""
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._write)
        os.close(self._read)

    def _next(self, end: float) -> bytes | None:
        return self._exchange(memoryview(b""), end)[0]

    def _exchange(self, unsent: memoryview, end: float) -> tuple[bytes | None, memoryview]:
        """Send rows and return the worker's next line: empty if the worker has ended, None if the time is over."""
        while b"\n" not in self._held:
            left = end - time.monotonic()
            if left <= 0:
                return None, unsent
            readable, writable, _ = select.select([self._read], [self._write] if unsent else [], [], left)
            if writable:
                unsent = self._send(unsent)
            if readable:
                if not unsent:
                    time.sleep(TOGETHER_SECONDS)
                data = os.read(self._read, _READ)
                self._held += data
                if not data or len(self._held) > MAX_LINE + _READ:
                    return b"", unsent
        line, _, self._held = self._held.partition(b"\n")
        return line, unsent

    def _send(self, unsent: memoryview) -> memoryview:
        try:
            return unsent[os.write(self._write, unsent[:_READ]) :]
        except BlockingIOError:
            return unsent
        except BrokenPipeError:
            return memoryview(b"")  # the other pipe reports the end of the worker


class Supervisor:
    """Grades batches, and replaces workers that end."""

    def __init__(self, head: dict[str, Any], plan: dict[str, Any]) -> None:
        self._head, self._plan = head, plan
        self._worker: Worker | None = None

    def load(self) -> dict[str, Any] | None:
        """Start a worker. Returns None, or why it could not be started."""
        worker = Worker(self._head, self._plan)
        wrong = worker.hello(self._plan["start_seconds"])
        if wrong is None:
            self._worker = worker
        else:
            worker.end()
        return wrong

    def grade(self, rows: Sequence[bytes], row_seconds: float, seconds: float, *, fair: bool) -> list[Result]:
        """Return one result for each row."""
        deadline = time.monotonic() + seconds
        results: list[Result] = []
        while len(results) < len(rows):
            left = len(rows) - len(results)
            if time.monotonic() >= deadline:
                return [*results, *([failure("Late", f"the step's {seconds:g} s were used up before it")] * left)]
            if self._worker is None and (wrong := self.load()) is not None:
                return [*results, *([failure("Start", f"{wrong['type']}: {wrong['message']}")] * left)]
            assert self._worker is not None, "just loaded"
            upto = len(results) + 1 if self._plan["fresh"] else len(rows)
            some, alive = self._worker.run(rows[len(results) : upto], row_seconds, deadline, fair=fair)
            results += some
            if not alive or self._plan["fresh"]:
                self.end()
        return results

    def end(self) -> None:
        """End the worker, if one is running."""
        if self._worker is not None:
            self._worker.end()
            self._worker = None


def _answer(line: bytes, row: int) -> Result:
    """Read a worker's line as the result of this row; a `Crash` if it is anything else."""
    if not line:
        return failure("Crash", "the process ended while grading it")
    try:
        said: Any = json.loads(line) if len(line) <= MAX_LINE else None
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict) or said.get("row") != row:
        return failure("Crash", "the process broke the protocol while grading it")
    score, error = said.get("score"), said.get("error")
    if isinstance(score, float):
        return score
    if isinstance(error, dict):
        at = [str(part)[:100] for part in error.get("at", [])[:3]] if isinstance(error.get("at"), list) else []
        return failure(str(error.get("type"))[:60], str(error.get("message")), at)
    return failure("Crash", "the process broke the protocol while grading it")


# The worker's part, which loads a job's code


def _become_worker(rows_in: int, answers_out: int, head: dict[str, Any], plan: dict[str, Any]) -> NoReturn:
    try:
        parent = os.getppid()
        inp, out = os.dup(rows_in), os.dup(answers_out)
        high = max(inp, out, _ANSWERS_OUT) + 1
        os.dup2(inp, high)
        os.dup2(out, high + 1)
        os.dup2(high, _ROWS_IN)
        os.dup2(high + 1, _ANSWERS_OUT)
        os.closerange(_ANSWERS_OUT + 1, OPEN_FILES)
        rights.bind_to(parent)
        if plan["confined"]:
            seccomp.enforce()
        _work(head, plan["loaded"])
    except BaseException:  # noqa: BLE001 - the worker must never return into the supervisor's code
        os._exit(1)
    os._exit(0)


def _work(head: dict[str, Any], loaded: Loaded | None) -> None:
    try:
        grade = loaded or _load(head)
    except BaseException as error:  # noqa: BLE001 - a job's code may raise anything
        _say({"failed": _described(error)})
        return
    _say({"ready": True})
    with os.fdopen(_ROWS_IN, "rb", buffering=_READ) as rows:
        for number, line in enumerate(rows):
            _grade(grade, number, line)


def _load(head: dict[str, Any]) -> Loaded:
    source, name = head["source"], f"<grader {head['name']}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    module = types.ModuleType("grader")
    sys.modules["grader"] = module
    exec(compile(source, name, "exec"), module.__dict__)  # noqa: S102 - the purpose of this process
    if not callable(getattr(module, "grade", None)):
        raise AttributeError("the source defines no function grade")
    return module.grade


def _grade(grade: Loaded, number: int, line: bytes) -> None:
    try:
        row = json.loads(line)
        random.seed(row["seed"])
        answer: dict[str, Any] = {"row": number, "score": _finite(grade(row["sample"], row["item"]))}
    except BaseException as error:  # noqa: BLE001 - a job's code may raise anything
        answer = {"row": number, "error": _described(error)}
    sys.stdout.flush()
    _say(answer)


def _finite(value: Any) -> float:
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise TypeError(f"grade returned {value!r:.80}, which is not a finite number")
    return float(value)


def _described(error: BaseException) -> dict[str, Any]:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith("<grader")]
    at = [f"line {frame.lineno} in {frame.name}" for frame in frames[-3:]]
    try:
        message = str(error)[:MAX_MESSAGE]
    except BaseException:  # noqa: BLE001 - the exception's class is code of a job
        message = ""
    return failure(type(error).__name__, message, at)


def _say(message: dict[str, Any]) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(_ANSWERS_OUT, data) :]


# Start


def _confine(plan: dict[str, Any]) -> dict[str, Any]:
    """Drop the rights that no grader needs. Returns how the process is confined."""
    rights.limit(memory_bytes=plan["memory_mb"] << 20, open_files=OPEN_FILES)
    rights.bind_to(plan["parent"])
    rights.hide_memory()
    if os.geteuid() == 0:
        rights.bound_capabilities()
    rights.drop_capabilities()
    rights.forbid_new_privileges()
    if not plan["confined"]:
        return {"isolation": "none"}
    version = landlock.version()
    rules = landlock.RuleSet(connects=False)
    rules.allow(plan["readable"], rights=landlock.LOOK)
    rules.allow(plan["listable"], rights=landlock.LIST)
    rules.enforce()
    seccomp.enforce(forks=True)
    return {"isolation": "landlock+seccomp", "landlock": version}


class _Offered:
    """Refuses to import other packages than those that graders may use, and lists those in its error."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)

    def find_spec(self, name: str, *_: Any) -> None:
        top = name.partition(".")[0]
        if top.startswith(_BUILD_SETTINGS):  # of this interpreter, which is not in the list of its modules
            return
        if top not in self._names and top not in sys.stdlib_module_names:
            offered = ", ".join(sorted(self._names)) or "nothing else"
            raise ModuleNotFoundError(
                f"no module named {name!r}; graders can import the standard library and: {offered}"
            )


def _open_packages(plan: dict[str, Any]) -> None:
    sys.path[:] = [path for path in sys.path if path != str(_HERE.parents[3])]
    if plan["names"] is not None:
        sys.path += plan["packages"]
        sys.meta_path.insert(0, _Offered(plan["names"]))  # pyright: ignore[reportArgumentType]


def main() -> None:
    """Grade rows for one trainer until it closes the pipe."""
    plan: dict[str, Any] = json.loads(sys.argv[1])
    rows, out = os.fdopen(plan["rows_in"], "rb", buffering=_READ), plan["answers_out"]

    def say(message: dict[str, Any]) -> None:
        data = memoryview(json.dumps(message).encode() + b"\n")
        while data:
            data = data[os.write(out, data) :]

    head = json.loads(rows.readline())
    try:
        _open_packages(plan)
        plan["loaded"] = _load(head) if plan["ours"] else None
        got = _confine(plan)
    except (OSError, ImportError, MemoryError, ValueError) as error:
        say({"failed": failure("Confinement", f"{type(error).__name__}: {error}")})
        return
    supervisor = Supervisor(head, plan)
    wrong = supervisor.load()
    say({"ready": got} if wrong is None else {"failed": wrong})
    while wrong is None and (line := rows.readline()):
        asked = json.loads(line)
        batch = [rows.readline() for _ in range(asked["rows"])]
        say({"results": supervisor.grade(batch, asked["row_seconds"], asked["seconds"], fair=asked["fair"])})
    supervisor.end()


if __name__ == "__main__":
    main()
