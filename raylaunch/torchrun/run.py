"""`raylaunch run`, and `python -m raylaunch.launch`: torchrun's command line, on Ray."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence

from raylaunch.errors import ConfigError, RunFailedError
from raylaunch.torchrun import events
from raylaunch.torchrun.error_file import hand_on_error_file
from raylaunch.torchrun.failure import exit_code, failure_table
from raylaunch.torchrun.launch import launch, own_connection, run_command
from raylaunch.torchrun.logs_specs import with_logs_specs
from raylaunch.torchrun.parser import parse
from raylaunch.torchrun.plan import Plan, plan
from raylaunch.torchrun.signals import Stopped


def main(arguments: Sequence[str], *, prog: str = "raylaunch run", launch_style: bool = False) -> int:
    """Carry out a command line; returns the exit code.

    Args:
        arguments: the command line, without the command.
        prog: what messages call it.
        launch_style: in the way of torch.distributed.launch: without --use-env the script gets --local-rank=N.
    """

    def say(text: str) -> None:
        print(f"{prog}: {text}", file=sys.stderr, flush=True)  # noqa: T201 - what the user should know

    _tell_decisions()
    asked: Plan | None = None
    try:
        asked = with_logs_specs(plan(parse(arguments, prog=prog, launch_style=launch_style), os.environ, os.getcwd()))
        _carry_out(asked, say)
    except ConfigError as error:
        say(f"error: {error}")
        return exit_code(error)
    except RunFailedError as error:
        hand_on_error_file(error)
        print(failure_table(asked.command.target if asked else prog, error), file=sys.stderr, flush=True)  # noqa: T201
        return exit_code(error)
    except ConnectionError as error:
        say(f"error: {error}")
        return exit_code(error)
    except KeyboardInterrupt as error:
        say("interrupted; the run is stopped")
        return exit_code(error)
    except Stopped as error:
        say(f"{error.name}; the run is stopped")
        return exit_code(error)
    return 0


def _carry_out(asked: Plan, say: Callable[[str], None]) -> None:
    report = events.Reporter(asked)
    connection = own_connection(asked, say)
    try:
        report.succeeded(launch(asked, lambda spec: run_command(asked, spec), connection=connection, say=say))
    except BaseException as error:
        report.failed(error)
        raise


def _tell_decisions() -> None:
    """Let raylaunch tell what it decides, on stderr; LOGLEVEL=INFO, as for torchrun, tells more."""
    logger = logging.getLogger("raylaunch")
    if logger.handlers or logging.getLogger().handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("raylaunch: %(message)s"))
    logger.addHandler(handler)
    level = logging.getLevelName(os.environ.get("LOGLEVEL", "WARNING").upper())
    logger.setLevel(level if isinstance(level, int) else logging.WARNING)
