"""The options of `raylaunch run`: every one of torchrun's (torch 2.13), and Ray's. Only the standard library.

torch's own parser would cost the import of torch, 1.5 s before anything starts, and its help would tell of a rendezvous
that isn't there. So the options stand here once more, each with what becomes of it; a test compares them with torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: The values of --numa-binding (torch 2.13's AffinityMode).
AFFINITY_MODES = ("node", "socket", "exclusive", "core-complex")


def comma_separated(text: str) -> list[str]:
    """The items of a list as torch writes it: `,,` is a comma in an item."""
    return [item.replace("\0", ",") for item in text.replace(",,", "\0").split(",")]


@dataclass(frozen=True)
class Option:
    """One option. Long names with hyphens exist with underscores too."""

    names: tuple[str, ...]
    help: str
    default: Any = None
    #: What turns its text into a value; None for a flag.
    parse: Callable[[str], Any] | None = str
    choices: tuple[str, ...] | None = None
    metavar: str | None = None
    #: Whether `PET_<NAME>` gives its default.
    in_environment: bool = True
    #: The value that a flag stands for.
    const: bool = True
    #: Where it is stored, if not under its own name.
    stored_as: str = ""

    @property
    def name(self) -> str:
        """Its long name: `--nproc-per-node`."""
        return next(name for name in self.names if name.startswith("--"))

    @property
    def dest(self) -> str:
        """Where argparse stores it: `nproc_per_node`."""
        return self.stored_as or self.name[2:].replace("-", "_")

    @property
    def variable(self) -> str:
        """The environment variable with its default: `PET_NPROC_PER_NODE`."""
        return f"PET_{self.dest.upper()}"

    @property
    def all_names(self) -> tuple[str, ...]:
        """With the aliases."""
        aliases = (f"--{name[2:].replace('-', '_')}" for name in self.names if "-" in name[2:])
        return (*self.names, *aliases)


def _flag(name: str, text: str, *short: str, in_environment: bool = True) -> Option:
    return Option((*short, name), text, False, None, in_environment=in_environment)


WORKERS = (
    Option(
        ("--nnodes",),
        "number of different Ray nodes, or MIN:MAX for an elastic run",
        "1:1",
        metavar="N|MIN:MAX",
    ),
    Option(
        ("--nproc-per-node",),
        "workers on each node: a number, gpu, cpu, or auto (GPUs where the cluster has any, else CPUs)",
        "1",
        metavar="N|auto|gpu|cpu",
    ),
    Option(("--max-restarts",), "how many failures the run survives", 0, int, metavar="N"),
    _flag("--standalone", "start a Ray of one node on this machine, and stop it in the end"),
    Option(("--rdzv-id",), "the run's id; the same line started again with it follows this run", "none", metavar="ID"),
    Option(
        ("--rdzv-conf",),
        "KEY=VALUE,...: join_timeout or timeout: seconds to wait for room; last_call_timeout: seconds to wait for more"
        " workers than the minimum",
        "",
        metavar="CONF",
    ),
    Option(
        ("--shutdown-timeout",),
        "seconds from SIGTERM to SIGKILL when workers are stopped (else TORCH_ELASTIC_SHUTDOWN_TIMEOUT, else 30)",
        None,
        int,
        metavar="SECONDS",
    ),
    Option(
        ("--signals-to-handle",),
        "the launcher's signals that stop the run in order",
        "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
        metavar="SIGNALS",
    ),
)

PROGRAM = (
    _flag("--module", "the program is a Python module, as with python -m", "-m"),
    _flag("--no-python", "the program is executed as it is, without Python"),
    _flag("--run-path", "the program is run by runpy.run_path; goes before --no-python"),
    Option(("--role",), "the workers' role: ROLE_NAME, and the prefix of their lines", "default", metavar="NAME"),
    _flag("--virtual-local-rank", "each worker sees only its own GPU, and LOCAL_RANK is 0"),
    Option(
        ("--numa-binding",),
        "bind each worker to the CPUs that are near its GPU",
        None,
        choices=AFFINITY_MODES,
        in_environment=False,
    ),
)

LOGS = (
    Option(("--log-dir",), "where journal and log files go; default: Ray's session log folder", None, metavar="DIR"),
    Option(
        ("-r", "--redirects"),
        "streams that go only to files: 1 stdout, 2 stderr, 3 both; or LOCAL_RANK:STREAM,...",
        "0",
        metavar="STD",
    ),
    Option(("-t", "--tee"), "streams that go to files and to the console, as --redirects", "0", metavar="STD"),
    Option(("--local-ranks-filter",), "local ranks that are shown on the console: 0,1", "", metavar="RANKS"),
    Option(
        ("--duplicate-stdout-filters",),
        "copy lines of stdout that contain one of these to filtered_stdout.log: A,B",
        [],
        comma_separated,
        metavar="TEXTS",
    ),
    Option(
        ("--duplicate-stderr-filters",),
        "copy lines of stderr that contain one of these to filtered_stderr.log: A,B",
        [],
        comma_separated,
        metavar="TEXTS",
    ),
    Option(
        ("--logs-specs",),
        "a LogsSpecs of the entry points torchrun.logs_specs",
        None,
        metavar="NAME",
        in_environment=False,
    ),
    Option(("--event-log-handler",), "a handler of torch's elastic events", "null", metavar="NAME"),
)

#: Accepted, so that a line of torchrun's works, and said to be without effect.
WITHOUT_EFFECT = (
    Option(("--rdzv-backend",), "c10d, static and ray are the same here; etcd is refused", "static", metavar="NAME"),
    Option(("--rdzv-endpoint",), "the coordinator is found through Ray: see --address", "", metavar="HOST:PORT"),
    Option(("--node-rank",), "the coordinator gives ranks", 0, int, metavar="N"),
    Option(("--master-addr",), "the address of rank 0's node, whichever that is", "127.0.0.1", metavar="HOST"),
    Option(("--master-port",), "a port that is free on rank 0's node", None, int, metavar="PORT"),
    Option(("--local-addr",), "Ray knows its nodes' addresses", None, metavar="HOST"),
    Option(("--monitor-interval",), "failures are pushed, not polled for", 0.1, float, metavar="SECONDS"),
    Option(
        ("--start-method",),
        "workers are forked from a clean process",
        "spawn",
        choices=("spawn", "fork", "forkserver"),
    ),
)

RAY = (
    Option(("--address",), "the Ray cluster: HOST:PORT; default: RAY_ADDRESS, or the one that runs here", None),
    Option(
        ("--num-workers",),
        "workers wherever they fit, instead of --nnodes and --nproc-per-node",
        None,
        metavar="N|MIN:MAX",
    ),
    Option(("--use-gpu",), "one GPU for each worker; default: where the cluster has them", None, None),
    Option(
        ("--no-use-gpu",),
        "no GPU for the workers",
        None,
        None,
        const=False,
        stored_as="use_gpu",
        in_environment=False,
    ),
    Option(
        ("--resources-per-worker",),
        "what each worker reserves: CPU=4,GPU=1 or JSON; default: one CPU",
        None,
        metavar="AMOUNTS",
    ),
    Option(
        ("--placement-strategy",),
        "with --num-workers: how Ray places the minimum",
        None,
        choices=("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"),
    ),
    Option(("--label-selector",), "only nodes with these labels: LABEL=VALUE,... or JSON", None, metavar="LABELS"),
    Option(("--runtime-env",), "Ray's runtime environment: JSON, or a file of JSON or YAML", None, metavar="ENV"),
    Option(("--spares",), "warm processes in reserve on each node, or auto: none", "auto", metavar="N|auto"),
    Option(("--preload",), "modules that are imported once a node, before workers are forked", "torch", metavar="A,B"),
    Option(("--no-preload",), "a plain interpreter for each worker", False, None),
)

#: torch.distributed.launch has one more.
USE_ENV = _flag("--use-env", "don't give the script --local-rank=N; it reads LOCAL_RANK", in_environment=False)

GROUPS = {
    "workers": WORKERS,
    "program": PROGRAM,
    "logs": LOGS,
    "Ray": RAY,
    "accepted without effect: Ray and the coordinator see to it": WITHOUT_EFFECT,
}
TORCH_OPTIONS = (*WORKERS, *PROGRAM, *LOGS, *WITHOUT_EFFECT)
OPTIONS = (*TORCH_OPTIONS, *RAY)
