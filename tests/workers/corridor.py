"""On every rank: every op and backend against float64, with at most twice the error of torch."""

import itertools
from collections import defaultdict

import torch
import torch.distributed as dist
import torch.nn.functional as F

from commfuse import ops
from commfuse.ops.matmul_all_reduce import reference
from commfuse.runtime.communicator import Communicator
from commfuse.testing.adapters import adapter_of
from commfuse.testing.cases import CASES
from commfuse.testing.numerics import complaint, digest

LOCAL = ("matmul", "attention")  # no communication: no two ranks must agree
FEW = 4096
EPS = 1e-5


class Judge:
    """Compares outputs with the reference and with plain torch.

    The largest error of few numbers is luck, ours as well as torch's: results of less than 4096
    numbers, all of a magnitude about 1, are judged together at the end.
    """

    def __init__(self):
        self.failures: list[str] = []
        self.digests: dict[str, str] = {}
        self._pool = defaultdict(list)

    def see(self, label: str, pool: str, out, plain, expected) -> None:
        """One call's outputs; ``pool`` says which small ones belong together."""
        for index, parts in enumerate(zip(out, plain, expected, strict=True)):
            if parts[0].is_floating_point() and parts[0].numel() < FEW:
                if any(part.shape != parts[0].shape for part in parts):
                    self.failures.append(f"{label}: shapes {[part.shape for part in parts]}")
                self._pool[f"{pool} {index}"].append([part.flatten() for part in parts])
            elif problem := complaint(*parts):
                self.failures.append(f"{label}, output {index}: {problem}")

    def verdict(self) -> tuple[list[str], dict[str, str]]:
        """(failures, the digests that ranks must share)."""
        for pool, cases in self._pool.items():
            if problem := complaint(*(torch.cat(parts) for parts in zip(*cases, strict=True))):
                self.failures.append(f"{pool}, {len(cases)} small cases: {problem}")
        return self.failures, self.digests


def shared_cases(dtypes: list[str], kinds: list[str]) -> tuple[list[str], dict[str, str]]:
    """The cases that tests and benchmarks share."""
    judge = Judge()
    with Communicator(dist.group.WORLD) as comm:
        for case, name in itertools.product(CASES, dtypes):
            if case.kind not in kinds:
                continue
            adapter = adapter_of(case, getattr(torch, name), comm.world_size)
            inputs = adapter.inputs(seed=3)
            expected = adapter.share(adapter.reference(inputs), comm.rank)
            plain = adapter.share(adapter.composition(inputs), comm.rank)
            # cuda needs a GPU, triton its interpreter: tests/triton_kernels.
            names = {b.name for b in ops.op(case.op).backends} - {"cuda", "triton", "hierarchical"}
            for backend in sorted(names):
                mine = adapter.prepare(inputs[comm.rank], backend)
                out = adapter.call(mine, comm, backend)
                label = f"{case.op} {case} {name} {backend}"
                judge.see(label, f"{case.op} {name} {backend}", out, plain, expected)
                if case.op not in LOCAL and not adapter.scattered:
                    judge.digests[label] = digest(*out)
    return judge.verdict()


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NS = (1, 15, 16, 17, 63, 64, 65, 577, 1030)
# Rows around the kernels' tiles of four and six; K of rank 0, the others have more, odd and even.
MS, KS = (0, 1, 2, 3, 4, 5, 6, 7, 13, 64), (1, 31, 96)


def _inputs(m: int, n: int, k: int, dtype, world: int, seed: int):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    ks = [k + 7 * rank for rank in range(world)]
    xs = [random(m, k) for k in ks]
    ws = [random(n, k, scale=sum(ks) ** -0.5) for k in ks]
    return xs, ws, {"bias": random(n), "residual": random(m, n), "norm_weight": random(n)}


def composition(xs, ws, bias=None, residual=None, norm_weight=None):
    total = F.linear(xs[0], ws[0])
    for x, w in zip(xs[1:], ws[1:], strict=True):
        total = total + F.linear(x, w)
    for addend in (bias, residual):
        total = total if addend is None else total + addend
    if norm_weight is None:
        return (total,)
    return F.rms_norm(total, norm_weight.shape, norm_weight, EPS), total


def uneven_matmul_all_reduce(all_sizes: bool) -> tuple[list[str], dict[str, str]]:
    """Ranks that hold different parts of K, all combinations of the optional inputs."""
    judge = Judge()
    with Communicator(dist.group.WORLD) as comm:
        names = ("bias", "residual", "norm_weight")
        choices = itertools.cycle(itertools.product((False, True), repeat=3))
        for seed, (dtype, n, m, k) in enumerate(itertools.product(DTYPES, NS, MS, KS)):
            choice = next(choices)
            if (seed + m) % 4 and not all_sizes:
                continue  # a quarter of them, another one for every number of rows
            xs, ws, options = _inputs(m, n, k, dtype, comm.world_size, seed)
            # RMSNorm of a single feature only keeps its sign: where that is small, errors explode.
            chosen = {name: options[name] for name, on in zip(names, choice, strict=True)
                      if on and not (name == "norm_weight" and n == 1)}  # fmt: skip
            expected = reference(xs, ws, **chosen, eps=EPS)
            expected = expected if isinstance(expected, tuple) else (expected,)
            plain = composition(xs, ws, **chosen)
            packed = ops.pack_weight(ws[comm.rank])
            runs = [("cpu", packed)]
            if seed % 5 == 0:
                runs += [("torch", packed), ("torch", ws[comm.rank])]
            for backend, w in runs:
                out = ops.matmul_all_reduce(
                    xs[comm.rank], w, comm, **chosen, eps=EPS, backend=backend
                )
                out = out if isinstance(out, tuple) else (out,)
                label = f"{backend} {dtype} m={m} n={n} k={k} {sorted(chosen)} {type(w).__name__}"
                judge.see(label, f"{backend} {dtype} {'norm_weight' in chosen}", out, plain,
                          expected)  # fmt: skip
                judge.digests[label] = digest(*out)
    return judge.verdict()


def run(
    dtypes: list[str], kinds: list[str], all_sizes: bool
) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Both."""
    return {"shared": shared_cases(dtypes, kinds), "uneven": uneven_matmul_all_reduce(all_sizes)}
