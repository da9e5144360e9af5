"""From options to a plan: what to run, with how many workers, where, and what becomes of each option. Pure.

Everything that can't work is refused here, before anything is started. What only the cluster knows (how many GPUs its
nodes have) is left open, for `sizing`.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raylaunch.command import Command, Logs
from raylaunch.errors import ConfigError
from raylaunch.spec import RunSpec, Timeouts, make_spec
from raylaunch.torchrun import rendezvous, values
from raylaunch.torchrun.entry import command_of
from raylaunch.torchrun.options import OPTIONS, WITHOUT_EFFECT, comma_separated
from raylaunch.torchrun.sizing import COUNTED, Size, Wish, settled

#: Seconds from SIGTERM to SIGKILL when nobody says (torch 2.13).
SHUTDOWN_SECONDS = 30


@dataclass(frozen=True)
class Plan:
    """What a command line, or a LaunchConfig, asks for."""

    #: The smallest and the largest number of nodes; of workers, where `wish.per_node` is None.
    bounds: tuple[int, int]
    wish: Wish
    command: Command
    logs: Logs = field(default_factory=Logs)
    run_id: str | None = None
    max_restarts: int = 0
    timeouts: Timeouts = field(default_factory=Timeouts)
    virtual_local_rank: bool = False
    placement_strategy: str = "PACK"
    label_selector: Mapping[str, str] | None = None
    spares: int | str = "auto"
    preload: tuple[str, ...] = ("torch",)
    runtime_env: Mapping[str, Any] | None = None
    log_dir: str | None = None
    logs_specs: str | None = None
    address: str | None = None
    standalone: bool = False
    signals: tuple[signal.Signals, ...] = ()
    event_log_handler: str = "null"
    #: What the user should know, each in one line.
    notes: tuple[str, ...] = ()

    def spec(self, size: Size) -> RunSpec:
        """The run's spec, for workers of this size. Raises `ConfigError`."""
        unit = size.per_node or 1
        resources = {name: amount for name, amount in self.wish.resources.items() if name != "GPU" or size.use_gpu}
        return make_spec(
            num_workers=(self.bounds[0] * unit, self.bounds[1] * unit),
            workers_per_node=size.per_node,
            use_gpu=size.use_gpu,
            resources_per_worker=resources,
            placement_strategy=self.placement_strategy,
            label_selector=self.label_selector,
            backend=None,
            max_restarts=self.max_restarts,
            spares=self.spares,
            timeouts=self.timeouts,
            run_id=self.run_id,
            virtual_local_rank=self.virtual_local_rank,
        )

    def trial(self) -> RunSpec:
        """The spec as far as it is known before the cluster is asked. Raises `ConfigError` for what can't work."""
        wish = self.wish
        per_node = 1 if isinstance(wish.per_node, str) else wish.per_node
        return self.spec(settled(wish) or Size(per_node, bool(wish.use_gpu)))


def plan(chosen: argparse.Namespace, environ: Mapping[str, str], cwd: str) -> Plan:
    """What a command line asks for.

    Args:
        chosen: the parsed options.
        environ: the launcher's environment.
        cwd: the launcher's working directory.

    Raises:
        ConfigError: what is asked for can't work.
    """
    rendezvous.check_backend(chosen.rdzv_backend)
    notes = []
    without_effect = [option.name for option in WITHOUT_EFFECT if _given(chosen, option.dest)]
    without_effect += [name for name in rendezvous.parse_conf(chosen.rdzv_conf) if name in rendezvous.WITHOUT_EFFECT]
    if without_effect:
        notes.append(
            f"without effect on Ray, where the coordinator gives ranks and address and hears of failures:"
            f" {', '.join(without_effect)}"
        )
    run_id = rendezvous.run_id_for(chosen.rdzv_id)
    if run_id is not None and run_id != chosen.rdzv_id:
        notes.append(f"the run's id is {run_id}: Ray's names allow no {chosen.rdzv_id!r}")
    resources = values.amounts("--resources-per-worker", chosen.resources_per_worker)
    use_gpu = chosen.use_gpu
    if use_gpu is False and resources.get("GPU"):
        raise ConfigError(
            f"--resources-per-worker={chosen.resources_per_worker}: asks for GPUs, and --no-use-gpu for none"
        )
    if use_gpu is None and "GPU" in resources:
        use_gpu = resources["GPU"] > 0
    if chosen.standalone and chosen.address:
        raise ConfigError(f"--standalone: starts a Ray of its own, --address={chosen.address} names one: give one")
    bounds, per_node = _bounds(chosen, notes)
    result = Plan(
        bounds=bounds,
        wish=Wish(per_node, _gpu_of(per_node, use_gpu), resources, bounds[0]),
        command=command_of(chosen, environ, cwd),
        logs=_logs(chosen, environ),
        run_id=run_id,
        max_restarts=_max_restarts(chosen.max_restarts),
        timeouts=_timeouts(chosen, environ),
        virtual_local_rank=chosen.virtual_local_rank,
        placement_strategy=chosen.placement_strategy or "PACK",
        label_selector=values.labels("--label-selector", chosen.label_selector),
        spares=_spares(chosen.spares),
        preload=_preload(chosen),
        runtime_env=values.runtime_env(chosen.runtime_env),
        log_dir=_log_dir(chosen.log_dir, cwd, notes),
        logs_specs=chosen.logs_specs,
        address=chosen.address,
        standalone=chosen.standalone,
        signals=signals_for(chosen.signals_to_handle),
        event_log_handler=chosen.event_log_handler,
        notes=tuple(notes),
    )
    result.trial()
    return result


def _given(chosen: argparse.Namespace, dest: str) -> bool:
    """Whether an option has another value than its default."""
    option = next(option for option in OPTIONS if option.dest == dest)
    return bool(getattr(chosen, dest) != option.default)


def min_max(option: str, text: str) -> tuple[int, int]:
    """`4` or `2:4`, as (minimum, maximum)."""
    parts = text.split(":")
    if len(parts) > 2 or not all(re.fullmatch(r"\s*[+-]?\d+\s*", part) for part in parts):
        raise ConfigError(f'{option}={text} is not in "MIN:MAX" format, nor a whole number')
    low, high = int(parts[0]), int(parts[-1])
    if not 0 < low <= high:
        raise ConfigError(f"{option}={text}: the minimum must be > 0 and <= the maximum, got {low} and {high}")
    return low, high


def _bounds(chosen: argparse.Namespace, notes: list[str]) -> tuple[tuple[int, int], int | str | None]:
    """The bounds, and the workers per node."""
    if chosen.num_workers is not None:
        both = [name for name in ("nnodes", "nproc_per_node") if _given(chosen, name)]
        if both:
            name = "--" + both[0].replace("_", "-")
            raise ConfigError(
                f"--num-workers={chosen.num_workers}: counts workers wherever they fit, {name} by nodes: give one"
            )
        return min_max("--num-workers", chosen.num_workers), None
    if chosen.placement_strategy is not None:
        raise ConfigError(
            f"--placement-strategy={chosen.placement_strategy}: --nnodes means so many different nodes; the strategy is"
            " for --num-workers"
        )
    low, high = min_max("--nnodes", chosen.nnodes)
    if chosen.standalone and low > 1:
        raise ConfigError(f"--standalone: starts a Ray of one node, and --nnodes={chosen.nnodes} wants {low}")
    if chosen.standalone and high > 1:
        notes.append(f"--standalone: a Ray of one node, so --nnodes={chosen.nnodes} is one node")
        high = 1
    return (low, high), _per_node(chosen.nproc_per_node)


def _per_node(text: str) -> int | str:
    if text in COUNTED:
        return text
    if not re.fullmatch(r"\s*[+-]?\d+\s*", text):
        raise ConfigError(f"Unsupported nproc_per_node value: {text}; must be a whole number, {', '.join(COUNTED)}")
    number = int(text)
    if number < 1:
        raise ConfigError(f"--nproc-per-node={text}: must be at least 1")
    return number


def _gpu_of(per_node: int | str | None, use_gpu: bool | None) -> bool | None:
    if per_node == "gpu" and use_gpu is False:
        raise ConfigError("--nproc-per-node=gpu: a worker for each GPU, and --no-use-gpu says that they use none")
    return {"gpu": True, "cpu": use_gpu or False}.get(str(per_node), use_gpu)


def _max_restarts(number: int) -> int:
    if number < 0:
        raise ConfigError(f"--max-restarts={number}: max_restarts must be >= 0")
    return number


def _spares(text: str) -> int | str:
    if text == "auto" or not re.fullmatch(r"\d+", text):
        if text != "auto":
            raise ConfigError(f"--spares={text}: must be a whole number per node, at least 0, or auto")
        return text
    return int(text)


def _preload(chosen: argparse.Namespace) -> tuple[str, ...]:
    names = tuple(name.strip() for name in chosen.preload.split(",") if name.strip())
    wrong = [name for name in names if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name)]
    if wrong:
        raise ConfigError(f"--preload={chosen.preload}: {wrong[0]!r} is not the name of a module")
    return () if chosen.no_preload else names


def _timeouts(chosen: argparse.Namespace, environ: Mapping[str, str]) -> Timeouts:
    conf = rendezvous.timeouts_of(rendezvous.parse_conf(chosen.rdzv_conf), "--rdzv-conf ")
    return Timeouts(stop=_shutdown_seconds(chosen.shutdown_timeout, environ), **conf)


def _shutdown_seconds(given: int | None, environ: Mapping[str, str]) -> float:
    """Seconds from SIGTERM to SIGKILL, as torch finds them."""
    if given is None:
        name = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
        return values.seconds(name, environ[name]) if name in environ else SHUTDOWN_SECONDS
    return values.seconds("--shutdown-timeout", str(given))


def signals_for(text: str) -> tuple[signal.Signals, ...]:
    """The signals of --signals-to-handle."""
    found = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        number = getattr(signal.Signals, name, None)
        if number is None:
            raise ConfigError(f"--signals-to-handle={text}: there is no signal {name!r}")
        if number in (signal.SIGKILL, signal.SIGSTOP):
            raise ConfigError(f"--signals-to-handle={text}: the operating system lets nobody handle {name}")
        found.append(number)
    return tuple(found)


def _logs(chosen: argparse.Namespace, environ: Mapping[str, str]) -> Logs:
    prefix = environ.get("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE")
    return Logs(
        redirects=values.streams("--redirects", chosen.redirects),
        tee=values.streams("--tee", chosen.tee),
        local_ranks_filter=values.ranks("--local-ranks-filter", chosen.local_ranks_filter),
        duplicate_stdout_filters=_filters(chosen.duplicate_stdout_filters),
        duplicate_stderr_filters=_filters(chosen.duplicate_stderr_filters),
        **({} if prefix is None else {"prefix": prefix}),
    )


def _log_dir(text: str | None, cwd: str, notes: list[str]) -> str | None:
    if text == os.devnull:  # torch keeps no files then
        notes.append(f"--log-dir={text}: the console is fed from files; they lie in Ray's session log folder")
    return os.path.join(cwd, text) if text and text != os.devnull else None


def _filters(texts: str | Sequence[str]) -> tuple[str, ...]:
    return tuple(comma_separated(texts) if isinstance(texts, str) else texts)
