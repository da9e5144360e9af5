"""Values as they are written on a command line: amounts, labels, streams, seconds. Pure.

Each function takes the option's name, for the message, and its text; each raises `ConfigError`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from raylaunch.command import PerLocalRank, Streams
from raylaunch.errors import ConfigError
from raylaunch.spec import LONGEST_TIMEOUT


def seconds(option: str, text: str) -> float:
    """A time in seconds, at least 0."""
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(f"{option}={text}: must be a number of seconds") from None
    if not math.isfinite(value) or value > LONGEST_TIMEOUT:
        raise ConfigError(f"{option}={text}: must be a finite number of seconds, at most 1e8")
    if value < 0:
        raise ConfigError(f"{option}={text}: must be non-negative")
    return value


def mapping(option: str, text: str) -> dict[str, Any]:
    """`A=1,B=2`, or JSON."""
    if text.lstrip().startswith("{"):
        return _json(option, text)
    found: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not key or not equals or not value:
            raise ConfigError(f"{option}={text}: must be NAME=VALUE,... or JSON")
        found[key] = value
    return found


def amounts(option: str, text: str | None) -> dict[str, float]:
    """Resources, by Ray's names."""
    found: dict[str, float] = {}
    for name, value in (mapping(option, text) if text else {}).items():
        try:
            found[name] = float(value)
        except (TypeError, ValueError):
            raise ConfigError(f"{option}={text}: {name} must be a number, not {value!r}") from None
        if not math.isfinite(found[name]) or found[name] < 0:
            raise ConfigError(f"{option}={text}: {name} must be a number, at least 0")
    return found


def labels(option: str, text: str | None) -> dict[str, str] | None:
    """A selector of node labels."""
    found = mapping(option, text) if text else {}
    for name, value in found.items():
        if not isinstance(value, str):
            raise ConfigError(f"{option}={text}: {name} must be a text, not {value!r}")
    return found or None


def runtime_env(text: str | None) -> dict[str, Any] | None:
    """Ray's runtime environment: JSON, or a file of JSON or YAML, as `ray job submit` takes them."""
    if not text:
        return None
    option = "--runtime-env"
    if text.lstrip().startswith("{"):
        return _json(option, text)
    if not os.path.isfile(text):
        raise ConfigError(f"{option}={text}: is neither JSON nor a file")
    import yaml  # Ray brings it

    with open(text, encoding="utf-8") as file:
        try:
            found = yaml.safe_load(file)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{option}={text}: is neither JSON nor YAML: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{option}={text}: must hold a mapping")
    return found


def _json(option: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{option}={text}: is no JSON: {error}") from None
    assert isinstance(found, dict), "it begins with a brace"
    return found


def streams(option: str, text: str) -> PerLocalRank:
    """`3`, or `0:1,10:3`: which streams of which local rank. torch (2.13) knows ranks up to 9 only."""
    if re.fullmatch(r"[0-3]", text):
        return Streams(int(text))
    if not re.fullmatch(r"\d+:[0-3](,\d+:[0-3])*", text):
        raise ConfigError(f"{option}={text}: must be one of 0, 1, 2, 3, or LOCAL_RANK:STREAM,... as in 0:1,1:3")
    found: Mapping[int, Streams] = {
        int(rank): Streams(int(value)) for rank, value in (part.split(":") for part in text.split(","))
    }
    return found


def ranks(option: str, text: str) -> frozenset[int] | None:
    """`0,1,2`; "" for all."""
    if not text:
        return None
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", text):
        raise ConfigError(f"{option}={text}: must be a comma-separated list of integers, as in {option}=0,1,2")
    return frozenset(int(part) for part in text.split(","))
