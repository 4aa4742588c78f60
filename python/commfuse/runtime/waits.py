"""Which rank waits for which, so that the one that holds up the others is told from them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

import torch.distributed as dist

INTERVAL_SECONDS = 0.25


class Waits:
    """Tells the other ranks whom this rank waits for, and finds out whom they wait for.

    A wait that has lasted for some time is written down in the store, and crossed out when it is
    over, by a thread of its own: what waits cannot, and calls that wait briefly pay nothing.

    Args:
        store: of the ranks alone.
        rank: this one.
        awaited: the rank that this one is waiting for, or None; called by the thread.
    """

    def __init__(self, store: dist.Store, rank: int, awaited: Callable[[], int | None]):
        self._store, self._rank, self._awaited = store, rank, awaited
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._write, name="commfuse-waits", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; what it has written stays."""
        self._ended.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _write(self) -> None:
        written = before = None
        with suppress(RuntimeError):  # the store may end with the job's first process
            while not self._ended.wait(INTERVAL_SECONDS):
                now = self._awaited()
                if now != written and now in (None, before):
                    self._store.set(f"awaited by {self._rank}", "" if now is None else str(now))
                    written = now
                before = now

    def of(self, rank: int) -> int | None:
        """The rank that another one is waiting for, or None."""
        key = f"awaited by {rank}"
        with suppress(RuntimeError):
            if self._store.check([key]) and (found := self._store.get(key).decode()):
                return int(found)
        return None

    def behind(self, rank: int) -> int:
        """Who holds up a rank: the last of a chain of ranks that wait, maybe the rank itself.

        Example:
            >>> waits.behind(1)     # waits for rank 3, which does something else
            3
        """
        seen, last = [self._rank], rank
        while last not in seen:
            seen.append(last)
            if (following := self.of(last)) is None:
                return last
            last = following
        return rank  # in a circle nobody is to blame more than another
