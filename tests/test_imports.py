"""Who may import whom, and that importing raylaunch stays light."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "raylaunch"
COORDINATOR = sorted((PACKAGE / "coordinator").glob("*.py"))

#: What could make a replayed coordinator decide otherwise: clocks, chance, surroundings, concurrency.
IMPURE = {
    *("asyncio", "concurrent", "multiprocessing", "queue", "sched", "select", "selectors", "signal", "threading"),
    *("datetime", "time", "random", "secrets", "uuid"),
    *("io", "logging", "os", "pathlib", "platform", "shutil", "socket", "subprocess", "tempfile"),
}


def test_contracts() -> None:
    """The contracts of pyproject.toml."""
    command = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "module",
    [
        "raylaunch",
        "raylaunch.cli",
        "raylaunch.launch",
        "raylaunch.elastic",
        "raylaunch.torchrun.run",
        "raylaunch.journal",
        "raylaunch.torchrun.backend",
        "raylaunch.coordinator.machine",
        "raylaunch.testing.background_run",
        "raylaunch.testing.simulation",
    ],
)
def test_importing_is_light(module: str) -> None:
    """Neither torch nor ray nor numpy comes with it."""
    program = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=os.sep).stdout
    assert not {"torch", "ray", "numpy"} & set(json.loads(out))


def imports(path: Path) -> set[str]:
    """Everything that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute here"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", COORDINATOR, ids=lambda path: path.name)
def test_coordinator_is_pure(path: Path) -> None:
    """The standard library without anything impure, and of raylaunch itself, errors and spec."""
    for name in imports(path):
        top = name.partition(".")[0]
        if top == "raylaunch":
            assert name.startswith(("raylaunch.coordinator", "raylaunch.errors.", "raylaunch.spec.")), name
        else:
            assert top in sys.stdlib_module_names, name
            assert top not in IMPURE, name


@pytest.mark.parametrize("path", COORDINATOR, ids=lambda path: path.name)
def test_coordinator_never_awaits(path: Path) -> None:
    """No coroutine, no generator that somebody else drives."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor))]
