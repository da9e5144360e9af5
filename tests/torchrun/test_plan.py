"""From a command line to what is run: how many, where, with which program; and what is refused."""

from __future__ import annotations

import json
import signal

import pytest

from raylaunch.command import Command, Entry, Streams
from raylaunch.errors import ConfigError
from raylaunch.torchrun.options import WITHOUT_EFFECT
from raylaunch.torchrun.parser import parse
from raylaunch.torchrun.plan import Plan, plan
from raylaunch.torchrun.sizing import Size, settled


def planned(line: str, *, launch_style: bool = False, cwd: str = "/home/me", **environ: str) -> Plan:
    return plan(parse(line.split(), launch_style=launch_style), environ, cwd)


def spec(line: str):
    asked = planned(line)
    size = settled(asked.wish)
    assert size is not None
    return asked.spec(size)


# -- how many ---------------------------------------------------------------------------------------------------------


def test_the_defaults_are_torchruns_one_worker_and_no_restart():
    asked = planned("train.py")
    assert asked.bounds == (1, 1)
    assert asked.wish.per_node == 1
    assert asked.max_restarts == 0
    assert asked.timeouts.stop == 30
    assert asked.run_id is None
    assert asked.preload == ("torch",)
    assert asked.notes == ()


def test_nodes_are_different_ray_nodes_with_so_many_workers_each():
    made = spec("--nnodes=2:4 --nproc-per-node=8 --no-use-gpu train.py")
    assert (made.bounds.min_workers, made.bounds.max_workers, made.bounds.unit) == (16, 32, 8)
    assert made.placement_strategy == "STRICT_SPREAD"
    assert made.backend is None  # the script makes its own
    assert made.bundle_resources == {"CPU": 8}


def test_one_number_of_nodes_is_no_range():
    made = spec("--nnodes=3 --nproc-per-node=2 --no-use-gpu train.py")
    assert (made.bounds.min_units, made.bounds.max_units) == (3, 3)


def test_workers_can_be_counted_wherever_they_fit():
    made = spec("--num-workers=2:6 --placement-strategy SPREAD --no-use-gpu train.py")
    assert (made.bounds.min_workers, made.bounds.max_workers, made.bounds.unit) == (2, 6, 1)
    assert made.placement_strategy == "SPREAD"


def test_gpus_are_reserved_when_they_are_asked_for():
    assert spec("--use-gpu --nproc-per-node=4 train.py").bundle_resources == {"CPU": 4, "GPU": 4}
    assert spec("--resources-per-worker CPU=2,GPU=0.5 train.py").bundle_resources == {"CPU": 2, "GPU": 0.5}
    assert planned("train.py").wish.use_gpu is None  # as the cluster has them
    assert planned("--nproc-per-node=gpu train.py").wish.use_gpu is True
    assert planned("--nproc-per-node=cpu train.py").wish.use_gpu is False


def test_what_the_cluster_has_is_not_needed_for_what_was_said():
    assert settled(planned("--nproc-per-node=2 --no-use-gpu train.py").wish) == Size(2, use_gpu=False)
    assert settled(planned("--nproc-per-node=auto train.py").wish) is None


def test_standalone_is_one_node():
    asked = planned("--standalone --nnodes=1:4 --nproc-per-node=2 train.py")
    assert asked.standalone
    assert asked.bounds == (1, 1)
    assert "--standalone" in asked.notes[0]


# -- what each rank runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("train.py --lr 1", Command(Entry.SCRIPT, "train.py", ("--lr", "1"), cwd="/home/me")),
        ("train --lr 1", Command(Entry.SCRIPT, "train", ("--lr", "1"), cwd="/home/me")),
        ("-m pkg.train x", Command(Entry.MODULE, "pkg.train", ("x",), cwd="/home/me")),
        ("--no-python ./run.sh x", Command(Entry.PROGRAM, "./run.sh", ("x",), cwd="/home/me")),
        ("--run-path --no-python /a/t.py x", Command(Entry.RUN_PATH, "/a/t.py", ("x",), cwd="/home/me")),
        ("--no-preload train.py", Command(Entry.SCRIPT, "train.py", cwd="/home/me", fresh_interpreter=True)),
        ("--numa-binding=socket t.py", Command(Entry.SCRIPT, "t.py", cwd="/home/me", numa_binding="socket")),
        ("--role trainer train.py", Command(Entry.SCRIPT, "train.py", cwd="/home/me", role="trainer")),
    ],
)
def test_the_program(line, command):
    assert planned(line).command == command


@pytest.mark.parametrize(
    ("line", "entry", "args"),
    [
        ("train.py x", Entry.SCRIPT, ("--local-rank=${local_rank}", "x")),
        ("-m pkg.train x", Entry.MODULE, ("--local-rank=${local_rank}", "x")),
        ("--use_env train.py x", Entry.SCRIPT, ("x",)),
        ("--use-env --no-python run.sh x", Entry.PROGRAM, ("x",)),
        ("run.sh x", Entry.PROGRAM, ("x",)),  # no Python: executed, and told by the environment only
        ("--use_env ./program x", Entry.PROGRAM, ("x",)),
    ],
)
def test_the_program_in_the_style_of_torch_distributed_launch(line, entry, args):
    command = planned(line, launch_style=True).command
    assert (command.entry, command.args) == (entry, args)


def test_a_folder_is_a_python_program_too(tmp_path):
    (tmp_path / "app").mkdir()
    assert planned("app", launch_style=True, cwd=str(tmp_path)).command.entry is Entry.SCRIPT


def test_another_interpreter_runs_the_script():
    command = planned("-m pkg.train x", PYTHON_EXEC="/opt/python").command
    assert (command.entry, command.target) == (Entry.PROGRAM, "/opt/python")
    assert command.args == ("-u", "-m", "pkg.train", "x")
    assert planned("train.py", PYTHON_EXEC="/opt/python").command.args == ("-u", "train.py")


# -- the rest ---------------------------------------------------------------------------------------------------------


def test_rendezvous_times_are_the_placements_and_the_last_calls():
    timeouts = planned("--rdzv-conf timeout=900,join_timeout=60,last_call_timeout=5 train.py").timeouts
    assert (timeouts.placement, timeouts.last_call) == (60, 5)
    assert planned("--rdzv-conf timeout=900 train.py").timeouts.placement == 900


def test_the_grace_period_comes_from_the_option_then_the_variable():
    variable = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "7"}
    assert planned("--shutdown-timeout=3 train.py", **variable).timeouts.stop == 3
    assert planned("train.py", **variable).timeouts.stop == 7


def test_logs():
    asked = planned(
        "--redirects 3 --tee 0:1,12:3 --local-ranks-filter=0,12 --duplicate-stdout-filters a,,b,c --log-dir logs t.py",
        TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE="${rank}|",
    )
    logs = asked.logs
    assert logs.redirects == Streams.BOTH
    assert logs.tee == {0: Streams.OUT, 12: Streams.BOTH}  # torch's own pattern ends at 9
    assert logs.local_ranks_filter == {0, 12}
    assert logs.duplicate_stdout_filters == ("a,b", "c")
    assert logs.duplicate_stderr_filters == ()
    assert logs.prefix == "${rank}|"
    assert asked.log_dir == "/home/me/logs"


def test_filters_from_the_environment(monkeypatch):
    monkeypatch.setenv("PET_DUPLICATE_STDERR_FILTERS", "a,,b,c")
    assert planned("t.py").logs.duplicate_stderr_filters == ("a,b", "c")


def test_rays_own_options(tmp_path):
    (tmp_path / "env.yaml").write_text("env_vars:\n  A: '1'\n")
    asked = planned(
        "--address 10.0.0.1:6379 --label-selector zone=a,gpu=h100 --spares 2 --preload torch,transformers"
        f" --runtime-env {tmp_path / 'env.yaml'} --rdzv-id job-7 --max-restarts 3 --virtual-local-rank train.py"
    )
    assert asked.address == "10.0.0.1:6379"
    assert asked.label_selector == {"zone": "a", "gpu": "h100"}
    assert asked.spares == 2
    assert asked.preload == ("torch", "transformers")
    assert asked.runtime_env == {"env_vars": {"A": "1"}}
    assert asked.run_id == "job-7"
    assert asked.max_restarts == 3
    assert asked.virtual_local_rank


def test_mappings_may_be_json():
    chosen = parse(["--label-selector", json.dumps({"zone": "in(a,b)"}), "train.py"])
    assert plan(chosen, {}, "/").label_selector == {"zone": "in(a,b)"}
    chosen = parse(["--resources-per-worker", json.dumps({"CPU": 2, "disk": 1}), "train.py"])
    assert plan(chosen, {}, "/").wish.resources == {"CPU": 2, "disk": 1}


def test_signals():
    assert planned("train.py").signals == (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    assert planned("--signals-to-handle SIGUSR1,SIGTERM train.py").signals == (signal.SIGUSR1, signal.SIGTERM)


def test_an_id_that_ray_does_not_allow_becomes_one_that_it_does():
    one, other = (planned(f"--rdzv-id {name} train.py") for name in ("team/job:7", "team-job:7"))
    assert one.run_id.startswith("team-job-7-")
    assert one.run_id != other.run_id
    assert "team/job:7" in one.notes[0]
    assert planned("--rdzv-id none train.py").run_id is None


@pytest.mark.parametrize("option", WITHOUT_EFFECT, ids=lambda option: option.dest)
def test_what_has_no_effect_is_said_once_in_one_line(option):
    value = {"rdzv_backend": "c10d", "start_method": "fork"}.get(option.dest, "7")
    notes = planned(f"{option.name}={value} --rdzv-conf is_host=1 train.py").notes
    assert len(notes) == 1
    assert option.name in notes[0]
    assert "is_host" in notes[0]
    assert "\n" not in notes[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--nnodes=0 t.py", "--nnodes=0: the minimum must be > 0"),
        ("--nnodes=4:2 t.py", "--nnodes=4:2: the minimum must be > 0 and <= the maximum, got 4 and 2"),
        ("--nnodes=1:2:3 t.py", 'not in "MIN:MAX" format'),
        ("--nnodes=two t.py", 'not in "MIN:MAX" format'),
        ("--nnodes=: t.py", 'not in "MIN:MAX" format'),
        ("--nproc-per-node=lots t.py", "Unsupported nproc_per_node value: lots"),
        ("--nproc-per-node=xpu t.py", "Unsupported nproc_per_node value: xpu"),
        ("--nproc-per-node=0 t.py", "--nproc-per-node=0: must be at least 1"),
        ("--max-restarts=-1 t.py", "max_restarts must be >= 0"),
        ("--rdzv-backend=etcd t.py", "there is no etcd rendezvous on Ray"),
        ("--rdzv-backend=etcd-v2 t.py", "there is no etcd rendezvous on Ray"),
        ("--rdzv-backend=zeus t.py", "the rendezvous backend 'zeus' is not known"),
        ("--rdzv-conf=join_timeout t.py", "the option 'join_timeout' must have a value"),
        ("--rdzv-conf==3 t.py", "must be in format <key1>=<value1>"),
        ("--rdzv-conf=join_timout=3 t.py", "did you mean 'join_timeout'?"),
        ("--rdzv-conf=join_timeout=soon t.py", "--rdzv-conf join_timeout=soon: must be a number of seconds"),
        ("--rdzv-conf=last_call_timeout=-1 t.py", "must be non-negative"),
        ("--shutdown-timeout=-1 t.py", "--shutdown-timeout=-1: must be non-negative"),
        ("--redirects=4 t.py", "--redirects=4: must be one of 0, 1, 2, 3"),
        ("--tee=0:1,1 t.py", "--tee=0:1,1: must be one of 0, 1, 2, 3"),
        ("--local-ranks-filter=0,a t.py", "must be a comma-separated list of integers"),
        ("--signals-to-handle=SIGFOO t.py", "there is no signal 'SIGFOO'"),
        ("--signals-to-handle=SIGKILL t.py", "lets nobody handle SIGKILL"),
        ("--no-python --module t.py", "Don't use both the '--no-python' flag and the '--module' flag"),
        ("--standalone --nnodes=2 t.py", "--standalone: starts a Ray of one node"),
        ("--standalone --address=h:1 t.py", "--standalone: starts a Ray of its own, --address=h:1 names one"),
        ("--nproc-per-node=99999999999 t.py", "num_workers=(99999999999, 99999999999): the minimum must be at most"),
        ("--num-workers=2 --nproc-per-node=2 t.py", "--num-workers=2: counts workers wherever they fit"),
        ("--num-workers=2 --nnodes=2 t.py", "--nnodes by nodes: give one"),
        ("--num-workers=0 t.py", "--num-workers=0: the minimum must be > 0"),
        ("--placement-strategy PACK t.py", "the strategy is for --num-workers"),
        ("--nproc-per-node=gpu --no-use-gpu t.py", "a worker for each GPU"),
        ("--resources-per-worker CPU t.py", "must be NAME=VALUE,... or JSON"),
        ("--resources-per-worker CPU=four t.py", "CPU must be a number, not 'four'"),
        ("--resources-per-worker CPU=-1 t.py", "CPU must be a number, at least 0"),
        ("--resources-per-worker {CPU t.py", "is no JSON"),
        ("--resources-per-worker GPU=1 --no-use-gpu t.py", "asks for GPUs"),
        ("--resources-per-worker CPU=0 --no-use-gpu t.py", "must reserve something"),
        ('--label-selector {"zone":1} t.py', "zone must be a text"),
        ("--runtime-env /no/such.yaml t.py", "is neither JSON nor a file"),
        ("--spares=some t.py", "--spares=some: must be a whole number"),
        ("--spares=-1 t.py", "--spares=-1: must be a whole number"),
        ("--preload=torch,2x t.py", "'2x' is not the name of a module"),
    ],
)
def test_what_cannot_work_is_refused_by_name(line, message):
    with pytest.raises(ConfigError) as refused:
        planned(line)
    assert message in str(refused.value)
    assert str(refused.value).count("\n") == 0


def test_no_python_wants_use_env_in_the_style_of_launch():
    with pytest.raises(ConfigError, match="you must also set the '--use-env' flag"):
        planned("--no-python run.sh", launch_style=True)


def test_a_bad_variable_is_refused_by_name():
    with pytest.raises(ConfigError, match="TORCH_ELASTIC_SHUTDOWN_TIMEOUT=soon"):
        planned("t.py", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="soon")
