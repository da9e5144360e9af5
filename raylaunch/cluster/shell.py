"""The shell: carries the coordinator's commands out, turns what comes of them into events, and never decides.

It serves one run, or those of a launcher. Every event is numbered and written to the journal before the coordinator
sees it. When the coordinator actor dies, Ray starts it anew, the shell sends it the journal, and goes on where it was;
the workers don't notice.

Its asyncio loop lives in a thread of its own, so that `run` works in notebooks, threads, Ray tasks and actors.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import ray
import ray.exceptions

from raylaunch.cluster import placement
from raylaunch.cluster.background import Background
from raylaunch.cluster.console import Console
from raylaunch.cluster.coordinator_actor import Behind
from raylaunch.cluster.faults import ending_from
from raylaunch.cluster.hands import Hands
from raylaunch.cluster.run import Run
from raylaunch.cluster.worker_config import WorkerConfig
from raylaunch.coordinator import commands as do
from raylaunch.coordinator import events as e
from raylaunch.coordinator.machine import Decision
from raylaunch.coordinator.phase import Phase
from raylaunch.errors import ConfigError, InternalError, LauncherClosedError
from raylaunch.journal import Journal
from raylaunch.spec import RunSpec

logger = logging.getLogger("raylaunch")

#: How often the shell looks at what Ray doesn't push, in seconds: at least this, and longer in large clusters.
SURVEY_SECONDS = 1.0
SURVEY_NODES_PER_SECOND = 200
#: How long the coordinator may be away before the run gives up, in seconds: Ray restarts it in 1.7.
COORDINATOR_SECONDS = 60.0
#: A coordinator that doesn't answer for this long, in seconds, is stuck: it is killed, and Ray restarts it.
ANSWER_SECONDS = 20.0
#: How many events of the journal are sent to a restarted coordinator at a time: it serves pulses in between.
REPLAY_EVENTS = 2000
#: How long the root cause's exception may take to reach the driver, in seconds.
EXCEPTION_SECONDS = 10.0


class Shell:
    """One run from its first event to the last; or, `held`, a launcher's runs, one after the other."""

    def __init__(
        self, spec: RunSpec, journal: Journal, coordinator: Any, config: WorkerConfig, runtime_env: Any, *, held: bool
    ) -> None:
        self._spec = spec
        self._held = held
        self._journal = journal
        self._coordinator = coordinator
        role = "default" if config.command is None else config.command.role
        console = Console(role, config.logs, os.path.dirname(journal.path))
        self._hands = hands = Hands(spec, config, runtime_env, self.post, console)
        self._carry_out: dict[type[do.Command], Callable[[Any], None]] = {
            do.RequestBundles: hands.request_bundles,
            do.ReleaseBundles: hands.release_bundles,
            do.StartWorker: hands.start_worker,
            do.CallRoll: hands.call_roll,
            do.Promote: hands.promote,
            do.CollectResult: hands.collect,
            do.StopWorkers: hands.stop_workers,
            do.KillWorkers: hands.kill_workers,
            do.WakeAt: self._wake_at,
            do.Tell: self._tell,
            do.Finish: self._finished,
        }
        self._history: list[e.Event] = []  # every event, in order: number n is at n - 1
        self._inbox: list[e.Event] = []
        self._wakeup = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._main_task: asyncio.Task[None]
        self._alarm: asyncio.TimerHandle | None = None
        self._background = Background()
        self._deliveries = Background()
        self._shortage = ""
        self._run: Run | None = None  # the one that is going on
        self._stopping: Run | None = None  # the last that was asked to end
        self._delivering: set[Run] = set()
        self._queue: deque[Run] = deque()
        self._released = False  # no further run begins
        self._over = False
        self._error: BaseException | None = None
        self._closing = threading.Lock()  # between the driver's threads and the end of the loop
        self._closed = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"raylaunch-{spec.run_id}", daemon=True)

    # -- called from the driver's own thread -------------------------------------------------------------------------

    def start(self) -> None:
        """Start the loop; a launcher begins to hold what its runs will need."""
        self._main_task = self._loop.create_task(self._main())
        self._thread.start()

    def request(self, run: Run) -> None:
        """Have a run made, after those that were requested before. Its future tells the rest."""
        self._queue.append(run)
        if not self._soon(self._next_run):
            self._fail_all()

    def stop(self, run: Run, reason: str) -> None:
        """Ask a run to end in order: the coordinator decides how. For the second time: at once."""
        self._soon(self._post_stop, run, reason)

    def release(self, reason: str) -> None:
        """Hold nothing any more; a run that is going on is stopped, and none begins."""
        self._soon(self._post_release, reason)

    def abandon(self) -> None:
        """End everything at once, without asking the coordinator: it may be what hangs."""
        self._soon(self._abandon)

    def wait(self, seconds: float) -> bool:
        """Wait until everything is over and gone; whether that came in time."""
        if not self._done.wait(seconds):
            return False
        self._thread.join()
        return True

    def _soon(self, call: Callable[..., Any], *args: Any) -> bool:
        """Have this called on the loop; False when the loop has ended."""
        with self._closing:
            if not self._closed:
                self._loop.call_soon_threadsafe(call, *args)
            return not self._closed

    # -- runs --------------------------------------------------------------------------------------------------------

    def _next_run(self) -> None:
        while self._queue and self._run is None and not self._released:
            run = self._queue.popleft()
            if run.future.set_running_or_notify_cancel():
                self._run, self._hands.run = run, run.config
                self.post(e.RunRequested(time.monotonic(), run.spec))

    def _post_stop(self, run: Run, reason: str) -> None:
        if run is self._run:  # otherwise it has ended, and the next one is nobody's to stop
            self._hands.at_once, self._stopping = self._stopping is run, run
            self.post(e.StopRequested(time.monotonic(), reason))

    def _abandon(self) -> None:
        self._hands.at_once = True
        self._main_task.cancel()

    def _post_release(self, reason: str) -> None:
        self._released = True
        if self._held or self._run is not None:
            self.post(e.ReleaseRequested(time.monotonic(), reason))
        elif not self._over:  # its run was taken back before it began: the coordinator knows of nothing
            self._main_task.cancel()

    def _finished(self, command: do.Finish) -> None:
        run, self._run = self._run, None
        assert run is not None, "what ends was requested"
        self._delivering.add(run)
        values = [self._hands.values.get(worker) for worker in command.workers]
        self._hands.values.clear()  # a launcher may be idle for long: what a run was given and gave is the user's
        self._hands.run = None
        shortage, self._shortage = self._shortage, ""
        self._deliveries.start(self._deliver(run, command, values, shortage))
        self._next_run()

    async def _deliver(self, run: Run, finish: do.Finish, values: list[Any], shortage: str) -> None:
        exception = await self._hands.exception_of(finish.culprit, EXCEPTION_SECONDS)
        # In a thread of its own: it loads the user's exception, and calls what was added to the future.
        await self._loop.run_in_executor(None, run.finish, finish, values, exception, shortage)
        self._delivering.discard(run)

    def _fail_all(self) -> None:
        """After the end: nobody may wait for ever."""
        error = self._why_over()
        left = [self._run] if self._run is not None else []
        left += self._delivering
        while self._queue:
            left.append(self._queue.popleft())
        for run in left:
            run.fail(error)

    def _why_over(self) -> BaseException:
        if self._error is None or isinstance(self._error, asyncio.CancelledError):
            return LauncherClosedError(f"launcher {self._spec.run_id} has been left; nothing is held any more")
        if isinstance(self._error, ConfigError):
            return self._error
        error = InternalError(f"the launcher itself failed: {self._error!r}; please report it")
        error.__cause__ = self._error
        return error

    # -- the loop ----------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            asyncio.set_event_loop(self._loop)
            self._loop.run_until_complete(self._main_task)
        except BaseException as error:  # whatever it is, the driver's thread must not wait for ever
            self._error = error
            if self._run is None and not isinstance(error, asyncio.CancelledError):  # otherwise its caller is told
                logger.exception("the launcher itself failed")
        finally:
            with self._closing:
                self._closed = True
            self._loop.close()
            self._journal.close()
            self._fail_all()
            self._done.set()

    async def _main(self) -> None:
        try:
            self._hands.start()
            if self._held:
                self.post(e.HoldRequested(time.monotonic(), self._spec))
            await self._wakeup.wait()  # for the request: what the cluster has been through comes after it
            self._background.start(self._survey())
            self._background.start(self._listen_for_silence())
            while not self._over:
                await self._wakeup.wait()
                self._wakeup.clear()
                if not ray.is_initialized():  # the survey sees that
                    raise ConfigError("ray.shutdown() was called under the run: its workers are gone with the session")
                await self._handle_inbox()
            await self._deliveries.finish(EXCEPTION_SECONDS)
        finally:
            self._deliveries.cancel()
            self._background.cancel()
            if ray.is_initialized():  # or Ray 2.60 would start a new session for the first call
                await self._hands.let_go()
                ray.kill(self._coordinator)

    def post(self, event: e.Event) -> None:
        """Take an event in. Called on the loop's thread only."""
        self._inbox.append(event)
        self._wakeup.set()

    async def _handle_inbox(self) -> None:
        batch, self._inbox = self._inbox, []
        first = len(self._history) + 1
        for seq, event in enumerate(batch, first):
            self._journal.event(seq, event)
        self._history += batch
        decisions = await self._decide(first, batch)
        for seq, decision in enumerate(decisions, first):
            self._journal.decision(seq, decision)
            if decision.refused:
                logger.error("%s (event %d of the journal %s)", decision.reason, seq, self._journal.path)
            if any(
                isinstance(command, do.Finish) and command.outcome is do.Outcome.NO_ROOM
                for command in decision.commands
            ):
                self._shortage = await self._describe_shortage()  # before the groups are given back
            self._over = decision.after is Phase.DONE
            for command in decision.commands:
                self._carry_out[type(command)](command)

    async def _decide(self, first: int, batch: list[e.Event]) -> list[Decision]:
        """Have the coordinator decide, through its own deaths."""
        until = time.monotonic() + COORDINATOR_SECONDS
        while True:
            try:
                answer = await self._ask(first, batch)
                if not isinstance(answer, Behind):
                    return answer
                for done in range(answer.seq, first - 1, REPLAY_EVENTS):
                    await self._ask(done + 1, self._history[done : first - 1][:REPLAY_EVENTS], replay=True)
            except asyncio.TimeoutError:
                logger.warning("the coordinator has not answered for %g s; restarting it", ANSWER_SECONDS)
                ray.kill(self._coordinator, no_restart=False)
            except (ray.exceptions.RayActorError, ray.exceptions.RuntimeEnvSetupError) as error:
                ending = ending_from(error)
                if ending.fatal:
                    text = f"the coordinator can't be started on the driver's node: {ending.message}"
                    raise ConfigError(text) from error
                if time.monotonic() > until or not ray.is_initialized():
                    raise
                await asyncio.sleep(0.1)  # it is being restarted

    async def _ask(self, first: int, events: list[e.Event], *, replay: bool = False) -> list[Decision] | Behind:
        reference = self._coordinator.handle.remote(first, events, replay=replay)
        answer: list[Decision] | Behind = await asyncio.wait_for(
            asyncio.wrap_future(reference.future()), ANSWER_SECONDS
        )
        return answer

    # -- commands that need no hands ---------------------------------------------------------------------------------

    def _wake_at(self, command: do.WakeAt) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        delay = max(0.0, command.at - time.monotonic())
        self._alarm = self._loop.call_later(delay, self._tick)

    def _tick(self) -> None:
        self.post(e.Tick(time.monotonic()))

    def _tell(self, command: do.Tell) -> None:
        level = logging.WARNING if command.level is do.Level.WARNING else logging.INFO
        if command.shortage:
            self._background.start(self._tell_shortage(level, command.text))
        else:
            logger.log(level, "%s", command.text)

    async def _tell_shortage(self, level: int, text: str) -> None:
        logger.log(level, "%s\n%s", text, await self._describe_shortage())

    async def _describe_shortage(self) -> str:
        groups = self._hands.placement_groups()
        return await self._loop.run_in_executor(None, placement.shortage, self._spec, groups)

    # -- what Ray doesn't push ---------------------------------------------------------------------------------------

    async def _survey(self) -> None:
        """Look at nodes and at other jobs' groups, and post what has changed."""
        dead: frozenset[str] = frozenset()
        draining: frozenset[str] = frozenset()
        waiting = False
        while ray.is_initialized():
            try:
                seen = await self._loop.run_in_executor(None, placement.survey, self._spec.run_id)
            except Exception as error:  # Ray's control store is being restarted
                logger.debug("can't look at the cluster: %r", error)
                await asyncio.sleep(SURVEY_SECONDS)
                continue
            now = time.monotonic()
            for node in seen.dead - dead:
                self.post(e.NodeLost(now, node))
            for node in seen.draining - draining:
                self.post(e.NodeDraining(now, node))
            if seen.others_waiting != waiting:
                self.post(e.OthersWaiting(now, seen.others_waiting))
            dead, draining, waiting = seen.dead, seen.draining, seen.others_waiting
            await asyncio.sleep(max(SURVEY_SECONDS, seen.nodes / SURVEY_NODES_PER_SECOND))
        self._wakeup.set()  # nothing else tells the loop that the session is gone: Ray's futures stay open for ever

    async def _listen_for_silence(self) -> None:
        """Post the pulses that stay away."""
        while ray.is_initialized():
            try:
                for worker, seconds in await self._coordinator.next_silent.remote():
                    self.post(e.PulseMissed(time.monotonic(), worker, seconds))
            except ray.exceptions.RayActorError:
                # It is being restarted, empty. Any event makes the shell send it the journal, and in steady running
                # there would be none for hours, while is_current() waits for it.
                self.post(e.Tick(time.monotonic()))
                await asyncio.sleep(0.5)
