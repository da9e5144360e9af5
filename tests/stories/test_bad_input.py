"""What can't work is refused before anything starts, with the argument, its value and what is allowed. No cluster."""

from __future__ import annotations

import asyncio
import threading

import pytest

import raylaunch
from raylaunch import ConfigError, Timeouts


def trains():
    raise AssertionError("nothing may start")


def takes_two(lr, epochs):
    raise AssertionError("nothing may start")


async def trains_asynchronously():
    await asyncio.sleep(0)


def trains_lazily():
    yield 1


def refused(train_fn=trains, **arguments) -> str:
    """The text with which the arguments are refused."""
    import ray

    with pytest.raises(ConfigError) as caught:
        raylaunch.run(train_fn, **arguments)
    assert isinstance(caught.value, ValueError)
    assert not ray.is_initialized()
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        # how many
        ({"num_workers": 0}, "num_workers=0: must be at least 1"),
        ({"num_workers": -2}, "num_workers=-2: must be at least 1"),
        ({"num_workers": (0, 4)}, "num_workers=(0, 4): must be at least 1"),
        ({"num_workers": (8, 4)}, "num_workers=(8, 4): the minimum is above the maximum; did you mean (4, 8)?"),
        ({"num_workers": True}, "num_workers=True: must be a whole number, or a pair of them (minimum, maximum)"),
        ({"num_workers": 2.0}, "num_workers=2.0: must be a whole number"),
        ({"num_workers": (1, 2.5)}, "num_workers=(1, 2.5): must be a whole number"),
        ({"num_workers": "4"}, "num_workers='4': must be a whole number"),
        ({"num_workers": None}, "num_workers=None: must be a whole number"),
        ({"num_workers": (1, 2, 3)}, "num_workers=(1, 2, 3): must be a whole number, or a pair"),
        (
            {"num_workers": 3, "workers_per_node": 2},
            "num_workers=3: must be in multiples of workers_per_node=2",
        ),
        (
            {"num_workers": (2, 5), "workers_per_node": 2},
            "num_workers=(2, 5): must be in multiples of workers_per_node=2",
        ),
        ({"num_workers": 2, "workers_per_node": 0}, "workers_per_node=0: must be a whole number, at least 1, or None"),
        ({"num_workers": 2, "workers_per_node": True}, "workers_per_node=True: must be a whole number"),
        # where
        ({"placement_strategy": "pack"}, "placement_strategy='pack': must be one of PACK, SPREAD, STRICT_PACK"),
        ({"label_selector": {"zone": 3}}, "label_selector={'zone': 3}: must map label names to values"),
        # backends and GPUs
        (
            {"backend": "glo"},
            "backend='glo': must be one of 'auto', 'gloo', 'nccl', 'mpi', 'ucc', 'xccl', a list such as",
        ),
        ({"backend": 3}, "backend=3: must be one of"),
        ({"backend": "nccl"}, "backend='nccl': nccl needs use_gpu=True; on CPUs use 'gloo'"),
        ({"backend": "cpu:gloo,cuda:nccl"}, "nccl needs use_gpu=True"),
        ({"use_gpu": 1}, "use_gpu=1: must be True or False"),
        (
            {"use_gpu": True, "resources_per_worker": {"GPU": 2}},
            "resources_per_worker['GPU']=2: one worker drives one GPU; several (a whole number) need",
        ),
        (
            {"use_gpu": True, "resources_per_worker": {"GPU": 1.5}, "virtual_local_rank": True},
            "resources_per_worker['GPU']=1.5: one worker drives one GPU",
        ),
        (
            {"use_gpu": True, "resources_per_worker": {"GPU": 0.5}},
            "resources_per_worker['GPU']=0.5: workers that share a GPU need backend='gloo'",
        ),
        ({"use_gpu": True, "resources_per_worker": {"GPU": 0}}, "asks for no GPU, but use_gpu=True"),
        ({"resources_per_worker": {"GPU": 1}}, "resources_per_worker={'GPU': 1} asks for GPUs: say use_gpu=True too"),
        ({"resources_per_worker": {"CPU": -1}}, "resources_per_worker['CPU']=-1: must be a number, at least 0"),
        ({"resources_per_worker": ["CPU"]}, "resources_per_worker=['CPU']: must map resource names to amounts"),
        # environment
        ({"env": {"N": 3}}, "env['N']=3: names and values of environment variables must be strings"),
        ({"env": {3: "N"}}, "env[3]='N': names and values of environment variables must be strings"),
        ({"env": {"RANK": "0"}}, "env['RANK']='0': raylaunch sets this variable itself"),
        ({"env": {"CUDA_VISIBLE_DEVICES": "0"}}, "the GPUs that a worker sees are those that Ray reserved for it"),
        ({"env": []}, "env=[]: must map variables' names to values"),
        ({"copy_env": "WANDB_*"}, "copy_env='WANDB_*': must be a tuple of strings"),
        ({"runtime_env": "."}, "runtime_env='.': must be a dictionary"),
        ({"preload": "torch"}, "preload='torch': must be a tuple of strings (none of them empty), as ('torch',)"),
        ({"preload": ("",)}, "preload=('',): must be a tuple of strings (none of them empty)"),
        ({"env": {"A": "\ud800"}}, "can't be encoded"),
        ({"log_dir": "a\0b"}, "allows no zero byte"),
        (
            {"resources_per_worker": {"": 1}},
            "resources_per_worker['']=1: a resource's name must be a string, and not empty",
        ),
        # failures
        ({"max_restarts": -2}, "max_restarts=-2: must be a whole number, at least 0, or -1 for no limit"),
        ({"max_restarts": 1.5}, "max_restarts=1.5: must be a whole number"),
        ({"max_restarts": True}, "max_restarts=True: must be a whole number"),
        ({"no_retry": ValueError}, "no_retry=<class 'ValueError'>: must be a tuple of exception types"),
        ({"no_retry": ("ValueError",)}, "no_retry=('ValueError',): must be a tuple of exception types"),
        ({"no_retry": (int,)}, "no_retry=(<class 'int'>,): must be a tuple of exception types"),
        ({"grow": "no"}, "grow='no': must be True or False"),
        ({"spares": -1}, "spares=-1: must be a whole number per node, at least 0, or 'auto'"),
        ({"spares": "all"}, "spares='all': must be a whole number per node"),
        ({"spares": True}, "spares=True: must be a whole number per node"),
        ({"timeouts": 30}, "timeouts=30: must be a raylaunch.Timeouts"),
        # names and places
        ({"run_id": ""}, "run_id='': must be 1 to 64 letters, digits"),
        ({"run_id": "../other"}, "run_id='../other': must be 1 to 64 letters, digits"),
        ({"run_id": "x" * 65}, "must be 1 to 64 letters, digits"),
        ({"run_id": 7}, "run_id=7: must be 1 to 64 letters, digits"),
        ({"log_dir": 7}, "log_dir=7: must be a path"),
    ],
    ids=lambda value: repr(value)[:50] if isinstance(value, dict) else "",
)
def test_an_argument_that_cannot_work_is_named_with_its_value_and_what_is_allowed(arguments, words):
    assert words in refused(**arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_worker": 2}, "num_worker: no such argument; did you mean 'num_workers'?"),
        ({"max_failures": 2, "num_workers": 2}, "max_failures: no such argument; "),
        ({"usegpu": True}, "usegpu: no such argument; did you mean 'use_gpu'?"),
        ({"qqq": 1}, "qqq: no such argument; there are: train_fn, args, kwargs, num_workers"),
    ],
)
def test_a_misspelt_argument_is_answered_with_the_nearest_valid_name(arguments, words):
    assert words in refused(**arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"placment": 3}, "placment: no such argument; did you mean 'placement'?"),
        ({"placement": -1}, "timeouts.placement=-1: must be at least 0"),
        ({"lease": 0}, "timeouts.lease=0: must be above 0"),
        ({"stop": float("inf")}, "timeouts.stop=inf: must be a finite number of seconds"),
        ({"stop": float("nan")}, "timeouts.stop=nan: must be a finite number of seconds"),
        ({"start": "10"}, "timeouts.start='10': must be a finite number of seconds"),
        ({"start": True}, "timeouts.start=True: must be a finite number of seconds"),
        ({"start": None}, "timeouts.start=None: must be a finite number of seconds"),
    ],
)
def test_a_timeout_that_cannot_work_is_refused_by_name(arguments, words):
    with pytest.raises(ConfigError) as caught:
        Timeouts(**arguments)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("train_fn", "arguments", "words"),
    [
        ("train.py", {}, "train_fn='train.py': must be callable"),
        (trains_asynchronously, {}, "train_fn=trains_asynchronously: is a coroutine function; pass `lambda: asyncio"),
        (trains_lazily, {}, "train_fn=trains_lazily: is a generator function"),
        (
            takes_two,
            {"args": (0.1,)},
            "don't fit train_fn, which is takes_two(lr, epochs): missing a required argument",
        ),
        (takes_two, {"args": (0.1, 2, 3)}, "takes_two(lr, epochs): too many positional arguments"),
        (takes_two, {"args": (0.1,), "kwargs": {"epoch": 2}}, "takes_two(lr, epochs): missing a required argument"),
        (takes_two, {"args": 0.1}, "args=0.1: must be a tuple of the positional arguments, as (0.1,)"),
        (takes_two, {"args": "ab"}, "args='ab': must be a tuple of the positional arguments"),
        (takes_two, {"kwargs": [("lr", 1)]}, "kwargs=[('lr', 1)]: must map argument names to values"),
    ],
)
def test_a_function_that_cannot_be_called_so_is_refused_in_the_driver(train_fn, arguments, words):
    assert words in refused(train_fn, **arguments)


def test_what_does_not_pickle_is_named_in_the_driver():
    lock = threading.Lock()

    def holds_a_lock():
        return lock

    said = refused(holds_a_lock)
    assert said.startswith("train_fn=holds_a_lock: can't be sent to the workers (TypeError: cannot pickle")
    assert "Create it inside train_fn" in said
    assert refused(takes_two, args=(0.1, lock)).startswith("args[1]: can't be sent to the workers")
    assert refused(takes_two, kwargs={"lr": lock, "epochs": 2}).startswith("kwargs['lr']: can't be sent")


def test_a_ray_client_address_is_refused_with_the_way_that_works(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    said = refused()
    assert "ray://" in said
    assert "`ray job submit -- python your_script.py`" in said
