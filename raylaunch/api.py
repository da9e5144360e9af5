"""`raylaunch.run` and `raylaunch.Launcher`: validate what they are given, and hand it to the cluster side."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from raylaunch.errors import LauncherClosedError
from raylaunch.result import RunResult
from raylaunch.spec import Timeouts, budget, make_spec, spelling_checked
from raylaunch.worker.env import DEFAULT_COPY_ENV

if TYPE_CHECKING:
    from concurrent import futures

    from raylaunch.cluster.run import Run
    from raylaunch.cluster.session import Session


@spelling_checked
def run(
    train_fn: Callable[..., Any],
    *,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    num_workers: int | tuple[int, int] = 1,
    use_gpu: bool = False,
    workers_per_node: int | None = None,
    resources_per_worker: Mapping[str, float] | None = None,
    placement_strategy: str = "PACK",
    label_selector: Mapping[str, str] | None = None,
    backend: str | None = "auto",
    max_restarts: int = 3,
    no_retry: Sequence[type[BaseException]] = (),
    grow: bool = True,
    spares: int | str = "auto",
    preload: Sequence[str] = ("torch",),
    timeouts: Timeouts | None = None,
    env: Mapping[str, str] | None = None,
    copy_env: Sequence[str] = DEFAULT_COPY_ENV,
    runtime_env: Mapping[str, Any] | None = None,
    log_dir: str | None = None,
    run_id: str | None = None,
    virtual_local_rank: bool = False,
    isolation: str = "actor",
) -> RunResult:
    """Run `train_fn` as the ranks of one torch process group on the Ray cluster, and keep it going.

    When anything in the group fails, the whole group is torn down and formed again in fresh processes, with whatever
    is left between the minimum and the maximum; `train_fn` then starts from its beginning and is expected to load its
    last checkpoint. Uses the Ray session that is there, or connects with a bare `ray.init()`.

    Args:
        train_fn: called on each worker's main thread. Must be importable on the workers, or defined in `__main__`.
        args: its positional arguments, the same on every rank. ObjectRefs are passed as they are.
        kwargs: its keyword arguments.
        num_workers: how many ranks; (minimum, maximum) for an elastic run.
        use_gpu: one GPU for each worker.
        workers_per_node: this many workers on each of several different nodes; also the unit of growth.
        resources_per_worker: what each worker reserves, as in Ray; default one CPU, and one GPU with `use_gpu`.
        placement_strategy: of the minimum's placement group: PACK, SPREAD, STRICT_PACK or STRICT_SPREAD.
        label_selector: only nodes with these Ray labels.
        backend: of the process group that is initialised before `train_fn`; "auto" is nccl on GPUs and gloo on CPUs;
            None initialises none, for frameworks that do it themselves.
        max_restarts: how many failures the run survives; -1 for any number. A lost node is one failure. Growth and
            drained nodes are free.
        no_retry: exception types that end the run at once.
        grow: whether a running group is re-formed to take in new resources, up to the maximum.
        spares: warm spare processes per node, or "auto": one per worker while they fit into a quarter of the node's
            free memory, and none with isolation="process". They are what makes a recovery quick.
        preload: modules that a worker imports before it is needed.
        timeouts: how long each phase may take.
        env: environment variables of the workers.
        copy_env: patterns of the driver's environment variables that the workers get.
        runtime_env: Ray's, for the workers' code and packages.
        log_dir: where the journal and the ranks' output go, in a folder named by the run id; default: Ray's session log
            folder. What rank 0 writes is on the driver's console, too.
        run_id: the run's name; default: a random one.
        virtual_local_rank: each worker sees only its own GPU, as number 0, and LOCAL_RANK is 0.
        isolation: "actor": each rank is a Ray actor, and `train_fn` can use Ray. "process": each is a process of its
            own, forked from one on each node that has imported `preload` once; no Ray inside, exact exit codes. Quick
            to start, and to recover without spares.

    Returns:
        The values by rank, and how the run went.

    Raises:
        ConfigError: an argument can't work. Nothing was started.
        RunFailedError: the run failed; also an instance of the type of the exception that `train_fn` raised.
        PlacementTimeout: the cluster never had the room.
        KeyboardInterrupt: Ctrl-C; the run was stopped first.
    """
    spec = make_spec(
        num_workers=num_workers,
        use_gpu=use_gpu,
        workers_per_node=workers_per_node,
        resources_per_worker=resources_per_worker,
        placement_strategy=placement_strategy,
        label_selector=label_selector,
        backend=backend,
        max_restarts=max_restarts,
        grow=grow,
        spares=spares,
        timeouts=timeouts,
        run_id=run_id,
        virtual_local_rank=virtual_local_rank,
    )
    # Everything that needs Ray, or costs time to import, comes after the checks.
    from raylaunch.cluster.session import Job, Setup, launch

    setup = Setup(preload, env, copy_env, runtime_env, log_dir, isolation)
    return launch(spec, setup, Job(train_fn, args, kwargs, no_retry))


class Launcher:
    """Workers that are reserved once and serve many runs, one after the other, each in fresh processes.

        with raylaunch.Launcher(num_workers=4, use_gpu=True) as launcher:
            launcher.run(pretrain)
            launcher.run(finetune, kwargs={"lr": 1e-4})

    Entering the block reserves; leaving it releases everything. Between the runs a warm process waits in every seat, so
    that the next run begins as quickly as a recovery. A run that fails leaves the launcher as it was: the next one has
    its full budget. Entering doesn't wait for the cluster: a run does.

    The arguments are those of `raylaunch.run` that say what is reserved and what its workers are like, with the same
    meaning and defaults (`grow` too: between the runs, new resources are taken in whatever it says); `name`, by default
    a random one, is the launcher's in the cluster, and the beginning of its runs' ids: `name-1`, `name-2`.

    Attributes:
        name: the launcher's name, by which `raylaunch.testing` finds its current run.

    Raises:
        ConfigError: an argument can't work. Nothing was started.
    """

    @spelling_checked
    def __init__(
        self,
        *,
        num_workers: int | tuple[int, int] = 1,
        use_gpu: bool = False,
        workers_per_node: int | None = None,
        resources_per_worker: Mapping[str, float] | None = None,
        placement_strategy: str = "PACK",
        label_selector: Mapping[str, str] | None = None,
        backend: str | None = "auto",
        grow: bool = True,
        spares: int | str = "auto",
        preload: Sequence[str] = ("torch",),
        timeouts: Timeouts | None = None,
        env: Mapping[str, str] | None = None,
        copy_env: Sequence[str] = DEFAULT_COPY_ENV,
        runtime_env: Mapping[str, Any] | None = None,
        log_dir: str | None = None,
        name: str | None = None,
        virtual_local_rank: bool = False,
        isolation: str = "actor",
    ) -> None:
        self._spec = make_spec(
            num_workers=num_workers,
            use_gpu=use_gpu,
            workers_per_node=workers_per_node,
            resources_per_worker=resources_per_worker,
            placement_strategy=placement_strategy,
            label_selector=label_selector,
            backend=backend,
            grow=grow,
            spares=spares,
            timeouts=timeouts,
            name=name,
            virtual_local_rank=virtual_local_rank,
        )
        from raylaunch.cluster.session import Setup

        self.name = self._spec.run_id
        self._setup = Setup(preload, env, copy_env, runtime_env, log_dir, isolation)
        self._setup.check()
        self._session: Session | None = None
        self._left = False
        self._numbers = itertools.count(1)
        self._requested: set[Run] = set()

    @spelling_checked
    def run(
        self,
        train_fn: Callable[..., Any],
        *,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        max_restarts: int = 3,
        no_retry: Sequence[type[BaseException]] = (),
    ) -> RunResult:
        """Run `train_fn` on the launcher's workers, after what was submitted before, and wait for it.

        The arguments, what it returns and what it raises are those of `raylaunch.run`. `.generation` goes on rising
        from run to run, and the runs share one journal. Ctrl-C stops this run, and leaves the launcher as it is.

        Raises:
            LauncherClosedError: outside of the with block.
        """
        run, session = self._request(train_fn, args, kwargs, max_restarts, no_retry)
        return session.result(run)

    @spelling_checked
    def submit(
        self,
        train_fn: Callable[..., Any],
        *,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        max_restarts: int = 3,
        no_retry: Sequence[type[BaseException]] = (),
    ) -> futures.Future[RunResult]:
        """As `run`, without waiting: the future has its result or its error.

        Runs follow one another in the order in which they were asked for. `cancel` takes back one that has not begun.
        Leaving the block waits for all; when it is left by an exception, the run that is going on is stopped, and the
        others fail with `LauncherClosedError`.
        """
        run, _ = self._request(train_fn, args, kwargs, max_restarts, no_retry)
        return run.future

    def _request(
        self,
        train_fn: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None,
        max_restarts: int,
        no_retry: Sequence[type[BaseException]],
    ) -> tuple[Run, Session]:
        from raylaunch.cluster.session import Job

        session = self._session
        if session is None:
            why = "has been left, and everything released" if self._left else "holds nothing yet"
            raise LauncherClosedError(
                f"launcher {self.name} {why}: call it inside `with raylaunch.Launcher(...) as ...:`"
            )
        allowed = budget(max_restarts)
        packed = Job(train_fn, args, kwargs, no_retry).pack()
        run = session.request(packed, f"{self.name}-{next(self._numbers)}", allowed)
        self._requested.add(run)
        run.future.add_done_callback(lambda _: self._requested.discard(run))
        return run, session

    def __enter__(self) -> Launcher:  # noqa: PYI034 - Self is of Python 3.11
        """Begin to reserve."""
        if self._session is not None or self._left:
            raise LauncherClosedError(f"launcher {self.name} can be entered once; make another one")
        from raylaunch.cluster.session import Session

        self._session = Session(self._spec, self._setup, held=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for what was submitted, unless an exception leaves the block; then release everything."""
        session, self._session, self._left = self._session, None, True
        assert session is not None, "what is left was entered"
        try:
            if kind is None:
                from concurrent import futures

                futures.wait([run.future for run in list(self._requested)])
        except BaseException as interrupt:
            session.__exit__(type(interrupt), interrupt, interrupt.__traceback__)
            raise
        session.__exit__(kind, error, trace)
