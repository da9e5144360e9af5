"""`raylaunch run` where `torchrun` stood: what ranks see, what the launcher says, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest
from command_lines import PRELUDE, SEES, CommandLine, said
from harness import eventually, runs

LAUNCH = ("raylaunch.launch",)


# -- what a rank sees ------------------------------------------------------------------------------------------------


def test_a_script_is_run_as_the_ranks_of_one_group(one_node, command, tmp_path):
    line = "LOGS --nproc-per-node=2 --rdzv-id=job-7 --role=trainer --max-restarts=2 --rdzv-backend=c10d"
    run = command(
        f"{line} --rdzv-endpoint=head:29400 train.py --lr 0.1 --nproc-per-node",
        SEES,
        MY_FLAG="on",
        RANK="9",
        PYTHONBREAKPOINT="0",
    )
    assert run.exit_code() == 0, run.stderr
    for rank in ("0", "1"):
        seen = said(run, f"sees-{rank}")
        assert seen["argv"] == ["train.py", "--lr", "0.1", "--nproc-per-node"]
        assert (seen["cwd"], seen["name"]) == (str(tmp_path), "__main__")
        assert seen["torch"]  # it was imported before the fork
        env = seen["env"]
        assert {name: env[name] for name in ("RANK", "LOCAL_RANK", "ROLE_RANK")} == dict.fromkeys(
            ("RANK", "LOCAL_RANK", "ROLE_RANK"), rank
        )
        assert (env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"], env["GROUP_WORLD_SIZE"]) == ("2", "2", "1")
        assert (env["TORCHELASTIC_RUN_ID"], env["TORCHELASTIC_MAX_RESTARTS"]) == ("job-7", "2")
        assert (env["ROLE_NAME"], env["MY_FLAG"], env["OMP_NUM_THREADS"]) == ("trainer", "on", "1")
        assert env["PYTHONBREAKPOINT"] == "0"  # not Ray's debugger
    assert run.stdout == "hello from 0\n"
    notes = [one for one in run.stderr.splitlines() if "without effect" in one]
    assert len(notes) == 1
    assert "--rdzv-backend, --rdzv-endpoint" in notes[0]
    assert run.stderr.count("OMP_NUM_THREADS is 1") == 1
    assert (tmp_path / "runs" / "job-7" / "generation_1" / "1" / "stdout.log").read_text() == "hello from 1\n"


def test_workers_may_be_counted_by_the_cluster_and_reserve_what_is_said(one_node, command):
    """The node has four CPUs, whatever the launcher's machine has."""
    line = "LOGS --address ADDRESS --nproc-per-node=auto --resources-per-worker CPU=2 --no-preload"
    run = command(f"{line} --numa-binding=node train.py", SEES, RAY_ADDRESS="127.0.0.1:1")
    assert run.exit_code() == 0, run.stderr
    assert not said(run, "sees-1")["torch"]
    several = len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) > 1
    assert several or "no NUMA binding (node)" in run.stderr
    env = said(run, "sees-1")["env"]
    assert (env["WORLD_SIZE"], env["OMP_NUM_THREADS"]) == ("2", "2")


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("-m package.train x", "package/train.py"),
        pytest.param("--run-path HERE/train.py x", "train.py", marks=pytest.mark.slow),
    ],
)
def test_a_module_and_a_path_are_run_as_python_does(command, tmp_path, line, name):
    run = command(f"LOGS {line}", SEES, name=name)
    assert run.exit_code() == 0, run.stderr
    seen = said(run, "sees-0")
    assert seen["argv"] == [str(tmp_path / name), "x"]
    assert seen["name"] == "__main__"


#: A wrapper whose Python is a grandchild of the launcher's worker.
WRAPPER = '#!/bin/sh\n{python} HERE/train.py "$@"\n'


def test_a_program_that_is_not_python_is_executed(one_node, command, tmp_path):
    (tmp_path / "train.py").write_text(PRELUDE + SEES)
    wrapper = WRAPPER.format(python=sys.executable).replace("HERE", str(tmp_path))
    run = command("LOGS --no-python --nproc-per-node=2 ./wrap.sh ${local_rank} x", wrapper, name="wrap.sh")
    assert run.exit_code() == 0, run.stderr
    assert said(run, "sees-1")["argv"][1:] == ["1", "x"]
    assert said(run, "sees-1")["env"]["RANK"] == "1"


def test_the_style_of_torch_distributed_launch(one_node, command):
    run = command(
        "LOGS --nproc_per_node=2 --node_rank=0 --master_addr=h --master_port=1 train.py x",
        SEES,
        module=LAUNCH,
        OMP_NUM_THREADS="3",
    )
    assert run.exit_code() == 0, run.stderr
    assert said(run, "sees-1")["argv"][1:] == ["--local-rank=1", "x"]
    assert run.stderr.count("--master-addr, --master-port") == 1
    assert said(run, "sees-1")["env"]["OMP_NUM_THREADS"] == "3"
    assert "OMP_NUM_THREADS" not in run.stderr  # it was chosen


@pytest.mark.slow
def test_a_program_in_the_style_of_launch_is_told_by_its_environment_only(one_node, command, tmp_path):
    (tmp_path / "train.py").write_text(PRELUDE + SEES)
    wrapper = WRAPPER.format(python=sys.executable).replace("HERE", str(tmp_path))
    run = command("LOGS --nproc_per_node=2 ./wrap.sh x", wrapper, name="wrap.sh", module=LAUNCH)
    assert run.exit_code() == 0, run.stderr
    assert said(run, "sees-1")["argv"][1:] == ["x"]
    assert said(run, "sees-1")["env"]["LOCAL_RANK"] == "1"


def test_output_goes_where_the_options_say(one_node, command, tmp_path):
    line = (
        "LOGS --nproc-per-node=3 --rdzv-id=logs --role=trainer --tee 1:3,2:1 --redirects 0:3 --local-ranks-filter=0,1"
        " --event-log-handler=console --duplicate-stderr-filters=complaint"
    )
    run = command(
        f"{line} --duplicate-stdout-filters apple train.py",
        """
print("apple" if RANK == "1" else "pear", RANK)
print("complaint", RANK, file=sys.stderr)
""",
    )
    assert run.exit_code() == 0, run.stderr
    assert run.stdout == "[trainer1]:apple 1\n"
    assert [one for one in run.stderr.splitlines() if "complaint" in one] == ["[trainer1]:complaint 1"]
    folder = tmp_path / "runs" / "logs"
    assert (folder / "filtered_stdout.log").read_text().endswith("apple 1\n")
    assert (folder / "filtered_stderr.log").read_text().endswith("complaint 1\n")
    told = [one for one in run.stderr.splitlines() if "torchelastic.worker.status.SUCCEEDED" in one]
    assert len(told) == 4  # of each rank, and of the agent
    files = [(folder / "generation_1" / rank / "stdout.log").read_text() for rank in ("0", "1", "2")]
    assert files == ["pear 0\n", "apple 1\n", "pear 2\n"]


# -- how it ends -----------------------------------------------------------------------------------------------------


def test_the_root_causes_exit_code_is_the_launchers_and_the_table_says_why(one_node, command, tmp_path):
    run = command(
        "LOGS --nproc-per-node=2 --rdzv-id=fails train.py",
        """
if RANK == "1":
    print("out of luck", file=sys.stderr)
    sys.exit(3)
time.sleep(1000)
""",
    )
    assert run.exit_code() == 3, run.stderr
    table = run.stderr[run.stderr.index("train.py FAILED") :]
    assert "rank      : 1 (local_rank: 1)" in table
    assert "exitcode  : 3" in table
    assert f"error_file: {tmp_path}/runs/fails/generation_1/1/error.json" in table
    assert "out of luck" in table
    assert "Other failures" not in table  # rank 0 was ended by us
    assert run.stdout == ""  # nor Ray's notice that a worker has died


def test_what_a_script_raised_is_in_the_table(one_node, command):
    run = command("LOGS train.py", "raise ValueError('no such column')")
    assert run.exit_code() == 1, run.stderr
    table = run.stderr[run.stderr.index("train.py FAILED") :]
    assert "traceback:" in table
    assert "ValueError: no such column" in table


def test_a_signal_is_128_more(one_node, command):
    run = command("LOGS train.py", "os.kill(os.getpid(), signal.SIGKILL)")
    assert run.exit_code() == 137, run.stderr
    assert "exitcode  : -9 (SIGKILL)" in run.stderr


def test_a_cluster_that_is_not_there_is_named_at_once(one_node, command):
    run = command("LOGS train.py", RAY_ADDRESS="127.0.0.1:1")
    assert run.exit_code() == 1
    assert "RAY_ADDRESS=127.0.0.1:1: no Ray cluster answers there" in run.stderr


def test_what_ray_would_refuse_starts_no_ray(one_node, command):
    run = command("LOGS --standalone --label-selector zone=in( train.py")
    assert run.exit_code() == 2
    assert "label_selector={'zone': 'in('}" in run.stderr
    assert "without effect" not in run.stderr


def test_a_script_that_is_not_there_is_named_with_its_node(one_node, command, tmp_path):
    run = command("LOGS missing.py")
    assert run.exit_code() == 1
    assert f"there is no script {tmp_path / 'missing.py'}" in run.stderr


CLEANS_UP = """
def leave(number, frame):
    say(f"cleaned-up-{RANK}", number)
    sys.exit(0)

signal.signal(signal.SIGTERM, leave)
say(f"up-{RANK}")
wait_for("never")
"""


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
    ],
)
def test_a_launcher_that_is_told_to_end_lets_ranks_clean_up(one_node, command, number, code):
    run = command("LOGS --nproc-per-node=2 train.py", CLEANS_UP)
    for rank in (0, 1):
        run.wait_for(f"up-{rank}")
    run.signal(number)
    assert run.exit_code() == code, run.stderr
    assert said(run, "cleaned-up-0") == said(run, "cleaned-up-1") == signal.SIGTERM
    assert "the run is stopped" in run.stderr


def test_a_second_ctrl_c_ends_at_once_what_takes_no_notice(one_node, command):
    deaf = """
import subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
kids = [subprocess.Popen(["sleep", "1000"], start_new_session=new).pid for new in (False, True)]
say(f"up-{RANK}", [os.getpid(), *kids])
wait_for("never")
"""
    run = command("LOGS --nproc-per-node=2 --shutdown-timeout=600 train.py", deaf)
    pids = json.loads(run.wait_for("up-0")) + json.loads(run.wait_for("up-1"))
    run.signal(signal.SIGINT)
    eventually(lambda: "the workers have 600 s" in run.stderr, "the first Ctrl-C is heard")
    assert all(map(runs, pids))
    run.signal(signal.SIGINT)
    assert run.process.wait(30) == 130, run.stderr
    assert not any(map(runs, pids))
    assert "once more" in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_to_the_whole_process_group_leaves_a_standalone_ray_to_the_launcher(tmp_path, number, code):
    """As `timeout`, a batch system or a terminal sends it. Ray would be gone under the launcher, which then hung."""
    (tmp_path / "train.py").write_text(PRELUDE + CLEANS_UP)
    line = f"--standalone --spares 0 --log-dir {tmp_path / 'runs'} train.py"
    run = CommandLine(None, tmp_path, line.split(), start_new_session=True)
    try:
        run.wait_for("up-0")
        os.killpg(run.process.pid, number)
        assert run.process.wait(30) == code, run.stderr
        assert said(run, "cleaned-up-0") == signal.SIGTERM
    finally:
        run.end()


@pytest.mark.slow
def test_a_launcher_ends_though_its_cluster_is_gone(tmp_path):
    (tmp_path / "train.py").write_text(PRELUDE + CLEANS_UP)
    line = f"--standalone --spares 0 --shutdown-timeout=1 --log-dir {tmp_path / 'runs'} train.py"
    run = CommandLine(None, tmp_path, line.split())
    try:
        run.wait_for("up-0")
        store = [one for one in psutil.Process(run.process.pid).children() if one.name() == "gcs_server"]
        assert len(store) == 1
        store[0].kill()
        run.signal(signal.SIGTERM)
        assert run.process.wait(120) == 143, run.stderr
    finally:
        run.end()


@pytest.mark.slow
def test_ranks_that_take_no_notice_get_no_more_than_the_shutdown_timeout(one_node, command):
    deaf = 'signal.signal(signal.SIGTERM, signal.SIG_IGN); say("up"); wait_for("never")'
    run = command("LOGS --shutdown-timeout=1 train.py", deaf)
    run.wait_for("up")
    run.signal(signal.SIGTERM)
    assert run.process.wait(20) == 143, run.stderr


# -- restarts ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_failures_are_restarted_as_often_as_is_said(one_node, command):
    run = command(
        "LOGS --num-workers=2 --placement-strategy=STRICT_PACK --max-restarts=1 train.py",
        """
count = os.environ["TORCHELASTIC_RESTART_COUNT"]
say(f"rank-{RANK}-restart-{count}")
if count == "0":
    if RANK == "1":
        sys.exit(7)
    time.sleep(1000)
""",
    )
    assert run.exit_code() == 0, run.stderr
    assert (run.out / "rank-1-restart-1").exists()


# -- the cluster -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_standalone_starts_a_ray_and_stops_only_that(one_node, tmp_path):

    def rays() -> set[int]:
        return {one.pid for one in psutil.process_iter(["name"]) if one.info["name"] in ("raylet", "gcs_server")}

    before = rays()
    (tmp_path / "train.py").write_text(PRELUDE + SEES)
    line = f"--standalone --nproc-per-node=3 --spares 0 --log-dir {tmp_path / 'runs'} train.py"
    run = CommandLine(None, tmp_path, line.split())
    assert run.exit_code() == 0, run.stderr
    assert said(run, "sees-2")["env"]["WORLD_SIZE"] == "3"  # though this machine may have fewer CPUs
    assert rays() == before
