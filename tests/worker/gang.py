"""A process that has imported torch once and forks real ranks for each scenario that a test asks for.

One import of torch costs a second of a core, a fork some milliseconds. It reads names of scenarios, a line each, and
answers with a line of JSON: what each rank's function returned, in the order of the ranks.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from raylaunch.coordinator.commands import Assignment
from raylaunch.worker.env import rank_env
from raylaunch.worker.payload import run_function
from raylaunch.worker.process_group import JoinError, is_collateral, join, leave, open_store

HOST = "127.0.0.1"


class Gang:
    """What the ranks of a scenario share: rank 0's port, and a way to wait for each other outside torch."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.pipes = [os.pipe() for _ in range(size)]
        self.rank = -1
        self.store: Any = None

    def tell(self, word: object) -> None:
        """To every other rank."""
        for rank, (_, write) in enumerate(self.pipes):
            if rank != self.rank:
                os.write(write, f"{word}\n".encode())

    def hear(self) -> str:
        read, _ = self.pipes[self.rank]
        text = b""
        while not text.endswith(b"\n"):
            text += os.read(read, 1)
        return text.decode().strip()

    def assignment(self, port: int, size: int | None = None) -> Assignment:
        size = size or self.size
        return Assignment(
            generation=3,
            rank=self.rank,
            local_rank=self.rank,
            node_rank=0,
            world_size=size,
            local_world_size=size,
            num_nodes=1,
            master_addr=HOST,
            master_port=port,
            restart_count=2,
        )

    def enter(self, assignment: Assignment, timeout: float = 20.0, backend: str | None = "gloo") -> None:
        os.environ.update(
            rank_env(assignment, run_id="r", max_restarts=3, error_file="", virtual_local_rank=False, use_gpu=False)
        )
        join(assignment, backend=backend, use_gpu=False, virtual_local_rank=False, timeout=timeout)

    def form(self, timeout: float = 20.0) -> int:
        """Rank 0 opens its store and tells where; all join. Returns the port."""
        if self.rank == 0:
            self.store, port = open_store(HOST)
            self.tell(port)
        else:
            port = int(self.hear())
        self.enter(self.assignment(port), timeout)
        return port


def all_reduce() -> float:
    tensor = torch.ones(1000)
    dist.all_reduce(tensor)
    return tensor[0].item()


def until_it_fails() -> dict[str, Any]:
    while True:
        try:
            all_reduce()
        except RuntimeError as error:
            return told(error)


def told(error: BaseException) -> dict[str, Any]:
    return {"type": type(error).__name__, "text": str(error), "collateral": is_collateral(error)}


def join_outcome(call: Callable[[], None]) -> dict[str, Any]:
    started = time.monotonic()
    try:
        call()
    except BaseException as error:
        return {
            **told(error),
            "seconds": time.monotonic() - started,
            "cause": type(error.__cause__).__name__,
            "join_error": isinstance(error, JoinError),
        }
    return {"type": None}


def reaches(host: str, port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex((host, port)) == 0


def forms(gang: Gang) -> dict[str, Any]:
    """Four ranks; somebody tries to take the port between its announcement and its use."""
    result: dict[str, Any] = {}
    if gang.rank == 0:
        descriptors = []
        for _ in range(2):  # the first store also makes libuv open a pipe that stays
            unused, _ = open_store(HOST)
            del unused
            descriptors.append(sorted(os.listdir("/proc/self/fd")))
        result["closes_everything"] = descriptors[0] == descriptors[1]
        gang.store, port = open_store(HOST)
        result["listens_here"] = reaches(HOST, port)
        result["listens_elsewhere"] = reaches("127.0.0.2", port)
        with socket.socket() as thief:
            result["thief"] = thief.connect_ex((HOST, port)) == 0
        with socket.socket() as thief:
            try:
                thief.bind((HOST, port))
            except OSError as error:
                result["thief"] = error.strerror
        gang.store.set("told before joining", "by rank 0")
        gang.tell(port)
    else:
        port = int(gang.hear())
    gang.enter(gang.assignment(port))
    store = dist.distributed_c10d._get_default_store()
    result["sum"] = all_reduce()
    result["same_store"] = dist.TCPStore(HOST, port, is_master=False).get("told before joining").decode()
    backend = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
    result["collective_timeout"] = backend.options._timeout.total_seconds()
    result["store_timeout"] = store.timeout.total_seconds()
    result["subgroup"] = dist.get_world_size(dist.new_group([0, 1, 2, 3]))
    dist.barrier()  # rank 0's store goes with rank 0: nobody leaves before all have asked it
    leave()
    result["left"] = not dist.is_initialized()
    leave()
    result["threads"] = [thread.name for thread in threading.enumerate()]
    if gang.rank == 0:
        del store, backend
        gang.store = None
        result["closed"] = not reaches(HOST, port)
    return result


def patience(gang: Gang) -> dict[str, Any]:
    """A collective may take longer than joining may."""
    gang.form(timeout=0.5)
    if gang.rank == 1:
        time.sleep(1.0)  # the passing of time itself is what is tested
    return {"sum": all_reduce()}


def killed(gang: Gang) -> dict[str, Any]:
    """Rank 1 is killed while rank 0 is in an all-reduce."""
    gang.form()
    all_reduce()
    if gang.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    result = until_it_fails()

    def handled() -> None:
        try:
            all_reduce()
        except RuntimeError:
            raise ValueError("no gradient") from None

    def buggy() -> None:
        with contextlib.suppress(RuntimeError):
            all_reduce()
        raise RuntimeError("my bug")

    for name, call in (("handled", handled), ("buggy", buggy)):
        ending, _, _ = run_function(call, dumps=lambda error: b"")
        result[name] = ending.collateral
    result["new_group"] = join_outcome(lambda: dist.new_group([0, 1], timeout=timedelta(seconds=0.5)))
    return result


def store_gone(gang: Gang) -> dict[str, Any]:
    """Rank 0, and the store with it, is killed."""
    gang.form()
    all_reduce()
    if gang.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    result = until_it_fails()
    result["new_group"] = join_outcome(lambda: dist.new_group([0, 1]))
    return result


def left_early(gang: Gang) -> dict[str, Any]:
    """Rank 1 returns and leaves its group, alive; rank 0 goes on."""
    gang.form()
    all_reduce()
    if gang.rank == 1:
        leave()
        return {"heard": gang.hear()}
    result = until_it_fails()
    gang.tell("done")
    return result


def silent(gang: Gang) -> dict[str, Any]:
    """Rank 1 stays away from a collective for longer than the group's timeout."""
    gang.form()
    all_reduce()
    if gang.rank == 1:
        return {"heard": gang.hear()}
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=0.3))
    result = until_it_fails()
    gang.tell("done")
    return result


def stale_keys(gang: Gang) -> dict[str, Any]:
    """What torchrun's restarts meet: a store in which a dead rank's address still stands."""
    gang.form()
    all_reduce()
    if gang.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    until_it_fails()
    dist.destroy_process_group()
    return join_outcome(lambda: dist.init_process_group("gloo", timeout=timedelta(seconds=0.2)))


def peer_missing(gang: Gang) -> dict[str, Any]:
    """One of two never comes."""
    gang.store, port = open_store(HOST)
    return join_outcome(lambda: gang.enter(gang.assignment(port, 2), timeout=0.5))


def endpoint_gone(gang: Gang) -> dict[str, Any]:
    """Rank 0's process has ended before this rank comes."""
    with socket.socket() as gone:
        gone.bind((HOST, 0))
        port = gone.getsockname()[1]
    gang.rank = 1
    return join_outcome(lambda: gang.enter(gang.assignment(port, 2), timeout=0.5))


def endpoint_mute(gang: Gang) -> dict[str, Any]:
    """Rank 0's process is stopped: the kernel accepts, nobody answers."""
    with socket.socket() as mute:
        mute.bind((HOST, 0))
        mute.listen()
        gang.rank = 1
        return join_outcome(lambda: gang.enter(gang.assignment(mute.getsockname()[1], 2), timeout=0.5))


def own_faults(gang: Gang) -> dict[str, Any]:
    """What goes wrong while joining and is nobody else's fault; and what torch says of NCCL."""
    gang.store, port = open_store(HOST)
    assignment = gang.assignment(port)
    result = {"no_mpi": join_outcome(lambda: gang.enter(assignment, backend="mpi"))}
    result["no_gpu"] = join_outcome(
        lambda: join(assignment, backend="gloo", use_gpu=True, virtual_local_rank=False, timeout=20)
    )
    gang.enter(assignment, backend=None)
    result["left_alone"] = not dist.is_initialized()
    backend_error = dist.DistBackendError
    result["duplicate_gpu"] = is_collateral(
        backend_error("NCCL error\nncclInvalidUsage: This usually reflects invalid usage of NCCL library.")
    )
    result["remote"] = is_collateral(backend_error("NCCL error\nncclRemoteError: A call failed possibly due to ..."))
    out_of_memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    result["out_of_memory"] = is_collateral(out_of_memory)
    return result


SCENARIOS: dict[str, tuple[int, Callable[[Gang], dict[str, Any]]]] = {
    "forms": (4, forms),
    "patience": (2, patience),
    "killed": (2, killed),
    "store_gone": (2, store_gone),
    "left_early": (2, left_early),
    "silent": (2, silent),
    "stale_keys": (2, stale_keys),
    "peer_missing": (1, peer_missing),
    "endpoint_gone": (1, endpoint_gone),
    "endpoint_mute": (1, endpoint_mute),
    "own_faults": (1, own_faults),
}


def play(name: str) -> list[Any]:
    size, function = SCENARIOS[name]
    gang = Gang(size)
    answers = [os.pipe() for _ in range(size)]
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            gang.rank = rank
            try:
                answer = function(gang)
            except BaseException:
                answer = {"broken": traceback.format_exc()}
            os.write(answers[rank][1], json.dumps(answer).encode())
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    results = []
    for read, write in answers:
        os.close(write)
        with open(read, "rb") as file:
            text = file.read()
        results.append(json.loads(text) if text else None)
    for read, write in gang.pipes:
        os.close(read)
        os.close(write)
    return results


def main() -> None:
    torch.set_num_threads(1)
    # Ranks that are killed on purpose, and torch's warnings about them, would fill the test's output.
    os.environ.update(GLOO_SOCKET_IFNAME="lo", TORCH_CPP_LOG_LEVEL="FATAL")
    for line in sys.stdin:
        print(json.dumps(play(line.strip())), flush=True)


if __name__ == "__main__":
    main()
