"""`raylaunch run --nnodes=MIN:MAX` on several nodes: who leaves and who arrives re-forms the group."""

from __future__ import annotations

import json

import pytest

ELASTIC = """
size, generation = os.environ["WORLD_SIZE"], os.environ["RAYLAUNCH_GENERATION"]
say(f"{generation}-{RANK}-of-{size}", os.environ["GROUP_WORLD_SIZE"])
wait_for("enough")
"""


@pytest.mark.slow
def test_nodes_that_leave_and_arrive_re_form_the_group(two_nodes, command):
    run = command("LOGS --nnodes=1:2 --nproc-per-node=2 --max-restarts=3 train.py", ELASTIC)
    assert json.loads(run.wait_for("1-3-of-4")) == "2"
    two_nodes.kill_node(two_nodes.nodes[1])
    assert json.loads(run.wait_for("2-1-of-2")) == "1"
    two_nodes.add_node()
    assert json.loads(run.wait_for("3-3-of-4")) == "2"
    (run.out / "enough").touch()
    assert run.exit_code() == 0, run.stderr
