"""Processes of the operating system: that one is really gone, how it ended, and what it said last.

Called by a worker (about its predecessor), by the node's agent (about the workers of its node) and by tests. Nothing
but the standard library, Linux's /proc and pidfds.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import fcntl
import json
import os
import re
import select
import signal as _signal
import struct
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from raylaunch.coordinator.commands import Process
from raylaunch.errors import Ending, EndKind

#: `struct pidfd_info` as Linux 6.15 knows it: mask, cgroupid, eleven ids, exit_code. Longer ones begin the same way.
_PIDFD_INFO = struct.Struct("=QQ11Ii")
_PIDFD_GET_INFO = (3 << 30) | (_PIDFD_INFO.size << 16) | (0xFF << 8) | 11  # _IOWR(0xFF, 11, struct pidfd_info)
_PIDFD_INFO_EXIT = 1 << 3
#: Positions in /proc/PID/stat behind the command's name (`man proc`: fields 3, 4, 6, 9, 22 and 52).
STATE, PARENT, SESSION, _FLAGS, _STARTED, _EXIT_CODE = 0, 1, 3, 6, 19, 49
_PF_EXITING = 0x4  # linux/sched.h

#: faulthandler's words for the signals that it handles (Python 3.10 to 3.13).
_FATAL = {
    "Segmentation fault": _signal.SIGSEGV,
    "Aborted": _signal.SIGABRT,
    "Bus error": _signal.SIGBUS,
    "Illegal instruction": _signal.SIGILL,
    "Floating point exception": _signal.SIGFPE,
    "Floating-point exception": _signal.SIGFPE,
}
#: The name of a file of last words: pid, start time.
_LAST_WORDS = re.compile(r"(\d+)-(\d+)\.txt")
#: How much is read of a file of last words, and of a process's environment, in bytes.
_LAST_WORDS_LIMIT = 100_000
#: How often to look whether a process is stopped, in seconds: nobody but its parent is told.
LOOK_SECONDS = 1.0
#: Why a process left that is no more wanted.
REPLACED = "it has been replaced"
_ENVIRON_LIMIT = 4_000_000


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks after boot: with the pid it names one process for ever. None: no such."""
    fields = stat_fields(pid)
    return int(fields[_STARTED]) if fields else None


class Watch:
    """A hold on one process: it can be awaited, signalled and asked how it ended, and is never mistaken for another.

    A process that is gone already has a Watch too: its fileno() is -1. Close it, or use it in a `with`.
    """

    def __init__(self, process: Process) -> None:
        self._process = process
        self._fd = -1
        try:
            fd = os.pidfd_open(process.pid)
        except OSError as error:
            # No such process, or the number is a thread's by now (EINVAL; ENOENT from Linux 6.15 on).
            if error.errno not in (errno.ESRCH, errno.EINVAL, errno.ENOENT):
                raise
            return
        if start_time(process.pid) == process.started:
            self._fd = fd
        else:
            os.close(fd)

    def fileno(self) -> int:
        """For pollers: readable when the process has ended, whether or not its parent has noticed. -1: long gone."""
        return self._fd

    def alive(self) -> bool:
        """Whether it still runs. A zombie doesn't: it has given back its memory and its GPU."""
        return not self.wait(0)

    def doomed(self) -> bool:
        """Whether it has ended, or is about to: it is in its exit, or a SIGKILL waits for it.

        A large process closes its sockets, which its peers see, long before it has ended: up to 0.2 s on a busy
        machine (Linux 6.18).
        """
        fields = stat_fields(self._process.pid)
        if not self.alive() or not fields or int(fields[_FLAGS]) & _PF_EXITING:
            return True
        with contextlib.suppress(OSError, StopIteration):
            lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
            pending = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd", "ShdPnd"))]
            return any(mask & 1 << (_signal.SIGKILL - 1) for mask in pending)
        return True

    def wait(self, seconds: float) -> bool:
        """Wait until it has ended; whether it has."""
        if self._fd < 0:
            return True
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        return bool(poller.poll(max(0.0, seconds) * 1000))

    def kill(self, signal: int = _signal.SIGKILL) -> None:
        """Send a signal, if it is still there."""
        if self._fd >= 0:
            try:
                _signal.pidfd_send_signal(self._fd, signal)
            except ProcessLookupError:
                return

    def exit_status(self) -> int | None:
        """The raw status, as os.wait's, when it has ended; None when it hasn't, or the kernel can't say.

        A zombie's stands in /proc. After its parent has taken it, Linux 6.15 and later keep it for those who hold a
        pidfd from before; a raylet takes its workers within milliseconds.
        """
        if self._fd < 0 or self.alive():
            return None
        fields = stat_fields(self._process.pid)
        if fields and fields[STATE] in (b"Z", b"X") and int(fields[_STARTED]) == self._process.started:
            return int(fields[_EXIT_CODE])
        info = bytearray(_PIDFD_INFO.size)
        struct.pack_into("=Q", info, 0, _PIDFD_INFO_EXIT)
        try:
            fcntl.ioctl(self._fd, _PIDFD_GET_INFO, info)
        except OSError:  # an older kernel
            return None
        mask, *_, status = _PIDFD_INFO.unpack(info)
        return int(status) if mask & _PIDFD_INFO_EXIT else None

    def close(self) -> None:
        """Let go."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Watch:  # noqa: PYI034 - typing.Self came with Python 3.11
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def ending_from_status(status: int) -> Ending:
    """What a raw exit status says: returned (0), exited, or ended by a signal."""
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return Ending(EndKind.SIGNALED, signal=-code)
    return Ending(EndKind.EXITED, exit_code=code) if code else Ending(EndKind.RETURNED)


def end_process(process: Process, seconds: float, *, patience: float = 0.0) -> bool:
    """SIGKILL, which also ends a stopped process, and wait; whether it is gone (or was never there).

    `patience`: somebody else is ending it; that many seconds before we do.
    """
    with Watch(process) as watch:
        if watch.wait(patience):
            return True
        watch.kill()
        return watch.wait(seconds)


def wait_for_end(process: Process, longest_stop: float) -> None:
    """Wait until a process has ended. One that stays stopped (SIGSTOP) for so many seconds is killed."""
    looks = 0  # and not time: whoever stopped it may have stopped us, too, and lets both go on
    with Watch(process) as watch:
        while not watch.wait(LOOK_SECONDS):
            fields = stat_fields(process.pid)
            looks = looks + 1 if fields and fields[STATE] == b"T" else 0
            if looks * LOOK_SECONDS >= longest_stop:
                watch.kill()


def token_of(token: str, worker: Process) -> str:
    """What a worker sets RAYLAUNCH_TOKEN to, so that what it starts can be told from everything else on the node."""
    return f"{token}-{worker.pid}-{worker.started}"


def strays(token: str, directory: str) -> list[tuple[Process, Process]]:
    """What the workers of a run have started here and still lives, each with the worker that it came from.

    Programs show the worker's RAYLAUNCH_TOKEN in the environment that they were started with. Forks don't (/proc shows
    the environment of the last exec, and a worker sets the variable itself), but hold its file of last words open.
    """
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        pid = int(entry.name)
        started = start_time(pid)
        worker = _started_by(entry, token) or _forked_from(entry, directory)
        if worker is not None and worker.pid != pid and started is not None and started == start_time(pid):
            found.append((Process(pid, started), worker))
    return found


def _started_by(entry: Path, token: str) -> Process | None:
    try:
        with (entry / "environ").open("rb") as file:
            environ = b"\0" + file.read(_ENVIRON_LIMIT)
    except OSError:  # gone meanwhile, or somebody else's
        return None
    found = re.search(rb"\0RAYLAUNCH_TOKEN=%s-(\d+)-(\d+)\0" % re.escape(token.encode()), environ)
    return Process(int(found[1]), int(found[2])) if found else None


def _forked_from(entry: Path, directory: str) -> Process | None:
    try:
        for descriptor in (entry / "fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                # Forgotten already: Linux adds a word.
                folder, _, name = os.readlink(descriptor).removesuffix(" (deleted)").rpartition("/")
                found = _LAST_WORDS.fullmatch(name)
                if folder == directory and found:
                    return Process(int(found[1]), int(found[2]))
    except OSError:  # gone meanwhile, or somebody else's
        pass
    return None


def rank_of(worker: Process) -> int:
    """The pid of a worker's rank: the worker's own, or that of the process that was forked for it."""
    name = last_words_path("", worker).name
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != worker.pid and _leads_a_session(int(entry.name)):
            token = f"-{worker.pid}-{worker.started}".encode()
            with contextlib.suppress(OSError):  # gone meanwhile, or somebody else's
                held = {os.path.basename(os.readlink(descriptor)) for descriptor in (entry / "fd").iterdir()}
                given = [line for line in (entry / "environ").read_bytes().split(b"\0") if line.endswith(token)]
                if name in held or any(line.startswith(b"RAYLAUNCH_TOKEN=") for line in given):
                    return int(entry.name)
    return worker.pid


def _leads_a_session(pid: int) -> bool:
    fields = stat_fields(pid)
    return bool(fields) and int(fields[SESSION]) == pid


def workers_in(directory: str) -> list[Process]:
    """The processes that have a file of last words there, living or not."""
    try:
        names = os.listdir(directory)
    except OSError:
        return []
    return [Process(int(found[1]), int(found[2])) for name in names if (found := _LAST_WORDS.fullmatch(name))]


def sign_in(directory: str) -> None:
    """Be found by `workers_in` without having last words."""
    own = Process(os.getpid(), start_time(os.getpid()) or 0)
    Path(directory).mkdir(mode=0o700, parents=True, exist_ok=True)
    last_words_path(directory, own).touch(0o600)


class LastWords:
    """Has this process write down how it ends, where only it can know: os._exit's code, a crash's Python stack.

    Another process may also ask it for them (`ask_for_last_words`), and so ends it. One file per process in a
    node-local directory. Forked children inherit os and faulthandler, and multiprocessing's (DataLoader workers) end
    with os._exit: what they do is not this process's ending and is not written.
    """

    def __init__(self, directory: str) -> None:
        self._pid = os.getpid()
        self._leave = os._exit
        Path(directory).mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = last_words_path(directory, Process(self._pid, start_time(self._pid) or 0))
        # Kept open: neither a full descriptor table nor a signal handler should have to open it at the end.
        self._file = self.path.open("wb", buffering=0)
        # One thread only, as Ray does: the others' frames are read without the GIL.
        faulthandler.enable(self._file, all_threads=False)
        os.register_at_fork(after_in_child=self._in_child)
        os._exit = self.exit

    def exit(self, status: int, reason: str = "os._exit") -> NoReturn:
        """os._exit from now on: write it down, then end at once."""
        if os.getpid() == self._pid:
            with contextlib.suppress(OSError):  # a full disk must not keep it from ending
                self._file.write(f"raylaunch: exit {status}: {reason}\n".encode())
        self._leave(status)

    def leave_when_asked(self, what: Callable[[], Ending | None]) -> None:
        """From now on end at once when asked to, and say `what`, if it has something to say."""
        path = _asking_path(self.path)
        os.mkfifo(path, 0o600)
        asked = os.open(path, os.O_RDWR)  # for writing too: it never reads as ended

        def wait() -> None:
            os.read(asked, 1)
            with contextlib.suppress(Exception):  # whatever it is, it must leave
                ending = what()
                if ending is not None:
                    self._file.write(f"raylaunch: ending {json.dumps(asdict(ending))}\n".encode())
                    self._leave(1)
            self.exit(1, REPLACED)

        threading.Thread(target=wait, name="raylaunch-last-words", daemon=True).start()

    def _in_child(self) -> None:
        with contextlib.suppress(ValueError):  # no stderr
            faulthandler.enable(2, all_threads=False)


def read_last_words(directory: str, process: Process) -> Ending | None:
    """How a process said that it ends; None when it said nothing, which is usual."""
    try:
        with last_words_path(directory, process).open("rb") as file:
            text = file.read(_LAST_WORDS_LIMIT).decode(errors="replace")
    except OSError:
        return None
    crash = re.search(r"Fatal Python error: (.*)", text)
    if crash and crash[1] in _FATAL:
        return Ending(EndKind.SIGNALED, signal=int(_FATAL[crash[1]]), traceback=text[crash.start() :])
    answer = re.search(r"raylaunch: ending (\{.*\})", text)
    if answer:
        parts = json.loads(answer[1])
        return Ending(**{**parts, "kind": EndKind(parts["kind"])})
    note = re.search(r"raylaunch: exit (-?\d+): (.*)", text)
    return Ending(EndKind.EXITED, exit_code=int(note[1]) & 0xFF, message=note[2]) if note else None


def leave_last_words(directory: str, process: Process, reason: str) -> None:
    """Write down why a process is ended, as it would have itself."""
    with last_words_path(directory, process).open("ab") as file:
        file.write(f"raylaunch: exit 1: {reason}\n".encode())


def ask_for_last_words(directory: str, process: Process) -> bool:
    """Have a process end at once, and say why if it knows; whether it could be asked. It may be stopped, or busy."""
    try:
        asking = os.open(_asking_path(last_words_path(directory, process)), os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return os.write(asking, b"?") == 1
    except OSError:
        return False
    finally:
        os.close(asking)


def forget_last_words(directory: str, process: Process) -> None:
    """Remove what a process has written."""
    path = last_words_path(directory, process)
    for one in (path, _asking_path(path)):
        one.unlink(missing_ok=True)


def _asking_path(last_words: Path) -> Path:
    return last_words.with_suffix(".ask")


def last_words_path(directory: str, process: Process) -> Path:
    """The file that a worker keeps open for its last words; its forks, which have it open too, are found by it."""
    return Path(directory) / f"{process.pid}-{process.started}.txt"


def own_memory(pid: int) -> int:
    """The memory that a process shares with no other, in bytes; 0 when there is no such process."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def stat_fields(pid: int) -> list[bytes]:
    """The fields of /proc/PID/stat from the third on; empty when there is no such process."""
    try:
        data = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return []
    return data[data.rindex(b")") + 2 :].split()  # the command's name may hold spaces and parentheses
