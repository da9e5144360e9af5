"""Shipping the function: pickled once, put into Ray's object store once, loaded by each worker when it is promoted.

ObjectRefs among the arguments travel beside the pickle, not in it, so that Ray goes on counting them.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.cloudpickle import CloudPickler

from raylaunch.worker import payload

#: The pickle of a call, and the ObjectRefs in it.
Packed = tuple[bytes, list[Any]]


class _Pickler(CloudPickler):  # type: ignore[misc]
    """Cloudpickle, with references set aside."""

    def __init__(self, file: io.BytesIO, references: list[Any]) -> None:
        super().__init__(file)
        self._references = references

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, ray.ObjectRef):
            return None
        self._references.append(value)
        return len(self._references) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, references: list[Any]) -> None:
        super().__init__(file)
        self._references = references

    def persistent_load(self, number: Any) -> Any:
        return self._references[number]


def pack(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None, no_retry: payload.NoRetry
) -> Packed:
    """The function and its arguments, ready for the object store.

    Raises `ConfigError`. Needs no connection to Ray, so that what can't be pickled is refused before anything starts.
    """
    references: list[Any] = []

    def dumps(value: Any) -> bytes:
        file = io.BytesIO()
        _Pickler(file, references).dump(value)
        return file.getvalue()

    return payload.dump(function, args, kwargs, dumps, no_retry), references


def unpack(reference: Any) -> tuple[Callable[[], Any], payload.NoRetry]:
    """The call that `pack` was given, and the `no_retry` types. Raises `PayloadError`."""
    data, references = ray.get(reference)
    return payload.load(data, lambda pickled: _Unpickler(io.BytesIO(pickled), references).load())
