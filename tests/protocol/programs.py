"""The calls of docs/protocol.md as programs for the model.

`build(world, programs, protocol)` turns one list of calls per rank into a `System`. Nothing is
known here about interleavings: this file says which accesses a call makes, in which order an agent
writes them down, and which order the memory model keeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .calls import (
    RULES,
    Direct,
    Flagged,
    Gather,
    OneShot,
    Protocol,
    Receive,
    Send,
    Sliced,
    TwoShot,
    Zero,
)
from .failures import Failures
from .model import ACCEPT, ENTRY, LOAD, MISMATCH, STORE, WAIT, Operation, System

MAX_BLOCKS = 2


@dataclass
class _Agent:
    """One thread of control while its program is written down."""

    rank: int
    block: int
    call: int = 0  # the number of the call being written down, and its generation
    generation: int = 0
    program: list[Operation] = field(default_factory=list)
    fence: set[Operation] = field(default_factory=set)  # comes before all that follows
    control: set[Operation] = field(default_factory=set)  # comes before stores that follow
    last: dict[tuple, Operation] = field(default_factory=dict)


class _Rank:
    def __init__(self, rank: int, blocks: int):
        self.rank = rank
        self.agents = [_Agent(rank, block) for block in range(blocks)]
        self.generations = [1] * MAX_BLOCKS
        self.calls = 0
        self.messages: dict[tuple[int, int], int] = {}
        self.ended: set[Operation] = set()  # operations of kernels that have ended


class _Builder:
    def __init__(self, world: int, protocol: Protocol, failures: Failures | None, blocks: int):
        self.world, self.protocol, self.failures = world, protocol, failures
        self.ranks = [_Rank(rank, blocks) for rank in range(world)]
        self.stores: dict[tuple, list[Operation]] = {}
        self.called: dict[tuple[int, int], object] = {}
        self.waits: list[tuple[Operation, str]] = []

    # Single operations -------------------------------------------------------------------------

    def add(self, agent: _Agent, kind: str, location: tuple, text: str, before=(), **more):
        before = set(before) | agent.fence
        if location in agent.last:
            before.add(agent.last[location])
        more = {"call": agent.call, "generation": agent.generation} | more
        text = f"{kind} {text}"
        operation = Operation(
            kind, agent.rank, agent.block, location=location, before=before, text=text, **more
        )
        agent.last[location] = operation
        agent.program.append(operation)
        if kind == STORE:
            self.stores.setdefault(location, []).append(operation)
        return operation

    def store(self, agent: _Agent, location, text, *, release=False, before=(), **more):
        before = set(before) | agent.control
        if release and self.protocol.release:
            before |= set(agent.program) | self.ranks[agent.rank].ended
        return self.add(agent, STORE, location, f"{text} {more['value']}", before, **more)

    def wait(self, agent: _Agent, location, text, rule: str, **more):
        operation = self.add(agent, WAIT, location, text, **more)
        self.waits.append((operation, rule))
        return operation

    def passed(self, agent: _Agent, waits: Iterable[Operation], acquire: bool) -> None:
        """The waits hold back the stores that follow, and the loads too if they acquire."""
        (agent.fence if acquire and self.protocol.acquire else agent.control).update(waits)

    # A phase: publish, await everybody, read ---------------------------------------------------

    def home(self, source: int, reader: int) -> int:
        return reader if self.protocol.push else source

    def payload(self, source: int, reader: int, generation: int, phase: int, cell: int) -> tuple:
        half = generation % self.protocol.halves
        if self.protocol.swap_slots and generation // 2 % 2:
            source = 1 - source
        phase = phase if self.protocol.payload_phase else 0
        return ("payload", self.home(source, reader), source, half, phase, cell)

    def word(self, source: int, reader: int, generation: int, phase: int, block: int) -> tuple:
        parity = generation % 2 if self.protocol.word_parity else 0
        phase = phase if self.protocol.word_phase else 0
        return ("word", self.home(source, reader), parity, phase, block, source)

    def descriptor(self, source: int, reader: int, generation: int) -> tuple:
        half = generation % self.protocol.descriptor_halves
        return ("descriptor", self.home(source, reader), half, source)

    def readers(self, rank: int, peers: Iterable[int]) -> list[int]:
        """One store for each peer when pushing; one for all of them when they pull."""
        peers = [p for p in peers if p != rank]
        return peers if self.protocol.push else peers[:1]

    def publish(self, agent, call, phase, cells, *, index=None, peers=None, before=()) -> None:
        """`cells[reader]`: the cells stored for this reader; then one word to each of `peers`."""
        rank, generation = agent.rank, agent.generation
        done = set()
        for reader, wanted in cells.items():
            for cell in wanted:
                place = self.payload(rank, reader, generation, phase, cell)
                if reader != rank and place not in done:
                    done.add(place)
                    value = ("data", agent.call)
                    self.store(agent, place, _name(place), before=before, tag=phase, value=value)
        block = agent.block if index is None else index
        for reader in self.readers(rank, range(self.world) if peers is None else peers):
            place = self.word(rank, reader, generation, phase, block)
            value = ("generation", generation)
            self.store(agent, place, _name(place), release=True, tag=call, value=value)

    def await_peers(self, agent, call, phase, *, index=None, peers=None) -> dict[int, Operation]:
        """Waits for one word of each peer, in any order; returns the waits by peer."""
        waits = {}
        block = agent.block if index is None else index
        for peer in range(self.world) if peers is None else peers:
            if peer != agent.rank:
                place = self.word(peer, agent.rank, agent.generation, phase, block)
                text = f"for generation {agent.generation} in {_name(place)}"
                waits[peer] = self.wait(agent, place, text, "word", tag=call, source=peer)
        return waits

    def read(self, agent, phase, cells, waits) -> list[Operation]:
        """Loads `cells[peer]`, each after the wait for that peer: more orders than a reader has."""
        loads = []
        for peer, wanted in cells.items():
            if peer == agent.rank:
                continue
            ordered = {waits[peer]} if self.protocol.acquire and peer in waits else set()
            if self.protocol.compare_descriptors and phase == 0 and agent.block == 0:
                place = self.descriptor(peer, agent.rank, agent.generation)
                self.add(agent, LOAD, place, _name(place), ordered, source=peer)
            for cell in wanted:
                place = self.payload(peer, agent.rank, agent.generation, phase, cell)
                load = self.add(agent, LOAD, place, _name(place), ordered, source=peer, tag=phase)
                loads.append(load)
        self.passed(agent, waits.values(), acquire=True)
        return loads

    # Calls -------------------------------------------------------------------------------------

    def call(self, rank: _Rank, call) -> None:
        if isinstance(call, (Send, Receive)):
            self.message(rank, call)
            return
        rank.calls += 1
        self.called[rank.rank, rank.calls] = call
        grid = getattr(call, "grid", 1)
        agents = rank.agents[:grid]
        for agent in agents:
            self.enter(rank, agent, call)
        if not (isinstance(call, Zero) and self.protocol.skip_empty):
            for agent in agents:
                getattr(self, type(call).__name__.lower())(agent, call)
        self.leave(rank, agents, grid)

    def enter(self, rank: _Rank, agent: _Agent, call) -> None:
        """Stream order (all blocks of the last kernel have ended), abort word, descriptor."""
        agent.call, agent.generation = rank.calls, rank.generations[agent.block]
        if len(rank.agents) > 1 and self.protocol.kernel_boundary:
            agent.fence |= {o for o in rank.ended if o.kind != STORE}
        if self.failures is not None:
            place = ("entry", rank.rank)
            agent.fence.add(self.add(agent, ENTRY, place, f"of {call}, not aborted"))
        if agent.block == 0 and (self.failures or self.protocol.compare_descriptors):
            for reader in self.readers(rank.rank, range(self.world)):
                place = self.descriptor(rank.rank, reader, agent.generation)
                self.store(agent, place, _name(place), value=(str(call),))

    def leave(self, rank: _Rank, agents: Sequence[_Agent], grid: int) -> None:
        for agent in agents:
            rank.ended.update(agent.program)
            following = self.protocol.following(rank.generations[agent.block])
            for block in range(agent.block, MAX_BLOCKS, grid):
                if block == agent.block or not self.protocol.block_generations:
                    rank.generations[block] = following

    def oneshot(self, agent: _Agent, call: OneShot) -> None:
        cells = dict.fromkeys(range(self.world), range(agent.block, call.parts, call.grid))
        self.publish(agent, call, 0, cells)
        self.read(agent, 0, cells, self.await_peers(agent, call, 0))

    def sliced(self, agent: _Agent, call: Sliced) -> None:
        everyone = range(self.world)
        ahead = call.slices if call.ahead is None else call.ahead
        for step in range(call.slices + ahead):
            if step < call.slices:
                self.publish(agent, call, 0, {peer: [step] for peer in everyone}, index=step)
            done = step - ahead
            if done >= 0:
                waits = self.await_peers(agent, call, 0, index=done)
                self.read(agent, 0, {peer: [done] for peer in everyone}, waits)

    def twoshot(self, agent: _Agent, call: TwoShot) -> None:
        everyone = range(self.world)
        shift = self.world * agent.block
        givers = [rank for rank in everyone if rank not in call.empty]
        skip = self.protocol.skip_empty
        mine = agent.rank in givers
        # What a rank that skips empty slices leaves out; None is nobody.
        to_givers, alone = (givers if skip else None), (() if skip and not mine else None)
        slices = {reader: [reader + shift] for reader in givers}
        self.publish(agent, call, 0, slices, peers=to_givers)
        waits = self.await_peers(agent, call, 0, peers=alone)
        wanted = {key: [agent.rank + shift] for key in everyone} if mine else {}
        loads = self.read(agent, 0, wanted, waits)
        # The reduced slice is computed from the loads: a data dependency, release or not.
        reduced = {key: [agent.block] for key in everyone} if mine else {}
        self.publish(agent, call, 1, reduced, peers=alone, before=loads)
        waits = self.await_peers(agent, call, 1, peers=to_givers)
        self.read(agent, 1, {key: [agent.block] for key in givers}, waits)

    def gather(self, agent: _Agent, call: Gather) -> None:
        givers = [rank for rank in range(self.world) if rank not in call.empty]
        mine, skip = agent.rank in givers, self.protocol.skip_empty
        cells = {key: [0] for key in range(self.world)} if mine else {}
        self.publish(agent, call, 0, cells, peers=() if skip and not mine else None)
        waits = self.await_peers(agent, call, 0, peers=givers if skip else None)
        self.read(agent, 0, {key: [0] for key in givers}, waits)

    def words_only(self, agent: _Agent, call, phase: int) -> dict[int, Operation]:
        self.publish(agent, call, phase, {})
        waits = self.await_peers(agent, call, phase)
        self.passed(agent, waits.values(), acquire=True)
        return waits

    def zero(self, agent: _Agent, call: Zero) -> None:
        self.words_only(agent, call, 0)

    def direct(self, agent: _Agent, call: Direct) -> None:
        mine = ("tensor", agent.rank)
        self.store(agent, mine, _name(mine), value=("data", agent.call))
        for peer in self.words_only(agent, call, 0):
            place = ("tensor", peer)
            self.add(agent, LOAD, place, _name(place), source=peer)
        if call.trailing_barrier:
            self.words_only(agent, call, 1)

    def flagged(self, agent: _Agent, call: Flagged) -> None:
        generation, half = agent.generation, agent.generation % self.protocol.halves
        flag = self.protocol.flag(generation)
        peers = [p for p in range(self.world) if p != agent.rank]
        if self.protocol.fence_after_zeroing:
            agent.fence |= self.ranks[agent.rank].ended
        for peer in peers:
            for line in range(call.lines):
                place = ("line", peer, half, agent.rank, line)
                self.store(agent, place, _name(place), tag=flag, value=("flag", flag))
            place = self.word(agent.rank, peer, generation, 0, 0)
            self.store(agent, place, _name(place), tag=call, value=("generation", generation))
        waits = list(self.await_peers(agent, call, 0).values())
        for peer in peers:
            for line in range(call.lines):
                place = ("line", agent.rank, half, peer, line)
                text = f"for flag {flag} in {_name(place)}"
                wait = self.wait(agent, place, text, "flag", source=peer, tag=flag)
                waits.append(wait)
                if self.protocol.zero_lines:
                    self.store(agent, place, _name(place), before=[wait], tag=0, value=("flag", 0))
        self.passed(agent, waits, acquire=False)

    def message(self, rank: _Rank, call: Send | Receive) -> None:
        """Messages of a channel are numbered from 1; n is sent when consumed >= n - slots."""
        agent, slots, slack = (
            rank.agents[0],
            self.protocol.channel_slots,
            self.protocol.credit_slack,
        )
        sending = isinstance(call, Send)
        channel = (rank.rank, call.to) if sending else (call.source, rank.rank)
        n = rank.messages[channel] = rank.messages.get(channel, 0) + 1
        agent.call = agent.generation = n
        slot = ("slot", *channel, n % slots)
        produced, consumed = ("produced", *channel), ("consumed", *channel)
        if sending:
            least = 0 if slack is None else n - slots - slack
            if least > 0:
                text = f"for {_name(consumed)} >= {least}"
                more = {"generation": least, "source": call.to}
                wait = self.wait(agent, consumed, text, "counter", **more)
                self.passed(agent, [wait], acquire=True)
            for block in range(call.blocks):
                cell, word = self.block(channel, n, block)
                self.store(agent, cell, _name(cell), value=("message", n))
                self.store(agent, word, _name(word), release=True, value=("counter", n))
            if call.blocks:
                return
            self.store(agent, slot, _name(slot), value=("message", n))
            self.store(agent, produced, _name(produced), release=True, value=("counter", n))
            return
        for block in range(call.blocks):
            cell, word = self.block(channel, n, block)
            text = f"for {n} in {_name(word)}"
            wait = self.wait(agent, word, text, "number", source=call.source)
            self.passed(agent, [wait], acquire=True)
            self.add(agent, LOAD, cell, _name(cell), source=call.source)
        if not call.blocks:
            text = f"for {_name(produced)} >= {n}"
            wait = self.wait(agent, produced, text, "counter", source=call.source)
            self.passed(agent, [wait], acquire=True)
            self.add(agent, LOAD, slot, _name(slot), source=call.source)
        self.store(agent, consumed, _name(consumed), release=True, value=("counter", n))

    def block(self, channel: tuple[int, int], n: int, block: int) -> tuple[tuple, tuple]:
        """Where a block of message n and its word lie."""
        slot = n % self.protocol.channel_slots
        word = block if self.protocol.block_words else 0
        return ("cell", *channel, slot, block), ("mark", *channel, slot, word)

    # What each read is to find -----------------------------------------------------------------

    def system(self) -> System:
        agents = [a.program for rank in self.ranks for a in rank.agents if a.program]
        system = System(agents, self.world, self.failures)
        for operation in system.operations:
            if operation.kind == LOAD:
                self.expect(operation)
        for operation, rule in self.waits:
            getattr(self, "accept_" + rule)(system, operation)
        return system

    def expect(self, operation: Operation) -> None:
        """The store of the same call by the source, unless the two called different things."""
        mine = self.called.get((operation.rank, operation.call))
        theirs = self.called.get((operation.source, operation.call))
        channel = operation.location[0] in ("slot", "cell")
        if not channel and mine != theirs:
            return
        for store in self.stores.get(operation.location, ()):
            same = (store.rank, store.call, store.tag)
            if same == (operation.source, operation.call, operation.tag):
                operation.expected = store.byte
                return
        if channel and self.failures is not None:
            return  # a message that the peer never sends
        raise ValueError(f"nobody stores what {operation} reads")

    def accept_word(self, system: System, operation: Operation) -> None:
        for store in self.stores.get(operation.location, ()):
            if store.generation == operation.generation or (
                not self.protocol.exact and store.generation > operation.generation
            ):
                other = operation.block == 0 and store.tag != operation.tag
                operation.verdicts[store.byte] = MISMATCH if other else ACCEPT
        mine = self.called[operation.rank, operation.call]
        theirs = self.called.get((operation.source, operation.call))
        if self.failures is not None and theirs is not None and mine != theirs:
            place = self.descriptor(operation.source, operation.rank, operation.generation)
            for store in self.stores.get(place, ()):
                if store.rank == operation.source and store.call == operation.call:
                    operation.descriptor = (system.places[place], store.byte)

    def accept_flag(self, system: System, operation: Operation) -> None:
        if operation.tag == 0:
            operation.verdicts[0] = ACCEPT
        for store in self.stores.get(operation.location, ()):
            if store.tag == operation.tag:
                operation.verdicts[store.byte] = ACCEPT
        self.expect(operation)

    def accept_number(self, system: System, operation: Operation) -> None:
        for store in self.stores.get(operation.location, ()):
            if store.generation == operation.generation:
                operation.verdicts[store.byte] = ACCEPT

    def accept_counter(self, system: System, operation: Operation) -> None:
        for store in self.stores.get(operation.location, ()):
            if store.generation >= operation.generation:
                operation.verdicts[store.byte] = ACCEPT


NAMES = {
    "word": "word[parity {1}][phase {2}][block {3}][source {4}] at rank {0}",
    "payload": "payload[source {1}][half {2}][phase {3}][cell {4}] at rank {0}",
    "descriptor": "descriptor[half {1}][source {2}] at rank {0}",
    "line": "line[half {1}][source {2}][{3}] at rank {0}",
    "tensor": "tensor of rank {0}",
    "slot": "slot {2} of channel {0}->{1}",
    "cell": "block {3} of slot {2} of channel {0}->{1}",
    "mark": "word of block {3} of slot {2} of channel {0}->{1}",
    "produced": "produced of channel {0}->{1}",
    "consumed": "consumed of channel {0}->{1}",
}


def _name(place: tuple) -> str:
    return NAMES[place[0]].format(*place[1:])


def build(
    world: int,
    programs: Sequence,
    protocol: Protocol = RULES,
    failures: Failures | None = None,
) -> System:
    """`programs`: one list of calls for all ranks, or a list of lists, one for each rank."""
    each = list(programs) if isinstance(programs[0], (list, tuple)) else [programs] * world
    if len(each) != world:
        raise ValueError(f"{len(each)} programs for {world} ranks")
    blocks = max(getattr(call, "grid", 1) for program in each for call in program)
    builder = _Builder(world, protocol, failures, blocks)
    for rank, program in zip(builder.ranks, each, strict=True):
        for call in program:
            builder.call(rank, call)
    return builder.system()
