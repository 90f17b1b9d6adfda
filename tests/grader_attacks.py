"""What hostile graders try, and what each must end as.

    python -m tests.grader_attacks        # carries all of them out here; exit status 1 if one got through

Owns the attacks; `tests/integration/test_grader_confinement.py` runs each as a test, and the container tests run
them all in the worker's image.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_core.rewards.graders.confined import ConfinedProcess, LoadError, Outcome, RowFailure
from grpo_core.rewards.graders.models import GraderLimits

SECRET = "GRADER_ATTACK_SECRET"
ROW_SECONDS = 1.0
MEMORY_MB = 512
DENIED = ("PermissionError", "OSError", "gaierror", "RuntimeError", "ModuleNotFoundError", "ValueError", "ImportError")


@dataclass(frozen=True)
class Attack:
    """A grader's source, and the failures (or the score) that are safe."""

    source: str
    ends_as: tuple[str, ...] = DENIED
    scores: float | None = None
    """The score that shows that it came to nothing."""
    at_load: bool = False


def attack(body: str, *, imports: str = "", ends_as: tuple[str, ...] = DENIED, scores: float | None = None) -> Attack:
    head = f"import {imports}\n" if imports else ""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    return Attack(f"{head}def grade(sample, item):\n{lines}", ends_as, scores)


def call(x86: int, arm: int, *arguments: object) -> Attack:
    """A system call by its number, past every library."""
    given = ", ".join(map(str, arguments))
    return attack(
        f"number = {x86} if os.uname().machine == 'x86_64' else {arm}\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        f"result = libc.syscall(number, {given})\n"
        "if result < 0: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))\n"
        "return 1.0",
        imports="ctypes, os",
    )


CUT = ("Timeout",)
GONE = ("Crash",)
OUT_OF_MEMORY = ("MemoryError", "Crash")

ATTACKS: dict[str, Attack] = {
    # Files and secrets
    "secrets in the environment": attack(
        f"return float({SECRET!r} in os.environ or any('KEY' in k or 'TOKEN' in k for k in os.environ))",
        imports="os",
        scores=0.0,
    ),
    "read /etc/passwd": attack("return float(len(open('/etc/passwd').read()))"),
    "read a file of the trainer's": attack("return float(len(open(item['file']).read()))"),
    "list the root": attack("return float(len(os.listdir('/')))", imports="os"),
    "list the file's folder": attack("return float(len(os.listdir(os.path.dirname(item['file']))))", imports="os"),
    "read the trainer's environment": attack("return float(len(open(f'/proc/{item[\"pid\"]}/environ').read()))"),
    "read the trainer's memory": attack("return float(len(open(f'/proc/{item[\"pid\"]}/mem', 'rb').read(1)))"),
    "read its supervisor's memory": attack(
        "return float(len(open(f'/proc/{os.getppid()}/mem').read(1)))", imports="os"
    ),
    "write to /tmp": attack("open('/tmp/grader-was-here', 'w').write('x'); return 1.0"),
    "write to /dev/shm": attack("open('/dev/shm/grader-was-here', 'w').write('x'); return 1.0"),
    "write beside its own source": attack("open(os.__file__ + '.x', 'w').write('x'); return 1.0", imports="os"),
    "delete a file": attack("os.unlink(item['file']); return 1.0", imports="os"),
    "link a file": attack("os.link(item['file'], '/tmp/grader-link'); return 1.0", imports="os"),
    "make a folder": attack("os.mkdir('/tmp/grader-folder'); return 1.0", imports="os"),
    "change a mode": attack("os.chmod(item['file'], 0o777); return 1.0", imports="os"),
    "a file in memory": attack("os.write(os.memfd_create('a'), b'x' * 100); return 1.0", imports="os"),
    "open files that are inherited": attack(
        "found = 0\n"
        "for number in range(5, 64):\n"
        "    try: os.fstat(number); found += 1\n"
        "    except OSError: pass\n"
        "return float(found)",
        imports="os",
        scores=0.0,
    ),
    "import torch": attack("import torch; return 1.0"),
    "import boto3": attack("import boto3; return 1.0"),
    # Other processes
    "read another's memory by call": call(310, 270, "item['pid']", 0, 0, 0, 0, 0),
    "trace the trainer": call(101, 117, 16, "item['pid']", 0, 0),
    "open the trainer's files": call(438, 438, "item['pid']", 1, 0),
    "a handle of the trainer": call(434, 434, "item['pid']", 0),
    "signal the trainer": attack("os.kill(item['pid'], 0); return 1.0", imports="os"),
    "signal its supervisor": attack("os.kill(os.getppid(), 9); return 1.0", imports="os"),
    "signal everybody": attack("os.kill(-1, 0); return 1.0", imports="os"),
    "change the trainer's limits": call(302, 261, "item['pid']", 7, 0, 0),
    "be nice to the trainer": call(141, 140, 0, "item['pid']", 19),
    # The network
    "connect by TCP": attack("socket.create_connection(('127.0.0.1', item['port']), 2); return 1.0", imports="socket"),
    "send by UDP": attack(
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9)); return 1.0", imports="socket"
    ),
    "an abstract socket": attack("socket.socket(socket.AF_UNIX).connect('\\0evil'); return 1.0", imports="socket"),
    "look up a name": attack("socket.getaddrinfo('example.com', 80); return 1.0", imports="socket"),
    "a socket by call": call(41, 198, 2, 1, 0),
    "a pair of sockets": attack("socket.socketpair(); return 1.0", imports="socket"),
    # New processes and privileges
    "start a program": attack("subprocess.check_output(['/bin/id']); return 1.0", imports="subprocess"),
    "start a shell": attack("return float(os.system('id') == 0)", imports="os", scores=0.0),
    "fork": attack("os.fork(); return 1.0", imports="os"),
    "become a program": attack("os.execv('/bin/sh', ['sh', '-c', 'id']); return 1.0", imports="os"),
    "start a thread": attack("threading.Thread(target=print).start(); return 1.0", imports="threading"),
    "outlive the trainer": call(157, 167, 1, 0, 0, 0, 0),
    "be dumpable again": call(157, 167, 4, 1, 0, 0, 0),
    "a new namespace": call(272, 97, 0x10000000),
    "become root": attack("os.setuid(0); return 1.0", imports="os"),
    "mount": call(165, 40, 0, 0, 0, 0, 0),
    "io_uring": call(425, 425, 8, 0),
    "bpf": call(321, 280, 0, 0, 0),
    "userfaultfd": call(323, 282, 0),
    "keys of the kernel": call(248, 217, 0, 0, 0, 0, 0),
    "another seccomp filter": call(317, 277, 0, 0, 0),
    "another Landlock": call(444, 444, 0, 0, 1),
    "raise its limits": attack("resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); return 1.0", imports="resource"),
    # Time and memory
    "10 GB": attack("x = bytearray(10 << 30); return 1.0", ends_as=OUT_OF_MEMORY),
    "memory bit by bit": attack("x = []\nwhile True: x.append(bytearray(1 << 20))", ends_as=(*OUT_OF_MEMORY, *CUT)),
    "an endless loop": attack("while True: pass", ends_as=CUT),
    "sleep": attack("time.sleep(1000)", imports="time", ends_as=CUT),
    "a power in C": attack("return float((9 ** (9 ** 8)) % 7)", ends_as=CUT),
    "a pattern that explodes": attack(
        "return float(bool(re.match(r'(a|aa)+$', 'a' * 60 + 'b')))", imports="re", ends_as=CUT
    ),
    "signals ignored": attack(
        "[signal.signal(n, signal.SIG_IGN) for n in (2, 15)]\nwhile True: pass", imports="signal", ends_as=CUT
    ),
    "deep recursion": attack("f = lambda n: f(n + 1)\nreturn f(0)", ends_as=("RecursionError",)),
    # Its end and its protocol
    "os._exit": attack("os._exit(0)", imports="os", ends_as=GONE),
    "sys.exit": attack("sys.exit(3)", imports="sys", ends_as=("SystemExit",)),
    "a segmentation fault": attack("ctypes.string_at(0); return 1.0", imports="ctypes", ends_as=GONE),
    "abort": attack("os.abort()", imports="os", ends_as=GONE),
    "not a number": attack("return float('nan')", ends_as=("TypeError",)),
    "a text": attack("return '1'", ends_as=("TypeError",)),
    "an error whose text hangs": attack(
        "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E", ends_as=CUT
    ),
    "a flood of prints": attack("for _ in range(20000): print('x' * 100)\nreturn 1.0", scores=1.0),
    "a flood of answers": attack("while True: os.write(4, b'x' * 65536)", imports="os", ends_as=("Crash", "Timeout")),
    "another row's answer": attack(
        'os.write(4, b\'{"row": 7, "score": 9.0}\\n\'); return 0.0', imports="os", ends_as=GONE
    ),
    "an answer that is no number": attack(
        'os.write(4, b\'{"row": 0, "score": "1"}\\n\'); return 0.0', imports="os", ends_as=GONE
    ),
    "deep JSON": attack("os.write(4, b'[' * 60000 + b'\\n'); return 0.0", imports="os", ends_as=GONE),
    "no end of its answers": attack("os.close(4); return 0.0", imports="os", ends_as=(*GONE, "OSError")),
    # Loading
    "a hang while loading": Attack("while True: pass", ("Timeout",), at_load=True),
    "a read while loading": Attack(
        "open('/etc/passwd')\ndef grade(s, i): return 1.0", ("PermissionError",), at_load=True
    ),
    "no Python": Attack("def grade(s, i) return 1", ("SyntaxError",), at_load=True),
    "no grade": Attack("x = 1", ("AttributeError",), at_load=True),
}


@contextmanager
def bait() -> Iterator[dict[str, Any]]:
    """What the attacks are told of: this process, a file, an open port."""
    os.environ[SECRET] = "in the environment"
    with socket.socket() as server, tempfile.NamedTemporaryFile("w", suffix=".secret") as file:
        server.bind(("127.0.0.1", 0))
        server.listen(5)
        file.write("keys of the store")
        file.flush()
        try:
            yield {"pid": os.getpid(), "port": server.getsockname()[1], "file": file.name}
            if not Path(file.name).stat().st_size:
                raise AssertionError("the file was emptied")
        finally:
            del os.environ[SECRET]


def row(item: dict[str, Any]) -> bytes:
    """A row as a grader's process reads it."""
    return json.dumps({"sample": {"output_text": ""}, "item": item, "seed": "0"}).encode() + b"\n"


def carry_out(tried: Attack, item: dict[str, Any], *, fresh: bool = False) -> Outcome:
    """What becomes of it; an error while loading is that of its only row."""
    limits = GraderLimits(memory_mb=MEMORY_MB, fresh_process=fresh)
    process = ConfinedProcess("attack", tried.source, limits=limits, environment={})
    if tried.at_load:
        process.start_seconds = 2.0
    try:
        return process.run([row(item)], row_seconds=ROW_SECONDS, seconds=10.0)
    except LoadError as error:
        kind, _, message = str(error).partition(": ")
        return Outcome([RowFailure(kind, message)], "")
    finally:
        process.close()


def got_through(tried: Attack, outcome: Outcome) -> str:
    """What an attack achieved that it should not have; empty if nothing."""
    (result,) = outcome.results
    if isinstance(result, RowFailure):
        safe = tried.scores is None and result.type in tried.ends_as
        return "" if safe else f"it ended as {result.type}: {result.message}"
    return "" if result == tried.scores else f"it scored {result}"


def main() -> int:
    """Carry out all attacks."""
    bad = 0
    with bait() as item:
        for name, tried in ATTACKS.items():
            outcome = carry_out(tried, item)
            wrong = got_through(tried, outcome)
            bad += bool(wrong)
            print(f"{'GOT THROUGH' if wrong else 'held':12} {name:34} {wrong or outcome.results[0]}"[:160], flush=True)
    print(f"{len(ATTACKS) - bad} of {len(ATTACKS)} attacks were held")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
