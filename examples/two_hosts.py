"""A layer over the ranks of two hosts. On each, with the first host's address and its own number:
torchrun --nnodes 2 --node-rank 0 --master-addr HOST --master-port 29500 --nproc-per-node 2 FILE"""

import socket

import torch
import torch.distributed as dist
from torch import nn

import commfuse
from commfuse.nn import ColumnParallelLinear, RowParallelLinear

dist.init_process_group("gloo")
torch.manual_seed(0)
whole = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).requires_grad_(False)
x = torch.randn(2, 5, 64)

with commfuse.init_mesh(tp=dist.get_world_size()) as mesh:
    mlp = nn.Sequential(
        ColumnParallelLinear.from_linear(whole[0], mesh.tp),
        nn.GELU(),
        RowParallelLinear.from_linear(whole[2], mesh.tp),
    )
    error = (mlp(x) - whole(x)).abs().max().item()
    if dist.get_node_local_rank() == 0:  # once a host
        print(f"{socket.gethostname()}: {mesh.tp.world_size} ranks over {mesh.tp.transport}")
        print(f"largest difference {error:.1e}")
dist.destroy_process_group()
