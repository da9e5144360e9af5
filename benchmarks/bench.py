"""raylaunch beside its peers, in one interleaved run. `make bench`; README.md in this folder says how it is measured.

python -m benchmarks.bench [--rounds 4] [--only kill,node] [--peers raylaunch,torchrun] [--quick] [--write]
python -m benchmarks.bench --table SAMPLES [--write]
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata

from benchmarks.scenarios import PEERS, ROWS, SCENARIOS, Scenario
from benchmarks.session import ROOT
from benchmarks.table import Sample, failures, read, table, write_between

README = os.path.join(ROOT, "benchmarks", "README.md")
#: What `--quick` goes through, unless it is told: the rest takes minutes.
QUICK = ("import", "kill", "held", "pulse")


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as Ctrl-C does: what runs is cleaned up first
    options = arguments()
    text = report(read(options.table or measure(options)))
    print(f"\n{text}")
    if options.write:
        write_between(README, text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=4, help="how often all peers take their turn (default: 4)")
    parser.add_argument("--quick", action="store_true", help="one round with one kill, to see that it works")
    parser.add_argument("--kills", type=int, help="how many ranks are killed in a session, for all peers")
    parser.add_argument("--only", type=names(SCENARIOS), help=", ".join(SCENARIOS))
    parser.add_argument("--peers", type=names(PEERS), default=tuple(PEERS), help=", ".join(PEERS))
    parser.add_argument("--out", default=os.path.join(ROOT, "build", "bench"), help="where samples and outputs go")
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/README.md")
    parser.add_argument("--table", metavar="SAMPLES", help="measure nothing; print the table of an earlier run")
    options = parser.parse_args()
    options.only = options.only or (QUICK if options.quick else tuple(SCENARIOS))
    return options


def names(allowed: Mapping[str, object]) -> Callable[[str], tuple[str, ...]]:
    """A parser of a list of names."""

    def parse(text: str) -> tuple[str, ...]:
        chosen = tuple(name.strip() for name in text.split(","))
        unknown = [name for name in chosen if name not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(f"there is no {unknown[0]!r}; there are: {', '.join(allowed)}")
        return chosen

    return parse


def measure(options: argparse.Namespace) -> str:
    """Measure; returns the path of the samples."""
    folder = os.path.join(options.out, time.strftime("%Y%m%d-%H%M%S"))
    os.makedirs(folder)
    path = os.path.join(folder, "samples.jsonl")
    print(f"samples and outputs: {folder}")
    started = time.monotonic()
    with open(path, "w", encoding="ascii") as file:
        for number in range(1, 1 + (1 if options.quick else options.rounds)):
            for name in options.only:
                for peer in turns(SCENARIOS[name], options.peers, number):
                    for sample in session(name, peer, number, folder, options):
                        file.write(sample.line() + "\n")
                        file.flush()
    print(f"{time.monotonic() - started:.0f} s in all")
    return path


def turns(scenario: Scenario, chosen: Sequence[str], number: int) -> list[str]:
    """The peers' order in a round: each round another one begins, so that nobody always follows the same."""
    if number > scenario.rounds:
        return []
    peers = [peer for peer in scenario.peers if peer in chosen]
    first = (number - 1) % len(peers) if peers else 0
    return peers[first:] + peers[:first]


def session(name: str, peer: str, number: int, folder: str, options: argparse.Namespace) -> list[Sample]:
    """One session, told on the terminal."""
    kills = options.kills or (1 if options.quick else PEERS[peer].kills)
    place = os.path.join(folder, f"{number}-{name}-{peer.replace('/', '-')}")
    started = time.monotonic()
    samples: list[Sample] = []
    try:
        samples.extend(SCENARIOS[name].run(replace(PEERS[peer], kills=kills), number, place))
    except Exception as error:  # a mistake of ours: to be seen in the table, and no reason to lose all the others
        samples.append(Sample(SCENARIOS[name].what[0], peer, number, None, f"the benchmark itself: {error!r}"))
    print(f"round {number}  {name:7} {peer:22} {time.monotonic() - started:5.0f} s ", end="")
    for what in SCENARIOS[name].what:
        row = next(row for row in ROWS if row.what == what)
        found = [sample for sample in samples if sample.what == what]
        shown = (
            f"{s.value * row.factor:.{row.digits}f}" if s.value is not None else f"FAILED ({s.why})" for s in found
        )
        if found:
            print(f" {what}: {' '.join(shown)}", end="")
    print(flush=True)
    return samples


def report(samples: list[Sample]) -> str:
    """The table, what failed, and where it was taken."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("raylaunch", "torch", "ray"))
    rounds = max((sample.round for sample in samples), default=0)
    where = (
        f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}, Python {platform.python_version()}"
    )
    text = f"{time.strftime('%Y-%m-%d')}; {where}; {versions}; rounds: {rounds}.\n\n{table(ROWS, samples)}"
    failed = failures(samples)
    return f"{text}\nWhat failed:\n\n{failed}" if failed else text


if __name__ == "__main__":
    main()
