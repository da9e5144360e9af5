"""The fixtures of stories that start command lines, and that launch in the background."""

from __future__ import annotations

import pytest
from command_lines import PRELUDE, CommandLine
from harness import eventually, nothing_is_left
from launches import Launch


@pytest.fixture
def command(request, tmp_path):
    """Start command lines with this script, on the module's cluster; afterwards nothing of them may be left."""
    name = next((one for one in ("two_nodes", "gpu_node") if one in request.fixturenames), "one_node")
    cluster = request.getfixturevalue(name)
    lines: list[CommandLine] = []
    (tmp_path / "train.py").write_text(PRELUDE)

    def start(line: str, script: str = "", *, name: str = "train.py", **more) -> CommandLine:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(script if name.endswith(".sh") else PRELUDE + script)
        path.chmod(0o755)
        line = line.replace("LOGS", f"--log-dir {tmp_path / 'runs'} --spares 0").replace("HERE", str(tmp_path))
        line = line.replace("ADDRESS", cluster.address)
        lines.append(CommandLine(cluster, tmp_path, line.split(), **more))
        return lines[-1]

    yield start
    for line in lines:
        line.end()
    nothing_is_left(tmp_path / "runs")


@pytest.fixture
def launch(request, tmp_path):
    """Launch in the background on the module's cluster."""
    name = next(name for name in ("two_nodes", "one_node", "gpu_node") if name in request.fixturenames)
    cluster = request.getfixturevalue(name)
    runs = []

    def start(function, launcher, *args):
        runs.append(Launch(cluster, function, launcher, tmp_path, *args))
        return runs[-1]

    yield start
    for run in runs:
        run.launcher.events.stop_all_tasks.set()  # a test that failed has not done so
        eventually(run.done, f"{run.id} is over")
    nothing_is_left(tmp_path / "runs")
