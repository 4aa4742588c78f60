"""``commfuse bench generate``: decoding speed and memory, ours and transformers', in one run."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from commfuse import _extension
from commfuse.bench.generate_worker import Job, Task
from commfuse.bench.provenance import provenance
from commfuse.bench.table import print_generate_table
from commfuse.errors import CommfuseError, UsageError
from commfuse.models.checkpoint import open_checkpoint
from commfuse.models.llama import check_parallelism
from commfuse.models.stages import cut_stages
from commfuse.models.tokenizer import Tokenizer
from commfuse.runtime import launch
from commfuse.runtime.link import Link
from commfuse.runtime.transports import SHARED_MEMORY, TORCH_DISTRIBUTED
from commfuse.speculative.ngram import DEFAULT_DRAFT_LENGTH

BACKENDS = ("cpu", "torch", "transformers")
RUNS_PER_PROCESS = 2
NEW_TOKENS, MOST_ANSWER_TOKENS = 64, 192

PLAIN = "plain"
QUESTION = "Explain how a steam engine turns heat into motion."
PASSAGE = (
    "The harbour of Lindholm was built in 1874 by the engineer Karl Weber. Its two stone piers "
    "reach 320 metres into the sea and protect up to forty fishing boats from the winter storms. "
    "In 1931 a lighthouse was added at the end of the northern pier. It was painted white and red, "
    "and its lamp could be seen from a distance of eighteen miles. Today the harbour is used "
    "mostly by sailing boats, but three families still go out every morning to catch herring and "
    "cod. The old warehouse beside the southern pier is now a small museum, where visitors can see "
    "nets, maps and a wooden boat from the year of the opening."
)
# The two kinds of task whose answers take up the words of the prompt, which is what n-gram drafts
# live on: one repeats them nearly all, the other picks some.
REPEATING = {
    "edit": "Correct the spelling mistakes in the following text. Write down the whole text and "
    "change nothing else.",
    "summarise": "Summarise the following text.",
}


@dataclass(frozen=True)
class Engine:
    """A way to run the model, in processes of its own.

    Attributes:
        name: as in rows of results.
        backend: ``cpu``, ``torch`` (ours over gloo) or ``transformers``.
        ranks, threads: how many, and threads of each rank.
        dtype: name of a torch dtype.
        stages: of a pipeline, into which the layers are cut; its ranks are the stages.
        repeating: whether it also answers the prompts of ``REPEATING``, with and without n-grams.
    """

    name: str
    backend: str
    ranks: int
    threads: int
    dtype: str
    stages: int = 1
    repeating: bool = False


def engines(
    world_size: int,
    dtype: str,
    backends: Sequence[str],
    cores: int,
    only: Sequence[str] | None = None,
) -> list[Engine]:
    """The engines of one run.

    Args:
        world_size: ranks of those with several.
        dtype: name of a torch dtype, of ours.
        backends: see :data:`BACKENDS`.
        cores: of the machine.
        only: names of engines, the others are left out; None: all.

    Raises:
        UsageError: an unknown backend, or an unknown engine.
    """
    for name in backends:
        if name not in BACKENDS:
            raise UsageError(f"unknown backend {name!r} for generate: use {', '.join(BACKENDS)}")
    thread_counts = sorted({1, cores})
    found = [Engine(f"tp1_{n}t", "cpu", 1, n, dtype) for n in thread_counts]
    each = max(1, cores // world_size)
    if world_size > 1:
        found.append(Engine(f"tp{world_size}", "cpu", world_size, each, dtype, repeating=True))
        found.append(Engine(f"tp{world_size}_gloo", "torch", world_size, each, dtype))
        found.append(Engine(f"pp{world_size}", "cpu", world_size, each, dtype, stages=world_size))
    found += [
        Engine(f"transformers_{kind}_{n}t", "transformers", 1, n, kind)
        for kind in ("bfloat16", "float32")
        for n in thread_counts
    ]
    found = [engine for engine in found if engine.backend in backends]
    if only is None:
        return found
    names = [engine.name for engine in found]
    if unknown := [name for name in only if name not in names]:
        raise UsageError(f"unknown configuration {', '.join(unknown)}: use {', '.join(names)}")
    return [engine for engine in found if engine.name in only]


def run_generate(
    model: str,
    world_size: int,
    backends: tuple[str, ...] | None,
    only: tuple[str, ...] | None,
    dtype: str,
    rounds: int,
    links: dict[str, Link],
    as_json: bool,
) -> None:
    """Runs every engine ``rounds`` times, in turn, and prints the rows.

    Raises:
        UsageError: a model or a backend that cannot be used, or no extension.
        CommfuseError: an engine failed, or speculation changed an answer.
    """
    path = model_path(model)
    if backends is None:
        backends = BACKENDS if path.is_dir() else BACKENDS[:2]
    elif "transformers" in backends and not path.is_dir():
        raise UsageError(f"backend 'transformers' needs a directory, and {path} is none")
    chosen = engines(world_size, dtype, backends, len(os.sched_getaffinity(0)), only)
    if not chosen:
        raise UsageError("backend 'torch' (gloo) needs --ranks 2 or more")
    if _extension.module is None and any(e.backend != "transformers" for e in chosen):
        raise UsageError(_extension.reason)
    with open_checkpoint(path) as checkpoint:
        for engine in chosen:
            check_parallelism(checkpoint.config, engine.ranks // engine.stages)
            cut_stages(checkpoint.config, engine.stages)
        tasks = _tasks(checkpoint.tokenizer(), checkpoint.config.eos_token_ids)
    reports: dict[str, list[dict]] = {engine.name: [] for engine in chosen}
    for number in range(1, rounds + 1):
        for engine in chosen:
            print(f"round {number} of {rounds}: {engine.name}", file=sys.stderr, flush=True)
            reports[engine.name].append(_run(engine, path, tasks, links))
    rows = make_rows(chosen, reports, tasks, links)
    if as_json:
        for row in rows:
            print(json.dumps(row), flush=True)
    else:
        print_generate_table(rows)


def model_path(model: str) -> Path:
    """The folder or file of a model, SmolLM2's being made ready for use where it is not."""
    if model != "smollm2":
        return Path(model)
    from commfuse.models.smollm2 import ensure_smollm2

    return ensure_smollm2(lambda line: print(line, file=sys.stderr, flush=True))


def _tasks(tokenizer: Tokenizer, stop_ids: Sequence[int]) -> list[Task]:
    def encode(text: str) -> list[int]:
        try:
            return tokenizer.encode_chat([{"role": "user", "content": text}])
        except UsageError:  # a base model: it has no chat template
            return tokenizer.encode(text)

    tasks = [Task(PLAIN, encode(QUESTION), NEW_TOKENS, [], None)]
    for name, instruction in REPEATING.items():
        prompt = encode(f"{instruction}\n\n{PASSAGE}")
        for suffix, length in (("", None), ("_ngram", DEFAULT_DRAFT_LENGTH)):
            tasks.append(Task(name + suffix, prompt, MOST_ANSWER_TOKENS, list(stop_ids), length))
    return tasks


def _link(engine: Engine, links: dict[str, Link]) -> Link | None:
    """The emulated link between the engine's ranks, if any."""
    if engine.ranks == 1:
        return None
    return links.get("pp" if engine.stages > 1 else "tp")


def _run(engine: Engine, model: Path, tasks: list[Task], links: dict[str, Link]) -> dict:
    """Starts an engine's processes, and returns what rank 0 reports."""
    link = _link(engine, links)
    with tempfile.TemporaryDirectory(prefix="commfuse-bench-") as folder:
        job = Job(
            engine="transformers" if engine.backend == "transformers" else "commfuse",
            model=str(model),
            ranks=engine.ranks,
            stages=engine.stages,
            threads=engine.threads,
            dtype=engine.dtype,
            transport=TORCH_DISTRIBUTED if engine.backend == "torch" else SHARED_MEMORY,
            link=f"{link.latency_us}:{link.gigabytes_per_second}" if link else None,
            tasks=[asdict(task) for task in (tasks if engine.repeating else tasks[:1])],
            runs=RUNS_PER_PROCESS,
            folder=folder,
        )
        command = [sys.executable, "-m", "commfuse.bench.generate_worker", json.dumps(asdict(job))]
        results = launch.run_ranks(
            command,
            engine.ranks,
            timeout=600,
            environment={"OMP_NUM_THREADS": str(engine.threads)},
        )
    failed = [result for result in results if result.status]
    if failed:
        kind = UsageError if all(result.status == 2 for result in failed) else CommfuseError
        raise kind(f"{engine.name}: {failed[0].stderr.strip()}")
    return json.loads(results[0].stdout.splitlines()[-1])


def _runs(reports: list[dict], task: str) -> list[dict]:
    return [run for report in reports for run in report["tasks"].get(task, [])]


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))


def make_rows(
    chosen: Sequence[Engine],
    reports: dict[str, list[dict]],
    tasks: Sequence[Task],
    links: dict[str, Link],
) -> list[dict]:
    """Rows of results, one for each engine and task; ``bench/README.md`` says what they mean.

    Args:
        chosen: the engines.
        reports: by engine, what its rank 0 reported in each round.
        tasks: all tasks; an engine may have done the first alone.
        links: emulated ones, by dimension.

    Raises:
        CommfuseError: a speculative answer differs from the plain one.
    """
    speeds = {
        (engine.name, task.name): _median([run["tokens_per_second"] for run in runs])
        for engine in chosen
        for task in tasks
        if (runs := _runs(reports[engine.name], task.name))
    }
    best_peer = max(
        (s for (name, _), s in speeds.items() if name.startswith("transformers")), default=None
    )
    single = speeds.get(("tp1_1t", PLAIN))
    single_memory = _memory(reports["tp1_1t"]) if "tp1_1t" in reports else None
    origin, rows = provenance(), []
    for engine in chosen:
        for task in tasks:
            if (engine.name, task.name) not in speeds:
                continue
            _check_speculation(engine, task, reports[engine.name])
            runs, speed = _runs(reports[engine.name], task.name), speeds[engine.name, task.name]
            link = _link(engine, links)
            ours, plain = engine.backend != "transformers", task.name == PLAIN
            p20, p50, p80 = np.percentile(
                [1e6 / r["tokens_per_second"] for r in runs], (20, 50, 80)
            )
            without = speeds.get((engine.name, task.name.removesuffix("_ngram")))
            rows.append(
                {
                    "op": "generate",
                    "backend": engine.backend,
                    "device": "cpu",
                    "gpus": 0,
                    "ranks": engine.ranks,
                    "emulated": link.name if link else False,
                    "dtype": engine.dtype,
                    "shape": {
                        "batch": 1,
                        "prompt_tokens": len(task.prompt),
                        "new_tokens": len(runs[0]["tokens"]),
                    },
                    "bytes": round(runs[0].get("bytes_per_token", 0)),
                    "p20_us": p20,
                    "p50_us": p50,
                    "p80_us": p80,
                    "exposed": None,
                    "configuration": engine.name,
                    "stages": engine.stages,
                    "task": task.name,
                    "speculate": f"ngram:{task.draft_length}" if task.draft_length else "off",
                    "threads_per_rank": engine.threads,
                    "tokens_per_second": speed,
                    "ttft_ms": _median([run["ttft_ms"] for run in runs]),
                    "accepted_per_step": runs[0].get("accepted_per_step"),
                    "communication_ms_per_token": (
                        _median([run["communication_ms_per_token"] for run in runs])
                        if ours
                        else None
                    ),
                    "vs_transformers": speed / best_peer if best_peer and ours and plain else None,
                    "vs_tp1_one_thread": speed / single if single and ours and plain else None,
                    "speculation_gain": speed / without if task.draft_length else None,
                    **(_floor(engine, reports[engine.name], speed) if ours and plain else {}),
                    **(
                        _memory_fields(reports[engine.name], single_memory)
                        if ours and plain
                        else {}
                    ),
                    "iterations": len(runs),
                    **origin,
                }
            )
    return rows


def _check_speculation(engine: Engine, task: Task, reports: list[dict]) -> None:
    """Every run's answer is the first one's, and a speculative one is the plain one's."""
    expected = _runs(reports, task.name.removesuffix("_ngram"))[0]["tokens"]
    for run in _runs(reports, task.name):
        if run["tokens"] != expected:
            raise CommfuseError(
                f"{engine.name}, {task.name}: the answer differs from that of another run or of "
                "decoding without speculation"
            )


def _floor(engine: Engine, reports: list[dict], speed: float) -> dict[str, float | None]:
    """The speed at which reading the weights alone would bound decoding."""
    if engine.threads > 1:  # one thread of each rank measures the bandwidth
        return {"read_gb_per_s": None, "floor_tokens_per_second": None, "of_floor": None}
    read = _median([sum(report["read_bytes_per_second"]) for report in reports])
    floor = read / reports[0]["weight_bytes_per_token"]
    return {
        "read_gb_per_s": read / 1e9,
        "weight_bytes_per_token": reports[0]["weight_bytes_per_token"],
        "floor_tokens_per_second": floor,
        "of_floor": speed / floor,
    }


def _memory(reports: list[dict]) -> dict[str, float]:
    """Memory of the largest rank above an idle one, bytes; medians over the rounds."""
    return {
        name: _median([max(rank[name] for rank in report["memory"]) for report in reports])
        for name in ("idle_rss_bytes", "rss_bytes", "pss_bytes", "peak_bytes")
    }


def _memory_fields(reports: list[dict], single: dict[str, float] | None) -> dict:
    memory = _memory(reports)
    fields: dict[str, float | None] = {f"memory_{name}": value for name, value in memory.items()}
    for kind in ("rss", "pss", "peak"):
        key = f"{kind}_bytes"
        fields[f"memory_ratio_{kind}"] = memory[key] / single[key] if single else None
    return fields
