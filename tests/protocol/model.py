"""An explicit-state model checker for the signalling protocol of docs/protocol.md.

A `System` is a set of small memory operations, grouped by agent (a rank on the CPU; a block of a
rank on a GPU). Every operation carries the set of its own rank's operations that must have been
*performed* before it. That partial order is the memory model: two plain stores of one agent have no
order between them, so payload and word arrive in any order; a release store comes after everything
that stands before it; what stands behind an acquire comes after it; a plain load floats freely
between the acquire above it and the release below it. Two accesses of one agent to one location
keep their order. A store becomes visible to all other agents in one step.

`explore` walks every order in which the operations can be performed, breadth first, so that the
trace of a fault is one of the shortest. A state is the set of operations performed, the contents of
memory, and, where failures are modelled, who has left and why. Every step performs something, so
the graph has no cycles: a run ends, and it ends well only if every agent has finished or has been
told why it must stop.

With `reduce=True` persistent sets of one element are used: an enabled operation is taken alone if
each operation still to come that touches the same location (one of the two being a store) can only
happen after it. "Can only happen after" is the transitive closure of the agents' own order and of
"a wait needs a store that satisfies it". In an acyclic graph this keeps every fault and every
deadlock; `test_model.py` compares both searches with one another.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

STORE, LOAD, WAIT, ENTRY = "store", "load", "wait", "entry"
STALE, OVERWRITTEN, DEADLOCK = "stale read", "overwritten read", "deadlock"
FALSE_MISMATCH, WRONG_DESCRIPTOR, WRONG_REPORT = (
    "false mismatch",
    "wrong descriptor",
    "wrong report",
)
ACCEPT, MISMATCH = "accept", "mismatch"


@dataclass(eq=False)
class Operation:
    """One access to one location by one agent; `before` must have been performed first."""

    kind: str
    rank: int
    block: int
    call: int
    location: tuple
    before: set[Operation]
    text: str
    value: tuple = ()  # of a store: what it writes, for the traces
    generation: int = 0
    tag: object = None
    source: int = -1  # of a load or wait: the rank whose store is expected
    # The numbers below are given by System.
    number: int = -1
    position: int = -1
    agent: int = -1
    place: int = -1
    bit: int = 0
    need: int = 0
    byte: int = 0
    expected: int | None = None
    verdicts: dict[int, str] = field(default_factory=dict)
    descriptor: tuple[int, int] | None = None  # (place, expected byte): read after a mismatch

    def __str__(self) -> str:
        return f"rank {self.rank} block {self.block} call {self.call}: {self.text}"


@dataclass
class Fault:
    """What went wrong, where, and the steps that lead there (the last one is the fault)."""

    kind: str
    message: str
    trace: list[str]

    def __str__(self) -> str:
        steps = [f"{i:3d}. {step}" for i, step in enumerate(self.trace, 1)]
        return "\n".join([f"{self.kind}: {self.message}", *steps])


@dataclass
class Result:
    states: int
    steps: int
    fault: Fault | None
    outcomes: set[tuple[str, ...]]
    kinds: set[str]  # of all faults found


class LimitExceeded(RuntimeError):
    """The state space is larger than the bound given: nothing has been shown."""


class System:
    """The operations of all agents, numbered, with masks instead of sets.

    `agents[a]` is the program of agent a in program order. Failures (see failures.py) are modelled
    if `failures` is given; without them an agent can only go on.
    """

    def __init__(self, agents: list[list[Operation]], world_size: int, failures=None):
        self.world_size = world_size
        self.failures = failures
        self.operations = [operation for program in agents for operation in program]
        self.agents = agents
        self.places: dict[tuple, int] = {}
        self.stores: dict[int, list[Operation]] = {}
        stores = 0
        for number, operation in enumerate(self.operations):
            operation.number, operation.bit = number, 1 << number
            operation.place = self.places.setdefault(operation.location, len(self.places))
            if operation.kind == STORE:
                stores += 1
                operation.byte = stores
                self.stores.setdefault(operation.place, []).append(operation)
        if stores > 255:
            raise ValueError(f"{stores} stores: a memory cell of the model is one byte")
        for agent, program in enumerate(agents):
            for position, operation in enumerate(program):
                operation.agent, operation.position = agent, position
        for operation in self.operations:
            operation.need = sum(other.bit for other in operation.before)
        self.by_byte = {s.byte: s for place in self.stores.values() for s in place}
        self.agent_rank = [program[0].rank for program in agents]
        self.complete = (1 << len(self.operations)) - 1
        self.agent_mask = [sum(o.bit for o in program) for program in agents]
        self.rank_mask = [0] * world_size
        self.rank_operations: list[list[Operation]] = [[] for _ in range(world_size)]
        for operation in self.operations:
            self.rank_mask[operation.rank] |= operation.bit
            self.rank_operations[operation.rank].append(operation)
        self._ready: list[dict[int, tuple[Operation, ...]]] = [{} for _ in range(world_size)]

    def ready(self, performed: int) -> Iterator[Operation]:
        """Operations whose predecessors have been performed (a wait may still be unsatisfied)."""
        for rank in range(self.world_size):
            mine = performed & self.rank_mask[rank]
            found = self._ready[rank].get(mine)
            if found is None:
                found = tuple(
                    o
                    for o in self.rank_operations[rank]
                    if not mine & o.bit and o.need & mine == o.need
                )
                self._ready[rank][mine] = found
            yield from found

    def seen(self, byte: int) -> str:
        """What a memory cell holds, in words."""
        if byte == 0:
            return "the initial zero"
        store = self.by_byte[byte]
        return f"what rank {store.rank} stored in its call {store.call} {store.value}"

    def judge(self, operation: Operation, byte: int) -> str | None:
        """The fault, if any, of reading `byte` where `operation.expected` is due."""
        if operation.expected is None or byte == operation.expected:
            return None
        due = self.by_byte[operation.expected]
        found = self.by_byte.get(byte, due)
        return OVERWRITTEN if (found.call, found.byte) > (due.call, due.byte) else STALE

    def holds(self, operation: Operation, performed: int, byte: int) -> str:
        """What a faulty read finds, and what it has overtaken."""
        text = f"it holds {self.seen(byte)}"
        overtaken = [
            o.text
            for o in self.agents[operation.agent][: operation.position]
            if o.kind == WAIT and o.call == operation.call and not performed & o.bit
        ]
        return text + "".join(f"; not yet performed: {text}" for text in overtaken)

    def must_follow(self, ranks: Collection[int]) -> list[int]:
        """For each operation of `ranks`, those of `ranks` that precede it in every run."""
        known = [operation.need for operation in self.operations]
        changed = True
        while changed:
            changed = False
            for operation in self.operations:
                mask = known[operation.number]
                if operation.kind == WAIT and operation.verdicts and 0 not in operation.verdicts:
                    shared = self.complete
                    for byte in operation.verdicts:
                        store = self.by_byte[byte]
                        inside = store.rank in ranks and operation.rank in ranks
                        shared &= known[store.number] | store.bit if inside else 0
                    mask |= shared
                rest = mask
                while rest:
                    low = rest & -rest
                    mask |= known[low.bit_length() - 1]
                    rest ^= low
                if mask != known[operation.number]:
                    known[operation.number] = mask
                    changed = True
        return known

    def races(self, ranks: Collection[int] | None = None) -> list[int]:
        """For each operation, those that conflict with it and may happen before it.

        With `ranks`, only their operations count, and only order that arises among these ranks.
        """
        ranks = range(self.world_size) if ranks is None else ranks
        known = self.must_follow(ranks)
        races = [0] * len(self.operations)
        by_place: dict[int, list[Operation]] = {}
        for operation in self.operations:
            if operation.rank in ranks:
                by_place.setdefault(operation.place, []).append(operation)
        for group in by_place.values():
            for one in group:
                for other in group:
                    conflict = one is not other and STORE in (one.kind, other.kind)
                    if conflict and not known[other.number] & one.bit:
                        races[one.number] |= other.bit
        return races

    def unordered(self, ranks: Collection[int]) -> list[tuple[Operation, Operation]]:
        """Conflicting accesses whose order nothing fixes, if only what these ranks do counts."""
        races = self.races(ranks)
        return [
            (one, other)
            for one in self.operations
            for other in self.operations[: one.number]
            if races[one.number] & other.bit and races[other.number] & one.bit
        ]


def explore(
    system: System, *, reduce: bool = False, first: bool = True, limit: int = 2_000_000
) -> Result:
    """Visit every reachable state, or every state of the reduced graph; stop at the first fault.

    With `first=False` the search goes on behind a faulty read and collects the kinds of all faults.
    Raises LimitExceeded if there are more than `limit` states: a search cut short is not a pass.
    """
    if reduce and system.failures is not None:
        raise ValueError("the reduction knows only runs without failures")
    races = system.races() if reduce else None
    failures = system.failures
    start = (0, bytes(len(system.places)), failures.start(system) if failures else None)
    parents: dict[tuple, tuple | None] = {start: None}
    outcomes: set[tuple[str, ...]] = set()
    kinds: set[str] = set()
    steps = 0
    layer = [start]
    while layer:
        following = []
        for state in layer:
            moves = _moves(system, state)
            if failures is not None:
                moves += failures.moves(system, state)
            if races is not None:
                moves = _persistent(moves, races, system.complete & ~state[0])
            progress = False
            for label, target, fault in moves:
                steps += 1
                progress = True
                if fault is not None:
                    kinds.add(fault[0])
                    if first:
                        trace = [*_trace(parents, state), f"{label}  <-- {fault[0]}: {fault[1]}"]
                        return Result(len(parents), steps, Fault(*fault, trace), outcomes, kinds)
                if target is not None and target not in parents:
                    parents[target] = (state, label)
                    following.append(target)
            if not progress:
                fault = _end(system, state, outcomes)
                if fault is not None:
                    kinds.add(fault[0])
                    if first:
                        trace = [*_trace(parents, state), f"end  <-- {fault[0]}: {fault[1]}"]
                        return Result(len(parents), steps, Fault(*fault, trace), outcomes, kinds)
            if len(parents) > limit:
                raise LimitExceeded(f"more than {limit} states")
        layer = following
    return Result(len(parents), steps, None, outcomes, kinds)


def _moves(system: System, state: tuple) -> list[tuple]:
    """(label, next state, fault) for each operation possible now; the label is the operation."""
    performed, memory, control = state
    failures = system.failures
    moves = []
    for operation in system.ready(performed):
        if control is not None and not failures.may_go_on(operation, control):
            continue
        after, place, fault = memory, operation.place, None
        if operation.kind == STORE:
            after = b"%b%c%b" % (memory[:place], operation.byte, memory[place + 1 :])
        elif operation.kind == LOAD:
            kind = system.judge(operation, memory[place])
            if kind is not None:
                fault = kind, system.holds(operation, performed, memory[place])
        elif operation.kind == WAIT:
            verdict = operation.verdicts.get(memory[place])
            if verdict is None:
                continue
            seen = "it holds " + system.seen(memory[place])
            if verdict == MISMATCH:
                if failures is None or operation.descriptor is None:
                    moves.append((operation, None, (FALSE_MISMATCH, seen)))
                else:
                    label = f"{operation}, finds another tag"
                    moves.append((label, failures.diagnose(operation, state), None))
                continue
            kind = system.judge(operation, memory[place])
            if kind is not None:
                fault = kind, seen
        moves.append((operation, (performed | operation.bit, after, control), fault))
    return moves


def _persistent(moves: list[tuple], races: list[int], pending: int) -> list[tuple]:
    for move in moves:
        if move[1] is not None and not races[move[0].number] & pending:
            return [move]
    return moves


def _end(system: System, state: tuple, outcomes: set) -> tuple[str, str] | None:
    """A state without successors: a good end, or a deadlock, or an end with the wrong report."""
    performed, memory, control = state
    if control is not None:
        stuck = system.failures.stuck(system, state)
    else:
        stuck = performed != system.complete
    if stuck:
        waiting = [
            f"{o} and sees {system.seen(memory[o.place])}"
            for o in system.ready(performed)
            if o.kind == WAIT and (control is None or system.failures.may_go_on(o, control))
        ]
        return DEADLOCK, "; ".join(waiting)
    if control is None:
        outcomes.add(("done",) * system.world_size)
        return None
    outcome = system.failures.outcome(system, state)
    outcomes.add(outcome)
    if not system.failures.permitted(outcome):
        return WRONG_REPORT, f"the ranks report {outcome}"
    return None


def _trace(parents: dict, state: tuple) -> list[str]:
    labels = []
    while parents[state] is not None:
        state, label = parents[state]
        labels.append(str(label))
    return labels[::-1]
