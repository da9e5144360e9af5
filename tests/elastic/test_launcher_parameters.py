"""An ElasticLauncher before any launch: its parameters, freezing, cloning, pickling, and what it is on the driver."""

from __future__ import annotations

import dataclasses
import inspect
import os
import pickle
import re

import pytest

import raylaunch
from raylaunch import ConfigError, ElasticLauncher
from raylaunch.elastic.devices import NodeDevices
from raylaunch.elastic.launch import setup_of, spec_of
from raylaunch.elastic.params import RUN_OPTIONS, WITHOUT_EFFECT, Params


def test_the_launcher_takes_every_parameter_with_the_same_default_and_documents_it():
    taken = dict(inspect.signature(ElasticLauncher).parameters)
    known = {field.name: field for field in dataclasses.fields(Params)}
    assert list(taken) == list(known)
    text = inspect.getdoc(ElasticLauncher) or ""
    for name, parameter in taken.items():
        assert parameter.default == ({} if name == "run_options" else getattr(Params(), name)) or name == "run_options"
        assert f"\n    {name}: " in text, name
    assert set(WITHOUT_EFFECT) <= set(known)


def test_it_can_be_changed_until_it_is_frozen():
    launcher = ElasticLauncher("cpu")
    launcher.devices = "cpu:0-1"
    launcher.max_restarts = 2
    assert launcher.update_params({"nnodes": "1:2"}, role="trainer") is launcher
    assert launcher.freeze() is launcher
    assert launcher.freeze() is launcher
    given = (launcher.config.devices, launcher.max_restarts, launcher.nnodes, launcher.role_name)
    assert given == ("cpu:0-1", 2, "1:2", "trainer")
    with pytest.raises(dataclasses.FrozenInstanceError, match=r"max_restarts: the launcher is frozen; clone\(\)"):
        launcher.max_restarts = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        launcher.update_params(nnodes=1)
    with pytest.raises(AttributeError):
        launcher.anything = 1
    assert launcher.max_restarts == 2


def test_a_clone_can_be_changed_and_leaves_the_original_as_it_is():
    frozen = ElasticLauncher("cpu:0-1", run_options={"spares": 0}).freeze()
    clone = frozen.clone()
    assert clone.config == frozen.config
    clone.devices = "cpu"
    assert (clone.config.devices, frozen.config.devices) == ("cpu", "cpu:0-1")
    assert clone.events is not frozen.events


def test_nobody_elses_mapping_changes_a_launcher():
    given = {"spares": 0}
    launcher = ElasticLauncher("cpu", run_options=given).freeze()
    given["spares"] = 1
    launcher.clone().run_options["spares"] = 2
    assert launcher.run_options == {"spares": 0}
    assert ElasticLauncher("cpu", run_options=given).update_params(run_options=None).freeze().run_options == {}


def test_what_there_is_not_is_refused_with_the_nearest_name():
    launcher = ElasticLauncher("cpu")
    with pytest.raises(AttributeError, match="device: no such parameter; did you mean 'devices'"):
        launcher.device = "cpu"
    with pytest.raises(ConfigError, match="nnode: no such parameter; did you mean 'nnodes'"):
        launcher.update_params(max_restarts=9, nnode=1)
    assert launcher.max_restarts == 0  # none of them was set
    with pytest.raises(ConfigError, match="1: no such parameter"):
        launcher.update_params({1: 2})
    with pytest.raises(AttributeError, match="ElasticLauncher has no attribute 'world'"):
        _ = launcher.world


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"devices": "cuda:"}, "devices='cuda:': an index is missing"),
        ({"dist_backend": "nxcl"}, "dist_backend='nxcl': must be 'auto'"),
        ({"nnodes": "4:2"}, "nnodes='4:2': must be 0 < MIN <= MAX"),
        ({"nnodes": "0"}, "nnodes='0': must be 0 < MIN <= MAX"),
        ({"nnodes": "1:2:3"}, "nnodes='1:2:3': must be 'N' or 'MIN:MAX'"),
        ({"nnodes": "-1"}, "nnodes='-1': must be 'N' or 'MIN:MAX'"),
        ({"nnodes": True}, "nnodes=True: must be 'N' or 'MIN:MAX'"),
        ({"nnodes": 2, "standalone": True}, "nnodes=2: standalone=True means one node"),
        ({"rdzv_backend": "etcd-v2"}, "there is no etcd rendezvous on Ray"),
        ({"rdzv_configs": "join_timeot=3"}, "no such option: 'join_timeot'; did you mean 'join_timeout'?"),
        ({"rdzv_id": 3}, "rdzv_id=3: must be a string"),
        ({"max_restarts": -2}, "max_restarts=-2: must be a whole number"),
        ({"master_port": 70000}, "master_port=70000: must be a whole number from 0 to 65535"),
        ({"node_rank": None}, "node_rank=None: must be a whole number"),
        ({"monitor_interval": "often"}, "monitor_interval='often': must be a number of seconds"),
        ({"save_timeout": -1}, "save_timeout=-1: must be non-negative"),
        ({"redirects": "4"}, "redirects=4: must be one of 0, 1, 2, 3"),
        ({"tee": "0:9"}, "tee=0:9: must be one of 0, 1, 2, 3"),
        ({"log_dir": 3}, "log_dir=3: must be a path"),
        ({"omp_num_threads": 0}, "omp_num_threads=0: must be a whole number from 1"),
        ({"on_interrupt": "ask"}, "on_interrupt='ask': must be one of 'stop', 'save_then_stop'"),
        ({"eager_mode": 1}, "eager_mode=1: must be True or False"),
        ({"run_options": {"spare": 0}}, "run_options['spare']: no such option; did you mean 'spares'?"),
        ({"run_options": 5}, "run_options=5: must map arguments of raylaunch.run to values"),
        ({"rdzv_configs": "timeout=soon"}, "rdzv_configs timeout=soon: "),
        ({"rdzv_configs": "join_timeout=-1"}, "rdzv_configs join_timeout=-1: must be non-negative"),
        ({"role": ""}, "role='': must be a name"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_frozen(given, words):
    launcher = ElasticLauncher("cpu").update_params(given)
    with pytest.raises(ConfigError, match="^.*" + re.escape(words)):
        launcher.freeze()
    launcher.update_params({name: getattr(Params(), name) for name in given}).freeze()  # it was not frozen


def test_that_the_environment_says_another_number_of_threads_is_said():
    environ = {"OMP_NUM_THREADS": "4"}
    assert Params().threads_note(environ) == Params(omp_num_threads=4).threads_note(environ) == ""
    assert Params(omp_num_threads=2).threads_note({}) == ""
    said = Params(omp_num_threads=2).threads_note(environ)
    assert said == "omp_num_threads=2 holds in the ranks, although OMP_NUM_THREADS=4 in this process"


def test_what_others_decide_is_said_only_where_it_was_given():
    assert Params().without_effect() == []
    given = {
        "rdzv_endpoint": "host:29500",
        "rdzv_backend": "c10d",
        "standalone": True,
        "node_rank": 1,
        "master_addr": "10.0.0.1",
        "master_port": 29500,
        "monitor_interval": 1,
        "start_method": "fork",
    }
    assert given.keys() == WITHOUT_EFFECT.keys()
    said = dataclasses.replace(Params(), **given).without_effect()
    assert said[5] == "master_port=29500 (the endpoint has a port that rank 0 has bound)"
    assert len(said) == len(given)


def test_what_a_run_is_made_of():
    params = Params(
        nnodes="1:4",
        rdzv_id="my run",
        rdzv_configs="join_timeout=30,last_call_timeout=2",
        max_restarts=5,
        omp_num_threads=3,
        run_options={"spares": 2, "env": {"A": "1"}, "resources_per_worker": {"CPU": 2}, "preload": ["json"]},
    )
    spec = spec_of(params, NodeDevices("cuda", 4, 2, (0, 3)), "gloo")
    assert (spec.bounds.min_workers, spec.bounds.max_workers, spec.bounds.unit) == (4, 16, 4)
    assert spec.resources_per_worker == {"CPU": 2.0, "GPU": 0.5}
    assert (spec.run_id[:7], spec.max_restarts, spec.spares) == ("my-run-", 5, 2)
    assert (spec.timeouts.placement, spec.timeouts.last_call) == (30.0, 2.0)
    setup = setup_of(params)
    assert setup.env == {"OMP_NUM_THREADS": "3", "A": "1"}
    assert setup.preload[0] == "json"
    for resources, words in (({"GPU": 1}, "`devices` says how much of a GPU"), (5, "must map names of resources")):
        given = dataclasses.replace(params, run_options={"resources_per_worker": resources})
        with pytest.raises(ConfigError, match=words):
            spec_of(given, NodeDevices("cpu", 1), "gloo")


def test_every_option_of_a_run_is_a_parameter_or_can_be_given_by_name():
    given_by_the_launcher = {
        *("train_fn", "args", "kwargs", "num_workers", "use_gpu", "workers_per_node", "placement_strategy", "backend"),
        *("max_restarts", "log_dir", "run_id", "virtual_local_rank"),
        "isolation",  # ranks are actors, which reach the coordinator
    }
    of_run = set(inspect.signature(raylaunch.run).parameters)
    assert given_by_the_launcher <= of_run
    assert set(RUN_OPTIONS) & of_run == set(RUN_OPTIONS)
    assert of_run - given_by_the_launcher - set(RUN_OPTIONS) == set()


def test_it_pickles_with_what_was_given_and_its_copies_are_one():
    launcher = ElasticLauncher("cpu:0-1", role="trainer").freeze()
    first, second = pickle.loads(pickle.dumps((launcher, launcher)))
    assert first is second
    assert first.config == launcher.config
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.devices = "cpu"
    assert repr(first) == "ElasticLauncher(devices='cpu:0-1', role='trainer').freeze()"


def test_on_the_driver_it_is_rank_0_of_1():
    launcher = ElasticLauncher("cpu:0-1", role="trainer", max_restarts=2, master_port=1234, rdzv_id="r").freeze()
    assert (launcher.rank, launcher.local_rank, launcher.group_rank, launcher.role_rank) == (0, 0, 0, 0)
    sizes = (launcher.world_size, launcher.local_world_size, launcher.group_world_size, launcher.role_world_size)
    assert sizes == (1, 1, 1, 1)
    assert (launcher.role_name, launcher.restart_count, launcher.max_restarts) == ("trainer", 0, 2)
    assert (launcher.master_addr, launcher.master_port, launcher.rdzv_id) == ("127.0.0.1", 1234, "r")
    assert (str(launcher.assigned_device), launcher.dist_backend, launcher.eager_mode) == ("cpu", "gloo", False)
    assert [str(device) for device in launcher.devices] == ["cpu", "cpu"]
    assert not launcher.events.pause.is_set()
    assert "RANK" not in os.environ


def test_outside_a_launch_there_is_always_a_current_launcher():
    import torch

    current = raylaunch.get_current_launcher()
    assert isinstance(current, ElasticLauncher)
    assert (current.rank, current.world_size, current.eager_mode) == (0, 1, True)
    assert current.assigned_device == torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    assert current.between_steps(1, 2) is True
    with pytest.raises(dataclasses.FrozenInstanceError):
        current.devices = "cpu"


@pytest.mark.parametrize(
    ("launcher", "words"),
    [
        (ElasticLauncher("cpu", "nccl"), "dist_backend='nccl': needs GPUs"),
        (ElasticLauncher("cpu:0", "nccl", eager_mode=True), "dist_backend='nccl': needs GPUs"),
        (ElasticLauncher("cuda", eager_mode=True), "there is no GPU on this machine"),
    ],
)
def test_what_the_devices_forbid_is_refused_before_anything_is_started(launcher, words):
    import torch

    if torch.cuda.is_available():
        pytest.skip("here is a GPU")
    with pytest.raises(ConfigError, match=re.escape(words)):
        launcher(print)
