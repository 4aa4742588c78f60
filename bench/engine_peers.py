"""Verification kernels of inference engines, where these are installed: vLLM's and FlashInfer's.

They take all logits on one rank: with several ranks these are gathered first, by our all_gather.
Both are imported only when they are asked for.
"""

from __future__ import annotations

import torch

from commfuse.bench import sampling_peers
from commfuse.bench.peers import Peer
from commfuse.errors import BackendUnavailable
from commfuse.runtime.communicator import Communicator
from commfuse.testing.adapter import Adapter, Inputs, Outputs


def _vllm_obstacle(comm: Communicator, dtype: torch.dtype) -> str | None:
    try:
        from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import (
            rejection_sample,  # noqa: F401
        )
    except (ImportError, OSError) as error:
        return f"vLLM's rejection_sample cannot be imported: {error}"
    return None


def _flashinfer_obstacle(comm: Communicator, dtype: torch.dtype) -> str | None:
    try:
        from flashinfer.sampling import chain_speculative_sampling  # noqa: F401
    except (ImportError, OSError) as error:
        return f"FlashInfer's chain_speculative_sampling cannot be imported: {error}"
    return None


def _refuse_what_is_not_served(engine: str, inputs: Inputs) -> None:
    if inputs["truncated"] or inputs["logs"]:
        raise BackendUnavailable(
            f"{engine}'s kernel has no top-k, top-p or log-probabilities; other kernels do these"
        )


def _prepare_vllm(adapter: Adapter, inputs: Inputs, comm: Communicator) -> Inputs:
    """Temperature is applied here: the kernels take logits that are divided by it already."""
    made = sampling_peers.prepare(adapter, inputs, comm)
    batch, longest = made["drafts"].shape
    sampling, device = made["sampling"], made["drafts"].device
    requests = torch.arange(batch, device=device, dtype=torch.int32)
    places = torch.arange(longest + 1, device=device, dtype=torch.int32)
    rows = requests.repeat_interleave(longest + 1)
    temperature = sampling.temperature.float()
    divisor = torch.where(temperature > 0, temperature, 1)[rows.long(), None]
    q = made.get("draft_probabilities")
    # The first of a request's tokens is the one before its draft.
    tokens = torch.nn.functional.pad(made["drafts"], (1, 0)).flatten()
    return {
        **made,
        "logits": (made["logits"] / divisor).to(made["logits"].dtype),
        "draft_logits": None if q is None else q.log(),
        "arguments": {
            "draft_sampled": tokens,
            "cu_num_logits": torch.arange(batch + 1, device=device, dtype=torch.int32)
            * (longest + 1),
            "pos": made["positions"][rows.long()] + places.repeat(batch),
            "idx_mapping": requests,
            "expanded_idx_mapping": rows,
            "expanded_local_pos": places.repeat(batch),
            "temperature": temperature,
            "seed": sampling.seed,
            "num_speculative_steps": longest,
        },
    }


def _vllm(inputs: Inputs, comm: Communicator) -> Outputs:
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample

    _refuse_what_is_not_served("vLLM", inputs)
    batch, longest = inputs["drafts"].shape
    logits = sampling_peers.gather(inputs["logits"], inputs["widths"], comm)
    q = inputs["draft_logits"]
    if q is not None:
        q = sampling_peers.gather(q, inputs["widths"], comm).view(batch, longest, -1)
    return rejection_sample(target_logits=logits, draft_logits=q, **inputs["arguments"])


def _check_first(inputs: list[Inputs], rank: int, outputs: Outputs) -> str | None:
    """As ``sampling_peers.check``; only the first token, behind which nothing may be written."""
    tokens = torch.full_like(outputs[0], -1)
    tokens[:, 0] = outputs[0][:, 0]
    return sampling_peers.check(inputs, rank, (tokens,))


def _prepare_flashinfer(adapter: Adapter, inputs: Inputs, comm: Communicator) -> Inputs:
    """A draft's distribution is an argument: where there is none, all of it is on the draft."""
    made = sampling_peers.prepare(adapter, inputs, comm)
    drafts = made["drafts"]
    return {
        **made,
        "one-hot": None
        if "draft_probabilities" in made
        else torch.nn.functional.one_hot(drafts, sum(made["widths"])).float(),
        "ids": drafts.int(),
        "state": torch.zeros(2, 1, dtype=torch.int64, device=drafts.device).unbind(),
    }


def _flashinfer(inputs: Inputs, comm: Communicator) -> Outputs:
    from flashinfer.sampling import chain_speculative_sampling

    _refuse_what_is_not_served("FlashInfer", inputs)
    batch, longest = inputs["drafts"].shape
    logits = sampling_peers.gather(inputs["logits"], inputs["widths"], comm)
    p = sampling_peers.probabilities(logits, inputs, longest + 1).view(batch, longest + 1, -1)
    q = inputs["one-hot"]
    if q is None:
        q = sampling_peers.gather(inputs["draft_probabilities"], inputs["widths"], comm)
        q = q.view(batch, longest, -1)
    # Tensors, so that it can be captured in a graph.
    seed, offset = inputs["state"]
    return chain_speculative_sampling(q, inputs["ids"], p, seed=seed, offset=offset)


VERIFY_PEERS = (
    Peer(
        "vllm",
        _vllm,
        layout="cuda",
        beside="cuda",
        prepare=_prepare_vllm,
        check=_check_first,
        obstacle=_vllm_obstacle,
    ),
    Peer(
        "flashinfer",
        _flashinfer,
        layout="cuda",
        beside="cuda",
        prepare=_prepare_flashinfer,
        check=sampling_peers.check,
        obstacle=_flashinfer_obstacle,
    ),
)
