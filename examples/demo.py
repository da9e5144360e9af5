"""Training that survives, shown in three acts on a Ray cluster of two nodes on this machine. Run it with `make demo`.

Act 1 kills a worker, act 2 a whole node, act 3 adds a node. What raylaunch says about it appears as it happens. In the
end the demo checks what it has claimed, and leaves with 1 and a sentence if something doesn't hold.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import digits
import torch

import raylaunch

if TYPE_CHECKING:
    from raylaunch.cluster.coordinator_actor import Status
    from raylaunch.testing import LocalCluster

#: The length of act 1's run in steps; each is made to last so long, in seconds, that there is a middle to be killed in.
STEPS = 240
PAUSE = 0.05
#: Warm processes in reserve on each node, one for each of its workers.
SPARES = 2
#: Nothing in this demo should make anybody wait for longer than this, in seconds.
PATIENCE = 180.0


def main() -> None:
    folder = tempfile.mkdtemp(prefix="raylaunch-demo-")
    # Read when ray is imported. If the demo fails in the middle of a run, the cluster ends first, and then the run: it
    # should not make Ray connect to a cluster by itself, for its last words.
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
    with quiet(os.path.join(folder, "ray-notices.txt")) as terminal:
        from raylaunch.testing import LocalCluster

        show = Show(terminal)
        show.title("A Ray cluster of 2 nodes with 2 CPUs each, on this machine", f"(what is written goes to {folder})")
        with LocalCluster(nodes=2, cpus=2) as cluster:
            stage = Stage(cluster, show, folder)
            show.line(f"up: nodes {' and '.join(node.node_id[:8] for node in cluster.nodes)}")
            act_1(stage)
            acts_2_and_3(stage)
        show.title("Checked, and so it was:", *stage.held)
        show.title(
            "To look at:",
            f"journals           {folder}/*/journal.jsonl, to be read with `raylaunch replay JOURNAL`",
            f"the ranks' output  {folder}/*/*/generation_*/*/std*.log",
            f"step logs          {folder}/*/steps.jsonl",
            f"what Ray printed   {folder}/ray-notices.txt",
        )


def act_1(stage: Stage) -> None:
    """A worker is killed half-way; the run goes on from its last checkpoint, and ends with the very same weights."""
    show = stage.show
    show.title(f"Act 1: 4 workers train for {STEPS} steps; one is killed half-way")
    run = Run(stage, "killed", num_workers=4, steps=STEPS, pause=PAUSE, spares=SPARES)
    midway = STEPS // 2 + digits.SAVE_EVERY // 2  # between two checkpoints
    latest = STEPS - 2 * digits.SAVE_EVERY  # on a slow machine, not all spares are ready by then
    run.wait_for(
        f"{midway} steps, and spares",
        lambda now: run.step >= midway and (now.ready_spares >= 2 * SPARES or run.step >= latest),
    )
    show.line(f"step {run.step} of {STEPS}: SIGKILL to rank 2, pid {stage.cluster.member(run.id, 2).process.pid}")
    stage.cluster.kill_worker(run.id, 2)
    killed = run.result()

    show.line("the same run again, which nobody disturbs, to compare with")
    again = Run(stage, "undisturbed", num_workers=4, steps=STEPS, pause=0.0, spares=0)
    undisturbed = again.result()

    history = run.history()
    stage.check(len(killed.recoveries) == 1 and len(history) == 2, "act 1: one failure, one recovery")
    recovery, first, second = killed.recoveries[0], history[0], history[1]
    resumed, reached = second[0]["step"], first[-1]["step"]
    last_saved = max(line["step"] for line in first if line["event"] == "saved")
    pause = second[1]["at"] - first[-1]["at"]
    stage.check("rank 2" in recovery.cause and "killed" in recovery.cause, f"act 1: cause found: {recovery.cause}")
    stage.check(
        recovery.world_size == killed.world_size == 4,
        f"act 1: re-formed 4/4 in {recovery.seconds:.2f} s; {pause:.2f} s from the last step before to the first after",
    )
    stage.check(
        resumed == last_saved > 0,
        f"act 1: went on from the checkpoint of step {resumed}; steps {resumed + 1} to {reached} were trained again",
    )
    stage.check_accuracy("act 1", killed)
    stage.check(
        undisturbed.generation == 1 and not undisturbed.recoveries, "act 1: the run to compare with was undisturbed"
    )
    weights, others = killed[0]["weights"], undisturbed[0]["weights"]
    stage.check(
        weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights),
        f"act 1: all {len(weights)} weight tensors are equal to the undisturbed run's, to the last bit",
    )


def acts_2_and_3(stage: Stage) -> None:
    """One run of 2 to 4 workers: a node is killed, and it goes on with 2; a node is added, and it grows back to 4."""
    show, cluster = stage.show, stage.cluster
    show.title("Act 2: 2 to 4 workers train; a node is killed")
    run = Run(stage, "elastic", num_workers=(2, 4), steps=None, pause=PAUSE, spares=SPARES)
    run.wait_for(
        "4 workers, a checkpoint, and spares",
        lambda now: len(now.members) == 4 and run.step > digits.SAVE_EVERY and now.ready_spares >= 2 * SPARES,
    )
    victim = cluster.nodes[1]
    show.line(f"step {run.step}: SIGKILL to node {victim.node_id[:8]}, its raylet and every worker on it")
    cluster.kill_node(victim)
    run.wait_for(
        "steps of 2 workers, and word of the node",
        lambda now: (
            len(now.members) == 2
            and run.steps_of(now.generation) >= 10
            and any(victim.node_id[:8] in sentence for sentence in show.heard)
        ),
    )

    show.title("Act 3: a node is added")
    show.line(f"step {run.step}: adding a node")
    added = cluster.add_node()
    run.wait_for(
        "steps of 4 workers",
        lambda now: len(now.members) == 4 and run.steps_of(now.generation) >= 10 and run.step >= STEPS,
    )
    show.line(f"step {run.step}: that will do; the training is told to stop")
    open(os.path.join(run.folder, "stop"), "w", encoding="ascii").close()
    result = run.result()

    sizes = [lines[0]["world_size"] for lines in run.history()]
    shrunk = [(before, after) for before, after in itertools.pairwise(sizes) if after < before]
    # On a slow machine the run may begin with 2 workers, and grow before the node is killed.
    stage.check(shrunk == [(4, 2)] and sizes[-1] == 4, f"acts 2, 3: the world sizes were {', '.join(map(str, sizes))}")
    stage.check(len(result.recoveries) == 1, "acts 2, 3: one failure, one recovery")
    recovery = result.recoveries[0]
    stage.check(victim.node_id[:8] in recovery.cause, f"act 2: cause found: {recovery.cause}")
    stage.check(recovery.world_size == 2, f"act 2: re-formed 2/4 in {recovery.seconds:.2f} s")
    nodes = {worker.node for worker in run.last_members.values()}
    stage.check(added.node_id in nodes, f"act 3: grew back to 4/4 with node {added.node_id[:8]}")
    stage.check(result.restarts == 1, "acts 2, 3: max_restarts was charged with 1, for the node; growth is free")
    stage.check_accuracy("acts 2, 3", result)


class Stage:
    """What the acts share: the cluster, the data, the terminal, and what has been checked."""

    def __init__(self, cluster: LocalCluster, show: Show, folder: str) -> None:
        self.cluster = cluster
        self.show = show
        self.folder = folder
        self.data = digits.load()
        self.held: list[str] = []

    def check(self, holds: bool, claim: str) -> None:
        """Note a claim that holds; end the demo with one that doesn't."""
        if not holds:
            fail(f"this does not hold: {claim}")
        self.held.append(claim)

    def check_accuracy(self, act: str, result: raylaunch.RunResult) -> None:
        """Every rank found the same, and it is good."""
        accuracies = {value["accuracy"] for value in result}
        text = f"{act}: test accuracy {min(accuracies):.1%}"
        self.check(len(accuracies) == 1 and min(accuracies) >= 0.95, f"{text} (wanted: at least 95 %)")


class Run:
    """One run of `digits.train`, in the background."""

    def __init__(
        self,
        stage: Stage,
        name: str,
        *,
        num_workers: int | tuple[int, int],
        steps: int | None,
        pause: float,
        spares: int,
    ) -> None:
        self.id = name
        self.folder = os.path.join(stage.folder, name)
        self.last_members: dict[int, Any] = {}
        self._stage = stage
        os.mkdir(self.folder)
        self._run = stage.cluster.start_run(
            digits.train,
            args=(*stage.data, self.folder),
            kwargs={"steps": steps, "pause": pause},
            num_workers=num_workers,
            spares=spares,
            preload=("torch", "torch._dynamo", "digits"),  # DDP wants _dynamo: a second of imports less later
            timeouts=raylaunch.Timeouts(min_generation_age=3.0),  # 10 by default: growth is not that urgent
            run_id=self.id,
            log_dir=stage.folder,
        )

    def wait_for(self, what: str, condition: Callable[[Status], bool]) -> None:
        """Wait until the run is in a state."""

        def there() -> bool:
            self.last_members = (now := self._run.running(seconds=PATIENCE)).members
            return condition(now)

        try:
            self._run.wait_until(there, what, seconds=PATIENCE)
        except (AssertionError, TimeoutError) as error:
            fail(str(error))

    def result(self) -> raylaunch.RunResult:
        """Wait for the run's end."""
        try:
            return self._run.result(PATIENCE)
        except Exception as error:
            fail(f"run {self.id}: {error}")

    def history(self) -> list[list[dict[str, Any]]]:
        """The step log's lines, by generation."""
        generations: dict[int, list[dict[str, Any]]] = {}
        with contextlib.suppress(FileNotFoundError), open(os.path.join(self.folder, "steps.jsonl"), "rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    entry = json.loads(line)
                    generations.setdefault(entry["generation"], []).append(entry)
        return list(generations.values())

    @property
    def step(self) -> int:
        """The newest step."""
        history = self.history()
        return int(history[-1][-1]["step"]) if history else 0

    def steps_of(self, generation: int) -> int:
        """How many steps a generation has made."""
        return sum(line["event"] == "step" and line["generation"] == generation for g in self.history() for line in g)


class Show(logging.Handler):
    """What the audience sees: the demo's own lines, and those that raylaunch logs, with the seconds since the start."""

    def __init__(self, terminal: TextIO) -> None:
        super().__init__()
        self._terminal = terminal
        self._start = time.monotonic()
        self.heard: list[str] = []
        logger = logging.getLogger("raylaunch")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    def title(self, text: str, *lines: str) -> None:
        print(f"\n{text}", *lines, sep="\n  ", file=self._terminal, flush=True)

    def line(self, text: str) -> None:
        print(f"{time.monotonic() - self._start:6.1f} s  {text}", file=self._terminal, flush=True)

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage())
        self.line(f"raylaunch: {record.getMessage()}")


@contextlib.contextmanager
def quiet(path: str) -> Iterator[TextIO]:
    """Keep Ray's own notices off the terminal, in a file: this is the one place that filters anything.

    Ray 2.60 has threads in the driver that print() a killed worker's and a dying node's notice to sys.stdout, also with
    log_to_driver=False, and a log handler on what sys.stderr is when ray is imported. Inside, both are the file; what
    this yields is the terminal.
    """
    terminal = sys.stdout
    file = open(path, "w", encoding="utf-8")  # noqa: SIM115 - never closed: Ray's log handler keeps it until the end
    with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield terminal


def fail(sentence: str) -> NoReturn:
    """End the demo; Python prints the sentence to stderr and leaves with 1."""
    raise SystemExit(f"the demo failed: {sentence}")


if __name__ == "__main__":
    main()
