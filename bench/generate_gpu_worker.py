"""One rank of ``commfuse bench generate --device cuda``: makes the model, generates, reports.

``python -m commfuse.bench.generate_gpu_worker JOB``; JOB is a JSON object, see :class:`Job`. Rank 0
prints one JSON object.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import dataclass

COPY_BYTES, COPIES = 1 << 30, 10
LOGITS_ERROR = 0.05  # of the largest; bfloat16 through all layers, summed in other orders


@dataclass(frozen=True)
class Job:
    """What is measured.

    Attributes:
        model: a ``config.json`` of transformers.
        device: ``cuda``; ``cpu``: to test this program.
        dtype: name of a torch dtype.
        backends: ``cuda`` and ``torch``, in the same processes; or ``transformers`` alone.
        prompt_tokens, new_tokens: of the one request.
        runs: timed generations of each backend, in turn.
    """

    model: dict
    device: str
    dtype: str
    backends: tuple[str, ...]
    prompt_tokens: int
    new_tokens: int
    runs: int

    @property
    def prompt(self) -> list[int]:
        """Token ids without a pattern."""
        return [(7919 * i + 13) % self.model["vocab_size"] for i in range(self.prompt_tokens)]


def run_commfuse(job: Job) -> dict | None:
    """Generates on all ranks with each backend; what there is to report, on rank 0."""
    import torch
    import torch.distributed as dist

    from commfuse.bench.provenance import gpu_provenance
    from commfuse.bench.timing import gather
    from commfuse.errors import CommfuseError
    from commfuse.generation import Generator
    from commfuse.models.config import ModelConfig
    from commfuse.models.llama import Llama
    from commfuse.models.random_weights import RandomCheckpoint
    from commfuse.runtime import launch
    from commfuse.runtime.communicator import Communicator

    if launch.started_by_launcher():
        launch.join_job()
    group = dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
    on_gpu = job.device == "cuda"
    device = launch.use_gpu() if on_gpu else None
    with Communicator(group, device=device) as comm:
        config = ModelConfig.from_hf(job.model)
        model = Llama(RandomCheckpoint(config, comm.device), comm, getattr(torch, job.dtype))
        generators, logits = {}, {}
        for name in job.backends:
            model.backend = "auto" if name == "cuda" else name
            generators[name] = Generator(model, static=True)
            logits[name] = _logits(model, job.prompt)
            # Compiles and captures; the second use of a shape makes its graph.
            for _ in range(2):
                generators[name].generate([job.prompt], job.new_tokens)
        error = _difference(list(logits.values()))
        if max(gather(error, comm)) > LOGITS_ERROR:
            raise CommfuseError(f"logits of {', '.join(job.backends)} differ by {error:.2g}")
        rates = [_copy_rate(comm)]
        runs: dict[str, list[dict]] = {name: [] for name in job.backends}
        for _ in range(job.runs):
            for name, generator in generators.items():
                model.backend = "auto" if name == "cuda" else name
                comm.barrier()
                outputs, done, _ = generator.generate([job.prompt], job.new_tokens)
                runs[name].append(
                    {
                        "tokens": outputs[0],
                        "step_us": done.decode_seconds / done.steps * 1e6,
                        "ttft_ms": done.ttft_seconds * 1e3,
                    }
                )
        rates.append(_copy_rate(comm))
        report = {
            "ranks": comm.world_size,
            "runs": runs,
            "step_bytes": gather(_step_bytes(model, job), comm),
            "copy_bytes_per_s": gather(statistics.mean(rates), comm),
            "logits_error": error,
            "provenance": gpu_provenance(comm) if on_gpu else {"gpus": 0},
        }
        rank = comm.rank
    if dist.is_initialized():
        dist.destroy_process_group()
    return report if rank == 0 else None


def _step_bytes(model, job: Job) -> int:
    """What a decoding step must read: the rank's weights, and the cache as far as it is full."""
    heads, config = len(model.heads.kv), model.config
    positions = job.prompt_tokens + job.new_tokens / 2
    entries = 2 * positions * heads * config.head_dim * config.num_layers
    return model.weight_bytes_per_step() + int(entries * model.dtype.itemsize)


def _logits(model, prompt: list[int]):
    """Of the prompt's last token, this rank's entries."""
    import torch

    from commfuse.ops import Placement

    with torch.inference_mode():
        device = model.comm.device
        cache = model.new_cache(1, len(prompt))
        positions = torch.arange(len(prompt), device=device)
        placement = Placement(torch.zeros_like(positions), positions, model.rotary(len(prompt)))
        last = torch.tensor([len(prompt) - 1], device=device)
        logits = model(torch.tensor(prompt, device=device), cache, placement, last).float()
        model.comm.check()
        return logits


def _difference(logits: list) -> float:
    """How much the first and the last differ, of the largest."""
    first, last = logits[0], logits[-1]
    return ((first - last).abs().max() / first.abs().max()).item() if first.numel() else 0.0


def _copy_rate(comm) -> float:
    """Bytes that this rank reads and writes in a second of copying, while all others do too."""
    import torch

    size = COPY_BYTES if comm.device.type == "cuda" else COPY_BYTES >> 6
    source = torch.zeros(size, dtype=torch.uint8, device=comm.device)
    target = torch.empty_like(source)

    def wait() -> None:
        if comm.device.type == "cuda":
            torch.cuda.synchronize(comm.device)

    times = []
    for _ in range(COPIES):
        wait()
        comm.barrier()
        begin = time.perf_counter()
        target.copy_(source)
        wait()
        times.append(time.perf_counter() - begin)
    return 2 * size / statistics.median(times)


def run_transformers(job: Job) -> dict:
    """That library's ``generate`` with a static cache, which it compiles, on a GPU."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, logging

    from commfuse.bench.generate_worker import Clock
    from commfuse.bench.provenance import gpu_provenance
    from commfuse.runtime import launch
    from commfuse.runtime.communicator import Communicator

    logging.set_verbosity_error()
    device = launch.use_gpu() if job.device == "cuda" else torch.device("cpu")
    config = LlamaConfig(**{k: v for k, v in job.model.items() if k != "torch_dtype"})
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, job.dtype))
    with device:
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(dtype)
    model.generation_config.eos_token_id = None
    ids = torch.tensor([job.prompt], device=device)

    def generate() -> dict:
        clock = Clock()
        begin = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=job.new_tokens,
                do_sample=False,
                cache_implementation="static",
                pad_token_id=0,
                streamer=clock,
            )
        first, last = clock.times[1], clock.times[-1]
        return {
            "tokens": output[0, len(job.prompt) :].tolist(),
            "step_us": (last - first) / (len(clock.times) - 2) * 1e6,
            "ttft_ms": (first - begin) * 1e3,
        }

    for _ in range(2):
        generate()
    runs = [generate() for _ in range(job.runs)]
    found: dict = {"gpus": 0}
    if job.device == "cuda":
        with Communicator(device=device) as comm:
            found = gpu_provenance(comm)
    return {
        "ranks": 1,
        "runs": {"transformers": runs},
        "step_bytes": [],
        "copy_bytes_per_s": [],
        "logits_error": None,
        "provenance": found,
    }


def main(text: str) -> int:
    """Does the job; the exit status is 2 for input that cannot be used."""
    from commfuse.errors import UsageError

    job = Job(**json.loads(text))
    try:
        alone = list(job.backends) == ["transformers"]
        report = run_transformers(job) if alone else run_commfuse(job)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    if report is not None:
        print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
