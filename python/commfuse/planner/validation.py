"""Predictions held against measurements: ``commfuse plan --validate FILE.csv``, and the fit."""

from __future__ import annotations

import csv
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from commfuse.errors import UsageError
from commfuse.planner.calibration import PRIOR, Calibration, shipped
from commfuse.planner.cluster import Cluster, parse_cluster
from commfuse.planner.layout import Layout
from commfuse.planner.memory import Precision
from commfuse.planner.model import Model, load_model
from commfuse.planner.serving import MIXED, PREFILL_FIRST, Service, Work, serve
from commfuse.planner.step import Setting

COLUMNS = (
    "model_path",
    "system",
    "backend",
    "isl",
    "osl",
    "concurrency",
    "tp_size",
    "ttft_ms",
    "tpot_ms",
)
CHUNK = 8192  # tokens of a step, as engines have it by default
_DTYPES = {"": "bf16", "bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16",
           "fp8": "fp8", "fp8_block": "fp8", "fp8_static": "fp8", "int4_wo": "int4", "int4": "int4",
           "awq": "int4", "nvfp4": "fp4", "fp4": "fp4"}  # fmt: skip
# Fitted in this order; the others stay as they are: one model's rows say nothing about them.
FITTED = ("memory", "attention_memory", "gemm", "attention", "kernel", "sync", "step", "request")
_SHARES = ("memory", "attention_memory", "gemm", "attention")  # parts of a peak: at most 1
_PRIOR_WEIGHT = 0.3
_LOW_SHARE = 0.8  # of what 16-bit GEMMs reach, while no 8-bit rows are fitted


@dataclass(frozen=True)
class Row:
    """A measurement: what ran, and seconds of TTFT and TPOT."""

    model: Model
    cluster: Cluster
    engine: str
    precision: Precision
    layout: Layout
    work: Work
    requests: int
    ttft: float
    tpot: float

    def predict(self, calibration: Calibration) -> Service:
        """What the planner says. Engines other than commfuse do not fuse."""
        setting = Setting(self.model, self.cluster, self.precision, calibration, fused=False)
        return serve(setting, self.layout, self.work, self.requests, CHUNK)

    @property
    def same_work(self) -> tuple:
        """What rows that differ in TP alone have in common."""
        return (self.model, self.cluster.device, self.engine, self.precision, self.layout.pp,
                self.work, self.requests)  # fmt: skip


def read_rows(path: str) -> tuple[list[Row], Counter[str]]:
    """The rows of a file, and why others were left out (how many for each reason).

    Raises:
        UsageError: no such file, a column or a number is missing, or no row can be used.
    """
    try:
        with Path(path).open(newline="") as file:
            reader = csv.DictReader(file)
            if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
                raise UsageError(f"--validate {path}: column {', '.join(missing)} is missing")
            lines = list(enumerate(reader, 2))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--validate {path}: {error}") from None
    rows, left_out = [], Counter()
    for number, line in lines:
        try:
            rows.append(_row(line))
        except UsageError as error:
            left_out[str(error).splitlines()[0]] += 1
        except (TypeError, ValueError) as error:
            raise UsageError(f"--validate {path}: line {number}: {error}") from None
    if not rows:
        reasons = "; ".join(left_out) or "it is empty"
        raise UsageError(f"--validate {path}: no row can be used: {reasons}")
    return rows, left_out


def _row(line: dict[str, str]) -> Row:
    kind = (line.get("gemm_quant_mode") or line.get("precision") or "").lower()
    if kind not in _DTYPES:
        raise UsageError(f"precision {kind!r} is not planned for")
    tp, pp = int(line["tp_size"]), int(line.get("pp_size") or 1)
    ttft, tpot = (float(line[name] or "nan") * 1e-3 for name in ("ttft_ms", "tpot_ms"))
    if not (0 < ttft < math.inf and 0 < tpot < math.inf):
        raise UsageError("TTFT or TPOT is missing or not positive")
    model = load_model(line["model_path"])
    model.shard(tp)
    engine = line["backend"].lower()
    return Row(
        model=model,
        cluster=parse_cluster(f"{max(8, tp * pp)}:{line['system']}"),
        engine=engine,
        precision=Precision(_DTYPES[kind]),
        layout=Layout(tp, pp),
        work=Work(
            int(line["isl"]),
            int(line["osl"]),
            PREFILL_FIRST if engine == "sglang" else MIXED,
        ),
        requests=int(line["concurrency"]),
        ttft=ttft,
        tpot=tpot,
    )


@dataclass(frozen=True)
class Errors:
    """Of a group of rows: median and 80th percentile of relative errors, and the median bias."""

    rows: int
    tpot: float
    tpot_p80: float
    tpot_bias: float
    ttft: float
    ttft_p80: float
    ttft_bias: float


def errors_of(rows: Sequence[Row], calibration: Calibration) -> Errors:
    """How far predictions are from the rows."""
    found = [row.predict(calibration) for row in rows]
    tpot = [f.tpot / row.tpot - 1 for f, row in zip(found, rows, strict=True)]
    ttft = [f.ttft / row.ttft - 1 for f, row in zip(found, rows, strict=True)]
    return Errors(
        len(rows),
        *(_quantile(map(abs, tpot), q) for q in (0.5, 0.8)),
        statistics.median(tpot),
        *(_quantile(map(abs, ttft), q) for q in (0.5, 0.8)),
        statistics.median(ttft),
    )


def speedup_errors(rows: Sequence[Row], calibration: Calibration) -> list[float]:
    """Relative errors of the ratio of TPOT between neighbouring TP, 2 → 4 and 4 → 8."""
    groups: dict[tuple, dict[int, Row]] = {}
    for row in rows:
        groups.setdefault(row.same_work, {})[row.layout.tp] = row
    found = []
    for group in groups.values():
        for tp in (2, 4):
            if tp in group and 2 * tp in group:
                a, b = group[tp], group[2 * tp]
                said = a.predict(calibration).tpot / b.predict(calibration).tpot
                found.append(abs(said / (a.tpot / b.tpot) - 1))
    return found


def _quantile(values: Iterable[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def fit(rows: Sequence[Row]) -> Calibration:
    """Constants that fit the TPOT of the rows, drawn towards those one would assume.

    Coordinate descent on the mean absolute logarithmic error plus a penalty for departing from
    :data:`commfuse.planner.calibration.PRIOR`: few rows move little.
    """

    def loss(candidate: Calibration) -> float:
        errors = (abs(math.log(row.predict(candidate).tpot / row.tpot)) for row in rows)
        away = sum(math.log(getattr(candidate, n) / getattr(PRIOR, n)) ** 2 for n in FITTED)
        return statistics.fmean(errors) + _PRIOR_WEIGHT * away

    best, steps = PRIOR, dict.fromkeys(FITTED, 0.2)
    least = loss(best)
    for _ in range(40):
        for name in FITTED:
            for factor in (1 + steps[name], 1 / (1 + steps[name])):
                changes = {name: getattr(best, name) * factor}
                if name in _SHARES and changes[name] > 1:
                    continue
                if name == "gemm":
                    changes["gemm_low"] = changes["gemm"] * _LOW_SHARE
                candidate = best.with_changes(**changes)
                if (found := loss(candidate)) < least - 1e-6:
                    best, least = candidate, found
                    break
            else:
                steps[name] *= 0.5
        if max(steps.values()) < 0.005:
            break
    return best


@dataclass(frozen=True)
class Report:
    """What ``--validate`` prints.

    Attributes:
        total: over all rows.
        groups: by (engine, model, TP).
        speedups: number, median and 80th percentile of the errors of TP speed-ups.
        left_out: reasons, and rows.
        fitted: rows that constants were fitted to, which are not in the others; 0: shipped ones.
        calibration: that was used.
    """

    total: Errors
    groups: dict[tuple[str, str, int], Errors]
    by_engine: dict[str, Errors]
    by_model: dict[str, Errors]
    speedups: tuple[int, float, float]
    left_out: dict[str, int]
    fitted: int
    calibration: Calibration


def validate(path: str, fit_on: str | None = None) -> Report:
    """Holds predictions against the rows of a file.

    Args:
        path: of a CSV file with at least :data:`COLUMNS`.
        fit_on: fit the constants to the rows of models whose name contains this, or to every third
            row of each model (``thirds``), and test on the others; None: use those that come with
            the package.

    Raises:
        UsageError: the file cannot be used, or there is nothing left to fit or to test.
    """
    rows, left_out = read_rows(path)
    calibration, fitted = shipped(), 0
    if fit_on is not None:
        chosen, rows = _split(rows, fit_on.lower())
        if not chosen or not rows:
            raise UsageError(f"--fit-on {fit_on}: {len(chosen)} rows to fit, {len(rows)} to test")
        calibration, fitted = fit(chosen), len(chosen)

    def grouped(key):
        keys = sorted({key(row) for row in rows})
        return {k: errors_of([row for row in rows if key(row) == k], calibration) for k in keys}

    ratios = speedup_errors(rows, calibration)
    return Report(
        total=errors_of(rows, calibration),
        groups=grouped(lambda row: (row.engine, row.model.name, row.layout.tp)),
        by_engine=grouped(lambda row: row.engine),
        by_model=grouped(lambda row: row.model.name),
        speedups=(
            (len(ratios), _quantile(ratios, 0.5), _quantile(ratios, 0.8)) if ratios else (0, 0, 0)
        ),
        left_out=dict(left_out),
        fitted=fitted,
        calibration=calibration,
    )


def _split(rows: Sequence[Row], fit_on: str) -> tuple[list[Row], list[Row]]:
    """Rows to fit, and rows to test."""
    seen: Counter[str] = Counter()
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        fitted = seen[row.model.name] % 3 == 0 if fit_on == "thirds" else fit_on in row.model.name
        seen[row.model.name] += 1
        parts[not fitted].append(row)
    return parts
