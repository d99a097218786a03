"""tau-bench: dialogues of an agent, a user and tools; each message of the agent is a request."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tokcache.errors import Malformed
from tokcache.replay.traces.chats import conversation, messages_of

if TYPE_CHECKING:
    from tokcache.replay.traces.request import Request

name = "tau-bench"
about = "the trajectories of tau-bench"


def matches(value: Any) -> bool:
    """Return whether a record has a trajectory of messages."""
    return isinstance(value, dict) and messages_of(value.get("traj")) is not None


def requests(value: Any) -> Iterable[Request]:
    """Return a request for each message of the agent."""
    if not matches(value):
        raise Malformed("it has no traj with messages")
    return conversation(value["traj"]).requests()
