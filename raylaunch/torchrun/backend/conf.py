"""What `torchrun --rdzv-backend=ray` is told: bounds, endpoint and `--rdzv-conf`, validated once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raylaunch.coordinator.agent_messages import Settings

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousParameters

#: `--rdzv-conf` in seconds, and how many attempts; torch's names, and torch's defaults but for the last three: torch
#: waits 30 s for more nodes, and takes a node for dead after 3 times 5 s.
DEFAULTS = {
    "join_timeout": 600.0,
    "close_timeout": 30.0,
    "last_call_timeout": 5.0,
    "keep_alive_interval": 1.0,
    "keep_alive_max_attempt": 10.0,
}
#: What torch's own backends know and has no meaning here. LaunchConfig (torch 2.13) always sets `timeout`.
WITHOUT_MEANING = frozenset({"timeout", "heartbeat_timeout", "read_timeout", "is_host", "store_type"})


@dataclass(frozen=True, slots=True)
class Conf:
    """One agent's rendezvous. Times are in seconds."""

    job: str
    address: str  # Ray's
    local_addr: str | None
    settings: Settings
    join_timeout: float
    close_timeout: float


def read_conf(parameters: RendezvousParameters) -> Conf:
    """Raises ValueError for what can't work, with the option's name, its value and what is allowed."""
    if not parameters.run_id:
        raise ValueError("--rdzv-id: must not be empty with --rdzv-backend=ray: it names the job")
    address = parameters.endpoint.strip() or "auto"
    if address.startswith("ray://"):
        raise ValueError(
            f"--rdzv-endpoint={address}: a Ray Client address can't be used, since every node must be a part of the"
            " cluster; write auto, or the address of the cluster's head as HOST:PORT"
        )
    known = sorted({*DEFAULTS, *WITHOUT_MEANING})
    if unknown := sorted(set(parameters.config) - set(known)):
        raise ValueError(f"--rdzv-conf: no such key: {', '.join(unknown)}; there are {', '.join(known)}")
    values = {name: _seconds(name, parameters.config.get(name, default)) for name, default in DEFAULTS.items()}
    settings = Settings(
        min_agents=parameters.min_nodes,
        max_agents=parameters.max_nodes,
        last_call=values["last_call_timeout"],
        keep_alive=values["keep_alive_interval"],
        silence=values["keep_alive_interval"] * values["keep_alive_max_attempt"],
    )
    return Conf(
        job=parameters.run_id,
        address=address,
        local_addr=parameters.local_addr,
        settings=settings,
        join_timeout=values["join_timeout"],
        close_timeout=values["close_timeout"],
    )


def _seconds(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    least = 2.0 if name == "keep_alive_max_attempt" else 0.0
    may_be_least = name in ("last_call_timeout", "keep_alive_max_attempt")
    if not math.isfinite(number) or number < least or (number == least and not may_be_least):
        allowed = f"{least:g} or more" if may_be_least else f"more than {least:g}"
        raise ValueError(f"--rdzv-conf {name}={value}: must be a number, {allowed}")
    return number
