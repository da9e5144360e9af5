"""What lies in examples/ for clusters loads, has only fields and options that exist, and starts scripts that exist.

The Python examples themselves are run by `make demo`, `make examples` and tests/stories/test_jobs.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml  # Ray brings it

from raylaunch.spec import make_spec

EXAMPLES = Path(__file__).parent.parent / "examples"

#: KubeRay's API reference, ray.io/v1 (https://ray-project.github.io/kuberay/reference/api/): the fields of each type
#: that an example could use. The API server drops a field that it doesn't know without a word.
RAY_JOB = (
    "activeDeadlineSeconds",
    "backoffLimit",
    "clusterSelector",
    "entrypoint",
    "entrypointNumCpus",
    "entrypointNumGpus",
    "entrypointResources",
    "jobId",
    "metadata",
    "rayClusterSpec",
    "runtimeEnvYAML",
    "shutdownAfterJobFinishes",
    "submissionMode",
    "submitterConfig",
    "submitterPodTemplate",
    "suspend",
    "ttlSecondsAfterFinished",
)
RAY_CLUSTER = (
    "authOptions",
    "autoscalerOptions",
    "enableInTreeAutoscaling",
    "gcsFaultToleranceOptions",
    "headGroupSpec",
    "rayVersion",
    "suspend",
    "workerGroupSpecs",
)
HEAD_GROUP = ("enableIngress", "headService", "rayStartParams", "serviceType", "template")
WORKER_GROUP = (
    "groupName",
    "idleTimeoutSeconds",
    "maxReplicas",
    "minReplicas",
    "numOfHosts",
    "rayStartParams",
    "replicas",
    "scaleStrategy",
    "template",
)


@pytest.fixture(scope="module")
def ray_job() -> Any:
    return yaml.safe_load((EXAMPLES / "rayjob.yaml").read_text(encoding="utf-8"))


def test_the_ray_job_has_only_fields_that_kuberay_knows(ray_job: Any) -> None:
    assert (ray_job["apiVersion"], ray_job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = ray_job["spec"]["rayClusterSpec"]
    assert set(ray_job["spec"]) <= set(RAY_JOB)
    assert set(cluster) <= set(RAY_CLUSTER)
    assert cluster["authOptions"] == {"mode": "token"}
    assert set(cluster["headGroupSpec"]) <= set(HEAD_GROUP)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert set(group) <= set(WORKER_GROUP if "groupName" in group else HEAD_GROUP)
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        assert set(pod) == {"containers", "volumes"}
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert set(container) == {"name", "image", "resources", "volumeMounts"}
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_the_ray_job_and_its_pages_say_the_ray_version_of_the_tests(ray_job: Any) -> None:
    pinned = re.search(r"^ray==(.*)$", (EXAMPLES.parent / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert pinned is not None
    assert ray_job["spec"]["rayClusterSpec"]["rayVersion"] == pinned[1]
    page = (EXAMPLES.parent / "docs" / "clusters.md").read_text(encoding="utf-8")
    assert f"FROM rayproject/ray:{pinned[1]}-" in page


def test_the_ray_job_starts_an_example_and_gives_it_a_runtime_env_that_ray_takes(
    ray_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.runtime_env import RuntimeEnv

    spec = ray_job["spec"]
    RuntimeEnv(**yaml.safe_load(spec["runtimeEnvYAML"]))
    check_entrypoint(shlex.split(spec["entrypoint"].replace("/app/", "examples/")), monkeypatch)


#: Stands in for Slurm: three nodes, and a step that only notes its command.
SCONTROL = "#!/bin/sh\nprintf 'n1\\nn2\\nn3\\n'\n"
SRUN = """#!/bin/sh
case "$*" in
    *--nodelist=n1*hostname*) echo "10.0.0.1 fe80::1" ;;
    *) printf '%s\\n' "$@" >"$NOTES" ;;
esac
"""


def test_the_slurm_script_is_bash_and_starts_an_example_on_every_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = EXAMPLES / "slurm.sh"
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(script)], check=True)
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    allocation = {
        "SLURM_JOB_NODELIST": "n[1-3]",
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_CPUS_PER_TASK": "8",
        "SLURM_SUBMIT_DIR": "/shared/my project",
    }
    notes = tmp_path / "notes"
    environment = {**os.environ, **allocation, "PATH": f"{tmp_path}:{os.environ['PATH']}", "NOTES": str(notes)}
    subprocess.run(["bash", str(script)], check=True, env=environment)
    words = notes.read_text().splitlines()
    step, start = words[: words.index("ray")], words[words.index("symmetric-run") + 1 : words.index("--")]
    assert step == ["--no-kill", "--nodes=3", "--ntasks=3"]
    assert start == ["--address", "10.0.0.1:6379", "--min-nodes", "3", "--num-cpus=8", "--num-gpus=0"]
    check_symmetric_run(start)
    chosen = check_entrypoint(words[words.index("--") + 1 :], monkeypatch)
    assert chosen.workers == (2, 3)
    assert chosen.checkpoints == "/shared/my project/checkpoints"


def check_symmetric_run(options: list[str]) -> None:
    """Ray's own parser, in its own process, because it reads sys.argv. It starts nothing."""
    code = """
import sys
from ray.scripts.scripts import start
from ray.scripts.symmetric_run import curate_and_validate_ray_start_args
start.make_context("start", ["--head", "--port=1", *curate_and_validate_ray_start_args(sys.argv[1:])])
"""
    subprocess.run([sys.executable, "-c", code, *options], check=True)


def check_entrypoint(words: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """The command's script is there, and takes its options."""
    assert words[0] == "python"
    script = next(word for word in words if word.endswith(".py"))
    assert set(words[1 : words.index(script)]) <= {"-u"}
    monkeypatch.syspath_prepend(EXAMPLES)
    spec = importlib.util.spec_from_file_location("example", EXAMPLES.parent / script)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    chosen: argparse.Namespace = example.parse(words[words.index(script) + 1 :])
    make_spec(num_workers=chosen.workers, workers_per_node=chosen.per_node)
    return chosen
