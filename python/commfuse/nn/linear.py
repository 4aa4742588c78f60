"""Linear layers, cut by output features or input features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from commfuse import _extension, ops
from commfuse.errors import UsageError
from commfuse.nn.sharded import ShardedModule
from commfuse.nn.sharding import Slice, Span, split
from commfuse.ops import PackedWeight
from commfuse.ops.matmul import LANES
from commfuse.runtime.communicator import Communicator


def _prepare(weight: torch.Tensor) -> PackedWeight | torch.Tensor:
    """Packed where the CPU kernels will read it, else as it is."""
    if weight.device.type == "cpu" and _extension.module is not None:
        return ops.pack_weight(weight)
    return weight


def _prepare_gated(gate: torch.Tensor, up: torch.Tensor) -> PackedWeight | torch.Tensor:
    """The two input weights of a gated MLP as one, as :func:`_prepare`."""
    if gate.device.type == "cpu" and _extension.module is not None:
        return ops.pack_gate_up(gate, up)
    return torch.cat((gate, up))


def flat_rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., features] as the kernels take it, contiguous [rows, features]; most often a view."""
    return x.flatten(0, -2).contiguous()


class ShardedLinear(ShardedModule):
    """A weight, with or without a bias, of which ``slices`` says what part it is."""

    def __init__(
        self,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        slices: Mapping[str, Slice],
    ):
        super().__init__(slices)
        self.weight = None if weight is None else _prepare(weight)
        self.bias = bias

    def parts(self) -> dict[str, torch.Tensor]:
        packed = isinstance(self.weight, PackedWeight)
        parts = {"weight": self.weight.unpack() if packed else self.weight.clone()}
        if self.bias is not None:
            parts["bias"] = self.bias.clone()
        return parts

    def _take(self, parts: Mapping[str, torch.Tensor]) -> None:
        self._assign(_prepare(parts["weight"]), parts.get("bias"))

    def _assign(self, weight: PackedWeight | torch.Tensor, bias: torch.Tensor | None) -> None:
        if self.weight is None:
            own = isinstance(weight, PackedWeight)
            self.weight = weight if own else weight.clone()
            self.bias = None if bias is None else bias.clone()
            return
        # Others may hold these tensors: a tied head, the weights of a block.
        if isinstance(weight, PackedWeight):
            self.weight.data.copy_(weight.data)
        else:
            self.weight.copy_(weight)
        if bias is not None:
            self.bias.copy_(bias)


def slices_of(linear: nn.Linear, rows: slice, columns: slice | None = None) -> dict[str, Slice]:
    """Of the weight and of the bias, which columns do not cut."""
    if type(linear) is not nn.Linear:
        raise UsageError(f"torch.nn.Linear is needed here, not {type(linear).__name__}")
    slices = {"weight": Slice(tuple(linear.weight.shape), rows, columns)}
    if linear.bias is not None:
        slices["bias"] = Slice(tuple(linear.bias.shape), rows)
    return slices


class ColumnParallelLinear(ShardedLinear):
    """y = x wᵀ (+ bias) for the output features of this rank; no communication.

    Args:
        weight: [features of this rank, in_features].
        bias: [features of this rank] or None.

    Example:
        >>> y = ColumnParallelLinear(weight[span.begin:span.end])(x)
    """

    def __init__(
        self,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None = None,
        *,
        slices: Mapping[str, Slice] | None = None,
    ):
        super().__init__(weight, bias, slices or {})

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, comm: Communicator, rows: Span | None = None
    ) -> ColumnParallelLinear:
        """This rank's part of a layer that every rank has whole, or on torch's meta device.

        Args:
            linear: weight [out_features, in_features].
            comm: the ranks.
            rows: the output features of this rank; None: as even as possible.

        Raises:
            UsageError: not a ``torch.nn.Linear`` but a subclass or something else.

        Example:
            >>> up = ColumnParallelLinear.from_linear(nn.Linear(512, 2048), comm)
        """
        rows = rows or split(linear.out_features, comm.world_size, comm.rank)
        layer = cls(None, slices=slices_of(linear, rows.scaled(1)))
        layer.load_from(linear)
        return layer

    def forward(self, x: torch.Tensor, float32_out: bool = False) -> torch.Tensor:
        """x: [..., in_features] -> [..., features of this rank]."""
        self.require_loaded()
        y = ops.matmul(flat_rows(x), self.weight, self.bias, float32_out=float32_out)
        return y.unflatten(0, x.shape[:-1])


class MergedColumnParallelLinear(ColumnParallelLinear):
    """Several column-parallel layers of the same input, such as Q, K and V, as one GEMM.

    Its state dict has the layers' keys behind their names: ``q_proj.weight``.

    Args:
        weight: [features of this rank, in_features]: those of the first layer, then the next.
        bias: [features of this rank] or None.

    Example:
        >>> qkv = MergedColumnParallelLinear(torch.cat((q, k, v)))
    """

    @classmethod
    def from_linears(
        cls,
        linears: Mapping[str, nn.Linear],
        comm: Communicator,
        rows: Mapping[str, Span] | None = None,
    ) -> MergedColumnParallelLinear:
        """This rank's part of layers that every rank has whole, or on torch's meta device.

        Args:
            linears: by name, weight [out_features, in_features] each.
            comm: the ranks.
            rows: by name, the output features of this rank; None: as even as possible.

        Raises:
            UsageError: not all are a ``torch.nn.Linear``; some have a bias and others none; they
                have different input features.

        Example:
            >>> layers = {"key": nn.Linear(512, 128), "value": nn.Linear(512, 128)}
            >>> merged = MergedColumnParallelLinear.from_linears(layers, comm)
            >>> key, value = merged(x).split(merged.widths, dim=-1)
        """
        layer = cls(None, slices=_merged_slices(linears, comm, rows))
        layer.load_from(nn.ModuleDict(linears))
        return layer

    @property
    def widths(self) -> list[int]:
        """Features of this rank, of each layer."""
        weights = [part for name, part in self.slices.items() if name.endswith(".weight")]
        return [part.local_shape[0] for part in weights]

    def parts(self) -> dict[str, torch.Tensor]:
        pieces = {kind: tensor.split(self.widths) for kind, tensor in super().parts().items()}
        return _named(self.slices, pieces)

    def _take(self, parts: Mapping[str, torch.Tensor]) -> None:
        weights, biases = _of_kind(parts, "weight"), _of_kind(parts, "bias")
        self._assign(_prepare(torch.cat(weights)), torch.cat(biases) if biases else None)


def _merged_slices(
    linears: Mapping[str, nn.Linear], comm: Communicator, rows: Mapping[str, Span] | None
) -> dict[str, Slice]:
    """Of all weights and biases, those of a layer behind its name."""
    slices = {}
    for name, linear in linears.items():
        if type(linear) is not nn.Linear:
            raise UsageError(f"{name} must be a torch.nn.Linear, not a {type(linear).__name__}")
        span = rows[name] if rows else split(linear.out_features, comm.world_size, comm.rank)
        of_layer = slices_of(linear, span.scaled(1))
        slices |= {f"{name}.{kind}": part for kind, part in of_layer.items()}
    inputs = {name: linear.in_features for name, linear in linears.items()}
    if len(set(inputs.values())) > 1:
        raise UsageError(f"layers of one input are needed here; their features are {inputs}")
    biased = [name for name, linear in linears.items() if linear.bias is not None]
    if biased and len(biased) < len(linears):
        raise UsageError(
            f"of {', '.join(linears)} only {', '.join(biased)} has a bias: give one to all, of "
            "zeros where need be, or to none"
        )
    return slices


def _of_kind(parts: Mapping[str, torch.Tensor], kind: str) -> list[torch.Tensor]:
    return [part for name, part in parts.items() if name.endswith(f".{kind}")]


def _named(
    slices: Mapping[str, Slice], pieces: Mapping[str, Sequence[torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Copies of the layers' weights and biases, by name."""
    left = {kind: iter(tensors) for kind, tensors in pieces.items()}
    return {name: next(left[name.rpartition(".")[2]]).clone() for name in slices}


class GatedColumnParallelLinear(ShardedModule):
    """silu(x gateᵀ) · (x upᵀ) for the features of this rank, as one GEMM.

    Its state dict has the layers' keys behind their names: ``gate_proj.weight``.

    Args:
        gate, up: [features of this rank, in_features] each.
        gate_bias, up_bias: [features of this rank] each, or None both.
    """

    def __init__(
        self,
        gate: torch.Tensor | None,
        up: torch.Tensor | None,
        gate_bias: torch.Tensor | None = None,
        up_bias: torch.Tensor | None = None,
        *,
        slices: Mapping[str, Slice] | None = None,
    ):
        super().__init__(slices or {})
        self.weight = None if gate is None else _prepare_gated(gate, up)
        self.bias = None if gate_bias is None else self._ordered(gate_bias, up_bias)

    @classmethod
    def from_linears(
        cls, linears: Mapping[str, nn.Linear], comm: Communicator, rows: Span | None = None
    ) -> GatedColumnParallelLinear:
        """This rank's part of layers that every rank has whole, or on torch's meta device.

        Args:
            linears: by name the gate and the layer it gates, weight [features, in_features] each.
            comm: the ranks.
            rows: the features of this rank; None: as even as possible.

        Raises:
            UsageError: not two layers of one shape; else as
                :meth:`MergedColumnParallelLinear.from_linears`.

        Example:
            >>> layers = {"w1": nn.Linear(512, 2048), "w3": nn.Linear(512, 2048)}
            >>> gated = GatedColumnParallelLinear.from_linears(layers, comm)
        """
        spans = None if rows is None else dict.fromkeys(linears, rows)
        slices = _merged_slices(linears, comm, spans)
        features = [linear.out_features for linear in linears.values()]
        if len(features) != 2 or features[0] != features[1]:
            raise UsageError(
                f"a gate and a layer of as many features are needed here, not {features} features"
            )
        layer = cls(None, None, slices=slices)
        layer.load_from(nn.ModuleDict(linears))
        return layer

    def parts(self) -> dict[str, torch.Tensor]:
        packed = isinstance(self.weight, PackedWeight)
        pieces = {"weight": self._separate(self.weight.unpack() if packed else self.weight)}
        if self.bias is not None:
            pieces["bias"] = self._separate(self.bias)
        return _named(self.slices, pieces)

    def _ordered(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Biases in the order of the weight's rows."""
        if not isinstance(self.weight, PackedWeight):
            return torch.cat((gate, up))
        return ops.pack_gate_up(gate[:, None], up[:, None]).unpack().flatten()

    def _separate(self, both: torch.Tensor) -> list[torch.Tensor]:
        if not isinstance(self.weight, PackedWeight):
            return list(both.chunk(2))
        pairs = both.unflatten(0, (-1, 2, LANES))
        return [pairs[:, half].flatten(0, 1)[: self.weight.out_features] for half in (0, 1)]

    def _take(self, parts: Mapping[str, torch.Tensor]) -> None:
        weight, biases = _prepare_gated(*_of_kind(parts, "weight")), _of_kind(parts, "bias")
        first = self.weight is None
        if first:
            self.weight = weight
        bias = self._ordered(*biases) if biases else None
        if first:
            self.bias = bias
            return
        # A block's weights may hold these tensors.
        self.weight.data.copy_(weight.data)
        if bias is not None:
            self.bias.copy_(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in_features] -> [..., features of this rank]."""
        self.require_loaded()
        return ops.gated_matmul(flat_rows(x), self.weight, self.bias).unflatten(0, x.shape[:-1])


class RowParallelLinear(ShardedLinear):
    """Sum over ranks of x wᵀ (+ bias), with the residual and the RMSNorm that may follow.

    Args:
        weight: [out_features, in_features of this rank].
        comm: the ranks that hold the other input features.
        bias: [out_features], whole on every rank, or None.

    Example:
        >>> h, residual = RowParallelLinear(weight, comm)(x, residual, norm_weight, eps)
    """

    def __init__(
        self,
        weight: torch.Tensor | None,
        comm: Communicator,
        bias: torch.Tensor | None = None,
        *,
        slices: Mapping[str, Slice] | None = None,
    ):
        super().__init__(weight, bias, slices or {})
        self.comm = comm

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, comm: Communicator, columns: Span | None = None
    ) -> RowParallelLinear:
        """This rank's part of a layer that every rank has whole, or on torch's meta device.

        Args:
            linear: weight [out_features, in_features].
            comm: the ranks.
            columns: the input features of this rank; None: as even as possible.

        Raises:
            UsageError: not a ``torch.nn.Linear`` but a subclass or something else.

        Example:
            >>> down = RowParallelLinear.from_linear(nn.Linear(2048, 512), comm)
        """
        columns = columns or split(linear.in_features, comm.world_size, comm.rank)
        rows = slice(0, linear.out_features)
        layer = cls(None, comm, slices=slices_of(linear, rows, columns.scaled(1)))
        layer.load_from(linear)
        return layer

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        norm_weight: torch.Tensor | None = None,
        eps: float = 1e-6,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """As :func:`commfuse.ops.matmul_all_reduce`; without a norm x is [..., k]."""
        self.require_loaded()
        if norm_weight is None:
            rows = None if residual is None else flat_rows(residual)
            y = ops.matmul_all_reduce(
                flat_rows(x), self.weight, self.comm, bias=self.bias, residual=rows
            )
            return y.unflatten(0, x.shape[:-1])
        return ops.matmul_all_reduce(
            x,
            self.weight,
            self.comm,
            bias=self.bias,
            residual=residual,
            norm_weight=norm_weight,
            eps=eps,
        )
