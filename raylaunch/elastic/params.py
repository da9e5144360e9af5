"""The parameters of an ElasticLauncher: what each means here, which can't work, and which are without effect. Pure."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from raylaunch.command import PerLocalRank
from raylaunch.elastic.devices import parse_devices
from raylaunch.errors import ConfigError
from raylaunch.spec import BACKENDS, budget
from raylaunch.torchrun import values
from raylaunch.torchrun.rendezvous import check_backend, parse_conf, timeouts_of

ON_INTERRUPT = ("stop", "save_then_stop")
OMP = "OMP_NUM_THREADS"

#: Accepted, and decided by the coordinator or by Ray, whatever they say; each with who decides.
WITHOUT_EFFECT = {
    "rdzv_endpoint": "the coordinator forms the group",
    "rdzv_backend": "the coordinator forms the group",
    "standalone": "the Ray session that is there is used, or one of this machine is started",
    "node_rank": "the coordinator gives the ranks",
    "master_addr": "the endpoint is rank 0's node",
    "master_port": "the endpoint has a port that rank 0 has bound",
    "monitor_interval": "failures are pushed, and nothing is polled",
    "start_method": "Ray starts the processes",
}
#: The arguments of `raylaunch.run` that a launcher's `run_options` may hold: the others follow from its parameters.
SPEC_OPTIONS = ("resources_per_worker", "label_selector", "grow", "spares", "timeouts")
SETUP_OPTIONS = ("preload", "env", "copy_env", "runtime_env")
JOB_OPTIONS = ("no_retry",)
RUN_OPTIONS = (*SPEC_OPTIONS, *SETUP_OPTIONS, *JOB_OPTIONS)


@dataclass(frozen=True)
class Params:
    """What an ElasticLauncher was given. docs/elastic-launcher.md has a table of what each means."""

    devices: str = "auto"
    dist_backend: str | None = "auto"
    nnodes: str | int = "1:1"
    rdzv_id: str = "none"
    rdzv_endpoint: str = ""
    rdzv_backend: str = "static"
    rdzv_configs: str = ""
    standalone: bool = False
    role: str = "default"
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int | None = None
    max_restarts: int = 0
    monitor_interval: float | None = None
    start_method: str = "spawn"
    redirects: str = "0"
    tee: str = "0"
    log_dir: str | None = None
    omp_num_threads: int | None = None
    on_interrupt: str = "stop"
    save_timeout: float = 60.0
    eager_mode: bool = False
    run_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Nobody else's mapping: who changes his, or that of a clone, changes nothing here."""
        if self.run_options is None or isinstance(self.run_options, Mapping):
            object.__setattr__(self, "run_options", dict(self.run_options or {}))

    def check(self) -> None:
        """Refuse what can't work, as far as that needs no cluster. Raises `ConfigError`."""
        parse_devices(self.devices)
        backend = self.dist_backend
        if backend is not None and backend != "auto" and backend not in BACKENDS:
            raise ConfigError(f"dist_backend={backend!r}: must be 'auto', {', '.join(map(repr, BACKENDS))}, or None")
        if self.nodes[1] > 1 and self.standalone:
            raise ConfigError(f"nnodes={self.nnodes!r}: standalone=True means one node")
        for name in ("rdzv_id", "rdzv_endpoint", "rdzv_backend", "rdzv_configs", "role", "master_addr", "start_method"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name}={getattr(self, name)!r}: must be a string")
        if not self.role or "\0" in self.role:
            raise ConfigError(f"role={self.role!r}: must be a name")
        check_backend(self.rdzv_backend)
        self.timeouts()
        for name in ("standalone", "eager_mode"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r}: must be True or False")
        budget(self.max_restarts)
        self._check_numbers()
        self.streams("redirects")
        self.streams("tee")
        if self.on_interrupt not in ON_INTERRUPT:
            raise ConfigError(
                f"on_interrupt={self.on_interrupt!r}: must be one of {', '.join(map(repr, ON_INTERRUPT))}"
            )
        self._check_run_options()

    @property
    def nodes(self) -> tuple[int, int]:
        """The least and the greatest number of nodes. Raises `ConfigError`."""
        text = str(self.nnodes)
        found = re.fullmatch(r"([0-9]{1,6})(?::([0-9]{1,6}))?", text)
        if found is None or isinstance(self.nnodes, bool):
            raise ConfigError(f"nnodes={self.nnodes!r}: must be 'N' or 'MIN:MAX', as in '2' or '1:4'")
        low, high = int(found[1]), int(found[2] or found[1])
        if not 0 < low <= high:
            raise ConfigError(f"nnodes={self.nnodes!r}: must be 0 < MIN <= MAX")
        return low, high

    def streams(self, name: str) -> PerLocalRank:
        """`redirects` or `tee`, read. Raises `ConfigError`."""
        return values.streams(name, str(getattr(self, name)))

    def timeouts(self) -> dict[str, float]:
        """The timeouts that `rdzv_configs` names, in seconds. Raises `ConfigError`."""
        return timeouts_of(parse_conf(self.rdzv_configs), "rdzv_configs ")

    def without_effect(self) -> list[str]:
        """What was given and is decided by others, a clause each."""
        defaults = Params()
        return [
            f"{name}={getattr(self, name)!r} ({why})"
            for name, why in WITHOUT_EFFECT.items()
            if getattr(self, name) != getattr(defaults, name)
        ]

    def threads_note(self, environ: Mapping[str, str]) -> str:
        """What is said where the driver's environment has another number of threads; "" where it hasn't.

        It is no error: Ray (2.60) sets the variable by itself in jobs and actors, from which a launch may come.
        """
        asked, there = self.omp_num_threads, environ.get(OMP)
        if asked is None or there is None or there == str(asked):
            return ""
        return f"omp_num_threads={asked} holds in the ranks, although {OMP}={there} in this process"

    def _check_numbers(self) -> None:
        whole = [("node_rank", 0, 1 << 31), ("master_port", 0, 65535), ("omp_num_threads", 1, 1 << 31)]
        for name, low, high in whole:
            value = getattr(self, name)
            optional = name != "node_rank"
            if value is None and optional:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise ConfigError(f"{name}={value!r}: must be a whole number from {low} to {high}")
        for name in ("monitor_interval", "save_timeout"):
            value = getattr(self, name)
            if value is None and name == "monitor_interval":
                continue
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise ConfigError(f"{name}={value!r}: must be a number of seconds")
            values.seconds(name, str(value))
        if self.log_dir is not None and not isinstance(self.log_dir, (str, os.PathLike)):
            raise ConfigError(f"log_dir={self.log_dir!r}: must be a path")

    def _check_run_options(self) -> None:
        if not isinstance(self.run_options, Mapping):
            raise ConfigError(f"run_options={self.run_options!r}: must map arguments of raylaunch.run to values")
        for name in self.run_options:
            if name not in RUN_OPTIONS:
                near = difflib.get_close_matches(str(name), RUN_OPTIONS, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(RUN_OPTIONS)}"
                raise ConfigError(f"run_options[{name!r}]: no such option; {hint}")


NAMES = tuple(one.name for one in fields(Params))


def unknown_parameter(name: str) -> str:
    """What is said of a parameter that there isn't."""
    near = difflib.get_close_matches(str(name), NAMES, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(NAMES)}"
    return f"{name}: no such parameter; {hint}"
