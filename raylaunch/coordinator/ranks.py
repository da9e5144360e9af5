"""Who gets which rank: the only place where ranks are decided.

Ranks are contiguous per node. Nodes stand in the order in which the run met them, except that rank 0's node stays
first while it lives; within a node, GPUs by index. A bundle's index says nothing about its node (Ray does not sort).
Nodes may carry different numbers of workers.
"""

from __future__ import annotations

from collections.abc import Sequence

from raylaunch.coordinator.commands import Assignment, Process
from raylaunch.coordinator.roster import Bundle, Node, Seat, Worker


def assign(
    bundles: Sequence[Bundle],
    nodes: dict[str, Node],
    *,
    first_node: str,
    generation: int,
    restart_count: int,
    gpus_per_worker: float,
) -> list[tuple[Worker, Assignment]]:
    """The assignment of every spare in `bundles`, in the order of the ranks.

    `first_node`: where rank 0 was before; it comes first if it is among the bundles.
    """
    by_node: dict[str, list[Bundle]] = {}
    for bundle in bundles:
        by_node.setdefault(bundle.node, []).append(bundle)
    order = sorted(by_node, key=lambda node: (node != first_node, nodes[node].order))

    chosen: list[tuple[int, int, tuple[str, ...], tuple[int, ...], Worker]] = []
    sizes: list[int] = []
    for node_rank, node in enumerate(order):
        local = sorted(by_node[node], key=lambda b: (_numeric(b.devices), b.group.id, b.index))
        devices = tuple(sorted({device for bundle in local for device in bundle.devices}, key=_number))
        local_rank = 0
        for bundle in local:
            for seat in bundle.seats:
                worker = seat.spare
                assert worker is not None, "only usable bundles are assigned"
                own = tuple(devices.index(device) for device in _own(seat, gpus_per_worker))
                chosen.append((node_rank, local_rank, devices, own, worker))
                local_rank += 1
        sizes.append(local_rank)

    master = chosen[0][-1]
    return [
        (
            worker,
            Assignment(
                generation=generation,
                rank=rank,
                local_rank=local_rank,
                node_rank=node_rank,
                world_size=len(chosen),
                local_world_size=sizes[node_rank],
                num_nodes=len(order),
                master_addr=master.host,
                master_port=master.port,
                restart_count=restart_count,
                devices=devices,
                own_devices=own,
                predecessors=_predecessors(worker),
            ),
        )
        for rank, (node_rank, local_rank, devices, own, worker) in enumerate(chosen)
    ]


def _own(seat: Seat, gpus_per_worker: float) -> tuple[str, ...]:
    """The devices of one seat: its share of the bundle's. Where seats share devices, the one that it falls on."""
    devices = seat.bundle.devices
    if gpus_per_worker < 1:
        first = int(seat.slot * gpus_per_worker)
        return devices[first : first + 1]
    share = int(gpus_per_worker)
    return devices[seat.slot * share : (seat.slot + 1) * share]


def _predecessors(worker: Worker) -> tuple[Process, ...]:
    """Processes of the seat that may still hold its GPU; one on another node (the bundle has moved) doesn't."""
    earlier = worker.seat.predecessors
    return tuple(old.process for old in earlier if old.process is not None and old.node == worker.node)


def _number(device: str) -> tuple[int, str]:
    return (int(device), "") if device.isdigit() else (1 << 30, device)


def _numeric(devices: tuple[str, ...]) -> list[tuple[int, str]]:
    return [_number(device) for device in devices]
