"""`raylaunch run`, and `python -m raylaunch.launch`: torchrun's command line, on Ray."""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence

from raylaunch.errors import ConfigError, RunFailedError, RunInUseError
from raylaunch.result import RunResult
from raylaunch.spec import RunSpec
from raylaunch.torchrun import events
from raylaunch.torchrun.error_file import hand_on_error_file
from raylaunch.torchrun.failure import exit_code, failure_table
from raylaunch.torchrun.launch import launch, own_connection, run_command
from raylaunch.torchrun.logs_specs import with_logs_specs
from raylaunch.torchrun.parser import parse
from raylaunch.torchrun.plan import Plan, plan
from raylaunch.torchrun.signals import Stopped

#: How long a thread may go on when all is over, in seconds.
STUCK_SECONDS = 5.0
#: When this launcher was started, in seconds since 1970.
_STARTED = time.time()


def main(arguments: Sequence[str], *, prog: str = "raylaunch run", launch_style: bool = False) -> int:
    """Carry out a command line; returns the exit code.

    Args:
        arguments: the command line, without the command.
        prog: what messages call it.
        launch_style: in the way of torch.distributed.launch: without --use-env the script gets --local-rank=N.
    """
    code = _main(arguments, prog, launch_style)
    _end_though_ray_is_stuck(code)
    return code


def _main(arguments: Sequence[str], prog: str, launch_style: bool) -> int:
    def say(text: str) -> None:
        print(f"{prog}: {text}", file=sys.stderr, flush=True)  # noqa: T201 - what the user should know

    _tell_decisions()
    asked: Plan | None = None
    try:
        chosen = parse(_encodable(arguments), prog=prog, launch_style=launch_style)
        asked = with_logs_specs(plan(chosen, os.environ, _here()))
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
    except Followed as error:
        return exit_code(error)
    return 0


def _carry_out(asked: Plan, say: Callable[[str], None]) -> None:
    report = events.Reporter(asked)
    work = functools.partial(run_command, asked)
    if asked.run_id is not None and not asked.standalone:
        work = functools.partial(_alone_or_following, work, say)
    try:
        report.succeeded(launch(asked, work, connection=own_connection(asked, say), say=say))
    except Followed:
        raise
    except BaseException as error:
        report.failed(error)
        raise


class Followed(SystemExit):
    """Another launcher's run, which this one has followed, is over; with its exit code."""


def _alone_or_following(work: Callable[[RunSpec], RunResult], say: Callable[[str], None], spec: RunSpec) -> RunResult:
    """Launch the run of this id; or follow it, where the same line was started before on another node."""
    from raylaunch.cluster.following import ended_since, follow, note_end

    ended = ended_since(spec.run_id, _STARTED)
    if ended is not None:
        say(f"run {spec.run_id} is over: another launcher has carried it out meanwhile, and left with {ended}")
        raise Followed(ended)
    try:
        result = work(spec)
    except RunInUseError as error:
        say(f"run {spec.run_id} is going on, started by another launcher: this one follows it")
        code = follow(spec.run_id)
        if code is None:
            raise ConnectionError(f"the launcher of run {spec.run_id} has ended without saying how") from error
        say(f"run {spec.run_id} is over; its launcher has left with {code}")
        raise Followed(code) from None
    except BaseException as error:
        note_end(spec.run_id, exit_code(error))
        raise
    note_end(spec.run_id, 0)
    return result


def _end_though_ray_is_stuck(code: int) -> None:
    """End the process here if it couldn't end by itself.

    A call to a cluster that is gone never returns once Ray was shut down (2.60), and the interpreter would wait for the
    thread that is in it. Those of the shell have this name, and all others have ended with its loop.
    """
    until = time.monotonic() + STUCK_SECONDS
    for thread in [thread for thread in threading.enumerate() if thread.name.startswith("asyncio_")]:
        thread.join(max(0.0, until - time.monotonic()))
        if thread.is_alive():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def _encodable(arguments: Sequence[str]) -> Sequence[str]:
    """The arguments, if ray.init (2.60) can note them, as it does with every driver's. Raises `ConfigError`."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{argument!a}: isn't UTF-8, and Ray takes nothing else in a command line") from None
    return arguments


def _here() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError as error:
        raise ConfigError("the working directory is gone: start the command in another one") from error


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
