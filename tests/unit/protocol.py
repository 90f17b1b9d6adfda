"""A model of how one job ends: two workers, the sweeper, its owner, the bucket, and a Valkey that may forget.

Every interleaving is searched, with crashes, requests that arrive late or whose answer is lost, and a Valkey that
comes back as it was on its disk. The rules are those of `jobs/` (each names where it stands), and each can be switched
off, to show what it is for. Storage and Valkey are reduced to what is decided by them: the put-once `outcome.json`, the
order in `control/`, the tickets in `epochs/`, and the record.

The lease has no clock here: a sweeper may take a job from any run at any time, as if its worker slept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the service holds to."""

    settles_only_what_stands: bool = True
    """`finalize`: the record ends when the bucket has said how; else a cancel that was not answered ends it."""
    reads_orders: bool = True
    """`orders`: a claim and a finish look for orders in the bucket; else they only know what the record says."""
    reconciles: bool = True
    """`valkey_recovery`: records that are older than the bucket are put right; else a job that Valkey forgot is not
    found."""
    jumps: bool = True
    """`prelude.lua`: the first number that another server gives lies above all that were given."""


class Violation(Exception):
    """The rules allow something that was promised not to happen."""


class Run(NamedTuple):
    """A worker. `finishing` has looked for orders; `asked` awaits the answer to its success, `ending` to its cancel."""

    phase: str = "idle"
    epoch: int = 0


class Record(NamedTuple):
    """The job in Valkey."""

    status: str = "queued"
    epoch: int = 0
    ordered: bool = False
    """The cancel was carried out."""


class World(NamedTuple):
    """Everything. What a client has seen stays seen."""

    record: Record | None = Record()
    disk: Record | None = None
    """What Valkey would come back with."""
    forgot: bool = False
    """It came back, and nobody has compared it with the bucket."""
    outcome: str = ""
    cancel: bool = False
    """In `control/`, and answered with 202."""
    tickets: int = 0
    wire: frozenset[str] = frozenset()
    """Outcomes that were sent and have not arrived; they may at any time, or never."""
    workers: tuple[Run, Run] = (Run(), Run())
    shown: str = ""
    """The end that a client was shown."""
    behind: bool = False
    """Events were given numbers that the record does not know of."""
    disk_behind: bool = True
    crashes: int = 1
    lapses: int = 1
    """How often a lease may run out under a worker that lives."""
    losses: int = 1


HELD = ("running", "cancelling")
ENDS = ("succeeded", "cancelled")
TICKETS = 3
"""Where the search stops: as many runs as a job is given here."""


class Model:
    """The reachable worlds under some rules."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.after: dict[World, list[tuple[str, World]]] = {}

    def search(self) -> int:
        """Visit every world; raises `Violation` with the way there. Returns how many there are."""
        start = World()
        came: dict[World, tuple[World, str] | None] = {start: None}
        queue = deque([start])
        while queue:
            world = queue.popleft()
            try:
                nexts = list(self._steps(world))
            except Violation as violation:
                raise Violation(f"{violation}: {' > '.join(_way(came, world))}") from None
            self.after[world] = nexts
            for name, new in nexts:
                if new not in came:
                    came[new] = (world, name)
                    queue.append(new)
        self._require_an_end(came)
        return len(came)

    def _require_an_end(self, came: dict[World, tuple[World, str] | None]) -> None:
        """From wherever it is, the service brings the job to an end, without luck and without its owner."""
        before: dict[World, list[World]] = {}
        for world, nexts in self.after.items():
            for name, new in nexts:
                if not name.startswith(("fault", "owner")):
                    before.setdefault(new, []).append(world)
        ended = {world for world in self.after if world.record and world.record.status in ENDS}
        queue = deque(ended)
        while queue:
            for world in before.get(queue.popleft(), ()):
                if world not in ended:
                    ended.add(world)
                    queue.append(world)
        lost = next((world for world in self.after if world not in ended and world.tickets < TICKETS), None)
        if lost is not None:
            raise Violation(f"an accepted job is lost: {' > '.join(_way(came, lost))}")

    def _steps(self, world: World) -> Iterator[tuple[str, World]]:
        yield from self._owner(world)
        yield from self._servers(world)
        yield from self._sweeper(world)
        for index in (0, 1):
            for name, new, run in self._worker(world, world.workers[index]):
                # Which worker is which does not matter: half as many worlds.
                first, second = sorted((run, world.workers[1 - index]))
                yield f"{name} (run {run.epoch or world.workers[index].epoch})", new._replace(workers=(first, second))

    def _owner(self, world: World) -> Iterator[tuple[str, World]]:
        record = world.record
        if world.cancel or record is None or record.status in ENDS or (record.status in HELD and world.outcome):
            return
        ordered = world._replace(cancel=True)
        # The process may die in between; with the old rule its note in Valkey would be all that others know of.
        yield "owner cancels", ordered if self.rules.reads_orders else self._carry_out(ordered)

    def _servers(self, world: World) -> Iterator[tuple[str, World]]:
        for outcome in world.wire:
            yield f"{outcome} arrives", self._put(world, outcome)._replace(wire=world.wire - {outcome})
            yield f"fault: {outcome} never arrives", world._replace(wire=world.wire - {outcome})
        if world.losses:
            yield "Valkey's disk has it", world._replace(disk=world.record, disk_behind=world.behind)
            lost = world._replace(record=world.disk, behind=world.disk_behind, forgot=True)
            yield "fault: Valkey comes back", lost._replace(losses=world.losses - 1)

    def _sweeper(self, world: World) -> Iterator[tuple[str, World]]:
        record, rules = world.record, self.rules
        if world.forgot and rules.reconciles:
            yield "reconciled", self._reconcile(world)
        if record is None:
            return
        if world.cancel and not record.ordered and rules.reads_orders:
            yield "order carried out", self._carry_out(world)
        if record.status in HELD:
            beats = any(run.phase not in ("idle", "ticketed") and run.epoch == record.epoch for run in world.workers)
            name = "fault: lease runs out" if beats else "lease runs out"
            if world.lapses or not beats:
                yield name, self._hand_back(world._replace(lapses=world.lapses - beats))

    def _worker(self, world: World, run: Run) -> Iterator[tuple[str, World, Run]]:
        """One worker; the worlds have it as it was."""
        if run.phase != "idle" and world.crashes:
            yield "fault: worker dies", world._replace(crashes=world.crashes - 1), Run()
        if world.record is None:
            return
        phases = {"idle": self._idle, "ticketed": self._ticketed, "running": self._running, "asked": self._asked}
        if run.phase == "finishing":
            yield "succeeds", world._replace(wire=world.wire | {"succeeded"}), run._replace(phase="asked")
        elif run.phase == "ending":
            yield self._ending(world, run)
        else:
            yield from phases[run.phase](world, world.record, run)

    def _idle(self, world: World, record: Record, run: Run) -> Iterator[tuple[str, World, Run]]:
        if record.status != "queued" or self._must_wait(world) or world.tickets == TICKETS:
            return
        if world.outcome:
            yield "settles", self._settle(world), run
        elif not (self.rules.reads_orders and world.cancel and not record.ordered):
            yield "ticket", world._replace(tickets=world.tickets + 1), Run("ticketed", world.tickets + 1)

    def _ticketed(self, world: World, record: Record, run: Run) -> Iterator[tuple[str, World, Run]]:
        if record.status == "queued" and record.epoch < run.epoch and not self._must_wait(world):
            yield "claims", self._change(world, "running", run.epoch), run._replace(phase="running")
        else:
            yield "comes late", world, Run()

    def _running(self, world: World, record: Record, run: Run) -> Iterator[tuple[str, World, Run]]:
        if record.epoch < run.epoch and record.status not in ENDS:
            yield "reclaims", self._change(world, "running", run.epoch), run
        elif record.epoch != run.epoch or record.status not in HELD:
            yield "is fenced", world, Run()
        elif record.status == "cancelling":
            yield self._cancel(world, run)
        elif world.cancel and self.rules.reads_orders:
            yield "reads the order", self._carry_out(world), run
        elif world.cancel and world.forgot:
            raise Violation("an order that was answered is not obeyed")
        else:
            yield "looks for orders", world, run._replace(phase="finishing")

    def _asked(self, world: World, record: Record, run: Run) -> Iterator[tuple[str, World, Run]]:
        if world.outcome:
            yield "is answered", self._settle(world), Run()
        elif record.epoch == run.epoch and record.status == "cancelling":
            yield self._cancel(world, run)
        elif not world.wire:
            yield "asks again", world._replace(wire=world.wire | {"succeeded"}), run

    def _cancel(self, world: World, run: Run) -> tuple[str, World, Run]:
        return "cancels", world._replace(wire=world.wire | {"cancelled"}), run._replace(phase="ending")

    def _ending(self, world: World, run: Run) -> tuple[str, World, Run]:
        if world.outcome:
            return "is answered", self._settle(world), Run()
        if self.rules.settles_only_what_stands:
            return "gives up", world, Run()
        return f"gives up run {run.epoch}", self._change(world, "cancelled"), Run()

    def _must_wait(self, world: World) -> bool:
        """Nobody claims anything of a Valkey that was not compared with the bucket."""
        return world.forgot and self.rules.reconciles

    def _put(self, world: World, outcome: str) -> World:
        if world.outcome:
            return world
        if world.shown:
            self._show(world, outcome)
        return world._replace(outcome=outcome)

    def _carry_out(self, world: World) -> World:
        record = world.record
        assert record is not None
        if record.status == "queued":
            return self._settle(self._put(world, "cancelled"))
        status = "cancelling" if record.status == "running" else record.status
        return self._change(world, status, ordered=True)

    def _hand_back(self, world: World) -> World:
        record = world.record
        assert record is not None
        if record.status == "cancelling":
            world = self._put(world, "cancelled")
        return self._settle(world) if world.outcome else self._change(world, "queued")

    def _reconcile(self, world: World) -> World:
        """A job without a record gets the one that its tickets and its outcome tell of."""
        if world.record is None:
            begun = world.tickets > 0
            world = world._replace(record=Record("queued", 0), behind=True)
            world = self._change(world, "running" if begun else "queued", world.tickets)
        if world.outcome and world.record and world.record.status not in ENDS:
            world = self._settle(world)
        return world._replace(forgot=False)

    def _settle(self, world: World) -> World:
        """The record says what `outcome.json` does."""
        return self._change(world, world.outcome)

    def _change(self, world: World, status: str, epoch: int | None = None, *, ordered: bool | None = None) -> World:
        """Change the record and tell of it, by the next number."""
        record = world.record
        assert record is not None
        new = Record(status, record.epoch if epoch is None else epoch, record.ordered if ordered is None else ordered)
        if new == record:
            return world
        if new.status != record.status and world.behind and not self.rules.jumps:
            raise Violation("an event number is used twice")
        world = world._replace(record=new, behind=False, disk_behind=True)
        if status not in ENDS:
            return world
        if world.outcome != status and (world.outcome or self.rules.settles_only_what_stands):
            raise Violation(f"the record says {status}, outcome.json {world.outcome or 'nothing'}")
        return self._show(world, status)

    def _show(self, world: World, status: str) -> World:
        if world.shown not in ("", status):
            raise Violation(f"a client was shown {world.shown}, and it is {status}")
        return world._replace(shown=status)


def _way(came: dict[World, tuple[World, str] | None], world: World) -> list[str]:
    steps: list[str] = []
    while (before := came[world]) is not None:
        world, step = before
        steps.append(step)
    return steps[::-1]
