"""Comparison of the roles' messages with each other: whether the job they belong to could run to its end.

* Every rank asks for the same process groups in the same order.
* All members of a group issue the same collectives in the same order, with the same sizes.
* Every point-to-point message that is sent is received, in order and with the same size.
* No rank waits forever. The ranks are played against each other: a message is complete when all its members have issued
  it and their earlier messages on the same communicator are complete, as NCCL does it. A rank continues until it waits
  for a message that is not. Ranks that are left waiting form a cycle in the graph of who waits for whom.
"""

from collections import defaultdict, deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import zip_longest

from tools.rehearsal.traffic import RECEIVE, SEND, Message

Group = tuple[int, ...]
_Pair = tuple[int, int, Group]  # source, target, and the group through which the message goes
Messages = Mapping[int, Sequence[Message]]  # of each rank
_MOST_FAULTS = 10


def find_faults(
    messages: Messages, orders: Mapping[int, Sequence[int]], groups: Mapping[int, Sequence[Group]]
) -> list[str]:
    """Return what would make the job fail, each in one line; the first of each kind only.

    Args:
        messages: of each rehearsed rank, in the order in which it issues them.
        orders: messages and waits of each rank, see :class:`tools.rehearsal.traffic.Traffic`.
        groups: members of the process groups that each rank asks for.
    """
    faults = [*_different_groups(groups), *_different_collectives(messages), *_unmatched_messages(messages)]
    # A missing message leaves ranks waiting; to say so as well would hide the cause.
    return faults[:_MOST_FAULTS] if faults else list(_deadlocks(messages, orders))


def _different_groups(groups: Mapping[int, Sequence[Group]]) -> Iterator[str]:
    first, *others = groups
    for rank in others:
        for number, (expected, found) in enumerate(zip_longest(groups[first], groups[rank])):
            if expected != found:
                yield (
                    f"process group {number}: rank {first} asks for {_members(expected)}, rank {rank} for "
                    f"{_members(found)}; every rank must ask for the same groups in the same order"
                )
                break


def _members(group: Group | None) -> str:
    if group is None:
        return "no further group"
    return str(list(group)) if len(group) <= 8 else f"[{group[0]}, {group[1]}, ... {group[-1]}] ({len(group)} ranks)"


def _different_collectives(messages: Messages) -> Iterator[str]:
    streams: dict[int, dict[Group, list[Message]]] = {}
    for rank, issued in messages.items():
        own = streams[rank] = defaultdict(list)
        for message in issued:
            if not message.is_point_to_point:
                own[message.group].append(message)
    for group in dict.fromkeys(group for own in streams.values() for group in own):
        issuers = [rank for rank in messages if rank in group or group in streams[rank]]
        first = issuers[0]
        for rank in issuers[1:]:
            pairs = zip_longest(streams[first][group], streams[rank][group])
            for number, (expected, found) in enumerate(pairs):
                if expected is None or found is None or expected.compared() != found.compared():
                    yield (
                        f"collective {number} of group {_members(group)}: rank {first} issues {_or_none(expected)}; "
                        f"rank {rank} issues {_or_none(found)}"
                    )
                    break


def _or_none(message: Message | None) -> str:
    return "none" if message is None else str(message)


def _unmatched_messages(messages: Messages) -> Iterator[str]:
    sent: dict[_Pair, list[Message]] = defaultdict(list)
    received: dict[_Pair, list[Message]] = defaultdict(list)
    for rank, issued in messages.items():
        for message in issued:
            if message.peer is None or message.peer not in messages:
                continue
            if message.kind == SEND:
                sent[rank, message.peer, message.group].append(message)
            elif message.kind == RECEIVE:
                received[message.peer, rank, message.group].append(message)
    for pair in dict.fromkeys([*sent, *received]):
        source, target, _ = pair
        for number, (one, other) in enumerate(zip_longest(sent[pair], received[pair])):
            if one is None or other is None or (one.sizes, one.dtype) != (other.sizes, other.dtype):
                yield (
                    f"message {number} from rank {source} to rank {target}: rank {source} issues {_or_none(one)}; "
                    f"rank {target} issues {_or_none(other)}"
                )
                break


class _Meeting:
    """The ranks that must issue one message, and those that have."""

    def __init__(self, members: Sequence[int]) -> None:
        self.members = members
        self.is_complete = False


def _deadlocks(messages: Messages, orders: Mapping[int, Sequence[int]]) -> Iterator[str]:
    meetings = _meetings(messages)
    streams: dict[Hashable, deque[_Meeting]] = defaultdict(deque)  # of (rank, communicator): what is not complete
    position = dict.fromkeys(messages, 0)

    def complete(rank: int, communicator: Hashable) -> None:
        """Complete the messages at the head of a communicator's queue that all their members have come to."""
        queue = streams[rank, communicator]
        while queue and all(_head(streams[member, communicator]) is queue[0] for member in queue[0].members):
            done = queue[0]
            done.is_complete = True
            for member in done.members:
                streams[member, communicator].popleft()

    moved = True
    while moved:
        moved = False
        for rank, order in orders.items():
            while position[rank] < len(order):
                item = order[position[rank]]
                meeting, communicator = meetings[rank][item if item >= 0 else ~item]
                if item >= 0:
                    streams[rank, communicator].append(meeting)
                    complete(rank, communicator)
                elif not meeting.is_complete:
                    break
                position[rank] += 1
                moved = True
    waiting = [rank for rank, order in orders.items() if position[rank] < len(order)]
    if waiting:
        parts = [
            f"rank {rank} waits for {messages[rank][~orders[rank][position[rank]]]}" for rank in waiting[:_MOST_FAULTS]
        ]
        yield f"deadlock of {len(waiting)} ranks: {'; '.join(parts)}"


def _head(queue: deque[_Meeting]) -> _Meeting | None:
    return queue[0] if queue else None


def _meetings(messages: Messages) -> dict[int, list[tuple[_Meeting, Hashable]]]:
    """Return for each rank's messages their meetings, which its partners share, and their communicators."""
    shared: dict[Hashable, _Meeting] = {}
    found: dict[int, list[tuple[_Meeting, Hashable]]] = {}
    for rank, issued in messages.items():
        counts: dict[Hashable, int] = defaultdict(int)
        own = found[rank] = []
        for message in issued:
            if message.is_point_to_point:
                assert message.peer is not None
                ends = (rank, message.peer) if message.kind == SEND else (message.peer, rank)
                stream: Hashable = (ends, message.group)
                communicator: Hashable = (frozenset(ends), message.group)  # NCCL has one for each pair
                members: Sequence[int] = ends
            else:
                stream = communicator = message.group
                members = message.group
            key = (stream, counts[stream])
            counts[stream] += 1
            if key not in shared:
                shared[key] = _Meeting([member for member in members if member in messages])
            own.append((shared[key], communicator))
    return found
