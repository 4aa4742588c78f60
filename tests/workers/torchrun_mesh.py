"""A program for torchrun: init_mesh from its environment. Prints one JSON object a rank."""

import json
import os
import sys

import torch
import torch.distributed as dist

from commfuse import ops
from commfuse.errors import UsageError
from commfuse.runtime.mesh import init_mesh


def main(folder: str, tp: int, pp: int) -> None:
    try:
        init_mesh(tp=tp + 1, pp=pp)
        refusal = ""
    except UsageError as error:
        refusal = str(error)
    with init_mesh(tp=tp, pp=pp) as mesh:
        rank = dist.get_rank()
        x = torch.tensor([10.0**rank])
        result = {
            "tp": (mesh.tp.rank, mesh.tp.world_size, mesh.tp.transport),
            "pp": (mesh.pp.rank, mesh.pp.world_size, mesh.pp.transport),
            "sums": [ops.all_reduce(x, mesh.tp).item(), ops.all_reduce(x, mesh.pp).item()],
            "names": mesh.device_mesh.mesh_dim_names,
            "refusal": refusal,
        }
        with open(os.path.join(folder, str(rank)), "w") as file:
            json.dump(result, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
