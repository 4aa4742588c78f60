"""On every rank: models of transformers, split live and read from their directories."""

from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import commfuse
from commfuse.models.checkpoint import open_tensors


def generate(model, prompts: list[list[int]], new_tokens: int, **options):
    """What transformers returns for a batch, padded on the left: greedy tokens and logits."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


def tokens(output, new_tokens: int) -> list[list[int]]:
    """The new ones."""
    return output.sequences[:, -new_tokens:].tolist()


def planned(path: str, plan: str, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy tokens of a model that is split as a plan says."""
    model = commfuse.parallelize(path, plan, dtype=torch.float32)
    return tokens(generate(model, prompts, new_tokens), new_tokens)


def run(
    paths: list[str], prompts: list[list[int]], new_tokens: int, plan: str | None = None
) -> dict:
    """By path and way of loading: greedy tokens and the logits of all prompts' ends."""
    results = {}
    with commfuse.init_mesh(tp=dist.get_world_size()) as mesh:
        for path in paths:
            live = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            read = commfuse.parallelize(path, mesh, dtype=torch.float32)
            for way, model in (("live", commfuse.parallelize(live, mesh)), ("read", read)):
                output = generate(model, prompts, new_tokens)
                results[path, way] = {
                    "logits": output.logits[0].numpy(),
                    "tokens": tokens(output, new_tokens),
                    "parameters": [name for name, _ in model.named_parameters()],
                }
            # The cache that holds its tensors from the start, and no cache.
            for way, options in (
                ("static cache", {"cache_implementation": "static"}),
                ("no cache", {"use_cache": False}),
            ):
                output = generate(read, prompts[:1], new_tokens, **options)
                results[path, way] = tokens(output, new_tokens)
    if plan is not None:
        results["planned"] = planned(paths[0], plan, prompts, new_tokens)
    return results


def _status(field: str) -> int:
    """A size from /proc/self/status, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def memory(small: str, path: str) -> dict[str, int]:
    """Bytes of this rank before, while and after it reads a model; of its parts; of a tensor."""
    with commfuse.init_mesh(tp=dist.get_world_size()) as mesh:
        # What any first model brings along: modules, thread pools, code pages.
        generate(commfuse.parallelize(small, mesh), [[1]], 1)
        before = _status("VmRSS")
        model = commfuse.parallelize(path, mesh)
        peak, after = _status("VmHWM"), _status("VmRSS")
        parts = sum(part.nbytes for part in model.state_dict().values())
        parts -= model.state_dict()["lm_head.weight"].nbytes  # it is the embedding
        with open_tensors(path) as tensors:
            vocabulary, hidden = tensors.shape("model.embed_tokens.weight")
    return {
        "before": before,
        "peak": peak,
        "after": after,
        "parts": parts,
        "largest": -(-vocabulary // mesh.tp.world_size) * hidden * 2,
    }
