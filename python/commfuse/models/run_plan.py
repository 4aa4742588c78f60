"""What a plan says about running a model, for ``commfuse generate --plan`` and ``parallelize``."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from commfuse.errors import UsageError

VERSION = 1  # of what `commfuse plan --json` writes
DTYPES = {"bf16": "bfloat16", "fp16": "float16"}  # of plans, of torch


@dataclass(frozen=True)
class RunPlan:
    """The ``run`` part of a plan.

    Attributes:
        tp, pp, replicas: ranks that split each layer, stages, copies of the whole.
        micro_batches: groups of requests that keep the stages busy.
        prefill_chunk: tokens of a prompt that are computed at once, at most.
        fused: whether fused kernels pay in decoding.
        draft_tokens: of speculation; 0: none.
        weights, kv: dtypes as plans name them.
    """

    tp: int
    pp: int
    replicas: int
    micro_batches: int
    prefill_chunk: int
    fused: bool
    draft_tokens: int
    weights: str
    kv: str

    def dtype_for(self, runner: str) -> str:
        """The torch dtype of weights and KV cache, by name.

        Args:
            runner: what is to run the plan, for the error.

        Raises:
            UsageError: quantised ones, which nothing here runs, or several replicas.
        """
        if self.replicas > 1:
            raise UsageError(
                f"the plan has {self.replicas} replicas, and {runner} runs one; plan with "
                "--replicas 1"
            )
        for option, given in (("--weights", self.weights), ("--kv", self.kv)):
            if given not in DTYPES:
                raise UsageError(
                    f"the plan is for {given} ({option}), which {runner} does not run; plan with "
                    f"{option} {' or '.join(DTYPES)}"
                )
        return DTYPES[self.weights]


def read_run_plan(path: str | Path) -> RunPlan:
    """What a file that ``commfuse plan --json`` wrote says about running the model.

    Raises:
        UsageError: no such file, another version, a plan in which nothing fits, or a field that is
            missing or of the wrong kind; the message names it.

    Example:
        >>> read_run_plan("plan.json").tp
        2
    """
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"plan {path}: {error}") from None
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise UsageError(
            f"plan {path}: not a plan of version {VERSION}; write it with commfuse plan --json"
        )
    run = content.get("run")
    if content.get("status") != "ok" or not isinstance(run, dict):
        raise UsageError(f"plan {path}: nothing fits in this plan")
    return RunPlan(**{field.name: _field(path, run, field) for field in fields(RunPlan)})


def _field(path: str | Path, run: dict[str, Any], field) -> Any:
    value = run.get(field.name)
    least = 0 if field.name == "draft_tokens" else 1
    kind = {"int": int, "bool": bool, "str": str}[field.type]
    if type(value) is not kind or (kind is int and value < least):
        wanted = f"an integer of at least {least}" if kind is int else f"a {kind.__name__}"
        raise UsageError(f"plan {path}: run.{field.name} must be {wanted}, not {value!r}")
    return value
