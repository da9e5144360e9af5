"""The options are torchrun's: the same names, defaults, abbreviations and variables. Compared with torch itself."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from raylaunch.torchrun.options import OPTIONS, RAY, TORCH_OPTIONS, USE_ENV
from raylaunch.torchrun.parser import parse


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in list(os.environ):
        if name.startswith("PET_"):
            monkeypatch.delenv(name)


def torchs_actions():
    from torch.distributed.run import get_args_parser

    return [action for action in get_args_parser()._actions if action.option_strings and action.dest != "help"]


def test_every_option_of_torchrun_is_there_and_no_other_but_rays():
    assert {option.dest for option in TORCH_OPTIONS} == {action.dest for action in torchs_actions()}
    assert not {option.name for option in RAY} & {option.name for option in TORCH_OPTIONS}


@pytest.mark.parametrize("option", TORCH_OPTIONS, ids=lambda option: option.dest)
def test_an_option_is_torchs(option):
    theirs = {action.dest: action for action in torchs_actions()}[option.dest]
    assert set(option.all_names) == set(theirs.option_strings)
    assert option.default == theirs.default
    assert (option.parse is None) == (theirs.nargs == 0)
    assert (list(option.choices) if option.choices else None) == (list(theirs.choices) if theirs.choices else None)
    for text in ("3", "a,b,,c"):
        if option.parse is not None and theirs.type is not None and not (theirs.type in (int, float) and "," in text):
            assert option.parse(text) == theirs.type(text)


@pytest.mark.parametrize("option", TORCH_OPTIONS, ids=lambda option: option.dest)
def test_its_variable_is_torchs(option, monkeypatch):
    value = {"start_method": "fork", "numa_binding": "node"}.get(option.dest, "1")
    monkeypatch.setenv(option.variable, value)
    from torch.distributed.run import parse_args

    assert getattr(parse(["train.py"]), option.dest) == getattr(parse_args(["train.py"]), option.dest)


LINES = [
    "train.py",
    "--nnodes=1:4 --nproc-per-node=8 --max-restarts=3 --rdzv-id=$JOB --rdzv-backend=c10d --rdzv-endpoint=h:29400 t.py",
    "--nnodes 2 --nproc_per_node gpu --node_rank 1 --master_addr 10.0.0.1 --master_port 29500 train.py --lr 0.1",
    "--standalone --nproc-per-node=auto -m package.train --config=a.yaml",
    "--no_python --nproc-per-node 2 ./run.sh -x --flag",
    "-r 3 -t 0:1,1:2 --local-ranks-filter=0,1 --log-dir /logs train.py",
    "-r3 -t3 train.py",
    "-mr3 package.train -r 2",
    "--redirect=3 --max-r 2 --standa train.py",  # abbreviations
    "--monitor-interval 5 --start-method fork --role trainer --local-addr 10.0.0.9 train.py",
    "--duplicate-stdout-filters apple,,pie,plum --duplicate-stderr-filters=x train.py",
    "--run-path --no-python /abs/train.py",
    "--shutdown-timeout=5 --signals-to-handle SIGTERM,SIGUSR1 --virtual-local-rank --numa-binding node train.py",
    "--event-log-handler console --logs-specs mine --rdzv-conf join_timeout=3,timeout=4 train.py",
    "-- --odd-name.py --flag",
    "train.py --nnodes 2 -- --standalone",
    "train.py -- --standalone",
    "-m package.train -- -- x",
    "-- train.py -- x",
]


@pytest.mark.parametrize("line", LINES)
def test_a_line_means_what_it_means_to_torchrun(line):
    from torch.distributed.run import parse_args

    ours, theirs = vars(parse(line.split())), vars(parse_args(line.split()))
    assert {name: ours[name] for name in theirs} == theirs


@pytest.mark.parametrize(
    "line", ["--use_env train.py", "--use-env --nproc_per_node=2 train.py -x", "train.py --use_env"]
)
def test_a_line_means_what_it_means_to_torch_distributed_launch(line):
    from torch.distributed.launch import parse_args

    ours, theirs = vars(parse(line.split(), launch_style=True)), vars(parse_args(line.split()))
    assert {name: ours[name] for name in theirs} == theirs
    assert USE_ENV.dest in ours


def test_abbreviations_of_torchrun_are_not_taken_away_by_rays_options():
    """Without Ray's, --re, --run- and --s... would be clear, or not, just as here."""
    assert parse(["--red", "3", "train.py"]).redirects == "3"
    assert parse(["--re", "3", "train.py"]).redirects == "3"  # not --resources-per-worker
    assert parse(["--run", "train.py"]).run_path  # not --runtime-env; and its alias is no second meaning
    assert parse(["--nproc", "2", "train.py"]).nproc_per_node == "2"
    assert parse(["--num-w", "2", "train.py"]).num_workers == "2"


def test_the_programs_own_options_are_its_own():
    """argparse of Python 3.11 would find `--n` ambiguous, though it stands behind the program."""
    own = ["--n", "5", "--r", "--num", "3", "--help", "-m", "--", "x"]
    assert parse(["--nnodes", "2", "train.py", *own]).training_script_args == own


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "required: PROGRAM"),
        ("--nnodes 2", "required: PROGRAM"),
        ("--nnodes", "--nnodes: expected one argument"),
        ("--max-restarts three train.py", "invalid int value: 'three'"),
        ("--max-restarts=1.5 train.py", "invalid int value: '1.5'"),
        ("--monitor-interval soon train.py", "invalid float value: 'soon'"),
        ("--node-rank x train.py", "invalid int value: 'x'"),
        ("--master-port x train.py", "invalid int value: 'x'"),
        ("--shutdown-timeout 1s train.py", "invalid int value: '1s'"),
        ("--start-method thread train.py", "invalid choice: 'thread'"),
        ("--numa-binding core train.py", "invalid choice: 'core'"),
        ("--placement-strategy TIGHT --num-workers 2 train.py", "invalid choice: 'TIGHT'"),
        ("--n 2 train.py", "ambiguous option: --n could match"),
        ("--frobnicate train.py", "unrecognized arguments: --frobnicate"),
        ("--standalone=yes train.py", "ignored explicit argument 'yes'"),
        ("--use-env train.py", "unrecognized arguments: --use-env"),
    ],
)
def test_what_is_malformed_is_refused_with_code_2(line, message, capsys):
    with pytest.raises(SystemExit) as left:
        parse(line.split())
    assert left.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("PET_STANDALONE", "yes", "PET_STANDALONE='yes': must be 0 or 1"),
        ("PET_START_METHOD", "thread", "PET_START_METHOD='thread': must be one of spawn, fork, forkserver"),
        ("PET_MAX_RESTARTS", "many", "invalid int value: 'many'"),
    ],
)
def test_a_malformed_variable_is_refused_by_name(variable, value, message, monkeypatch, capsys):
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit) as left:
        parse(["train.py"])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command_line_goes_before_the_variable(monkeypatch):
    monkeypatch.setenv("PET_NPROC_PER_NODE", "4")
    monkeypatch.setenv("PET_USE_GPU", "1")
    assert parse(["train.py"]).nproc_per_node == "4"
    assert parse(["train.py"]).use_gpu is True
    assert parse(["--nproc-per-node=2", "--no-use-gpu", "train.py"]).nproc_per_node == "2"
    assert parse(["--no-use-gpu", "train.py"]).use_gpu is False


def test_every_option_has_a_help_and_the_help_shows_all(capsys):
    with pytest.raises(SystemExit) as left:
        parse(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert [option.name for option in OPTIONS if option.name not in shown or not option.help] == []


def test_the_command_needs_neither_torch_nor_ray_until_it_starts():
    program = (
        "import sys; from raylaunch.cli import main; code = main(['run', '--nnodes', '0', 'train.py']);"
        " assert not {'torch', 'ray', 'numpy'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "--nnodes=0" in done.stderr
