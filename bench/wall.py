"""The communication wall: one piece of work in every layout, over emulated links.

Messages are real: they go through the communicators and channels of :mod:`commfuse.runtime`, whose
emulated links hold them back. Computing is emulated: every rank waits as long as the planner says
that its share takes on the device. Both are slowed down alike, so that eight ranks on few cores
have time left for the work of the emulation itself; results are in the time of the device.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from rich import box
from rich.table import Table

from commfuse import ops
from commfuse.bench.provenance import provenance
from commfuse.bench.table import console, print_provenance
from commfuse.errors import CommfuseError, UsageError
from commfuse.planner.calibration import for_device
from commfuse.planner.cluster import parse_cluster
from commfuse.planner.layout import Stage
from commfuse.planner.memory import Precision
from commfuse.planner.model import load_model
from commfuse.planner.step import Setting, stage_prefill
from commfuse.runtime import launch
from commfuse.runtime.channel import Channel
from commfuse.runtime.communicator import Communicator
from commfuse.runtime.link import Link, parse_link

RANKS = 8
CLUSTER = "1:h100-sxm"
# A part of the model stands for all of it: its layers are alike.
LAYERS, TOKENS, PASSES = 8, 512, 8
SLOWED = 250  # an emulated second takes as many seconds
SHRUNK = 64  # messages have so many times fewer bytes, and links so much less bandwidth
BACKENDS = {"cpu": "commfuse", "torch": "torch.distributed"}


@dataclass(frozen=True)
class Layout:
    """Where ranks stand.

    Attributes:
        tp, pp: ranks of a stage, and stages.
        tp_across, pp_across: whether these communicate between hosts.
    """

    tp: int
    pp: int = 1
    tp_across: bool = False
    pp_across: bool = False

    def __str__(self) -> str:
        tp = f"TP{self.tp}{' across hosts' if self.tp_across else ''}"
        pp = f"PP{self.pp}{' across hosts' if self.pp_across else ''}"
        return tp if self.pp == 1 else pp if self.tp == 1 else f"{tp} inside x {pp}"


LAYOUTS = (
    Layout(1),
    Layout(2),
    Layout(4),
    Layout(8),
    Layout(4, tp_across=True),
    Layout(8, tp_across=True),
    Layout(1, 2, pp_across=True),
    Layout(4, 2, pp_across=True),
)


@dataclass(frozen=True)
class Options:
    """A picture of the wall, as ``commfuse bench wall`` takes it.

    Attributes:
        model: a preset of the planner.
        inside, across: links within a host and between hosts.
        as_json: print JSON lines instead of a table.
    """

    model: str
    inside: str
    across: str
    as_json: bool = False


def run_wall(options: Options) -> None:
    """Starts the ranks and prints a row for each layout and backend.

    Raises:
        UsageError: an unknown model or link, or one with fewer heads than ranks.
        CommfuseError: a rank failed.
    """
    parse_link(options.inside), parse_link(options.across)
    model = load_model(options.model)
    if model.num_heads < RANKS or model.num_layers < LAYERS:
        raise UsageError(f"--model {options.model}: {RANKS} heads and {LAYERS} layers are needed")
    command = [sys.executable, "-m", "commfuse.bench.wall", json.dumps(asdict(options))]
    results = launch.run_ranks(command, RANKS, timeout=900)
    if failed := [result for result in results if result.status]:
        raise CommfuseError(f"rank {failed[0].rank}: {failed[0].stderr.strip()}")
    rows = [json.loads(line) for line in results[0].stdout.splitlines()]
    if options.as_json:
        print("\n".join(map(json.dumps, rows)), flush=True)
    else:
        print_wall_table(rows)


def print_wall_table(rows: Sequence[dict]) -> None:
    """Each layout's time, and where it goes."""
    first = rows[0]
    table = Table(
        title=(
            f"emulated: {first['layers']} layers of {first['model']}, {first['passes']} passes of "
            f"{first['tokens']} tokens, {first['hardware']}; {first['inside']} inside hosts, "
            f"{first['across']} across; ms"
        ),
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    parts = ("compute", "all_reduce", "send_recv", "idle")
    for name in ("layout", "backend", "total", *parts, "speed-up", "of devices"):
        table.add_column(name, justify="left" if name in ("layout", "backend") else "right")
    for row in rows:
        times = (f"{row[f'{name}_ms']:.2f}" for name in ("total", *parts))
        speed_up = row["times_one_device"]
        table.add_row(
            row["layout"], row["backend"], *times, f"{speed_up:.2f}",
            f"{speed_up / row['devices']:.0%}",
        )  # fmt: skip
    output = console()
    output.print(table)
    print_provenance({"device": "cpu", **first}, output)


def run_rank(options: Options) -> None:
    """One rank's part of every layout; the first prints the rows."""
    torch.set_num_threads(1)
    launch.join_job()
    try:
        with torch.inference_mode():
            rows: list[dict] = []
            for layout in LAYOUTS:
                for backend in BACKENDS:
                    rows.append(_measure(layout, backend, options))
            if dist.get_rank() == 0:
                base = {row["backend"]: row["total_ms"] for row in rows if row["devices"] == 1}
                for row in rows:
                    row["times_one_device"] = round(base[row["backend"]] / row["total_ms"], 4)
                    print(json.dumps(row | provenance()), flush=True)
    finally:
        dist.destroy_process_group()


def _slowed(text: str) -> Link:
    link = parse_link(text)
    rate = link.gigabytes_per_second / (SLOWED * SHRUNK)
    return Link(f"{text}, slowed", link.latency_us * SLOWED, rate)


def _layer_seconds(options: Options, tp: int) -> float:
    """What a rank computes of a layer in a pass, on the device."""
    setting = Setting(
        load_model(options.model), parse_cluster(CLUSTER), Precision(), for_device(is_gpu=True)
    )
    terms = stage_prefill(setting, Stage(tp, 1, False, 0, 1), TOKENS, TOKENS * PASSES / 2)
    return terms.total - terms.all_reduce


def _measure(layout: Layout, backend: str, options: Options) -> dict | None:
    """A row; every rank takes part in the making of groups, even if the layout has no place."""
    rank, count = dist.get_rank(), layout.tp * layout.pp
    tp_groups = [
        dist.new_group([stage * layout.tp + place for place in range(layout.tp)])
        for stage in range(layout.pp)
    ]
    pp_groups = [
        dist.new_group([stage * layout.tp + place for stage in range(layout.pp)])
        for place in range(layout.tp)
    ]
    row = None
    if rank < count:
        stage, place = divmod(rank, layout.tp)
        links = [
            _slowed(options.across if across else options.inside)
            for across in (layout.tp_across, layout.pp_across)
        ]
        transport = "auto" if backend == "cpu" else "torch.distributed"
        # Half of the ranks of a stage, or of the stages, are on another host.
        host = str(int(rank >= count // 2)) if layout.tp_across else None
        with ExitStack() as stack:
            tp, pp = (
                stack.enter_context(
                    Communicator(group if size > 1 else None, link=link, transport=transport,
                                 timeout=120.0, host=host, link_inside=_slowed(options.inside))
                )
                for group, size, link in (
                    (tp_groups[stage], layout.tp, links[0]),
                    (pp_groups[place], layout.pp, links[1]),
                )
            )  # fmt: skip
            row = _Work(layout, options, tp, pp).row(backend)
    dist.barrier()
    for group in (*tp_groups, *pp_groups):
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)
    return row


class _Work:
    """Passes of tokens through the layers of a layout."""

    def __init__(self, layout: Layout, options: Options, tp: Communicator, pp: Communicator):
        self.layout, self.options, self.tp, self.pp = layout, options, tp, pp
        hidden = load_model(options.model).hidden_size
        self.x = torch.zeros(TOKENS // SHRUNK, hidden, dtype=torch.bfloat16)
        # Every rank of a stage sends its part of a row.
        self.boundary = torch.zeros(TOKENS // SHRUNK, hidden // layout.tp, dtype=torch.bfloat16)
        sizes = {"rows": len(self.x), "columns": hidden // layout.tp, "dtype": torch.bfloat16}
        self.channels = [Channel(pp, s, s + 1, **sizes) for s in range(layout.pp - 1)]
        self.layer = _layer_seconds(options, layout.tp) * SLOWED
        self.computed = 0.0

    def _compute(self) -> None:
        """Half a layer: what lies in front of an all-reduce."""
        begin = time.monotonic()
        time.sleep(self.layer / 2)
        self.computed += time.monotonic() - begin

    def _pass(self) -> None:
        stage = self.pp.rank
        if stage:
            ops.recv(len(self.boundary), self.channels[stage - 1])
        for _ in range(2 * LAYERS // self.layout.pp):
            self._compute()
            if self.layout.tp > 1:
                ops.all_reduce(self.x, self.tp)
        if stage < self.layout.pp - 1:
            ops.send(self.boundary, self.channels[stage])

    def row(self, backend: str) -> dict:
        """Times of the first rank, but the end is the last stage's."""
        self._pass()
        for comm in (self.tp, self.pp):
            comm.barrier()
            comm.reset_statistics()
        self.computed, begin = 0.0, time.monotonic()
        for _ in range(PASSES):
            self._pass()
        end = max(self.pp.gather(time.monotonic()))
        total = max(self.tp.gather(end)) - begin
        reducing = self.tp.statistics().communication_seconds
        # Of a stage's time in messages, what the link takes is the transfer, the rest idle; when it
        # is done, a stage waits for the last one.
        link = self.pp.link
        transfers = PASSES if self.layout.pp > 1 and self.pp.rank else 0
        sending = min(
            transfers * link.seconds(1, self.boundary.nbytes),
            self.pp.statistics().communication_seconds,
        )
        every = self.pp.gather((self.computed, reducing, sending))
        compute, reducing, sending = (sum(part) / len(every) for part in zip(*every, strict=True))
        idle = total - compute - reducing - sending

        def ms(seconds: float) -> float:
            return round(seconds / SLOWED * 1e3, 4)

        return {
            "op": "wall",
            "backend": BACKENDS[backend],
            "layout": str(self.layout),
            "tp": self.layout.tp,
            "pp": self.layout.pp,
            "devices": self.layout.tp * self.layout.pp,
            "model": self.options.model,
            "hardware": CLUSTER.partition(":")[2],
            "layers": LAYERS,
            "tokens": TOKENS,
            "passes": PASSES,
            "emulated": "compute and links",
            "slowed": SLOWED,
            "shrunk": SHRUNK,
            "inside": self.options.inside,
            "across": self.options.across,
            "total_ms": ms(total),
            "compute_ms": ms(compute),
            "all_reduce_ms": ms(reducing),
            "send_recv_ms": ms(sending),
            "idle_ms": ms(idle),
            "transport": self.tp.transport if self.layout.tp > 1 else self.pp.transport,
        }


if __name__ == "__main__":
    run_rank(Options(**json.loads(sys.argv[1])))
