"""RMSNorm, whose weight every rank holds whole."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from commfuse.errors import UsageError
from commfuse.nn.sharded import ShardedModule
from commfuse.nn.sharding import Slice


class RMSNorm(ShardedModule):
    """x / sqrt(mean(x²) + eps) · weight (Zhang and Sennrich, "Root Mean Square Layer
    Normalization", 2019).

    In a tensor-parallel model it is seldom called: the all-reduce or the embedding in front of it
    takes its ``weight`` and computes it.

    Args:
        weight: [features].
        eps: added to the mean.
    """

    def __init__(
        self,
        weight: torch.Tensor | None,
        eps: float = 1e-6,
        *,
        slices: Mapping[str, Slice] | None = None,
    ):
        super().__init__(slices or {})
        self.weight = weight
        self.eps = eps

    @classmethod
    def from_norm(cls, norm: nn.Module) -> RMSNorm:
        """The same norm, of one that every rank has, or of one on torch's meta device.

        Args:
            norm: a ``torch.nn.RMSNorm`` over one dimension, or one of the transformers library
                that multiplies by its weight (``variance_epsilon``).

        Raises:
            UsageError: it has no ``eps`` or ``variance_epsilon``, or other parameters than a weight
                [features].

        Example:
            >>> norm = RMSNorm.from_norm(nn.RMSNorm(512, eps=1e-5))
        """
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        shapes = {name: tuple(parameter.shape) for name, parameter in norm.named_parameters()}
        if list(shapes) != ["weight"] or len(shapes["weight"]) != 1 or eps is None:
            raise UsageError(
                f"an RMSNorm with eps and a weight [features] is needed here, not a "
                f"{type(norm).__name__} with eps {eps} and parameters {shapes}"
            )
        size = shapes["weight"][0]
        made = cls(None, eps, slices={"weight": Slice((size,), slice(0, size))})
        made.load_from(norm)
        return made

    def parts(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight.clone()}

    def _take(self, parts: Mapping[str, torch.Tensor]) -> None:
        if self.weight is None:
            self.weight = parts["weight"].clone()
        else:
            self.weight.copy_(parts["weight"])  # others may hold it: the weights of a block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., features] -> the same, normalised."""
        self.require_loaded()
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
