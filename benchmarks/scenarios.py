"""What is measured: the peers with their settings, the scenarios that they go through, the rows of the table.

A scenario is one session of one peer, and yields samples. The first failure ends the session.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.peers import Order
from benchmarks.quiet import wait_until_quiet
from benchmarks.session import Failed, NoEnd, Note, Session, kill, tree
from benchmarks.table import OURS, Goal, Row, Sample

#: Limits, in seconds. What takes longer has failed.
START_SECONDS = 90.0
RECOVERY_SECONDS = 30.0
NODE_RECOVERY_SECONDS = 45.0
END_SECONDS = 30.0
#: Until all spares are warm (raylaunch alone has any).
ARMED_SECONDS = 60.0
#: How many failures a run may survive for each that is made: some peers need several restarts for one.
RESTARTS_PER_KILL = 3
RANKS = 4
EIGHT = 8
HELD_RUNS = 4
IMPORTS = 5


@dataclass(frozen=True)
class Peer:
    """A launcher with its settings. `kills`: how many ranks are killed in one session, one after the other."""

    name: str
    module: str
    options: dict[str, Any] = field(default_factory=dict)
    environ: dict[str, str] = field(default_factory=dict)
    kills: int = 1


COLD = f"{OURS}/no-spares"
PROCESS, COMMAND = f"{OURS}/process", f"{OURS}/command"
TORCHRUN, UNSHARED = "torchrun", "torchrun/own-store"
RAY_TRAIN = "ray-train"
ACTORS = "bare-actors"

PEERS = {
    peer.name: peer
    for peer in (
        Peer(OURS, "benchmarks.peers.with_raylaunch", {"spares": "auto"}, kills=6),
        Peer(COLD, "benchmarks.peers.with_raylaunch", {"spares": 0}, kills=3),
        Peer(PROCESS, "benchmarks.peers.with_raylaunch", {"spares": 0, "isolation": "process"}, kills=6),
        Peer(COMMAND, "benchmarks.peers.with_raylaunch_command", kills=6),
        Peer(TORCHRUN, "benchmarks.peers.with_torchrun"),
        Peer(UNSHARED, "benchmarks.peers.with_torchrun", environ={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}),
        Peer(
            RAY_TRAIN,
            "benchmarks.peers.with_ray_train",
            # Having lost a node, Ray Train 2.60 waits this long for as many workers as before. Its default of 60 s
            # would be all that is measured.
            environ={"RAY_TRAIN_V2_ENABLED": "1", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "12"},
            kills=2,
        ),
        Peer(ACTORS, "benchmarks.peers.with_actors", kills=2),
    )
}


def start_and_kill(peer: Peer, number: int, folder: str) -> Iterator[Sample]:
    """A run starts, and then loses a rank, as often as `peer.kills` says; which one changes."""
    order = Order(folder, "idle", restarts=RESTARTS_PER_KILL * peer.kills, options=peer.options)
    with Session(peer.module, order, peer.environ) as session:
        try:
            group = session.wait_for_group("the first all-reduce", RANKS, START_SECONDS)
        except Failed as failed:
            yield Sample("start", peer.name, number, None, str(failed))
            return
        yield Sample("start", peer.name, number, max(note.at for note in group) - session.read("called"))
        recovered: list[float] = []
        try:
            for count in range(peer.kills):
                session.wait_until_armed(group, ARMED_SECONDS)
                wait_until_quiet()
                at = kill([group[(number + count) % RANKS].pid])
                group = session.wait_for_group("the first all-reduce after a kill", RANKS, RECOVERY_SECONDS, at)
                recovered.append(max(note.at for note in group) - at)
            for size in coordinator_memory(session):
                yield Sample("memory", peer.name, number, size)
            session.end(END_SECONDS)
        except Failed as failed:
            if isinstance(failed, NoEnd):
                recovered.pop()  # a recovery after which the run can't end is none
            yield Sample("kill", peer.name, number, None, str(failed))
        for seconds in recovered:
            yield Sample("kill", peer.name, number, seconds)


def start_eight(peer: Peer, number: int, folder: str) -> Iterator[Sample]:
    """A run with eight ranks starts."""
    order = Order(folder, "once", workers=(EIGHT, EIGHT), restarts=0, options=peer.options)
    with Session(peer.module, order, peer.environ) as session:
        try:
            group = session.wait_for_group("the first all-reduce", EIGHT, START_SECONDS)
            yield Sample("eight", peer.name, number, max(note.at for note in group) - session.read("called"))
        except Failed as failed:
            yield Sample("eight", peer.name, number, None, str(failed))


def end_at_once(peer: Peer, number: int, folder: str) -> Iterator[Sample]:
    """One node of up to two, and a program that ends at once."""
    order = Order(folder, "none", restarts=0, options={**peer.options, "elastic": True})
    with Session(peer.module, order, peer.environ) as session:
        try:
            session.finish(START_SECONDS)
            yield Sample("true", peer.name, number, session.read("ended") - session.read("called"))
        except Failed as failed:
            yield Sample("true", peer.name, number, None, str(failed))


def lose_node(peer: Peer, number: int, folder: str) -> Iterator[Sample]:
    """Two ranks on each of two nodes; one node is killed, the one without driver and store; two ranks go on."""
    order = Order(folder, "idle", workers=(2, RANKS), nodes=2, restarts=RESTARTS_PER_KILL, options=peer.options)
    with Session(peer.module, order, peer.environ) as session:
        try:
            group = session.wait_for_group("the first all-reduce", RANKS, START_SECONDS)
            armed = session.wait_until_armed(group, ARMED_SECONDS)
            wait_until_quiet()
            doomed = tree(armed["victim"])
            _check_spread(group, doomed)
            at = kill(doomed)
            group = session.wait_for_group("the survivors' first all-reduce", RANKS // 2, NODE_RECOVERY_SECONDS, at)
            session.end(END_SECONDS)
            yield Sample("node", peer.name, number, max(note.at for note in group) - at)
        except Failed as failed:
            yield Sample("node", peer.name, number, None, str(failed))


def _check_spread(group: list[Note], doomed: list[int]) -> None:
    there = sum(note.pid in doomed for note in group)
    if there != RANKS // 2:
        raise Failed(f"before the node was killed: {there} ranks were on it, instead of {RANKS // 2}")


def held(peer: Peer, number: int, folder: str) -> Iterator[Sample]:
    """Runs of one held launcher, one after the other; the first is not counted."""
    order = Order(folder, "once", restarts=0, options={**peer.options, "held": HELD_RUNS})
    with Session(peer.module, order, peer.environ) as session:
        try:
            session.finish(START_SECONDS + HELD_RUNS * END_SECONDS)
            for run in range(1, HELD_RUNS):
                notes = session.group(RANKS, folder=f"run-{run}")
                assert notes is not None, "a run ends when all its ranks have returned"
                yield Sample("held", peer.name, number, max(note.at for note in notes) - session.read(f"called-{run}"))
        except Failed as failed:
            yield Sample("held", peer.name, number, None, str(failed))


def train_digits(peer: Peer, number: int, folder: str) -> Iterator[Sample]:
    """Steps per second of DDP on the handwritten digits, while the launcher has nothing else to do."""
    order = Order(folder, "digits", restarts=0, options=peer.options)
    with Session(peer.module, order, peer.environ) as session:
        try:
            group = session.wait_for_group("the first steps", RANKS, START_SECONDS)
            session.wait_until_armed(group, ARMED_SECONDS)
            wait_until_quiet()
            session.say("go")
            speeds: list[float] = session.wait_for("the timed steps", lambda: session.read("speeds"), START_SECONDS)
            session.end(END_SECONDS)
            for speed in speeds:
                yield Sample("digits", peer.name, number, speed)
        except Failed as failed:
            yield Sample("digits", peer.name, number, None, str(failed))


def import_it(peer: Peer, number: int, _folder: str) -> Iterator[Sample]:
    """`import raylaunch` in a new process, which must bring neither torch nor Ray."""
    program = (
        "import json, sys, time; started = time.perf_counter(); import raylaunch;"
        " print(json.dumps([time.perf_counter() - started, sorted({'torch', 'ray', 'numpy'} & set(sys.modules))]))"
    )
    wait_until_quiet()
    for _ in range(IMPORTS):
        out = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True).stdout
        seconds, brought = json.loads(out)
        if brought:
            yield Sample("import", peer.name, number, None, f"it imports {', '.join(brought)}")
        else:
            yield Sample("import", peer.name, number, seconds)


def pulse(peer: Peer, number: int, folder: str) -> Iterator[Sample]:
    """See `benchmarks.pulse`."""
    with Session("benchmarks.pulse", Order(folder, "none"), {}) as session:
        try:
            session.finish(START_SECONDS)
            yield Sample("pulse", peer.name, number, session.read("pulse")["share"])
        except Failed as failed:
            yield Sample("pulse", peer.name, number, None, str(failed))


def coordinator_memory(session: Session) -> Iterator[float]:
    """The resident size of each coordinator actor in a run, in bytes. Other launchers have none."""
    for pid, command in session.processes().items():
        if command.startswith("ray::CoordinatorActor"):
            with open(f"/proc/{pid}/statm", encoding="ascii") as file:
                yield int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Scenario:
    """`rounds`: no more of them than this, whatever is asked for. `what`: the rows of its samples."""

    run: Callable[[Peer, int, str], Iterator[Sample]]
    peers: tuple[str, ...]
    what: tuple[str, ...]
    rounds: int = 1_000_000


ALL = tuple(PEERS)
SCENARIOS = {
    "import": Scenario(import_it, (OURS,), ("import",)),
    "kill": Scenario(start_and_kill, ALL, ("start", "kill", "memory")),
    "held": Scenario(held, (OURS,), ("held",)),
    "digits": Scenario(train_digits, (OURS, TORCHRUN), ("digits",)),
    "eight": Scenario(start_eight, (COMMAND, PROCESS, TORCHRUN), ("eight",)),
    "true": Scenario(end_at_once, (COMMAND, TORCHRUN), ("true",), rounds=2),
    "node": Scenario(lose_node, (OURS, TORCHRUN, UNSHARED, RAY_TRAIN), ("node",), rounds=2),
    "pulse": Scenario(pulse, (OURS,), ("pulse",), rounds=1),
}

ROWS = (
    Row(
        "kill",
        "SIGKILL of a rank -> first all-reduce of the new group",
        "s",
        ALL,
        {OURS: (Goal(0.15),), COLD: (Goal(2.5),), PROCESS: (Goal(0.3),), COMMAND: (Goal(0.3),)},
    ),
    Row(
        "node",
        "a node's raylet and workers killed -> first all-reduce of the survivors",
        "s",
        (OURS, TORCHRUN, UNSHARED, RAY_TRAIN),
        {OURS: (Goal(1.0),)},
    ),
    Row(
        "start",
        "launch on a running cluster -> first all-reduce",
        "s",
        ALL,
        {
            OURS: (Goal(1.4, of=TORCHRUN), Goal(1 / 3, of=RAY_TRAIN)),
            PROCESS: (Goal(0.6, of=TORCHRUN),),
            COMMAND: (Goal(1.0, of=TORCHRUN),),
        },
    ),
    Row(
        "eight",
        "the same with 8 ranks",
        "s",
        (COMMAND, PROCESS, TORCHRUN),
        {COMMAND: (Goal(1 / 1.5, of=TORCHRUN),)},
    ),
    Row(
        "true",
        "one node of up to two, and `true`: until it has ended",
        "s",
        (COMMAND, TORCHRUN),
        {COMMAND: (Goal(5.0),)},
    ),
    Row("held", "second run of a held launcher -> first all-reduce", "s", (OURS,), {OURS: (Goal(0.15),)}),
    Row(
        "digits",
        "training on the digits",
        "steps per second",
        (OURS, TORCHRUN),
        {OURS: (Goal(0.98, of=TORCHRUN, least=True),)},
        digits=1,
        more_is_better=True,
    ),
    Row("memory", "the coordinator's memory", "MB", (OURS,), {OURS: (Goal(150),)}, digits=0, factor=1e-6),
    Row(
        "import",
        "`import raylaunch`, without torch, Ray and numpy",
        "ms",
        (OURS,),
        {OURS: (Goal(50),)},
        digits=0,
        factor=1e3,
    ),
    Row(
        "pulse",
        "all pulses of 1,024 workers at the coordinator",
        "% of a core",
        (OURS,),
        {OURS: (Goal(10),)},
        digits=1,
        factor=100,
    ),
)
