"""Settings to paste, from the sizes at which the curves have nearly all of their hits."""

from __future__ import annotations

from collections.abc import Iterable

from tokcache.replay.result import Curve, Prefill, written_size

_MIN_RATE = 0.01  # below it a layer gets its default
_MIN_BYTES = {"L0": 1 << 20, "L1": 4 << 20, "states": 256 << 20}


def recommended(curve: Curve) -> str | None:
    """Return the size of a layer as its setting takes it; None if it has hardly any hits.

    A fifth is added: caches evict the oldest of eight, not of all.
    """
    if curve.unit != "bytes" or curve.unlimited < _MIN_RATE:
        return None
    return written_size(max(1.2 * curve.knee_size, _MIN_BYTES[curve.name]))


def configuration(curves: Iterable[Curve], prefill: Prefill, n_prompts: int) -> str:
    """Return Python and TOML with the recommended sizes."""
    sizes = {curve.name: recommended(curve) for curve in curves}
    lines = ["import tokcache", ""]
    text = [
        f'{name}_max_bytes="{sizes[layer]}"'
        for name, layer in (("l0", "L0"), ("l1", "L1"))
        if sizes.get(layer)
    ]
    if "L0" in sizes or "L1" in sizes:
        lines.append(f"config = tokcache.CacheConfig({', '.join(text)})")
    states = sizes.get("states")
    if states:
        n_entries = max(1000, min(n_prompts, 1_000_000))
        lines.append(
            f'states = tokcache.PrefixStateCache(ram_bytes="{states}", max_entries={n_entries:_})'
        )
        lines += ["", "# tokcache serve --config serve.toml", f'# max_bytes = "{states}"']
    elif "states" in sizes and not prefill.kv_bytes_per_token:
        lines.append("# states: give --model or --kv-bytes-per-token for their size in bytes")
    return "\n".join(lines)
