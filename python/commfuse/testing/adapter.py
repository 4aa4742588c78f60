"""What a test or a benchmark must know about an op: the interface; one subclass an op follows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from commfuse import ops
from commfuse.runtime.communicator import Communicator
from commfuse.testing.cases import Case

Inputs = dict[str, Any]  # of one rank: tensors by name
Outputs = tuple[torch.Tensor, ...]
EPS = 1e-5  # of RMSNorm


class Adapter(ABC):
    """One op.

    Attributes:
        op: its name.
        packs_weight: whether the ``cpu`` backend takes a packed weight, made by :meth:`prepare`.
        exact: whether its results on inputs made with ``integers`` are exact.
        scattered: whether every rank gets a part of its own of the results; see :meth:`share`.
        one_message: whether the ranks exchange their messages of :meth:`message_bytes` and nothing
            else; the message is then proportional to the rows of ``x``.
    """

    op: ClassVar[str]
    packs_weight: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    scattered: ClassVar[bool] = False
    one_message: ClassVar[bool] = False

    def __init__(self, case: Case, dtype: torch.dtype, world_size: int, device: str = "cpu"):
        self.case, self.dtype, self.world_size, self.device = case, dtype, world_size, device

    def inputs(self, *, seed: int = 0, integers: bool = False) -> list[Inputs]:
        """The inputs of every rank, in rank order, on this adapter's device.

        Args:
            seed: of the random numbers.
            integers: small ones, whose sums are exact in every dtype and any order; for ops with
                ``exact``.
        """
        if integers and not self.exact:
            raise ValueError(f"{self.op} is not exact on integers")
        source = {
            "generator": torch.Generator(self.device).manual_seed(seed),
            "device": self.device,
        }

        def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
            if integers:
                bound = max(1, 128 // self.world_size)
                return torch.randint(-bound, bound + 1, shape, **source).to(self.dtype)
            return torch.randn(shape, **source).mul_(scale).to(self.dtype)

        return self.make(random)

    @abstractmethod
    def make(self, random) -> list[Inputs]:
        """As :meth:`inputs`, from a source of random tensors ``random(*shape, scale=1.0)``."""

    def prepare(self, inputs: Inputs, backend: str) -> Inputs:
        """A rank's inputs as a backend takes them: what is done once, not in every call."""
        if self.packs_weight and backend == "cpu":
            return {**inputs, "w": ops.pack_weight(inputs["w"])}
        return inputs

    @abstractmethod
    def call(self, inputs: Inputs, comm: Communicator, backend: str) -> Outputs:
        """Calls the op on this rank with prepared inputs."""

    @abstractmethod
    def reference(self, inputs: list[Inputs]) -> Outputs:
        """What all ranks should get, in float64."""

    def share(self, results: Outputs, rank: int) -> Outputs:
        """What a rank should get of :meth:`reference` or :meth:`composition`: all, or its rows."""
        if not self.scattered:
            return results
        return tuple(whole.tensor_split(self.world_size)[rank] for whole in results)

    @abstractmethod
    def composition(self, inputs: list[Inputs]) -> Outputs:
        """The same by plain torch calls in the same dtype, the ranks' parts summed in order."""

    def message_bytes(self) -> int:
        """What each rank contributes to the communication of one call, bytes."""
        return 0

    def streamed_bytes(self) -> int:
        """What each rank reads of its weight or KV cache in one call, bytes; 0 without either."""
        return 0

    def without_rows(self, inputs: Inputs) -> Inputs:
        """Prepared inputs of a call that has nothing to send; for ops with ``one_message``."""
        rows = {
            name: inputs[name][:0] for name in ("x", "residual") if inputs.get(name) is not None
        }
        return {**inputs, **rows}

    def duplicate(self, inputs: Inputs, backend: str) -> Inputs:
        """As :meth:`prepare`, with weights in memory of their own."""
        own = {name: inputs[name].clone() for name in ("w", "up") if name in inputs}
        return self.prepare({**inputs, **own}, backend)

    def sum_in_order(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """The parts added up in their own dtype, rounded after every addition."""
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total
