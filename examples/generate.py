"""Text from prompts, on two processes: torchrun --nproc-per-node 2 FILE [DIRECTORY]"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

import commfuse
from commfuse.generation import Generator
from commfuse.models.checkpoint import open_checkpoint
from commfuse.models.llama import Llama
from commfuse.models.smollm2 import ensure_smollm2

torch.set_num_threads(1)  # each process computes its part on a core of its own
dist.init_process_group("gloo")
path = Path(sys.argv[1]) if len(sys.argv) > 1 else ensure_smollm2()
prompts = ["The capital of France is", "Water boils at"]

with commfuse.init_mesh(tp=dist.get_world_size()) as mesh, open_checkpoint(path) as checkpoint:
    tokenizer = checkpoint.tokenizer()
    model = Llama(checkpoint, mesh.tp)  # each rank reads its slices
    result = Generator(model).generate([tokenizer.encode(p) for p in prompts], max_new_tokens=16)
    for prompt, tokens in zip(prompts, result.outputs, strict=True):
        if mesh.tp.rank == 0:
            print(prompt + tokenizer.decode(tokens))
dist.destroy_process_group()
