"""What the ranks of the tests of the Triton kernels run, in Triton's interpreter.

Delays are put between the steps of a kernel by replacing, in the kernel's module, the device
function that makes the step: interpreted kernels look it up there when they run.
"""

import contextlib
import dataclasses
import mmap
import os
import time

import torch
import torch.distributed as dist
from triton.runtime import interpreter

from commfuse import Communicator, ops
from commfuse.errors import BackendUnavailable, CommunicatorError
from commfuse.ops.all_reduce_rms_norm import reference as all_reduce_rms_norm_reference
from commfuse.ops.matmul_all_reduce import reference as matmul_all_reduce_reference
from commfuse.testing.numerics import complaint
from commfuse.triton_kernels import all_reduce as all_reduce_module
from commfuse.triton_kernels import all_reduce_rms_norm as all_reduce_rms_norm_module
from commfuse.triton_kernels import matmul_all_reduce as matmul_all_reduce_module
from commfuse.triton_kernels.all_reduce import all_reduce, block_size
from commfuse.triton_kernels.all_reduce_rms_norm import all_reduce_rms_norm
from commfuse.triton_kernels.matmul_all_reduce import matmul_all_reduce
from commfuse.triton_kernels.protocol import OK
from commfuse.triton_kernels.workspace import Layout, Workspace

MAX_BLOCKS = 2
TILES_PER_SLOT = 4  # two for every block of the largest grid
WORKSPACE_BYTES = 4 << 20
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def layout(world_size: int) -> Layout:
    """Small slots, so that small messages exceed them."""
    return Layout(world_size, 4096 * TILES_PER_SLOT, MAX_BLOCKS)


def sizes(dtype: torch.dtype) -> dict[str, int]:
    """Numbers of elements around everything that could go wrong, by name."""
    block = block_size(dtype)
    capacity = TILES_PER_SLOT * block
    return {
        "empty": 0,
        "one": 1,
        "special": 8,
        "odd": 77,
        "block-1": block - 1,
        "block": block,
        "block+1": block + 1,
        "blocks": (MAX_BLOCKS + 1) * block + 3,
        "capacity+1": capacity + 1,
        "chunks": 2 * capacity + 333,
    }


@contextlib.contextmanager
def communicator():
    """A communicator over all ranks with memory for a few workspaces."""
    with Communicator(dist.group.WORLD, workspace_bytes=WORKSPACE_BYTES) as comm:
        yield comm


def make_workspace(comm, index: int = 0, timeout: float = 30.0) -> Workspace:
    """The ``index``-th workspace of its own in the communicator's memory."""
    nbytes = layout(comm.world_size).nbytes
    start = index * nbytes
    if comm.world_size == 1:  # a group of one shares no memory
        buffers = [torch.zeros(nbytes, dtype=torch.uint8)]
    else:
        buffers = [comm.workspace(r)[start : start + nbytes] for r in range(comm.world_size)]
    return Workspace.create(comm.rank, buffers, max_blocks=MAX_BLOCKS, timeout=timeout)


@contextlib.contextmanager
def replaced(module, name: str, function):
    """Replaces a device function that the module's kernel calls."""
    original = getattr(module, name)
    setattr(module, name, function)
    try:
        yield original
    finally:
        setattr(module, name, original)


@contextlib.contextmanager
def delayed(module, name: str, before: float = 0.0, after: float = 0.0):
    """Sleeps before and after a step of the module's kernel."""
    original = getattr(module, name)

    def step(*args):
        time.sleep(before)
        result = original(*args)
        time.sleep(after)
        return result

    with replaced(module, name, step):
        yield


def inputs(world_size: int, kind: str, numel: int, dtype: torch.dtype, seed: int = 0):
    """Every rank's input: all ranks can make all of them."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "integers":
        made = [torch.randint(-8, 9, (numel,), generator=generator) for _ in range(world_size)]
    elif kind == "random":
        made = [torch.randn(numel, generator=generator) for _ in range(world_size)]
    else:
        tiny = torch.finfo(dtype).smallest_normal / 4  # subnormal
        inf = float("inf")
        special = torch.tensor([0.0, -0.0, tiny, -tiny, inf, -inf, float("nan"), 1.0])
        made = [special.roll(rank // 2) for rank in range(world_size)]
    return [x.to(dtype) for x in made]


def expected(xs: list[torch.Tensor]) -> torch.Tensor:
    """The sum in float32 in rank order, rounded once: what the op promises, bit for bit."""
    total = xs[0].float()
    for x in xs[1:]:
        total = total + x.float()
    return total.to(xs[0].dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality in which -0.0 differs from 0.0, and NaN equals NaN."""
    nan = a.isnan()
    bits = a.new_zeros(()).view(torch.int16 if a.itemsize == 2 else torch.int32).dtype
    return torch.equal(nan, b.isnan()) and torch.equal(a[~nan].view(bits), b[~nan].view(bits))


def correctness(cases: list[tuple[str, str]]) -> dict[tuple[str, str, str], tuple[bool, bytes]]:
    """(dtype, size, kind) -> whether the result is the expected one, and its bytes.

    Args:
        cases: (size, kind), each run with every dtype.
    """
    results = {}
    with communicator() as comm:
        workspace = make_workspace(comm)
        for dtype_name, dtype in DTYPES.items():
            for size_name, kind in cases:
                numel = sizes(dtype)[size_name]
                xs = inputs(comm.world_size, kind, numel, dtype, seed=numel)
                x = xs[comm.rank].clone()
                # In place for integers, out of place otherwise.
                out = x if kind == "integers" else torch.full_like(x, 5.0)
                all_reduce(x, out, workspace)
                data = out.view(torch.uint8).numpy().tobytes()
                results[dtype_name, size_name, kind] = (same_bits(out, expected(xs)), data)
    return results


@dataclasses.dataclass(frozen=True)
class AllReduce:
    """x [rows, columns]."""

    rows: int
    columns: int
    dtype: torch.dtype = torch.float32
    module = all_reduce_module

    def inputs(self, world_size: int, seed: int) -> list[dict]:
        """Small integers, of every rank: all ranks can make all of them."""
        xs = inputs(world_size, "integers", self.rows * self.columns, self.dtype, seed)
        return [{"x": x.view(self.rows, self.columns)} for x in xs]

    def run(self, mine: dict, workspace: Workspace) -> tuple[torch.Tensor, ...]:
        """The outputs of this rank."""
        out = torch.empty_like(mine["x"])
        all_reduce(mine["x"], out, workspace)
        return (out,)

    def complaints(self, outputs: tuple[torch.Tensor, ...], ranks: list[dict]) -> list[str]:
        """What is wrong with the outputs."""
        (out,) = outputs
        return [] if torch.equal(out, expected([rank["x"] for rank in ranks])) else ["wrong sum"]


@dataclasses.dataclass(frozen=True)
class Fused:
    """What the two fused ops have in common: a sum, exact on integers, and its norm."""

    rows: int
    columns: int
    dtype: torch.dtype = torch.float32
    options: tuple[str, ...] = ()
    integers: bool = True

    def random(self, seed: int):
        """A source of tensors."""
        generator = torch.Generator().manual_seed(seed)

        def tensor(*shape: int) -> torch.Tensor:
            if self.integers:
                return torch.randint(-2, 3, shape, generator=generator).to(self.dtype)
            return torch.randn(shape, generator=generator).to(self.dtype)

        return tensor

    def shared(self, tensor) -> dict:
        """The inputs that all ranks have alike."""
        shapes = {
            "bias": (self.columns,),
            "residual": (self.rows, self.columns),
            "norm_weight": (self.columns,),
        }
        return {
            name: tensor(*shape) if name in self.options else None for name, shape in shapes.items()
        }

    def complaints(self, outputs: tuple[torch.Tensor, ...], ranks: list[dict]) -> list[str]:
        """What is wrong with the outputs, (summed, normalised or None)."""
        references, compositions = self.reference(ranks), self.composition(ranks)
        found = []
        for name, out, truth, plain in zip(
            ("sum", "norm"), outputs, references, compositions, strict=True
        ):
            if out is None:
                continue
            problem = complaint(out, plain, truth)
            if name == "sum" and self.integers and not torch.equal(out.double(), truth):
                problem = "not exact"
            if problem is not None:
                found.append(f"{name}: {problem}")
        return found


def plain_norm(total: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm by torch, in the dtype of ``total``."""
    return torch.nn.functional.rms_norm(total, weight.shape, weight, eps)


EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class AllReduceRMSNorm(Fused):
    """x, residual [rows, columns], weight [columns]."""

    module = all_reduce_rms_norm_module

    def inputs(self, world_size: int, seed: int) -> list[dict]:
        """Of every rank."""
        tensor = self.random(seed)
        shared = {**self.shared(tensor), "weight": tensor(self.columns)}
        return [{"x": tensor(self.rows, self.columns), **shared} for _ in range(world_size)]

    def run(self, mine: dict, workspace: Workspace) -> tuple[torch.Tensor, ...]:
        """(summed, normalised)."""
        summed, normalised = torch.empty_like(mine["x"]), torch.empty_like(mine["x"])
        all_reduce_rms_norm(
            mine["x"], mine["residual"], mine["weight"], EPS, summed, normalised, workspace
        )
        return summed, normalised

    def reference(self, ranks: list[dict]) -> tuple[torch.Tensor, ...]:
        """In float64."""
        xs = [rank["x"] for rank in ranks]
        normalised, summed = all_reduce_rms_norm_reference(
            xs, ranks[0]["residual"], ranks[0]["weight"], EPS
        )
        return summed, normalised

    def composition(self, ranks: list[dict]) -> tuple[torch.Tensor, ...]:
        """By torch in the op's dtype."""
        total = ranks[0]["x"].clone()
        for addend in (*(rank["x"] for rank in ranks[1:]), ranks[0]["residual"]):
            total = total if addend is None else total + addend
        return total, plain_norm(total, ranks[0]["weight"], EPS)


@dataclasses.dataclass(frozen=True)
class MatmulAllReduce(Fused):
    """x [rows, k], w [columns, k]; k differs from rank to rank, and the last may have none."""

    k: int = 37
    last_k: int | None = None
    module = matmul_all_reduce_module

    def inputs(self, world_size: int, seed: int) -> list[dict]:
        """Of every rank."""
        tensor = self.random(seed)
        shared = self.shared(tensor)
        ks = [self.k + rank for rank in range(world_size)]
        if self.last_k is not None:
            ks[-1] = self.last_k
        return [{"x": tensor(self.rows, k), "w": tensor(self.columns, k), **shared} for k in ks]

    def outputs(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Memory for (summed, normalised)."""
        summed = torch.empty(self.rows, self.columns, dtype=self.dtype)
        return summed, torch.empty_like(summed) if "norm_weight" in self.options else None

    def run(self, mine: dict, workspace: Workspace, outputs=None) -> tuple[torch.Tensor, ...]:
        """(summed, normalised or None)."""
        outputs = outputs or self.outputs()
        shared = {name: mine[name] for name in ("bias", "residual", "norm_weight")}
        matmul_all_reduce(
            mine["x"], mine["w"], outputs[0], workspace, **shared, eps=EPS, normalised=outputs[1]
        )
        return outputs

    def reference(self, ranks: list[dict]) -> tuple[torch.Tensor, ...]:
        """In float64."""
        first = ranks[0]
        made = matmul_all_reduce_reference(
            [rank["x"] for rank in ranks],
            [rank["w"] for rank in ranks],
            *(first[name] for name in ("bias", "residual", "norm_weight")),
            EPS,
        )
        return (made[1], made[0]) if isinstance(made, tuple) else (made, None)

    def composition(self, ranks: list[dict]) -> tuple[torch.Tensor, ...]:
        """By torch in the op's dtype."""
        first = ranks[0]
        total = sum(torch.nn.functional.linear(rank["x"], rank["w"]) for rank in ranks)
        for addend in (first["bias"], first["residual"]):
            total = total if addend is None else total + addend
        weight = first["norm_weight"]
        return total, None if weight is None else plain_norm(total, weight, EPS)


FLOAT32_BLOCK = block_size(torch.float32)
# Of changing size, and with it changing grid.
SEQUENCES = {
    "all_reduce": [
        AllReduce(1, 3),
        AllReduce(2, FLOAT32_BLOCK),
        AllReduce(0, 5),
        AllReduce(1, FLOAT32_BLOCK + 1),
    ],
    "all_reduce_rms_norm": [
        AllReduceRMSNorm(1, 3),
        AllReduceRMSNorm(3, 50, options=("residual",)),
        AllReduceRMSNorm(0, 5),
        AllReduceRMSNorm(2, 17),
    ],
    "matmul_all_reduce": [
        MatmulAllReduce(1, 3),
        MatmulAllReduce(2, 33, options=("bias", "norm_weight")),
        MatmulAllReduce(0, 5),
        MatmulAllReduce(3, 40, options=("residual",)),
    ],
}

# Of one block: blocks run one after the other here, and a second one would wait for the peer.
CONTROLS = {
    "all_reduce": AllReduce(1, 50),
    "all_reduce_rms_norm": AllReduceRMSNorm(1, 50),
    "matmul_all_reduce": MatmulAllReduce(2, 16),
}


def fused_cases(op: str, dtypes: list[str]) -> list[Fused]:
    """Sizes around everything that could go wrong: tiles, groups of rows, steps, slots; options."""
    cases = []
    for name in dtypes:
        dtype = DTYPES[name]
        if op == "all_reduce_rms_norm":
            cases += [
                AllReduceRMSNorm(0, 5, dtype),
                AllReduceRMSNorm(1, 1, dtype, ("residual",)),
                AllReduceRMSNorm(3, 17, dtype, integers=False),
                AllReduceRMSNorm(5, 64, dtype, ("residual",), integers=False),
            ]
            if dtype == torch.float32:
                # A slot holds 16 KB, three of these rows: two calls.
                cases.append(AllReduceRMSNorm(4, 1025, dtype))
        else:
            every = ("bias", "residual", "norm_weight")
            cases += [
                MatmulAllReduce(0, 5, dtype),
                MatmulAllReduce(1, 1, dtype, k=1),
                MatmulAllReduce(3, 33, dtype, ("residual",)),
                MatmulAllReduce(17, 65, dtype, every, integers=False, k=67),
                MatmulAllReduce(2, 31, dtype, ("bias",), k=255),
                MatmulAllReduce(4, 200, dtype, ("norm_weight",), last_k=0),
            ]
    return cases


def correctness_of_fused(op: str, dtypes: list[str]) -> list[tuple[str, list[str], bytes]]:
    """(case, what is wrong, bits of the outputs) of this rank."""
    cases = fused_cases(op, dtypes)
    results = []
    with communicator() as comm:
        workspace = make_workspace(comm)
        for seed, case in enumerate(cases):
            ranks = case.inputs(comm.world_size, seed)
            outputs = case.run(ranks[comm.rank], workspace)
            bits = b"".join(
                out.view(torch.uint8).numpy().tobytes() for out in outputs if out is not None
            )
            results.append((str(case), case.complaints(outputs, ranks), bits))
    return results


def batches(op: str) -> list[str]:
    """The cases in which a row's bits depend on the rows beside it."""
    differing = []
    with communicator() as comm:
        workspace = make_workspace(comm)
        kind = AllReduceRMSNorm if op == "all_reduce_rms_norm" else MatmulAllReduce
        for dtype in DTYPES.values():
            whole = kind(40, 70, dtype, ("residual", "norm_weight"), integers=False)
            mine = whole.inputs(comm.world_size, seed=0)[comm.rank]
            complete = whole.run(mine, workspace)
            for part in (slice(4, 5), slice(23, 40)):
                case = dataclasses.replace(whole, rows=part.stop - part.start)
                per_row = {name: mine[name][part] for name in ("x", "residual")}
                alone = case.run({**mine, **per_row}, workspace)
                if any(not same_bits(a, b[part]) for a, b in zip(alone, complete, strict=True)):
                    differing.append(f"{whole} {part}")
    return differing


def stragglers(op: str, calls: int) -> int:
    """Many calls of changing size (and grid); one rank at a time is slow, at one step in turn.

    Returns the number of wrong results.
    """
    steps = ["call", "describe", "signal", "wait", "finish"]
    sequence = SEQUENCES[op]
    wrong = 0
    with communicator() as comm:
        workspace = make_workspace(comm)
        for call in range(calls):
            case = sequence[call % len(sequence)]
            ranks = case.inputs(comm.world_size, seed=call)
            slow = (call // len(steps)) % comm.world_size == comm.rank
            step = steps[call % len(steps)]
            delay = 0.02 if slow else 0.0
            if step == "call":
                time.sleep(delay)
                step = "finish"
                delay = 0.0
            with delayed(case.module, step, before=delay / 2, after=delay / 2):
                outputs = case.run(ranks[comm.rank], workspace)
            wrong += bool(case.complaints(outputs, ranks))
    return wrong


class OneHalf(Layout):
    """A broken layout: even and odd generations share one payload half."""

    half_stride = 0


def skipped_wait(*args):
    """A broken wait: it does not."""
    return OK


def broken(op: str, case: str, calls: int = 3) -> int:
    """Number of wrong results on this rank with a protocol broken as ``case`` says.

    "sound" runs the same delays with nothing broken.
    """
    wrong = 0
    call = CONTROLS[op]
    with communicator() as comm:
        index = ["sound", "one half", "skipped wait"].index(case)
        workspace = make_workspace(comm, index)
        if case == "one half":
            broken_layout = OneHalf(**dataclasses.asdict(workspace.layout))
            workspace = dataclasses.replace(workspace, layout=broken_layout)
        with contextlib.ExitStack() as stack:
            if case == "skipped wait":
                stack.enter_context(replaced(call.module, "wait", skipped_wait))
            # The last rank is slow to send, and slow to read what it has received.
            if comm.rank == comm.world_size - 1:
                stack.enter_context(delayed(call.module, "begin", before=0.1))
                stack.enter_context(delayed(call.module, "wait", after=0.5))
            for seed in range(calls):
                ranks = call.inputs(comm.world_size, seed)
                outputs = call.run(ranks[comm.rank], workspace)
                wrong += bool(call.complaints(outputs, ranks))
        comm.barrier()
    return wrong


def controls(op: str) -> dict[str, int]:
    """case -> number of wrong results on this rank."""
    return {case: broken(op, case) for case in ("sound", "one half", "skipped wait")}


def failures(op: str) -> dict[str, tuple[str, str, float]]:
    """case -> type, text and seconds of the error that this rank got."""
    results = {}
    small, other = SEQUENCES[op][0], SEQUENCES[op][1]
    with communicator() as comm:

        def call(name: str, case, workspace: Workspace) -> None:
            start = time.monotonic()
            try:
                case.run(case.inputs(comm.world_size, 0)[comm.rank], workspace)
                results[name] = ("none", "", 0.0)
            except CommunicatorError as error:
                seconds = time.monotonic() - start
                results[name] = (type(error).__name__, str(error), seconds)

        workspace = make_workspace(comm, 0, timeout=0.3)
        call("sound", small, workspace)
        if comm.rank == 0:  # rank 1 never comes
            call("absent peer", small, workspace)
        comm.barrier()
        before = workspace.buffers[0].clone()
        call("after the failure", small, workspace)
        if not torch.equal(before, workspace.buffers[0]):
            results["after the failure"] = ("store", "a dead workspace was written to", 0.0)
        comm.barrier()

        # Different shapes, and with them different grids.
        call("shapes", small if comm.rank == 0 else other, make_workspace(comm, 1))
        comm.barrier()
        dtype = torch.float32 if comm.rank == 0 else torch.bfloat16
        call("dtypes", dataclasses.replace(small, dtype=dtype), make_workspace(comm, 2))
        comm.barrier()
        if isinstance(small, Fused):
            options = ("residual",) if comm.rank == 0 else ()
            call("options", dataclasses.replace(small, options=options), make_workspace(comm, 3))
            comm.barrier()

        workspace = make_workspace(comm, 4, timeout=600.0)
        if comm.rank == 0:
            call("host abort", small, workspace)
        else:
            time.sleep(0.3)
            workspace.abort()
        comm.barrier()
    return results


@contextlib.contextmanager
def blocks_at_once(count: int):
    """A launch of one block becomes one of ``count`` blocks, each in a process of its own.

    The interpreter runs blocks one after the other; blocks that meet must run together. What the
    kernel writes must lie in memory that forked processes share.
    """
    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    set_grid_dim, set_grid_idx = builder.set_grid_dim, builder.set_grid_idx
    restore = executor._restore_args_dev
    main, children = os.getpid(), []

    def fork(*_):
        for block in range(count - 1):
            child = os.fork()
            if not child:
                return set_grid_idx(block, 0, 0)
            children.append(child)
        return set_grid_idx(count - 1, 0, 0)

    builder.set_grid_dim = lambda *_: set_grid_dim(count, 1, 1)
    builder.set_grid_idx = fork
    executor._restore_args_dev = lambda *_: None  # it would write back what others write
    status = 1
    try:
        yield
        status = 0
    finally:
        if os.getpid() != main:
            os._exit(status)
        del builder.set_grid_dim, builder.set_grid_idx
        executor._restore_args_dev = restore
        statuses = [os.waitpid(child, 0)[1] for child in children]
    assert not any(statuses)


def meeting() -> dict:
    """Norms whose blocks run together.

    What is wrong with each; "skipped": they do not wait for each other, and one is slow. "absent":
    the error where one never comes.
    """
    module = matmul_all_reduce_module
    case = MatmulAllReduce(18, 200, options=("residual", "norm_weight"), integers=False)
    found = {"sound": [], "skipped": []}

    def in_first_block(name: str, function):
        original = getattr(module, name)

        def step(*args):
            first = interpreter.interpreter_builder.grid_idx[0] == 0
            return function(original, *args) if first else original(*args)

        return replaced(module, name, step)

    def slow(original, *args):
        time.sleep(0.2)
        return original(*args)

    def call(workspace: Workspace, seed: int) -> list[str]:
        ranks = case.inputs(comm.world_size, seed)
        memory = torch.frombuffer(
            mmap.mmap(-1, 2 * case.rows * case.columns * 4), dtype=torch.float32
        )
        outputs = tuple(memory.view(2, case.rows, case.columns))
        with blocks_at_once(MAX_BLOCKS):
            case.run(ranks[comm.rank], workspace, outputs)
        return case.complaints(outputs, ranks)

    with communicator() as comm:
        workspace = make_workspace(comm)
        for name, meet in (("sound", module.meet), ("skipped", skipped_wait)):
            with replaced(module, "meet", meet), in_first_block("wait", slow):
                found[name] = [call(workspace, seed) for seed in range(2)]
            comm.barrier()
        workspace = make_workspace(comm, 1, timeout=0.3)
        try:
            with in_first_block("meet", skipped_wait):
                call(workspace, 0)
        except CommunicatorError as error:
            found["absent"] = (type(error).__name__, str(error))
        comm.barrier()
    return found


def public(op: str) -> dict[str, tuple[str, str]]:
    """What ``commfuse.ops`` says: case -> type and text of the error, or the complaints."""
    results = {}
    with communicator() as comm:

        def call(name: str, case: Fused, **changed) -> None:
            ranks = case.inputs(comm.world_size, 0)
            mine = ranks[comm.rank] | changed
            try:
                if op == "all_reduce_rms_norm":
                    normalised, summed = ops.all_reduce_rms_norm(
                        mine["x"], mine["residual"], mine["weight"], EPS, comm, "triton"
                    )
                else:
                    shared = {name: mine[name] for name in ("bias", "residual", "norm_weight")}
                    normalised, summed = ops.matmul_all_reduce(
                        mine["x"], mine["w"], comm, **shared, eps=EPS, backend="triton"
                    )
                results[name] = ("complaints", str(case.complaints((summed, normalised), ranks)))
            except BackendUnavailable as error:
                results[name] = (type(error).__name__, str(error))

        if op == "all_reduce_rms_norm":
            call("served", AllReduceRMSNorm(2, 40, torch.bfloat16, ("residual",)))
            call("row above a slot", AllReduceRMSNorm(1, 300_000))
        else:
            options = ("bias", "residual", "norm_weight")
            served = MatmulAllReduce(2, 40, torch.bfloat16, options)
            call("served", served)
            packed = ops.pack_weight(served.inputs(comm.world_size, 0)[0]["w"])
            call("packed", served, w=packed)
            call("rows", MatmulAllReduce(65, 8, options=options))
            call("output above a slot", MatmulAllReduce(64, 20_000, options=options, k=1))
    return results


def fused(op: str, everything: bool) -> dict:
    """All about a fused op, in one start of the ranks."""
    results = {
        "correctness": correctness_of_fused(op, list(DTYPES) if everything else ["bfloat16"]),
        "stragglers": stragglers(op, 20 if everything else 6),
    }
    if everything:
        results["batches"] = batches(op)
        results["controls"] = controls(op)
        results["failures"] = failures(op)
        results["public"] = public(op)
        if op == "matmul_all_reduce":
            results["meeting"] = meeting()
    return results
