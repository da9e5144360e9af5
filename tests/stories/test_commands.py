"""Commands: what runs under torchrun runs as it is; ranks are processes of their own, and how they end is told."""

from __future__ import annotations

import os
import signal
import textwrap
from pathlib import Path

import pytest
from drivers import Driver
from harness import eventually, nothing_is_left, runs

from raylaunch import EndKind, Timeouts
from raylaunch.command import Command, Entry, Logs, Streams

#: Waits in lockstep until a file is there; says where it is by existing files.
STEPS = """
import os, sys, time
import torch, torch.distributed as dist
dist.init_process_group("gloo")
folder, rank, generation = sys.argv[1], dist.get_rank(), os.environ["RAYLAUNCH_GENERATION"]
total = torch.tensor([1.0])
dist.all_reduce(total)
print("rank", rank, "of", int(total.item()), "in generation", generation)
open(f"{folder}/up-{generation}-{rank}-{os.getpid()}", "w").close()
while True:
    enough = torch.tensor([float(os.path.exists(f"{folder}/enough"))])
    dist.all_reduce(enough)
    if enough.item():
        break
    time.sleep(0.01)
dist.destroy_process_group()
print("done")
"""


@pytest.fixture
def script(tmp_path):
    """Writes a script; its path."""

    def write(text, name="train.py"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return str(path)

    return write


def logs(run, generation=1):
    """stdout and stderr of each rank of a generation."""
    folder = run.journal.parent / f"generation_{generation}"
    return {
        int(path.name): [(path / name).read_text() for name in ("stdout.log", "stderr.log")]
        for path in folder.iterdir()
    }


def up(folder: Path, generation: int, ranks: int) -> list[int]:
    """Wait until so many ranks step; their pids by rank."""
    pattern = f"up-{generation}-*"
    eventually(lambda: len(list(folder.glob(pattern))) == ranks, f"{ranks} ranks of generation {generation} are up")
    return [int(next(folder.glob(f"up-{generation}-{rank}-*")).name.rpartition("-")[2]) for rank in range(ranks)]


def test_a_script_that_forms_its_group_itself_trains(one_node, start_command, script, tmp_path):
    (tmp_path / "enough").touch()
    run = start_command(Command(Entry.SCRIPT, script(STEPS), (str(tmp_path),)), num_workers=2)
    assert list(run.result()) == [None, None]
    for rank, (out, err) in logs(run).items():
        assert out == f"rank {rank} of 2 in generation 1\ndone\n"
        assert err == ""


def test_the_environment_is_torchruns(one_node, start_command, script, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_OWN", "flag")
    monkeypatch.setenv("RANK", "7")  # another launcher's
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    path = script(
        "import json, os, sys; print(json.dumps({'argv': sys.argv, 'cwd': os.getcwd(), 'env': dict(os.environ)}))"
    )
    command = Command(
        Entry.SCRIPT, "train.py", ("--local-rank=${local_rank}", "a b"), cwd=os.path.dirname(path), role="trainer"
    )
    run = start_command(command, num_workers=2, max_restarts=2)
    run.result()
    import json

    for rank, (out, _) in logs(run).items():
        seen = json.loads(out)
        env = seen["env"]
        assert seen["argv"] == ["train.py", f"--local-rank={rank}", "a b"]
        assert seen["cwd"] == str(tmp_path)
        expected = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "GROUP_RANK": "0",
            "GROUP_WORLD_SIZE": "1",
            "ROLE_NAME": "trainer",
            "ROLE_RANK": str(rank),
            "ROLE_WORLD_SIZE": "2",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "2",
            "TORCHELASTIC_RUN_ID": run.id,
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
            "OMP_NUM_THREADS": "1",
            "MY_OWN": "flag",
        }
        assert {name: env.get(name) for name in expected} == expected
        assert not [name for name in env if name.startswith(("RAY_", "SLURM_"))]
        assert env["MASTER_PORT"].isdigit()


@pytest.mark.parametrize("fresh", [False, True], ids=["forked", "a new interpreter"])
def test_a_script_that_exits_with_3_fails_the_run_with_3(one_node, start_command, script, fresh):
    text = """
        import os, sys, time
        if os.environ["RANK"] == "1":
            print("the data is not there", file=sys.stderr)
            sys.exit(3)
        time.sleep(1000)
        """
    run = start_command(Command(Entry.SCRIPT, script(text), fresh_interpreter=fresh), num_workers=2, max_restarts=0)
    cause = run.error().root_cause
    assert (cause.rank, cause.ending.kind, cause.ending.exit_code) == (1, EndKind.EXITED, 3)
    assert "the data is not there" in cause.ending.message


def test_a_traceback_and_a_recorded_error_reach_the_driver(one_node, start_command, script):
    text = """
        import os, time
        from torch.distributed.elastic.multiprocessing.errors import record
        def work():
            raise LookupError("no such column")
        if os.environ["RANK"] == "1":
            (record(work) if "record" in os.environ["HOW"] else work)()
        time.sleep(1000)
        """
    path = script(text)
    for how in ("plain", "record"):
        run = start_command(Command(Entry.SCRIPT, path), num_workers=2, max_restarts=0, env={"HOW": how})
        error = run.error()
        assert error.root_cause.ending.error_type == "LookupError"
        assert "no such column" in error.root_cause.describe()
        assert "in work" in str(error)


@pytest.mark.parametrize("whom", ["the command", "its worker"])
def test_a_killed_rank_re_forms_and_finishes(one_node, start_command, script, tmp_path, whom):
    run = start_command(Command(Entry.SCRIPT, script(STEPS), (str(tmp_path),)), num_workers=2)
    pids = up(tmp_path, 1, 2)
    members = run.running(1).members
    os.kill(pids[1] if whom == "the command" else members[1].process.pid, signal.SIGKILL)
    again = up(tmp_path, 2, 2)
    assert not set(pids) & set(again)
    assert not [pid for pid in pids if Path(f"/proc/{pid}/exe").exists()]  # gone before the new ones began
    (tmp_path / "enough").touch()
    result = run.result()
    assert (result.generation, result.restarts) == (2, 1)
    pid = pids[1] if whom == "the command" else members[1].process.pid
    assert f"pid {pid}) killed by SIGKILL" in result.recoveries[0].cause
    assert logs(run, 2)[1][0] == "rank 1 of 2 in generation 2\ndone\n"


@pytest.mark.slow
def test_a_forker_that_is_killed_is_a_failure_like_any_other(one_node, start_command, script, tmp_path):
    run = start_command(Command(Entry.SCRIPT, script(STEPS), (str(tmp_path),)), num_workers=2)
    pids = up(tmp_path, 1, 2)
    forker = int(Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(forker, signal.SIGKILL)
    up(tmp_path, 2, 2)
    (tmp_path / "enough").touch()
    result = run.result()
    assert result.restarts == 1
    assert "the process that forks its node's ranks is gone" in result.recoveries[0].cause


def test_a_script_that_is_not_there_names_node_and_path(one_node, start_command, tmp_path):
    run = start_command(Command(Entry.SCRIPT, "nowhere.py", cwd=str(tmp_path)), num_workers=2)
    error = run.error()
    assert error.root_cause.ending.kind is EndKind.CANNOT_WORK
    assert str(tmp_path / "nowhere.py") in str(error)
    assert one_node.nodes[0].node_id[:8] in str(error)


def test_a_program_that_is_no_python_and_starts_some(one_node, start_command, script, tmp_path):
    script("import os; print('grandchild', os.environ['RANK'])", "inner.py")
    wrapper = tmp_path / "wrapper.sh"
    wrapper.write_text('#!/bin/sh\necho "wrapper $1"\n"$PYTHON" inner.py\n')
    wrapper.chmod(0o755)
    import sys

    command = Command(Entry.PROGRAM, "./wrapper.sh", ("x",), cwd=str(tmp_path))
    run = start_command(command, num_workers=2, env={"PYTHON": sys.executable})
    run.result()
    assert [out for _, (out, _) in sorted(logs(run).items())] == [f"wrapper x\ngrandchild {rank}\n" for rank in (0, 1)]


TALKS = """
import os, sys
rank = os.environ["RANK"].encode()
for number in range(3000):
    os.write(1, b"rank %s line %d\\n" % (rank, number % 2))  # the same again and again
os.write(1, b"\\r 1%\\r 2%\\r" + b"x" * 300_000 + b"\\xff\\nno end")
os.write(2, b"rank %s warns\\n" % rank)
"""


def said(rank: bytes) -> bytes:
    """What TALKS writes to stdout."""
    lines = b"".join(b"rank %s line %d\n" % (rank, number % 2) for number in range(3000))
    return lines + b"\r 1%\r 2%\r" + b"x" * 300_000 + b"\xff\nno end"


def test_the_console_shows_rank_0_as_it_is_and_the_files_have_everybody(one_node, start_command, script, capfdbinary):
    run = start_command(Command(Entry.SCRIPT, script(TALKS)), num_workers=2)
    run.result()
    shown = capfdbinary.readouterr()
    assert said(b"0") in shown.out
    assert b"rank 1" not in shown.out + shown.err
    assert b"rank 0 warns\n" in shown.err
    for rank in (0, 1):
        folder = run.journal.parent / "generation_1" / str(rank)
        assert (folder / "stdout.log").read_bytes() == said(b"%d" % rank)


def test_ranks_that_are_teed_have_prefixes_and_those_that_are_redirected_are_silent(
    one_node, start_command, script, capfdbinary
):
    logs = Logs(tee={1: Streams.OUT}, redirects={0: Streams.ERR}, prefix="<${role_name} ${rank}> ")
    run = start_command(Command(Entry.SCRIPT, script(TALKS), role="trainer"), num_workers=2, logs=logs)
    run.result()
    shown = capfdbinary.readouterr()
    lines = [line for line in shown.out.split(b"\n") if line.startswith(b"<trainer 1> ")]
    assert lines[:3000] == [b"<trainer 1> rank 1 line %d" % (number % 2) for number in range(3000)]
    assert b"rank 0 line 1\n" in shown.out
    assert b"warns" not in shown.err


#: A driver in a process of its own, whose ranks run the script that it is given.
DRIVER = """
from raylaunch.cluster.session import Setup, launch_command
from raylaunch.command import Command, Entry, Logs
from raylaunch.spec import make_spec

spec = make_spec(num_workers=2, spares=0, run_id=run_id, timeouts=raylaunch.Timeouts(stop=float(sys.argv[5])))
setup = Setup(("torch",), None, (), None, log_dir)
launch_command(spec, setup, Command(Entry.SCRIPT, sys.argv[4], (str(gates),)), Logs())
"""

#: Every rank has children of all sorts, as in test_nothing_left.py, and is deaf to SIGTERM.
DEAF = """
    import os, signal, subprocess, sys, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    fork = os.fork()
    if not fork:
        os.setsid()
        while True:
            time.sleep(1000)
    kids = [subprocess.Popen(["sleep", "1000"], start_new_session=new).pid for new in (False, True)]
    for pid in [os.getpid(), fork, *kids]:
        open(f"{sys.argv[1]}/pid-{pid}", "w").close()
    open(f"{sys.argv[1]}/up-{os.environ['RANK']}", "w").close()
    while not os.path.exists(f"{sys.argv[1]}/enough"):
        time.sleep(0.05)
    """

#: Every rank takes its time to save when it is asked to stop.
SAVES = """
    import os, signal, sys, time
    def save(*_):
        time.sleep(0.5)
        open(f"{sys.argv[1]}/saved-{os.environ['RANK']}-{os.environ['RAYLAUNCH_GENERATION']}", "w").close()
        sys.exit(0)
    signal.signal(signal.SIGTERM, save)
    there = sorted(name for name in os.listdir(sys.argv[1]) if name.startswith("saved"))
    with open(f"{sys.argv[1]}/up-{os.environ['RAYLAUNCH_GENERATION']}-{os.environ['RANK']}-{os.getpid()}", "w") as file:
        file.write(" ".join(there))
    while not os.path.exists(f"{sys.argv[1]}/enough"):
        time.sleep(0.01)
    """


def test_a_driver_that_is_killed_leaves_nothing_of_its_commands(one_node, tmp_path, script):
    driver = Driver(one_node, tmp_path, DRIVER, arguments=(script(DEAF), "600"))
    try:
        eventually(lambda: len(list(driver.gates.glob("up-*"))) == 2, "ranks are up")
        driver.signal(signal.SIGKILL)
        pids = [int(path.name.removeprefix("pid-")) for path in driver.gates.glob("pid-*")]
        assert len(pids) == 8  # of each rank: itself, a fork, two programs; some in sessions of their own
        nothing_is_left(driver.log_dir, 10.0, pids=pids)
        notes = Path(one_node.log_dir).parent / "raylaunch"
        eventually(lambda: not list(notes.glob(f"{driver.run_id}-*")), "the sweeper is done")
    finally:
        driver.end()


def test_ctrl_c_asks_the_commands_and_waits_for_them(one_node, tmp_path, script):
    driver = Driver(one_node, tmp_path, DRIVER, arguments=(script(SAVES), "30"))
    try:
        up(driver.gates, 1, 2)
        driver.signal(signal.SIGINT)
        assert driver.exit_code() != 0
        assert len(list(driver.gates.glob("saved-*"))) == 2
        assert "KeyboardInterrupt" in driver.said()
        nothing_is_left(driver.log_dir, 10.0)
    finally:
        driver.end()


@pytest.mark.slow
def test_after_a_failure_the_other_ranks_have_their_time_before_the_next_generation_starts(
    one_node, start_command, script, tmp_path
):
    run = start_command(Command(Entry.SCRIPT, script(SAVES), (str(tmp_path),)), num_workers=2)
    pids = up(tmp_path, 1, 2)
    run.running(1)
    os.kill(pids[0], signal.SIGKILL)
    up(tmp_path, 2, 2)
    seen = lambda: [path.read_text() for path in tmp_path.glob("up-2-*")]  # noqa: E731
    eventually(lambda: seen() == ["saved-1-1"] * 2, "generation 2 finds what the first has saved")
    (tmp_path / "enough").touch()
    assert run.result().restarts == 1


def test_what_leaves_its_session_is_ended_with_its_rank(one_node, start_command, script, tmp_path):
    run = start_command(
        Command(Entry.SCRIPT, script(DEAF), (str(tmp_path),)), num_workers=1, timeouts=Timeouts(stop=0.5)
    )
    eventually(lambda: list(tmp_path.glob("up-0")), "the rank is up")
    (tmp_path / "up-0").unlink()
    first = {int(path.name.removeprefix("pid-")) for path in tmp_path.glob("pid-*")}
    assert len(first) == 4  # the rank, its fork and two programs
    os.kill(run.running().members[0].process.pid, signal.SIGKILL)
    eventually(lambda: list(tmp_path.glob("up-0")), "the next one is up")
    eventually(lambda: not any(map(runs, first)), f"{first} are gone", 10.0)
    (tmp_path / "enough").touch()
    run.result()
