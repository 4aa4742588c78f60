"""On every rank, with a GPU: calls that follow one another, in graphs and with late ranks."""

import itertools
from pathlib import Path

import torch
import torch.nn.functional as F

from commfuse import ops
from commfuse.bench.timing import gather
from commfuse.testing.numerics import digest
from commfuse.testing.worker import load

GPU = load(Path(__file__).with_name("gpu.py"))


def replays(comm, triton_dtypes) -> GPU.Found:
    """8,192 replays of a graph, with eager calls in between and late ranks, give the eager bits."""
    dtype, calls = torch.bfloat16, []
    for seed in range(3):  # inputs change from call to call, or old data would pass
        small = GPU.reals(comm, (1, 4096), dtype, seed, comm.rank)
        middle, large = (
            GPU.reals(comm, (rows, 4096), dtype, seed, comm.rank) for rows in (32, 256)
        )
        residual, norm = (
            GPU.reals(comm, (4, 4096), dtype, seed, 90),
            GPU.reals(comm, (4096,), dtype, 1, 91),
        )
        x, w = (GPU.reals(comm, (rows, 256), dtype, seed, comm.rank) for rows in (4, 4096))
        part = middle[:4].contiguous()
        calls += [
            lambda x=small: ops.all_reduce(x, comm, "cuda"),
            lambda x=middle: ops.all_reduce(x, comm, "cuda"),
            lambda x=part, r=residual, g=norm: ops.all_reduce_rms_norm(
                x, r, g, GPU.EPS, comm, "cuda"
            ),
            lambda x=x, w=w, r=residual, g=norm: ops.matmul_all_reduce(
                x, w, comm, residual=r, norm_weight=g, eps=GPU.EPS, backend="cuda"
            ),
        ]
        if seed == 0:
            calls.append(lambda x=large: ops.all_reduce(x, comm, "cuda"))
            for other in triton_dtypes:
                x = GPU.reals(comm, (1, 4096), other, seed, comm.rank)
                calls.append(lambda x=x: ops.all_reduce(x, comm, "triton"))
    expected = [[out.clone() for out in GPU.tuple_of(call())] for call in calls]
    wrong = torch.zeros((), dtype=torch.int64, device=str(comm.device))
    graph, eager = GPU.captured(calls, expected, wrong), 0
    for number in range(8192):
        if number % 1024 == 0:
            if comm.rank == number // 1024 % comm.world_size:
                torch.cuda._sleep(5 * GPU.MILLISECOND)
            eager += not GPU.same_bits(GPU.tuple_of(calls[0]())[0], expected[0][0])
        graph.replay()
    comm.check()
    found = [f"{wrong.item()} results of 8192 replays are wrong"] if wrong.item() else []
    # The counter counts: with other results expected, it finds that.
    control = GPU.captured(calls[:1], [[-out for out in expected[0]]], wrong.zero_())
    control.replay()
    comm.check()
    found += [] if wrong.item() == 1 else ["a wrong result in a graph is not found"]
    return found + ([f"{eager} eager calls between replays are wrong"] if eager else [])


def layers(comm, triton_dtypes) -> GPU.Found:
    """Row-parallel layers in a row, fused and not, each of what the one before has normalised,
    eagerly and in a graph: the same bits every time, whoever is late, whoever claims which tiles.
    """
    # Tiles for all ways of dealing and claiming them; neither N nor K is a multiple of a tile.
    hidden, k, failures = 64 * 200 + 8, 2056, []
    norm = GPU.reals(comm, (hidden,), torch.bfloat16, 1, 90)

    def weight(layer: int, rank: int) -> torch.Tensor:
        return GPU.reals(comm, (hidden, k), torch.bfloat16, layer, rank)

    def features(y: torch.Tensor) -> torch.Tensor:
        """Some of them, without a kernel between two layers."""
        return y.view(-1)[: len(y) * k].view(-1, k)

    weights = [weight(layer, comm.rank) for layer in range(4)]
    # Of one row a product goes in one shot, of two in two, of 64 from the staging area.
    comm._native.set_all_reduce_thresholds(30 << 10, 60 << 10)
    for rows in (1, 2, 64):
        start = GPU.reals(comm, (rows, hidden), torch.bfloat16, rows, 0)

        def block(start=start):
            y = residual = start
            for w in weights:
                y, residual = ops.matmul_all_reduce(
                    features(y), w, comm, residual=residual, norm_weight=norm, eps=GPU.EPS,
                    backend="cuda",
                )  # fmt: skip
            return y, residual

        y = exact = start.double()
        for layer, rank in itertools.product(range(len(weights)), range(comm.world_size)):
            exact = exact + features(y) @ weight(layer, rank).double().T
            if rank == comm.world_size - 1:
                y = F.rms_norm(exact, norm.shape, norm.double(), GPU.EPS)
        for fused, percent in itertools.product((GPU.FUSED, GPU.UNFUSED), GPU.CLAIMED):
            comm._native.set_fused_rows(*fused)
            comm._native.set_claimed_percent(percent)
            label = f"{rows} rows, fused rows {fused}, {percent}% claimed"
            expected = [out.clone() for out in block()]
            error = (expected[1].double() - exact).abs().max() / exact.abs().max()
            if not error < 0.03:
                failures.append(f"{label}: the residual is off by {error:.3g}")
            failures += GPU.differing({label: digest(*expected)}, comm)
            wrong = torch.zeros((), dtype=torch.int64, device=str(comm.device))
            graph, eager = GPU.captured([block, block], [expected, expected], wrong), 0
            for number in range(32):
                if number % 8 == 0 and comm.rank == number // 8 % comm.world_size:
                    torch.cuda._sleep(2 * GPU.MILLISECOND)
                graph.replay()
                if number % 8 == 4:
                    eager += not all(map(GPU.same_bits, block(), expected))
            comm.check()
            if eager or wrong.item():
                failures.append(f"{label}: {eager} eager results, {wrong.item()} replayed differ")
    return failures


def shapes_in_turn(comm, triton_dtypes) -> GPU.Found:
    """GEMMs that cut other numbers of tiles along K, one after the other in one workspace."""
    x = GPU.reals(comm, (9, 4096), torch.bfloat16, 1, comm.rank)
    weights = [
        GPU.reals(comm, (64 * n, 4096), torch.bfloat16, n, comm.rank) for n in (7, 1, 40, 3, 20)
    ]
    want = [F.linear(x.double(), w.double()) for w in weights]
    failures = []
    for i in range(4 * len(weights)):
        y = ops.matmul(x, weights[i % 5], backend="cuda")
        error = (y.double() - want[i % 5]).abs().max() / want[i % 5].abs().max()
        if not error < 0.01:
            failures.append(f"call {i}: {len(weights[i % 5])} columns are off by {error:.3g}")
    return failures


def soak(calls: int) -> GPU.Found:
    """Small all-reduces, a graph of 1,000 at a time."""
    with torch.cuda.stream(torch.cuda.Stream()), torch.inference_mode(), GPU.communicator() as comm:
        parts = [
            [GPU.integers(comm, (4096,), torch.bfloat16, seed, r) for r in range(comm.world_size)]
            for seed in range(8)
        ]
        mine, totals = [part[comm.rank] for part in parts], [sum(part) for part in parts]
        chain = [lambda x=mine[i % 8]: ops.all_reduce(x, comm, "cuda") for i in range(1000)]
        expected = [[totals[i % 8]] for i in range(1000)]
        wrong = torch.zeros((), dtype=torch.int64, device=str(comm.device))
        graph = GPU.captured(chain, expected, wrong)
        for _ in range(calls // 1000):
            graph.replay()
        comm.check()
        return [f"{wrong.item()} sums are wrong"] if wrong.item() else []


def _late_calls(comm, exchange, size: int, dtype: torch.dtype) -> int:
    """How many of an exchange's results are wrong, with each rank late in turn."""
    ranks, wrong = range(comm.world_size), 0
    for late in ranks:
        parts = [[GPU.integers(comm, (size,), dtype, s, r, 4) for r in ranks] for s in range(6)]
        outs = []
        for step, inputs in enumerate(parts):
            if comm.rank == late and step in (0, 2, 3):
                torch.cuda._sleep(3 * GPU.MILLISECOND)
            outs.append(exchange(inputs[comm.rank]))
        for out, inputs in zip(outs, parts, strict=True):
            wrong += not torch.equal(out, sum(inputs[1:], start=inputs[0]))
    return wrong


# Flag-in-data in one shot and in two, and two-shot in bulk.
LATE_BYTES = (4096, 64 << 10, 256 << 10, 2 << 20)


def stragglers(comm, triton_dtypes) -> GPU.Found:
    """Exact sums of numbers that change from call to call, with each rank late in turn."""
    failures, dtype = [], torch.bfloat16
    for nbytes in LATE_BYTES:
        w = torch.eye(8, dtype=dtype, device=str(comm.device))

        def multiplied(x, w=w):  # by one: matmul_all_reduce of eight columns
            rows = x[: 8 * 64].view(64, 8)
            return ops.matmul_all_reduce(rows, w, comm, backend="cuda").view(-1)

        exchanges = [
            ("cuda", dtype, lambda x: ops.all_reduce(x, comm, "cuda")),
            ("in place", dtype, lambda x: ops.all_reduce_(x.clone(), comm, "cuda")),
            ("gathered", dtype, lambda x: ops.all_gather(x, comm).view(comm.world_size, -1).sum(0)),
        ]
        if nbytes <= 256 << 10:
            exchanges += [
                ("triton", other, lambda x: ops.all_reduce(x, comm, "triton"))
                for other in triton_dtypes
            ]
        for name, of, exchange in exchanges:
            if wrong := _late_calls(comm, exchange, nbytes // of.itemsize, of):
                failures.append(f"{name}, {nbytes} bytes: {wrong} results are wrong")
    if wrong := _late_calls(comm, multiplied, 8 * 64, dtype):
        failures.append(f"matmul_all_reduce: {wrong} results are wrong")
    return failures


def control(comm, triton_dtypes) -> GPU.Found:
    """An exchange without signals, under the same late ranks: it must be found wrong."""
    areas = [comm.workspace(rank).view(torch.bfloat16) for rank in range(comm.world_size)]

    def exchange(x: torch.Tensor) -> torch.Tensor:
        areas[comm.rank][: x.numel()] = x
        return sum(area[: x.numel()].float() for area in areas).to(x.dtype)

    wrong = sum(gather(_late_calls(comm, exchange, 2048, torch.bfloat16), comm))
    return [] if wrong else ["an exchange without signals passes"]
