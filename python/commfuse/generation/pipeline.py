"""What the stages of a pipeline tell each other: activations forwards, new tokens to all."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from commfuse import ops
from commfuse.errors import UsageError
from commfuse.models.llama import Llama
from commfuse.runtime.channel import MOST_SLOTS, Channel
from commfuse.runtime.communicator import Communicator

# Of a row of logits, int64 each: the token, how many drafts of its request were accepted, and the
# bits of its log-probability in float64.
RESULT_COLUMNS = 3


class Pipeline:
    """One rank's ends of the channels between the stages of a model.

    Every stage makes the same passes in the same order, so that each knows how many rows come next.
    The residual of a pass goes from stage to stage. What the last stage has drawn goes to the first
    in one message, and from there on along the stages, so that all take the same decisions.

    Args:
        model: this rank's part of its stage.
        comm: over the stages, one rank of each; None: the model is whole.
        rows: the most tokens of a pass.

    Raises:
        UsageError: the communicator has another number of ranks than the model stages, or the
            stages' layers do not follow each other.

    Attributes:
        passes: that may be under way at once.

    Example:
        >>> with init_mesh(tp=1, pp=2) as mesh:
        ...     stage = cut_stages(checkpoint.config, 2)[mesh.pp.rank]
        ...     model = Llama(checkpoint, mesh.tp, stage=stage)
        ...     Generator(model, Pipeline(model, mesh.pp)).generate([prompt_ids], 64)
    """

    def __init__(self, model: Llama, comm: Communicator | None = None, rows: int = 512):
        self.stage, self.comm, self.rows = model.stage, comm, rows
        stages = 1 if comm is None else comm.world_size
        index = 0 if comm is None else comm.rank
        if (stages, index) != (model.stage.count, model.stage.index):
            raise UsageError(
                f"the model is stage {model.stage.index} of {model.stage.count}, and the "
                f"communicator's rank {index} of {stages}"
            )
        spans = [(0, 0), *self.gather((model.stage.layers.begin, model.stage.layers.end))]
        ends = [*(begin for begin, _ in spans[1:]), model.config.num_layers]
        if any(end != begin for (_, end), begin in zip(spans, ends, strict=True)):
            held = ", ".join(f"{begin} to {end - 1}" for begin, end in spans[1:])
            raise UsageError(
                f"the stages hold layers {held} of {model.config.num_layers}: each must begin "
                "where the one before ends; cut the model alike on all ranks"
            )
        self.passes = min(2 * stages, MOST_SLOTS)
        self._abandoned = False
        self._mine: deque[torch.Tensor] = deque()  # the last stage's results, until they are due
        self._forward: dict[int, Channel] = {}  # by the stage where they begin
        self._results: dict[int, Channel] = {}
        last = stages - 1
        for source in range(last):
            sizes = {"rows": rows, "columns": model.config.hidden_size, "dtype": model.dtype}
            self._forward[source] = Channel(comm, source, source + 1, **sizes)
        for source in [last, *range(last - 1)] if last else []:
            # Bits are copied as they are: two float32 carry an int64. The last stage must never
            # wait for the first, which may be waiting for it.
            sizes = {"rows": rows, "columns": 2 * RESULT_COLUMNS, "dtype": torch.float32}
            target = (source + 1) % stages
            self._results[source] = Channel(comm, source, target, slots=self.passes, **sizes)

    @property
    def source(self) -> Channel | None:
        """What brings the residual from the stage before."""
        return self._forward.get(self.stage.index - 1)

    @property
    def target(self) -> Channel | None:
        """What takes the residual to the next stage."""
        return self._forward.get(self.stage.index)

    def expect(self, rows: int) -> None:
        """Asks for the residual of a pass before its turn, so that it can arrive meanwhile.

        Raises:
            UsageError: passes were abandoned.
        """
        if self._abandoned:
            raise UsageError(
                "a generation has failed midway, and its messages are still between the stages: "
                "make a new Pipeline, over a new communicator"
            )
        if self.source is not None:
            self.source.post(rows)

    def idle_seconds(self) -> float:
        """Seconds that this stage has spent on messages: almost all of it waiting for others."""
        return 0.0 if self.comm is None else self.comm.statistics().communication_seconds

    def publish(self, results: torch.Tensor) -> None:
        """The last stage's: int64 [rows, RESULT_COLUMNS] of a pass, for all stages."""
        self._mine.append(results)
        self._pass_on(results)

    def collect(self, rows: int) -> torch.Tensor:
        """The results of the oldest pass that were not collected, int64 [rows, RESULT_COLUMNS]."""
        if self.stage.last:
            return self._mine.popleft()
        channel = self._results[(self.stage.index - 1) % self.stage.count]
        results = ops.recv(rows, channel).view(torch.int64)
        self._pass_on(results)
        return results

    def abandon(self) -> None:
        """Forgets the passes under way; what is under way between stages stays there."""
        self._mine.clear()
        self._abandoned = self.stage.count > 1

    def _pass_on(self, results: torch.Tensor) -> None:
        if self.stage.index in self._results:
            ops.send(results.view(torch.float32), self._results[self.stage.index])

    def gather(self, value: Any) -> list[Any]:
        """Every stage's value, on every stage."""
        return [value] if self.comm is None else self.comm.gather(value)
