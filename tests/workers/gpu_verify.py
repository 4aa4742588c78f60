"""On every rank, with a GPU: the ops that draw from vocabulary shards, against those on the CPU.

Both draw by the same noise from the same logits; weights differ in their last bits, which decide
about one token in a hundred thousand. Inputs are fixed, so that the tokens must be the same.
"""

import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from commfuse import ops
from commfuse.nn.sharding import shard_vocabulary
from commfuse.runtime import launch
from commfuse.runtime.communicator import Communicator
from commfuse.testing.numerics import digest
from commfuse.testing.worker import load

GPU = load(Path(__file__).with_name("gpu.py"))
DTYPES, MILLISECOND = GPU.DTYPES, GPU.MILLISECOND
OPS = torch.ops.commfuse
Found = list[str]
OPTIONS = {
    "greedy": {},
    "sampled": {"temperature": (0.7, 1.0, 0.0, 1.3)},
    "top-k": {"temperature": (0.7, 1.0, 2.0), "top_k": (5, 0, 1, 40, 300)},
    "top-p": {"temperature": (0.7, 1.0, 2.0), "top_p": (0.9, 1.0, 0.5, 0.999, 1e-6)},
    "both": {"temperature": (1.3, 0.0, 0.9), "top_k": (100000, 7, 50), "top_p": (0.8, 0.95)},
}


def sampling(kind: str, batch: int, seed: int = 0) -> ops.Sampling:
    """Options that repeat over the requests."""
    repeated = {
        name: [values[b % len(values)] for b in range(batch)]
        for name, values in OPTIONS[kind].items()
    }
    return ops.Sampling.of(batch, seed=[seed + b for b in range(batch)], **repeated)


class Requests:
    """Requests on the CPU, their drafts as a drafter makes them, and what they must become."""

    def __init__(self, kind: str, size: int, batch: int, longest: int, dtype, seed: int,
                 distributions: bool = False):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        self.size, self.kind = size, kind
        self.lengths = torch.randint(0, longest + 1, (batch,), generator=generator)
        rows = int(self.lengths.sum()) + batch
        self.logits = (torch.randn(rows, size, generator=generator) * 3).to(dtype)
        self.logits[:, 3::16] = -torch.inf
        self.logits[1::5] = (self.logits[1::5] * 2).round() / 2  # ties, also across shards
        if size > 512:
            self.logits[2::7, : size // 2] = -torch.inf  # shards without mass
        self.sampling = sampling(kind, batch, seed)
        self.positions = torch.arange(batch) + (1 << 33)
        self.q = None
        drafted = [r for r, (_, last) in enumerate(self.places()) if not last]
        drafts = self.winners()[drafted]
        if distributions:
            self.q = (self.logits[drafted].float() * 0.8).softmax(dim=1)
            if drafted:
                drafts = torch.multinomial(self.q, 1, generator=generator)[:, 0]
        wrong = torch.rand(len(drafted), generator=generator) < 0.2
        drafts = torch.where(wrong, (drafts + 1) % size, drafts)
        self.drafts = torch.full((batch, longest), -1)
        self.drafts[torch.arange(longest) < self.lengths[:, None]] = drafts
        if longest and self.lengths[0]:
            self.drafts[0, 0] = size  # no token

    def places(self) -> list[tuple[int, bool]]:
        """(request, whether it is its last row) of every row."""
        return [
            (b, j == length)
            for b, length in enumerate(self.lengths.tolist())
            for j in range(length + 1)
        ]

    def winners(self) -> torch.Tensor:
        """Every row's token without drafts."""
        requests = [b for b, _ in self.places()]
        within = torch.cat([torch.arange(n + 1) for n in self.lengths.tolist()])
        positions = self.positions[requests] + within
        with Communicator() as alone:
            own = self.sampling.select(requests)
            return ops.vocab_parallel_sample(self.logits, own, positions, 0, alone)[0]

    def expected(self, logs: bool) -> ops.Verified:
        with Communicator() as alone:
            return ops.verify_chain(
                self.logits, self.drafts, self.lengths, self.sampling, self.positions, 0, alone,
                draft_probabilities=self.q, log_probabilities=logs,
            )  # fmt: skip

    def arguments(self, comm) -> tuple:
        """Those of verify_chain on this rank's GPU, and draft_probabilities."""
        span = shard_vocabulary(self.size, comm.world_size, comm.rank)
        shard, q = (
            None if x is None else x[:, span.begin : span.end].contiguous().to(comm.device)
            for x in (self.logits, self.q)
        )
        rest = (x.to(comm.device) for x in (self.drafts, self.lengths, self.sampling,
                                            self.positions))  # fmt: skip
        return (shard, *rest, span.begin, comm), q


def differences(label: str, out, expected) -> Found:
    """Of tokens and counts, exactly; of log-probabilities, beyond rounding."""
    found = []
    for ours, due in zip(out, expected, strict=True):
        if due is None or due.numel() == 0:
            continue
        off = (ours.cpu() - due).abs().view(len(due), -1).amax(dim=1)
        allowed = 2e-5 if due.is_floating_point() else 0
        rows = (~(off <= allowed)).nonzero()[:, 0].tolist()  # NaN is not allowed either
        if rows:
            found.append(
                f"{label}: {due.dtype} of {len(rows)} of {len(due)} requests differ, as of "
                f"{rows[:8]}, by up to {off.max().item():g}"
            )
    return found


def verified(comm) -> Found:
    """verify_chain and its outputs, over options, dtypes, sizes that are no multiples, and ranks
    without columns.
    """
    found, tokens = [], {}
    # Vocabulary, requests, longest draft.
    sizes = ((1, 3, 1), (129, 5, 3), (1000, 24, 4), (32003, 9, 2), (128256, 3, 4))
    for seed, (size, batch, longest) in enumerate(sizes):
        for index, kind in enumerate(OPTIONS):
            for number, dtype in enumerate(DTYPES):
                if size > 1000 and number != (seed + index) % 3:
                    continue
                for distributions in (False, True):
                    made = Requests(kind, size, batch, longest, dtype, seed, distributions)
                    logs = (seed + number) % 2 == 0
                    arguments, q = made.arguments(comm)
                    out = ops.verify_chain(
                        *arguments, draft_probabilities=q, log_probabilities=logs, backend="cuda"
                    )
                    label = f"V={size} B={batch} {kind} {dtype} q={distributions}"
                    found += differences(label, out, made.expected(logs))
                    tokens[label] = digest(*(x for x in out if x is not None))
    comm.check()
    return found + GPU.differing(tokens, comm)


def sampled(comm) -> Found:
    """vocab_parallel_sample and vocab_parallel_argmax; requests that take several launches."""
    found = []
    for size, rows in ((1, 1), (300, 20), (5000, 60), (128256, 4), (257, 1300)):
        for number, kind in enumerate(OPTIONS):
            draft = number % 2 == 0
            made = Requests(kind, size, rows, 0, torch.bfloat16, size + draft)
            (shard, _, _, options, positions, begin, _), _ = made.arguments(comm)
            with Communicator() as alone:
                expected = ops.vocab_parallel_sample(
                    made.logits, made.sampling, made.positions, 0, alone,
                    draft=draft, log_probabilities=draft,
                )  # fmt: skip
            out = ops.vocab_parallel_sample(
                shard, options, positions, begin, comm,
                draft=draft, log_probabilities=draft, backend="cuda",
            )  # fmt: skip
            found += differences(f"V={size} {rows} rows {kind} {draft}", out, expected)
        with Communicator() as alone:
            expected = ops.vocab_parallel_argmax(made.logits, 0, alone)
        out = ops.vocab_parallel_argmax(shard, begin, comm, "cuda")
        found += differences(f"argmax V={size} {rows} rows", (out,), (expected,))
    comm.check()
    empty = torch.empty(0, 300, device=str(comm.device))
    if ops.vocab_parallel_argmax(empty, 0, comm, "cuda").shape != (0,):
        found.append("argmax of no rows")
    comm.check()
    return found


def impossible(comm) -> Found:
    """Rows without a token: -1 where they decide, named by check(), and not final."""
    found = []

    def expect(what: str, call, text: str, tokens=None) -> None:
        out = call()
        kind, message, _ = GPU.raised(comm.check)
        if kind != "CommfuseError" or text not in message:
            found.append(f"{what}: check() raises {kind} {message!r}, not {text!r}")
        if tokens is not None and out.tokens.tolist() != tokens:
            found.append(f"{what}: tokens {out.tokens.tolist()}, not {tokens}")
        if kind := GPU.raised(comm.check)[0]:
            found.append(f"{what}: check() raises {kind} a second time")

    device = str(comm.device)
    for kind in ("greedy", "sampled", "both"):
        for value, name in ((torch.nan, "NaN"), (torch.inf, "infinite"), (-torch.inf, "-inf thr")):
            made = Requests("greedy", 300, 2, 0, torch.float32, 1)
            made.sampling, made.kind = sampling(kind, 2), kind
            made.lengths = torch.tensor([1, 2])
            made.logits = torch.zeros(5, 300)
            made.logits[3] = -torch.inf
            made.logits[3, 299] = value
            winners = torch.tensor([0, 0, 5, 0, 0])
            if kind != "greedy":
                made.logits[:2] = -torch.inf
                made.logits[:2, 0] = 0
                made.logits[2] = -torch.inf
            made.logits[2, 5] = 1
            made.drafts = torch.tensor([[winners[0], -1], [5, 0]])
            arguments, _ = made.arguments(comm)
            expect(
                f"{kind} {name}",
                lambda arguments=arguments: ops.verify_chain(*arguments, backend="cuda"),
                f"request 1, row 1 are {name}",
                [[0, 0, -1], [5, -1, -1]],
            )
    made = Requests("sampled", 300, 3, 2, torch.bfloat16, 1, True)
    made.lengths, made.drafts = torch.tensor([2, 1, 0]), torch.tensor([[1, 2], [0, 0], [0, 0]])
    made.logits, made.q = torch.zeros(6, 300), torch.full((3, 300), 1 / 300)
    made.q[2, 7] = torch.nan
    made.q[2, 0] = 0
    arguments, q = made.arguments(comm)
    expect(
        "draft NaN",
        lambda: ops.verify_chain(*arguments, draft_probabilities=q, backend="cuda"),
        "the draft probabilities of request 1, row 0 are NaN",
    )
    for lengths in ([2, 1, 5], [2, 2, 2], [-1, 1, 0]):
        made.lengths = torch.tensor(lengths)
        wrong, _ = made.arguments(comm)
        expect(
            f"lengths {lengths}",
            lambda wrong=wrong: ops.verify_chain(*wrong, backend="cuda"),
            "the draft length of request",
        )
    for call, text in (
        (lambda: ops.verify_chain(*arguments[:3], made.sampling, *arguments[4:]), "on cpu"),
        (lambda: ops.vocab_parallel_argmax(torch.zeros(3, device=device), 0, comm), "dimensions"),
    ):
        try:
            call()
            found.append(f"nothing raised: {text}")
        except ValueError as error:
            if text not in str(error):
                found.append(f"{error}, not {text}")
    made = Requests("both", 1000, 4, 2, torch.bfloat16, 5)
    out = ops.verify_chain(*made.arguments(comm)[0], backend="cuda")
    found += differences("afterwards", out, made.expected(False))
    comm.check()
    return found


def replays(comm) -> Found:
    """A graph whose lengths, options and logits change between replays, with late ranks."""
    return _replays(comm, False) + _replays(comm, True)


def _replays(comm, distributions: bool) -> Found:
    batch, longest, found = 6, 3, []
    made = [
        Requests(kind, 3000, batch, longest, torch.bfloat16, seed, distributions)
        for seed, kind in enumerate(("sampled", "both", "greedy") * 2)
    ]
    given = [request.arguments(comm) for request in made]
    due = [[x.to(comm.device) for x in request.expected(False)[:2]] for request in made]

    def padded(xs):  # to as many rows as any input needs
        rows = max(map(len, xs))
        return [torch.cat((x, x.new_full((rows - len(x), x.shape[1]), torch.nan))) for x in xs]

    logits = padded([arguments[0] for arguments, _ in given])
    qs = padded([q for _, q in given]) if distributions else [None] * len(made)
    begin = given[0][0][5]
    inputs = [
        (logits[i], *arguments[1:3], arguments[4], *arguments[3].tensors)
        for i, (arguments, _) in enumerate(given)
    ]
    static = [x.clone() for x in inputs[0]]
    options = ops.Sampling.of(batch).to(comm.device)
    static[4:] = options.tensors
    q = qs[0].clone() if distributions else None

    def call():
        return ops.verify_chain(
            *static[:3], options, static[3], begin, comm, draft_probabilities=q, backend="cuda"
        )

    call()
    comm.check()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        out = call()
    wrong = torch.zeros((), dtype=torch.int64, device=str(comm.device))
    for number in range(600):
        now = number * 5 % len(made)
        for to, source in zip(static, inputs[now], strict=True):
            to.copy_(source)
        if distributions:
            q.copy_(qs[now])
        if number % 97 == 0 and comm.rank == number // 97 % comm.world_size:
            torch.cuda._sleep(3 * MILLISECOND)
        graph.replay()
        for ours, right in zip(out[:2], due[now], strict=True):
            wrong += (ours != right).any()
    comm.check()
    if wrong.item():
        found.append(f"q={distributions}: {wrong.item()} of 1200 results are wrong")
    # The counter counts: another input's results are not these.
    if not (out[0] != due[(now + 1) % len(made)][0]).any().item():
        found.append("another input's tokens are the same")
    return found


def stragglers(comm) -> Found:
    """Calls in a row of different kinds, with each rank late in turn."""
    made = [
        Requests(kind, 2000, 7, 3, dtype, seed, seed % 2 == 1)
        for seed, (kind, dtype) in enumerate(zip(OPTIONS, (*DTYPES, *DTYPES), strict=False))
    ]
    expected, arguments = [m.expected(True) for m in made], [m.arguments(comm) for m in made]
    found = []
    for late in range(comm.world_size):
        outs = []
        for step in range(40):
            if comm.rank == late and step % 9 == 0:
                torch.cuda._sleep(2 * MILLISECOND)
            given, q = arguments[step % len(made)]
            outs.append(
                ops.verify_chain(
                    *given, draft_probabilities=q, log_probabilities=True, backend="cuda"
                )
            )
        comm.check()
        for step, out in enumerate(outs):
            label = f"rank {late} late, call {step}"
            found += differences(label, out, expected[step % len(made)])
    return found


def local(comm) -> Found:
    """Negative control: a rank's own winners, taken for everybody's, must be found wrong."""
    made = Requests("sampled", 3000, 16, 2, torch.bfloat16, 3)
    (logits, drafts, lengths, options, positions, begin, _), _ = made.arguments(comm)
    with Communicator(device=comm.device) as alone:
        out = ops.verify_chain(logits, drafts, lengths, options, positions, begin, alone)
        torch.cuda.synchronize()
    wrong = differences("", out, made.expected(False))
    if bool(wrong) == (comm.world_size == 1):
        return [f"a rank's own winners: {wrong}"]
    return []


def opcheck(comm) -> Found:
    """Schemas and shape-only implementations, on CUDA tensors."""
    found = []
    made = Requests("both", 300, 3, 2, torch.bfloat16, 2, True)
    given, q = made.arguments(comm)
    logits, drafts, lengths, options, positions, begin, _ = given
    for op, arguments in (
        (OPS.vocab_parallel_argmax.default, (logits, begin, comm.handle)),
        (OPS.vocab_parallel_sample.default,
         (logits[:3].contiguous(), *options.tensors, positions, False, True, begin, comm.handle)),
        (OPS.verify_chain.default,
         (logits, drafts, lengths, q, *options.tensors, positions, True, begin, comm.handle)),
    ):  # fmt: skip
        try:
            torch.library.opcheck(op, arguments)
        except Exception as error:
            found.append(f"{op}: {error}")
    return found


CHECKS = (verified, sampled, impossible, replays, stragglers, local, opcheck)


def run() -> dict[str, Found]:
    """What the checks have found wrong."""
    found = {}
    launch.use_gpu()
    torch.set_num_threads(max(1, torch.get_num_threads() // dist.get_world_size()))
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
        for check in CHECKS:
            begin = time.monotonic()
            try:
                with GPU.communicator(timeout=20.0) as comm:
                    found[check.__name__] = check(comm)
            except Exception:
                found[check.__name__] = [traceback.format_exc()]
            if dist.get_rank() == 0:
                print(f"{check.__name__}: {time.monotonic() - begin:.1f} s", flush=True)
    return found


def _shard(comm) -> tuple[torch.Tensor, int]:
    """Logits of ones, [5, a shard of 300], on this rank's GPU, and where the shard begins."""
    span = shard_vocabulary(300, comm.world_size, comm.rank)
    return torch.ones(5, len(span), device=str(comm.device)), span.begin


def _verify(comm, lengths=(2, 1), q=False, logs=False, longest=2) -> ops.Verified:
    """Two requests with drafts, by options of which ranks may not differ."""
    logits, begin = _shard(comm)
    device = str(comm.device)
    drafts = torch.zeros(2, longest, dtype=torch.int64, device=device)
    sampling = ops.Sampling.of(2, temperature=1.0, seed=[1, 2]).to(comm.device)
    return ops.verify_chain(
        logits, drafts, torch.tensor(lengths, device=device), sampling,
        torch.arange(2, device=device), begin, comm,
        draft_probabilities=torch.full((3, logits.shape[1]), 1 / 300, device=device) if q else None,
        log_probabilities=logs, backend="cuda",
    )  # fmt: skip


def _draw(comm) -> None:
    logits, begin = _shard(comm)
    sampling = ops.Sampling.of(5, temperature=1.0).to(comm.device)
    positions = torch.arange(5, device=str(comm.device))
    ops.vocab_parallel_sample(logits, sampling, positions, begin, comm, backend="cuda")


def _alive(device: torch.device) -> bool:
    """Whether the CUDA context still works, and verification on a new communicator too."""
    total = torch.full((1000,), 2.0, device=device).sum().item()
    made = Requests("both", 1000, 4, 2, torch.bfloat16, 5, True)
    with GPU.communicator() as comm:
        given, q = made.arguments(comm)
        out = ops.verify_chain(*given, draft_probabilities=q, backend="cuda")
        comm.check()
    return total == 2000 and not differences("", out, made.expected(False))


def failures() -> dict[str, dict[str, GPU.Raised] | bool]:
    """Calls that do not belong together, and a rank that leaves one out: what every rank raises."""
    device, found = launch.use_gpu(), {}
    calls = {
        "drafts": lambda comm: _verify(comm, longest=3),
        "logs": lambda comm: _verify(comm, logs=True),
        "distributions": lambda comm: _verify(comm, q=True),
        "ops": _draw,
    }
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
        for name, other in calls.items():
            with GPU.communicator() as comm:
                mine = other if comm.rank == comm.world_size - 1 else _verify
                found[name] = GPU.failing(comm, lambda comm=comm, mine=mine: mine(comm))
        found["alive after mismatches"] = _alive(device)
        with GPU.communicator(timeout=2.0) as comm:
            if comm.rank == comm.world_size - 1:
                time.sleep(4.0)
            found["absent"] = GPU.failing(comm, lambda: _verify(comm, q=True))
        found["alive after time-out"] = _alive(device)
        # Lengths are not compared: a rank with a row more waits for it, and all learn of that.
        with GPU.communicator(timeout=2.0) as comm:
            _verify(comm, lengths=(2, 1) if comm.rank == 0 else (2, 0))
            torch.cuda.synchronize()
            dist.barrier()
            found["lengths"] = GPU.raised(comm.check)
        found["alive after lengths"] = _alive(device)
    return found
