"""Chosen GPUs: makes Ray give a run's bundles the indices that its user wants, on every node, or says why it can't.

Ray (2.60) gives a bundle the lowest free indices of its node, and takes no wish. So all free GPUs of a node are
reserved one by one, those that are wanted are given back, and the others are held until a bundle of the run has taken
what is free there. In between somebody else may take one: then a rank finds others than it wants, and says so.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from raylaunch.cluster import placement
from raylaunch.errors import ConfigError, short_id
from raylaunch.spec import RunSpec

#: How long Ray may take to reserve the nodes' free GPUs and to say which they are, in seconds.
CLAIM_SECONDS = 30.0
#: How long GPUs that are somebody's may take to get free, in seconds, and how long to wait before each further try.
SETTLE_SECONDS = 3.0
AGAIN_SECONDS = 0.5
#: How often it is looked on which nodes the run's bundles are, in seconds: Ray pushes that to their owner only.
LOOK_SECONDS = 0.25
#: How long the thread that looks may take to end, in seconds.
END_SECONDS = 10.0


@dataclass(frozen=True)
class Claim:
    """One node's free GPUs, each in a group of its own, by index."""

    node: str
    groups: dict[int, PlacementGroup]

    def release(self) -> None:
        """Give all of them back."""
        _release(list(self.groups.values()))
        self.groups.clear()


@contextmanager
def chosen_gpus(spec: RunSpec, indices: tuple[int, ...]) -> Iterator[RunSpec]:
    """The spec, for nodes on which the wanted GPUs are free and will be the run's, for the block.

    Nodes that come later are not used: nobody reserves on them.

    Raises:
        ConfigError: Ray has given them to somebody else on too many nodes.
    """
    if placement.NODE_LABEL in (spec.label_selector or {}):
        raise ConfigError(
            f"label_selector={spec.label_selector!r}: with chosen GPUs, the nodes are chosen by what is free there"
        )
    claims, fitting = _claim_fitting(spec, indices)
    over = threading.Event()
    releaser = threading.Thread(
        target=_release_when_placed, args=(claims, spec.run_id, over), name="raylaunch-gpus", daemon=True
    )
    try:
        if len(fitting) < spec.bounds.min_units:
            raise ConfigError(_refusal(spec, indices, claims))
        chosen = fitting[: spec.bounds.max_units]
        for claim in claims:
            if claim in chosen:
                _release([claim.groups.pop(index) for index in indices])
            else:
                claim.release()
        labels = {**(spec.label_selector or {}), placement.NODE_LABEL: f"in({','.join(one.node for one in chosen)})"}
        releaser.start()
        bounds = replace(spec.bounds, max_workers=len(chosen) * spec.bounds.unit)
        yield replace(spec, label_selector=labels, bounds=bounds)
    finally:
        over.set()
        if releaser.ident is not None:
            releaser.join(END_SECONDS)
        for claim in claims:
            claim.release()


def _claim_fitting(spec: RunSpec, indices: tuple[int, ...]) -> tuple[list[Claim], list[Claim]]:
    """Reserve, and say which of the nodes have all that is wanted.

    Ray's view of what is free comes late (2.60: some tenths of a second): what has just ended may still be in it.
    """
    until = time.monotonic() + SETTLE_SECONDS
    able = sum(node.get("GPU", 0) > max(indices) for node in placement.total_resources().values())
    wanted = max(spec.bounds.min_units, min(spec.bounds.max_units, able))
    while True:
        claims = _claim_all(spec, max(indices))
        fitting = [claim for claim in claims if set(indices) <= claim.groups.keys()]
        if len(fitting) >= wanted or time.monotonic() > until:
            return claims, fitting
        for claim in claims:
            claim.release()
        time.sleep(AGAIN_SECONDS)


def _claim_all(spec: RunSpec, highest: int) -> list[Claim]:
    """Reserve every free GPU of the nodes that could serve."""
    available = placement.free_resources()
    wanted: list[tuple[str, PlacementGroup]] = []
    found: dict[str, dict[int, PlacementGroup]] = {}
    try:
        for node, resources in placement.total_resources().items():
            if resources.get("GPU", 0) > highest:
                labels = {**(spec.label_selector or {}), placement.NODE_LABEL: node}
                for number in range(int(available.get(node, {}).get("GPU", 0))):
                    name = f"raylaunch:{spec.run_id}:gpu:{node}:{number}"
                    wanted.append((node, placement_group([{"GPU": 1}], name=name, bundle_label_selector=[labels])))
        if not wanted:
            return []
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
        missing = [index for index in indices if index not in free.get(node, [])]
        if missing and resources.get("GPU", 0) > max(indices):
            which, there = ", ".join(map(str, missing)), ", ".join(map(str, free.get(node, []))) or "none"
            lines.append(f"node {short_id(node)}: Ray has given GPU {which} to somebody else; free: {there}")
    nodes = spec.bounds.min_units
    wish = f"devices='cuda:{','.join(map(str, indices))}': not free on {nodes} node{'s' * (nodes != 1)}. "
    return wish + "; ".join(lines[:10])


def _release_when_placed(claims: list[Claim], run_id: str, over: threading.Event) -> None:
    """Give back what is held on a node as soon as a bundle of the run is there."""
    while any(claim.groups for claim in claims) and not over.wait(LOOK_SECONDS):
        try:
            nodes = placement.nodes_of_run(run_id)
        except Exception:  # noqa: S112 - Ray's control store is away, or the session ends: the block's end releases all
            continue
        for claim in claims:
            if claim.node in nodes:
                claim.release()


def _release(groups: list[PlacementGroup]) -> None:
    for group in groups:
        if ray.is_initialized():  # or Ray 2.60 would start a new session for the call
            remove_placement_group(group)
