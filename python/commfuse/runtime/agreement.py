"""How the ranks of a group tell each other what each of them has, and fail together at set-up.

What the ranks have goes to the first of them, and what all have comes back from there. So the first
rank notices when another one's process ends, and tells the others which; its own end is noticed by
all. In torch's all_gather_object, a ring, two neighbours would notice, and the rest wait for them.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from commfuse import errors
from commfuse.errors import CommunicatorError, PeerDied, PeerTimeout

Made = TypeVar("Made")
# No other messages of this package have it: channels count theirs from 0.
TAG = 1 << 30


def gather(group: dist.ProcessGroup | None, value: Any) -> list[Any]:
    """Every rank's value, in rank order.

    Args:
        group: every rank of it must call; None: one process by itself.
        value: anything that can be pickled.

    Raises:
        PeerDied: the process of a rank has ended.
        PeerTimeout: a rank did not call within the group's own limit.

    Example:
        >>> gather(torch.distributed.group.WORLD, "a" if rank == 0 else "b")
        ['a', 'b']
    """
    if group is None or dist.get_world_size(group) == 1:
        return [value]
    if dist.get_rank(group) > 0:
        try:
            _send(value, 0, group)
            found, failure = _receive(0, group)
        except RuntimeError as error:
            raise _lost(group, 0, error) from None
    else:
        found, failure = [value], None
        for rank in range(1, dist.get_world_size(group)):
            try:
                found.append(_receive(rank, group))
            except RuntimeError as error:
                failure = failure or _lost(group, rank, error)
        for rank in range(1, dist.get_world_size(group)):
            with suppress(RuntimeError):  # who is gone needs no answer
                _send((found, failure), rank, group)
    if failure is not None:
        raise failure
    return found


def collect(group: dist.ProcessGroup | None, make: Callable[[], Any]) -> list[Any]:
    """What ``make()`` returns on every rank, in rank order; where it raises on one, all raise.

    Args:
        group: every rank of it must call; None: one process by itself.
        make: its value can be pickled. It waits for no other rank that may fail in it.

    Raises:
        Exception: this rank's own, if it has one.
        CommfuseError: of the first rank that has one, by its class where it is one of ours.
        PeerDied, PeerTimeout: as :func:`gather`.

    Example:
        >>> collect(group, lambda: os.path.getsize(path))    # on all ranks, or on none
    """
    value, own = None, None
    try:
        value = make()
    except Exception as error:
        own = error
    try:
        everybody = gather(group, (value, own and (type(own).__name__, str(own))))
    except CommunicatorError:
        if own is not None:
            raise own from None
        raise
    if own is not None:
        raise own
    for rank, (_, problem) in enumerate(everybody):
        if problem is not None:
            kind, text = problem
            ours = getattr(errors, kind, None)
            raise (ours or CommunicatorError)(f"rank {rank}: {text if ours else f'{kind}: {text}'}")
    return [value for value, _ in everybody]


def attempt(group: dist.ProcessGroup | None, make: Callable[[], Made]) -> Made:
    """As :func:`collect`, of what stays on its rank; what others have made is then closed.

    Example:
        >>> comm = attempt(world, lambda: Communicator(mesh["tp"]))    # on all ranks, or on none
    """
    made: list[Any] = []
    try:
        collect(group, lambda: made.append(make()))
    except Exception:
        for each in made:
            if hasattr(each, "close"):
                each.close()
        raise
    return made[0]


def _device(group: dist.ProcessGroup) -> str:
    return "cpu" if "cpu:" in dist.get_backend_config(group) else "cuda"


def _send(value: Any, rank: int, group: dist.ProcessGroup) -> None:
    data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).to(_device(group))
    for message in (torch.tensor([data.numel()], device=data.device), data):
        dist.send(message, group=group, group_dst=rank, tag=TAG)


def _receive(rank: int, group: dist.ProcessGroup) -> Any:
    size = torch.empty(1, dtype=torch.int64, device=_device(group))
    dist.recv(size, group=group, group_src=rank, tag=TAG)
    data = torch.empty(int(size), dtype=torch.uint8, device=size.device)
    dist.recv(data, group=group, group_src=rank, tag=TAG)
    return pickle.loads(data.cpu().numpy().tobytes())


def _lost(group: dist.ProcessGroup, rank: int, error: RuntimeError) -> CommunicatorError:
    me = f"rank {dist.get_rank(group)}"
    if "timed out" in str(error).lower():
        return PeerTimeout(
            f"{me} waited in vain for rank {rank} while ranks agreed with each other: {error}"
        )
    return PeerDied(
        f"rank {rank} is gone: {me} lost it while ranks agreed with each other: {error}"
    )
