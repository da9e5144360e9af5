"""Draws the diagram of docs/state-machine.md from the coordinator's table, so that it can't lie. Run by `make diagram`.

tests/test_docs.py holds the page equal to what this draws.
"""
# ruff: noqa: INP001 - a script

from __future__ import annotations

from pathlib import Path

from raylaunch.coordinator.events import EVENTS, Event
from raylaunch.coordinator.machine import TABLE
from raylaunch.coordinator.phase import LIVE_PHASES, Phase

PAGE = Path(__file__).with_name("state-machine.md")
BEGIN, END = "<!-- begin: drawn by make_state_diagram.py -->\n", "<!-- end -->\n"


def diagram() -> str:
    """The table: where each phase may lead as a mermaid block, which events it takes as a list."""
    lines = ["```mermaid", "stateDiagram-v2"]
    lines += [f'    state "{phase.value}" as {_name(phase)}' for phase in Phase if _name(phase) != phase.value]
    lines += [f"    [*] --> {_name(Phase.NEW)}"]
    for phase in Phase:
        following = sorted(TABLE[phase].leads_to, key=list(Phase).index)
        lines += [f"    {_name(phase)} --> {_name(after)}" for after in following or []]
        if not following:
            lines += [f"    {_name(phase)} --> [*]"]
    lines += ["    classDef live stroke-width:3px"]
    lines += [f"    class {','.join(_name(phase) for phase in Phase if phase in LIVE_PHASES)} live", "```", ""]
    by_events: dict[frozenset[type[Event]], list[str]] = {}
    for phase in Phase:
        by_events.setdefault(TABLE[phase].accepts, []).append(phase.value)
    for accepts, phases in by_events.items():
        missing = [name for name, event in EVENTS.items() if event not in accepts]
        taken = [name for name, event in EVENTS.items() if event in accepts]
        short = f"every event but {_names(missing)}" if len(missing) < len(taken) else _names(taken)
        lines.append(f"- *{', '.join(phases)}*: {short}")
    return "\n".join(lines) + "\n"


def page_with(drawn: str, text: str) -> str:
    """The page's text with the drawn part replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{drawn}\n{END}{after}"


def _name(phase: Phase) -> str:
    return phase.value.replace(" ", "_")


def _names(events: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in events)


if __name__ == "__main__":
    PAGE.write_text(page_with(diagram(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
