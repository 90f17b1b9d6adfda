"""`python -m grpo_core train spec.json --out run/`: one job without a service, in one process or one per GPU.

Owns the command line and the process's environment; the run itself is `training`, starting several processes for it
`ranks`. Exits with the codes of `errors.EXIT_CODES`, 0 when done and 75 when asked to stop.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_core import egress, strict_json
from grpo_core.confinement.rights import hide_memory
from grpo_core.errors import EXIT_CHECKPOINTED, EXIT_CODES, EXIT_DONE
from grpo_core.hardware import micro_batch
from grpo_core.monitoring import trackers
from grpo_core.processes import die_with_parent
from grpo_core.ranks import ALONE, MAX_RANKS, Host, Launcher, Rank, take_rank
from grpo_core.reasons import FailureClass
from grpo_core.rewards.graders.operator import hosts_for
from grpo_core.run_dir.layout import RunFolder, write_json
from grpo_core.signals import StoppedEarly, StopRequest, dump_stacks_when_asked
from grpo_core.spec import JobSpec, SpecError, parse_spec

_BAD_REQUEST = EXIT_CODES[FailureClass.USER_CONFIG]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run the job, return the exit code."""
    options = _parser().parse_args(arguments)
    if options.command == "report":
        return _report(options.run)
    rank = take_rank(os.environ)
    hide_memory()
    die_with_parent()
    dump_stacks_when_asked()
    stop = StopRequest()
    try:
        stop.listen()
        folder = RunFolder(options.out)
        spec = _read_spec(options.spec)
        if spec is None:
            return _BAD_REQUEST
        if rank is None and (reason := _why_not_on(options, spec)):
            _complain(reason)
            return _BAD_REQUEST
        count, hosts = options.ranks or max(1, spec.resources.gpus), options.hosts or 1
        if rank is None and count * hosts > 1 and spec.has_steps and not folder.is_used():
            command = [sys.executable, "-m", "grpo_core", *(sys.argv[1:] if arguments is None else arguments)]
            host = Host(options.host, hosts, options.meet) if hosts > 1 else Host()
            return Launcher(command, folder, count, epoch=options.epoch, host=host).run()
        return _train(options, spec, folder, stop, rank or ALONE)
    except StoppedEarly:
        return EXIT_CHECKPOINTED


def _train(options: argparse.Namespace, spec: JobSpec, folder: RunFolder, stop: StopRequest, rank: Rank) -> int:
    parts: int | None = options.gradient_accumulation
    if parts is not None and (reason := _why_not_in(parts, spec)):
        _complain(f"--gradient-accumulation {parts}: {reason}")
        return _BAD_REQUEST
    if folder.of_rank(rank.number).is_used():
        _complain(f"{folder.root} already holds a run; choose another folder with --out.")
        return _BAD_REQUEST
    if rank.is_lead and not folder.spec.exists():
        write_json(folder.spec, spec.as_dict())
    _prepare_environment()
    if not spec.has_steps:
        egress.install(())
        from grpo_core import kinds

        return kinds.run(spec, folder, epoch=options.epoch, stop=stop)
    egress.install((*trackers.hosts(spec, os.environ), *hosts_for(spec.rewards.graders, os.environ)))
    from grpo_core.training.run import run

    return run(
        spec,
        folder,
        epoch=options.epoch,
        stop=stop,
        resume=options.resume or (folder.resume if folder.resume.is_dir() else None),
        accumulation=parts,
        rank=rank,
        listener=_Progress(spec.training.steps) if rank.is_lead else None,
    )


def _report(folder: Path) -> int:
    from grpo_core import report_page

    try:
        sys.stdout.write(f"{report_page.write(folder)}\n")
    except FileNotFoundError as error:
        _complain(f"{folder} is no run folder: it has no {Path(error.filename).name}.")
        return _BAD_REQUEST
    except ModuleNotFoundError as error:
        _complain(f"The report needs {error.name}, which is not installed: pip install {error.name}.")
        return _BAD_REQUEST
    return EXIT_DONE


def _why_not_on(options: argparse.Namespace, spec: JobSpec) -> str:
    """Why the options for several hosts are invalid, or an empty string."""
    hosts: int | None = options.hosts
    if hosts is None and spec.resources.hosts > 1:
        return (
            f"The job asks for {spec.resources.hosts} hosts (resources.hosts): start this command on each, "
            "with --hosts, --host and --meet."
        )
    if hosts is None or hosts == 1:
        return ""
    if not options.meet or options.host >= hosts:
        return f"With --hosts {hosts}, give --meet, and --host from 0 to {hosts - 1}."
    count = hosts * (options.ranks or max(1, spec.resources.gpus))
    if count > spec.completions_per_step:
        return f"A step has {spec.completions_per_step} completions, too few for {count} processes."
    return ""


def _why_not_in(parts: int, spec: JobSpec) -> str:
    """Why `--gradient-accumulation` is invalid for this spec, or an empty string."""
    if parts == spec.sampling.gradient_accumulation:
        return ""
    legal = micro_batch.splits(spec)
    if parts not in legal:
        return f"a step has {spec.completions_per_step} completions; use one of {', '.join(map(str, legal[:12]))}."
    if not micro_batch.keeps_objective(spec):
        return f"loss.type {spec.loss.type} depends on the parts; change sampling.gradient_accumulation in the spec."
    return ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m grpo_core", description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    report = commands.add_parser("report", help="write report.html into a run folder: how the run went, in one file")
    report.add_argument("run", type=Path, metavar="RUN_DIR", help="the run folder")
    train = commands.add_parser("train", help="run one job")
    train.add_argument("spec", type=Path, metavar="SPEC", help="the job spec, a JSON file")
    train.add_argument("--out", type=Path, required=True, metavar="DIR", help="the run folder, made if need be")
    train.add_argument("--epoch", type=_positive, default=1, metavar="N", help="number of this run of the job")
    train.add_argument(
        "--resume",
        type=Path,
        metavar="DIR",
        help="resume from this checkpoint of the same spec (default: inputs/resume in the run folder, if it exists)",
    )
    train.add_argument(
        "--gradient-accumulation",
        type=_positive,
        metavar="M",
        help="train on each step's completions in M parts instead of the spec's number: less memory, the same step",
    )
    train.add_argument(
        "--ranks",
        type=_positive,
        choices=range(1, MAX_RANKS + 1),
        metavar="N",
        help="train in this many processes together (default: one a card, resources.gpus of them)",
    )
    train.add_argument(
        "--hosts",
        type=_positive,
        metavar="N",
        help="train on this many hosts together; start the same command on each",
    )
    train.add_argument("--host", type=_index, default=0, metavar="I", help="which of them this is, from 0")
    train.add_argument(
        "--meet", type=_meeting, metavar="ADDRESS:PORT", help="an address of host 0, and a free port there"
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("is counted from 1")
    return value


def _index(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("is counted from 0")
    return value


def _meeting(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal():
        raise argparse.ArgumentTypeError("is ADDRESS:PORT, such as 10.0.0.1:29500")
    return text


def _read_spec(file: Path) -> JobSpec | None:
    """The spec, or None after saying what is wrong with it."""
    try:
        return parse_spec(strict_json.loads(file.read_bytes()))
    except OSError as error:
        _complain(f"{file}: {error.strerror}.")
    except strict_json.StrictJsonError as error:
        _complain(f"{file}: {error}")
    except SpecError as error:
        for problem in error.problems:
            _complain(f"{file}: {problem.pointer or '/'} {problem.detail}. {problem.remedy}")
    return None


def _complain(text: str) -> None:
    sys.stderr.write(text + "\n")


def _prepare_environment() -> None:
    """What must be set before torch and its friends are imported; what the caller set is kept."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # One core is left to other processes: on two busy cores, two threads were up to ten times slower than one.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores - 1)))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


class _Progress:
    """Prints a line for each event, for a run that was started by hand."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def __call__(self, event: dict[str, Any]) -> None:
        line = self._line(event["type"], event["data"])
        if line:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()

    def _line(self, type_: str, data: dict[str, Any]) -> str:
        match type_:
            case "status":
                return f"{data['phase']} ..."
            case "metric":
                return (
                    f"step {data['step']}/{self._steps}: reward {data['reward']:.3f}, loss {data['loss']:.4f}, "
                    f"{data['completion_tokens_mean']:.0f} tokens, {data['seconds']['total']:.2f} s"
                )
            case "checkpoint":
                return f"wrote {data['path']}"
            case "warning" | "log":
                return data["message"]
            case "error":
                return f"failed ({data['class']}): {data['message']}\n{data['hint']}".rstrip()
            case _:
                return ""


if __name__ == "__main__":
    sys.exit(main())
