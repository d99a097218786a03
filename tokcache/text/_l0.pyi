from collections.abc import Iterable
from typing import final

from tokcache.stats import L0Stats
from tokcache.text.token_ids import TokenIds

@final
class L0Cache:
    max_entries: int
    max_bytes: int
    sample_size: int

    def __new__(
        cls, max_entries: int = 10_000, max_bytes: int = 67_108_864, sample_size: int = 8
    ) -> L0Cache: ...
    def __init__(
        self, max_entries: int = 10_000, max_bytes: int = 67_108_864, sample_size: int = 8
    ) -> None: ...
    def get(
        self, text: str, add_special_tokens: bool, scope: str | None = None
    ) -> TokenIds | None: ...
    def put(
        self,
        text: str,
        add_special_tokens: bool,
        ids: Iterable[int],
        scope: str | None = None,
    ) -> bool: ...
    def clear(self) -> None: ...
    def __len__(self) -> int: ...
    def memory_usage(self) -> int: ...
    def stats(self) -> L0Stats: ...
    def _check(self) -> None: ...
