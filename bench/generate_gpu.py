"""``commfuse bench generate --device cuda``: decoding on GPUs, ours and transformers'."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from commfuse.bench.generate_gpu_worker import Job
from commfuse.bench.provenance import provenance
from commfuse.bench.table import print_gpu_generate_table
from commfuse.errors import CommfuseError, UsageError
from commfuse.models.config import ModelConfig
from commfuse.models.llama import check_parallelism
from commfuse.runtime import launch
from commfuse.testing import GpuLab

BACKENDS = ("cuda", "torch", "transformers")
MODEL = "llama-3-8b"
# The shape of Llama 3 8B; weights are made up, since a step's time does not depend on them.
LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "torch_dtype": "bfloat16",
}
PROMPT_TOKENS, NEW_TOKENS, RUNS = 512, 64, 5
TIMEOUT = 300.0  # seconds for one number of ranks; transformers compiles for minutes


def run_generate(
    counts: Sequence[int],
    backends: tuple[str, ...] | None,
    model: str | None,
    dtype: str,
    runs: int | None,
    as_json: bool,
    lab: GpuLab,
) -> list[dict]:
    """Measures every number of ranks and, on one rank, transformers; prints the rows.

    Raises:
        UsageError: a model, a backend or a number of ranks that cannot be had.
        CommfuseError: the ranks of an engine failed, or backends disagree.
    """
    if model not in (None, MODEL):
        raise UsageError(f"--model {model}: on GPUs the model is {MODEL}, with made-up weights")
    for name in backends or ():
        if name not in BACKENDS:
            raise UsageError(f"unknown backend {name!r} for generate: use {', '.join(BACKENDS)}")
    for ranks in counts:
        check_parallelism(ModelConfig.from_hf(LLAMA_3_8B), ranks)
    installed = importlib.util.find_spec("transformers") is not None
    if not installed and backends and "transformers" in backends:
        raise UsageError("backend 'transformers': it is not installed (pip install transformers)")
    chosen = backends or BACKENDS[: 2 + installed]
    if not installed and not backends:
        print("transformers is not installed and is left out", file=sys.stderr)
    ours = tuple(name for name in chosen if name != "transformers")
    job = Job(LLAMA_3_8B, "cuda", dtype, ours, PROMPT_TOKENS, NEW_TOKENS, runs or RUNS)
    rows: list[dict] = []
    if "transformers" in chosen:
        rows += _show(make_rows(run_job(job, ("transformers",), 1, lab), job, rows), as_json)
    for ranks in counts if ours else ():
        rows += _show(make_rows(run_job(job, ours, ranks, lab), job, rows), as_json)
    if not as_json:
        print_gpu_generate_table(rows)
    return rows


def _show(rows: list[dict], as_json: bool) -> list[dict]:
    """Prints rows as soon as they are there."""
    if as_json:
        for row in rows:
            print(json.dumps(row), flush=True)
    return rows


def run_job(job: Job, backends: tuple[str, ...], ranks: int, lab: GpuLab) -> dict:
    """What rank 0 reports of some backends, which run in the same processes."""
    print(f"{ranks} ranks: {', '.join(backends)}", file=sys.stderr, flush=True)
    own = {**asdict(job), "backends": backends}
    command = [sys.executable, "-m", "commfuse.bench.generate_gpu_worker", json.dumps(own)]
    results = launch.run_ranks(command, ranks, timeout=TIMEOUT, environment=lab.environment(ranks))
    failed = [result for result in results if result.status]
    if failed:
        kind = UsageError if all(result.status == 2 for result in failed) else CommfuseError
        raise kind(f"{', '.join(backends)} on {ranks} ranks: {failed[0].stderr.strip()[-2000:]}")
    return json.loads(results[0].stdout.splitlines()[-1])


def make_rows(report: dict, job: Job, before: Sequence[dict]) -> list[dict]:
    """Rows of results, one for each backend; ``bench/README.md`` says what they mean.

    Args:
        report: of rank 0.
        job: what was done.
        before: rows of the same run, among them transformers', if any.
    """
    peer = next((row for row in before if row["backend"] == "transformers"), None)
    medians = {
        name: float(np.median([run["step_us"] for run in runs]))
        for name, runs in report["runs"].items()
    }
    # The slowest rank's: those of one GPU share its bandwidth.
    floors = [
        needed / rate * 1e6
        for needed, rate in zip(report["step_bytes"], report["copy_bytes_per_s"], strict=True)
    ]
    rows = []
    for name, runs in report["runs"].items():
        p20, p50, p80 = np.percentile([run["step_us"] for run in runs], (20, 50, 80))
        torch_us = medians.get("torch")
        rows.append(
            {
                "op": "generate",
                "backend": name,
                "device": job.device,
                "gpus": report["provenance"]["gpus"],
                "ranks": report["ranks"],
                "emulated": False,
                "dtype": job.dtype,
                "shape": {
                    "batch": 1,
                    "prompt_tokens": job.prompt_tokens,
                    "new_tokens": job.new_tokens,
                },
                "model": MODEL,
                "bytes": 0,
                "p20_us": p20,
                "p50_us": p50,
                "p80_us": p80,
                "exposed": None,
                "tokens_per_second": 1e6 / p50,
                "ttft_ms": float(np.median([run["ttft_ms"] for run in runs])),
                "step_bytes": max(report["step_bytes"], default=None),
                "copy_gb_per_s": (min(report["copy_bytes_per_s"]) / 1e9 if floors else None),
                "floor_us": max(floors, default=None),
                "times_floor": p50 / max(floors) if floors else None,
                "times_faster_than_torch": torch_us / p50 if name != "torch" and torch_us else None,
                "vs_transformers": peer["p50_us"] / p50 if peer is not None else None,
                "logits_error": report["logits_error"],
                "iterations": len(runs),
                **provenance(),
                **report["provenance"],
            }
        )
    return rows
