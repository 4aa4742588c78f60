"""What every launcher checks before it starts a kernel."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from commfuse.errors import BackendUnavailable, UsageError

from .workspace import DTYPES, SLOT_ALIGNMENT, Layout, Workspace, round_up

ALIGNMENT = 16  # bytes: those of the widest access, and of what Triton specialises kernels by


def check_input(op: str, x: torch.Tensor, workspace: Workspace) -> None:
    """That ``x`` can be exchanged through ``workspace``: dtype, memory, device.

    Raises:
        UsageError: otherwise.
    """
    if x.dtype not in DTYPES:
        raise UsageError(f"{op}: dtype {x.dtype} is not one of {', '.join(map(str, DTYPES))}")
    if not x.is_contiguous():
        raise UsageError(f"{op}: x must be contiguous")
    if x.device != workspace.addresses.device:
        raise UsageError(f"{op}: x is on {x.device}, the workspace on {workspace.addresses.device}")


def check_like(
    op: str, name: str, tensor: torch.Tensor | None, x: torch.Tensor, shape: Sequence[int]
) -> None:
    """That ``tensor`` has this shape, the dtype and device of ``x``, and is contiguous, or None.

    Raises:
        UsageError: otherwise; the message says what it is and what it should be.
    """
    if tensor is None:
        return
    if (tuple(tensor.shape), tensor.dtype, tensor.device) != (tuple(shape), x.dtype, x.device):
        raise UsageError(
            f"{op}: {name} is {tensor.dtype}{list(tensor.shape)} on {tensor.device}; with this x "
            f"it must be {x.dtype}{list(shape)} on {x.device}"
        )
    if not tensor.is_contiguous():
        raise UsageError(f"{op}: {name} must be contiguous")


def aligned(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """``tensor``, or a copy if it does not begin at a multiple of 16 bytes.

    For inputs of a sum across threads: Triton chooses the accesses by the alignment, and with them
    perhaps which thread adds what. All ranks must add alike, whatever their tensors' addresses.
    """
    if tensor is None or tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    return tensor.clone()


def check_aligned(op: str, name: str, tensor: torch.Tensor | None) -> None:
    """That an output begins at a multiple of 16 bytes, or is None; see :func:`aligned`.

    Raises:
        UsageError: it does not.
    """
    if tensor is not None and tensor.data_ptr() % ALIGNMENT:
        raise UsageError(
            f"{op}: {name} must begin at a multiple of {ALIGNMENT} bytes; it begins at "
            f"{tensor.data_ptr():#x}"
        )


def check_fits_slot(op: str, what: str, nbytes: int, layout: Layout) -> None:
    """That a slot can hold ``what``, ``nbytes`` bytes.

    Raises:
        BackendUnavailable: it cannot; the message says which workspace would do.
    """
    if nbytes <= layout.slot_bytes:
        return
    slot = round_up(nbytes, SLOT_ALIGNMENT)
    needed = Layout(layout.world_size, slot, layout.max_blocks).nbytes
    raise BackendUnavailable(
        f"{op}: {what} has {nbytes} bytes, a slot of the workspace {layout.slot_bytes}; make the "
        f"communicator with Communicator(workspace_bytes={needed}) or more"
    )


def check_device(kernel, x: torch.Tensor) -> None:
    """That ``kernel`` runs where ``x`` is.

    Raises:
        BackendUnavailable: CPU tensors, and Triton's interpreter is off.
    """
    if x.device.type == "cpu" and isinstance(kernel, triton.JITFunction):
        raise BackendUnavailable(
            "the triton backend serves CPU tensors only in Triton's interpreter: set "
            "TRITON_INTERPRET=1 in the environment before the program starts"
        )


@triton.jit
def wait_for_predecessor(OVERLAP: tl.constexpr, SUCCESSOR_EARLY: tl.constexpr):
    """What a kernel begins with that may be launched before its predecessor has ended.

    As that of ``csrc/gpu/protocol.cuh``. The successor may be launched from here on; with
    SUCCESSOR_EARLY before the predecessor has ended. That is for kernels between one that lets
    nobody start before it has waited itself and a GEMM of ours, which then fetches its weights
    meanwhile: nothing waits for other ranks there, and the GEMM ends the row of early kernels.
    """
    if OVERLAP:
        if SUCCESSOR_EARLY:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
        if not SUCCESSOR_EARLY:
            tl.extra.cuda.gdc_launch_dependents()


@functools.cache
def _can_overlap(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def overlap(x: torch.Tensor) -> dict[str, bool]:
    """Options of a launch on the device of ``x`` that lets it start early, where GPUs can.

    The kernel begins with :func:`wait_for_predecessor`.
    """
    can = _can_overlap(x.device)
    return {"OVERLAP": can, "launch_pdl": can}
