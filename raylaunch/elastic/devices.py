"""Device strings: what `cuda:0,2-3` asks for, and what that comes to on the nodes of a cluster. Pure.

    devices = auto | cpu | cuda, alone for one device, or followed by `:` and a comma list of `i`, `a-b` and `*`

One process per entry, on every node. What the nodes have comes as an argument: the driver's own machine may have no
GPU, and runs no rank.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raylaunch.errors import ConfigError

GRAMMAR = (
    "'auto', 'cpu' or 'cuda', alone for one device, or with a comma list of indices (i), ranges (a-b) and all (*), as"
    " in 'cuda:0,2-3' or 'cpu:*'"
)
#: Indices are below this: far more devices than a node has, few enough to count.
INDEX_LIMIT = 4096

#: Ray's names of what is counted.
_RESOURCE = {"cpu": "CPU", "cuda": "GPU"}


@dataclass(frozen=True)
class Devices:
    """A device string, read. `entries` None: one device, whichever; in them None stands for `*`."""

    text: str
    kind: str  # "auto", "cpu" or "cuda"
    entries: tuple[int | None, ...] | None

    @property
    def needs_nodes(self) -> bool:
        """Whether only the cluster knows what it comes to."""
        return self.kind == "auto" or (self.entries is not None and None in self.entries)


@dataclass(frozen=True)
class NodeDevices:
    """What every node's ranks get.

    Attributes:
        kind: "cpu" or "cuda".
        per_node: processes on each node.
        sharing: how many of them share one device; 1: each has its own.
        indices: the chosen GPUs, sorted, without repetition; None: whichever Ray gives.
    """

    kind: str
    per_node: int
    sharing: int = 1
    indices: tuple[int, ...] | None = None

    @property
    def share(self) -> float:
        """How much of a device one process reserves."""
        return 1.0 / self.sharing

    @property
    def names(self) -> tuple[str, ...]:
        """The device of each local rank, as torch names them on the node, where the cluster's choice is not known."""
        if self.kind == "cpu":
            return ("cpu",) * self.per_node
        count = self.per_node // self.sharing
        chosen = self.indices if self.indices is not None else tuple(range(count))
        return tuple(f"cuda:{index}" for index in chosen for _ in range(self.sharing))


def parse_devices(text: str) -> Devices:
    """Read a device string. Raises `ConfigError`."""
    if not isinstance(text, str):
        raise _refused(text, "is no string")
    kind, colon, listed = text.strip(" ").partition(":")
    if kind not in ("auto", "cpu", "cuda"):
        raise _refused(text, f"there is no kind of device {kind!r}")
    if not colon:
        return Devices(text, kind, None)
    entries: list[int | None] = []
    for item in listed.split(","):
        entries += _entries(text, item.strip(" "))
    return Devices(text, kind, tuple(entries))


def _entries(text: str, item: str) -> Sequence[int | None]:
    if item == "*":
        return (None,)
    found = re.fullmatch(r"([0-9]+)(?: *- *([0-9]+))?", item)
    if found is None:
        raise _refused(text, f"{item!r} is neither an index, nor a range, nor *" if item else "an index is missing")
    if any(len(number) > 9 or int(number) >= INDEX_LIMIT for number in found.groups(default="0")):
        raise _refused(text, f"{item!r}: indices are below {INDEX_LIMIT}")
    first, last = int(found[1]), int(found[2] or found[1])
    if last < first:
        raise _refused(text, f"the range {item!r} ends before it begins; did you mean {last}-{first}?")
    return range(first, last + 1)


def resolve(devices: Devices, nodes: Sequence[Mapping[str, float]], min_nodes: int = 1) -> NodeDevices:
    """What a device string comes to on a cluster.

    Args:
        devices: the string, read.
        nodes: the resources of each node, by Ray's names. Not looked at where `devices` says it all by itself.
        min_nodes: on so many nodes at least.

    Raises:
        ConfigError: the nodes don't have it, or some GPUs are given more often than others.
    """
    kind = devices.kind
    if kind == "auto":
        kind = "cuda" if _held(nodes, "GPU", min_nodes) else "cpu"
    if devices.entries is None:
        return NodeDevices(kind, 1)
    resource = _RESOURCE[kind]
    count = 0
    if None in devices.entries:
        count = _held(nodes, resource, min_nodes)
        if not count:
            raise _refused(devices.text, f"{_so_many(min_nodes)} with a {resource}")
    wanted: list[int] = []
    for entry in devices.entries:
        wanted += range(count) if entry is None else (entry,)
    if kind == "cpu":  # which CPU a process runs on, the kernel chooses: the indices are only counted
        return NodeDevices(kind, len(wanted))
    given = Counter(wanted)
    if len(set(given.values())) > 1:
        raise _refused(devices.text, "each GPU must be given equally often, so that all ranks have equal shares")
    if nodes and _held(nodes, resource, min_nodes) <= max(given):
        most = max(int(node.get(resource, 0)) for node in nodes)
        raise _refused(
            devices.text, f"{_so_many(min_nodes)} with a GPU of index {max(given)}: the most that a node has is {most}"
        )
    chosen = None if set(devices.entries) == {None} else tuple(sorted(given))
    sharing = next(iter(given.values()))
    if not (1.0 / sharing * len(wanted)).is_integer():  # of 49 shares, floating point makes less than a GPU
        raise _refused(devices.text, f"a GPU can't be shared by {sharing} processes; by one more or less it can")
    return NodeDevices(kind, len(wanted), sharing, chosen)


def _held(nodes: Sequence[Mapping[str, float]], resource: str, min_nodes: int) -> int:
    """How many of it the smallest number of nodes can all hold; 0 where there are fewer nodes."""
    counts = sorted((int(node.get(resource, 0)) for node in nodes), reverse=True)
    return counts[min_nodes - 1] if len(counts) >= min_nodes else 0


def _so_many(nodes: int) -> str:
    return "no node is there" if nodes == 1 else f"there are no {nodes} nodes"


def _refused(text: object, why: str) -> ConfigError:
    return ConfigError(f"devices={text!r}: {why}. Devices are {GRAMMAR}")
