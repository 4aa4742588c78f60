"""What drawing tokens from vocabulary shards needs: options, noise, and the draw in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from commfuse.errors import CommfuseError, UsageError
from commfuse.runtime import torch_collectives
from commfuse.runtime.communicator import Communicator

BLOCK = 128  # tokens that share one draw of noise; shards are cut at multiples of it
TARGET, DRAFT, ACCEPTANCE = range(3)  # streams of noise, independent of each other
LEAST_TEMPERATURE = 1e-4
_WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a batch of requests are drawn. Make it with :meth:`of`.

    Temperature comes first, then top-k, then top-p among what is left. Tokens whose logits are
    equal are kept or left out together: top-k may keep more than k where the k-th has equals.

    Attributes:
        temperature: float64 [batch]; 0: the largest logit's token, whatever the rest says.
        top_k: int64 [batch]; only the k largest logits are drawn; 0: all.
        top_p: float64 [batch], in (0, 1]; only the most probable tokens are drawn that have this
            probability together; 1: all.
        seed: int64 [batch]. A draw is a function of the request's seed, the token's position and
            the logits alone.

    Raises:
        UsageError: a value is out of range; the message names the request.

    Example:
        >>> Sampling.of(2, temperature=[0.7, 0.0], top_p=0.9, seed=[1, 2])
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    seed: torch.Tensor

    def __post_init__(self) -> None:
        for request, (t, k, p) in enumerate(
            zip(self.temperature.tolist(), self.top_k.tolist(), self.top_p.tolist(), strict=True)
        ):
            if t != 0 and not LEAST_TEMPERATURE <= t < math.inf:
                raise UsageError(
                    f"request {request}: temperature is {t:g}; use 0 for the most probable token, "
                    f"or at least {LEAST_TEMPERATURE:g}"
                )
            if k < 0:
                raise UsageError(f"request {request}: top_k is {k}; use 0 for all, or at least 1")
            if not 0 < p <= 1:
                raise UsageError(
                    f"request {request}: top_p is {p:g}; use more than 0 and at most 1"
                )

    def __len__(self) -> int:
        return len(self.temperature)

    @classmethod
    def of(
        cls,
        batch: int,
        *,
        temperature: float | Sequence[float] = 0.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 1.0,
        seed: int | Sequence[int] = 0,
    ) -> Sampling:
        """Options for ``batch`` requests, each one for all of them or one for each.

        Raises:
            UsageError: as the class; or there are more or fewer values than requests.
        """

        def entries(name: str, value, dtype: torch.dtype) -> torch.Tensor:
            values = list(value) if isinstance(value, Sequence) else [value] * batch
            if len(values) != batch:
                raise UsageError(f"{name} has {len(values)} values for {batch} requests")
            return torch.tensor(values, dtype=dtype)

        return cls(
            entries("temperature", temperature, torch.float64),
            entries("top_k", top_k, torch.int64),
            entries("top_p", top_p, torch.float64),
            entries("seed", seed, torch.int64),
        )

    def select(self, requests: Sequence[int]) -> Sampling:
        """The options of some of the requests, in this order."""
        index = torch.tensor(requests, dtype=torch.int64)
        return Sampling(*(x[index] for x in self.tensors))

    @classmethod
    def of_tensors(cls, *tensors: torch.Tensor) -> Sampling:
        """Options that lie on a device, in the order of :attr:`tensors`. Nobody looks at values."""
        made = object.__new__(Sampling)
        for name, tensor in zip(("temperature", "top_k", "top_p", "seed"), tensors, strict=True):
            object.__setattr__(made, name, tensor)
        return made

    def to(self, device: torch.device | str) -> Sampling:
        """The options on a device, where the logits are. Their values are not looked at again."""
        return Sampling.of_tensors(*(x.to(device) for x in self.tensors))

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """temperature, top_k, top_p, seed."""
        return self.temperature, self.top_k, self.top_p, self.seed

    @property
    def greedy(self) -> bool:
        """Whether no request draws."""
        return not self.temperature.any()


def noise(
    seed: int, position: int, stream: int, blocks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two independent uniform numbers in (0, 1) for each block: float64 [blocks] each.

    Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011), keyed by
    the seed, its counter made of the position, the block and the stream.
    """
    words = philox((position & _WORD, position >> 32, blocks, stream), (seed & _WORD, seed >> 32))
    low, high, low2, high2 = words
    first = ((high << 21 | low >> 11).double() + 0.5) * 2.0**-53
    return first, ((high2 << 21 | low2 >> 11).double() + 0.5) * 2.0**-53


def philox(counter: tuple, key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Four 32-bit words, int64, from a counter of four (integers or int64 tensors) and a key."""
    x = [torch.as_tensor(word) for word in counter]
    k = [word & _WORD for word in key]
    for _ in range(10):
        # Products wrap around in int64; their bits are those of unsigned numbers.
        a, b = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [
            (b >> 32 & _WORD) ^ x[1] ^ k[0], b & _WORD,
            (a >> 32 & _WORD) ^ x[3] ^ k[1], a & _WORD,
        ]  # fmt: skip
        k = [(k[0] + 0x9E3779B9) & _WORD, (k[1] + 0xBB67AE85) & _WORD]
    return tuple(x)


def truncated_weights(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float
) -> torch.Tensor:
    """Probabilities of a row after temperature, top-k and top-p, float64 [vocabulary]."""
    x = logits.double()
    p = torch.softmax(x / temperature, dim=0)
    if 0 < top_k < len(x):
        p = p.masked_fill(x < x.sort(descending=True).values[top_k - 1], 0)
    if top_p < 1:
        order = x.sort(descending=True)
        reached = p[order.indices].cumsum(0) >= top_p * p.sum()
        p = p.masked_fill(x < order.values[reached.int().argmax()], 0)
    return p / p.sum()


def draw(weights: torch.Tensor, seed: int, position: int, stream: int) -> int:
    """One id, with probability proportional to its weight; float64 [vocabulary]."""
    padded = torch.nn.functional.pad(weights, (0, -len(weights) % BLOCK)).view(-1, BLOCK)
    sums = padded.sum(dim=1)
    blocks = torch.arange(len(sums), device=sums.device)
    first, second = noise(seed, position, stream, blocks)
    block = int((sums.log() - (-first.log()).log()).argmax())
    reached = padded[block].cumsum(0) > second[block] * sums[block]
    return block * BLOCK + int(reached.int().argmax())


def draw_row(
    logits: torch.Tensor,
    options: tuple[float, int, float, int],
    position: int,
    stream: int = TARGET,
    draft: tuple[int, torch.Tensor] | None = None,
) -> int:
    """The token of one row.

    Args:
        logits: [vocabulary].
        options: temperature, top_k, top_p, seed.
        position: of the token.
        stream: of the noise.
        draft: a draft token and the probabilities [vocabulary] that it was drawn from.
    """
    temperature, top_k, top_p, seed = options
    if temperature == 0:
        return int((logits == logits.max()).int().argmax())
    p = truncated_weights(logits, temperature, top_k, top_p)
    if draft is None:
        return draw(p, seed, position, stream)
    token, q = draft[0], draft[1].double()
    if not 0 <= token < len(q):
        accepted = False
    else:
        uniform = noise(seed, position, ACCEPTANCE, torch.zeros(1, dtype=torch.int64))[0].item()
        accepted = bool(q[token] > 0 and uniform * q[token] < p[token])
    if accepted:
        return token
    residual = (p - q).clamp(min=0)
    # Without any, target and draft are the same distribution.
    return draw(residual if residual.any() else p, seed, position, stream)


def check_rows(logits: torch.Tensor, place) -> None:
    """Raises CommfuseError if a row of [rows, vocabulary] is NaN, infinite, or -inf throughout."""
    rows = logits.shape[0]
    scores = logits.amax(dim=1).tolist() if logits.shape[1] else [-math.inf] * rows
    for row, score in enumerate(scores):
        if not math.isfinite(score):
            kind = "NaN" if score != score else "infinite" if score > 0 else "-inf throughout"
            raise CommfuseError(f"the logits of {place(row)} are {kind}: no token can be chosen")


def log_probabilities_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """float64 [rows]: of the rows' tokens, under softmax of the logits [rows, vocabulary]."""
    return logits.double().log_softmax(dim=1).gather(1, tokens[:, None])[:, 0]


def gather_columns(x: torch.Tensor, comm: Communicator) -> torch.Tensor:
    """Every rank's columns side by side, by torch.distributed: [rows, shard] to [rows, all]."""
    sizes = torch_collectives.all_gather(comm, torch.tensor([x.shape[1]]))[:, 0].tolist()
    padded = torch.nn.functional.pad(x, (0, max(sizes) - x.shape[1]))
    shards = torch_collectives.all_gather(comm, padded)
    return torch.cat([shard[:, :size] for shard, size in zip(shards, sizes, strict=True)], dim=1)
