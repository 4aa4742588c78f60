"""What a pass needs to know, as the numbers of one tensor, and the sizes that it is padded to."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from commfuse.generation.requests import Pass
from commfuse.ops import Sampling

LEAST_SPAN = 1024  # positions of the smallest decoding graph
_BITS_OF_ONE = 0x3FF0000000000000  # of 1.0 in float64


def bucket(count: int) -> int:
    """What ``count`` requests or rows are padded to: a power of two, from 16 a multiple of 16.

    Example:
        >>> [bucket(count) for count in (1, 3, 9, 33)]
        [1, 4, 16, 48]
    """
    return 1 << (count - 1).bit_length() if count <= 16 else -(-count // 16) * 16


def bucket_span(length: int, most: int) -> int:
    """What the longest sequence is taken for: a power of two, or all of the cache.

    Example:
        >>> bucket_span(1500, 4096)
        2048
    """
    return min(max(LEAST_SPAN, 1 << (length - 1).bit_length()), most)


class Sizes(NamedTuple):
    """Shapes of a pass's tensors.

    Attributes:
        rows: tokens.
        requests: that get new tokens.
        drafts: tokens of a draft; None in the prefill.
        span: of a decoding step, see :class:`~commfuse.ops.Placement`.
    """

    rows: int
    requests: int
    drafts: int | None
    span: int | None

    @property
    def widths(self) -> tuple[int, ...]:
        """Numbers of each field of :class:`Inputs`."""
        requests, drafts = self.requests, self.drafts or 0
        return (self.rows,) * 3 + (requests,) * 6 + (requests * drafts,)


class Inputs(NamedTuple):
    """All numbers of a pass, views of one int64 tensor: a pass takes one copy to a GPU.

    Attributes:
        tokens, sequences, positions: [rows].
        places: [requests], positions of the first tokens to be drawn.
        temperature, top_k, top_p, seed: [requests], of :class:`~commfuse.ops.Sampling`; those that
            are float64 there as their bits.
        counts: [requests]: in the prefill the row of each prompt's last token, else the length of
            each request's draft.
        drafts: [requests * drafts].
    """

    tokens: torch.Tensor
    sequences: torch.Tensor
    positions: torch.Tensor
    places: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    seed: torch.Tensor
    counts: torch.Tensor
    drafts: torch.Tensor

    @property
    def sampling(self) -> Sampling:
        """How each request's tokens are drawn."""
        float64 = torch.float64
        return Sampling.of_tensors(
            self.temperature.view(float64), self.top_k, self.top_p.view(float64), self.seed
        )


def numbers_of(
    a_pass: Pass, sizes: Sizes, options: Sequence[tuple[int, ...]], spare: int
) -> list[int]:
    """What :class:`Inputs` has, one field behind the other, each padded to its width.

    Args:
        a_pass: whose numbers.
        sizes: at least those that it needs.
        options: of each request, (temperature, top_k, top_p, seed) as :class:`Inputs` has them.
        spare: the sequence of the padding.
    """
    runs, requests = a_pass.runs, a_pass.requests
    own = [options[request.index] for request in requests]
    fields: list[Iterable[int]] = [
        [token for _, _, run in runs for token in run],
        [sequence for sequence, _, run in runs for _ in run],
        [first + offset for _, first, run in runs for offset in range(len(run))],
        [len(request.tokens) for request in requests],
        *([of[column] for of in own] for column in range(4)),
    ]
    if a_pass.drafts is None:
        fields += [_ends(a_pass), []]
    else:
        fields.append([len(draft) for draft in a_pass.drafts])
        pad = [-1] * sizes.drafts
        fields.append([token for draft in a_pass.drafts for token in (draft + pad)[: sizes.drafts]])
    padded = (
        itertools.islice(itertools.chain(field, itertools.repeat(value)), width)
        for field, value, width in zip(fields, padding(spare), sizes.widths, strict=True)
    )
    return list(itertools.chain.from_iterable(padded))


def padding(spare: int) -> tuple[int, ...]:
    """By field: token 0 at position 0 of the spare sequence, and the most probable one behind."""
    return 0, spare, 0, 1, 0, 0, _BITS_OF_ONE, 0, 0, -1


def _ends(prefill: Pass) -> list[int]:
    """The rows of the prompts' last tokens."""
    finished = {request.index for request in prefill.requests}
    # A sequence has one run in a pass; that of a finished prompt ends with its last token.
    behind = itertools.accumulate(len(run) for _, _, run in prefill.runs)
    return [
        end - 1
        for end, (sequence, _, _) in zip(behind, prefill.runs, strict=True)
        if sequence in finished
    ]
