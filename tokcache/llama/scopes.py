"""Scopes of requests: which tenant a thread works for, and iterators that keep to it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from tokcache._validate import require_scope
from tokcache.llama.tokenizer import OWN_SCOPE

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
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

    def serving(self, scope: str | None) -> AbstractContextManager[None]:
        """Work, in this thread, for a request of `scope`; OWN_SCOPE changes nothing."""
        return _Serving(self, scope)

    def work_for(self, scope: str | None) -> str | None:
        """Work, in this thread, for `scope` from now on; return the scope before.

        Errors: InvalidScope.
        """
        before = self.current()
        self._thread.scope = self.of(scope)
        return before


class _Serving:
    """A class, because entering a generator's context takes several times as long."""

    __slots__ = ("_before", "_scope", "_scopes")

    def __init__(self, scopes: RequestScopes, scope: str | None) -> None:
        self._scopes, self._scope = scopes, scope

    def __enter__(self) -> None:
        self._before = self._scopes.work_for(self._scope)

    def __exit__(self, *_error: object) -> None:
        self._scopes.work_for(self._before)


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
