"""One rank of :func:`commfuse.testing.run_ranks`."""

from __future__ import annotations

import importlib.util
import os
import pickle
import sys
from pathlib import Path


def main(target: str, folder: str) -> None:
    """Loads the target by its path, calls it, and leaves its result in the folder."""
    import torch
    import torch.distributed as dist

    from commfuse.runtime.launch import join_job

    path, _, name = target.rpartition(":")
    torch.set_num_threads(1)
    join_job()
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    args = pickle.loads(Path(folder, "arguments").read_bytes())
    result = getattr(module, name)(*args)
    Path(folder, os.environ["RANK"]).write_bytes(pickle.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
