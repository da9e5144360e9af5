"""Options of `raylaunch run` whose effect only a cluster shows: which node, which files, which spares, whose logs."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from command_lines import SEES, said
from harness import eventually, journal_lines

# -- Ray's own options, and the launcher's signals ---------------------------------------------------------------------

#: Ends well when it is asked to.
ASKED = """
PRELOADED = "colorsys" in sys.modules
import shipped
signal.signal(signal.SIGTERM, lambda *_: (say("asked"), sys.exit(0)))
say("up", {"cwd": os.getcwd(), "flag": os.environ["FLAG"], "shipped": shipped.WHAT, "preloaded": PRELOADED})
wait_for("never")
"""


def test_rays_options_and_the_signals_have_their_effect(two_nodes, command, tmp_path):
    here = tmp_path / "project"
    here.mkdir()
    (here / "shipped.py").write_text("WHAT = 'by Ray'\n")
    env = tmp_path / "env.json"
    env.write_text(json.dumps({"working_dir": str(here), "env_vars": {"FLAG": "on"}}))
    node = two_nodes.nodes[1].node_id
    line = f"LOGS --rdzv-id=options --spares=2 --num-workers=2 --resources-per-worker=CPU=0.5 --runtime-env={env}"
    line += " --preload=torch,colorsys"
    line += f" --label-selector=ray.io/node-id={node} --signals-to-handle=SIGUSR1 job.py"
    run = command(line, ASKED, name="project/job.py")
    up = json.loads(run.wait_for("up"))
    assert (up["flag"], up["shipped"], up["preloaded"]) == ("on", "by Ray", True)
    assert Path(up["cwd"]).name.startswith("_ray_pkg_")  # a copy of it, where Ray has put it
    status = eventually(lambda: (now := two_nodes.status("options")).ready_spares == 2 and now, "two spares are ready")
    assert {one.node for one in status.members.values()} == {node}  # the other one has room, too
    run.signal(signal.SIGUSR1)
    assert run.exit_code() == 128 + signal.SIGUSR1, run.stderr
    assert (run.out / "asked").exists()  # by SIGTERM
    assert "SIGUSR1; the run is stopped" in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "nodes"), [("STRICT_PACK", "1"), ("STRICT_SPREAD", "2")])
def test_workers_are_placed_as_the_strategy_says(two_nodes, command, strategy, nodes):
    run = command(f"LOGS --num-workers=2 --placement-strategy={strategy} train.py", SEES)
    assert run.exit_code() == 0, run.stderr
    assert {said(run, f"sees-{rank}")["env"]["GROUP_WORLD_SIZE"] for rank in (0, 1)} == {nodes}


# -- logs --------------------------------------------------------------------------------------------------------------

#: Somebody's own LogsSpecs, as torch documents them.
MINE = """
from torch.distributed.elastic.multiprocessing import LogsSpecs, Std

class Mine(LogsSpecs):
    def __init__(self, log_dir=None, redirects=Std.NONE, tee=Std.NONE, local_ranks_filter=None):
        super().__init__(log_dir + "-mine", {0: Std.OUT}, {1: Std.OUT}, local_ranks_filter)

    def reify(self, envs):
        raise AssertionError("nobody calls it")

    @property
    def root_log_dir(self):
        return self._root_log_dir
"""


def test_a_logs_specs_of_an_installed_package_chooses_streams_and_folder(one_node, command, tmp_path):
    described = tmp_path / "site" / "mine-1.dist-info"
    described.mkdir(parents=True)
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
    (described / "entry_points.txt").write_text("[torchrun.logs_specs]\nmine = my_logs:Mine\n")
    (tmp_path / "site" / "my_logs.py").write_text(MINE)
    path = os.pathsep.join(filter(None, [str(tmp_path / "site"), os.environ.get("PYTHONPATH")]))
    line = "LOGS --nproc-per-node=2 --rdzv-id=specs --logs-specs=mine train.py"
    run = command(line, 'print("from", RANK)', PYTHONPATH=path)
    assert run.exit_code() == 0, run.stderr
    assert run.stdout == "[default1]:from 1\n"
    folder = tmp_path / "runs-mine" / "specs" / "generation_1"
    assert (folder / "0" / "stdout.log").read_text() == "from 0\n"
    assert run.stderr.count("--logs-specs=mine: its streams and its folder are taken, but its reify is not called") == 1


# -- a minimum that is there -------------------------------------------------------------------------------------------


def test_a_program_does_not_wait_for_a_node_that_nobody_has(one_node, command, tmp_path):
    """torchrun: 32 s, most of them its last call."""
    run = command("LOGS --nnodes=1:2 --rdzv-id=short --no-python true")
    assert run.exit_code() == 0, run.stderr
    lines = journal_lines(tmp_path / "runs" / "short" / "journal.jsonl")
    events = [line for line in lines if "event" in line]
    ready = next(line for line in events if line["event"] == "WorkerReady")
    after = [line["event"] for line in events if line["seq"] > ready["seq"]]
    assert after in (
        ["WorkerJoined", "WorkerReturned", "ResultCollected"],
        ["Tick", "WorkerJoined", "WorkerReturned", "ResultCollected"],  # the rest of the last call: one second
    )
    assert events[-1]["at"] - ready["at"] < 5.0
