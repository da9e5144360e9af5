"""Real processes: that one is gone, how it ended whoever reaped it, what it said last, and whom nobody may touch."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest
from harness import eventually

from raylaunch.coordinator.commands import Process
from raylaunch.errors import Ending, EndKind
from raylaunch.worker.processes import (
    REPLACED,
    Watch,
    ask_for_last_words,
    end_process,
    ending_from_status,
    forget_last_words,
    read_last_words,
    start_time,
    strays,
    workers_in,
)
from raylaunch.worker.sweeper import start_sweeper

SLEEPER = "import signal; print('up', flush=True); signal.pause()"
OLD_KERNEL = tuple(int(part) for part in os.uname().release.split(".")[:2]) < (6, 15)


@pytest.fixture
def sleeper(python):
    """A process that does nothing until it is ended."""

    def start(program=SLEEPER, *arguments, **environment):
        process = python(program, *arguments, **environment)
        assert process.stdout.readline() == "up\n"
        return process

    return start


def identity(popen) -> Process:
    return Process(popen.pid, start_time(popen.pid))


def test_a_start_time_is_read_past_any_name(sleeper):
    # the command's name is the one field of /proc/PID/stat that may hold anything
    named = sleeper("from pathlib import Path; Path('/proc/self/comm').write_text('a) R (1 2');" + SLEEPER)
    assert "a) R (1 2" in Path(f"/proc/{named.pid}/stat").read_text()
    plain = sleeper()
    assert 0 <= start_time(plain.pid) - start_time(named.pid) < 60 * os.sysconf("SC_CLK_TCK")
    assert start_time(os.getpid()) < start_time(named.pid)


def test_a_process_that_is_not_there():
    gone = Process(2**22 + 1, 1)  # above the greatest pid there can be
    assert start_time(gone.pid) is None
    with Watch(gone) as watch:
        assert watch.fileno() == -1
        assert not watch.alive()
        assert watch.wait(10)
        assert watch.exit_status() is None
        watch.kill()
    assert end_process(gone, 10)


def test_a_pid_that_was_used_again_is_never_touched(sleeper):
    other = sleeper()
    with Watch(Process(other.pid, start_time(other.pid) - 1)) as watch:
        assert not watch.alive()
        watch.kill()
    assert end_process(Process(other.pid, start_time(other.pid) - 1), 0)
    with Watch(identity(other)) as watch:
        assert watch.alive()


def test_a_thread_is_not_a_process(sleeper):
    threads = sleeper("import threading; threading.Thread(target=threading.Event().wait).start();" + SLEEPER)
    (thread,) = {int(name) for name in os.listdir(f"/proc/{threads.pid}/task")} - {threads.pid}
    with Watch(Process(thread, start_time(thread))) as watch:
        assert watch.fileno() == -1


def test_no_descriptor_stays(sleeper):
    process = identity(sleeper())
    before = os.listdir("/proc/self/fd")
    for started in (process.started, 1):
        with Watch(Process(process.pid, started)):
            pass
    watch = Watch(process)
    watch.close()
    watch.close()
    assert os.listdir("/proc/self/fd") == before


def test_a_poller_sees_the_end(sleeper):
    process = sleeper()
    with Watch(identity(process)) as watch:
        assert watch.alive()
        assert not watch.wait(0)
        assert watch.exit_status() is None
        poller = select.epoll()
        poller.register(watch, select.EPOLLIN)
        watch.kill(signal.SIGTERM)
        assert poller.poll(10)[0][0] == watch.fileno()
        poller.close()
        assert not watch.alive()
        watch.kill()


@pytest.mark.parametrize(
    ("program", "ending"),
    [
        ("import os; os._exit(7)", Ending(EndKind.EXITED, exit_code=7)),
        ("raise SystemExit(0)", Ending(EndKind.RETURNED)),
        ("import os; os.kill(os.getpid(), 9)", Ending(EndKind.SIGNALED, signal=9)),
        ("import ctypes; ctypes.string_at(0)", Ending(EndKind.SIGNALED, signal=11)),
        ("import os; os.abort()", Ending(EndKind.SIGNALED, signal=6)),
    ],
)
def test_how_a_process_ended_before_and_after_somebody_else_reaped_it(python, program, ending):
    process = python(f"input()\n{program}")
    with Watch(identity(process)) as watch:
        process.stdin.write("\n")
        process.stdin.flush()
        assert watch.wait(20)
        assert ending_from_status(watch.exit_status()) == ending  # a zombie
        process.wait()
        assert start_time(process.pid) is None
        if OLD_KERNEL:
            assert watch.exit_status() is None
        else:
            assert ending_from_status(watch.exit_status()) == ending


@pytest.mark.parametrize("stop", [False, True])
def test_a_process_is_ended_also_when_it_is_stopped_or_deaf(sleeper, stop):
    deaf = sleeper("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + SLEEPER)
    process = identity(deaf)
    if stop:
        os.kill(deaf.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, deaf.pid, os.WSTOPPED | os.WNOWAIT)
    assert end_process(process, 20)
    assert deaf.wait() == -signal.SIGKILL
    assert end_process(process, 20)


def test_waiting_is_bounded(sleeper):
    with Watch(identity(sleeper())) as watch:
        started = time.monotonic()
        assert not watch.wait(0.05)
        assert not watch.wait(-1)
        assert 0.05 <= time.monotonic() - started < 1


STARTS_SOME = """
import os, subprocess, sys, time
from raylaunch.coordinator.commands import Process
from raylaunch.worker.processes import LastWords, start_time, token_of
token, directory = sys.argv[1:]
me = Process(os.getpid(), start_time(os.getpid()))
os.environ["RAYLAUNCH_TOKEN"] = token_of(token, me)
LastWords(directory)
program = subprocess.Popen(["sleep", "1000"], start_new_session=True)
fork = os.fork()
if not fork:
    os.setsid()
    time.sleep(1000)
print(program.pid, fork, flush=True)
input()
"""


@pytest.fixture
def worker(python, tmp_path):
    """Starts a process that does as a worker does, with a program and a fork of its own, both in their own sessions."""
    pids: list[int] = []

    def start(token: str, words: str = "words"):
        process = python(STARTS_SOME, token, str(tmp_path / words))
        children = [int(pid) for pid in process.stdout.readline().split()]
        pids.extend(children)
        return process, {Process(pid, start_time(pid)) for pid in children}

    yield start
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_programs_and_forks_of_a_worker_are_found_and_it_is_named(worker, sleeper, tmp_path):
    words = str(tmp_path / "words")
    mine, children = worker("run-1")
    sleeper(SLEEPER, RAYLAUNCH_TOKEN="run-11-1-1")
    sleeper(SLEEPER, OTHER_RAYLAUNCH_TOKEN="run-1-1-1")
    who = identity(mine)
    assert set(strays("run-1", words)) == {(child, who) for child in children}
    assert workers_in(words) == [who]
    mine.kill()
    mine.wait()
    forget_last_words(words, who)
    assert set(strays("run-1", words)) == {(child, who) for child in children}
    assert strays("run-2", str(tmp_path)) == []


def sweep(words, raylet, agent, lease=60.0):
    start_sweeper("run-1", words, raylet=identity(raylet), agent=identity(agent), lease=lease)


def test_the_sweeper_ends_what_a_worker_leaves_when_it_is_gone_and_then_itself(worker, sleeper, tmp_path):
    words, raylet, agent = str(tmp_path / "words"), sleeper(), sleeper()
    (first, children), (second, others) = worker("run-1"), worker("run-1")
    sweep(words, raylet, agent)
    agent.kill()
    first.kill()
    eventually(lambda: not any(alive(one) for one in children), "what the first has left is gone")
    assert all(alive(one) for one in others)
    second.kill()
    eventually(lambda: not any(alive(one) for one in others), "what the second has left is gone")
    eventually(lambda: not (tmp_path / "words").exists(), "the sweeper is done")


def test_when_the_raylet_goes_too_the_sweeper_ends_the_workers_even_stopped_ones(worker, sleeper, tmp_path):
    words, raylet, agent = str(tmp_path / "words"), sleeper(), sleeper()
    mine, children = worker("run-1")
    who = identity(mine)
    mine.send_signal(signal.SIGSTOP)
    sweep(words, raylet, agent)
    raylet.kill()
    agent.kill()
    eventually(lambda: not any(alive(one) for one in (who, *children)), "worker and children are gone")


def test_a_sweeper_leaves_another_nodes_workers_on_the_same_machine_alone(worker, sleeper, tmp_path):
    raylet, agent = sleeper(), sleeper()
    (mine, children), (other, others) = worker("run-1", "words"), worker("run-1", "other node's words")
    who = identity(mine)
    sweep(str(tmp_path / "words"), raylet, agent)
    raylet.kill()
    agent.kill()
    eventually(lambda: not (tmp_path / "words").exists(), "the sweeper is done")
    assert not any(alive(one) for one in (who, *children))
    assert all(alive(one) for one in (identity(other), *others))


def test_while_its_agent_lives_the_sweeper_touches_nothing(worker, sleeper, tmp_path):
    words, raylet, agent = str(tmp_path / "words"), sleeper(), sleeper()
    mine, children = worker("run-1")
    sweep(words, raylet, agent)
    mine.kill()
    mine.wait()
    time.sleep(0.5)  # nothing happens, for which there is no event
    assert all(alive(one) for one in children)
    agent.kill()
    eventually(lambda: not any(alive(one) for one in children), "what the worker has left is gone")


def test_the_sweeper_ends_an_agent_that_stays_stopped(worker, sleeper, tmp_path):
    """There can't be another before; but a moment does no harm."""
    words, raylet, (brief, stopped) = str(tmp_path / "words"), sleeper(), (sleeper(), sleeper())
    worker("run-1")  # or the sweepers would be done at once
    sweep(words, raylet, brief, lease=2.0)
    sweep(words, raylet, stopped, lease=2.0)
    for agent in (brief, stopped):
        agent.send_signal(signal.SIGSTOP)
    time.sleep(0.5)
    brief.send_signal(signal.SIGCONT)
    assert stopped.wait(10.0) == -signal.SIGKILL
    assert brief.poll() is None


def alive(process: Process) -> bool:
    with Watch(process) as watch:
        return watch.alive()


LAST_WORDS = """
import ctypes, multiprocessing, os, subprocess, sys, threading
from raylaunch.worker.processes import LastWords
words = LastWords(sys.argv[1])
print('up', flush=True)
input()
"""


@pytest.fixture
def last_words(tmp_path, python):
    """Runs a program that leaves last words; what they were, and its real exit code."""

    def run(program: str) -> tuple[Ending | None, int, str]:
        process = python(LAST_WORDS + program, str(tmp_path / "words"))
        assert process.stdout.readline() == "up\n"
        who = identity(process)
        _, errors = process.communicate("\n")
        return read_last_words(str(tmp_path / "words"), who), process.returncode, errors

    return run


@pytest.mark.parametrize(
    ("program", "code", "message", "returncode"),
    [
        ("os._exit(7)", 7, "os._exit", 7),
        ("os._exit(0)", 0, "os._exit", 0),
        ("os._exit(256 + 3)", 3, "os._exit", 3),
        ("os._exit(status=7)", 7, "os._exit", 7),
        ("threading.Thread(target=os._exit, args=(5,)).start(); threading.Event().wait()", 5, "os._exit", 5),
        ("words.exit(1, 'its lease is over')", 1, "its lease is over", 1),
    ],
)
def test_os_exit_is_noted_and_done(last_words, program, code, message, returncode):
    ending, real, _ = last_words(program)
    assert ending == Ending(EndKind.EXITED, exit_code=code, message=message)
    assert real == returncode


@pytest.mark.parametrize(
    ("program", "number"),
    [
        ("ctypes.string_at(0)", signal.SIGSEGV),
        ("os.abort()", signal.SIGABRT),
        ("os.kill(os.getpid(), 7)", signal.SIGBUS),
        ("os.kill(os.getpid(), 4)", signal.SIGILL),
        ("os.kill(os.getpid(), 8)", signal.SIGFPE),
    ],
)
def test_a_crash_leaves_its_signal_and_its_stack(last_words, program, number):
    ending, real, _ = last_words(f"def train_fn():\n    {program}\ntrain_fn()")
    assert (ending.kind, ending.signal) == (EndKind.SIGNALED, number)
    assert "in train_fn" in ending.traceback
    assert real == -number


@pytest.mark.parametrize("program", ["", "sys.exit(3)", "raise ValueError", "os.kill(os.getpid(), 9)"])
def test_who_just_ends_leaves_no_words(last_words, program):
    ending, _, _ = last_words(program)
    assert ending is None


def test_what_forked_children_do_is_not_the_process_own_ending(last_words):
    """multiprocessing's children, such as DataLoader workers, end with os._exit; and theirs may crash."""
    ending, real, errors = last_words(
        "fork = multiprocessing.get_context('fork')\n"
        "for work, code in ((int, 0), (lambda: os._exit(7), 7), (lambda: ctypes.string_at(0), -11)):\n"
        "    child = fork.Process(target=work); child.start(); child.join()\n"
        "    assert child.exitcode == code, child.exitcode\n"
        "os.kill(os.getpid(), 9)"
    )
    assert ending is None
    assert real == -9
    assert "Segmentation fault" in errors  # on stderr, where it would have been without last words


def test_a_full_disk_keeps_nobody_from_ending(tmp_path, python):
    process = python(
        "import os, sys\n"
        "from raylaunch.worker.processes import LastWords, start_time\n"
        "os.symlink('/dev/full', f'{sys.argv[1]}/{os.getpid()}-{start_time(os.getpid())}.txt')\n"
        "LastWords(sys.argv[1])\n"
        "os._exit(7)",
        str(tmp_path),
    )
    _, errors = process.communicate()
    assert process.returncode == 7, errors


@pytest.mark.parametrize(
    ("says", "ending"),
    [
        ("Ending(EndKind.RAISED, message='a\\n{b}')", Ending(EndKind.RAISED, message="a\n{b}")),
        ("None", Ending(EndKind.EXITED, exit_code=1, message=REPLACED)),
        ("1 / 0", Ending(EndKind.EXITED, exit_code=1, message=REPLACED)),  # whatever happens there, it leaves
    ],
)
def test_who_is_asked_for_last_words_says_them_and_leaves_at_once(tmp_path, python, says, ending):
    process = python(
        "import sys, threading\n"
        "from raylaunch.errors import Ending, EndKind\n"
        "from raylaunch.worker.processes import LastWords\n"
        f"LastWords(sys.argv[1]).leave_when_asked(lambda: {says})\n"
        "print('up', flush=True)\n"
        "threading.Event().wait()",
        str(tmp_path),
    )
    assert process.stdout.readline() == "up\n"
    who = identity(process)
    assert ask_for_last_words(str(tmp_path), who)
    assert process.wait(10) == 1
    assert read_last_words(str(tmp_path), who) == ending
    assert not ask_for_last_words(str(tmp_path), who)
    forget_last_words(str(tmp_path), who)
    assert not list(tmp_path.iterdir())


def test_words_that_are_no_words(tmp_path):
    (tmp_path / "1-2.txt").write_bytes(b"\xff\xfe raylaunch: exit soon: never\nFatal Python error: Nonsense\n")
    assert read_last_words(str(tmp_path), Process(1, 2)) is None
    assert read_last_words(str(tmp_path / "nowhere"), Process(1, 2)) is None


def test_only_the_standard_library_is_imported(python):
    program = "import sys, raylaunch.worker.processes; print(sorted({'torch', 'ray', 'numpy'} & set(sys.modules)))"
    out, errors = python(program).communicate()
    assert out == "[]\n", errors


def test_having_no_descriptor_free_is_not_taken_for_an_end(python):
    process = python(
        "import os, resource\n"
        "from raylaunch.coordinator.commands import Process\n"
        "from raylaunch.worker.processes import Watch, start_time\n"
        "myself = Process(os.getpid(), start_time(os.getpid()))\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\n"
        "Watch(myself)"
    )
    _, errors = process.communicate()
    assert "Too many open files" in errors


def test_a_process_with_a_sigkill_on_its_way_is_doomed_before_it_has_ended():
    with subprocess.Popen(["sleep", "60"]) as child:
        watch = Watch(Process(child.pid, start_time(child.pid)))
        assert not watch.doomed()
        child.kill()
        assert watch.doomed()
        child.wait()
        assert watch.doomed()
        watch.close()
