"""Compares every request of a session with the nearest earlier one."""

from __future__ import annotations

import dataclasses
from collections import defaultdict, deque
from typing import TYPE_CHECKING, Any

from tokcache._prefix import n_common
from tokcache.differences.comparison import compare_requests

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokcache.differences.classes import Difference
    from tokcache.differences.request import Request

_N_CANDIDATES = 16  # the latest requests with one beginning


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """A request's place in its session, the earlier one nearest to it, and their difference.

    `earlier` is None for the first request of a model.
    """

    index: int
    earlier: int | None
    difference: Difference | None


def compare_session(requests: Sequence[Request]) -> list[Turn]:
    """Return each request's difference from the earlier one with the longest common beginning.

    Requests of other models, and plain texts and chats, are not compared with each other.

    Cost: O(n) for n messages of all requests, and `compare_requests` once a request.
    """
    # Each beginning of a list of messages has a number: that of the beginning before, and the key
    # of the next message, name it.
    numbers: dict[tuple[Any, Any], int] = {}
    users: defaultdict[int, deque[int]] = defaultdict(lambda: deque(maxlen=_N_CANDIDATES))
    turns = []
    for index, request in enumerate(requests):
        beginning = (request.model, request.is_plain)
        chain = [numbers.setdefault((None, beginning), len(numbers))]
        for message in request.messages:
            chain.append(numbers.setdefault((chain[-1], message.key), len(numbers)))
        n_equal = next(
            (depth for depth in range(len(chain) - 1, -1, -1) if users[chain[depth]]), None
        )
        if n_equal is None:
            turns.append(Turn(index, None, None))
        else:
            earlier = max(
                users[chain[n_equal]],
                key=lambda one: (_nearness(requests[one], request, n_equal), one),
            )
            turns.append(Turn(index, earlier, compare_requests(requests[earlier], request)))
        for number in chain:
            users[number].append(index)
    return turns


def _nearness(old: Request, new: Request, at: int) -> tuple[bool, int, bool]:
    """Return whether the tools are equal, how much of message `at` is, and whether it is new."""
    texts = [
        "".join(part.text for part in one.messages[at].parts) if at < len(one.messages) else ""
        for one in (old, new)
    ]
    return old.tools == new.tools, n_common(*texts), at == len(old.messages)
