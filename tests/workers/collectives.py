"""On every rank: collectives against sums that are formed here, without the package."""

import torch

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


def _generator(seed: int, rank: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * seed + rank)


def _integers(shape, dtype, seed, rank):
    return torch.randint(-9, 10, shape, generator=_generator(seed, rank)).to(dtype)


def _reals(shape, dtype, seed, rank):
    """Numbers of very different magnitudes, so that the order of additions shows."""
    generator = _generator(seed, rank)
    scale = torch.exp2(torch.randint(-6, 7, shape, generator=generator).float())
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


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
    found = {"exact": [], "order": [], "repeat": [], "norm": [], "inputs": []}
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
                for seed, shape in enumerate([(0, 33), (1, 1), (1, 15), (5, 17), (3, 1025)]):
                    _check_norm(comm, shape, dtype, seed, payload, found, digests)
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

    parts = [_reals(shape, dtype, seed, rank) for rank in ranks]
    out = ops.all_reduce(parts[comm.rank], comm, "cpu")
    if not _same_bits(out, _sum_in_rank_order(parts).to(dtype)):
        found["order"].append(name)
    digests[name] = digest(out)
    digests[f"torch {name}"] = digest(ops.all_reduce(parts[comm.rank], comm, "torch"))
    for _ in range(2):
        if not _same_bits(out, ops.all_reduce(parts[comm.rank], comm, "cpu")):
            found["repeat"].append(name)


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
    import torch.distributed as dist

    return check(dist.group.WORLD)
