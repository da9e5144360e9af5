"""Which CPUs a rank is bound to, so that it is near its GPU: torchrun's --numa-binding (torch 2.13's AffinityMode).

Called by a seat's worker for the command that it starts. Everything is read from the kernel, by the GPU's PCI address:
torch would ask CUDA, which a forked process may not touch before the rank does, and numactl, which isn't needed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path


class NoBinding(Exception):  # noqa: N818 - not an error: the rank goes on where the system puts it
    """There is nothing to bind to; the message says why."""


def cpus_for(
    mode: str,
    *,
    gpu: int | None,
    local_rank: int,
    local_world_size: int,
    allowed: Iterable[int],
    root: str = "/",
) -> list[int]:
    """The CPUs of one rank.

    Args:
        mode: node, socket, exclusive or core-complex.
        gpu: the index of its (first) GPU on the machine; None: on CPUs, where ranks are split evenly over the nodes.
        local_rank: its place among the run's ranks on the machine.
        local_world_size: how many those are.
        allowed: the CPUs that the process may use.
        root: where /sys and /proc are.

    Raises:
        NoBinding: the machine has one NUMA node, or doesn't say where its GPUs are.
    """
    machine = _Machine(root, frozenset(allowed))
    nodes = machine.nodes()
    if len(nodes) < 2:
        raise NoBinding("this machine has one NUMA node")
    if gpu is None:
        places = [nodes[rank * len(nodes) // local_world_size] for rank in range(local_world_size)]
        mine = local_rank
    else:  # of all GPUs, also other runs': what is exclusive is so among all of them
        places, mine = machine.nodes_of_gpus(), gpu
    if mine >= len(places):
        raise NoBinding(f"the machine doesn't say where GPU {gpu} is")
    node = places[mine]
    peers = [number for number, place in enumerate(places) if place == node]
    cpus = machine.cpus_of(node)
    if not cpus:
        raise NoBinding(f"this process may use no CPU of NUMA node {node}")
    if mode == "socket":
        socket = machine.socket_of(min(cpus))
        cpus = frozenset(cpu for one in nodes for cpu in machine.cpus_of(one) if machine.socket_of(cpu) == socket)
    elif mode == "exclusive":
        cpus = _share(_groups(cpus, machine.core_of), peers.index(mine), len(peers), node)
    elif mode == "core-complex":
        groups = sorted(_groups(cpus, machine.cache_of), key=lambda group: (-len(group), group))
        cpus = frozenset(groups[peers.index(mine) % len(groups)])
    return sorted(cpus)


def _share(cores: Sequence[list[int]], position: int, peers: int, node: int) -> frozenset[int]:
    """One peer's part of a node's cores; the first ones get one more where it doesn't come out even."""
    if len(cores) < peers:
        raise NoBinding(f"NUMA node {node} has {len(cores)} cores for {peers} workers")
    each, more = divmod(len(cores), peers)
    start = position * each + min(position, more)
    return frozenset(cpu for core in cores[start : start + each + (position < more)] for cpu in core)


def _groups(cpus: Iterable[int], key: Callable[[int], int]) -> list[list[int]]:
    """The CPUs that have something in common, in order."""
    found: dict[int, list[int]] = {}
    for cpu in sorted(cpus):
        found.setdefault(key(cpu), []).append(cpu)
    return [found[one] for one in sorted(found)]


class _Machine:
    """What the kernel says of a machine's CPUs and GPUs."""

    def __init__(self, root: str, allowed: frozenset[int]) -> None:
        self._sys = Path(root, "sys")
        self._gpus = Path(root, "proc", "driver", "nvidia", "gpus")
        self._allowed = allowed

    def nodes(self) -> list[int]:
        names = [path.name[4:] for path in self._sys.glob("devices/system/node/node*")]
        return sorted(int(name) for name in names if name.isdigit())

    def cpus_of(self, node: int) -> frozenset[int]:
        return self._numbers(f"devices/system/node/node{node}/cpulist") & self._allowed

    def nodes_of_gpus(self) -> list[int]:
        """The NUMA node of each GPU, in the order of their PCI addresses, which is Ray's (2.60) and NVML's."""
        addresses = sorted(os.listdir(self._gpus)) if self._gpus.is_dir() else []
        found = [self._text(f"bus/pci/devices/{address.lower()}/numa_node") for address in addresses]
        return [max(0, int(text or 0)) for text in found]

    def socket_of(self, cpu: int) -> int:
        return int(self._text(f"devices/system/cpu/cpu{cpu}/topology/physical_package_id") or 0)

    def core_of(self, cpu: int) -> int:
        return min(self._numbers(f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"), default=cpu)

    def cache_of(self, cpu: int) -> int:
        """The first CPU that shares this one's largest cache."""
        folder, shared = f"devices/system/cpu/cpu{cpu}/cache", (-1, cpu)
        for path in (self._sys / folder).glob("index*"):
            if self._text(f"{folder}/{path.name}/type") in ("Unified", "Data"):
                level = int(self._text(f"{folder}/{path.name}/level") or -1)
                cpus = self._numbers(f"{folder}/{path.name}/shared_cpu_list")
                shared = max(shared, (level, min(cpus, default=cpu)))
        return shared[1]

    def _text(self, path: str) -> str:
        try:
            return (self._sys / path).read_text(encoding="ascii").strip()
        except OSError:
            return ""

    def _numbers(self, path: str) -> frozenset[int]:
        """`0-3,8` as numbers."""
        found: set[int] = set()
        for part in filter(None, self._text(path).split(",")):
            first, _, last = part.partition("-")
            found |= set(range(int(first), int(last or first) + 1))
        return frozenset(found)
