"""How many workers a node gets, and whether with GPUs, where the command line leaves that to the cluster.

torchrun asks the machine that it runs on. The launcher's machine says nothing here: it may have no GPU, and runs no
worker. Pure: what the nodes have comes as an argument.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raylaunch.errors import ConfigError

#: The values of --nproc-per-node that aren't numbers.
COUNTED = ("auto", "cpu", "gpu")


@dataclass(frozen=True)
class Wish:
    """What the command line says.

    `per_node`: workers on each node, one of `COUNTED`, or None where they may be anywhere. `use_gpu` None: where the
    cluster has them. `resources`: what one worker reserves, as far as it was said. `min_nodes`: so many nodes at least.
    """

    per_node: int | str | None
    use_gpu: bool | None
    resources: Mapping[str, float]
    min_nodes: int


@dataclass(frozen=True)
class Size:
    """What that comes to. `note`: what the user should know of it, or ""."""

    per_node: int | None
    use_gpu: bool
    note: str = ""


def settled(wish: Wish) -> Size | None:
    """The size, if the cluster need not be asked."""
    if isinstance(wish.per_node, str) or wish.use_gpu is None:
        return None
    return Size(wish.per_node, wish.use_gpu)


def size_for(wish: Wish, nodes: Sequence[Mapping[str, float]]) -> Size:
    """The size on a cluster.

    Args:
        wish: what was asked for.
        nodes: the resources of each node of the cluster, by Ray's names.

    Raises:
        ConfigError: GPUs are wanted, and no node has one.
    """
    known = settled(wish)
    if known is not None:
        return known
    gpus = wish.resources.get("GPU", 1.0)
    use_gpu, note = wish.use_gpu, ""
    if wish.per_node == "gpu":
        use_gpu = True
    elif wish.per_node == "cpu":
        use_gpu = bool(use_gpu)
    if use_gpu is None:
        most = max((node.get("GPU", 0.0) for node in nodes), default=0.0)
        wanted = gpus * (wish.per_node if isinstance(wish.per_node, int) else 1)
        use_gpu = most >= wanted
        if most and not use_gpu:
            note = f"no node has {wanted:g} GPUs (the most is {most:g}): the workers get none; --use-gpu waits for one"
    if not isinstance(wish.per_node, str):
        return Size(wish.per_node, use_gpu, note)
    amounts = {"CPU": 1.0, **wish.resources}
    if use_gpu:
        amounts["GPU"] = gpus
    counted = "GPU" if use_gpu and wish.per_node != "cpu" else "CPU"
    fits = sorted((_fits(amounts, node) for node in nodes if node.get(counted)), reverse=True)
    fits = [number for number in fits if number]
    if not fits:
        each = ", ".join(f"{name}: {amount:g}" for name, amount in sorted(amounts.items()) if amount)
        raise ConfigError(f"--nproc-per-node={wish.per_node}: no node of the cluster has {{{each}}} for one worker")
    # Every node gets as many: the most that the smallest number of nodes can all hold.
    return Size(fits[min(wish.min_nodes, len(fits)) - 1], use_gpu, note)


def _fits(amounts: Mapping[str, float], node: Mapping[str, float]) -> int:
    """How many workers fit on a node."""
    return int(min(node.get(name, 0.0) // amount for name, amount in amounts.items() if amount))
