"""The fixture of the proofs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import nothing_is_left
from starting import NOBODY, AsFunction, AsScript


@pytest.fixture
def program(one_node: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Start programs, on the module's cluster; afterwards nothing of them may be left."""
    started = []

    def start(
        form: type[AsFunction | AsScript], name: str, *, victim: int = NOBODY, ranks: int = 2, **more: Any
    ) -> Any:
        env = {"PROOF_VICTIM": str(victim)}
        started.append(form(one_node, name, tmp_path, ranks, env, **more))
        return started[-1]

    yield start
    for one in started:
        one.end()
    nothing_is_left(tmp_path / "runs")
