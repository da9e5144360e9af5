"""What the tests of the worker share: real ranks over loopback, and small Python programs in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def play() -> Iterator[Callable[[str], list[Any]]]:
    """Plays a scenario of gang.py with real ranks; what each of them returned, None for one that was killed."""
    # torch reads TORCH_CPP_LOG_LEVEL when it is loaded.
    environment = {**os.environ, "TORCH_CPP_LOG_LEVEL": "FATAL", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("gang.py")
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as gang:
        assert gang.stdin is not None
        assert gang.stdout is not None

        def scenario(name: str) -> list[Any]:
            gang.stdin.write(name + "\n")
            gang.stdin.flush()
            results = json.loads(gang.stdout.readline())
            for result in results:
                assert result is None or "broken" not in result, result["broken"]
            return results

        yield scenario
        gang.stdin.close()


@pytest.fixture
def python() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a Python program with pipes to its stdin and stdout; ends it with the test."""
    started: list[subprocess.Popen[str]] = []

    def start(program: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
