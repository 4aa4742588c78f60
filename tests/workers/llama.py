"""On every rank: small checkpoints loaded and run, and what loading costs in memory."""

from pathlib import Path

import torch
import torch.distributed as dist

from commfuse.generation import Generator
from commfuse.models.checkpoint import open_checkpoint
from commfuse.models.llama import Llama
from commfuse.nn.attention import Placement
from commfuse.runtime.communicator import Communicator


def _logits(model: Llama, prompts: list[list[int]]) -> torch.Tensor:
    """This rank's columns of the logits of all tokens of all prompts, run in two ragged passes."""
    cache = model.new_cache(len(prompts), max(map(len, prompts)))
    rotary = model.rotary(cache.max_length)
    parts: list[list[torch.Tensor]] = [[] for _ in prompts]
    for half in (0, 1):
        spans = [((len(p) + 1) // 2 * half, len(p) if half else (len(p) + 1) // 2) for p in prompts]
        tokens = torch.tensor([t for p, (a, b) in zip(prompts, spans, strict=True) for t in p[a:b]])
        sequences = torch.tensor([s for s, (a, b) in enumerate(spans) for _ in range(a, b)])
        positions = torch.tensor([i for a, b in spans for i in range(a, b)])
        with torch.inference_mode():
            out = model(tokens, cache, Placement(sequences, positions, rotary))
        for part, logits in zip(parts, out.split([b - a for a, b in spans]), strict=True):
            part.append(logits)
    return torch.cat([logits for part in parts for logits in part])


def run(paths: list[str], prompts: list[list[int]], new_tokens: int, dtypes: list[str]) -> dict:
    """By (path, dtype): this rank's logits, and greedy tokens alone, in a batch, with drafts."""
    results = {}
    with Communicator(dist.group.WORLD) as comm:
        for path in paths:
            for name in dtypes:
                with open_checkpoint(Path(path)) as checkpoint:
                    model = Llama(checkpoint, comm, getattr(torch, name))
                generator = Generator(model)
                batch, *_ = generator.generate(prompts, new_tokens)
                static = Generator(model, static=True)  # as on a GPU
                alone = [static.generate([p], new_tokens)[0][0] for p in prompts]
                drafted, statistics, _ = generator.generate(prompts, new_tokens, draft_length=3)
                results[path, name] = {
                    "logits": _logits(model, prompts).numpy(),
                    "batch": batch,
                    "alone": alone,
                    "drafted": drafted,
                    "statistics": vars(statistics),
                }
    return results


def _status(field: str) -> int:
    """A size from /proc/self/status, bytes. Unlike getrusage's, its peak begins with exec."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def memory(path: str) -> dict[str, int]:
    """Bytes of this rank before and while loading, of its weights, and of its largest tensor."""
    with Communicator(dist.group.WORLD) as comm:
        with open_checkpoint(Path(path)) as checkpoint:
            # What any first tensor operations bring along: thread pools, code pages.
            torch.randn(64, 64) @ torch.randn(64, 64)
            before = _status("VmRSS")
            model = Llama(checkpoint, comm)
            peak, after = _status("VmHWM"), _status("VmRSS")
            embedding = len(model.vocabulary) * model.config.hidden_size * model.dtype.itemsize
        return {
            "before": before,
            "peak": peak,
            "after": after,
            "weights": model.weight_bytes_per_step(),
            "largest": embedding,
        }
