"""What of torchrun's rendezvous still means something where the coordinator forms the group. Pure."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Mapping
from typing import Any

from raylaunch.errors import ConfigError
from raylaunch.torchrun import values

#: Backends that the coordinator stands in for.
BACKENDS = ("", "static", "c10d", "ray")
#: The keys of --rdzv-conf (torch 2.13), and the timeout that each one is here; the later ones go first.
TIMEOUTS = {"timeout": "placement", "join_timeout": "placement", "last_call_timeout": "last_call"}
WITHOUT_EFFECT = (
    *("close_timeout", "heartbeat_timeout", "keep_alive_interval", "keep_alive_max_attempt"),
    *("read_timeout", "is_host", "store_type", "rank"),
)


def check_backend(backend: str) -> None:
    """Refuse a backend that can't be stood in for. Raises `ConfigError`."""
    if backend.startswith("etcd"):
        raise ConfigError(
            f"--rdzv-backend={backend}: there is no etcd rendezvous on Ray, where the coordinator forms the group;"
            " leave the option out"
        )
    if backend not in BACKENDS:
        raise ConfigError(
            f"--rdzv-backend={backend}: the rendezvous backend {backend!r} is not known; c10d, static and ray are, and"
            " mean the same here"
        )


def parse_conf(text: str) -> dict[str, str]:
    """The keys and values of --rdzv-conf. Raises `ConfigError`, with torch's messages."""
    conf: dict[str, str] = {}
    for part in text.strip().split(",") if text.strip() else ():
        key, _, value = (piece.strip() for piece in part.partition("="))
        if not key:
            raise ConfigError(
                f"--rdzv-conf={text}: the rendezvous configuration string must be in format"
                " <key1>=<value1>,...,<keyN>=<valueN>"
            )
        if not value:
            raise ConfigError(f"--rdzv-conf={text}: the option '{key}' must have a value specified")
        known = (*TIMEOUTS, *WITHOUT_EFFECT)
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"
            raise ConfigError(f"--rdzv-conf={text}: no such option: {key!r}; {hint}")
        conf[key] = value
    return conf


def timeouts_of(conf: Mapping[str, Any], shown: str) -> dict[str, float]:
    """The timeouts that a rendezvous' configuration names. `shown` is what messages call it."""
    named = [key for key in TIMEOUTS if key in conf]
    return {TIMEOUTS[key]: values.seconds(f"{shown}{key}", str(conf[key])) for key in named}


def run_id_for(rdzv_id: str) -> str | None:
    """The run's id for torch's: the same, or as near as Ray's names allow; None where torch has none."""
    if rdzv_id in ("none", ""):
        return None
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", rdzv_id):
        return rdzv_id
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", rdzv_id).lstrip("._-")[:50]
    mark = hashlib.sha256(rdzv_id.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{plain}-{mark}" if plain else mark
