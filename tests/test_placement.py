"""On which nodes a group may be: what the user said of them, together with what the coordinator says."""

from __future__ import annotations

import pytest

from raylaunch.cluster.placement import node_condition


@pytest.mark.parametrize(
    ("own", "only", "avoid", "condition"),
    [
        (None, (), (), None),
        (None, ("a", "b"), (), "in(a,b)"),
        (None, (), ("a",), "!in(a)"),
        (None, ("a",), ("b",), "in(a)"),
        ("in(a,b,c)", (), (), "in(a,b,c)"),
        ("in(a,b,c)", (), ("a",), "in(b,c)"),
        ("in(a,b,c)", ("b", "d"), (), "in(b)"),
        ("in(a)", (), ("a",), "in(a)"),  # nothing else is left: the user's own
        ("a", (), ("b",), "a"),
        ("!in(a)", (), ("b",), "!in(a)"),
    ],
)
def test_the_nodes_of_a_group(own, only, avoid, condition):
    assert node_condition(own, only, avoid) == condition
