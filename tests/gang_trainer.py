"""A training command of several ranks without torch: the project's own launcher, and ranks that meet at each step.

Rank 0 is `fake_trainer`; the others do what it tells them. As in a real run, no rank goes on without the others,
whoever loses another ends with `rank_lost`, and all stop after the same step. With `real` in the job's metadata it is
the real command, so that one Ray cluster serves both kinds of test. In the metadata:

    other_fails     an exit code with which the last rank fails, at its step `other_step` of the first run
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

from fake_trainer import Trainer  # beside this file, which runs as a program

from grpo_core.errors import EXIT_RANK_LOST, JobFailure
from grpo_core.processes import die_with_parent
from grpo_core.ranks import Host, Launcher, Rank, take_rank
from grpo_core.run_dir.layout import RunFolder
from grpo_core.run_dir.records import EventWriter

GO, STOP, END = b"g", b"s", b"e"
CODES = {13: "out_of_memory"}


class Lead(Trainer):
    """Rank 0."""

    def meet(self, rank: Rank) -> None:
        host, _, port = rank.address.removeprefix("tcp://").rpartition(":")
        door = socket.create_server((host, int(port)))
        self.others = [door.accept()[0] for _ in range(rank.count - 1)]

    def train_step(self, step: int) -> None:
        told = [self.exchange(other, STOP if self.stop else GO) for other in self.others]
        self.stop |= STOP in told
        super().train_step(step)

    def exchange(self, other: socket.socket, said: bytes) -> bytes:
        other.sendall(said)
        return heard_from(other)

    def checkpoint(self, step: int) -> None:
        super().checkpoint(step)
        if self.stop and self.others:
            self.say(STOP)
            self.others = []

    def write_result(self) -> int:
        self.say(END)
        return super().write_result()

    def say(self, word: bytes) -> None:
        for other in self.others:
            other.sendall(word)


def heard_from(other: socket.socket) -> bytes:
    said = other.recv(1)
    if not said:
        raise ConnectionError("it is gone")
    return said


def follow(rank: Rank, folder: RunFolder, how: dict[str, str], epoch: int) -> int:
    """Be another rank than 0."""
    assert rank.pulse is not None
    folder = folder.of_rank(rank.number)
    folder.create()
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    host, _, port = rank.address.removeprefix("tcp://").rpartition(":")
    lead = reach(host, int(port))
    steps, stops = 0, False
    # The first STOP is answered as GO is; the one after it says that the lead has saved.
    while (said := heard_from(lead)) == GO or (said == STOP and not stops):
        stops = said == STOP or bool(asked)
        steps += 1
        if "other_fails" in how and epoch == 1 and rank.number == rank.count - 1 and steps == int(how["other_step"]):
            code = int(how["other_fails"])
            EventWriter(folder.events, epoch=epoch).error(JobFailure(CODES[code], "Too little memory.").report)
            print("the last words of a rank", file=sys.stderr)
            return code
        lead.sendall(STOP if stops else GO)
    if said == STOP:
        return 75
    rank.pulse.done()
    return 0


def reach(host: str, port: int) -> socket.socket:
    while True:
        try:
            return socket.create_connection((host, port))
        except ConnectionRefusedError:
            time.sleep(0.05)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("spec", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epoch", type=int, default=1)
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--host", type=int, default=0)
    parser.add_argument("--meet", default="")
    parser.add_argument("--gradient-accumulation", type=int)
    options = parser.parse_args()
    spec = json.loads(options.spec.read_text())
    if "real" in spec["metadata"]:
        sys.argv = ["grpo_core", "train", *sys.argv[1:]]
        runpy.run_module("grpo_core", run_name="__main__")
    rank, folder = take_rank(os.environ), RunFolder(options.out)
    if rank is None and options.hosts > 1:
        host = Host(options.host, options.hosts, options.meet)
        return Launcher([sys.executable, *sys.argv], folder, 1, epoch=options.epoch, host=host).run()
    die_with_parent()
    parts = options.gradient_accumulation or spec["sampling"]["gradient_accumulation"]
    trainer = Lead(spec, options.out, options.epoch, parts)
    if rank is None:
        trainer.others = []
        return trainer.run()
    try:
        if not rank.is_lead:
            return follow(rank, folder, spec["metadata"], options.epoch)
        trainer.meet(rank)
        return trainer.run()
    except ConnectionError:
        return EXIT_RANK_LOST


if __name__ == "__main__":
    sys.exit(main())
