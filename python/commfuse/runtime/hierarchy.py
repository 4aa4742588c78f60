"""Ranks on several hosts, some of which share one: which of them meet, and how they fail together.

A sum takes three steps: a reduce-scatter among the ranks of a host, in their shared memory; an
exchange between hosts, in which every rank has its own slice alone; an all-gather within the host.
Each host cuts a message evenly by its own number of ranks. Where the numbers differ, so do the
cuts, and a rank meets several of another host, each for the piece that both of them hold.
"""

from __future__ import annotations

import math
import re
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from commfuse import errors
from commfuse.errors import (
    CommunicatorClosed,
    CommunicatorError,
    ConcurrentUse,
    PeerDied,
    PeerMismatch,
    PeerTimeout,
)
from commfuse.runtime.waits import Waits

# A rank waits a little longer for other hosts than for its own: whoever shares a host with a stuck
# rank knows better which one it is, and is heard first.
PATIENCE = timedelta(seconds=1)
# How long hosts may take to connect: their ranks begin together.
CONNECTING = timedelta(seconds=10)
# How long a rank that has waited in vain looks for word of a peer that may be waiting for it, too.
GRACE_SECONDS = 0.5


@dataclass(frozen=True)
class Piece:
    """A stretch of a message that one rank of every host holds.

    Attributes:
        begin, end: in units of the message's equal parts.
        owners: a rank of each host.
    """

    begin: int
    end: int
    owners: tuple[int, ...]


def cut_pieces(hosts: Sequence[Sequence[int]]) -> tuple[int, list[Piece]]:
    """How a message is cut so that each host has it evenly on its ranks.

    Args:
        hosts: the ranks of each.

    Returns:
        (number of equal parts, pieces in order, which cover all of them).

    Example:
        >>> cut_pieces([[0, 1], [2]])
        (2, [Piece(begin=0, end=1, owners=(0, 2)), Piece(begin=1, end=2, owners=(1, 2))])
    """
    parts = math.lcm(*map(len, hosts))
    borders = sorted({place * parts // len(host) for host in hosts for place in range(len(host))})
    return parts, [
        Piece(begin, end, tuple(host[begin * len(host) // parts] for host in hosts))
        for begin, end in zip(borders, [*borders[1:], parts], strict=True)
    ]


@dataclass(frozen=True)
class _Exchange:
    """Two messages between this rank and another one: what comes from there; what to wait for."""

    there: torch.Tensor
    receiving: dist.Work
    sending: dist.Work


class Hierarchy:
    """One rank's place among hosts, and its connections to the other ones.

    Every rank must construct it. The first failure on any rank is that of all: it is written down
    in the job's store before the rank that has found it closes its connections, so that whoever
    notices their end finds out why.

    Args:
        group: of all ranks.
        hosts: the ranks of each, in order.
        inside: the extension's communicator over the ranks of this host.
        token: of this communicator alone, the same on all ranks.
        timeout: seconds that a rank waits for another.
        name: of the ranks, plural, for errors; or None.

    Attributes:
        hosts, inside: as above.
        parts: that a message must be cut into evenly.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        hosts: Sequence[Sequence[int]],
        inside: Any,
        token: str,
        timeout: float,
        name: str | None,
    ):
        self.hosts, self.inside = hosts, inside
        self._rank, world = dist.get_rank(group), dist.get_world_size(group)
        self._host = next(host for host in hosts if self._rank in host)
        self._others = [rank for rank in range(world) if rank != self._rank]
        self.parts, self._pieces = cut_pieces(hosts)
        self._timeout, self._name = timedelta(seconds=timeout), name
        self._failure: CommunicatorError | None = None
        self._calls = 0
        self._busy = threading.Lock()
        self._across: int | None = None  # the rank of another host that is being waited for
        self._store = dist.PrefixStore(token, group.get_group_store())
        # Not one of torch's named groups: it can be dropped by one rank alone, at any time.
        self._links: dist.ProcessGroup | None = dist.ProcessGroupGloo(
            dist.PrefixStore("links", self._store), self._rank, world, CONNECTING
        )
        self._waits = Waits(self._store, self._rank, self._awaited)

    def sum_across(self, mine: torch.Tensor, what: str) -> int:
        """Adds up, in place, what the hosts have of this rank's slice.

        The hosts' values are added in float32 in their order and rounded once. Every other host
        gets the whole slice: with two hosts, nothing sends less.

        Args:
            mine: [n], contiguous: this host's sum of the slice.
            what: the op, its dtype and shape, for errors, and to tell calls apart.

        Returns:
            Bytes sent.

        Raises:
            CommunicatorError: within :meth:`call`.
        """
        self._calls += 1
        first = self._host.index(self._rank) * self.parts // len(self._host)
        size = mine.numel() * len(self._host) // self.parts  # of a part
        exchanges = []
        for piece in self._pieces:
            if self._rank in piece.owners:
                view = mine[(piece.begin - first) * size : (piece.end - first) * size]
                others = [rank for rank in piece.owners if rank != self._rank]
                exchanges.append((piece, view, self._exchange(others, view, what)))
        sent = 0
        for piece, view, under_way in exchanges:
            found = {**self._arrived(under_way, what), self._rank: view}
            total = found[piece.owners[0]].float()
            for rank in piece.owners[1:]:
                total = total + found[rank].float()
            view.copy_(total)
            sent += view.nbytes * len(under_way)
        return sent

    def gather(self, x: torch.Tensor, what: str) -> list[torch.Tensor]:
        """Every rank's ``x``, in rank order.

        Args:
            x: contiguous; equal shape and dtype on all ranks.
            what: as for :meth:`sum_across`.

        Raises:
            CommunicatorError: within :meth:`call`.
        """
        self._calls += 1
        found = {**self._arrived(self._exchange(self._others, x, what), what), self._rank: x}
        return [found[rank] for rank in range(len(found))]

    def _exchange(self, ranks: Sequence[int], x: torch.Tensor, what: str) -> dict[int, _Exchange]:
        """Sends ``x`` to each rank and asks it for one like it; what is under way, by rank."""
        # Messages of other calls have other tags: no buffer gets one that is not meant for it.
        tag = zlib.crc32(f"{self._calls} {what}".encode()) & 0x7FFFFFFF
        found = {}
        for rank in ranks:
            there = torch.empty_like(x)
            with self._naming(rank, what):
                receiving = self._links.recv([there], rank, tag)
                found[rank] = _Exchange(there, receiving, self._links.send([x], rank, tag))
        return found

    def _arrived(self, under_way: dict[int, _Exchange], what: str) -> dict[int, torch.Tensor]:
        for rank, exchange in under_way.items():
            with self._naming(rank, what):
                self._across = rank
                exchange.receiving.wait(self._timeout + PATIENCE)
                exchange.sending.wait(self._timeout + PATIENCE)
                self._across = None
        return {rank: exchange.there for rank, exchange in under_way.items()}

    # ---- failures ------------------------------------------------------------------------------

    @contextmanager
    def call(self, what: str) -> Iterator[None]:
        """A call, of which there is one at a time; a failure in it is that of all ranks, and final.

        Args:
            what: the op, its dtype and shape, of which a call within the host may be a part.

        Raises:
            ConcurrentUse: another thread's call is running; that one is not harmed.
            CommunicatorError: the first failure that any rank has found.
        """
        if not self._busy.acquire(blocking=False):
            raise ConcurrentUse(
                f"a second stream of calls on one communicator: {what} began while another "
                "thread's call was running. One communicator serves one stream; make a second "
                "Communicator for the other"
            )
        try:
            with self._failing_together(what):
                yield
        finally:
            self._busy.release()

    @contextmanager
    def _failing_together(self, what: str = "") -> Iterator[None]:
        if self._failure is not None:
            raise self._failure
        try:
            yield
        except ConcurrentUse:
            raise
        except CommunicatorError as error:
            if error is self._failure:
                raise
            # From the host's own communicator, which counts its ranks from 0.
            text = re.sub(
                r"\brank (\d+)", lambda found: f"rank {self._host[int(found[1])]}", str(error)
            )
            if isinstance(error, PeerTimeout):
                text = re.sub(r"for rank (\d+)", lambda found: self._for(int(found[1])), text)
            part = f" (part of rank {self._rank}'s {what})" if what else ""
            raise self._failed(type(error)(text + part)) from None

    def check(self) -> None:
        """Raises this communicator's failure, if this rank can know of one."""
        with self._failing_together():
            self.inside.check()

    def close(self) -> None:
        """Leaves in order."""
        if self._failure is None:
            with suppress(RuntimeError):  # the store may have ended with the job's first process
                self._store.set(f"closed {self._rank}", "")
        self._leave()

    def _leave(self) -> None:
        self._waits.close()
        self.inside.close()
        self._links = None  # its connections end here, and the peers notice

    def _awaited(self) -> int | None:
        """The rank that this one is waiting for, of whatever host."""
        across, place = self._across, self.inside.awaited
        return self._host[place] if across is None and place >= 0 else across

    def _for(self, peer: int) -> str:
        """Of a wait for a peer, which may itself be held up by another rank: for whom."""
        behind = self._waits.behind(peer)
        return f"for rank {behind}" + (f", for which rank {peer} waits," if behind != peer else "")

    @contextmanager
    def _naming(self, peer: int, what: str) -> Iterator[None]:
        """Names the peer in torch.distributed's error, which is then the failure of all."""
        try:
            yield
        except RuntimeError as error:
            cause = self._cause(peer, f"{what}, call {self._calls}", str(error))
            raise self._failed(cause) from None

    def _cause(self, peer: int, call: str, said: str) -> CommunicatorError:
        me = f"rank {self._rank}"
        if self._has_closed(peer):
            return CommunicatorClosed(
                f"rank {peer} has closed its communicator while {me} was waiting for it in {call}"
            )
        # Two that wait for each other in different calls do so in vain, and the first to give up
        # ends the connection: each writes down its own call and looks for the other's.
        with suppress(RuntimeError):
            self._store.set(f"call of {self._rank}", call)
        other = self._call_of(peer)
        if other not in (None, call):
            return PeerMismatch(
                f"rank {peer} called {other} while {me} called {call}: all ranks must make the "
                "same calls in the same order"
            )
        if "timed out" not in said.lower():
            return PeerDied(f"rank {peer} is gone: {me} lost it in {call}: {said}")
        return PeerTimeout(
            f"{me} waited {self._timeout.total_seconds():.3g} s {self._for(peer)} in {call}. Is "
            "that rank stuck, or did it leave out a call? The limit is Communicator(timeout=)"
        )

    def _has_closed(self, peer: int) -> bool:
        with suppress(RuntimeError):
            return self._store.check([f"closed {peer}"])
        return False

    def _call_of(self, peer: int) -> str | None:
        """The call in which a peer has waited in vain, too."""
        key, end = f"call of {peer}", time.monotonic() + GRACE_SECONDS
        with suppress(RuntimeError):
            while not self._store.check([key]):
                if time.monotonic() > end:
                    return None
                time.sleep(0.01)
            return self._store.get(key).decode()
        return None

    def _failed(self, found: CommunicatorError) -> CommunicatorError:
        """The failure of all, which is the first that was found; this rank leaves."""
        among = f"among the {self._name}, " if self._name else ""
        record = f"{type(found).__name__} {among}{found}"
        with suppress(RuntimeError):  # without the store, each has what it has found itself
            record = self._store.compare_set("failure", "", record).decode()
        kind, _, text = record.partition(" ")
        self._failure = getattr(errors, kind)(text)
        self._leave()
        return self._failure
