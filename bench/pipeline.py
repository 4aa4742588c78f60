"""Measures a pipeline: how long stages wait, what a boundary costs, what text generation gains."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.distributed as dist
from rich import box
from rich.table import Table

from commfuse import ops
from commfuse.bench import latency
from commfuse.bench.generate import model_path
from commfuse.bench.provenance import provenance
from commfuse.bench.table import console, print_provenance
from commfuse.bench.timing import gather
from commfuse.errors import CommfuseError, UsageError
from commfuse.generation.statistics import bubble
from commfuse.runtime import launch
from commfuse.runtime.channel import Channel
from commfuse.runtime.communicator import Communicator
from commfuse.runtime.link import Link

COMPUTE = ("real", "emulated")
PASSES = (1, 2, 4, 8)
# A stage's work on a pass, real: two GEMMs on a boundary's rows, the first of which receives and
# the last of which sends; emulated: about as long.
ROWS, HIDDEN = 32, 1024
EMULATED_SECONDS = 1e-3
FILLING, STREAM = 4, 16  # passes that follow each other, to see what a boundary adds to each
REPEATS, ROUNDS = 25, 40
NEW_TOKENS, REQUESTS, RUNS = 48, 8, 2
PROMPT = "The harbour was quiet in the morning, and the boats"


@dataclass(frozen=True)
class Options:
    """A benchmark of a pipeline, as ``commfuse bench pipeline`` takes it.

    Attributes:
        stages: ranks, one a stage.
        compute: ``real``: GEMMs; ``emulated``: every stage waits instead, for more stages than
            cores.
        dtype: name of a torch dtype.
        cases: ``quick``: stages; ``all``: text generation as well.
        link: an emulated link between stages, or None.
        as_json: print JSON lines instead of a table.
    """

    stages: int
    compute: str = "real"
    dtype: str = "bfloat16"
    cases: str = "quick"
    link: Link | None = None
    as_json: bool = False


def check_options(options: Options) -> None:
    """Refuses, before ranks are started, what they would refuse.

    Raises:
        UsageError: fewer than two stages, or an unknown kind of computing.
    """
    if options.stages < 2:
        raise UsageError(f"a pipeline of {options.stages} stages: use --ranks 2 or more")
    if options.compute not in COMPUTE:
        raise UsageError(f"--compute {options.compute}: use {' or '.join(COMPUTE)}")


def run_pipeline(options: Options, model: str) -> None:
    """Starts the stages, then generations of a model, and prints the rows.

    Raises:
        UsageError: see :func:`check_options`; a model that cannot be cut.
        CommfuseError: a stage or a generation failed.
    """
    check_options(options)
    stages = [sys.executable, "-m", "commfuse.bench.pipeline", json.dumps(asdict(options))]
    results = launch.run_ranks(stages, options.stages, timeout=300)
    if failed := [result for result in results if result.status]:
        raise CommfuseError(f"stage {failed[0].rank}: {failed[0].stderr.strip()}")
    rows = [json.loads(line) for line in results[0].stdout.splitlines()]
    if options.cases == "all":
        rows += decode_rows(options, model)
    if options.as_json:
        print("\n".join(map(json.dumps, rows)), flush=True)
    else:
        print_pipeline_table(rows)


def print_pipeline_table(rows: list[dict]) -> None:
    """The rows for people: a line each."""
    table = Table(box=box.SIMPLE_HEAD)
    for name, justify in (("measured", "left"), ("", "right"), ("compared with", "left")):
        table.add_column(name, justify=justify)
    for row in rows:
        what = row["what"]
        if what == "idle":
            ours = f"{row['idle']:.1%}"
            theirs = (
                f"{row['formula']:.1%} by (P-1)/(m+P-1); {row['of_unequal']:.2f} x what stages as "
                "fast as these must"
            )
            name = f"idle, {row['stages']} stages, {row['passes']} passes"
        elif what == "boundary":
            name, ours = "a boundary, exposed", f"{row['waited_us']:.1f} us"
            theirs = f"{row['exposed']:.0%} of a transfer of {row['transfer_us']:.1f} us"
        elif what == "single":
            name, ours = f"a token of one request, layers {row['layers']}", f"{row['token_ms']} ms"
            alone = ", ".join(map(str, row["one_rank_token_ms"]))
            theirs = f"{row['added']:+.1%} to one rank's, which on each core takes {alone} ms"
        else:
            name = f"tokens/s, {row['requests']} requests, layers {row['layers']}"
            ours = f"{row['tokens_per_second']:.1f}"
            base = f"{row['one_rank_tokens_per_second']:.1f}"
            theirs = f"{row['times_one_rank']:.2f} x one rank's {base}"
        table.add_row(name, ours, theirs)
    output = console()
    output.print(table)
    print_provenance({"device": "cpu", **rows[0]}, output)


def run_rank(options: Options) -> None:
    """Measures stages on this rank; the first prints a row a line."""
    torch.set_num_threads(1)
    launch.join_job()
    try:
        with torch.inference_mode(), Communicator(dist.group.WORLD, link=options.link) as comm:
            rows = _Stages(options, comm).rows()
            if comm.rank == 0:
                print("\n".join(map(json.dumps, rows)), flush=True)
    finally:
        dist.destroy_process_group()


def _idle_of(seconds: list[float], passes: int) -> float:
    """As (P - 1) / (m + P - 1), of stages that take so long for a pass each: the mean of theirs."""
    total = sum(seconds) + (passes - 1) * max(seconds)
    return 1 - passes * sum(seconds) / len(seconds) / total


class _Stages:
    """Stages of equal work, with channels between neighbours."""

    def __init__(self, options: Options, comm: Communicator):
        self.options, self.comm = options, comm
        dtype = getattr(torch, options.dtype)
        sizes = {"rows": ROWS, "columns": HIDDEN, "dtype": dtype}
        channels = [Channel(comm, r, r + 1, **sizes) for r in range(comm.world_size - 1)]
        self.source = channels[comm.rank - 1] if comm.rank else None
        self.target = channels[comm.rank] if comm.rank < comm.world_size - 1 else None
        self.x = torch.randn(ROWS, HIDDEN).to(dtype)
        self.first, self.last = (
            ops.pack_weight(torch.randn(HIDDEN, HIDDEN).mul_(HIDDEN**-0.5).to(dtype))
            for _ in range(2)
        )

    def _compute(self) -> None:
        """A pass without neighbours."""
        if self.options.compute == "emulated":
            end = time.perf_counter() + EMULATED_SECONDS
            time.sleep(EMULATED_SECONDS * 0.8)  # cores may be fewer than stages
            while time.perf_counter() < end:
                pass
        else:
            ops.matmul(ops.matmul(self.x, self.first), self.last)

    def _pass(self) -> None:
        """A pass as a stage of the pipeline."""
        if self.options.compute == "emulated":
            x = self.x if self.source is None else ops.recv(ROWS, self.source)
            self._compute()
            if self.target is not None:
                ops.send(x, self.target)
            return
        if self.source is None:
            x = ops.matmul(self.x, self.first)
        else:
            x, _ = ops.recv_matmul(ROWS, self.source, self.first)
        if self.target is None:
            ops.matmul(x, self.last)
        else:
            ops.matmul_send(x, self.last, self.target)

    def _run(self, count: int) -> tuple[float, list[float]]:
        """(seconds until the last stage has done ``count`` passes, what each stage waited)."""
        self.comm.barrier()
        before, begin = self.comm.statistics().communication_seconds, time.monotonic()
        for _ in range(count):
            self._pass()
        waited = self.comm.statistics().communication_seconds - before
        every = gather((begin, time.monotonic(), waited), self.comm)
        begins, ends, waits = zip(*every, strict=True)
        # From its own last pass to the last stage's a stage has nothing to do, either.
        last = max(ends)
        idle = [wait + last - end for wait, end in zip(waits, ends, strict=True)]
        return last - min(begins), idle

    def rows(self) -> list[dict]:
        """Of each number of passes, how long stages wait; of a boundary, what it adds."""
        for _ in range(3):
            self._run(4)
        rows = []
        for passes in PASSES:
            idle, of_unequal = [], []
            for _ in range(REPEATS):
                seconds, waited = self._run(passes)
                idle.append([each / seconds for each in waited])
                least = _idle_of([(seconds - each) / passes for each in waited], passes)
                of_unequal.append(np.mean(idle[-1]) / least)
            of_stage = np.median(np.array(idle), axis=0)
            formula = bubble(self.comm.world_size, passes)
            rows.append(
                self._row(
                    "idle",
                    passes=passes,
                    idle=round(float(of_stage.mean()), 4),
                    idle_of_stage=[round(float(part), 4) for part in of_stage],
                    formula=round(formula, 4),
                    of_formula=round(float(of_stage.mean() / formula), 4),
                    of_unequal=round(float(np.median(of_unequal)), 4),
                )
            )
        return [*rows, self._boundary()]

    def _boundary(self) -> dict:
        """What a boundary keeps the stage behind it from computing, and what a transfer takes."""
        waits, own = [], []
        for _ in range(ROUNDS):  # they take turns: a drift of the machine hits both alike
            waits.append(self._steady())
            own.append(self._transfer())
        waited, transfer = float(np.median(waits)), float(np.median(own))
        return self._row(
            "boundary",
            bytes=self.x.nbytes,
            waited_us=round(waited * 1e6, 2),
            transfer_us=round(transfer * 1e6, 2),
            exposed=round(waited / transfer, 4),
        )

    def _steady(self) -> float:
        """Seconds of a pass that the last stage spends on messages, when the pipeline is full.

        It has more to compute than the stage before it. Equal ones would wait for each other
        whenever one of them is held up, however fast the way between them.
        """
        last = self.target is None
        self.comm.barrier()
        for count in (FILLING, STREAM):
            before = self.comm.statistics().communication_seconds
            for _ in range(count):
                self._pass()
                if last:
                    self._compute()
        waited = self.comm.statistics().communication_seconds - before
        return gather(waited, self.comm)[-1] / STREAM

    def _transfer(self) -> float:
        """Seconds of one message from the first stage to the second, alone."""
        stamps = []
        for _ in range(3):
            self.comm.barrier()
            stamp = time.monotonic()
            if self.comm.rank == 0:
                ops.send(self.x, self.target)
            elif self.comm.rank == 1:
                ops.recv(ROWS, self.source)
                stamp = time.monotonic()
            every = gather(stamp, self.comm)
            stamps.append(every[1] - every[0])
        return float(np.median(stamps))

    def _row(self, what: str, **found: object) -> dict:
        link = self.comm.link
        return {
            "op": "pipeline",
            "what": what,
            "stages": self.comm.world_size,
            "compute": self.options.compute,
            "emulated": link.name if link else self.options.compute == "emulated",
            "dtype": self.options.dtype,
            **found,
            "transport": self.comm.transport,
            **provenance(),
        }


def decode_rows(options: Options, model: str) -> list[dict]:
    """Text generation in stages beside one single-threaded rank; the same tokens are asked for.

    Raises:
        CommfuseError: a generation failed, or stages have changed a token.
    """
    link = ["--link", f"pp={_link_text(options.link)}"] if options.link else []
    batch = _generate(model, options, REQUESTS, [])
    stages = ["--pp", str(options.stages), *link]
    staged = _generate(model, options, REQUESTS * options.stages, stages)
    tokens = {tuple(out["token_ids"]) for run in (batch, staged) for out in run["outputs"]}
    if len(tokens) != 1:
        raise CommfuseError("stages have changed a token of one prompt")
    ours, theirs = (run["stats"]["tokens_per_second"] for run in (staged, batch))
    single = latency.measure(options.stages, model_path(model), options.dtype, options.link)
    common = {
        "stages": options.stages,
        "compute": "real",
        "emulated": options.link.name if options.link else False,
        "dtype": options.dtype,
        "model": model,
    }
    return [
        {"op": "pipeline", "what": "single", **common, **single, **provenance()},
        {
            "op": "pipeline",
            "what": "groups",
            **common,
            "requests": len(staged["outputs"]),
            "tokens_per_second": round(ours, 2),
            "one_rank_requests": len(batch["outputs"]),
            "one_rank_tokens_per_second": round(theirs, 2),
            "times_one_rank": round(ours / theirs, 4),
            "decode_idle": staged["stats"]["pipeline"]["decode_idle"],
            "layers": staged["stats"]["pipeline"]["layers"],
            **provenance(),
        },
    ]


def _link_text(link: Link) -> str:
    return f"{link.latency_us}:{link.gigabytes_per_second}"


def _generate(model: str, options: Options, requests: int, stages: list[str]) -> dict:
    """The best of a few runs of ``commfuse generate``."""
    prompts = [argument for _ in range(requests) for argument in ("--prompt", PROMPT)]
    command = launch.own_command(
        "generate", "--model", model, "--dtype", options.dtype, "--threads", "1", "--ignore-eos",
        "--max-new-tokens", str(NEW_TOKENS), "--json", *stages, *prompts,
    )  # fmt: skip
    runs = []
    for _ in range(RUNS):
        print(f"generate {' '.join(stages)} of {requests}", file=sys.stderr, flush=True)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise CommfuseError(f"commfuse generate failed: {done.stderr.strip()}")
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    return max(runs, key=lambda run: run["stats"]["tokens_per_second"])


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    run_rank(Options(**{**given, "link": Link(**given["link"]) if given["link"] else None}))
