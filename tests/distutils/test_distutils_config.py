"""What `raylaunch.distutils.setup` takes for a config, and what the documentation says of the module."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import distutils_checks
import pytest
from test_docs import DOCS, rows, text_of

from raylaunch import ConfigError, distutils
from raylaunch.distutils.config import Config, read

FIELDS: dict[str, Any] = {"submit": False, "world_size": 4, "cpu": True, "distributed_backend": "gloo"}


class Tuple(NamedTuple):
    submit: bool = False
    world_size: int = 4
    cpu: bool = True
    distributed_backend: str = "gloo"


@dataclasses.dataclass(slots=True)
class Slotted:
    submit: bool = False
    world_size: int = 4
    cpu: bool = True
    distributed_backend: str = "gloo"


class WithProperties:
    submit = False
    cpu = True
    _private = "is not read"

    def __init__(self) -> None:
        self.distributed_backend = "gloo"

    @property
    def world_size(self) -> int:
        return 4


@pytest.mark.parametrize(
    "config",
    [
        FIELDS,
        SimpleNamespace(**FIELDS),
        argparse.Namespace(**FIELDS),
        Tuple(),
        Slotted(),
        WithProperties(),
        Config(**FIELDS),
    ],
    ids=lambda config: type(config).__name__,
)
def test_a_mapping_and_any_object_are_read(config):
    assert read(config) == Config(submit=False, world_size=4, cpu=True, distributed_backend="gloo")


def test_a_folder_may_be_a_path(tmp_path):
    assert read({**FIELDS, "init_method": "file", "shared_file_dir": tmp_path}).shared_file_dir == tmp_path


def test_the_others_have_defaults_and_none_stands_for_them():
    named = {"init_method": None, "shared_file_dir": None, "array_job_num": None, "timeout": None}
    assert read({**FIELDS, **named}) == read(FIELDS)
    assert read({**FIELDS, "world_size": None}).world_size is None
    assert read(FIELDS).timeout == 30


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({**FIELDS, "wrold_size": 4}, "'wrold_size': there is no such field; did you mean 'world_size'?"),
        ({**FIELDS, "summit": False}, "did you mean 'submit'?"),
        ({**FIELDS, "optimizer": "adam"}, "there are: submit, world_size, cpu, distributed_backend, init_method"),
        (SimpleNamespace(**FIELDS, epochs=3), "'epochs': there is no such field"),
        ({"world_size": 1, "submit": False}, "the fields cpu, distributed_backend must be there"),
        (SimpleNamespace(submit=False, world_size=1, cpu=True), "the field distributed_backend must be there"),
        (None, "the fields submit, world_size, cpu, distributed_backend must be there"),
        ({**FIELDS, "submit": "False"}, "submit='False': must be True or False"),
        ({**FIELDS, "cpu": None}, "cpu=None: must be True or False"),
        ({**FIELDS, "world_size": 0}, "world_size=0: must be a number of ranks, at least 1, or None"),
        ({**FIELDS, "world_size": True}, "world_size=True: must be a number"),
        ({**FIELDS, "world_size": "4"}, "world_size='4': must be a number"),
        ({**FIELDS, "distributed_backend": ""}, "must be a backend's name, as 'gloo'"),
        ({**FIELDS, "init_method": "tcp://host:1"}, "must be 'tcp' or 'file'"),
        ({**FIELDS, "init_method": "file"}, "needs shared_file_dir"),
        ({**FIELDS, "timeout": 0}, "timeout=0: must be a number of minutes above 0"),
        ({**FIELDS, "timeout": float("nan")}, "timeout=nan: must be a number of minutes above 0"),
        ({**FIELDS, "distributed_backend": "nccl"}, "cpu=True and distributed_backend='nccl': NCCL needs GPUs"),
    ],
)
def test_what_can_not_be_is_refused_before_anything_is_done(config, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        distutils.setup(config)
    assert not distutils.initialized()


# -- the documentation -----------------------------------------------------------------------------------------------

PAGE = DOCS / "distutils.md"


def test_every_name_is_documented_with_its_signature():
    documented = rows(PAGE, "## The calls")
    names = [name.partition("(")[0] for name in documented]
    assert sorted(names) == sorted(distutils.__all__)
    for shown in documented:
        value = getattr(distutils, shown.partition("(")[0])
        if inspect.isfunction(value):
            plain = [
                one.replace(annotation=inspect.Parameter.empty) for one in inspect.signature(value).parameters.values()
            ]
            assert shown == f"{value.__name__}({', '.join(map(str, plain))})"
            assert inspect.getdoc(value)


def test_every_field_is_documented_with_its_default():
    documented = rows(PAGE, "## The config of `setup`")
    fields = dataclasses.fields(Config)
    assert list(documented) == [field.name for field in fields]
    for field in fields:
        _, default = documented[field.name]
        assert default == ("required" if field.default is dataclasses.MISSING else f"`{field.default!r}`")


def test_every_difference_names_the_check_that_holds_it():
    differences = re.findall(
        r"^\|[^\n]*\| ([^|]*) \|$", text_of(PAGE).partition("\n## Differences\n")[2], re.MULTILINE
    )[1:]
    assert len(differences) >= 15
    tests = Path(__file__).with_name("test_distutils.py").read_text() + Path(__file__).read_text()
    for cell in differences:
        named = re.findall(r"`(\w+)`", cell)
        assert named
        for name in named:
            assert name in distutils_checks.CHECKS or f"def {name}(" in tests, name


def test_the_names_are_the_originals():
    assert distutils.DISTRIBUTED_PORT == 13356
    assert distutils.CURRENT_DEVICE_STR == "CURRRENT_DEVICE"
    assert distutils.T.__name__ == "T"
