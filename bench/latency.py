"""A single request in stages beside one rank, in pairs: what stages add to its latency.

Machines do not keep their speed for long, and their cores differ. So every rank also holds the
whole model; in each round every core decodes by itself, the others asleep, and then all of them in
stages. A stage's part of a token counts at the pace of its own core.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from commfuse.errors import CommfuseError
from commfuse.generation import Generator, Pipeline
from commfuse.models.checkpoint import open_checkpoint
from commfuse.models.llama import Llama
from commfuse.models.stages import cut_stages
from commfuse.runtime import launch
from commfuse.runtime.communicator import Communicator
from commfuse.runtime.link import Link
from commfuse.runtime.mesh import init_mesh

ROUNDS, NEW_TOKENS = 9, 24
PROMPT = range(100, 112)


def added_by_stages(
    alone: Sequence[Sequence[float]], staged: Sequence[float], idle: Sequence[Sequence[float]]
) -> list[float]:
    """By round, what stages add to a token's time, as a part of it.

    Args:
        alone: by round and rank, milliseconds of a token on that rank by itself.
        staged: by round, milliseconds of a token in stages.
        idle: by round and rank, the part of its time that the stage has waited.

    Example:
        >>> added_by_stages([[20, 30]], [25.2], [[0.5, 0.5]])
        [0.05]
    """
    found = []
    for own, total, waited in zip(alone, staged, idle, strict=True):
        busy = 1 - np.array(waited)
        # A stage that is busy for a part b of the time has done b / own of the work in it.
        found.append(float(total * (busy / busy.sum() / np.array(own)).sum() - 1))
    return found


def measure(stages: int, path: Path, dtype: str, link: Link | None) -> dict:
    """Figures of a single request, for a row.

    Raises:
        CommfuseError: a rank failed, or stages have changed a token.
    """
    options = json.dumps([stages, str(path), dtype, vars(link) if link else None])
    ranks = [sys.executable, "-m", "commfuse.bench.latency", options]
    results = launch.run_ranks(ranks, stages, timeout=600)
    if failed := [result for result in results if result.status]:
        raise CommfuseError(f"stage {failed[0].rank}: {failed[0].stderr.strip()}")
    return json.loads(results[0].stdout.splitlines()[-1])


def run_rank(stages: int, path: str, dtype: str, link: Link | None) -> None:
    """Decodes on this rank, by itself and as a stage; the first prints the figures."""
    torch.set_num_threads(1)
    launch.join_job()
    rank, cores = dist.get_rank(), sorted(os.sched_getaffinity(0))
    if len(cores) >= stages:
        os.sched_setaffinity(0, {cores[rank]})
    links = {"pp": link} if link else None
    try:
        with (
            init_mesh(pp=stages, links=links) as mesh,
            Communicator() as single,
            open_checkpoint(path) as checkpoint,
        ):
            kind = getattr(torch, dtype)
            whole = Generator(Llama(checkpoint, single, kind))
            cut = cut_stages(checkpoint.config, stages)
            model = Llama(checkpoint, mesh.tp, kind, stage=cut[rank])
            staged = Generator(model, Pipeline(model, mesh.pp))
            found = _rounds(mesh.pp, whole, staged)
            found["layers"] = [len(stage.layers) for stage in cut]
            if rank == 0:
                print(json.dumps(found), flush=True)
    finally:
        dist.destroy_process_group()


def _rounds(comm: Communicator, whole: Generator, staged: Generator) -> dict:
    def decode(generator: Generator) -> tuple[float, list[float], list[int]]:
        done = generator.generate([PROMPT], NEW_TOKENS)
        statistics = done.statistics
        each_ms = statistics.decode_seconds / statistics.steps * 1e3
        return each_ms, statistics.decode_idle, done.outputs[0]

    alone, together, idle, tokens = [], [], [], set()
    for _ in range(1 + ROUNDS):
        own = None
        for rank in range(comm.world_size):
            comm.gather(None)  # asleep until then, so that the other cores are at rest
            if rank == comm.rank:
                own = decode(whole)
        alone.append([each_ms for each_ms, _, _ in comm.gather(own)])
        every = comm.gather(decode(staged))
        tokens |= {tuple(output) for *_, output in (own, *every)}
        together.append(every[-1][0])
        idle.append(every[0][1])
    if len(tokens) != 1:
        raise CommfuseError("stages have changed a token")
    added = added_by_stages(alone[1:], together[1:], idle[1:])
    p20, p50, p80 = np.percentile(added, [20, 50, 80])
    return {
        "token_ms": round(float(np.median(together[1:])), 3),
        "one_rank_token_ms": [round(float(each), 3) for each in np.median(alone[1:], axis=0)],
        "added": round(float(p50), 4),
        "added_p20_p80": [round(float(p20), 4), round(float(p80), 4)],
        "rounds": ROUNDS,
    }


if __name__ == "__main__":
    *given, emulated = json.loads(sys.argv[1])
    run_rank(*given, Link(**emulated) if emulated else None)
