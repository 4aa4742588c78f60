"""``commfuse tune``: how it chooses, and what bad input gets."""

from types import SimpleNamespace

import pytest
import torch

from commfuse.bench import tune as bench_tune
from commfuse.bench.timing import Times
from commfuse.bench.tune import (
    claimed_percent,
    fused_rows,
    measure_claims,
    measure_fused,
    thresholds,
)
from commfuse.cli.tune import tune
from commfuse.errors import UsageError

SIZES = (1024, 2048, 4096, 8192)


def times(*ways: tuple[float, ...]) -> dict[str, dict[int, float]]:
    """Of the three ways in order; a shorter one is not possible at the last sizes."""
    names = ("one_shot", "lines", "bulk")
    return {
        name: dict(zip(SIZES, way, strict=False)) for name, way in zip(names, ways, strict=True)
    }


@pytest.mark.parametrize(
    ("measured", "chosen"),
    [
        (times((1, 1, 9, 9), (2, 2, 2, 9), (3, 3, 3, 3)), (2048, 4096)),
        (times((9, 9, 9, 9), (9, 9, 9, 9), (3, 3, 3, 3)), (0, 0)),
        (times((1, 1, 1, 1), (2, 2, 2, 2), (3, 3, 3, 3)), (8192, 8192)),
        (times((1, 1), (2, 2, 2), (3, 3, 3, 3)), (2048, 4096)),
        (times((1, 1, 9, 9), (2, 2, 9, 9), (3, 3, 3, 3)), (2048, 2048)),
        # One noisy size does not cut off those above it.
        (times((1, 3.1, 1, 9), (9, 9, 9, 9), (3, 3, 3, 3)), (4096, 4096)),
    ],
)
def test_thresholds_lose_least_against_the_fastest_way(measured, chosen):
    assert thresholds(measured) == chosen


def test_rows_are_fused_where_that_is_faster():
    unfused = {1: 10.0, 8: 10.0, 32: 10.0, 64: 10.0}
    for fused, span in (
        ((9, 9, 9, 11), (1, 32)),
        ((11, 11, 11, 11), (1, 0)),
        ((9, 10.1, 9, 9), (1, 64)),
        ((11, 9, 9, 9), (8, 64)),
    ):
        measured = dict(zip(unfused, map(float, fused), strict=True))
        assert fused_rows({"fused": measured, "unfused": unfused}) == span


def test_as_many_tiles_are_claimed_as_all_layers_together_gain_from():
    layers = [(8192, 1), (8192, 64), (28672, 1)]
    for measured, chosen in (
        ({0: (50, 60, 190), 20: (48, 61, 170), 40: (49, 66, 171)}, 20),
        ({0: (50, 60, 190), 20: (49, 62, 190), 40: (50, 60, 191)}, 0),
        ({40: (50, 60, 190), 20: (50, 60, 190)}, 20),
        # By ratio: a large layer does not outweigh the small ones.
        ({0: (50, 50, 200), 20: (55, 55, 185)}, 0),
    ):
        times = {p: dict(zip(layers, map(float, us), strict=True)) for p, us in measured.items()}
        assert claimed_percent(times) == chosen


class Native:
    """Keeps what the measurements set."""

    def set_fused_rows(self, *span: int) -> None:
        self.span = span

    def set_claimed_percent(self, percent: int) -> None:
        self.percent = percent


@pytest.fixture
def comm(monkeypatch):
    """A communicator of GPUs that are not there: a call takes as many microseconds as it has rows,
    one more where tiles are dealt, and ten more where it is not fused.
    """

    def adapter_of(case, dtype, world_size, device):
        def call(inputs, comm, backend):
            fewest, most = native.span
            fused = fewest <= case["m"] <= most
            return case["m"] + (native.percent == 0) + (0 if fused else 10)

        assert case["k"] in (4096, 14336) and case.options == ("residual", "norm")
        return SimpleNamespace(
            inputs=lambda: [None, None], duplicate=lambda inputs, layout: inputs, call=call,
            streamed_bytes=lambda: 3,
        )  # fmt: skip

    def measure(cells, comm, replays):
        us = {cell.name: [float(call()) for call in cell.calls] for cell in cells}
        assert {len(calls) for calls in us.values()} == {14}  # four L2 caches, and one more
        return {name: Times.of(calls, len(calls)) for name, calls in us.items()}

    native = Native()
    native.percent = 0
    properties = SimpleNamespace(L2_cache_size=10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(bench_tune, "adapter_of", adapter_of)
    monkeypatch.setattr(bench_tune, "measure", measure)
    return SimpleNamespace(_native=native, world_size=2, rank=1, device="cuda:0")


def test_layers_are_measured_with_every_share_of_claims_and_not_fused(comm):
    times = measure_claims(comm)
    layers = [(k, rows) for k in (8192, 28672) for rows in (1, 16, 64)]
    assert times[0] == {(k, rows): rows + 11.0 for k, rows in layers}
    assert times[20] == times[40] == {(k, rows): rows + 10.0 for k, rows in layers}
    assert claimed_percent(times) == 20


def test_layers_are_measured_fused_and_not_with_the_share_that_is_set(comm):
    comm._native.set_claimed_percent(20)
    times = measure_fused(comm)
    assert times["fused"] == {rows: float(rows) for rows in (1, 8, 16, 32, 48, 64)}
    assert times["unfused"] == {rows: rows + 10.0 for rows in (1, 8, 16, 32, 48, 64)}
    assert fused_rows(times) == (1, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cpu"}, "--device cpu: only GPUs are tuned"),
        ({"ranks": "1,2"}, "--ranks 1,2: at least 2"),
        ({"ranks": "two"}, "--ranks two: a number, or several"),
        ({}, "--device cuda"),
    ],
)
def test_bad_input_is_refused(options, message, monkeypatch):
    # A machine with a GPU is one without, here.
    monkeypatch.setattr("commfuse.testing.gpu_lab.gpu_count", lambda: 0)
    with pytest.raises(UsageError, match=message):
        tune(**{"device": "cuda", "ranks": None, **options})
