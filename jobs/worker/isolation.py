"""The isolation of training processes on their host: user, files, caches and memory.

Owns the decision, which is made and logged when a worker starts; `guardian` enforces it. Invariant: a job never reads
what another owner's job has left in a cache, unless the operator shares the caches.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grpo_core.confinement import landlock

GUARDIAN = Path(__file__).with_name("guardian.py")
ROOM = 0.9
"""Share of the machine's memory that a training process may use by default."""

_SYSTEM = (
    *("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/nix", "/sys", "/proc"),
    *("/run/systemd/resolve", "/run/resolvconf", "/run/nvidia", "/run/udev", "/run/opengl-driver"),
)
_ETC = tuple(
    f"/etc/{name}"
    for name in (
        *("alternatives", "ca-certificates", "crypto-policies", "group", "hostname", "host.conf", "hosts", "gai.conf"),
        *("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "machine-id", "mime.types", "nsswitch.conf"),
        *("os-release", "passwd", "pki", "protocols", "resolv.conf", "services", "ssl", "timezone", "OpenCL", "vulkan"),
        *("nvidia-container-runtime", "nvidia", "libibverbs.d", "rdma", "python3", "conda"),
    )
)
"""Readable files of `/etc`; others there may be an operator's keys."""
_USED = ("/dev", "/tmp/nvidia-mps")  # noqa: S108 - where CUDA looks for it
_SHARED_MEMORY = "/dev/shm"  # noqa: S108 - where libraries pass tensors between processes
_DEVICES = ("nvidia[0-9]*", "nvidiactl", "nvidia-uvm", "dri/render*", "kfd")
"""Devices for computing; the driver has further files that only root can open."""
_FOLDERS_NAMED = ("GRPO_MODEL_DIR", "GRPO_DATASET_DIR", "VIRTUAL_ENV", "CUDA_HOME", "CUDA_PATH", "XDG_DATA_HOME")
_PROGRAMS_NAMED = ("CC", "CXX")
"""Compilers, which Triton starts. A compiler reads files that are installed beside it."""
_FILES_NAMED = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR")
_PATHS_NAMED = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LIBRARY_PATH")
_OTHER_CACHES = (
    *("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE"),
    *("HF_ASSETS_CACHE", "HF_XET_CACHE", "HF_TOKEN_PATH", "TORCH_HOME", "TORCH_EXTENSIONS_DIR", "TRITON_HOME"),
    *("CUDA_CACHE_PATH", "VLLM_CONFIG_ROOT", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME"),
)
"""Variables that would lead past the owner's cache folder."""


@dataclass(frozen=True, kw_only=True)
class Isolation:
    """How this worker's training processes are separated from it and from each other."""

    users: range | None = None
    """Range of user ids, one for each owner of jobs; None: the worker's user."""
    landlock: bool = False
    caches: Path | None = None
    """Folder with a cache folder for each owner; None: all owners share the caches."""
    shared_caches: bool = False
    memory_bytes: int | None = None
    readable: tuple[str, ...] = ()

    def cache_of(self, owner: str) -> Path | None:
        """Return an owner's cache folder, which belongs to the owner's user. Raises `OSError` if no user id is left."""
        if self.caches is None:
            return None
        with _locked(self.caches):
            folder = self.caches / hashlib.sha256(owner.encode()).hexdigest()[:20]
            if not folder.exists():
                user = None if self.users is None else _free_user(self.caches, self.users)
                new = self.caches / f".{folder.name}"
                new.mkdir(mode=0o700, exist_ok=True)
                if user is not None:
                    os.chown(new, user, user)
                new.rename(folder)
        return folder

    def user_of(self, cache: Path | None) -> int | None:
        """Return the user id of a training process with this cache; None: the worker's user."""
        return None if self.users is None or cache is None else cache.stat().st_uid

    def environment(self, environment: Mapping[str, str], cache: Path | None, temporary: Path) -> dict[str, str]:
        """Return the environment with libraries' caches in the owner's folder, and temporary files in `temporary`."""
        changed = {**environment, "TMPDIR": str(temporary)}
        if cache is None or self.shared_caches:
            return changed
        kept = {name: value for name, value in changed.items() if name not in _OTHER_CACHES}
        return {**kept, **_cache_variables(cache)}

    def plan(
        self,
        launcher: Sequence[str],
        arguments: Sequence[str],
        environment: Mapping[str, str],
        *,
        user: int | None = None,
        writable: Iterable[Path] = (),
        scratch: Path | None = None,
    ) -> dict[str, Any]:
        """Return the plan for `guardian`."""
        plan: dict[str, Any] = {"argv": [*launcher, *arguments], "memory": self.memory_bytes}
        if scratch is not None:
            plan["file_bytes"] = max(shutil.disk_usage(scratch).free, machine_memory())
        if user is not None:
            plan |= {"user": user, "groups": device_groups()}
        if self.landlock:
            written = [str(path) for path in writable]
            if self.shared_caches:
                written += _shared_cache_folders(environment)
            plan |= {
                "readable": [*_SYSTEM, *_ETC, *code_folders(launcher, environment), *self.readable],
                # Python lists these to find packages; other files there must not be readable.
                "listable": [path for path in sys.path if path],
                # In /proc, a normal user can write only its own files, but root can also change kernel settings.
                "usable": [*_USED, "/proc" if user is not None or os.geteuid() != 0 else "/proc/self"],
                "writable": [*written, _SHARED_MEMORY],
            }
        return plan


def code_folders(launcher: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Return the folders of a training command's programs, libraries, models and data, beside those of the system."""
    found = [sys.prefix, sys.base_prefix, sys.exec_prefix, str(Path(__file__).resolve().parents[2] / "grpo_core")]
    for word in launcher:
        path = Path(shutil.which(word) or word)
        if path.is_absolute() and path.is_file():
            found += [str(path.parent), str(path.resolve().parent)]
    found += [environment[name] for name in (*_FOLDERS_NAMED, *_FILES_NAMED) if environment.get(name)]
    for name in (*_PROGRAMS_NAMED, "GRPO_GRADER_PYTHON"):
        if program := shutil.which(environment.get(name, "")):
            found += [str(Path(program).parent.parent), str(Path(program).resolve().parent.parent)]
    for name in _PATHS_NAMED:
        found += environment.get(name, "").split(os.pathsep)
    ours = {path for path in found if (Path(path) / "grpo_core").is_dir()}  # such as a folder with a whole stack in it
    return [path for path in dict.fromkeys(found) if path.startswith("/") and path != "/" and path not in ours]


def device_groups() -> list[int]:
    """Return the groups that may use the host's GPUs."""
    found: set[int] = set()
    for device in devices():
        state = device.stat()
        if state.st_gid and state.st_mode & stat.S_IWGRP:
            found.add(state.st_gid)
    return sorted(found)


def devices() -> list[Path]:
    """Return the device files of the host's GPUs."""
    return [path for pattern in _DEVICES for path in Path("/dev").glob(pattern) if path.is_char_device()]


def machine_memory() -> int:
    """Return the memory of the machine or its container in bytes."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([total, *_cgroup_limits()])


def _cgroup_limits() -> Iterator[int]:
    root = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            name = "memory.max" if not controllers else "memory.limit_in_bytes"
            base = root if not controllers else root / "memory"
            if controllers and "memory" not in controllers.split(","):
                continue
            folder = base / path.lstrip("/")
            for place in (folder, *folder.parents):
                with contextlib.suppress(OSError, ValueError):
                    yield int((place / name).read_text())
                if place == base:
                    break


def _cache_variables(cache: Path) -> dict[str, str]:
    return {
        "HOME": str(cache),
        "USER": "grpo",
        "LOGNAME": "grpo",
        "XDG_CACHE_HOME": str(cache),
        "HF_HOME": str(cache / "huggingface"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
    }


def _shared_cache_folders(environment: Mapping[str, str]) -> list[str]:
    """Return the cache folders in the worker's environment."""
    home = environment.get("HOME", "")
    names = ("HF_HOME", "XDG_CACHE_HOME", *_cache_variables(Path()), *_OTHER_CACHES)
    named = [environment[name] for name in names if name not in ("HOME", "USER", "LOGNAME") and environment.get(name)]
    usual = [str(Path(home) / name) for name in (".cache", ".triton", ".nv")] if home else []
    return [*named, *usual]


def _free_user(caches: Path, users: range) -> int:
    taken = {folder.stat().st_uid for folder in caches.iterdir()}
    free = next((user for user in users if user not in taken), None)
    if free is None:
        raise OSError(errno.EUSERS, f"all users of GRPO_CHILD_USERS have an owner's folder below {caches}")
    return free


@contextlib.contextmanager
def _locked(folder: Path) -> Generator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def guardian_argv(plan: Mapping[str, Any]) -> list[str]:
    """Return the command line of the guardian for a plan."""
    return [sys.executable, "-I", "-S", str(GUARDIAN), json.dumps(plan)]


def probe(plan: Mapping[str, Any], *, readable: Iterable[Path], writable: Iterable[Path]) -> str:
    """Return which paths a training process with this plan cannot access; empty if none."""
    looked_at = {"readable": list(map(str, readable)), "writable": list(map(str, writable))}
    with subprocess.Popen(  # noqa: S603 - our own program
        guardian_argv({**plan, "probe": looked_at}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None  # PIPE, above; for the type checker
        said = process.stdout.read().strip()  # to the end: closed standard input would end it before
        code = process.wait()
    return "" if code == 0 else said or f"exit status {code}"


def decide(asked: Isolation, launcher: Sequence[str], work_dir: Path) -> tuple[Isolation, list[str]]:
    """Return the part of the isolation that works on this machine, and why the rest does not."""
    caches = asked.caches
    assert caches is not None, "a worker has a folder of caches"
    try:
        caches.mkdir(parents=True, exist_ok=True)
        let_pass(caches)
    except OSError as error:
        reason = f"GRPO_CACHE_DIR {caches} cannot be used ({error.strerror}): the caches of all owners are one"
        return replace(asked, users=None, caches=None, shared_caches=True), [reason]
    reasons: list[str] = []
    if asked.users is not None and (trouble := _try_user(asked, launcher, work_dir)):
        asked = replace(asked, users=None)
        reasons.append(f"training processes keep root's number: {trouble}")
    if not asked.landlock:
        reasons.append("Landlock is off, too old or forbidden: a training process may read what its user may")
    if asked.landlock:
        reasons += _readable_places(asked, launcher, (work_dir, caches, Path.cwd() / ".grpo"))
    if asked.users is None and not asked.landlock:
        asked = replace(asked, shared_caches=True)
    return asked, reasons


def _readable_places(asked: Isolation, launcher: Sequence[str], places: Iterable[Path]) -> Iterator[str]:
    """Yield a warning for each folder with others' files or keys that every training process can read."""
    roots = [Path(path).resolve() for path in asked.plan(launcher, [], os.environ)["readable"]]
    for place in filter(Path.exists, places):
        if root := next((root for root in roots if place.resolve().is_relative_to(root)), None):
            yield f"{place} is below {root}, which training processes can read: move it and keys beside it elsewhere"


def without_landlock_on_cards(decided: Isolation, reasons: list[str]) -> tuple[Isolation, list[str]]:
    """Turn Landlock off for processes with root's user id, because CUDA and kernel settings both need `/proc`."""
    if not devices():
        return decided, reasons
    reason = "Landlock is off: with root's number, processes that training starts could not use the card under it"
    return replace(decided, landlock=False, shared_caches=True), [*reasons, reason]


def _try_user(asked: Isolation, launcher: Sequence[str], work_dir: Path) -> str:
    """Return what the first of the users cannot access; empty if it can access everything."""
    assert asked.users is not None, "asked only where there are users"
    user, environment = asked.users[0], dict(os.environ)
    named = [Path(environment[name]) for name in ("GRPO_MODEL_DIR", "GRPO_DATASET_DIR") if environment.get(name)]
    programs = [Path(path) for word in launcher if (path := shutil.which(word) or word) and Path(path).is_file()]
    ours = [Path(os.__file__).parent, Path(__file__).resolve().parents[2] / "grpo_core"]
    code = ours if launcher[0] == sys.executable else []
    with tempfile.TemporaryDirectory(prefix=".probe-", dir=work_dir) as name:
        os.chown(name, user, user)
        plan = asked.plan(launcher, [], environment, user=user, writable=[Path(name)])
        return probe(
            plan,
            readable=[*programs, *code, *filter(Path.is_dir, named)],
            writable=[Path(name), *devices()],
        )


def let_pass(folder: Path) -> None:
    """Let other users pass through a folder of root without listing it."""
    if os.geteuid() == 0 and folder.stat().st_uid == 0:
        folder.chmod(stat.S_IMODE(folder.stat().st_mode) | 0o711)


def usual_caches() -> Path:
    """Return the default folder of caches."""
    usual = "/var/cache" if os.geteuid() == 0 else os.path.expanduser("~/.cache")  # noqa: PTH111 - never raises
    return Path(os.environ.get("XDG_CACHE_HOME") or usual) / "grpo-jobs"


def landlock_works() -> bool:
    """Whether this kernel's Landlock is new enough."""
    return landlock.version() >= landlock.OLDEST
