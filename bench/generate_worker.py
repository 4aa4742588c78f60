"""One rank of one engine of ``commfuse bench generate``: loads, generates, reports.

``python -m commfuse.bench.generate_worker JOB``; JOB is a JSON object, see :class:`Job`. Rank 0
prints one JSON object.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

READ_BYTES, READ_REPEATS = 256 << 20, 7
WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class Task:
    """One generation.

    Attributes:
        name: as in rows of results.
        prompt: token ids.
        new_tokens: the most to generate.
        stop_ids: tokens that end it; none: it always has ``new_tokens``.
        draft_length: of n-gram speculation; None: off.
    """

    name: str
    prompt: list[int]
    new_tokens: int
    stop_ids: list[int]
    draft_length: int | None


@dataclass(frozen=True)
class Job:
    """What an engine does.

    Attributes:
        engine: ``commfuse`` or ``transformers``.
        model: path of the checkpoint.
        ranks, threads: of the job, and of each rank.
        stages: of a pipeline: 1, or as many as there are ranks.
        dtype: name of a torch dtype.
        transport: of the communicator.
        link: emulated, as ``latency_us:GB/s``; None: none.
        tasks: done in turn, ``runs`` times over.
        runs: see above.
        folder: where ranks tell each other that they have imported everything.
    """

    engine: str
    model: str
    ranks: int
    stages: int
    threads: int
    dtype: str
    transport: str
    link: str | None
    tasks: list[dict]
    runs: int
    folder: str


def _memory() -> dict[str, int]:
    """Bytes of this process: resident, proportional share, and the most ever resident."""
    rollup = Path("/proc/self/smaps_rollup").read_text() + Path("/proc/self/status").read_text()
    names = {"Rss": "rss", "Pss": "pss", "VmHWM": "peak"}
    found = {}
    for line in rollup.splitlines():
        name, _, value = line.partition(":")
        if name in names:
            found[names[name]] = int(value.split()[0]) * 1024
    return found


def _meet(folder: str, ranks: int) -> None:
    """Returns when all ranks have called: what they have imported is then shared by all."""
    Path(folder, f"imported-{os.environ['RANK']}").touch()
    deadline = time.monotonic() + 120
    while len(list(Path(folder).glob("imported-*"))) < ranks:
        if time.monotonic() > deadline:
            raise TimeoutError("another rank has not imported its modules within 120 s")
        time.sleep(0.01)


def _run_commfuse(job: Job) -> dict | None:
    import torch
    import torch.distributed as dist

    from commfuse import _extension
    from commfuse.bench.timing import gather
    from commfuse.generation import Generator, Pipeline
    from commfuse.models.checkpoint import open_checkpoint
    from commfuse.models.llama import Llama
    from commfuse.models.stages import cut_stages
    from commfuse.runtime.launch import join_job
    from commfuse.runtime.link import parse_link
    from commfuse.runtime.mesh import init_mesh

    torch.set_num_threads(job.threads)
    _meet(job.folder, job.ranks)
    idle = _memory()
    if job.ranks > 1:
        join_job()
    link = parse_link(job.link) if job.link else None
    tp, pp = (job.ranks, 1) if job.stages == 1 else (1, job.ranks)
    transport = job.transport if job.ranks > 1 else "auto"
    options = {"transport": transport, "links": {"pp" if pp > 1 else "tp": link}}
    with init_mesh(tp=tp, pp=pp, **options) as mesh:
        comm = mesh.pp if pp > 1 else mesh.tp  # of all ranks
        with open_checkpoint(Path(job.model)) as checkpoint:
            stage = cut_stages(checkpoint.config, pp)[mesh.pp.rank]
            model = Llama(checkpoint, mesh.tp, getattr(torch, job.dtype), stage)
            weight_bytes = _weight_bytes_per_token(checkpoint) * model.dtype.itemsize
        generator = Generator(model, Pipeline(model, mesh.pp))
        tasks = [Task(**task) for task in job.tasks]
        _generate(generator, tasks[0], WARM_UP_TOKENS)
        results: dict[str, list] = {task.name: [] for task in tasks}
        _generate(generator, tasks[0])
        comm.barrier()  # the others are as far, and still alive
        memory = _memory()
        memory = {
            "idle_rss_bytes": idle["rss"],
            "rss_bytes": memory["rss"] - idle["rss"],
            "pss_bytes": memory["pss"] - idle["pss"],
            "peak_bytes": memory["peak"] - idle["rss"],
        }
        reads = _read_rates(comm, _extension.require())
        for _ in range(job.runs):
            for task in tasks:
                results[task.name].append(_generate(generator, task))
        reads += _read_rates(comm, _extension.require())
        report = {
            "tasks": results,
            "memory": gather(memory, comm),
            "read_bytes_per_second": gather(statistics.median(reads), comm),
            "weight_bytes_per_token": weight_bytes,
            "transport": comm.transport,
        }
        rank = comm.rank
    if dist.is_initialized():
        dist.destroy_process_group()
    return report if rank == 0 else None


def _weight_bytes_per_token(checkpoint) -> int:
    """Elements of all weights that any token must pass: no rank's copies and no padding."""
    matrices = [name for name in checkpoint.names() if name.endswith("proj.weight")]
    tied = checkpoint.config.tie_word_embeddings
    matrices.append("model.embed_tokens.weight" if tied else "lm_head.weight")
    count = 0
    for name in matrices:
        rows, columns = checkpoint.shape(name)
        count += rows * columns
    return count


def _read_rates(comm, native) -> list[float]:
    """Bytes per second at which this rank reads memory while all the others do too."""
    buffer = native.huge_empty(READ_BYTES).zero_()
    rates = []
    for _ in range(READ_REPEATS):
        comm.barrier()
        begin = time.perf_counter()
        native.read_memory(buffer)
        rates.append(READ_BYTES / (time.perf_counter() - begin))
    return rates


def _generate(generator, task: Task, new_tokens: int | None = None) -> dict:
    outputs, done, _ = generator.generate(
        [task.prompt],
        new_tokens or task.new_tokens,
        stop_ids=task.stop_ids,
        draft_length=task.draft_length,
    )
    return {
        "tokens": outputs[0],
        "tokens_per_second": done.tokens_per_second,
        "ttft_ms": done.ttft_seconds * 1e3,
        "accepted_per_step": done.accepted_per_step,
        "communication_ms_per_token": done.communication_ms_per_token,
        "bytes_per_token": done.per_token(done.bytes_sent),
    }


class Clock:
    """A streamer of transformers: the time of each token; the first call brings the prompt."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _run_transformers(job: Job) -> dict:
    import torch
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(job.threads)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=getattr(torch, job.dtype)).eval()
    model.generation_config.eos_token_id = None

    def generate(task: Task, new_tokens: int) -> dict:
        ids, clock = torch.tensor([task.prompt]), Clock()
        begin = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
                streamer=clock,
            )
        first, last = clock.times[1], clock.times[-1]
        return {
            "tokens": output[0, len(task.prompt) :].tolist(),
            "tokens_per_second": (len(clock.times) - 2) / (last - first),
            "ttft_ms": (first - begin) * 1e3,
        }

    (task,) = (Task(**task) for task in job.tasks)
    generate(task, WARM_UP_TOKENS)
    return {"tasks": {task.name: [generate(task, task.new_tokens) for _ in range(job.runs)]}}


def main(text: str) -> int:
    """Does the job; the exit status is 2 for input that cannot be used."""
    from commfuse.errors import UsageError

    job = Job(**json.loads(text))
    try:
        report = _run_commfuse(job) if job.engine == "commfuse" else _run_transformers(job)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    if report is not None:
        print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
