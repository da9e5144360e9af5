"""`ray job submit` and `ray job stop`, on a cluster of `ray start --head`, with and without token authentication.

The cluster with tokens is the one of `make test`; the same stories without them are slow ones.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from harness import eventually, journal_lines
from jobs import Job, JobCluster

pytestmark = pytest.mark.timeout(300)  # the cluster counts with the first story

modes = [pytest.param(True, id="token"), pytest.param(False, id="no-token", marks=pytest.mark.slow)]


#: For stories in which tokens make no difference.
only_once = pytest.mark.parametrize("cluster", [True], indirect=True, ids=["token"])


@pytest.fixture(scope="module", params=modes)
def cluster(request):
    cluster = JobCluster(token=request.param)
    try:
        assert cluster.refuses_strangers() is request.param
        yield cluster
    finally:
        cluster.end()


def nothing_is_left(job: Job, until: float, *, port: int | None = None) -> None:
    while (left := job.leftovers(port=port)) and time.monotonic() < until:
        time.sleep(0.5)
    assert not left


#: A module of the job's working directory, which nothing but the working directory brings to the workers.
MODEL = """
import raylaunch

def train(say, wait_for):
    import columns
    rank = raylaunch.get_context().rank
    say(f"module-{rank}", columns.__file__)
    wait_for("module-0")
    if rank == 1:
        load(12)

def load(depth):
    if depth == 0:
        raise ValueError("no such column: price")
    parse(depth - 1)

def parse(depth):
    load(depth)
"""


def test_a_job_that_fails_ends_with_its_root_cause_and_the_working_directory_is_on_the_workers(cluster, tmp_path):
    script = "import model\nraylaunch.run(model.train, args=(say, wait_for), num_workers=2, spares=0, max_restarts=0)\n"
    job = Job(cluster, tmp_path, script, model=MODEL, columns="")
    submitted = job.submit_by_cli()
    until = time.monotonic() + 10
    assert submitted.returncode == 1, submitted
    info = job.info()
    assert info["status"] == "FAILED"
    assert info["driver_exit_code"] == 1
    for rank in (0, 1):  # Ray's copy, not the folder that was submitted
        assert (job.gates / f"module-{rank}").read_text().startswith(f"{cluster.folder}/ray/session_")

    (node,) = cluster.rows("nodes")
    cause = f"rank 1 (node {node['node_id'][:8]}, pid "
    what = "raised ValueError: no such column: price while running"
    log = job.log()
    # After it come the journal's path and, sometimes, Ray's own notices of the workers that were killed.
    assert any(cause in line and what in line for line in log.splitlines()[-10:]), log
    for shown in (info["message"], submitted.stdout):  # what `ray job status` says, and what the user looks at
        assert cause in shown, shown
        assert what in shown, shown
    assert len(info["message"].splitlines()) < 13 < len(log.splitlines())  # Ray keeps the last lines only

    (line,) = [line for line in log.splitlines() if line.startswith("journal: ")]
    journal = Path(line.removeprefix("journal: "))
    assert journal.is_relative_to(cluster.folder / "ray")  # by default among Ray's logs
    assert any(line.get("event") == "WorkerFailed" for line in journal_lines(journal))
    nothing_is_left(job, until)


#: Trains until it is stopped; has a child in a session of its own, as some loaders have. Rank 1 ignores SIGTERM.
TRAIN = """
def train():
    context = raylaunch.get_context()
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
    if context.rank == 1 and deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say(f"port-{context.rank}", context.master_port)
    try:
        wait_for("never")
    finally:
        time.sleep(saving)
        say(f"saved-{context.rank}")
"""

RUN = """
raylaunch.run(
    train, num_workers=2, spares=0, run_id=run_id, log_dir=log_dir, timeouts=raylaunch.Timeouts(stop=stop)
)
"""


def start_training(job: Job) -> int:
    """Submit, wait until both ranks train; returns the port of the group's store."""
    job.submit_by_sdk()
    port = int(job.wait_for("port-0"))
    job.wait_for("port-1")
    found = job.leftovers(port=port)
    # The check can fail: all that must be gone later is seen now.
    for what in ("main.py", "ray::WorkerActor", "ray::CoordinatorActor", "ray::NodeAgent", "sleep 1000"):
        assert any(what in one for one in found if one.startswith("process")), found
    assert f"port {port}" in found
    for what in ("actor CoordinatorActor ALIVE", "actor JobSupervisor ALIVE", "placement group raylaunch:"):
        assert any(one.startswith(what) for one in found), found
    return port


def stop(job: Job) -> float:
    """Ask for the job's end; returns until when nothing of it may be left."""
    from ray.job_submission import JobSubmissionClient

    until = time.monotonic() + 10
    assert JobSubmissionClient(job.cluster.http, headers=job.cluster.headers).stop_job(job.id)
    return until


@pytest.mark.slow
def test_job_stop_in_mid_run_leaves_nothing_though_a_rank_ignores_sigterm(cluster, tmp_path):
    job = Job(cluster, tmp_path, f"deaf, saving, stop = True, 0, 600\n{TRAIN}{RUN}")
    port = start_training(job)
    until = stop(job)
    nothing_is_left(job, until, port=port)
    assert job.ended()["status"] == "STOPPED"
    assert (job.gates / "saved-0").exists()
    assert "stopping: SystemExit in the driver" in job.log()


@pytest.mark.slow
@only_once
def test_job_stop_while_the_run_waits_for_room_leaves_nothing(cluster, tmp_path):
    run = "raylaunch.run(time.sleep, args=(0,), num_workers=9, spares=0, run_id=run_id, log_dir=log_dir)\n"
    job = Job(cluster, tmp_path, run)
    job.submit_by_sdk()
    eventually(lambda: "placement group" in str(job.leftovers()), "the run asks for room")
    nothing_is_left(job, stop(job))
    assert job.ended()["status"] == "STOPPED"


@pytest.mark.slow
@only_once
def test_job_stop_waits_for_ranks_that_save_as_long_as_the_job_says(cluster, tmp_path):
    job = Job(cluster, tmp_path, f"deaf, saving, stop = False, 5, 20\n{TRAIN}{RUN}")
    job.runtime_env["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] = "30"
    port = start_training(job)
    stopped = cluster.cli("stop", job.id)
    assert stopped.returncode == 0, stopped
    assert "was stopped" in stopped.stdout
    nothing_is_left(job, time.monotonic() + 10, port=port)
    assert (job.gates / "saved-0").exists()
    assert (job.gates / "saved-1").exists()


@pytest.mark.slow
def test_the_example_for_clusters_succeeds_as_a_job(cluster, tmp_path):
    job = Job(cluster, tmp_path, "")
    job.code = Path(__file__).parents[2] / "examples"
    checkpoints = tmp_path / "checkpoints"
    job.entrypoint[1:] = ["on_a_cluster.py", "--workers=1:2", "--steps=100", f"--checkpoints={checkpoints}"]
    job.submit_by_sdk()
    info = job.ended()
    until = time.monotonic() + 10
    assert info["status"] == "SUCCEEDED", job.log()
    assert info["driver_exit_code"] == 0
    assert "of the images recognised" in job.log().splitlines()[-1]
    assert "journal" in job.log()
    assert (checkpoints / "checkpoint.pt").exists()
    nothing_is_left(job, until)


@pytest.mark.slow
def test_the_loss_of_the_head_node_ends_the_run_on_the_other_nodes_too(tmp_path):
    seconds = 10  # Ray's nodes wait 60 for their head by default
    cluster = JobCluster(token=True, RAY_gcs_rpc_server_reconnect_timeout_s=str(seconds))
    try:
        cluster.add_node()
        run = """
raylaunch.run(
    train, num_workers=2, workers_per_node=1, spares=1, run_id=run_id, log_dir=log_dir,
    timeouts=raylaunch.Timeouts(lease=4),
)
"""
        job = Job(cluster, tmp_path, f"deaf, saving = True, 0\n{TRAIN}{run}")
        job.submit_by_sdk()
        job.wait_for("port-0")
        job.wait_for("port-1")
        cluster.kill_head()
        assert any("ray::WorkerActor" in one for one in job.processes())  # the other node's

        # The other node has lost everybody who could end its rank: it ends itself, by its lease.
        eventually(lambda: not any("ray::WorkerActor" in one for one in job.processes()), "the ranks are gone", 20)
        eventually(lambda: not job.processes(), "all of the run is gone", seconds + 20)
    finally:
        cluster.end()
