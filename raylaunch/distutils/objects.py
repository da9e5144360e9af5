"""Collectives of Python objects.

Each rank pickles for itself before it takes part, and sends what went wrong in place of what it could not pickle. So
all ranks hear of it. torch's own calls (2.13) raise on that rank only, and the others wait until the group's timeout.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from raylaunch.distutils.group import Group, get_rank, size_of

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Unpicklable:
    """In place of an object that can't be sent."""

    rank: int
    error: str


def broadcast_object_list(
    object_list: list[Any],
    src: int,
    group: Group = None,
    device: str | None = None,
) -> None:
    """Replace what is in the list, on every rank, by what rank `src` has in its own.

    Args:
        object_list: takes the length of that of `src`, which stays as it is.
        src: a global rank, also with a subgroup.
        group: the ranks that take part.
        device: where torch moves the bytes for the way; by default the current GPU with NCCL, else the CPU.

    Raises:
        pickle.PicklingError: on all ranks, if an object of `src` doesn't pickle. The lists are left as they are.
        ValueError: this rank doesn't belong to `group`.
    """
    if size_of(group) == 1:
        return
    parcel = [_packed(object_list) if get_rank() == src else None]
    dist.broadcast_object_list(parcel, src, group=group, device=device)
    (received,) = _unpacked(parcel)
    if get_rank() != src:
        object_list[:] = received


def gather_objects(data: T, group: Group = None) -> list[T] | None:
    """The objects of all ranks, in the order of their ranks, on the first rank of the group; None on the others.

    Alone, the list of `data` itself; otherwise the objects are copies, that of the first rank too.

    Raises:
        pickle.PicklingError: an object doesn't pickle; on the rank that has it, and on the first.
        ValueError: this rank doesn't belong to `group`.
    """
    size = size_of(group)
    if size == 1:
        return [data]
    parcel = _packed(data)
    parcels: list[Any] | None = [None] * size if dist.get_rank(group) == 0 else None
    dist.gather_object(parcel, parcels, group=group, group_dst=0)
    _unpacked([parcel] if isinstance(parcel, _Unpicklable) else [])
    return None if parcels is None else _unpacked(parcels)


def all_gather_objects(data: T, group: Group = None) -> list[T]:
    """The objects of all ranks, in the order of their ranks, on every rank. They may differ in type and size.

    Alone, the list of `data` itself; otherwise the objects are copies, this rank's own too.

    Raises:
        pickle.PicklingError: on all ranks, if an object of any rank doesn't pickle.
        ValueError: this rank doesn't belong to `group`.
    """
    size = size_of(group)
    if size == 1:
        return [data]
    parcels: list[Any] = [None] * size
    dist.all_gather_object(parcels, _packed(data), group=group)
    return _unpacked(parcels)


def _packed(value: Any) -> bytes | _Unpicklable:
    try:
        return pickle.dumps(value)
    except Exception as error:  # whatever a __reduce__ raises
        return _Unpicklable(get_rank(), f"{type(error).__name__}: {error}")


def _unpacked(parcels: list[Any]) -> list[Any]:
    for parcel in parcels:
        if isinstance(parcel, _Unpicklable):
            raise pickle.PicklingError(f"an object of rank {parcel.rank} can't be pickled: {parcel.error}")
    return [pickle.loads(parcel) for parcel in parcels]  # noqa: S301 - what our own ranks have sent
