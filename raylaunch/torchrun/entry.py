"""What each rank runs: from the program's name on a command line, or an entrypoint of the launcher API. Pure."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from raylaunch.command import Command, Entry
from raylaunch.errors import ConfigError

Entrypoint = Callable[..., Any] | str | None

LOCAL_RANK = "${local_rank}"
#: What the Python interpreter runs, by the ends of names.
PYTHON_FILES = (".py", ".pyw", ".pyc", ".pyz", ".zip")


def command_of(chosen: argparse.Namespace, environ: Mapping[str, str], cwd: str) -> Command:
    """What each rank runs, for a command line: torch's own rules (torch 2.13, config_from_args).

    Raises `ConfigError`.
    """
    launch_style = hasattr(chosen, "use_env")
    local_rank = launch_style and not chosen.use_env
    program, args = chosen.training_script, tuple(chosen.training_script_args)
    if chosen.no_python and local_rank:
        raise ConfigError("When using the '--no-python' flag, you must also set the '--use-env' flag.")
    if chosen.no_python and chosen.module and not chosen.run_path:
        raise ConfigError("Don't use both the '--no-python' flag and the '--module' flag at the same time.")
    if chosen.run_path:
        entry = Entry.RUN_PATH
    elif chosen.no_python:
        entry = Entry.PROGRAM
    elif chosen.module:
        entry = Entry.MODULE
    elif launch_style and not _is_python(program, cwd):
        entry, local_rank = Entry.PROGRAM, False
    else:
        entry = Entry.SCRIPT
    if local_rank:
        args = (f"--local-rank={LOCAL_RANK}", *args)
    interpreter = environ.get("PYTHON_EXEC")
    if interpreter and entry in (Entry.SCRIPT, Entry.MODULE):
        module = ("-m",) if entry is Entry.MODULE else ()
        entry, program, args = Entry.PROGRAM, interpreter, ("-u", *module, program, *args)
    if "\0" in program or not program:
        raise ConfigError(f"{program!r}: is no program")
    return Command(
        entry,
        program,
        args,
        cwd=cwd,
        fresh_interpreter=chosen.no_preload,
        role=chosen.role,
        numa_binding=chosen.numa_binding or "",
    )


def _is_python(path: str, cwd: str) -> bool:
    """Whether Python runs this file, by its name; a folder with a __main__.py is such a file too."""
    return path.endswith(PYTHON_FILES) or os.path.isdir(os.path.join(cwd, path))


def command_for(entrypoint: Entrypoint, args: Sequence[Any]) -> Command:
    """What is run for an entrypoint of the launcher API, and what the messages call it. Raises `ConfigError`."""
    if callable(entrypoint):
        return Command(Entry.FUNCTION, getattr(entrypoint, "__qualname__", type(entrypoint).__qualname__))
    if not isinstance(entrypoint, str) or not entrypoint:
        raise ConfigError(f"entrypoint={entrypoint!r}: must be a function, or the name of a program")
    texts = tuple(str(arg) for arg in args)
    if entrypoint != sys.executable:
        return Command(Entry.PROGRAM, entrypoint, texts)
    # This Python: then its workers can be forked from one that has imported torch.
    script = texts[1:] if texts[:1] == ("-u",) else texts
    if script[:1] == ("-m",) and len(script) > 1:
        return Command(Entry.MODULE, script[1], script[2:])
    if script and not script[0].startswith("-"):
        return Command(Entry.SCRIPT, script[0], script[1:])
    return Command(Entry.PROGRAM, entrypoint, texts)
