"""`raylaunch.run`: validates what it is given, and hands it to the cluster side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from raylaunch.result import RunResult
from raylaunch.spec import Timeouts, make_spec, spelling_checked
from raylaunch.worker.env import DEFAULT_COPY_ENV


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
            free memory. They are what makes a recovery quick.
        preload: modules that a worker imports before it is needed.
        timeouts: how long each phase may take.
        env: environment variables of the workers.
        copy_env: patterns of the driver's environment variables that the workers get.
        runtime_env: Ray's, for the workers' code and packages.
        log_dir: where the journal goes, in a folder named by the run id; default: Ray's session log folder.
        run_id: the run's name; default: a random one.
        virtual_local_rank: each worker sees only its own GPU, as number 0, and LOCAL_RANK is 0.

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
    from raylaunch.cluster.session import Job, launch

    job = Job(
        train_fn=train_fn,
        args=args,
        kwargs=kwargs,
        no_retry=no_retry,
        preload=preload,
        env=env,
        copy_env=copy_env,
        runtime_env=runtime_env,
        log_dir=log_dir,
    )
    return launch(spec, job)
