"""How a fork of the forker becomes a rank: as if `python -u script.py` had been started.

`Order` says what to become; the forker calls `become` in the fork, at the bottom of its stack, so that whatever the
command ends with (an exception, sys.exit, its last line) reaches the interpreter as it would have in a process of its
own: atexit handlers, threads, flushes and exit codes are the interpreter's.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import importlib.machinery
import io
import os
import random
import runpy
import signal
import sys
import types
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn

from raylaunch.command import Entry
from raylaunch.worker.function_rank import run_call

#: The fork's only descriptor beside its three streams is kept out of the way of what a program counts on.
_HIGH_DESCRIPTOR = 100
#: What a shell says of a program that isn't there, and of one that can't be executed.
_NOT_FOUND, _NOT_EXECUTABLE = 127, 126


@dataclass(frozen=True)
class Order:
    """One rank's process, as the worker wants it from the forker. Goes over the wire as JSON."""

    generation: int
    entry: Entry
    target: str
    args: tuple[str, ...]
    cwd: str
    #: The whole environment.
    env: dict[str, str]
    #: The files that take its output.
    stdout: str
    stderr: str
    fresh_interpreter: bool
    #: A file that it holds open, so that forks of it are found (see `processes.strays`).
    mark: str
    #: The CPUs that it is bound to; none: where the system puts it.
    cpus: tuple[int, ...] = ()

    @classmethod
    def parse(cls, parts: dict[str, Any]) -> Order:
        """The order, from JSON. Raises ValueError, TypeError, KeyError."""
        return cls(**{**parts, "entry": Entry(parts["entry"]), "args": tuple(parts["args"])})


def become(order: Order) -> None:
    """Become what was ordered, in a session of its own, and run it."""
    os.setsid()
    if order.cpus:
        os.sched_setaffinity(0, order.cpus)  # before it has threads, which take it over
    _redirect(order)
    _default_signals()
    os.environ.clear()
    os.environ.update(order.env)
    os.chdir(order.cwd)
    if order.entry is Entry.PROGRAM:
        _execute([order.target, *order.args])
    if order.fresh_interpreter:
        _execute([sys.executable, "-u", *_INTERPRETED[order.entry], order.target, *order.args])
    _hold(order.mark)
    _reseed()
    _tell_multiprocessing(order.cwd)
    importlib.invalidate_caches()
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    vars(main).update(__builtins__=sys.modules["builtins"], __annotations__={})
    sys.argv = [order.target, *order.args]
    sys.orig_argv = [sys.executable, "-u", *(["-m"] if order.entry is Entry.MODULE else []), *sys.argv]
    try:
        if order.entry is Entry.FUNCTION:
            sys.argv = [sys.executable]
            return run_call(order.target, order.args[0])
        _RUN[order.entry](order.target, main)
    except SystemExit:
        raise
    except BaseException:
        # The interpreter prints it, by the hook that the command may have set, and without our frames.
        sys.excepthook = _without_our_frames(sys.excepthook)
        raise


def _redirect(order: Order) -> None:
    for path, flags, number in (
        (os.devnull, os.O_RDONLY, 0),
        (order.stdout, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 1),
        (order.stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 2),
    ):
        opened = os.open(path, flags, 0o644)
        os.dup2(opened, number)  # sys.stdout and sys.stderr are unbuffered and over 1 and 2: the forker runs with -u
        os.close(opened)


def _default_signals() -> None:
    """Python's own handlers, whatever a preloaded module may have set."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGINT}:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _execute(words: list[str]) -> NoReturn:
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them; a program expects the default
        signal.signal(ignored, signal.SIG_DFL)
    try:
        os.execvp(words[0], words)  # noqa: S606 - no shell is wanted
    except OSError as error:
        os.write(2, f"{words[0]}: {error.strerror}\n".encode(errors="backslashreplace"))
        os._exit(_NOT_FOUND if isinstance(error, FileNotFoundError) else _NOT_EXECUTABLE)


def _hold(mark: str) -> None:
    with contextlib.suppress(OSError):  # the worker is gone already, and so will this be
        opened = os.open(mark, os.O_RDONLY)
        fcntl.fcntl(opened, fcntl.F_DUPFD_CLOEXEC, _HIGH_DESCRIPTOR)
        os.close(opened)


def _reseed() -> None:
    """The forks of one process would all draw the same numbers."""
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules:  # drawn when it is imported (2.13), and CUDA's when CUDA is initialised
        sys.modules["torch"].default_generator.seed()


def _tell_multiprocessing(cwd: str) -> None:
    process = sys.modules.get("multiprocessing.process")
    if process is not None:
        process.ORIGINAL_DIR = cwd  # type: ignore[attr-defined]  # taken when it was imported; spawned children go there


def _run_script(target: str, main: types.ModuleType) -> None:
    path = os.path.join(os.getcwd(), target)
    if os.path.isdir(path) or zipfile.is_zipfile(path):
        sys.path.insert(0, path)  # absolute (Python 3.9), so that it holds when the command changes its directory
        runpy._run_module_as_main("__main__", alter_argv=False)  # type: ignore[attr-defined]  # noqa: SLF001 - python DIR
        return
    if not _safe_path():
        sys.path.insert(0, os.path.dirname(os.path.realpath(path)))
    main.__file__ = path
    main.__loader__ = importlib.machinery.SourceFileLoader("__main__", path)
    vars(main)["__cached__"] = None
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    exec(code, vars(main))  # noqa: S102 - it is what a launcher is for


def _run_module(target: str, _main: types.ModuleType) -> None:
    if not _safe_path():
        sys.path.insert(0, os.getcwd())
    sys.argv[0] = "-m"
    runpy._run_module_as_main(target)  # type: ignore[attr-defined]  # noqa: SLF001 - what `python -m` calls


def _run_path(target: str, _main: types.ModuleType) -> None:
    runpy.run_path(target, run_name="__main__")


def _safe_path() -> bool:
    return bool(getattr(sys.flags, "safe_path", False))  # Python 3.11


#: How `python` is told what the target is.
_INTERPRETED = {
    Entry.SCRIPT: [],
    Entry.MODULE: ["-m"],
    Entry.RUN_PATH: ["-c", "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"],
}
_RUN: dict[Entry, Callable[[str, types.ModuleType], None]] = {
    Entry.SCRIPT: _run_script,
    Entry.MODULE: _run_module,
    Entry.RUN_PATH: _run_path,
}

Hook = Callable[[type[BaseException], BaseException, TracebackType | None], Any]


def _without_our_frames(hook: Hook) -> Hook:
    ours = {"<string>", __file__, os.path.join(os.path.dirname(__file__), "forker.py")}

    def shown(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        while trace is not None and trace.tb_frame.f_code.co_filename in ours:
            trace = trace.tb_next
        hook(kind, error.with_traceback(trace), trace)

    return shown
