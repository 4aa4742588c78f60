"""Memory of GPUs that every rank of a group maps, by torch's symmetric memory."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from commfuse.errors import BackendUnavailable, UsageError
from commfuse.runtime.launch import ALLOW_OVERLAPPING


class SymmetricBuffer:
    """One buffer of equal size on each rank's GPU, mapped by all ranks; zero when it is made.

    Making one is collective. A group of one has plain memory.

    Args:
        group: of the ranks, or None for a group of one.
        nbytes: of each rank's buffer.
        device: this rank's GPU.

    Attributes:
        local: this rank's buffer, uint8 [nbytes]; torch's symmetric-memory ops take views of it.
        addresses: of every rank's buffer, as this process maps it.

    Raises:
        BackendUnavailable: torch cannot map the ranks' memory; the message is torch's.

    Example:
        >>> buffer = SymmetricBuffer(group, 1 << 20, torch.device("cuda", 0))
        >>> peer = buffer.of_rank(1)      # uint8 [1 << 20]
    """

    def __init__(self, group: dist.ProcessGroup | None, nbytes: int, device: torch.device):
        self.nbytes = nbytes
        self._handle = None
        with torch.cuda.device(device):
            if group is None or group.size() == 1:
                self.local = torch.zeros(nbytes, dtype=torch.uint8, device=device)
                self.addresses = [self.local.data_ptr()]
                torch.cuda.synchronize(device)
                return
            import torch.distributed._symmetric_memory as symm_mem
            from torch._C._distributed_c10d import _SymmetricMemory

            try:
                # Not symm_mem.empty: it takes the memory from a pool, which keeps it.
                self.local = _SymmetricMemory.empty_strided_p2p(
                    (nbytes,), (1,), torch.uint8, device
                )
                self.local.zero_()
                torch.cuda.synchronize(device)
                self._handle = symm_mem.rendezvous(self.local, group.group_name)
            except RuntimeError as error:
                raise BackendUnavailable(f"torch cannot share GPU memory: {error}") from error
        self.addresses = list(self._handle.buffer_ptrs)
        dist.barrier(group=group)  # nobody stores before all is zero

    def of_rank(self, rank: int) -> torch.Tensor:
        """A rank's buffer, uint8 [nbytes]; valid until :meth:`close`."""
        if self._handle is None:
            return self.local
        return self._handle.get_buffer(rank, (self.nbytes,), torch.uint8)

    def signal(self, rank: int, channel: int) -> None:
        """Sets one of torch's signals on a peer, behind what the stream has stored there."""
        self._handle.put_signal(rank, channel)

    def await_signal(self, rank: int, channel: int) -> None:
        """Has the stream wait for a peer's signal, and takes it back."""
        self._handle.wait_signal(rank, channel)

    def close(self) -> None:
        """Releases this rank's buffer and mappings; a peer's mapping of it keeps it alive.

        No kernel that uses the buffer may be running.
        """
        self._handle = self.local = None
        self.addresses = []


class TorchAllReduce:
    """torch's all-reduces over symmetric memory: what commfuse competes with on ranks whose process
    group has none for GPUs (NCCL refuses two ranks on one).

    Both take part of a buffer that all ranks map, bfloat16 or float32. All ranks must ask for the
    same sizes in the same order; a larger one than before makes a new buffer, which is collective
    and not possible while a graph is captured.

    Args:
        group: of the ranks, two or more.
        device: this rank's GPU.

    Example:
        >>> torchs = TorchAllReduce(group, device)
        >>> x = torchs.buffer(8192, torch.bfloat16)
        >>> total = torchs.one_shot(x.normal_())[:8192]
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self.group, self.device = group, device
        self._buffers: list[SymmetricBuffer] = []  # the older ones stay: graphs may hold them

    def buffer(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Shared memory: ``numel`` elements, and the padding that torch's kernels need.

        Every call gives the same memory.
        """
        unit = 16 * self.group.size()  # bytes
        nbytes = max(1, -(-numel * dtype.itemsize // unit)) * unit
        if not self._buffers or self._buffers[-1].nbytes < nbytes:
            size = max(1 << 20, 1 << (nbytes - 1).bit_length())
            self._buffers.append(SymmetricBuffer(self.group, size, self.device))
        return self._buffers[-1].local[:nbytes].view(dtype)

    def one_shot(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' ``x``, a whole :meth:`buffer`, as a new tensor."""
        return torch.ops.symm_mem.one_shot_all_reduce(x, "sum", self.group.group_name)

    def two_shot(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' ``x``, a whole :meth:`buffer`, in place."""
        return torch.ops.symm_mem.two_shot_all_reduce_(x, "sum", self.group.group_name)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Sums any ``x`` in place, in one shot or two."""
        shared = self.buffer(x.numel(), x.dtype)
        shared[: x.numel()].copy_(x.view(-1))
        # About where the two cross over on an H100.
        small = x.nbytes * self.group.size() ** 2 <= 2 << 20
        total = (self.one_shot if small else self.two_shot)(shared)
        return x.copy_(total[: x.numel()].view_as(x))

    def close(self) -> None:
        """Releases the buffers; nothing may be running on them."""
        for buffer in self._buffers:
            buffer.close()
        self._buffers.clear()


def placement_problem(devices: list[tuple[str, str]]) -> str | None:
    """Why ranks with these GPUs cannot share memory as things are, or None.

    Args:
        devices: for every rank, its GPU's identity and its value of the variable that lets ranks
            share a GPU.

    Example:
        >>> placement_problem([("GPU-1", ""), ("GPU-2", "")]) is None
        True
    """
    by_gpu: dict[str, list[int]] = {}
    for rank, (gpu, _) in enumerate(devices):
        by_gpu.setdefault(gpu, []).append(rank)
    shared = [ranks for ranks in by_gpu.values() if len(ranks) > 1]
    if not shared or all(allowed == "1" for _, allowed in devices):
        return None
    ranks = ", ".join(map(str, shared[0]))
    return (
        f"ranks {ranks} are on the same GPU: give each rank its own (torch.cuda.set_device("
        "local_rank) before the communicator is made), or, to run several ranks on one GPU on "
        f"purpose, set {ALLOW_OVERLAPPING}=1 and run them under MPS, as commfuse.testing.GpuLab "
        "and `commfuse bench --device cuda` do"
    )


def device_identity(device: torch.device) -> tuple[str, str]:
    """This rank's entry for :func:`placement_problem`."""
    properties = torch.cuda.get_device_properties(device)
    return str(properties.uuid), os.environ.get(ALLOW_OVERLAPPING, "")


def unreachable(device: torch.device, gpus: list[str]) -> str | None:
    """Which of ``gpus`` (identities) ``device`` cannot map, as a reason, or None.

    GPUs that this process does not see are left to torch, which tries.
    """
    for index in range(torch.cuda.device_count()):
        uuid = str(torch.cuda.get_device_properties(index).uuid)
        if index == device.index or uuid not in gpus:
            continue
        if not torch.cuda.can_device_access_peer(device.index, index):
            return f"GPU {device.index} cannot map the memory of GPU {index} (no peer access)"
    return None


def resolve_device(device: torch.device | str | None) -> torch.device:
    """The device of a communicator: the CPU by default; ``"cuda"`` is the current GPU.

    Raises:
        UsageError: neither a CPU nor a CUDA device.
        BackendUnavailable: torch finds no such GPU.

    Example:
        >>> resolve_device(None)
        device(type='cpu')
    """
    device = torch.device(device or "cpu")
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UsageError(f"device {str(device)!r}: a communicator is for 'cpu' or 'cuda'")
    if not torch.cuda.is_available():
        raise BackendUnavailable(f"device {str(device)!r}: torch finds no GPU")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise BackendUnavailable(
            f"device 'cuda:{index}': torch finds {torch.cuda.device_count()} GPUs"
        )
    return torch.device("cuda", index)
