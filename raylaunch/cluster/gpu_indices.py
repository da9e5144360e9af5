"""Chosen GPUs: makes Ray give a run's bundles the indices that its user wants, on every node, or says why it can't.

Ray (2.60) gives a bundle the lowest free indices of its node, and takes no wish. So all free GPUs of a node are
reserved one by one, those that are wanted are given back, and the others are held until the run's group has taken what
is free.
In between somebody else may take one: then a rank finds others than it wants, and says so.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from raylaunch.cluster import placement
from raylaunch.errors import ConfigError, short_id
from raylaunch.spec import RunSpec

logger = logging.getLogger("raylaunch")

#: How long Ray may take to reserve a node's free GPUs and to say which they are, in seconds.
CLAIM_SECONDS = 30.0
#: How long those that are not wanted are held while the run's group is on its way, in seconds.
HOLD_SECONDS = 60.0
LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class Claim:
    """One node's free GPUs, each in a group of its own, by index."""

    node: str
    groups: dict[int, PlacementGroup]


@contextmanager
def chosen_gpus(spec: RunSpec, indices: tuple[int, ...], placed: Callable[[], bool]) -> Iterator[RunSpec]:
    """The spec, for nodes on which the wanted GPUs are free and will be the run's, for the block.

    Nodes that come later are not used: nobody reserves on them. `placed`: whether the run's group is there.

    Raises:
        ConfigError: Ray has given them to somebody else on too many nodes.
    """
    claims: list[Claim] = []
    over = threading.Event()
    try:
        claims += _claim_all(spec, max(indices))
        fitting = [claim for claim in claims if set(indices) <= claim.groups.keys()]
        if len(fitting) < spec.bounds.min_units:
            raise ConfigError(_refusal(spec, indices, claims))
        chosen = fitting[: spec.bounds.max_units]
        for claim in [one for one in claims if one not in chosen]:
            _release(list(claim.groups.values()))
        for claim in chosen:
            _release([claim.groups.pop(index) for index in indices])
        claims[:] = chosen
        held = [group for claim in chosen for group in claim.groups.values()]
        releaser = threading.Thread(target=_release_when, args=(held, placed, over), name="raylaunch-gpus", daemon=True)
        releaser.start()
        claims.clear()  # they are the thread's
        labels = {**(spec.label_selector or {}), placement.NODE_LABEL: f"in({','.join(one.node for one in chosen)})"}
        try:
            yield replace(spec, label_selector=labels)
        finally:
            over.set()
            releaser.join(CLAIM_SECONDS)
    finally:
        _release([group for claim in claims for group in claim.groups.values()])


def _claim_all(spec: RunSpec, highest: int) -> list[Claim]:
    """Reserve every free GPU of the nodes that could serve."""
    available = placement.free_resources()
    wanted: list[tuple[str, PlacementGroup]] = []
    for node, resources in placement.total_resources().items():
        if resources.get("GPU", 0) > highest:
            labels = {**(spec.label_selector or {}), placement.NODE_LABEL: node}
            for number in range(int(available.get(node, {}).get("GPU", 0))):
                name = f"raylaunch:{spec.run_id}:gpu:{node}:{number}"
                wanted.append((node, placement_group([{"GPU": 1}], name=name, bundle_label_selector=[labels])))
    found: dict[str, dict[int, PlacementGroup]] = {}
    try:
        probes = {placement.probe_devices(group, 0, 1): (node, group) for node, group in wanted}
        ready, _ = ray.wait(list(probes), num_returns=len(probes), timeout=CLAIM_SECONDS)
        for reference in ready:
            node, group = probes[reference]
            _, devices = ray.get(reference)
            if len(devices) == 1 and devices[0].isdigit():
                found.setdefault(node, {})[int(devices[0])] = group
    except BaseException:
        _release([group for _, group in wanted])
        raise
    kept = {id(group) for groups in found.values() for group in groups.values()}
    _release([group for _, group in wanted if id(group) not in kept])
    return [Claim(node, groups) for node, groups in found.items()]


def _refusal(spec: RunSpec, indices: tuple[int, ...], claims: list[Claim]) -> str:
    free = {claim.node: sorted(claim.groups) for claim in claims}
    lines = []
    for node, resources in placement.total_resources().items():
        if not resources.get("GPU"):
            continue
        missing = [index for index in indices if index not in free.get(node, [])]
        there = ", ".join(map(str, free.get(node, []))) or "none"
        if missing:
            which = ", ".join(map(str, missing))
            lines.append(f"node {short_id(node)}: Ray has given GPU {which} to somebody else; free: {there}")
    wish = ",".join(map(str, indices))
    return f"devices='cuda:{wish}': not free on {spec.bounds.min_units} node(s). " + "; ".join(lines)


def _release_when(groups: list[PlacementGroup], placed: Callable[[], bool], over: threading.Event) -> None:
    until = time.monotonic() + HOLD_SECONDS
    while not placed() and time.monotonic() < until and not over.wait(LOOK_SECONDS):
        pass
    _release(groups)


def _release(groups: list[PlacementGroup]) -> None:
    for group in groups:
        if ray.is_initialized():  # or Ray 2.60 would start a new session for the call
            remove_placement_group(group)
