"""The fixture of stories that start command lines."""

from __future__ import annotations

import pytest
from command_lines import PRELUDE, CommandLine
from harness import nothing_is_left


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
