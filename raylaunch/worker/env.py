"""A worker's environment: what it takes from the driver, and everything that torchrun would have set.

`check_env` and `copied_env` are called on the driver; `spare_env` by a worker before it imports torch, `rank_env` when
it becomes a rank (and for the child process that runs a command). Together they give torchrun's whole environment.
Nothing here changes os.environ.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from raylaunch.errors import ConfigError

if TYPE_CHECKING:  # `import raylaunch` stays light
    from raylaunch.coordinator.commands import Assignment

#: What of the driver's environment reaches functions, unless `copy_env=` says otherwise: the knobs of the libraries
#: that training uses, because people set them in front of the command and expect every rank to see them. Not PATH,
#: LD_LIBRARY_PATH or PYTHONPATH, which describe the driver's machine (that is `runtime_env`'s business), not
#: PYTHONHASHSEED, which a running interpreter ignores, and no credentials but those of the experiment trackers.
DEFAULT_COPY_ENV: tuple[str, ...] = (
    # communication
    *("NCCL_*", "RCCL_*", "GLOO_*", "UCX_*", "FI_*"),
    # torch and what compiles for it
    *(
        "TORCH*",
        "PYTORCH_*",
        "TRITON_*",
        "XLA_*",
        "CUDA_*",
        "CUBLAS_*",
        "CUDNN_*",
        "HIP_*",
        "HSA_*",
        "MIOPEN_*",
        "NVTE_*",
    ),
    # threads
    *("OMP_*", "KMP_*", "GOMP_*", "MKL_*", "OPENBLAS_*", "NUMEXPR_*"),
    # frameworks and data
    *("ACCELERATE_*", "FSDP_*", "DEEPSPEED_*", "DS_*", "PL_*", "HF_*", "HUGGINGFACE_*", "TRANSFORMERS_*", "DATASETS_*"),
    *("DIFFUSERS_*", "TOKENIZERS_*", "XFORMERS_*"),
    # experiment trackers, logs, progress bars
    *("WANDB_*", "MLFLOW_*", "COMET_*", "NEPTUNE_*", "CLEARML_*", "LOGLEVEL", "TQDM_*"),
)

#: Set on the nodes of clusters whose GPUs are a number that Ray believes (`raylaunch.testing`): CUDA is left alone.
FAKE_GPUS = "RAYLAUNCH_FAKE_GPUS"
#: Set for each rank by `rank_env`, so `env=` can't.
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_*", "ROLE_*", "NODE_RANK", "MASTER_*")
_RUN_VARIABLES = ("TORCHELASTIC_*", "RAYLAUNCH_*")
#: Which GPUs a rank sees follows from what Ray reserved for it.
_DEVICE_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES")
#: Never copied, whatever the patterns say. Another launcher's variables would make a framework believe that it runs
#: under that launcher (Lightning looks for SLURM_NTASKS first), and Ray's belong to the driver's own process.
_NEVER_COPIED = (
    *_RANK_VARIABLES,
    *_RUN_VARIABLES,
    *_DEVICE_VARIABLES,
    *("SLURM_*", "SLURMD_*", "PMI*", "PMIX_*", "OMPI_*", "MPI_LOCAL*", "MV2_COMM_WORLD_*", "PALS_*", "RAY_*"),
    "HOSTNAME",  # the driver's; every node has its own
)

#: Linux: the IPv4 address of an interface.
_SIOCGIFADDR = 0x8915


def copied_env(environ: Mapping[str, str], patterns: Sequence[str]) -> dict[str, str]:
    """The variables of the driver's environment whose names match one of the (case-sensitive, shell-like) patterns."""
    if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(f"copy_env={patterns!r}: must be a sequence of patterns, as ('WANDB_*', 'MY_FLAG')")
    return {
        name: value
        for name, value in environ.items()
        if _matches(name, patterns) and not _matches(name, _NEVER_COPIED) and not _is_rays_debugger(name, value)
    }


def check_env(name: str, mapping: Any) -> None:
    """Refuse an `env=` that can't work. `name` is what the argument is called."""
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{name}={mapping!r}: must map variables' names to values, as {{'MY_FLAG': '1'}}")
    for key, value in mapping.items():
        shown = f"{name}[{key!r}]={value!r}"
        if not isinstance(key, str) or not isinstance(value, str):
            raise ConfigError(f"{shown}: names and values of environment variables must be strings")
        if not key or "=" in key or "\0" in key + value:
            raise ConfigError(f"{shown}: the operating system allows no empty name, no '=' in it, and no zero byte")
        try:
            os.fsencode(key + value)
        except UnicodeEncodeError:
            raise ConfigError(f"{shown}: can't be encoded for the operating system") from None
        if _matches(key, _DEVICE_VARIABLES):
            raise ConfigError(
                f"{shown}: the GPUs that a worker sees are those that Ray reserved for it; use use_gpu=True"
            )
        if _matches(key, (*_RANK_VARIABLES, *_RUN_VARIABLES)):
            raise ConfigError(f"{shown}: raylaunch sets this variable itself, anew for each rank of each generation")


def spare_env(
    *,
    run_id: str,
    copied: Mapping[str, str],
    env: Mapping[str, str],
    cpus_per_worker: float,
    use_gpu: bool,
    host: str,
) -> dict[str, str]:
    """What a worker sets before it imports torch. The user's `env` goes over what was copied from the driver.

    Where neither gives a variable that has a default here, a value that the node itself gives (the raylet's
    environment, runtime_env) stays.
    """
    defaults = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}
    if not use_gpu:
        # Without it accelerate takes CPU ranks for that many separate jobs.
        defaults["ACCELERATE_USE_CPU"] = "true"
    interface = interface_of(host)
    if interface is not None:
        # Left alone, gloo binds to whatever the host's name resolves to: often 127.0.1.1, which no other node reaches.
        defaults["GLOO_SOCKET_IFNAME"] = interface
    defaults = {name: value for name, value in defaults.items() if name not in os.environ}
    # Read when torch is imported. What the process has is Ray's own: 2.60 sets 1 in an actor that reserves nothing.
    defaults["OMP_NUM_THREADS"] = str(max(1, int(cpus_per_worker)))
    return {**defaults, **copied, **env, "RAYLAUNCH_RUN_ID": run_id}


def command_env(
    node: Mapping[str, str],
    *,
    run_id: str,
    copied: Mapping[str, str],
    env: Mapping[str, str],
    cpus_per_worker: float,
    use_gpu: bool,
    host: str,
) -> dict[str, str]:
    """The whole environment of a command, but for what makes it a rank; `node`: that of a Ray worker on its node.

    Over what the node gives, without what Ray, a batch system or another launcher has set there, comes what was copied
    from the driver (everything, for commands), and over that the user's `env`.
    """
    kept = ("HOSTNAME", FAKE_GPUS)
    given = {name: value for name, value in node.items() if name in kept or not _matches(name, _NEVER_COPIED)}
    given.pop("OMP_NUM_THREADS", None)  # Ray 2.60's own, which it sets for every worker
    if _is_rays_debugger("PYTHONBREAKPOINT", given.get("PYTHONBREAKPOINT", "")):
        del given["PYTHONBREAKPOINT"]
    whole = {
        **given,
        **spare_env(run_id=run_id, copied=copied, env=env, cpus_per_worker=cpus_per_worker, use_gpu=use_gpu, host=host),
    }
    # Ray puts what runtime_env ships into its workers' PYTHONPATH: that stays, whatever the driver's is.
    paths = [path for part in (node, whole) for path in part.get("PYTHONPATH", "").split(os.pathsep) if path]
    if paths:
        whole["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    return whole


def rank_env(
    assignment: Assignment,
    *,
    run_id: str,
    max_restarts: int,
    error_file: str,
    virtual_local_rank: bool,
    use_gpu: bool,
    role: str = "default",
    agent_store: bool = False,
) -> dict[str, str]:
    """What makes a process a rank: torchrun's variables (torch 2.13), and the generation.

    LOCAL_RANK always indexes CUDA_VISIBLE_DEVICES, whichever way `visible_devices` chose. `agent_store`: another
    process than rank 0's holds the store at the master endpoint.
    """
    local_rank, devices = visible_devices(assignment, virtual_local_rank=virtual_local_rank)
    rank, world_size = str(assignment.rank), str(assignment.world_size)
    return {
        "RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(assignment.local_world_size),
        "GROUP_RANK": str(assignment.node_rank),
        "GROUP_WORLD_SIZE": str(assignment.num_nodes),
        "NODE_RANK": str(assignment.node_rank),
        "ROLE_NAME": role,
        "ROLE_RANK": rank,
        "ROLE_WORLD_SIZE": world_size,
        "MASTER_ADDR": assignment.master_addr,
        "MASTER_PORT": str(assignment.master_port),
        "TORCHELASTIC_RESTART_COUNT": str(assignment.restart_count),
        "TORCHELASTIC_MAX_RESTARTS": str(max_restarts),
        "TORCHELASTIC_RUN_ID": run_id,
        # "True" makes every rank a client of any tcp:// endpoint, so not where rank 0 holds the store itself.
        "TORCHELASTIC_USE_AGENT_STORE": str(agent_store),
        "TORCHELASTIC_ERROR_FILE": error_file,
        # Empty on CPUs, so that nobody touches a GPU that the run did not reserve: Ray 2.60 leaves the variable alone
        # for an actor with 0 GPUs, which then sees all of the node's.
        "CUDA_VISIBLE_DEVICES": ",".join(devices) if use_gpu else "",
        "RAYLAUNCH_RUN_ID": run_id,
        "RAYLAUNCH_GENERATION": str(assignment.generation),
    }


def visible_devices(assignment: Assignment, *, virtual_local_rank: bool) -> tuple[int, tuple[str, ...]]:
    """A rank's LOCAL_RANK and the devices that it sees, which that LOCAL_RANK indexes.

    Usually all devices of the node's workers, as under torchrun. With `virtual_local_rank` only the rank's own, and 0.
    The same where workers share GPUs (a fraction each, with gloo): there are fewer devices than ranks then, and
    `cuda:LOCAL_RANK`, which every framework computes, would be somebody else's or none.
    """
    shared = 0 < len(assignment.devices) < assignment.local_world_size
    if virtual_local_rank or shared:
        return 0, tuple(assignment.devices[position] for position in assignment.own_devices)
    return assignment.local_rank, assignment.devices


def interface_of(address: str) -> str | None:
    """The network interface that owns this IPv4 address; None when none has it as its first address."""
    if address.startswith("127."):
        return "lo"  # the whole block is the loopback's, whatever address it was given
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def _is_rays_debugger(name: str, value: str) -> bool:
    """Whether Ray (2.60) has set this in a process that it runs in, where breakpoint() is to ask for its debugger."""
    return name == "PYTHONBREAKPOINT" and value.startswith("ray.")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
