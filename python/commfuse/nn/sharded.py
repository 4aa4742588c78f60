"""State dicts of modules that hold a part of each parameter, in a layout of their own."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from commfuse import ops
from commfuse.errors import UsageError
from commfuse.nn.sharding import Slice
from commfuse.runtime.communicator import Communicator


class ShardedModule(nn.Module, ABC):
    """A module that stands for an unsharded one, under the same names.

    Its ``state_dict()`` has the unsharded module's keys and this rank's parts as values, copied.
    ``load_state_dict()`` takes the unsharded tensors and cuts its parts out of them; what
    ``state_dict()`` gave on this rank is taken as it is.

    Attributes:
        slices: by key of the unsharded module's state dict, the part that this rank holds. Empty
            for a module that was made from parts: it has no state dict.
        loaded: whether there are weights; not, for a module made from one on torch's meta device,
            until they are loaded.
        dtype: of the weights, whatever the tensors have that are loaded; None: theirs.
        has_keys: whether its keys are in a state dict; not, for a member of a
            :class:`ShardedGroup`, which has them under its own name.
    """

    def __init__(self, slices: Mapping[str, Slice]):
        super().__init__()
        self.slices = dict(slices)
        self.loaded = not self.slices
        self.dtype: torch.dtype | None = None
        self.has_keys = True

    @abstractmethod
    def parts(self) -> dict[str, torch.Tensor]:
        """Copies of this rank's parts, by the keys of ``slices``."""

    @abstractmethod
    def _take(self, parts: Mapping[str, torch.Tensor]) -> None:
        """Replaces them by ``parts``."""

    def load_parts(self, parts: Mapping[str, torch.Tensor]) -> None:
        """Takes this rank's parts, all at once.

        Args:
            parts: by the keys of ``slices``; none is kept, all are copied.

        Raises:
            UsageError: a part is missing, or has another shape than the slice.
        """
        for name, part in self.slices.items():
            given = tuple(parts[name].shape) if name in parts else "nothing"
            if given != part.local_shape:
                raise UsageError(f"{name}: {part.local_shape} is needed here, not {given}")
        with torch.no_grad():
            self._take({name: parts[name].to(self.dtype) for name in self.slices})
        self.loaded = True

    def load_from(self, module: nn.Module) -> None:
        """Takes this rank's parts of an unsharded module; of one on the meta device, its dtype."""
        full = {name: module.get_parameter(name).detach() for name in self.slices}
        self.dtype = next(iter(full.values())).dtype
        if not any(tensor.is_meta for tensor in full.values()):
            self.load_parts({name: part.of(full[name]) for name, part in self.slices.items()})

    def require_loaded(self) -> None:
        """Raises UsageError where there are no weights yet."""
        if not self.loaded:
            raise UsageError(
                f"this {type(self).__name__} has no weights: it was made from a module on the meta "
                "device; call load_state_dict with the unsharded tensors first"
            )

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self.slices and self.has_keys:
            self.require_loaded()
            for name, part in self.parts().items():
                destination[prefix + name] = part

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        if not self.has_keys:
            return
        given = {
            key.removeprefix(prefix): value
            for key, value in state_dict.items()
            if key.startswith(prefix)
        }
        if strict:
            unexpected_keys += [prefix + name for name in given if name not in self.slices]
        missing = [name for name in self.slices if name not in given]
        missing_keys += [prefix + name for name in missing]
        parts = {}
        for name, part in self.slices.items():
            shape = tuple(given[name].shape) if name in given else None
            if shape == part.shape:
                parts[name] = part.of(given[name])
            elif shape == part.local_shape:
                parts[name] = given[name]
            elif shape is not None:
                error_msgs.append(
                    f"{prefix}{name}: shape {shape}; the unsharded tensor has {part.shape}, the "
                    f"part of this rank {part.local_shape}"
                )
        if self.slices and len(parts) == len(self.slices):
            self.load_parts(parts)


class ShardedGroup(ShardedModule):
    """A module made of sharded ones that have other names or another number than its layers.

    Args:
        members: by what their keys begin with in the unsharded module's state dict: ``"o_proj."``
            for a layer of that name, ``""`` for one whose keys begin with names of layers. They
            must be made from whole layers all, or from parts all.
    """

    def __init__(self, members: Mapping[str, ShardedModule]):
        super().__init__(
            {
                prefix + name: part
                for prefix, member in members.items()
                for name, part in member.slices.items()
            }
        )
        self.loaded = all(member.loaded for member in members.values())
        for member in members.values():
            member.has_keys = False
        self._by_prefix = dict(members)

    def parts(self) -> dict[str, torch.Tensor]:
        return {
            prefix + name: part
            for prefix, member in self._by_prefix.items()
            for name, part in member.parts().items()
        }

    def _take(self, parts: Mapping[str, torch.Tensor]) -> None:
        for prefix, member in self._by_prefix.items():
            member.load_parts({name: parts[prefix + name] for name in member.slices})


def require_children(
    module: nn.Module, children: tuple[str, ...], optional: tuple[str, ...] = ()
) -> None:
    """Refuses a module that a parallel one would not stand for.

    Raises:
        UsageError: a child is missing, or there are parameters outside these children.
    """
    missing = [name for name in children if getattr(module, name, None) is None]
    known = (*children, *optional)
    more = [name for name, _ in module.named_parameters() if name.partition(".")[0] not in known]
    if missing or more:
        what = f"has no {', '.join(missing)}" if missing else f"has {', '.join(more)} as well"
        raise UsageError(
            f"a module with {', '.join(children)} is needed here; {type(module).__name__} {what}"
        )


def gather_state_dict(module: nn.Module, comm: Communicator) -> dict[str, torch.Tensor]:
    """The unsharded state dict of a module, put together from all ranks.

    Args:
        module: one of this package, or any that holds such ones. What is not sharded in it is
            taken from this rank.
        comm: its ranks; all must call.

    Returns:
        The unsharded tensors by the unsharded module's keys, the same on every rank; on the CPU
        copies, bit for bit what was loaded (in the module's dtype).

    Raises:
        UsageError: a part of the module has no weights yet.

    Example:
        >>> state = gather_state_dict(block, comm)
        >>> if comm.rank == 0:
        ...     safetensors.torch.save_file(state, "block.safetensors")
    """
    state = module.state_dict()
    mine = {
        f"{prefix}.{name}" if prefix else name: part
        for prefix, member in module.named_modules()
        if isinstance(member, ShardedModule) and member.has_keys
        for name, part in member.slices.items()
    }
    by_rank = [mine] * comm.world_size
    if comm.world_size > 1:
        dist.all_gather_object(by_rank, mine, group=comm.group)
    for key, part in mine.items():
        parts = [slices[key] for slices in by_rank]
        # A part that is whole here may be none on another rank, so that all must be asked.
        if any(other.local_shape != part.shape for other in parts):
            state[key] = _gather(state[key], parts, comm)
    return state


def _gather(tensor: torch.Tensor, parts: list[Slice], comm: Communicator) -> torch.Tensor:
    """An unsharded tensor, of which each rank has the part that the list says."""
    sizes = [math.prod(part.local_shape) for part in parts]
    padded = tensor.new_zeros(max(sizes))
    padded[: tensor.numel()] = tensor.flatten()
    every = ops.all_gather(padded, comm).unflatten(0, (comm.world_size, -1))
    full = tensor.new_empty(parts[0].shape)
    for part, size, row in zip(parts, sizes, every, strict=True):
        part.of(full).copy_(row[:size].view(part.local_shape))
    return full
