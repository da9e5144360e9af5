"""The forker, without Ray: what its forks are like, how their ends are told, and that nothing of them stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from harness import eventually, runs

from raylaunch.command import Entry
from raylaunch.coordinator.commands import Process
from raylaunch.errors import Ending, EndKind
from raylaunch.worker.forked import Order
from raylaunch.worker.forker_client import ForkerClient, ForkerError
from raylaunch.worker.forker_keeper import ForkerKeeper, Settings, start_forker
from raylaunch.worker.processes import Watch, end_process, start_time, strays
from raylaunch.worker.sessions import is_in_session_of

SECONDS = 20.0


class Node:
    """A forker, and what asks it for ranks: this process, or others."""

    def __init__(self, folder: Path, python, **settings):
        self.folder = folder
        self.directory = folder / "directory"
        self.python = python
        self.raylet = python("input()")
        self.settings = Settings(
            str(self.directory),
            Process(self.raylet.pid, start_time(self.raylet.pid)),
            **{"stop_seconds": 5.0, "lease": 60.0, "preload": (), **settings},
        )
        self.forker, self.agent = start_forker(self.settings, {**os.environ, "RAYLAUNCH_RUN_ID": "test"})
        self.clients: list[ForkerClient] = []
        self.orders = 0

    def client(self):
        made = ForkerClient(str(self.directory), SECONDS)
        self.clients.append(made)
        return made

    def order(self, text, *args, entry=Entry.SCRIPT, generation=1, env=None, fresh=False, target=None):
        self.orders += 1
        script = self.folder / f"script{self.orders}.py"
        script.write_text(textwrap.dedent(text))
        out, err = (self.folder / f"{self.orders}.{name}" for name in ("out", "err"))
        out.touch()
        return Order(
            generation=generation,
            entry=entry,
            target=target or script.name,
            args=args,
            cwd=str(self.folder),
            env={**os.environ, **(env or {})},
            stdout=str(out),
            stderr=str(err),
            fresh_interpreter=fresh,
            mark=str(self.folder / "mark"),
        )

    def run(self, text, *args, **options):
        """Run to the end: (ending, stdout, stderr)."""
        order = self.order(text, *args, **options)
        client = self.client()
        client.start(order)
        ending = client.wait()
        client.close()
        return ending, Path(order.stdout).read_text(), Path(order.stderr).read_text()

    def start(self, text, *args, client=None, **options):
        """Start something that says `up` when it is ready for the test: (client, pid, order)."""
        order = self.order(text, *args, **options)
        client = client or self.client()
        pid = client.start(order)
        eventually(lambda: "up" in Path(order.stdout).read_text(), "it is up", SECONDS)
        return client, pid, order

    def close(self):
        self.agent.close()
        end_process(self.forker, SECONDS)
        for client in self.clients:
            client.close()


@pytest.fixture
def node(tmp_path, python):
    made = Node(tmp_path, python)
    yield made
    made.close()


@pytest.fixture
def hasty(tmp_path, python):
    """One that gives ranks half a second to end."""
    made = Node(tmp_path, python, stop_seconds=0.5)
    yield made
    made.close()


def says(text):
    """What a script prints as JSON."""
    return f"import json, os, sys, signal, random, __main__; print(json.dumps({text}))"


FRESH = pytest.mark.parametrize("fresh", [False, True], ids=["forked", "a new interpreter"])


@FRESH
@pytest.mark.parametrize(
    ("text", "ending"),
    [
        ("pass", Ending(EndKind.RETURNED)),
        ("import sys; sys.exit()", Ending(EndKind.RETURNED)),
        ("import sys; sys.exit(3)", Ending(EndKind.EXITED, exit_code=3)),
        ("import sys; sys.exit('text')", Ending(EndKind.EXITED, exit_code=1)),
        ("import os; os._exit(7)", Ending(EndKind.EXITED, exit_code=7)),
        ("raise ValueError", Ending(EndKind.EXITED, exit_code=1)),
        ("raise KeyboardInterrupt", Ending(EndKind.SIGNALED, signal=signal.SIGINT)),
        ("import os; os.kill(os.getpid(), 9)", Ending(EndKind.SIGNALED, signal=signal.SIGKILL)),
        ("import os; os.kill(os.getpid(), 15)", Ending(EndKind.SIGNALED, signal=signal.SIGTERM)),
        ("import os; os.abort()", Ending(EndKind.SIGNALED, signal=signal.SIGABRT)),
        ("not python", Ending(EndKind.EXITED, exit_code=1)),
    ],
)
def test_an_end_is_told_exactly(node, text, ending, fresh):
    assert node.run(text, fresh=fresh)[0] == ending


@pytest.mark.parametrize(
    "text",
    [
        "import sys; sys.exit('text')",
        "def f():\n    raise ValueError('x')\nf()",
        "not python",
        "import atexit\natexit.register(print, 'bye')\nprint('no newline', end='')\nraise KeyError(1)",
        "try:\n    1 / 0\nexcept ZeroDivisionError:\n    raise ValueError('second')",
        "import threading\nthreading.Timer(0.1, print, ['from a thread']).start()\nprint('main is done')",
        "import sys\nsys.excepthook = lambda *e: print('hook', e[0].__name__, e[2].tb_lineno)\nraise KeyError(1)",
        "import warnings; warnings.warn('look')",
    ],
)
def test_a_fork_says_what_a_fresh_interpreter_says(node, text):
    order = node.order(text)
    client = node.client()
    client.start(order)
    client.wait()
    fresh = subprocess.run(
        [sys.executable, "-u", order.target], cwd=node.folder, capture_output=True, text=True, check=False
    )
    assert Path(order.stdout).read_text() == fresh.stdout
    assert Path(order.stderr).read_text() == fresh.stderr


ABOUT = """{
    "argv": sys.argv, "path": sys.path, "name": __name__, "file": __file__, "main": sorted(vars(__main__)),
    "module": sys.modules["__main__"].__dict__ is globals(), "cwd": os.getcwd(), "flags": list(sys.flags),
    "executable": sys.executable, "doc": __doc__, "package": __package__, "orig": sys.orig_argv[1:],
    "blocked": list(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "handlers": [repr(signal.getsignal(n))[:20] for n in range(1, 32)],
    "write_through": sys.stdout.write_through, "encoding": [sys.stdout.encoding, sys.stdout.errors, sys.stderr.errors],
    "loader": type(__loader__).__name__,
}"""


@pytest.mark.parametrize("entry", [Entry.SCRIPT, Entry.MODULE])
def test_a_fork_is_like_a_fresh_interpreter(node, entry):
    order = node.order(says(ABOUT), "a", "--b=c d", entry=entry, env={"PYTHONPATH": os.environ.get("PYTHONPATH", "")})
    if entry is Entry.MODULE:
        order = Order(**{**vars(order), "target": "script1"})
    client = node.client()
    client.start(order)
    client.wait()
    how = [order.target] if entry is Entry.SCRIPT else ["-m", order.target]
    fresh = subprocess.run(
        [sys.executable, "-u", *how, *order.args], cwd=node.folder, capture_output=True, text=True, check=True
    )
    assert Path(order.stderr).read_text() == ""
    assert json.loads(Path(order.stdout).read_text()) == json.loads(fresh.stdout)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_folder_and_a_zip_are_like_those_of_a_fresh_interpreter(node, kind):
    text = says("[sys.argv, sys.path, __name__, os.path.basename(__file__)]")
    if kind == "folder":
        (node.folder / "app").mkdir()
        (node.folder / "app" / "__main__.py").write_text(text)
    else:
        with zipfile.ZipFile(node.folder / "app", "w") as file:
            file.writestr("__main__.py", text)
    order = node.order("", "a", env={"PYTHONPATH": os.environ.get("PYTHONPATH", "")})
    order = Order(**{**vars(order), "target": "app"})
    client = node.client()
    client.start(order)
    client.wait()
    fresh = subprocess.run(
        [sys.executable, "-u", "app", "a"], cwd=node.folder, capture_output=True, text=True, check=True
    )
    assert json.loads(Path(order.stdout).read_text()) == json.loads(fresh.stdout)


def test_run_path_leaves_sys_path_alone(node):
    _, out, _ = node.run(says("[sys.argv, __name__, os.getcwd() in sys.path]"), "x", entry=Entry.RUN_PATH)
    argv, name, there = json.loads(out)
    assert (len(argv), argv[1:], name, there) == (2, ["x"], "__main__", False)


def test_a_program_is_executed(node):
    order = node.order("", "-c", 'echo "$0 $X"; exit 4', entry=Entry.PROGRAM, target="sh", env={"X": "y"})
    client = node.client()
    client.start(order)
    assert client.wait() == Ending(EndKind.EXITED, exit_code=4)
    assert Path(order.stdout).read_text() == "sh y\n"
    order = node.order("", entry=Entry.PROGRAM, target="no-such-program")
    client = node.client()
    client.start(order)
    assert client.wait() == Ending(EndKind.EXITED, exit_code=127)
    assert "no-such-program" in Path(order.stderr).read_text()


def test_the_environment_is_the_one_that_was_given(node):
    order = node.order(says("dict(os.environ)"))
    given = {"A": "1", "B": "zwei\udcff", "PATH": "/bin"}
    client = node.client()
    client.start(Order(**{**vars(order), "env": given}))
    client.wait()
    assert {**json.loads(Path(order.stdout).read_text()), "LC_CTYPE": ""} == {**given, "LC_CTYPE": ""}


def test_a_rank_leads_a_session_of_its_own_and_inherits_nothing(node, tmp_path):
    (tmp_path / "mark").touch()
    clients = [node.client() for _ in range(3)]
    _, out, _ = node.run(
        says("[os.getpid(), os.getsid(0), os.readlink('/proc/self/fd/0'), os.listdir('/proc/self/fd')]")
    )
    pid, session, stdin, descriptors = json.loads(out)
    assert pid == session
    assert stdin == "/dev/null"
    assert set(descriptors) == {"0", "1", "2", "3", "100"}  # 3: the list's own; 100: what its forks are known by
    for client in clients:
        client.close()


def test_seeds_differ(tmp_path, python):
    node = Node(tmp_path, python, preload=("numpy",))
    try:
        text = "import random, numpy; print(random.random(), numpy.random.rand())"
        drawn = [number for _ in range(3) for number in node.run(text)[1].split()]
        assert len(set(drawn)) == len(drawn) == 6
    finally:
        node.close()


def test_an_end_is_noticed_at_once(node):
    delays = []
    for _ in range(5):
        order = node.order("import time; print(repr(time.monotonic()), end='', flush=True); import os; os._exit(0)")
        client = node.client()
        client.start(order)
        client.wait()
        delays.append(time.monotonic() - float(Path(order.stdout).read_text()))
        client.close()
    assert min(delays) < 0.02


CHILDREN = """
import os, signal, subprocess, sys, time
kids = [subprocess.Popen(["sleep", "1000"]).pid]
fork = os.fork()
if not fork:
    if "leaves" in sys.argv:
        os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN if "deaf" in sys.argv else signal.SIG_DFL)
    time.sleep(1000)
if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, lambda *_: print("asked", flush=True))
print(os.getpid(), fork, *kids, flush=True)
print("up", flush=True)
while True:
    time.sleep(1000)
"""


def pids_of(order):
    return [int(pid) for pid in Path(order.stdout).read_text().splitlines()[0].split()]


def gone(pids, seconds=SECONDS):
    eventually(lambda: not any(map(runs, pids)), f"{pids} are gone", seconds)


def test_a_worker_that_goes_takes_its_session_along(node):
    client, pid, order = node.start(CHILDREN)
    pids = pids_of(order)
    assert pid in pids
    client.close()
    gone(pids)
    assert runs(node.forker.pid)


@pytest.mark.parametrize("how", ["stop", "close"])
def test_who_does_not_listen_to_sigterm_is_killed_when_its_time_is_over(hasty, how):
    client, _, order = hasty.start(CHILDREN, "deaf")
    pids = pids_of(order)
    began = time.monotonic()
    getattr(client, how)()
    eventually(lambda: "asked" in Path(order.stdout).read_text(), "SIGTERM comes first", SECONDS)
    if how == "stop":
        client.close()  # as a worker is killed that didn't stop in time: nobody is asked twice, or has more time
    gone(pids)
    assert 0.5 <= time.monotonic() - began < 3
    assert Path(order.stdout).read_text().count("asked") == 1


def test_a_stop_reaches_the_whole_session_and_comes_once(node):
    client, _, order = node.start(CHILDREN)
    client.stop()
    assert client.wait() == Ending(EndKind.SIGNALED, signal=signal.SIGTERM)
    gone(pids_of(order))
    client.close()


def test_a_new_generation_starts_when_the_old_ones_are_gone(hasty):
    node = hasty
    old, _, order = node.start(CHILDREN, "deaf", generation=1)
    pids = pids_of(order)
    new, _, after = node.start(
        f"import os; print([os.path.exists(f'/proc/{{p}}/exe') for p in {pids}], 'up')", generation=2
    )
    assert Path(after.stdout).read_text() == "[False, False, False] up\n"
    assert old.wait() == Ending(EndKind.SIGNALED, signal=signal.SIGKILL)
    assert new.wait() == Ending(EndKind.RETURNED)
    old.close()
    new.close()


def test_what_waits_can_be_called_off(node):
    _old, _, _ = node.start(CHILDREN, "deaf", generation=1)
    new = node.client()
    threading.Timer(0.3, new.stop).start()
    assert new.start(node.order("", generation=2)) == 0
    assert new.wait() == Ending(EndKind.SIGNALED, signal=signal.SIGTERM)


def test_a_forker_that_dies_takes_its_ranks_along_and_its_workers_hear_of_it(node):
    client, pid, _ = node.start("import time; print('up'); time.sleep(1000)")
    with Watch(node.forker) as watch:
        watch.kill()
    gone([pid])
    with pytest.raises(ForkerError, match="has ended"):
        client.wait()


def test_it_stays_while_there_are_ranks_and_goes_with_the_last(node):
    client, pid, _ = node.start("import time; print('up'); time.sleep(1000)")
    node.agent.close()
    other = node.client()  # an agent may die and come back: the ranks go on
    assert other.start(node.order("")) > 0
    other.wait()
    other.close()
    assert runs(pid)
    client.close()
    gone([pid, node.forker.pid])


def test_when_the_raylet_goes_everything_goes_at_once(node):
    _client, _, order = node.start(CHILDREN, "deaf")
    node.raylet.kill()
    node.raylet.wait()
    gone([*pids_of(order), node.forker.pid], 4.0)


def test_a_stopped_rank_is_ended_too(node):
    client, pid, order = node.start(CHILDREN)
    os.kill(pid, signal.SIGSTOP)
    client.close()
    gone(pids_of(order), 4.0)


def test_a_killed_worker_is_one_that_goes(node, python):
    worker = python(
        f"""
import json
from raylaunch.worker.forked import Order
from raylaunch.worker.forker_client import ForkerClient
client = ForkerClient({str(node.directory)!r}, 10)
print(client.start(Order.parse(json.loads(input()))), flush=True)
input()
"""
    )
    order = node.order(CHILDREN)
    worker.stdin.write(json.dumps({**vars(order), "entry": "script"}) + "\n")
    worker.stdin.flush()
    worker.stdout.readline()
    eventually(lambda: "up" in Path(order.stdout).read_text(), "it is up", SECONDS)
    worker.kill()
    worker.wait()
    gone(pids_of(order))


def test_who_leaves_the_session_is_known_by_the_file_that_the_rank_holds_open(node, python):
    worker = python(
        "from raylaunch.worker.processes import LastWords; import sys\n"
        f"words = LastWords({str(node.directory)!r}); print(words.path, flush=True); input()"
    )
    mark = worker.stdout.readline().strip()
    order = node.order(CHILDREN, "leaves")
    client = node.client()
    client.start(Order(**{**vars(order), "mark": mark}))
    eventually(lambda: "up" in Path(order.stdout).read_text(), "it is up", SECONDS)
    rank, left, _ = pids_of(order)
    owned = {process.pid: process for process, owner in strays("token", str(node.directory)) if owner.pid == worker.pid}
    assert {rank, left} <= set(owned)
    assert is_in_session_of(owned[rank], node.forker.pid)
    assert not is_in_session_of(owned[left], node.forker.pid)
    client.close()
    gone([rank])
    os.kill(left, signal.SIGKILL)


def test_a_keeper_starts_a_new_forker_when_one_has_died(tmp_path, python):
    node = Node(tmp_path, python)
    node.close()
    keeper = ForkerKeeper(node.settings, os.environ)
    eventually(keeper.lives, "there is a forker", SECONDS)
    first = node.client()
    assert first.start(node.order("")) > 0
    died = keeper._forker
    os.kill(died.pid, signal.SIGKILL)
    with pytest.raises(ForkerError, match="has ended"):
        first.wait(), first.wait()  # the rank's end may have been told before
    eventually(lambda: keeper._forker != died and keeper.lives(), "there is another", SECONDS)
    second = node.client()
    assert second.start(node.order("")) > 0
    second.wait()
    for client in (first, second):
        client.close()
    keeper.end(at_once=False)
    assert not keeper.lives()


def test_a_keeper_tries_again_what_has_failed(tmp_path, python):
    node = Node(tmp_path, python)
    node.close()
    (tmp_path / "full").touch()  # no folder: as a disk that is full, for a while
    keeper = ForkerKeeper(replace(node.settings, directory=str(tmp_path / "full")), os.environ)
    time.sleep(1.0)  # until it has failed: nothing tells
    (tmp_path / "full").unlink()
    eventually(keeper.lives, "there is one", SECONDS)
    keeper.end(at_once=False)
    assert not keeper.lives()


def test_a_keeper_ends_a_forker_that_stays_stopped(tmp_path, python):
    node = Node(tmp_path, python, lease=1.0)
    node.close()
    keeper = ForkerKeeper(node.settings, os.environ)
    eventually(keeper.lives, "there is one", SECONDS)
    first = keeper._forker
    os.kill(first.pid, signal.SIGSTOP)
    eventually(lambda: keeper._forker != first and keeper.lives(), "there is another", SECONDS)
    keeper.end(at_once=False)


def test_sigterm_to_the_forker_is_for_its_ranks(node):
    """Whoever ends a job asks all of its processes: a rank that saves then mustn't die with its forker."""
    client, pid, _ = node.start("import time; print('up'); time.sleep(1000)")
    os.kill(node.forker.pid, signal.SIGTERM)
    other = node.client()
    assert other.start(node.order("")) > 0
    assert other.wait() == Ending(EndKind.RETURNED)
    assert runs(pid)
    client.stop()
    assert client.wait() == Ending(EndKind.SIGNALED, signal=signal.SIGTERM)


def test_what_can_not_be_preloaded_is_told(tmp_path, python):
    node = Node(tmp_path, python, preload=("no_such_module",))
    try:
        with pytest.raises(ForkerError, match="no_such_module"):
            node.client().open_store("127.0.0.1")
    finally:
        node.close()


def test_ranks_share_one_import_of_torch_and_a_store_that_a_fork_holds(tmp_path, python):
    """torch once: the stores, a group over env:// that uses one, DataLoader's and multiprocessing's workers."""
    node = Node(tmp_path, python, preload=("torch", "torch.distributed"))
    try:
        keeper = node.client()
        _, port = keeper.open_store("127.0.0.1")
        env = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": "2",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        text = """
            import multiprocessing, sys, torch
            import torch.distributed as dist
            from torch.utils.data import DataLoader

            def double(x):
                return 2 * x

            if __name__ == "__main__":
                dist.init_process_group("gloo")
                sum = torch.tensor([1.0 + dist.get_rank()])
                dist.all_reduce(sum)
                print(sum.item())
                print(torch.initial_seed(), torch.rand(1).item(), file=sys.stderr)
                print(sorted(x.item() for x in DataLoader(range(4), num_workers=2)))
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    print(pool.map(double, [1, 2]))
                dist.destroy_process_group()
            """
        orders = [node.order(text, env={**env, "RANK": str(rank)}) for rank in range(2)]
        clients = [node.client() for _ in orders]
        for client, order in zip(clients, orders, strict=True):
            client.start(order)
        for client, order in zip(clients, orders, strict=True):
            assert client.wait() == Ending(EndKind.RETURNED), Path(order.stderr).read_text()
            lines = Path(order.stdout).read_text().splitlines()
            assert lines == ["3.0", "[0, 1, 2, 3]", "[2, 4]"]
        drawn = [set(Path(order.stderr).read_text().split()) for order in orders]
        assert not drawn[0] & drawn[1]
    finally:
        node.close()


def test_who_holds_the_store_stands_for_the_worker(hasty, python):
    """Ended, by whomever, it takes the rank's session along; and it goes with the connection."""
    hasty.close()
    node = Node(hasty.folder, python, preload=("torch.distributed",), stop_seconds=0.5)
    try:
        client = node.client()
        holder, _ = client.open_store("127.0.0.1")
        _, rank, _ = node.start("import time; print('up'); time.sleep(1000)", client=client)
        os.kill(holder.pid, signal.SIGKILL)
        with pytest.raises(ForkerError, match="has ended"):
            client.wait()
        gone([rank, holder.pid])
        other = node.client()
        holder, _ = other.open_store("127.0.0.1")
        other.close()
        gone([holder.pid])
    finally:
        node.close()


def test_a_new_forker_starts_no_rank_before_those_of_the_old_one_are_gone(tmp_path, python):
    """An agent was killed and started again: its first forker still ends what it has."""
    old = Node(tmp_path, python, stop_seconds=2.0)
    client, deaf, _ = old.start(CHILDREN, "deaf")
    old.agent.close()
    client.close()
    new = Node(tmp_path, python)
    try:
        asked = new.client()
        asked.start(new.order("pass"))
        assert not Path(f"/proc/{deaf}/exe").exists()
    finally:
        new.close()


def test_the_ranks_of_later_generations_find_imported_what_ddp_imports(tmp_path, python):
    node = Node(tmp_path, python, preload=("torch",))
    look = "import sys; print('up', 'torch._dynamo' in sys.modules); import time; time.sleep(1000 * int(sys.argv[1]))"
    try:
        client, _, first = node.start(look, "1")
        assert Path(first.stdout).read_text() == "up False\n"
        tasks = Path(f"/proc/{node.forker.pid}/task")
        usual = len(list(tasks.iterdir()))
        eventually(lambda: len(list(tasks.iterdir())) > usual, "it imports", SECONDS)
        _, out, _ = node.run(look, "0")
        assert out == "up True\n"
        assert len(list(tasks.iterdir())) == usual
        client.close()
    finally:
        node.close()
