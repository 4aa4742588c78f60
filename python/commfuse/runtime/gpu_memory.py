"""A communicator's memory on GPUs: its messages, its workspace, and tensors that all ranks map."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from commfuse import _extension
from commfuse.errors import UsageError
from commfuse.runtime import tuning
from commfuse.runtime.symmetric import SymmetricBuffer

SLOT_ALIGNMENT = 256
# Of all tensors together: their ranks compare where one lies by a number of 32 bits, in units of
# TENSOR_ALIGNMENT (Attachment::find in csrc/gpu).
TENSOR_ALIGNMENT = 16
MOST_TENSOR_BYTES = ((1 << 32) - 1) * TENSOR_ALIGNMENT


class GpuMemory:
    """What the kernels on this rank's GPU share with the other ranks; every rank must make one.

    Args:
        native: the extension's communicator over the same ranks.
        group: of the ranks, or None for a group of one.
        device: this rank's GPU.
        gather: brings together every rank's value.
        payload_bytes: the largest message of a call, bytes; rounded up to a multiple of 256.
        workspace_bytes: of each rank's workspace.

    Attributes:
        payload_bytes: as above, rounded.
        workspace: the ranks' workspaces, or None where they have no bytes.
        table: the crossovers by which kernels are chosen: rank 0's, on all ranks.
        table_source: where it comes from, in words.
    """

    def __init__(
        self,
        native: Any,
        group: dist.ProcessGroup | None,
        device: torch.device,
        gather: Callable[[Any], list[Any]],
        *,
        payload_bytes: int,
        workspace_bytes: int,
    ):
        self._native, self._group, self._device = native, group, device
        world_size = group.size() if group is not None else 1
        self.payload_bytes = -(-payload_bytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
        nbytes = _extension.require().gpu_workspace_bytes(world_size, self.payload_bytes)
        self._messages = SymmetricBuffer(group, nbytes, device)
        self._tensors: list[SymmetricBuffer] = []
        properties = torch.cuda.get_device_properties(device)
        # Grids must be alike on all ranks, and so must what is chosen by the table: rank 0's.
        mine = (properties.multi_processor_count, None)
        if group is None or group.rank() == 0:
            mine = (mine[0], tuning.load(properties.name, world_size))
        everybody = gather(mine)
        native.attach_gpu(
            device.index,
            self._messages.addresses,
            self.payload_bytes,
            min(multiprocessors for multiprocessors, _ in everybody),
        )
        self.table, self.table_source = everybody[0][1]
        native.set_all_reduce_thresholds(self.table.one_shot_bytes, self.table.lines_bytes)
        native.set_fused_rows(self.table.fused_from_rows, self.table.fused_to_rows)
        native.set_claimed_percent(self.table.claimed_percent)
        self.workspace: SymmetricBuffer | None = None
        if workspace_bytes:
            self.workspace = SymmetricBuffer(group, workspace_bytes, device)
        if world_size > 1:
            native.barrier()  # nobody calls before all have loaded their kernels

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """See :meth:`commfuse.runtime.communicator.Communicator.empty`."""
        numel = math.prod(shape)
        units = max(1, -(-numel * dtype.itemsize // TENSOR_ALIGNMENT))
        nbytes = units * TENSOR_ALIGNMENT
        taken = sum(buffer.nbytes for buffer in self._tensors)
        if taken + nbytes > MOST_TENSOR_BYTES:
            raise UsageError(
                f"a tensor of {nbytes} bytes: those of one communicator may take "
                f"{MOST_TENSOR_BYTES} bytes together, and {taken} are taken; make it by another "
                "Communicator"
            )
        buffer = SymmetricBuffer(self._group, nbytes, self._device)
        self._native.add_gpu_buffer(buffer.addresses, nbytes)
        self._tensors.append(buffer)
        return buffer.local.view(dtype)[:numel].view(*shape)

    def close(self) -> None:
        """Releases all of it; no kernel may be running on it, and ``native`` must be closed."""
        self._native.detach_gpu()
        for buffer in (self._messages, self.workspace, *self._tensors):
            if buffer is not None:
                buffer.close()
