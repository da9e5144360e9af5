"""`ElasticLauncher`: configured, frozen, and called with a function, to which it can be passed along."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import FrozenInstanceError, replace
from typing import TYPE_CHECKING, Any

from raylaunch.context import get_context
from raylaunch.elastic.current import Here, here
from raylaunch.elastic.devices import NodeDevices, parse_devices, resolve
from raylaunch.elastic.events import Events
from raylaunch.elastic.params import NAMES, Params, unknown_parameter
from raylaunch.elastic.standing import Standing
from raylaunch.errors import ConfigError
from raylaunch.worker.board_copy import BoardCopy
from raylaunch.worker.payload import check_call

if TYPE_CHECKING:
    import torch


class ElasticLauncher(Standing):
    """Runs a function as the ranks of a process group on the Ray cluster: so many on every node, one for each device.

        def worker(launcher):
            print(launcher.rank, launcher.assigned_device)

        launcher = ElasticLauncher("cuda:*", nnodes="1:4").freeze()
        values = launcher(worker, launcher)

    A launcher can be changed until it is frozen, by assignment or `update_params`; afterwards `clone` gives one that
    can. It pickles: what a rank gets as an argument is its own current launcher, whose properties say where it stands.
    On the driver, outside a launch, they are those of rank 0 of 1.

    Args:
        devices: 'auto', 'cpu' or 'cuda', alone for one device on each node, or with a comma list of indices, ranges
            and all: 'cuda:0,2-3', 'cpu:*'. One process per entry, on every node. A GPU that is given twice is shared.
        dist_backend: of the process group; 'auto' is nccl on GPUs that nobody shares, else gloo; None: none is
            initialised.
        nnodes: 'N' or 'MIN:MAX'.
        rdzv_id: the run's id; 'none': a random one.
        rdzv_endpoint: without effect: the coordinator forms the group.
        rdzv_backend: without effect, but an unknown one is refused.
        rdzv_configs: 'key=value,...', as torchrun's; of them, timeouts have an effect.
        standalone: without effect, but that it means one node.
        role: the name of the workers' role.
        node_rank: without effect: the coordinator gives the ranks.
        master_addr: without effect: it is rank 0's node.
        master_port: without effect: it is a port that rank 0 has bound.
        max_restarts: how many failures a launch survives; -1 for any number.
        monitor_interval: without effect: failures are pushed.
        start_method: without effect: Ray starts the processes.
        redirects: which streams of which local ranks go to files only: '3', or '0:1,1:2'.
        tee: which go to files and where they went before.
        log_dir: where the files, and the run's journal, lie.
        omp_num_threads: OMP_NUM_THREADS of each rank; default: as many as it reserves CPUs.
        on_interrupt: what Ctrl-C on the driver does: 'stop', or 'save_then_stop', which asks for a checkpoint first.
        save_timeout: how long that checkpoint may take, in seconds.
        eager_mode: a launch is a call in this process, as rank 0 of 1, without Ray: for debuggers.
        run_options: further arguments of `raylaunch.run`, by name: resources_per_worker, label_selector, grow, spares,
            timeouts, preload, env, copy_env, runtime_env, no_retry.
    """

    _params: Params
    _frozen: bool
    _settled: NodeDevices | None
    _copy: BoardCopy
    _launching: threading.Lock

    def __init__(
        self,
        devices: str = "auto",
        dist_backend: str | None = "auto",
        nnodes: str | int = "1:1",
        *,
        rdzv_id: str = "none",
        rdzv_endpoint: str = "",
        rdzv_backend: str = "static",
        rdzv_configs: str = "",
        standalone: bool = False,
        role: str = "default",
        node_rank: int = 0,
        master_addr: str = "127.0.0.1",
        master_port: int | None = None,
        max_restarts: int = 0,
        monitor_interval: float | None = None,
        start_method: str = "spawn",
        redirects: str = "0",
        tee: str = "0",
        log_dir: str | None = None,
        omp_num_threads: int | None = None,
        on_interrupt: str = "stop",
        save_timeout: float = 60.0,
        eager_mode: bool = False,
        run_options: Mapping[str, Any] | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in NAMES}
        self._become(Params(**given), frozen=False)

    def _become(self, params: Params, *, frozen: bool, settled: NodeDevices | None = None) -> None:
        state = {"_params": params, "_frozen": frozen, "_settled": settled, "_copy": BoardCopy()}
        for name, value in {**state, "_launching": threading.Lock()}.items():
            object.__setattr__(self, name, value)

    # -- configuring -------------------------------------------------------------------------------------------------

    def freeze(self) -> ElasticLauncher:
        """Check the parameters and change no more; returns the launcher itself. Asks no cluster.

        Raises:
            ConfigError: a parameter can't work.
        """
        self._params.check()
        object.__setattr__(self, "_frozen", True)
        return self

    def clone(self) -> ElasticLauncher:
        """A launcher with the same parameters that isn't frozen."""
        other = ElasticLauncher()
        other._become(replace(self._params), frozen=False)
        return other

    def update_params(self, params: Mapping[str, Any] | None = None, /, **more: Any) -> ElasticLauncher:
        """Set parameters, by a mapping or by names; returns the launcher itself. None of them is set if one is wrong.

        Raises:
            FrozenInstanceError: the launcher is frozen.
            ConfigError: there is no such parameter.
        """
        given = {**(params or {}), **more}
        for name in given:
            self._check_settable(name)
            if name not in NAMES:
                raise ConfigError(unknown_parameter(name))
        object.__setattr__(self, "_params", replace(self._params, **given))
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        self._check_settable(name)
        if name not in NAMES:
            raise AttributeError(unknown_parameter(name))
        object.__setattr__(self, "_params", replace(self._params, **{name: value}))

    def _check_settable(self, name: str) -> None:
        if self._frozen:
            raise FrozenInstanceError(f"{name}: the launcher is frozen; clone() gives one that isn't")

    def __getattr__(self, name: str) -> Any:
        """The parameters that are no properties."""
        if name in NAMES:
            return getattr(self._params, name)
        raise AttributeError(f"ElasticLauncher has no attribute {name!r}")

    def __getstate__(self) -> dict[str, Any]:
        return {"params": self._params, "frozen": self._frozen, "settled": self._settled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._become(state["params"], frozen=state["frozen"], settled=state["settled"])

    def __repr__(self) -> str:
        values = [(name, getattr(self._params, name), getattr(Params(), name)) for name in NAMES]
        given = ", ".join(f"{name}={value!r}" for name, value, default in values if value != default)
        return f"ElasticLauncher({given}){'.freeze()' if self._frozen else ''}"

    # -- launching ---------------------------------------------------------------------------------------------------

    def __call__(self, entrypoint: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Run `entrypoint(*args, **kwargs)` on every rank; what the ranks returned, in their order.

        Freezes the launcher. The process group is there when the function begins and is destroyed after it.

        Raises:
            ConfigError: it can't work. Nothing was started.
            RunFailedError: the launch failed; also an instance of the type of the exception that a rank raised. In
                eager mode, that exception itself.
            PlacementTimeout: the cluster never had the room.
            KeyboardInterrupt: Ctrl-C; the launch was stopped first, as `on_interrupt` says.
        """
        if not self._launching.acquire(blocking=False):
            raise ConfigError("this launcher has a launch going on, whose events are its own; clone() gives another")
        try:
            self.freeze()
            check_call(entrypoint, args, kwargs)
            object.__setattr__(self, "_settled", self._settle())
            self._backend()
            if self._params.eager_mode:
                from raylaunch.elastic.eager import run_eagerly

                return [run_eagerly(self, entrypoint, args, kwargs)]
            from raylaunch.elastic.launch import launch

            return launch(self, entrypoint, args, kwargs)
        finally:
            self._launching.release()

    def between_steps(
        self, iteration: int | None = None, total: int | None = None, *, save: Callable[[], Any] | None = None
    ) -> bool:
        """Do what the driver asks for, all ranks at the same step; whether training goes on.

        Called by every rank before each step, with a `save` on all ranks or on none. Waits while the launch is paused;
        calls `save` when a checkpoint is asked for. Costs an all-reduce of three numbers that nobody waits for: a
        request takes effect one step after it was heard.

        Args:
            iteration: how many steps are done, for the driver's progress bar.
            total: of how many.
            save: saves a checkpoint. Called on every rank; it decides what each does.
        """
        own = self._here()
        if iteration is not None:
            own.events.progress(iteration, total)
        return own.steps.between(save)

    # -- what it is made of ------------------------------------------------------------------------------------------

    @property
    def config(self) -> Params:
        """The parameters, as they were given."""
        return self._params

    @property
    def events(self) -> Events:
        """What driver and ranks tell one another."""
        return self._here().events

    @property
    def eager_mode(self) -> bool:
        """Whether there is no launch: the process is alone."""
        return self._params.eager_mode

    @property
    def devices(self) -> list[torch.device]:
        """The devices of one node's ranks, by local rank. On the driver, `auto` and `*` ask the cluster."""
        import torch

        settled = self._settled or self._settle()
        if get_context().run_id and settled.kind == "cuda":  # LOCAL_RANK indexes what a rank sees
            names: tuple[str, ...] = tuple(f"cuda:{number // settled.sharing}" for number in range(settled.per_node))
        else:
            names = settled.names
        return [torch.device(name) for name in names]

    @property
    def dist_backend(self) -> str | None:
        """The process group's backend, 'auto' settled."""
        return self._backend()

    def _backend(self) -> str | None:
        asked, settled = self._params.dist_backend, self._settled or self._settle()
        if asked == "auto":
            return "nccl" if settled.kind == "cuda" and settled.sharing == 1 else "gloo"
        if asked == "nccl" and settled.kind == "cpu":
            raise ConfigError("dist_backend='nccl': needs GPUs; on CPUs use 'gloo'")
        if asked == "nccl" and settled.sharing > 1:
            raise ConfigError(
                f"dist_backend='nccl': devices={self._params.devices!r} gives a GPU to {settled.sharing} processes,"
                " which nccl refuses; use 'gloo' or 'auto'"
            )
        return asked

    def _here(self) -> Here:
        return here(self, self._copy, launching=self._launching.locked())

    def _settle(self) -> NodeDevices:
        """What the devices come to: on the cluster, or in this process."""
        from raylaunch.elastic import eager, launch

        devices = parse_devices(self._params.devices)
        if self._params.eager_mode:
            return eager.own_device(devices)
        least, _ = self._params.nodes
        asks = devices.needs_nodes or devices.kind == "cuda"
        return resolve(devices, launch.nodes() if asks else (), least)

    @property
    def assigned_device(self) -> torch.device:
        """The process's own device: in a launch the rank's, otherwise what eager mode would use."""
        import torch

        context = get_context()
        if context.run_id:
            return torch.device(context.device)
        from raylaunch.elastic import eager

        try:
            return torch.device(eager.own_device(parse_devices(self._params.devices)).names[0])
        except ConfigError:
            if self._params.eager_mode:
                raise
            return torch.device("cpu")  # a driver needs no GPU for a launch on those of other machines
