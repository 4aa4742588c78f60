"""An MLP of your own on two processes: torchrun --nproc-per-node 2 examples/own_block.py"""

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
    mlp = nn.Sequential(  # on the meta device, a layer has no weights yet
        ColumnParallelLinear.from_linear(nn.Linear(64, 256, device="meta"), mesh.tp),
        nn.GELU(),
        RowParallelLinear.from_linear(nn.Linear(256, 64, device="meta"), mesh.tp),
    )
    mlp.load_state_dict(whole.state_dict())  # each rank takes its part of the whole tensors
    error = (mlp(x) - whole(x)).abs().max().item()
    if mesh.tp.rank == 0:
        print(f"{mesh.tp.world_size} ranks, largest difference {error:.1e}")
dist.destroy_process_group()
