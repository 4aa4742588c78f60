"""On every rank, with a GPU: the ops against references that are formed here, and all checks of
results.
"""

import itertools
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from commfuse import ops
from commfuse.errors import BackendUnavailable
from commfuse.ops.matmul_all_reduce import reference as matmul_all_reduce_reference
from commfuse.testing.adapters import adapter_of
from commfuse.testing.cases import CASES, EDGE, MORE, QUICK
from commfuse.testing.gpu_cases import gpu_cases_of
from commfuse.testing.numerics import digest
from commfuse.testing.worker import load

GPU, ORDER, CORRIDOR = (
    load(Path(__file__).with_name(f"{name}.py")) for name in ("gpu", "gpu_order", "corridor")
)
ON_GPU = (
    "all_reduce",
    "all_reduce_rms_norm",
    "matmul",
    "matmul_all_reduce",
    "reduce_scatter",
    "all_gather",
)
# GEMMs need whole 16-byte vectors and at most 64 rows; Triton's fused kernels exchange one slot.
MAY_REFUSE = {
    "auto": (),
    "cuda": ("matmul", "matmul_all_reduce"),
    "triton": ("all_reduce_rms_norm", "matmul_all_reduce"),
}


def corridor(comm, triton_dtypes) -> GPU.Found:
    """The cases that tests and benchmarks share, against float64."""
    judge, failures, served = CORRIDOR.Judge(), [], dict.fromkeys(ON_GPU, 0)
    cases = [
        case
        for case in CASES
        if case.op in ON_GPU and case.kind == EDGE and "gate_up" not in case.options
    ]
    sizes = list(itertools.product(cases, GPU.DTYPES))
    for op in ("all_reduce", "all_reduce_rms_norm", "matmul_all_reduce", "matmul"):
        if op != "matmul" or comm.world_size == 2:  # no communication: once is enough
            larger = gpu_cases_of(op, comm.world_size, (QUICK, MORE))
            sizes += [(case, torch.bfloat16) for case in larger]
    for number, (case, dtype) in enumerate(sizes):
        adapter = adapter_of(case, dtype, comm.world_size, str(comm.device))
        inputs = adapter.inputs(seed=3)
        plain, expected = (
            adapter.share(results, comm.rank)
            for results in (adapter.composition(inputs), adapter.reference(inputs))
        )
        backends = GPU.backends_of(case.op, dtype, GPU.in_turn(comm, number, 5))
        for backend, rows in itertools.product(backends, (GPU.FUSED, GPU.UNFUSED)):
            if rows == GPU.UNFUSED and (backend, case.op) != ("cuda", "matmul_all_reduce"):
                continue
            comm._native.set_fused_rows(*rows)
            percent = GPU.CLAIMED[number % len(GPU.CLAIMED)]
            comm._native.set_claimed_percent(percent)
            label = f"{case.op} {case} {dtype} {backend}, fused rows {rows}, {percent}% claimed"
            try:
                out = adapter.call(adapter.prepare(inputs[comm.rank], backend), comm, backend)
            except BackendUnavailable as error:
                if case.op not in MAY_REFUSE[backend]:
                    failures.append(f"{label} is refused: {error}")
                continue
            served[case.op] += backend == "cuda"
            judge.see(label, f"{case.op} {dtype} {backend}", out, plain, expected)
            if case.op != "matmul" and not adapter.scattered:
                judge.digests[label] = digest(*out)
    failures += [f"{op}: the cuda backend has served nothing" for op in served if not served[op]]
    wrong, digests = judge.verdict()
    return failures + wrong + GPU.differing(digests, comm)


# One, odd, around 16-byte vectors and warps, one past a power of two, several calls of a payload.
SIZES = (1, 2, 3, 7, 8, 9, 31, 33, 255, 1023, 4097, 32768, 65537, 524289, 3_000_001)


def sums(comm, triton_dtypes) -> GPU.Found:
    """all_reduce: exact on integers, float32 in rank order and rounded once, again the same, at any
    address, in place; inputs are left alone.
    """
    failures, digests, ranks = [], {}, range(comm.world_size)
    shared = {dtype: comm.empty((max(SIZES),), dtype) for dtype in GPU.DTYPES}
    for (seed, size), dtype in itertools.product(enumerate(SIZES), GPU.DTYPES):
        # On odd ranks inputs do not begin at a multiple of 16 bytes.
        shift = comm.rank % 2
        for backend in GPU.backends_of("all_reduce", dtype, triton_dtypes):
            label = f"{size} {dtype} {backend}"
            for kind, make in (("integers", GPU.integers), ("reals", GPU.reals)):
                parts = [make(comm, (size,), dtype, seed, rank) for rank in ranks]
                expected = GPU.sum_in_rank_order(parts).to(dtype)
                mine = torch.empty(size + 1, dtype=dtype, device=str(comm.device))[shift:][:size]
                mine.copy_(parts[comm.rank])
                out = ops.all_reduce(mine, comm, backend)
                if not GPU.same_bits(out, expected):
                    failures.append(f"{label}: {kind} are not summed in rank order")
                if not GPU.same_bits(mine, parts[comm.rank]):
                    failures.append(f"{label}: {kind}, the input has changed")
                if not GPU.same_bits(out, ops.all_reduce(mine, comm, backend)):
                    failures.append(f"{label}: {kind}, other bits the second time")
                for memory in (mine, shared[dtype][:size].copy_(mine)):
                    result = ops.all_reduce_(memory, comm, backend)
                    if result is not memory or not GPU.same_bits(memory, expected):
                        failures.append(f"{label}: {kind}, in place")
            digests[label] = digest(out)
    return failures + GPU.differing(digests, comm)


def norms(comm, triton_dtypes) -> GPU.Found:
    """all_reduce_rms_norm: the sum with its residual is exact to the bit."""
    failures, digests, ranks = [], {}, range(comm.world_size)
    shapes = [(1, 1), (1, 8192), (3, 17), (5, 1023), (32, 8192), (129, 1040), (2, 20000)]
    for (seed, shape), dtype in itertools.product(enumerate(shapes), GPU.DTYPES):
        weight = GPU.reals(comm, shape[1:], dtype, seed, 90)
        for residual in (None, GPU.reals(comm, shape, dtype, seed, 91)):
            parts = [GPU.reals(comm, shape, dtype, seed, rank) for rank in ranks]
            total = GPU.sum_in_rank_order(parts)
            total = total if residual is None else total + residual.float()
            for backend in GPU.backends_of("all_reduce_rms_norm", dtype, triton_dtypes):
                label = f"{shape} {dtype} residual {residual is not None} {backend}"
                out = ops.all_reduce_rms_norm(
                    parts[comm.rank], residual, weight, GPU.EPS, comm, backend
                )
                again = ops.all_reduce_rms_norm(
                    parts[comm.rank], residual, weight, GPU.EPS, comm, backend
                )
                if not GPU.same_bits(out[1], total.to(dtype)):
                    failures.append(f"{label}: the sum is not in rank order")
                if not all(map(GPU.same_bits, out, again)):
                    failures.append(f"{label}: other bits the second time")
                digests[label] = digest(*out)
    return failures + GPU.differing(digests, comm)


def scattered_and_gathered(comm, triton_dtypes) -> GPU.Found:
    """reduce_scatter is all_reduce's slice; all_gather keeps every bit, NaN's too."""
    failures, ranks = [], range(comm.world_size)
    for (seed, columns), dtype in itertools.product(enumerate((1, 7, 4096, 400_001)), GPU.DTYPES):
        shape = (2 * comm.world_size, columns)
        parts = [GPU.reals(comm, shape, dtype, seed, rank) for rank in ranks]
        total = GPU.sum_in_rank_order(parts).to(dtype).chunk(comm.world_size)[comm.rank]
        for backend in ("auto", "cuda"):
            if not GPU.same_bits(ops.reduce_scatter(parts[comm.rank], comm, backend), total):
                failures.append(f"reduce_scatter {columns} {dtype} {backend}")
            rows = [part[:3].clone() for part in parts]
            for row in rows:
                row.view(-1)[0] = float("nan")
            if not GPU.same_bits(ops.all_gather(rows[comm.rank], comm, backend), torch.cat(rows)):
                failures.append(f"all_gather {columns} {dtype} {backend}")
    return failures


def uneven(comm, triton_dtypes) -> GPU.Found:
    """matmul_all_reduce on ranks that hold different parts of K, with all combinations of options;
    and exact where sums are small integers.
    """
    judge, failures, ranks = CORRIDOR.Judge(), [], range(comm.world_size)
    names = ("bias", "residual", "norm_weight")
    choices = itertools.cycle(itertools.product((False, True), repeat=3))
    # (K of rank 0, what each following rank has more): not all multiples of 16 bytes.
    parts_of_k = ((8, 8), (64, 128), (1000, 8), (1, 7), (31, 8), (64, 1))
    sizes = itertools.product((1, 2, 9, 33, 64, 65), (1, 17, 130, 1032), parts_of_k)
    for seed, (m, n, (k, more)) in enumerate(sizes):
        dtype = GPU.DTYPES[seed % 3]
        generator = GPU.generator_of(comm, seed)

        def random(*shape, scale=1.0, generator=generator, dtype=dtype):
            drawn = torch.randn(shape, generator=generator, device=str(comm.device))
            return (drawn * scale).to(dtype)

        ks = [k + more * rank for rank in ranks]
        xs, ws = [random(m, k) for k in ks], [random(n, k, scale=sum(ks) ** -0.5) for k in ks]
        options = {"bias": random(n), "residual": random(m, n), "norm_weight": random(n)}
        # RMSNorm of a single feature only keeps its sign: where that is small, errors explode.
        chosen = {
            name: options[name]
            for name, on in zip(names, next(choices), strict=True)
            if on and not (name == "norm_weight" and n == 1)
        }
        expected = GPU.tuple_of(matmul_all_reduce_reference(xs, ws, **chosen, eps=GPU.EPS))
        plain = CORRIDOR.composition(xs, ws, **chosen)
        whole_vectors = all(k * dtype.itemsize % 16 == 0 for k in ks)
        turn = GPU.in_turn(comm, seed, 21)
        for backend in GPU.backends_of("matmul_all_reduce", dtype, turn):
            if (backend != "auto" and m > 64) or (backend == "cuda" and not whole_vectors):
                continue
            label = f"{backend} {dtype} m={m} n={n} k={ks} {sorted(chosen)}"
            out = GPU.tuple_of(
                ops.matmul_all_reduce(
                    xs[comm.rank], ws[comm.rank], comm, **chosen, eps=GPU.EPS, backend=backend
                )
            )
            pool = f"{backend} {dtype} {'norm_weight' in chosen}"
            judge.see(label, pool, out, plain, expected)
            judge.digests[label] = digest(*out)
            xi = [GPU.integers(comm, (m, k), dtype, seed, rank, 1) for rank, k in enumerate(ks)]
            wi = [
                GPU.integers(comm, (n, k), dtype, seed, 50 + rank, 1) for rank, k in enumerate(ks)
            ]
            if sum(ks) <= 256:  # every partial sum is exact in bfloat16
                exact = sum(x.double() @ w.double().T for x, w in zip(xi, wi, strict=True))
                out = ops.matmul_all_reduce(xi[comm.rank], wi[comm.rank], comm, backend=backend)
                if not torch.equal(out.double(), exact):
                    failures.append(f"{label}: small integers are not exact")
    wrong, digests = judge.verdict()
    return failures + wrong + GPU.differing(digests, comm)


ROWS = (1, 2, 5, 7, 8, 9, 16, 17, 31, 32, 33, 48, 63, 64)


def batches(comm, triton_dtypes) -> GPU.Found:
    """A row's bits do not depend on how many rows there are."""
    failures = []
    for dtype, (n, k) in itertools.product(
        (torch.bfloat16, torch.float16), ((8192, 1024), (1280, 2048), (130, 72), (17, 8))
    ):
        comm._native.set_claimed_percent(20 if dtype == torch.float16 else 0)
        x, residual = (
            GPU.reals(comm, (64, k), dtype, 1, comm.rank),
            GPU.reals(comm, (64, n), dtype, 2, 0),
        )
        w, norm = GPU.reals(comm, (n, k), dtype, 3, comm.rank), GPU.reals(comm, (n,), dtype, 4, 0)

        def fused(rows, backend, x=x, w=w, residual=residual, norm=norm):
            return ops.matmul_all_reduce(
                x[:rows], w, comm, residual=residual[:rows], norm_weight=norm, eps=GPU.EPS,
                backend=backend,
            )  # fmt: skip

        calls = {"matmul": lambda rows, x=x, w=w: (ops.matmul(x[:rows], w, backend="cuda"),)}
        whole = {torch.bfloat16} if n in (8192, 130) else set()
        for backend in GPU.backends_of("matmul_all_reduce", dtype, whole):
            calls[f"matmul_all_reduce {backend}"] = lambda rows, b=backend, f=fused: f(rows, b)
        for name, call in calls.items():
            all_rows = call(64)
            for rows in ROWS:
                if not all(GPU.same_bits(a, b[:rows]) for a, b in zip(call(rows), all_rows)):  # noqa: B905
                    failures.append(f"{name} {dtype} n={n} k={k}: {rows} rows have other bits")
        # Nor on how the number of rows makes them travel.
        options = {"bias": norm, "residual": residual, "norm_weight": norm, "eps": GPU.EPS}
        for left_out in (None, "bias", "residual", "norm_weight"):
            chosen = {name: value for name, value in options.items() if name != left_out}
            ways = []
            for rows in (GPU.FUSED, GPU.UNFUSED):
                comm._native.set_fused_rows(*rows)
                out = ops.matmul_all_reduce(x, w, comm, **chosen, backend="cuda")
                ways.append(GPU.tuple_of(out))
            comm._native.set_fused_rows(*GPU.FUSED)
            if not all(map(GPU.same_bits, *ways)):
                failures.append(f"{dtype} n={n} k={k} without {left_out}: fused, other bits")
    return failures


def opcheck(comm, triton_dtypes) -> GPU.Found:
    """Schemas, aliasing and shape-only implementations, on CUDA tensors."""
    failures = []
    for dtype in GPU.DTYPES:
        x, w = (
            GPU.reals(comm, (4, 64), dtype, 1, comm.rank),
            GPU.reals(comm, (48, 64), dtype, 2, comm.rank),
        )
        row, residual = GPU.reals(comm, (48,), dtype, 3, 0), GPU.reals(comm, (4, 48), dtype, 4, 0)
        own, scattered = residual.clone(), GPU.reals(comm, (2 * comm.world_size, 3), dtype, 5, 0)
        for op, arguments in (
            (GPU.OPS.all_reduce.default, (x, comm.handle)),
            (GPU.OPS.all_reduce_.default, (own, comm.handle)),
            (GPU.OPS.all_reduce_rms_norm.default, (residual, residual, row, GPU.EPS, comm.handle)),
            (GPU.OPS.reduce_scatter.default, (scattered, comm.handle)),
            (GPU.OPS.all_gather.default, (x, comm.handle)),
            (GPU.OPS.matmul_all_reduce.default, (x, w, 48, comm.handle, row, residual)),
            (GPU.OPS.matmul_all_reduce.rms_norm,
             (x, w, 48, comm.handle, None, residual, row, GPU.EPS)),
        ):  # fmt: skip
            try:
                torch.library.opcheck(op, arguments)
            except Exception as error:
                failures.append(f"{op} {dtype}: {error}")
    return failures


def compiled(comm, triton_dtypes) -> GPU.Found:
    """A block with the ops inside, compiled whole: near the eager numbers, equal everywhere."""
    dtype, handle = torch.bfloat16, comm.handle
    gate, up, down = (
        GPU.reals(comm, shape, dtype, seed, comm.rank) * 0.01
        for seed, shape in enumerate(((256, 512), (256, 512), (512, 256)))
    )
    x, residual = GPU.reals(comm, (4, 512), dtype, 7, 0), GPU.reals(comm, (4, 512), dtype, 8, 0)
    norm = GPU.reals(comm, (512,), dtype, 9, 0)

    def block(x, residual):
        features = F.silu(F.linear(x, gate)) * F.linear(x, up)
        y, residual = GPU.OPS.matmul_all_reduce.rms_norm(
            features, down, 512, handle, None, residual, norm, GPU.EPS
        )
        total = GPU.OPS.all_reduce(y * 2, handle)
        GPU.OPS.all_reduce_(total, handle)
        return GPU.OPS.all_reduce_rms_norm(total, residual, norm, GPU.EPS, handle)

    eager = block(x, residual)
    out = torch.compile(block, fullgraph=True)(x, residual)
    comm.check()
    failures = []
    for name, a, b in zip(("y", "residual"), out, eager, strict=True):
        error = (a.double() - b.double()).abs().max() / b.double().abs().max()
        if not error < 2e-2:
            failures.append(f"{name}: error {error:.3g}")
    return failures + GPU.differing({"compiled": digest(*out)}, comm)


RESULTS = (
    corridor,
    sums,
    norms,
    scattered_and_gathered,
    uneven,
    ORDER.shapes_in_turn,
    batches,
    ORDER.layers,
    ORDER.replays,
    ORDER.stragglers,
    ORDER.control,
)
REGISTRATION = (opcheck, compiled)


def results(triton_dtypes: list[str]) -> dict[str, GPU.Found]:
    """What the checks of results have found wrong; on two ranks, also those of registration, to
    which the number of ranks makes no difference.
    """
    with torch.inference_mode():
        found = GPU.run_checks(
            RESULTS,
            {getattr(torch, name) for name in triton_dtypes},
            timeout=20.0,
            workspace_bytes=64 << 20,
        )
    if dist.get_world_size() == 2:
        # One rank may compile longer than another.
        found |= GPU.run_checks(REGISTRATION, set(), timeout=100.0)
    return found
