"""Where a fake cluster puts things: nodes with slots, and placement groups that are placed as Ray places them.

A group is placed whole or waits. After a node loss its lost bundles come back together or not at all, before anything
new is placed. Other jobs' groups compete for the same slots.
"""

from __future__ import annotations

from collections.abc import Callable

from raylaunch.coordinator import events as e
from raylaunch.coordinator.commands import RequestBundles
from raylaunch.spec import RunSpec
from raylaunch.testing.fake_parts import FakeClock, FakeGroup, FakeNode, FakeWorker


class FakePlacement:
    """Nodes and placement groups. `begin` starts a worker whose bundle has come (back)."""

    def __init__(self, spec: RunSpec, clock: FakeClock, begin: Callable[[FakeWorker], None]) -> None:
        self.spec = spec
        self.clock = clock
        self.nodes: dict[str, FakeNode] = {}
        self.groups: dict[int, FakeGroup] = {}
        #: Other jobs that wait: slots wanted, and for how long.
        self.others: list[tuple[int, float]] = []
        #: When room last appeared or changed by something else than the run itself.
        self.changed_at = 0.0
        self.others_told = False
        self._looking = False
        self._begin = begin

    def add_node(self, slots: int) -> None:
        """A node joins."""
        name = f"node{len(self.nodes)}"
        self.nodes[name] = FakeNode(name, f"10.0.0.{len(self.nodes)}", list(range(slots)))
        self.change()

    def change(self) -> None:
        """The cluster has changed."""
        self.changed_at = self.clock.now
        self.look()

    def look(self) -> None:
        """Room may have appeared: let Ray's scheduler look."""
        if not self._looking:
            self._looking = True
            self.clock.after(self.clock.any(0.002, 0.03), self._place)

    def _place(self) -> None:
        self._looking = False
        for group in self.groups.values():
            if group.placed and None in group.nodes:  # lost bundles come first, and all of them or none
                self._fill(group)
        for group in self.groups.values():
            if not group.placed and self._fill(group):
                group.placed = True
                names = tuple(name for name in group.nodes if name)
                self.clock.post(self.clock.any(0.001, 0.01), e.BundlesPlaced, group.id, names)
        waiting = []
        for slots, seconds in self.others:
            free = [(node, slot) for node in self.nodes.values() if node.usable for slot in node.free]
            if len(free) < slots:
                waiting.append((slots, seconds))
                continue
            for node, slot in free[:slots]:
                node.free.remove(slot)
            self.clock.after(seconds, self._others_end, free[:slots])
        self.others = waiting
        if bool(waiting) != self.others_told:
            self.others_told = bool(waiting)
            self.clock.post(0.01, e.OthersWaiting, self.others_told)

    def _others_end(self, held: list[tuple[FakeNode, int]]) -> None:
        for node, slot in held:
            node.free.append(slot)
        self.change()

    def _fill(self, group: FakeGroup) -> bool:
        wanted = [index for index, name in enumerate(group.nodes) if name is None]
        spots = self._spots(group, len(wanted))
        if spots is None:
            return False
        for index, node in zip(wanted, spots, strict=True):
            node.free.sort()
            group.nodes[index] = node.name
            group.slots[index] = node.free[: self.spec.bounds.unit]
            del node.free[: self.spec.bounds.unit]
        queued, group.queued = group.queued, []
        for worker in queued:
            self._begin(worker)
        return True

    def _spots(self, group: FakeGroup, count: int, more: dict[str, int] | None = None) -> list[FakeNode] | None:
        """A node for each of `count` bundles, after the placement strategy; None when they don't all fit.

        `more`: bundles by node that are to be counted as free too.
        """
        unit, strategy = self.spec.bounds.unit, self.spec.placement_strategy
        own = {name for name in group.nodes if name}
        room = {n.name: len(n.free) // unit for n in self.nodes.values() if n.usable and group.allows(n.name)}
        for name, bundles in (more or {}).items():
            if name in room:
                room[name] += bundles
        if strategy == "STRICT_SPREAD":
            room = {name: 1 for name, space in room.items() if space and name not in own}
        if strategy == "STRICT_PACK":
            room = {name: space for name, space in room.items() if space >= count and (not own or name in own)}
        spots: list[FakeNode] = []
        for _ in range(count):
            left = [name for name, space in room.items() if space]
            if not left:
                return None
            spread = strategy == "SPREAD"
            name = min(left, key=lambda n: ([s.name for s in spots].count(n) if spread else -room[n], n))
            if strategy in ("PACK", "STRICT_PACK") and spots and room[spots[-1].name]:
                name = spots[-1].name
            room[name] -= 1
            spots.append(self.nodes[name])
        return spots

    def request(self, command: RequestBundles) -> None:
        """A placement group is asked for."""
        self.groups[command.group] = FakeGroup(command.group, command.bundles, command.avoid_nodes, command.only_nodes)
        self.look()

    def remove(self, number: int) -> None:
        """A placement group goes, and its room is free."""
        group = self.groups.pop(number, None)
        if group is not None:
            for name, slots in zip(group.nodes, group.slots, strict=True):
                if name:
                    self.nodes[name].free += slots
            self.look()

    def declare_dead(self, node: FakeNode) -> None:
        """Ray knows that a node is dead: its bundles wait for another place."""
        node.alive = False
        node.known_dead = True
        for group in self.groups.values():
            group.nodes = [None if name == node.name else name for name in group.nodes]
        self.change()

    def has_room(self, bundles: int) -> bool:
        """Whether a new group of this size would fit, were all that the run holds given back."""
        held = dict.fromkeys(self.nodes, 0)
        for group in self.groups.values():
            for name in group.nodes:
                if name:
                    held[name] += 1
        return self._spots(FakeGroup(0, bundles, (), ()), bundles, held) is not None

    def units(self) -> int:
        """How many bundles the run could use: those that it holds on good nodes, and those for which there is room."""
        held = [name for group in self.groups.values() for name in group.nodes if name and self.nodes[name].usable]
        strategy = self.spec.placement_strategy
        unit = self.spec.bounds.unit
        if strategy == "STRICT_SPREAD":
            return len(held) + sum(n.usable and len(n.free) >= unit and n.name not in held for n in self.nodes.values())
        nodes = [n for n in self.nodes.values() if n.usable and (strategy != "STRICT_PACK" or n.name in held)]
        return len(held) + sum(len(node.free) // unit for node in nodes)
