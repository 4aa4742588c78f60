"""init_mesh under a real torchrun, and in a process that nobody has launched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from commfuse import ops
from commfuse.errors import UsageError
from commfuse.runtime.communicator import Communicator
from commfuse.runtime.mesh import init_mesh

PROGRAM = str(Path(__file__).parents[1] / "workers" / "torchrun_mesh.py")


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (2, 2)])
def test_under_torchrun(tp, pp, tmp_path):
    world = tp * pp
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               str(world), PROGRAM, str(tmp_path), str(tp), str(pp)]  # fmt: skip
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for rank in range(world):
        result = json.loads((tmp_path / str(rank)).read_text())
        stage, place = divmod(rank, tp)
        assert result["tp"] == [place, tp, "shared memory"]
        assert result["pp"] == [stage, pp, "shared memory" if pp > 1 else "local"]
        assert result["sums"] == [
            sum(10.0 ** (stage * tp + other) for other in range(tp)),
            sum(10.0 ** (other * tp + place) for other in range(pp)),
        ]
        assert result["names"] == ["pp", "tp"]
        assert f"tp={tp + 1} x pp={pp} needs {(tp + 1) * pp} ranks" in result["refusal"]
        assert f"{world} were started" in result["refusal"]


def test_a_single_process_needs_no_launcher():
    with init_mesh() as mesh:
        assert mesh.device_mesh is None
        assert (mesh.tp.world_size, mesh.pp.transport) == (1, "local")
        assert ops.all_reduce(torch.ones(2), mesh.tp).tolist() == [1, 1]


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 3)])
def test_more_ranks_than_were_started(tp, pp):
    with pytest.raises(UsageError, match=f"torchrun --nproc-per-node {tp * pp}"):
        init_mesh(tp=tp, pp=pp)


@pytest.mark.parametrize(("tp", "pp"), [(0, 1), (1, -1)])
def test_impossible_sizes(tp, pp):
    with pytest.raises(UsageError, match="both must be at least 1"):
        init_mesh(tp=tp, pp=pp)


def test_a_forgotten_communicator_warns():
    comm = Communicator()
    with pytest.warns(ResourceWarning, match="never closed; use it in a with statement"):
        comm.__del__()


def test_a_communicator_of_one():
    with Communicator() as comm:
        assert (comm.rank, comm.world_size, comm.transport) == (0, 1, "local")
        assert comm.payload_bytes == comm.workspace_bytes == 0
        assert comm.workspace(0).numel() == 0
        comm.barrier()
        comm.check()
        ops.all_reduce(torch.ones(3), comm)
        assert (comm.statistics().calls, comm.statistics().bytes_sent) == (1, 0)
        comm.reset_statistics()
        assert comm.statistics().calls == 0
        with pytest.raises(ValueError, match="rank 1 of 1"):
            comm.workspace(1)
        comm.close()
        comm.close()  # twice does no harm


def test_more_ranks_than_the_segment_has_words_for():
    from commfuse import _extension

    with pytest.raises(RuntimeError, match="1 to 64 ranks, not 65"):
        _extension.require().SegmentServer(65, 4096, 0)
