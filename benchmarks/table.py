"""From samples to a table. A failure is a sample too: it counts in `done`, and never in a median."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

#: Where a page keeps a table that a program writes.
BEGIN, END = "<!-- written by a program: begin -->\n", "<!-- written by a program: end -->\n"
#: Whose median the others are compared with.
OURS = "raylaunch"
HEADER = ("what", "launcher", "done", "median", "middle half", "worst", "to raylaunch", "must reach")


@dataclass(frozen=True)
class Sample:
    """One measurement. `value` is None where it failed, and `why` says how."""

    what: str
    peer: str
    round: int
    value: float | None
    why: str = ""

    def line(self) -> str:
        """As a line of JSON."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Goal:
    """What our median must reach. `of`: the bound is a ratio to that peer's median. `least`: it is a lower bound."""

    bound: float
    of: str = ""
    least: bool = False


@dataclass(frozen=True)
class Row:
    """One thing that is measured: one part of the table.

    Attributes:
        unit: of its values; `factor` makes it from what the samples hold.
        peers: in the table's order. Ours are those whose names begin with `OURS`.
        goals: for each of ours.
        more_is_better: and so the worst is the least.
    """

    what: str
    title: str
    unit: str
    peers: tuple[str, ...]
    goals: dict[str, tuple[Goal, ...]]
    digits: int = 2
    factor: float = 1.0
    more_is_better: bool = False


def read(path: str) -> list[Sample]:
    """The samples of a file."""
    with open(path, encoding="ascii") as file:
        return [Sample(**json.loads(line)) for line in file]


def table(rows: Sequence[Row], samples: Iterable[Sample]) -> str:
    """A Markdown table of what there are samples of."""
    by_peer: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        by_peer.setdefault((sample.what, sample.peer), []).append(sample)
    lines = [_line(HEADER), _line(["---"] * len(HEADER))]
    for row in rows:
        found = {peer: by_peer[row.what, peer] for peer in row.peers if (row.what, peer) in by_peer}
        medians = {peer: median(values) for peer in found if (values := _values(found[peer]))}
        title = f"{row.title}, {row.unit}"
        for peer, measured in found.items():
            lines.append(_line([title, peer, *_cells(row, peer, measured, medians)]))
            title = ""
    return "\n".join(lines) + "\n"


def _cells(row: Row, peer: str, samples: list[Sample], medians: dict[str, float]) -> list[str]:
    def shown(value: float) -> str:
        return f"{value * row.factor:.{row.digits}f}"

    values = _values(samples)
    done = f"{len(values)} of {len(samples)}"
    goals = "; ".join(_goal(row, peer, goal, medians) for goal in row.goals.get(peer, ()))
    if not values:
        return [done, "never", "", "", "", goals]
    low, high = quartiles(values)
    ours = medians.get(OURS)
    ratio = "" if peer == OURS or not ours else f"{medians[peer] / ours:.2f}"
    worst = min(values) if row.more_is_better else max(values)
    return [done, shown(medians[peer]), f"{shown(low)} - {shown(high)}", shown(worst), ratio, goals]


def _goal(row: Row, peer: str, goal: Goal, medians: dict[str, float]) -> str:
    if peer not in medians or (goal.of and goal.of not in medians):
        return f"{goal.of or goal.bound}: can't tell"
    reached = medians[peer] / medians[goal.of] if goal.of else medians[peer] * row.factor
    holds = reached >= goal.bound if goal.least else reached <= goal.bound
    verdict = "reached" if holds else "**missed**"
    sign = ">=" if goal.least else "<="
    return f"{sign} {goal.bound:.3g}" + (f" x {goal.of} ({reached:.2f})" if goal.of else "") + f": {verdict}"


def failures(samples: Iterable[Sample]) -> str:
    """What went wrong, how often."""
    counts: dict[tuple[str, str, str], int] = {}
    for sample in samples:
        if sample.value is None:
            key = (sample.what, sample.peer, sample.why)
            counts[key] = counts.get(key, 0) + 1
    return "".join(f"- {what}, {peer}: {why} ({count} x)\n" for (what, peer, why), count in counts.items())


def write_between(path: str, text: str) -> None:
    """Put a text between a page's markers."""
    with open(path, encoding="utf-8") as file:
        before, begin, rest = file.read().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} has no {BEGIN.strip()} and {END.strip()}")
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"{before}{begin}\n{text}\n{end}{after}")


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Between which the middle half lies."""
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _values(samples: Iterable[Sample]) -> list[float]:
    return [sample.value for sample in samples if sample.value is not None]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
