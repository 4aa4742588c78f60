"""Pipeline stages: which layers of a model each of them holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from commfuse.errors import UsageError
from commfuse.models.config import ModelConfig
from commfuse.nn import Span


@dataclass(frozen=True)
class Stage:
    """One stage of a pipeline.

    Attributes:
        index: its place, 0 for the one that embeds.
        count: stages of the pipeline.
        layers: that it holds.
    """

    index: int
    count: int
    layers: Span

    @property
    def first(self) -> bool:
        """Whether it holds the embedding."""
        return self.index == 0

    @property
    def last(self) -> bool:
        """Whether it holds the head."""
        return self.index == self.count - 1


@dataclass(frozen=True)
class StageCosts:
    """What the parts of a model cost in a decoding pass, nanoseconds.

    Integers, so that all ranks cut alike by the same ones.

    Attributes:
        embedding_ns: of the first stage.
        layer_ns: of each layer.
        head_ns: of the last stage, the drawing of tokens included.
    """

    embedding_ns: int
    layer_ns: int
    head_ns: int


def layer_weights(config: ModelConfig) -> int:
    """Elements of the matrices of a layer: what a decoding step reads of it."""
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    attention = config.hidden_size * (heads + config.num_heads * config.head_dim)
    return attention + 3 * config.hidden_size * config.intermediate_size


def estimate_costs(config: ModelConfig) -> StageCosts:
    """Costs in proportion to the weights that a decoding step reads; of the embedding, almost none.

    Not in nanoseconds: a unit is the time that it takes to read an element.
    """
    return StageCosts(0, layer_weights(config), config.vocab_size * config.hidden_size)


def cut_stages(
    config: ModelConfig,
    pp: int,
    split: Sequence[int] | None = None,
    *,
    costs: StageCosts | None = None,
) -> list[Stage]:
    """Cuts a model so that the costliest stage costs as little as can be, or as asked for.

    All ranks must be given the same.

    Args:
        config: of the model.
        pp: stages.
        split: layers of each stage; None: by cost.
        costs: as :func:`~commfuse.models.stage_costs.measure_costs` finds them; None:
            :func:`estimate_costs`.

    Raises:
        UsageError: more stages than layers, or a split that does not add up; the message says what
            would work.

    Example:
        >>> [len(stage.layers) for stage in cut_stages(config, 2)]  # of SmolLM2-135M
        [19, 11]
    """
    if pp > config.num_layers:
        raise UsageError(
            f"{pp} pipeline stages are impossible for a model with {config.num_layers} layers: "
            f"every stage needs one at least; use 1 to {config.num_layers}"
        )
    costs = costs or estimate_costs(config)
    counts = list(split) if split is not None else _counts(config.num_layers, pp, costs)
    if len(counts) != pp or min(counts) < 1 or sum(counts) != config.num_layers:
        raise UsageError(
            f"the split {', '.join(map(str, counts))} does not cut {config.num_layers} layers into "
            f"{pp} stages: give {pp} numbers, 1 at least, that add up to {config.num_layers}"
        )
    begins = [sum(counts[:index]) for index in range(pp + 1)]
    return [Stage(index, pp, Span(begins[index], begins[index + 1])) for index in range(pp)]


def _counts(layers: int, pp: int, costs: StageCosts) -> list[int]:
    counts, loads = [1] * pp, [costs.layer_ns] * pp
    loads[0] += costs.embedding_ns
    loads[-1] += costs.head_ns
    for _ in range(layers - pp):
        # As layers cost the same, this is the best cut, not only a good one.
        lightest = min(range(pp), key=lambda stage: loads[stage])
        counts[lightest] += 1
        loads[lightest] += costs.layer_ns
    return counts


def parse_split(text: str | None) -> tuple[int, ...] | None:
    """Layers of each stage, from ``19,11``; None for None.

    Raises:
        UsageError: not numbers with commas between them.

    Example:
        >>> parse_split("19,11")
        (19, 11)
    """
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--pp-split {text}: the layers of each stage, as in 19,11") from None
