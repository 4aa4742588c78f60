"""What ``explain`` says of the algorithms behind our CUDA kernels; GPUs test the choice itself."""

from types import SimpleNamespace

import pytest
import torch

from commfuse.errors import UsageError
from commfuse.ops._cuda_ways import (
    all_reduce_rms_norm_way,
    all_reduce_way,
    matmul_all_reduce_way,
)
from commfuse.ops._registry import Backend, Op, Query
from commfuse.runtime.tuning import Table

KIB = 1 << 10


def communicator(table: Table) -> SimpleNamespace:
    """Chooses as the extension does, as far as tables go."""

    def algorithm(nbytes):
        by_flags = "two_shot" if nbytes <= table.lines_bytes else "bulk"
        return "one_shot" if nbytes <= table.one_shot_bytes else by_flags

    def sends_tiles(is_float32, m, n):
        return not is_float32 and table.fused_from_rows <= m <= table.fused_to_rows

    native = SimpleNamespace(all_reduce_algorithm=algorithm, sends_tiles=sends_tiles)
    return SimpleNamespace(_native=native, table=table, table_source="a table", world_size=2)


COMM = communicator(Table(64 * KIB, 512 * KIB, 8, 64))


def query(*shape, dtype=torch.bfloat16):
    return Query("cuda", dtype, None, shape)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((8, 4096), "one shot, flags among the data, for 65536 bytes"),
        ((9, 4096), "two shots, flags among the data, for 73728 bytes"),
        ((1024, 4096), "two shots in bulk, for 8388608 bytes"),
    ],
)
def test_an_all_reduce_names_its_algorithm_and_the_table(shape, words):
    text = all_reduce_way(COMM, query(*shape))
    assert text.startswith(words)
    assert "one shot up to 65536, flags up to 524288: a table" in text
    assert all_reduce_rms_norm_way(COMM, query(*shape)).startswith(words)


@pytest.mark.parametrize(
    ("comm", "asked", "words"),
    [
        (COMM, query(8, 4096, 8192), "fused, tiles sent while the GEMM computes (fused from 8 to"),
        (COMM, query(1, 4096, 8192), "a GEMM (fused from 8 to 64 rows), then one shot"),
        (COMM, query(65, 4096, 8192), "a GEMM (fused from 8 to 64 rows), then two shots in bulk"),
        (COMM, query(8, 64, 64, dtype=torch.float32), "a GEMM (float32 is not fused), then one"),
        (communicator(Table(1, 1, 1, 0)), query(8, 64, 64), "a GEMM (never fused), then two shots"),
        (
            communicator(Table(1, 1, 1, 0, 20)),
            query(8, 64, 64),
            "a GEMM (never fused, 20% of its tiles claimed), then two shots",
        ),
    ],
)
def test_a_row_parallel_layer_says_whether_it_is_fused(comm, asked, words):
    assert matmul_all_reduce_way(comm, asked).startswith(words)


def test_a_shape_without_output_features_is_refused():
    with pytest.raises(UsageError, match=r"is \(m, k, n\), not \(8, 4096\)"):
        matmul_all_reduce_way(COMM, query(8, 4096))


def test_an_explanation_says_the_way_where_a_shape_is_given():
    op = Op("probe", (Backend("cuda", len, lambda comm, query: None, way=all_reduce_way),))
    with_shape = op.explain("auto", COMM, query(8, 4096))
    assert with_shape.reasons["cuda"].startswith("chosen: one shot, flags among the data")
    without = op.explain("auto", COMM, Query("cuda", torch.bfloat16))
    assert without.reasons == {"cuda": "chosen"}
