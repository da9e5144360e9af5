"""Placement groups and nodes: asking Ray for room, seeing what it has, saying why it has none. Facts are of Ray 2.60.

Ray pushes when a group is placed (`ready()` is an awaitable that runs no task in 2.60) or removed. It has no push for
nodes that die or drain and for other jobs' groups: `Survey` looks at those once a second.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raylaunch.cluster.coordinator_actor import group_name
from raylaunch.coordinator.commands import RequestBundles
from raylaunch.errors import short_id
from raylaunch.spec import RunSpec

NODE_LABEL = "ray.io/node-id"


def create_group(spec: RunSpec, command: RequestBundles) -> PlacementGroup:
    """Ask Ray for a group; it may be pending for long."""
    labels = dict(spec.label_selector or {})
    condition = node_condition(labels.get(NODE_LABEL), command.only_nodes, command.avoid_nodes)
    if condition is not None:
        labels[NODE_LABEL] = condition
    return placement_group(
        [spec.bundle_resources] * command.bundles,
        strategy=spec.placement_strategy if command.minimum else "PACK",
        name=group_name(spec.run_id, command.group, minimum=command.minimum),
        bundle_label_selector=[labels] * command.bundles if labels else None,
    )


def node_condition(own: str | None, only: Sequence[str], avoid: Sequence[str]) -> str | None:
    """On which nodes a group may be: `own` is what the user's label selector says of them; None: anywhere.

    Ray takes one condition per label: one that is no list, `in(...)`, stays the user's alone.
    """
    if own is not None:
        listed = re.fullmatch(r"in\(([^()]*)\)", own)
        nodes = listed[1].split(",") if listed is not None else []
        left = [node for node in nodes if (node in only if only else node not in avoid)]
        return f"in({','.join(left)})" if left else own
    if only:
        return f"in({','.join(only)})"
    return f"!in({','.join(avoid)})" if avoid else None


def nodes_of(group: PlacementGroup) -> tuple[str, ...]:
    """The node id of each bundle of a placed group."""
    nodes = placement_group_table(group)["bundles_to_node_id"]
    return tuple(nodes[index] for index in sorted(nodes))


def only_node() -> str | None:
    """The node, where the cluster has one only."""
    alive = [node["NodeID"] for node in _ask(ray.nodes) if node["Alive"]]
    return alive[0] if len(alive) == 1 else None


def in_bundle(group: PlacementGroup, bundle: int) -> PlacementGroupSchedulingStrategy:
    """The scheduling strategy of everything in a bundle."""
    return PlacementGroupSchedulingStrategy(group, bundle)


def nodes_of_run(run_id: str) -> set[str]:
    """The nodes on which bundles of a run are."""
    names = tuple(group_name(run_id, 0, minimum=minimum)[:-1] for minimum in (True, False))
    groups = [info for info in _ask(placement_group_table).values() if info["name"].startswith(names)]
    return {node for info in groups for node in info["bundles_to_node_id"].values() if node}


def probe_devices(group: PlacementGroup, bundle: int, gpus: float) -> Any:
    """A reference to (node id, GPU indices) of a bundle: a short task there holds its GPUs and says which they are.

    The indices stay with the bundle as long as it stays on its node.
    """
    task = ray.remote(_my_devices)
    return task.options(num_cpus=0, num_gpus=gpus, scheduling_strategy=in_bundle(group, bundle), max_retries=3).remote()


def _my_devices() -> tuple[str, tuple[str, ...]]:
    context = ray.get_runtime_context()
    return context.get_node_id(), tuple(str(index) for index in context.get_accelerator_ids().get("GPU", ()))


@dataclass(frozen=True)
class Survey:
    """What Ray pushes to nobody."""

    dead: frozenset[str]
    draining: frozenset[str]
    #: Another job's group, or another run's minimum, waits for resources.
    others_waiting: bool
    nodes: int


def survey(run_id: str) -> Survey:
    """Look. Blocks for some milliseconds, or while Ray's control store is away: three questions to it."""
    nodes = _ask(ray.nodes)
    own = f"raylaunch:{run_id}:"
    waiting = any(
        info["state"] in ("PENDING", "RESCHEDULING") and not info["name"].startswith(own) and not _growth(info["name"])
        for info in _ask(placement_group_table).values()
    )
    return Survey(
        dead=frozenset(node["NodeID"] for node in nodes if not node["Alive"]),
        draining=frozenset(_ask(_state().get_draining_nodes)),
        others_waiting=waiting,
        nodes=sum(node["Alive"] for node in nodes),
    )


def _growth(name: str) -> bool:
    """Other runs' growth doesn't hold ours back, or two runs that could both grow would wait for each other."""
    return name.startswith("raylaunch:") and ":growth:" in name


def shortage(spec: RunSpec, groups: list[PlacementGroup]) -> str:
    """What the run wants, what each node has, and Ray's own reason: for people, over several lines."""
    wanted = spec.bundle_resources
    available = free_resources()
    lines = [f"wanted: {spec.bounds.min_units} x {_amounts(wanted)}, strategy {spec.placement_strategy}"]
    if spec.label_selector:
        lines[0] += f", labels {spec.label_selector}"
    for node in sorted((node for node in _ask(ray.nodes) if node["Alive"]), key=lambda node: str(node["NodeID"])):
        free, total = available.get(node["NodeID"], {}), node["Resources"]
        parts = [f"{name} {free.get(name, 0):g} of {total.get(name, 0):g}" for name in wanted]
        note = "" if node["NodeID"] in available else " (draining)"
        lines.append(
            f"node {short_id(node['NodeID'])} ({node['NodeManagerAddress']}) has free: {', '.join(parts)}{note}"
        )
    for group in groups:
        info = _ask(placement_group_table, group)
        if info and info["state"] not in ("CREATED", "REMOVED"):
            lines.append(f"Ray: group {info['name']} is {info['state']} ({info['stats']['scheduling_state']})")
    return "\n".join(lines[:20])


def free_resources() -> dict[str, dict[str, float]]:
    """What each node has free, by node id and Ray's names. Leaves out draining nodes, which ray.nodes() doesn't."""
    free: dict[str, dict[str, float]] = _ask(_state().available_resources_per_node)
    return free


def total_resources() -> dict[str, dict[str, float]]:
    """What each node that lives has in all, by node id and Ray's names."""
    return {node["NodeID"]: node["Resources"] for node in _ask(ray.nodes) if node["Alive"]}


def _ask(question: Callable[..., Any], *arguments: Any) -> Any:
    """An answer of Ray's. The run, and the session, may end while a thread waits for the one before.

    Without a session Ray 2.60 would start a new one for the call, or take another cluster on the machine.
    """
    if not ray.is_initialized():
        raise ConnectionError("the connection to Ray is closed")
    return question(*arguments)


def _amounts(resources: dict[str, float]) -> str:
    return "{" + ", ".join(f"{name}: {amount:g}" for name, amount in sorted(resources.items())) + "}"


def _state() -> Any:
    """Ray's global state. Private: 2.60 has no public way to see draining nodes or free resources by node."""
    from ray._private.state import state

    return state
