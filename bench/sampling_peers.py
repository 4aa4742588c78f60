"""What a PyTorch user does to draw from sharded logits: gather them, then draw by torch's ops."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

from commfuse import ops
from commfuse.nn.sharding import shard_vocabulary
from commfuse.runtime.communicator import Communicator
from commfuse.testing.adapter import Adapter, Inputs, Outputs


def widths(adapter: Adapter, comm: Communicator) -> list[int]:
    """Of all shards."""
    size, world = adapter.case["vocabulary"], comm.world_size
    return [len(shard_vocabulary(size, world, rank)) for rank in range(world)]


def prepare(adapter: Adapter, inputs: Inputs, comm: Communicator) -> Inputs:
    """The inputs, the widths of all shards, and what a call must not ask a GPU for."""
    sampling = inputs["sampling"]
    return {
        **inputs,
        "widths": widths(adapter, comm),
        "logs": "logs" in adapter.case.options,
        "greedy": bool((sampling.temperature == 0).any()),
        "all greedy": sampling.greedy,
        "truncated": bool((sampling.top_k > 0).any() or (sampling.top_p < 1).any()),
    }


def gather(shard: torch.Tensor, widths: list[int], comm: Communicator) -> torch.Tensor:
    """All columns: by gloo on the CPU, by our all_gather on a GPU. Narrow shards travel padded."""
    if comm.world_size == 1:
        return shard
    padded = F.pad(shard, (0, max(widths) - shard.shape[1]))
    if shard.is_cuda:
        parts = ops.all_gather(padded, comm, "cuda").chunk(comm.world_size)
    else:
        parts = [torch.empty_like(padded) for _ in widths]
        dist.all_gather(parts, padded, group=comm.group)
    return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)


def probabilities(logits: torch.Tensor, inputs: Inputs, rows_each: int) -> torch.Tensor:
    """float32 [rows, vocabulary] after temperature, top-k, top-p; ``rows_each`` of a request."""
    sampling = inputs["sampling"]
    temperature, top_k, top_p = (
        x.repeat_interleave(rows_each)[:, None]
        for x in (sampling.temperature.float(), sampling.top_k, sampling.top_p.float())
    )
    scaled = logits.float() / torch.where(temperature > 0, temperature, 1)
    if inputs["truncated"]:
        values, order = scaled.sort(dim=1, descending=True)
        place = torch.arange(values.shape[1], device=values.device)
        values = values.masked_fill((top_k > 0) & (place >= top_k), -torch.inf)
        before = values.softmax(dim=1).cumsum(dim=1) - values.softmax(dim=1)
        values = values.masked_fill(before > top_p, -torch.inf)
        scaled = torch.full_like(scaled, -torch.inf).scatter(1, order, values)
    probabilities = scaled.softmax(dim=1)
    if inputs["greedy"]:
        best = F.one_hot(logits.argmax(dim=1), logits.shape[1]).float()
        probabilities = torch.where(temperature == 0, best, probabilities)
    return probabilities


def _draw(probabilities: torch.Tensor) -> torch.Tensor:
    """A token of each row, by exponential noise: the fastest that torch has for it."""
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(dim=1)


def sample(inputs: Inputs, comm: Communicator) -> Outputs:
    """(tokens [m],), and their log-probabilities where they are asked for."""
    logits = gather(inputs["logits"], inputs["widths"], comm)
    greedy = inputs["all greedy"]
    tokens = logits.argmax(dim=1) if greedy else _draw(probabilities(logits, inputs, 1))
    if not inputs["logs"]:
        return (tokens,)
    return tokens, logits.float().log_softmax(dim=1).gather(1, tokens[:, None])[:, 0]


def verify(inputs: Inputs, comm: Communicator) -> Outputs:
    """(tokens [batch, longest + 1], accepted [batch]), and log-probabilities likewise.

    Speculative sampling (Leviathan et al., "Fast Inference from Transformers via Speculative
    Decoding", 2023): all requests have drafts of the same length here.
    """
    drafts = inputs["drafts"]
    batch, longest = drafts.shape
    logits = gather(inputs["logits"], inputs["widths"], comm)
    places = torch.arange(longest + 1, device=logits.device)
    if inputs["all greedy"]:
        tokens = logits.argmax(dim=1).view(batch, longest + 1)
        accepted = (tokens[:, :-1] == drafts).long().cumprod(dim=1).sum(dim=1)
        return tokens.masked_fill(places > accepted[:, None], -1), accepted
    p = probabilities(logits, inputs, longest + 1).view(batch, longest + 1, -1)
    if "draft_probabilities" in inputs:
        q = gather(inputs["draft_probabilities"], inputs["widths"], comm).view(batch, longest, -1)
    else:
        q = F.one_hot(drafts, p.shape[2]).float()
    at_draft = drafts[..., None]
    ratio = p[:, :-1].gather(2, at_draft) / q.gather(2, at_draft)
    taken = torch.rand_like(ratio[..., 0]) < ratio[..., 0]
    accepted = taken.long().cumprod(dim=1).sum(dim=1)
    # The row behind the accepted drafts decides: what p has above q, or p where all were accepted.
    rows = torch.arange(batch, device=logits.device)
    q = torch.cat((q, torch.zeros_like(q[:, :1])), dim=1)
    left = (p[rows, accepted] - q[rows, accepted]).clamp_(min=0)
    tokens = F.pad(drafts, (0, 1))
    tokens[rows, accepted] = _draw(left)
    tokens = tokens.masked_fill_(places > accepted[:, None], -1)
    if not inputs["logs"]:
        return tokens, accepted
    logs = logits.float().log_softmax(dim=1).view(batch, longest + 1, -1)
    return tokens, accepted, logs.gather(2, tokens.clamp(min=0)[..., None])[..., 0]


def check(inputs: list[Inputs], rank: int, outputs: Outputs) -> str | None:
    """Why tokens cannot be right, or None: noise differs, so only greedy requests are compared."""
    tokens = outputs[0].view(len(inputs[0]["sampling"]), -1)
    logits = torch.cat([x["logits"] for x in inputs], dim=1)
    best = logits.argmax(dim=1).view(len(tokens), -1)
    greedy = (inputs[0]["sampling"].temperature == 0)[:, None] & (tokens >= 0)
    ties = logits.gather(1, tokens.clamp(min=0).view(-1, 1)) == logits.max(dim=1, keepdim=True)[0]
    wrong = greedy & (tokens != best) & ~ties.view(tokens.shape)
    return "a greedy request did not get the largest logit" if bool(wrong.any()) else None
