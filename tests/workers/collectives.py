"""On every rank: collectives against sums that are formed here, without the package."""

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from commfuse import ops
from commfuse.runtime.communicator import Communicator
from commfuse.testing.numerics import complaint, digest

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Around the 16 lanes of a vector; 2048 and more need several calls of a 4 KiB payload.
SIZES = (0, 1, 2, 15, 16, 17, 31, 33, 255, 1023, 1024, 1025, 2048, 2049, 5001)
SHAPES = ((0, 5), (4, 0), (3, 17), (64, 33), (2, 3, 5), (2, 1, 3, 1, 2, 2, 3))
# Several slices of one-shot; two-shot among three ranks or more (from 64 KiB on); odd borders.
LARGE = (16384, 16385, 32767, 32768, 70001)
SMALL_PAYLOAD = 4096
KINDS = (
    *("exact", "order", "repeat", "norm", "inputs"),
    *("in place", "bits", "traffic", "refusal", "shapes"),
)


def _generator(seed: int, rank: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * seed + rank)


def _integers(shape, dtype, seed, rank):
    return torch.randint(-9, 10, shape, generator=_generator(seed, rank)).to(dtype)


def _reals(shape, dtype, seed, rank):
    """Numbers of very different magnitudes, so that the order of additions shows."""
    generator = _generator(seed, rank)
    scale = torch.exp2(torch.randint(-6, 7, shape, generator=generator).float())
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def _any_bits(shape, dtype, seed, rank):
    """NaN of all kinds, infinities, subnormal numbers, and what else there is."""
    integers = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    limits = torch.iinfo(integers)
    generator = _generator(seed, rank)
    drawn = torch.randint(limits.min, limits.max, shape, generator=generator, dtype=integers)
    return drawn.view(dtype)


def _sum_in_rank_order(parts: list[torch.Tensor]) -> torch.Tensor:
    """float32 sums, added in rank order, not yet rounded to the parts' dtype."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and digest(a) == digest(b)


def check(comm_group) -> dict:
    """All checks; returns the failures of each kind and the digests that ranks must share."""
    found = {kind: [] for kind in KINDS}
    digests = {}
    for payload in (SMALL_PAYLOAD, None):
        options = {"payload_bytes": payload} if payload else {}
        with Communicator(comm_group, **options) as comm:
            if payload and comm.world_size > 1 and comm.payload_bytes != payload:
                found["exact"].append(f"the payload has {comm.payload_bytes} bytes")
            shapes = [(n,) for n in SIZES] + list(SHAPES)
            if payload is None:
                shapes = [(n,) for n in LARGE] + [(17,), (3, 17)]
            for dtype in DTYPES:
                for seed, shape in enumerate(shapes):
                    _check_all_reduce(comm, shape, dtype, seed, payload, found, digests)
                    _check_reduce_scatter(comm, shape, dtype, seed, payload, found)
                    _check_all_gather(comm, shape, dtype, seed, payload, found, digests)
                for seed, shape in enumerate([(0, 33), (1, 1), (1, 15), (5, 17), (3, 1025)]):
                    _check_norm(comm, shape, dtype, seed, payload, found, digests)
                _check_refusal(comm, dtype, found)
                _check_shapes(comm, dtype, found)
    return {"found": found, "digests": digests}


def _check_all_reduce(comm, shape, dtype, seed, payload, found, digests):
    ranks = range(comm.world_size)
    name = f"{dtype} {list(shape)}, payload {payload}"
    parts = [_integers(shape, dtype, seed, rank) for rank in ranks]
    expected = torch.stack([part.to(torch.int64) for part in parts]).sum(0)
    for backend in ("cpu", "torch"):
        mine = parts[comm.rank].clone()
        out = ops.all_reduce(mine, comm, backend)
        if out.dtype != dtype or not torch.equal(out.to(torch.int64), expected):
            found["exact"].append(f"{backend}: {name}")
        if not _same_bits(mine, parts[comm.rank]):
            found["inputs"].append(f"{backend}: {name}")
        if ops.all_reduce_(mine, comm, backend) is not mine or not _same_bits(mine, out):
            found["in place"].append(f"{backend}: {name}")

    parts = [_reals(shape, dtype, seed, rank) for rank in ranks]
    out = ops.all_reduce(parts[comm.rank], comm, "cpu")
    if not _same_bits(out, _sum_in_rank_order(parts).to(dtype)):
        found["order"].append(name)
    digests[name] = digest(out)
    digests[f"torch {name}"] = digest(ops.all_reduce(parts[comm.rank], comm, "torch"))
    for _ in range(2):
        if not _same_bits(out, ops.all_reduce(parts[comm.rank], comm, "cpu")):
            found["repeat"].append(name)
    mine = parts[comm.rank].clone()
    if ops.all_reduce_(mine, comm, "cpu") is not mine or not _same_bits(mine, out):
        found["in place"].append(name)


def _check_reduce_scatter(comm, shape, dtype, seed, payload, found):
    """shape: of each rank's part."""
    world, whole = comm.world_size, (comm.world_size * shape[0], *shape[1:])
    name = f"reduce_scatter {dtype} {list(shape)}, payload {payload}"
    rows = slice(comm.rank * shape[0], (comm.rank + 1) * shape[0])
    parts = [_integers(whole, dtype, seed, rank) for rank in range(world)]
    expected = torch.stack([part.to(torch.int64) for part in parts]).sum(0)[rows]
    for backend in ("cpu", "torch"):
        mine = parts[comm.rank].clone()
        out = ops.reduce_scatter(mine, comm, backend)
        if out.dtype != dtype or not torch.equal(out.to(torch.int64), expected):
            found["exact"].append(f"{backend}: {name}")
        if not _same_bits(mine, parts[comm.rank]):
            found["inputs"].append(f"{backend}: {name}")

    parts = [_reals(whole, dtype, seed, rank) for rank in range(world)]
    comm.reset_statistics()
    out = ops.reduce_scatter(parts[comm.rank], comm, "cpu")
    if not _same_bits(out, _sum_in_rank_order(parts).to(dtype)[rows]):
        found["order"].append(name)
    _check_traffic(comm, out, (comm.payload_bytes // dtype.itemsize) // world, name, found)
    if not _same_bits(out, ops.reduce_scatter(parts[comm.rank], comm, "cpu")):
        found["repeat"].append(name)


def _check_all_gather(comm, shape, dtype, seed, payload, found, digests):
    name = f"all_gather {dtype} {list(shape)}, payload {payload}"
    parts = [_any_bits(shape, dtype, seed, rank) for rank in range(comm.world_size)]
    for backend in ("cpu", "torch"):
        mine = parts[comm.rank].clone()
        comm.reset_statistics()
        out = ops.all_gather(mine, comm, backend)
        if backend == "cpu":
            _check_traffic(comm, mine, comm.payload_bytes // dtype.itemsize, name, found)
        digests[f"{backend} {name}"] = digest(out)
        if not _same_bits(out, torch.cat(parts)):
            found["bits"].append(f"{backend}: {name}")
        if out.numel() and out.data_ptr() == mine.data_ptr():
            found["bits"].append(f"{backend}: {name} shares memory with its input")
        if not _same_bits(mine, parts[comm.rank]):
            found["inputs"].append(f"{backend}: {name}")


def _check_traffic(comm, to_each, capacity, name, found):
    """Since the last reset: as many calls as a message to each peer takes, and its bytes."""
    statistics, peers = comm.statistics(), comm.world_size - 1
    calls = max(1, -(-to_each.numel() // capacity)) if peers else 1
    if (statistics.calls, statistics.bytes_sent) != (calls, peers * to_each.nbytes):
        found["traffic"].append(f"{name}: {statistics}, not {calls} calls")


def _check_refusal(comm, dtype, found):
    """Rows that the ranks cannot share are refused before anything is exchanged."""
    world = comm.world_size
    if world == 1:
        return
    x = torch.ones(2 * world + 1, 3, dtype=dtype)
    text = f"x has {2 * world + 1} rows, which {world} ranks cannot share evenly; "
    text += f"use {2 * world} or {3 * world}"
    comm.reset_statistics()
    for backend in ("cpu", "torch"):
        try:
            ops.reduce_scatter(x, comm, backend)
            found["refusal"].append(f"{backend} {dtype}: nothing raised")
        except ValueError as error:
            if str(error) != text:
                found["refusal"].append(f"{backend} {dtype}: {error}")
    if comm.statistics().calls:
        found["refusal"].append(f"{dtype}: {comm.statistics()}")


def _check_shapes(comm, dtype, found):
    """What shape-only calls (torch.compile's) say of an output's shape and dtype."""
    x = torch.ones(2 * comm.world_size, 3, dtype=dtype)
    for name in ("all_reduce", "all_reduce_", "reduce_scatter", "all_gather"):
        op = getattr(torch.ops.commfuse, name)
        real = op(x.clone(), comm.handle)
        with FakeTensorMode() as mode:
            fake = op(mode.from_tensor(x), comm.handle)
        if real is not None and (fake.shape, fake.dtype) != (real.shape, real.dtype):
            found["shapes"].append(f"{name} {dtype}: {fake.shape}, not {real.shape}")
        if (real is None) != (fake is None):
            found["shapes"].append(f"{name} {dtype}: {fake}, not {real}")


def _check_norm(comm, shape, dtype, seed, payload, found, digests):
    eps = 1e-5
    parts = [_reals(shape, dtype, seed, rank) for rank in range(comm.world_size)]
    weight = _reals(shape[1:], dtype, seed, 90)
    for residual in (None, _reals(shape, dtype, seed, 91)):
        name = f"norm {dtype} {list(shape)}, residual {residual is not None}, payload {payload}"
        total = _sum_in_rank_order(parts)
        if residual is not None:
            total = total + residual.float()
        exact = sum(part.double() for part in parts)
        exact = exact if residual is None else exact + residual.double()
        scale = torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
        for backend in ("cpu", "torch"):
            y, summed = ops.all_reduce_rms_norm(
                parts[comm.rank], residual, weight, eps, comm, backend
            )
            digests[f"{backend} {name}"] = digest(y, summed)
            if backend == "cpu" and not _same_bits(summed, total.to(dtype)):
                found["order"].append(name)
            plain = torch.nn.functional.rms_norm(total.to(dtype), weight.shape, weight, eps)
            problem = complaint(y, plain, exact * scale * weight.double())
            # gloo adds in an order of its own, and rounds on the way.
            if problem and backend == "cpu":
                found["norm"].append(f"{name}: {problem}")


def run() -> dict:
    """On the ranks of a job."""
    return check(dist.group.WORLD)
