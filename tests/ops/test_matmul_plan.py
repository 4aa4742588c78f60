"""Who computes what in the GPU's decode GEMM: csrc/matmul/matmul_plan.h, compiled for this CPU, and
the claims of its blocks, in every order or in many.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import shlex
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
FIELDS = ("tiles", "chunks", "blocks", "rounds", "rest", "splits", "parts_per_block", "claimed")
TILE, CHUNK, MOST_SPLITS, COUNTERS = 64, 128, 16, 1024
# n, k, blocks: of layers, on an H100 whole and in shares; odd; one past a tile or a chunk; fewer
# tiles than blocks; more than there are counters.
SIZES = (
    (8192, 4096, 66),
    (8192, 14336, 63),
    (8192, 2048, 32),
    (8192, 7168, 33),
    (8192, 1024, 16),
    (8192, 3584, 15),
    (8192, 8192, 132),
    (1280, 8192, 132),
    (128256, 4096, 132),
    (128256, 4096, 16),
    (1, 1, 132),
    (64 * 5 + 1, 129, 4),
    (65, 4097, 1),
    (1000, 77, 7),
    (64, 128, 1),
)
PERCENTS = (0, 20, 40, 100)


@dataclass(frozen=True)
class Plan:
    tiles: int
    chunks: int
    blocks: int
    rounds: int
    rest: int
    splits: int
    parts_per_block: int
    claimed: int
    dealt: tuple[tuple[tuple[int, ...], ...], ...]  # by block: (tile, part, begin, end)
    parts: tuple[tuple[int, ...], ...]  # of the rest, by number
    last: int


@pytest.fixture(scope="module")
def make_plan(tmp_path_factory) -> Callable[[int, int, int, int], Plan]:
    library = tmp_path_factory.mktemp("plan") / "matmul_plan.so"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    source, include = HERE / "matmul_plan.cpp", HERE.parents[1] / "csrc"
    command = [*compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-I", include, source]
    subprocess.run([*command, "-o", library], check=True)
    native = ctypes.CDLL(str(library))

    def segment(call: Callable, *args: int) -> tuple[int, ...] | None:
        out = (ctypes.c_int * 4)()
        return tuple(out) if call(*args, out) is not False else None

    native.dealt.restype = ctypes.c_bool
    native.part.restype = native.make_plan.restype = None

    def make(n: int, k: int, blocks: int, percent: int) -> Plan:
        out = (ctypes.c_int * len(FIELDS))()
        native.make_plan(ctypes.c_int64(n), ctypes.c_int64(k), blocks, percent, out)
        fields = dict(zip(FIELDS, out, strict=True))
        turns = range(fields["rounds"] + fields["parts_per_block"])
        of_block = [
            [segment(native.dealt, block, i) for i in turns] for block in range(fields["blocks"])
        ]
        return Plan(
            **fields,
            dealt=tuple(tuple(s for s in found if s) for found in of_block),
            parts=tuple(segment(native.part, i) for i in range(native.parts())),
            last=native.last(),
        )

    return make


@pytest.fixture(scope="module", params=itertools.product(SIZES, PERCENTS), ids=str)
def plan(request, make_plan) -> Plan:
    (n, k, blocks), percent = request.param
    made = make_plan(n, k, blocks, percent)
    assert (made.tiles, made.chunks) == (-(-n // TILE), -(-k // CHUNK))
    assert made.blocks <= blocks
    return made


def covered_once(plan: Plan, segments: list[tuple[int, ...]]) -> bool:
    """Whether these are all chunks of all tiles, each once."""
    times = np.zeros((plan.tiles, plan.chunks), int)
    for tile, _, begin, end in segments:
        assert begin < end
        times[tile, begin:end] += 1
    return bool((times == 1).all())


def whole(plan: Plan) -> list[tuple[int, ...]]:
    """The segments that every block is dealt whatever happens to the rest."""
    if not plan.claimed:
        return []
    return [segment for found in plan.dealt for segment in found[: plan.rounds]]


class TestPlan:
    def test_everything_is_dealt_once(self, plan):
        assert covered_once(plan, [segment for found in plan.dealt for segment in found])

    def test_a_share_is_claimed(self, plan, request):
        (_, _, blocks), percent = request.node.callspec.params["plan"]
        if not plan.claimed:
            assert percent == 0 or plan.tiles * (100 - percent) // 100 < blocks
            assert plan.rest < blocks or plan.rounds == 0
            return
        assert covered_once(plan, [*whole(plan), *plan.parts])
        assert plan.blocks == blocks and plan.rounds >= 1
        assert plan.rest <= COUNTERS and 1 <= plan.splits <= min(MOST_SPLITS, plan.chunks)
        if plan.rest + blocks <= COUNTERS:
            assert plan.rest * 100 >= percent * plan.tiles
            assert (plan.rest - blocks) * 100 < percent * plan.tiles + 100

    def test_parts_of_a_tile_are_claimed_one_after_the_other(self, plan):
        if plan.claimed:
            first = plan.rounds * plan.blocks
            numbers = [(tile - first) * plan.splits + max(part, 0) for tile, part, *_ in plan.parts]
            assert numbers == list(range(len(plan.parts)))
            assert {begin for _, part, begin, _ in plan.parts if part <= 0} == {0}

    @pytest.mark.parametrize("blocks", [32, 63, 132])
    def test_tiles_of_the_rest_are_cut_alike(self, make_plan, blocks):
        plan = make_plan(8192, 4096, blocks, 20)
        cuts = {}
        for tile, _, begin, end in plan.parts:
            cuts.setdefault(tile, []).append((begin, end))
        assert len({tuple(sorted(found)) for found in cuts.values()}) == 1


# ---- claims ------------------------------------------------------------------------------------


@dataclass
class Memory:
    """What the blocks of a GPU share, zero between calls."""

    claims: int
    arrived: list[int]  # by tile of the rest
    sums: dict[tuple[int, int], np.float32]  # by tile and part


class Grid:
    """One GEMM of a plan: blocks that claim and put parts together as the kernel does, each step
    atomic; ``value`` stands for the sum of a part's products.

    Args:
        resets: whether a block that has claimed this number sets the counter back.
        in_order: parts are added by number, not as they arrive.
    """

    def __init__(self, plan: Plan, memory: Memory, resets=None, in_order: bool = True):
        self.plan, self.memory = plan, memory
        self.resets = resets or (lambda claim: claim == plan.last)
        self.in_order = in_order
        self.computed: list[tuple[int, ...]] = []
        self.results: dict[int, np.float32] = {}
        self.arrivals: dict[int, list[int]] = {}

    def block(self) -> Iterator[None]:
        """The steps of a block behind its whole tiles: between two of them others may run."""
        while True:
            yield
            claim = self.memory.claims
            self.memory.claims += 1
            yield
            if claim >= len(self.plan.parts):
                if self.resets(claim):
                    self.memory.claims = 0
                return
            segment = self.plan.parts[claim]
            self.computed.append(segment)
            self._finish(segment)

    def _finish(self, segment: tuple[int, ...]) -> None:
        tile, part, *_ = segment
        if part < 0:  # whole: nobody to wait for
            return
        number = tile - self.plan.rounds * self.plan.blocks
        self.memory.sums[number, part] = np.float32(1.1 + tile) ** (part + 1)
        self.arrivals.setdefault(number, []).append(part)
        self.memory.arrived[number] += 1
        if self.memory.arrived[number] < self.plan.splits:
            return
        self.memory.arrived[number] = 0
        order = self.arrivals[number]
        total = np.float32(0)
        for added in sorted(order) if self.in_order else order:
            total += self.memory.sums[number, added]
        self.results[number] = total


def fresh(plan: Plan) -> Memory:
    return Memory(0, [0] * plan.rest, {})


def run(grids: list[Grid], choose: Callable[[int], int]) -> None:
    """Runs the blocks of grids that are under way together, in the order that ``choose`` says."""
    waiting = [grid.block() for grid in grids for _ in range(grid.plan.blocks)]
    while waiting:
        chosen = choose(len(waiting))
        try:
            next(waiting[chosen])
        except StopIteration:
            del waiting[chosen]


def orders(limit: int) -> Iterator[Callable[[int], int]]:
    """Every sequence of choices, one after the other; fails where there are more than ``limit``."""
    script: list[list[int]] = []  # chosen, of how many
    for _ in range(limit):
        position = 0

        def choose(count: int) -> int:
            nonlocal position
            if position == len(script):
                script.append([0, count])
            position += 1
            return script[position - 1][0]

        yield choose
        while script and script[-1][0] == script[-1][1] - 1:
            script.pop()
        if not script:
            return
        script[-1][0] += 1
    raise AssertionError(f"more than {limit} orders")


def at_random(seed: int) -> Callable[[int], int]:
    """Some blocks are much slower than others."""
    draw = random.Random(seed)
    slow = draw.random()

    def choose(count: int) -> int:
        chosen = draw.randrange(count)
        return min(chosen, draw.randrange(count)) if draw.random() < slow else chosen

    return choose


def complaint(grid: Grid) -> str:
    """What has gone wrong in a grid that has ended; empty: nothing."""
    plan, memory = grid.plan, grid.memory
    if not covered_once(plan, [*whole(plan), *grid.computed]):
        return "not every part once"
    if memory.claims or any(memory.arrived):
        return "counters are not zero"
    return "" if plan.splits == 1 or len(grid.results) == plan.rest else "a tile is missing"


@pytest.fixture
def small(make_plan) -> Plan:
    plan = make_plan(64 * 5, 128 * 8, 2, 20)
    assert (plan.claimed, plan.blocks, plan.rest, plan.splits) == (1, 2, 1, 2)
    return plan


LARGER = ((64 * 9, 128 * 24, 3, 20), (8192, 2048, 32, 20), (128256, 128, 132, 40))


class TestClaims:
    def test_every_order_of_a_small_grid(self, small):
        results, count = set(), 0
        for choose in orders(100_000):
            grid = Grid(small, fresh(small))
            run([grid], choose)
            assert complaint(grid) == ""
            results.add(tuple(grid.results.values()))
            count += 1
        assert count > 50 and len(results) == 1

    @pytest.mark.parametrize("size", LARGER, ids=str)
    def test_many_orders_of_larger_grids_one_call_after_the_other(self, make_plan, size):
        plan = make_plan(*size)
        memory, results = fresh(plan), set()
        for seed in range(10):
            grid = Grid(plan, memory)
            run([grid], at_random(seed))
            assert complaint(grid) == ""
            results.add(tuple(sorted(grid.results.items())))
        assert len(results) == 1

    def test_sums_in_the_order_of_arrival_are_found_wrong(self, make_plan):
        plan, results = make_plan(64 * 9, 128 * 24, 3, 20), set()
        assert plan.splits > 2
        for seed in range(10):
            grid = Grid(plan, fresh(plan), in_order=False)
            run([grid], at_random(seed))
            results.add(tuple(sorted(grid.results.items())))
        assert len(results) > 1

    def test_a_counter_that_the_first_to_find_nothing_sets_back_is_found_wrong(self, small):
        def first(claim: int) -> bool:
            return claim == len(small.parts)

        found = set()
        for choose in orders(100_000):
            grid = Grid(small, fresh(small), first)
            run([grid], choose)
            found.add(complaint(grid))
        assert found == {"", "not every part once"}

    def test_a_call_that_claims_before_the_one_before_has_ended_is_found_wrong(self, small):
        found = set()
        for seed in range(100):
            memory = fresh(small)
            grids = [Grid(small, memory), Grid(small, memory)]
            run(grids, at_random(seed))
            found.update(map(complaint, grids))
        assert found - {""}
