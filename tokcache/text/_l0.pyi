from collections.abc import Iterable
from typing import Any, final

from tokcache.stats import L0Stats
from tokcache.text.token_ids import TokenIds

has_quick_calls: bool

@final
class L0Cache:
    max_entries: int
    max_bytes: int
    sample_size: int
    _n_clears: int

    def __new__(
        cls, *, max_entries: int = 10_000, max_bytes: int | str = "64M", sample_size: int = 8
    ) -> L0Cache: ...
    def __init__(
        self, *, max_entries: int = 10_000, max_bytes: int | str = "64M", sample_size: int = 8
    ) -> None: ...
    def get(
        self, text: str, *, add_special_tokens: bool = True, scope: str | None = None
    ) -> TokenIds | None: ...
    def _get(self, text: str, add_special_tokens: bool, scope: str | None) -> TokenIds | None: ...
    def _get_again(
        self, text: str, add_special_tokens: bool, scope: str | None
    ) -> TokenIds | None: ...
    def put(
        self,
        text: str,
        ids: Iterable[int],
        *,
        add_special_tokens: bool = True,
        scope: str | None = None,
    ) -> bool: ...
    def _put(
        self,
        text: str,
        add_special_tokens: bool,
        ids: TokenIds,
        scope: str | None,
        since: int,
    ) -> bool: ...
    def held(self) -> list[tuple[str, bool, TokenIds, str | None]]: ...
    def fill(self, rows: Iterable[tuple[str, bool, TokenIds, str | None]]) -> tuple[int, int]: ...
    def clear(self, *, scope: str | None = None) -> None: ...
    def __len__(self) -> int: ...
    def __bool__(self) -> bool: ...
    def memory_usage(self) -> int: ...
    def stats(self) -> L0Stats: ...
    def _check(self) -> None: ...

def token_ids(
    self: Any, text: str, *, add_special_tokens: bool = True, scope: str | None = None
) -> TokenIds: ...
