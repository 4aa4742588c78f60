"""State dicts of modules that hold a part of each parameter, in a layout of their own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from commfuse.errors import UsageError
from commfuse.nn.sharding import Slice


class ShardedModule(nn.Module):
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
    """

    def __init__(self, slices: Mapping[str, Slice]):
        super().__init__()
        self.slices = dict(slices)
        self.loaded = not self.slices
        self.dtype: torch.dtype | None = None

    def parts(self) -> dict[str, torch.Tensor]:
        """Copies of this rank's parts, by the keys of ``slices``."""
        raise NotImplementedError  # each kind of layer has its own, as of _take()

    def _take(self, parts: Mapping[str, torch.Tensor]) -> None:
        raise NotImplementedError

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
            self._take({name: part.to(self.dtype) for name, part in parts.items()})
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
        if self.slices:
            self.require_loaded()
            for name, part in self.parts().items():
                destination[prefix + name] = part

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
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
