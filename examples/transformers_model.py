"""A model of transformers on two processes: torchrun --nproc-per-node 2 FILE [DIRECTORY]"""

import sys

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

import commfuse
from commfuse.models.smollm2 import ensure_smollm2

torch.set_num_threads(1)  # each process computes its part on a core of its own
dist.init_process_group("gloo")
path = sys.argv[1] if len(sys.argv) > 1 else str(ensure_smollm2())
tokenizer = AutoTokenizer.from_pretrained(path)
prompt = tokenizer("The capital of France is", return_tensors="pt")

with commfuse.init_mesh(tp=dist.get_world_size()) as mesh:
    model = commfuse.parallelize(path, mesh)
    tokens = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    if mesh.tp.rank == 0:
        print(tokenizer.decode(tokens[0], skip_special_tokens=True))
dist.destroy_process_group()
