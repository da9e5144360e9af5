"""A seat's payload that is a function: it runs in the worker's own process, on its main thread."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

import ray
import ray.cloudpickle
import ray.exceptions

from raylaunch.cluster.folders import RankFiles, log_root, make_rank_folder, no_logs
from raylaunch.cluster.shipping import unpack
from raylaunch.cluster.worker_config import RunConfig, WorkerConfig
from raylaunch.context import Context, enter_context
from raylaunch.coordinator.commands import Assignment
from raylaunch.errors import Ending, EndKind, ending_of
from raylaunch.worker import env as worker_env
from raylaunch.worker import process_group
from raylaunch.worker.payload import NoRetry, PayloadError, Terminated, run_function

#: Creating the first DistributedDataParallel imports this (torch 2.13): some 1.1 s of a core, which a recovery and a
#: planned change save. Where nobody waits for the worker it is part of getting warm, and not beside it:
#: `init_process_group` waits for the end of an import that has begun.
SPARES_IMPORT = "torch._dynamo"
#: How much nicer than the ranks a spare is while it imports and training goes on.
GENTLE = 4


class FunctionPayload:
    """train_fn, from the worker's first import to its value."""

    def __init__(self, config: WorkerConfig, host: str) -> None:
        self._config = config
        self._host = host
        # Before anything imports torch: OMP_NUM_THREADS is read there.
        os.environ.update(
            worker_env.spare_env(
                run_id=config.name,
                copied=config.copied_env,
                env=config.env,
                cpus_per_worker=config.cpus_per_worker,
                use_gpu=config.use_gpu,
                host=host,
            )
        )
        self._store: Any = None
        self._call: Callable[[], Any] | None = None
        self._no_retry: NoRetry = ()
        self._value: Any = None
        self._terminated = False
        self._training = False

    def warm(self, *, gently: bool) -> int | Ending:
        """Import what train_fn will need, and open the store that the group may use; its port. Touches no GPU."""
        errors: list[BaseException] = []

        def work() -> None:
            if gently:
                _be_nice()
            gc.disable()  # its passes over all that an import makes take a tenth of torch's import
            try:
                for name in self._config.preload:
                    importlib.import_module(name)
            except BaseException as error:
                errors.append(error)
            if gently:
                with contextlib.suppress(Exception):  # train_fn will meet it itself, if it needs it
                    importlib.import_module(SPARES_IMPORT)
            gc.enable()

        thread = threading.Thread(target=work, name="raylaunch-warm")
        thread.start()
        thread.join()
        if errors:
            wanted = list(self._config.preload)
            text = f"preload={wanted!r} can't be imported there: {type(errors[0]).__name__}: {errors[0]}"
            trace = "".join(traceback.format_exception(errors[0]))
            return Ending(EndKind.CANNOT_WORK, message=text, traceback=trace, fatal=True)
        self._store, port = process_group.open_store(self._host)
        return port

    def join(self, assignment: Assignment, run: RunConfig) -> Ending | None:
        """Become a rank: environment, device, function, process group. None, or how it failed."""
        config = self._config
        root = config.log_dir or log_root()
        try:
            files = make_rank_folder(root, run.run_id, assignment.generation, assignment.rank)
            _redirect(files)
        except OSError as error:
            where = f"on {socket.gethostname()} ({self._host})"
            return Ending(EndKind.CANNOT_WORK, message=f"{where}: {no_logs(root, error)}", fatal=True)
        os.environ.update(
            worker_env.rank_env(
                assignment,
                run_id=run.run_id,
                max_restarts=run.max_restarts,
                error_file=files.error,
                virtual_local_rank=config.virtual_local_rank,
                use_gpu=config.use_gpu,
            )
        )
        enter_context(self._context(assignment, run))
        try:
            self._call, self._no_retry = unpack(run.payload)
            process_group.join(
                assignment,
                backend=config.backend,
                use_gpu=config.use_gpu,
                virtual_local_rank=config.virtual_local_rank,
                timeout=config.process_group_seconds,
            )
        except PayloadError as error:
            trace = "".join(traceback.format_exception(error))
            return Ending(EndKind.CANNOT_WORK, message=str(error), traceback=trace, fatal=True)
        except BaseException as error:
            return ending_of(error, collateral=process_group.is_collateral(error))
        return None

    def run(self) -> tuple[Ending, bytes | None]:
        """Run train_fn. How it ended, and the exception itself where there is one and it pickles."""
        if self._call is None:
            return Ending(EndKind.KILLED, message="it never joined"), None
        signal.signal(signal.SIGTERM, self._on_sigterm)
        # Ray 2.60 blocks SIGINT in its workers.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        self._training = True
        ending, self._value, pickled = run_function(self._call, no_retry=self._no_retry, dumps=ray.cloudpickle.dumps)
        self._training = False
        if self._terminated and ending.kind is EndKind.EXITED:
            ending = Ending(EndKind.SIGNALED, signal=signal.SIGTERM)
        return ending, pickled

    def collect(self) -> Any:
        """train_fn's value.

        A rank that returns early leaves the group, so that peers that wait for it fail at once; it does so here,
        after the coordinator has heard that it returned, so that their failure finds its cause.
        """
        process_group.leave()
        return self._value

    def what_it_fails_with(self) -> Ending | None:
        """What only this rank can tell peers that lost it: train_fn has left the group, and hasn't ended yet.

        `try: ... finally: destroy_process_group(); finish_slowly()` is usual: the exception is still on its way out.
        """
        if not self._training or self._config.backend is None or process_group.is_joined():
            return None
        found: Any = sys._current_exceptions().get(threading.main_thread().ident or 0)  # noqa: SLF001 - documented
        error = found[1] if isinstance(found, tuple) else found  # a triple before Python 3.12
        if error is None:
            return Ending(EndKind.LEFT)
        if process_group.is_collateral(error):
            return None
        return ending_of(error, fatal=isinstance(error, self._no_retry))

    def _on_sigterm(self, _number: int, _frame: FrameType | None) -> NoReturn:
        self._terminated = True
        raise Terminated(128 + signal.SIGTERM)

    def _context(self, assignment: Assignment, run: RunConfig) -> Context:
        config = self._config
        return Context(
            rank=assignment.rank,
            local_rank=int(os.environ["LOCAL_RANK"]),
            world_size=assignment.world_size,
            local_world_size=assignment.local_world_size,
            node_rank=assignment.node_rank,
            run_id=run.run_id,
            generation=assignment.generation,
            restart_count=assignment.restart_count,
            max_restarts=run.max_restarts,
            device=process_group.device_of(
                assignment, use_gpu=config.use_gpu, virtual_local_rank=config.virtual_local_rank
            ),
            master_addr=assignment.master_addr,
            master_port=assignment.master_port,
            _ask=lambda: _is_current(config.coordinator, assignment.generation, config.lease),
        )


def _redirect(files: RankFiles) -> None:
    """From here on what this process writes, by whatever means, is in the rank's files."""
    for stream, path in ((sys.stdout, files.stdout), (sys.stderr, files.stderr)):
        stream.flush()
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(opened, stream.fileno())
        os.close(opened)


def _be_nice() -> None:
    """Make this thread nicer. A thread, because a process could not take its nice value back without privileges."""
    thread = threading.get_native_id()
    niceness = os.getpriority(os.PRIO_PROCESS, thread) + GENTLE  # Ray 2.60's workers have 15 already
    os.setpriority(os.PRIO_PROCESS, thread, min(19, niceness))


def _is_current(coordinator: Any, generation: int, seconds: float) -> bool:
    """Ask the coordinator, through its restart, for as long as the lease allows."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        try:
            return bool(ray.get(coordinator.is_current.remote(generation), timeout=left))
        except ray.exceptions.GetTimeoutError:
            return False
        except ray.exceptions.RayActorError:
            time.sleep(0.2)  # it is being restarted, and Ray has no event for that
    return False
