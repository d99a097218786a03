"""The served model: the size of its KV state and how to recognise it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokcache.errors import InvalidConfig

if TYPE_CHECKING:
    from tokcache.llama.server.results import ModelMeta, TokenProbabilities

# Bytes of one value. Source: block sizes in ggml-common.h (32 values and their scales).
KV_TYPES = {
    "f32": 4.0,
    "f16": 2.0,
    "bf16": 2.0,
    "q8_0": 34 / 32,
    "q5_1": 24 / 32,
    "q5_0": 22 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
    "iq4_nl": 18 / 32,
}
_N_PROBE_TOKENS, _N_PROBE_IDS = 64, 256
_PROBE_TOLERANCE = 0.05


@dataclass(frozen=True, slots=True)
class KvShape:
    """The sizes of a model's attention; `unknown` gives the reasons why a size is missing.

    Units: `n_kv_heads` heads of each layer (0: a layer without attention), `n_kv_dim` values per
    token in all layers, `window` tokens (0: none).
    """

    architecture: str = ""
    n_layers: int = 0
    n_heads: int = 0
    n_kv_heads: tuple[int, ...] = ()
    n_kv_dim: int = 0
    window: int = 0
    unknown: tuple[str, ...] = ()

    @property
    def memory(self) -> str:
        """Return "attention", "sliding window", "hybrid", "recurrent", or "" if unknown."""
        if not self.n_layers:
            return ""
        if not any(self.n_kv_heads):
            return "recurrent"
        if not all(self.n_kv_heads):
            return "hybrid"
        return "sliding window" if self.window else "attention"

    def kv_bytes_per_token(self, kv_type: str) -> float | None:
        """Return the bytes of one token in full attention, None if unknown."""
        return self.n_kv_dim * KV_TYPES[kv_type] if self.n_kv_dim else None


def require_kv_type(kv_type: str) -> str:
    """Return `kv_type`, or raise InvalidConfig."""
    if kv_type not in KV_TYPES:
        raise InvalidConfig(f"kv_type must be one of {', '.join(KV_TYPES)}, not {kv_type!r}")
    return kv_type


def kv_shape(model_path: str, meta: ModelMeta) -> KvShape:
    """Return the sizes in the model file, if it can be read and belongs to the served model.

    Cost: reads the metadata; a second for a vocabulary of 150,000 tokens.
    """
    path = Path(model_path)
    if not model_path or not path.is_file():
        return _unknown(f"the model file {model_path!r} can't be reached from here")
    try:
        import gguf  # noqa: PLC0415 (an extra)
    except ImportError:
        return _unknown("reading the model file needs gguf: pip install 'tokcache[demo]'")
    try:
        fields = gguf.GGUFReader(str(path)).fields
        found = {name: part.contents() for name, part in fields.items() if "tokenizer" not in name}
        return _read(found, meta)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        return _unknown(f"{model_path} can't be read as a GGUF: {error}")


def model_identity(model_path: str, meta: ModelMeta) -> tuple[Any, ...]:
    """Return a value that changes when another model replaces the served one.

    It includes ctime: a file can be overwritten in place and get its old mtime back.
    """
    try:
        stat = Path(model_path).stat() if model_path else None
    except (OSError, ValueError):
        stat = None
    if stat is None:
        return (model_path, meta)
    file = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return (model_path, meta, file)


def probe_tokens(n_vocab: int | None) -> list[int]:
    """Return a prompt that every model can decode, long enough for positions to matter."""
    n_ids = min(n_vocab or _N_PROBE_IDS, _N_PROBE_IDS)
    return [37 * position % n_ids for position in range(_N_PROBE_TOKENS)]


def is_same_model(one: TokenProbabilities | None, other: TokenProbabilities | None) -> bool:
    """Return whether one model gave both answers to the same prompt; False if one is missing.

    Probabilities may differ slightly: another batch or device changes their last bits.
    """
    if one is None or other is None:
        return False
    ours, theirs = (dict(zip(it.token_ids, it.logprobs, strict=True)) for it in (one, other))
    both = ours.keys() & theirs.keys()
    return 2 * len(both) > len(ours) and all(
        ours[token] == theirs[token] or abs(ours[token] - theirs[token]) <= _PROBE_TOLERANCE
        for token in both
    )


def _unknown(reason: str) -> KvShape:
    return KvShape(unknown=(reason,))


def _read(found: dict[str, Any], meta: ModelMeta) -> KvShape:
    architecture = str(found["general.architecture"])

    def figure(name: str, default: Any = None) -> Any:
        value = found.get(f"{architecture}.{name}", default)
        if value is None:
            raise KeyError(f"{architecture}.{name}")
        return value

    n_embd, n_layers = int(figure("embedding_length")), int(figure("block_count"))
    if meta.n_embd is not None and meta.n_embd != n_embd:
        return _unknown("the file at the server's model path is another model on this machine")
    n_heads = figure("attention.head_count", 0)
    n_heads = max(n_heads) if isinstance(n_heads, list) else int(n_heads)
    kv_heads = figure("attention.head_count_kv", n_heads)
    kv_heads = kv_heads if isinstance(kv_heads, list) else [kv_heads] * n_layers
    head_dim = n_embd // n_heads if n_heads else 0
    width = int(figure("attention.key_length", head_dim))
    width += int(figure("attention.value_length", head_dim))
    return KvShape(
        architecture=architecture,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=tuple(map(int, kv_heads)),
        n_kv_dim=sum(map(int, kv_heads)) * width,
        window=int(figure("attention.sliding_window", 0)),
    )
