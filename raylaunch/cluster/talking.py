"""A run whose driver and ranks talk by the board: what an ElasticLauncher's launch is made of."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

from raylaunch.cluster.board_link import BoardLink
from raylaunch.cluster.gpu_indices import chosen_gpus
from raylaunch.cluster.run import Run
from raylaunch.cluster.session import Job, Session, Setup, check_with_ray, connect
from raylaunch.command import Logs
from raylaunch.result import RunResult
from raylaunch.spec import RunSpec
from raylaunch.worker.board_copy import BoardCopy

#: How long the link's threads may take to end after the coordinator, in seconds.
END_SECONDS = 5.0


def launch_talking(
    spec: RunSpec,
    setup: Setup,
    job: Job,
    copy: BoardCopy,
    *,
    logs: Logs,
    indices: tuple[int, ...] | None,
    meanwhile: AbstractContextManager[None],
    before_stop: Callable[[Run], None],
) -> RunResult:
    """Carry a single run out. See `raylaunch.run` for what it raises.

    Args:
        spec: the run.
        setup: as for any run.
        job: as for any run.
        copy: the driver's copy of the board.
        logs: what of the ranks' output the console shows.
        indices: the GPUs that each node's ranks must have; None: whichever Ray gives.
        meanwhile: entered while the run goes on.
        before_stop: called when the run is interrupted, before it is stopped; bounded.
    """
    setup.check()
    packed = job.pack()
    connect()
    check_with_ray(spec, setup)
    link = BoardLink(copy, spec.run_id, None)
    try:
        with ExitStack() as stack:
            if indices is not None:
                spec = stack.enter_context(chosen_gpus(spec, indices))
            session = stack.enter_context(Session(spec, setup, held=False, logs=logs))
            stack.enter_context(link)
            stack.enter_context(meanwhile)
            run = session.request(packed, spec.run_id, spec.max_restarts)
            run.future.add_done_callback(lambda _: copy.take({}))  # whoever waits for news looks again
            return session.result(run, lambda: before_stop(run))
    finally:
        link.join(END_SECONDS)
