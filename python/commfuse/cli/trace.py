"""A generation as a timeline: every rank's passes, collectives and messages, for Perfetto."""

from __future__ import annotations

import json
from pathlib import Path

import torch.distributed as dist

from commfuse.errors import BackendUnavailable, UsageError
from commfuse.runtime.mesh import Mesh

PASSES, COLLECTIVES, MESSAGES = "passes", "collectives", "messages"


class Trace:
    """Records what this rank does while it is entered; rank 0 then writes what all did.

    The file is in Chrome's trace event format (JSON), which ui.perfetto.dev opens: a process a rank
    with three rows. ``passes`` are its parts of forward passes, and the taking of new tokens; in
    them ``collectives`` are its communication within a stage, ``messages`` that with other stages,
    waiting included. The rest of a pass is computing.

    Args:
        path: of the file.
        mesh: of this rank.

    Raises:
        UsageError: the transport keeps no trace.
    """

    def __init__(self, path: Path, mesh: Mesh):
        self.path, self.mesh = path, mesh
        self.passes: list[tuple[str, int, int]] = []

    def __enter__(self) -> Trace:
        try:
            self.mesh.tp.start_spans()
            self.mesh.pp.start_spans()
        except BackendUnavailable as error:
            raise UsageError(f"--trace: {error}") from None
        return self

    def add(self, what: str, begin: int, end: int) -> None:
        """A span of this rank, ``time.monotonic_ns()``."""
        self.passes.append((what, begin, end))

    def __exit__(self, kind: type | None, *exception: object) -> None:
        rows = {
            PASSES: self.passes,
            COLLECTIVES: [("collective", *span) for span in self.mesh.tp.stop_spans()],
            MESSAGES: [("message", *span) for span in self.mesh.pp.stop_spans()],
        }
        if kind is not None:
            return
        mine = [self._name("process_name", f"stage {self.mesh.pp.rank}, rank {self.mesh.tp.rank}")]
        for row, (name, spans) in enumerate(rows.items()):
            mine.append(self._name("thread_name", name, row))
            mine += [
                {
                    "name": what,
                    "ph": "X",
                    "pid": self._rank,
                    "tid": row,
                    "ts": begin / 1e3,
                    "dur": (end - begin) / 1e3,
                }
                for what, begin, end in spans
            ]
        everybody = [mine]
        if dist.is_initialized():
            everybody = [None] * dist.get_world_size()
            dist.all_gather_object(everybody, mine)
        if self._rank == 0:
            events = [event for events in everybody for event in events]
            self.path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))

    @property
    def _rank(self) -> int:
        return self.mesh.pp.rank * self.mesh.tp.world_size + self.mesh.tp.rank

    def _name(self, what: str, name: str, row: int = 0) -> dict:
        return {
            "name": what,
            "ph": "M",
            "pid": self._rank,
            "tid": row,
            "args": {"name": name},
        }
