"""The benchmarks' table says what the samples say, failures included."""

from __future__ import annotations

from benchmarks.scenarios import ROWS, SCENARIOS
from benchmarks.table import Goal, Row, Sample, failures, table

KILL = Row("kill", "a kill", "s", ("raylaunch", "torchrun"), {"raylaunch": (Goal(0.15), Goal(0.5, of="torchrun"))})


def samples(peer: str, *values: float | None) -> list[Sample]:
    return [Sample("kill", peer, 1, value, "" if value is not None else "not within 30 s") for value in values]


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]


def test_a_failure_counts_as_a_try_and_in_no_median() -> None:
    ours, theirs = cells(table([KILL], samples("raylaunch", 0.1, 0.2, 0.1) + samples("torchrun", None, 2.0, None)))
    assert ours[:4] == ["a kill, s", "raylaunch", "3 of 3", "0.10"]
    assert theirs == ["", "torchrun", "1 of 3", "2.00", "2.00 - 2.00", "2.00", "20.00", ""]
    assert ours[7] == "<= 0.15: reached; <= 0.5 x torchrun (0.05): reached"


def test_a_peer_that_never_does_it_is_shown() -> None:
    ours, theirs = cells(table([KILL], samples("raylaunch", 0.2) + samples("torchrun", None)))
    assert theirs[:4] == ["", "torchrun", "0 of 1", "never"]
    assert ours[7] == "<= 0.15: **missed**; torchrun: can't tell"
    assert failures(samples("torchrun", None, None)) == "- kill, torchrun: not within 30 s (2 x)\n"


def test_where_more_is_better_the_least_is_the_worst() -> None:
    row = Row(
        "kill",
        "speed",
        "steps per second",
        ("raylaunch", "torchrun"),
        {"raylaunch": (Goal(0.98, of="torchrun", least=True),)},
        more_is_better=True,
    )
    ours, _ = cells(table([row], samples("raylaunch", 95.0, 99.0, 98.0) + samples("torchrun", 100.0)))
    assert ours[5] == "95.00"
    assert ours[7] == ">= 0.98 x torchrun (0.98): reached"


def test_every_sample_has_its_row() -> None:
    assert {what for scenario in SCENARIOS.values() for what in scenario.what} == {row.what for row in ROWS}
