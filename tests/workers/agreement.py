"""On four ranks: one that fails while communicators, meshes and channels are made."""

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from commfuse import _extension
from commfuse.runtime import agreement, transports
from commfuse.runtime.channel import Channel
from commfuse.runtime.communicator import Communicator
from commfuse.runtime.mesh import init_mesh

Raised = tuple[str, str, float]


def raised(call) -> Raised:
    """What a call raises, and after how many seconds."""
    begin = time.monotonic()
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - begin
    return "", "", time.monotonic() - begin


def _no_memory(*args):
    raise RuntimeError("no memory can be mapped")


def _connecting(options: dict) -> None:
    """Rank 1 connects, and then cannot map the memory."""
    native = _extension.require()
    connect = native.Communicator.connect
    if dist.get_rank() == 1:
        native.Communicator.connect = lambda *args: (connect(*args).close(), _no_memory())
    try:
        Communicator(dist.group.WORLD, **options).close()
    finally:
        native.Communicator.connect = connect


def _channel(comm: Communicator, slots: int) -> None:
    Channel(comm, 0, 1, rows=2, columns=2, dtype=torch.float32, slots=slots)


def failures(victim: int, folder: str) -> dict[str, Raised]:
    """What each rank raises; at last the victim's process ends in the middle of it."""
    rank, world = dist.get_rank(), dist.group.WORLD
    hosts = {"host": str(rank // 2)}
    found = {
        "values": agreement.gather(world, rank),
        "options": raised(lambda: Communicator(world, payload_bytes=4096 if rank else 0)),
        "connecting": raised(lambda: _connecting({})),
        "connecting inside": raised(lambda: _connecting(hosts)),
        "a stage": raised(lambda: init_mesh(2, 2, payload_bytes=4096 if rank > 1 else 1 << 44)),
        "defect": raised(lambda: agreement.attempt(world, lambda: [0] * 4 if rank != 2 else 1 / 0)),
    }
    with Communicator(world) as comm:
        found["channel"] = raised(lambda: _channel(comm, slots=1 if rank == 3 else 2))
        found["channel again"] = raised(lambda: _channel(comm, slots=2))
    if rank == victim:
        transports.choose = lambda *args: os._exit(3)
    found["killed"] = raised(lambda: Communicator(world))
    # Nobody ends before all have noticed: the first that ends would be noticed as well.
    Path(folder, str(rank)).touch()
    deadline = time.monotonic() + 20
    while len(os.listdir(folder)) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    return found
