"""The path of a recovery with warm spares, millisecond by millisecond: where the time between kill and all-reduce goes.

    python -m benchmarks.recovery_path [--kills 20] [--write]

One run of four ranks on one node; one rank after the other is killed. Times come from raylaunch's journal, from clocks
that `probes.py` sets into driver and workers, and from the ranks. Of what several ranks do, the last one's counts.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from typing import Any

from benchmarks.peers import Order
from benchmarks.quiet import wait_until_quiet
from benchmarks.scenarios import ARMED_SECONDS, END_SECONDS, RANKS, RECOVERY_SECONDS, START_SECONDS
from benchmarks.session import ROOT, Note, Session, kill
from benchmarks.table import median, quartiles, write_between

#: What happens, in order, and where.
STEPS = {
    "the shell has the first news": "driver",
    "the event goes to the coordinator": "driver",
    "the decision is back": "driver",
    "all ranks' messages are sent": "driver",
    "message arrived": "last rank",
    "function unpacked": "last rank",
    "process group formed": "last rank",
    "train_fn called": "last rank",
    "first all-reduce done": "last rank",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery_path", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    options = parser.parse_args()
    text = table(paths(options.kills))
    print(text)
    if options.write:
        write_between(os.path.join(ROOT, "docs", "performance.md"), text)


def paths(kills: int) -> list[dict[str, float]]:
    """Kill so many ranks; the path of each recovery."""
    with tempfile.TemporaryDirectory(prefix="rlp-") as parent:
        order = Order(os.path.join(parent, "run"), "idle", restarts=-1)
        with Session("benchmarks.probes", order, {}) as session:
            group = session.wait_for_group("the first all-reduce", RANKS, START_SECONDS)
            killed: list[tuple[float, list[Note]]] = []
            for count in range(kills):
                session.wait_until_armed(group, ARMED_SECONDS)
                wait_until_quiet()
                at = kill([group[count % RANKS].pid])
                group = session.wait_for_group("the first all-reduce after a kill", RANKS, RECOVERY_SECONDS, at)
                killed.append((at, group))
            session.end(END_SECONDS)
            driver = session.read("driver")
            with open(os.path.join(order.folder, "bench", "journal.jsonl"), encoding="utf-8") as file:
                journal = [json.loads(line) for line in file]
            return [
                path_of(at, [session.read(f"path-{n.pid}") for n in notes], driver, journal) for at, notes in killed
            ]


def path_of(
    killed: float, ranks: list[dict[str, float]], driver: list[tuple[str, int, float]], journal: list[dict[str, Any]]
) -> dict[str, float]:
    """Seconds from a kill to each step."""
    events = [line for line in journal if "event" in line and line["at"] > killed]
    news = next(line for line in events if line["event"] in ("WorkerLost", "WorkerFailed"))
    decision = next(
        line["seq"]
        for line in journal
        if line["seq"] >= news["seq"] and any(c["command"] == "Promote" for c in line.get("commands", ()))
    )
    formed = max(rank["process group formed"] for rank in ranks)
    times = {
        "the shell has the first news": news["at"],
        "the event goes to the coordinator": _time(driver, "event", decision),
        "the decision is back": _time(driver, "decision", decision),
        "all ranks' messages are sent": max(at for what, _, at in driver if what == "promote" and killed < at < formed),
    }
    times |= {step: max(rank[step] for rank in ranks) for step, where in STEPS.items() if where == "last rank"}
    return {step: at - killed for step, at in times.items()}


def _time(driver: list[tuple[str, int, float]], what: str, seq: int) -> float:
    return next(at for name, number, at in driver if name == what and number == seq)


def table(paths: list[dict[str, float]]) -> str:
    """Medians of the times from the kill, and of what each step took."""
    lines = ["| ms after the kill | middle half | step took | where | what |", "|---|---|---|---|---|"]
    before = [0.0] * len(paths)
    for step, where in STEPS.items():
        now = [path[step] for path in paths]
        low, high = quartiles(now)
        took = median([after - earlier for after, earlier in zip(now, before, strict=True)])
        cells = f"{median(now) * 1e3:.1f}", f"{low * 1e3:.1f} - {high * 1e3:.1f}", f"{took * 1e3:.1f}", where, step
        lines.append(f"| {' | '.join(cells)} |")
        before = now
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
