"""The `raylaunch` command. Only `raylaunch run` imports Ray: reading a journal needs no cluster.

raylaunch run [options] PROGRAM [arguments ...]    what `torchrun` does, on a Ray cluster
raylaunch replay JOURNAL    what happened in a run, and whether this version would decide the same again
raylaunch --version
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence

import raylaunch
from raylaunch import journal
from raylaunch.coordinator.events import Event
from raylaunch.errors import Ending, InternalError, short_id

#: The fields that say whom an event is about, where it has them.
_WHOM = ("worker", "generation", "group", "node", "waiting", "silent")


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out a command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] == "run":  # whose options, after the program's name, are the program's
        from raylaunch.torchrun.run import main as run

        return run(arguments[1:])
    parser = argparse.ArgumentParser(prog="raylaunch", description="Starts PyTorch distributed training on Ray.")
    parser.add_argument("--version", action="version", version=f"raylaunch {raylaunch.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    commands.add_parser("run", help="run a program as the ranks of one process group: torchrun's options, on Ray")
    replay = commands.add_parser(
        "replay",
        help="print a run's journal and decide it again",
        description="Prints every event of a run's journal with the decision it led to, and decides each again. "
        "Exit code: 0 when every recorded decision was reproduced, 1 when not, 2 when there is no such journal.",
    )
    replay.add_argument("journal", metavar="JOURNAL", help="the path that raylaunch logs when a run starts")
    replay.set_defaults(carry_out=_replay)
    chosen = parser.parse_args(arguments)
    try:
        code: int = chosen.carry_out(chosen)
        sys.stdout.flush()
    except BrokenPipeError:  # `raylaunch replay JOURNAL | head`: whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit would fail once more
        code = 1
    return code


def _replay(chosen: argparse.Namespace) -> int:
    """Print a journal, one line an event."""
    start: float | None = None
    different: list[int] = []
    count = unrecorded = 0
    try:
        for step in journal.replay(chosen.journal):
            start = step.event.at if start is None else start
            decision = step.decision
            change = decision.before.value
            if decision.after is not decision.before:
                change += f" -> {decision.after.value}"
            count += 1
            unrecorded += step.same is None
            mark = ""
            if step.same is False:
                different.append(step.seq)
                mark = "  (decided differently then)"
            print(  # noqa: T201 - what the command is for
                f"{step.seq:5}  {step.event.at - start:10.3f} s  {_describe(step.event):42}  {change:24}"
                f"  g{decision.generation}  {decision.reason}{mark}".rstrip()
            )
    except BrokenPipeError:  # an OSError too, but not the journal's
        raise
    except (OSError, ValueError) as error:
        print(f"raylaunch replay: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except InternalError as error:
        print(f"raylaunch replay: the event after number {count} is impossible here: {error}", file=sys.stderr)  # noqa: T201
        return 1
    if not count:
        print(f"raylaunch replay: {chosen.journal} holds no event", file=sys.stderr)  # noqa: T201
        return 2
    print(_summary(count, unrecorded, different))  # noqa: T201
    return 1 if different else 0


def _describe(event: Event) -> str:
    """`WorkerFailed worker=3 generation=1 raised`."""
    parts = [type(event).__name__]
    for field in dataclasses.fields(event):
        value = getattr(event, field.name)
        if isinstance(value, Ending):
            parts.append(value.kind.value)
        elif field.name in _WHOM:
            parts.append(f"{field.name}={short_id(value) if field.name == 'node' else value}")
    return " ".join(parts)


def _summary(count: int, unrecorded: int, different: list[int]) -> str:
    events = f"{count} event{'s'[: count != 1]}"
    if different:
        shown = ", ".join(map(str, different[:10])) + (", ..." if len(different) > 10 else "")
        return f"{events}; NOT the same decisions as recorded: {len(different)} differ, events {shown}"
    text = f"{events}; every recorded decision was reproduced"
    return text + (f" ({unrecorded} had none: the driver ended before)" if unrecorded else "")
