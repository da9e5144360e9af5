"""Collectives of tensors and numbers.

They take every dtype, layout in memory and shape, 0-d and empty ones too, whatever the backend can: gloo (torch 2.13)
refuses 16-bit integers and adds up the bytes of bools, NCCL takes only contiguous tensors. Nothing here is seen by
autograd. Shapes and dtypes must be the same on all ranks. Nobody checks that: with gloo, one rank gets garbage and
another is aborted. TORCH_DISTRIBUTED_DEBUG=DETAIL makes torch check the sizes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from raylaunch.distutils.group import Group, size_of

#: No backend can add these up as they are.
_SUMMED_AS_INT64 = frozenset({torch.bool, torch.int16, torch.uint16, torch.uint32, torch.uint64})


class _Done(dist.Work):  # type: ignore[misc] # torch's types are not followed
    """The handle of a collective in which nobody else takes part."""

    def wait(self, timeout: Any = None) -> bool:  # noqa: ARG002 - as torch's
        return True

    def is_completed(self) -> bool:
        return True

    def get_future(self) -> torch.futures.Future[Any]:
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result(None)
        return future


def broadcast(tensor: torch.Tensor, src: int, group: Group = None, async_op: bool = False) -> dist.Work | None:
    """Copy rank `src`'s tensor into those of the other ranks.

    Args:
        tensor: of the same shape and dtype on all ranks; replaced in place. Its device must be one that the group's
            backend takes: a GPU for NCCL.
        src: a global rank, also with a subgroup.
        group: the ranks that take part.
        async_op: don't wait: return a handle with `wait()` and `is_completed()`.

    Returns:
        The handle with `async_op`, otherwise None.

    Raises:
        ValueError: this rank doesn't belong to `group`; or `async_op` with a tensor that isn't contiguous.
    """
    held = tensor.detach()
    sent = _settled(held)
    if async_op and sent is not held:
        raise ValueError("async_op=True needs a contiguous tensor: the result would have to be copied back later")
    if size_of(group) == 1:
        return _Done() if async_op else None
    handle = dist.broadcast(_bytes_of(sent), src, group=group, async_op=async_op)
    if sent is not held:
        held.copy_(sent)
    return handle


def all_reduce(
    data: Any,
    group: Group = None,
    average: bool = False,
    device: torch.device | str | int | None = None,
) -> Any:
    """The sum over all ranks, element by element, or their average; the same on every rank.

    Args:
        data: a tensor, a number, or what numpy makes an array of; of the same shape and dtype on all ranks. bools are
            added up to whether any is True; small integers wrap around as in torch.
        group: the ranks that take part, by whose number an average is divided.
        average: divide the sum by the number of ranks. Integers and bools give floats: tensors those of torch's default
            dtype, the others float64.
        device: where the collective takes place, if not where `data` is: NCCL wants a GPU.

    Returns:
        For a tensor, `data` itself, which holds the result now, or a copy of it on `device` if that is another one. An
        average of integers does not fit into `data`: it is a new tensor, and `data` stays as it is.
        For a number a number, and for anything else a numpy array of the same shape; `data` stays as it is.

    Raises:
        ValueError: this rank doesn't belong to `group`, or `data` is ragged.
        TypeError: `data` holds something else than numbers.
    """
    size = size_of(group)
    given = _tensor_of(data)
    held = given.detach()
    promoted = average and not (held.is_floating_point() or held.is_complex())  # integers: `data` can't hold the result
    summed_as = torch.int64 if promoted or held.dtype in _SUMMED_AS_INT64 else held.dtype
    total = _settled(held.to(held.device if device is None else device, summed_as, copy=promoted))
    if size > 1:
        dist.all_reduce(total, group=group)
    if promoted:
        total = total.to(torch.get_default_dtype() if given is data else torch.float64) / size
        return total if given is data else _plain(total)
    if average:
        total /= size
    if total is not held:
        held.copy_(total)
    if given is not data:
        return _plain(held)
    return given if given.device == total.device else given.to(total.device)


def all_gather(data: Any, group: Group = None, device: torch.device | str | int | None = None) -> list[Any]:
    """What each rank has, in the order of the ranks, on every rank.

    Args:
        data: a tensor, a number, or what numpy makes an array of; of the same shape and dtype on all ranks. For what
            differs in shape there is `all_gather_objects`.
        group: the ranks that take part.
        device: where the collective takes place, if not where `data` is: NCCL wants a GPU.

    Returns:
        A list at every world size, of copies: of tensors on `device`, or of numpy arrays if `data` is no tensor, 0-d
        ones for numbers.

    Raises:
        ValueError: this rank doesn't belong to `group`, or `data` is ragged.
        TypeError: `data` holds something else than numbers.
    """
    size = size_of(group)
    given = _tensor_of(data)
    sent = _settled(given.detach().to(given.device if device is None else device))
    if size == 1:
        gathered = [sent.clone()]
    else:
        own = _bytes_of(sent)
        parts = [torch.empty_like(own) for _ in range(size)]
        dist.all_gather(parts, own, group=group)
        gathered = [part.view(sent.dtype).reshape(sent.shape) for part in parts]
    return gathered if given is data else [one.cpu().numpy() for one in gathered]


def _tensor_of(data: Any) -> torch.Tensor:
    """`data` itself if it is a tensor; otherwise a new one of what numpy makes of it: int64, float64, ..."""
    if isinstance(data, torch.Tensor):
        return data
    import numpy as np  # which torch doesn't bring

    array = np.asarray(data)  # torch takes neither negative strides nor the other order of bytes
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))


def _plain(tensor: torch.Tensor) -> Any:
    """A number, or a numpy array."""
    return tensor.cpu().numpy() if tensor.dim() else tensor.item()


def _settled(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous and without a conjugation that is still to be done; `tensor` itself if it is so."""
    return tensor.contiguous().resolve_conj().resolve_neg()


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor, as one that every backend can move."""
    flat = tensor.as_strided((tensor.numel(),), (1,))  # reshape would keep an odd stride of a single element
    return flat.view(torch.uint8)
