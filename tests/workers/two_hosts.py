"""A program for torchrun on two hosts: a model in stages, one on each; leaves a file a rank."""

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from commfuse.errors import CommfuseError
from commfuse.generation import Generator, Pipeline
from commfuse.models.checkpoint import open_checkpoint
from commfuse.models.llama import Llama
from commfuse.models.stages import cut_stages
from commfuse.runtime.launch import join_job
from commfuse.runtime.mesh import init_mesh


def main(folder: str, model_path: str, tp: int, prompts: list[list[int]], new_tokens: int) -> None:
    torch.set_num_threads(1)
    join_job()
    with init_mesh(tp=tp, pp=2) as mesh:
        with open_checkpoint(Path(model_path)) as checkpoint:
            stage = cut_stages(checkpoint.config, 2)[mesh.pp.rank]
            model = Llama(checkpoint, mesh.tp, stage=stage)
        generator = Generator(model, Pipeline(model, mesh.pp))
        result = {
            "tp": mesh.tp.transport,
            "pp": mesh.pp.transport,
            "why": mesh.pp.transport_reason,
            "outputs": generator.generate(prompts, new_tokens, draft_length=3).outputs,
        }
        dist.barrier()

        def leave() -> None:
            unfinished = Path(folder, f"{dist.get_rank()}.part")
            unfinished.write_text(json.dumps(result))
            unfinished.rename(unfinished.with_suffix(".json"))

        # The second host's stage is killed in the middle of the next generation.
        seen, killed_at = [0], [0.0]

        def on_tokens(index: int, tokens: list[int]) -> None:
            seen[0] += 1
            if seen[0] == 8:
                killed_at[0] = time.monotonic()
                if mesh.pp.rank == 1:
                    leave()
                    os.kill(os.getpid(), 9)

        try:
            generator.generate(prompts, new_tokens, on_tokens=on_tokens)
        except CommfuseError as error:
            seconds = time.monotonic() - killed_at[0]
            result["killed"] = type(error).__name__, str(error), seconds
        leave()
    os._exit(0)  # the other host is gone: no process group to leave


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]), int(sys.argv[5]))
