"""Scopes of requests: which tenant a thread works for, and iterators that keep to it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tokcache._validate import require_scope
from tokcache.llama.tokenizer import OWN_SCOPE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType


class RequestScopes:
    """The scope of the request that each thread works for; without one, the object's own.

    Threads: safe; each has its own.
    """

    def __init__(self, own: str | None) -> None:
        self.own = own
        self._thread = threading.local()

    def current(self) -> str | None:
        """Return the scope that the calling thread works for."""
        scope: str | None = getattr(self._thread, "scope", self.own)
        return scope

    def of(self, scope: str | None) -> str | None:
        """Return the scope that `scope=` means in a call; OWN_SCOPE is the thread's.

        Errors: InvalidScope.
        """
        return self.current() if scope is OWN_SCOPE else require_scope(scope)

    @contextmanager
    def serving(self, scope: str | None) -> Iterator[None]:
        """Work, in this thread, for a request of `scope`; OWN_SCOPE changes nothing."""
        thread, before = self._thread, self.current()
        thread.scope = self.of(scope)
        try:
            yield
        finally:
            thread.scope = before


class ScopedItems(Generator[Any, Any, Any]):
    """The iterator that a chat handler returned: each of its steps works for one scope.

    A handler's generator may ask for its completion only when it is read.
    """

    def __init__(self, items: Any, scopes: RequestScopes, scope: str | None) -> None:
        self._items, self._scopes, self._scope = items, scopes, scope

    def send(self, value: Any) -> Any:
        """Return the next item."""
        return self._advance(lambda items: next(items) if value is None else items.send(value))

    def throw(self, typ: Any, val: object = None, tb: TracebackType | None = None) -> Any:
        """Raise an error in the handler's generator and return its next item."""
        raised = [typ] if val is None and tb is None else [typ, val, tb]
        del typ, val, tb  # the error's traceback refers to this frame
        try:
            return self._advance(lambda items: items.throw(*raised))
        finally:
            raised.clear()

    def _advance(self, advance: Callable[[Any], Any]) -> Any:
        with self._scopes.serving(self._scope):
            return advance(self._items)

    def close(self) -> None:
        """End the generation."""
        if hasattr(self._items, "close"):
            self._items.close()
