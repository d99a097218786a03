"""Random-weight GGUF models and LoRA adapters for every kind of memory that llama.cpp has.

The output head is never tied to the embedding: a tied random model repeats its last token whatever
its state is, which would hide a wrong cache.

Source: the tensors that each architecture needs were found by experiment with llama.cpp.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tokcache._validate import require_int
from tokcache.errors import InvalidConfig, InvalidModel, MissingExtra, MissingFile
from tokcache.samples.files import cache_folder, digest, write_once
from tokcache.samples.tokenizer import tiny_tokenizer
from tokcache.samples.vocabulary import Vocabulary, read_vocabulary

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    Tensors = Iterator[tuple[str, NDArray[Any]]]

_CONV_KERNEL = 4
_SSM_HEADS = 4
_STATE_SIZE = 16
_TIME_STEP_RANK = 8
# softplus(-5) gives a time step of 0.007, so the state remembers about a thousand tokens, not ten.
_SLOW = -5.0
_SHORTCONV = 3
_WINDOW = 32
_RMS_EPSILON = 1e-5


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a model."""

    n_vocab: int
    n_layers: int
    n_embd: int
    n_heads: int
    n_kv_heads: int
    n_ff: int
    n_ctx_train: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            require_int(name, value, minimum=1)
        if self.n_embd % self.n_heads or self.n_heads % self.n_kv_heads:
            raise InvalidConfig(
                f"n_embd ({self.n_embd}) must be a multiple of n_heads ({self.n_heads}),"
                f" and n_heads a multiple of n_kv_heads ({self.n_kv_heads})"
            )

    @property
    def n_head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_heads


@dataclass(frozen=True, slots=True)
class Draw:
    """Random weights, drawn from one stream per model: the same seed gives the same bytes."""

    rng: np.random.Generator
    shape: Shape

    def matrix(self, n_out: int, n_in: int, gain: float = 1.5) -> NDArray[np.float16]:
        """Return f16[n_out, n_in] drawn from N(0, gain / sqrt(n_in))."""
        drawn = self.rng.standard_normal((n_out, n_in), dtype=np.float32)
        return (drawn * np.float32(gain / math.sqrt(n_in))).astype(np.float16)

    def float_matrix(self, n_out: int, n_in: int) -> NDArray[np.float32]:
        """Return f32[n_out, n_in], for convolutions and state-space weights, which are not f16."""
        return self.matrix(n_out, n_in).astype(np.float32)


def _ones(size: int) -> NDArray[np.float32]:
    return np.ones(size, np.float32)


def _attention(draw: Draw, block: str, _layer: int) -> Tensors:
    shape = draw.shape
    n_kv = shape.n_kv_heads * shape.n_head_dim
    yield f"{block}.attn_q.weight", draw.matrix(shape.n_embd, shape.n_embd)
    yield f"{block}.attn_k.weight", draw.matrix(n_kv, shape.n_embd)
    yield f"{block}.attn_v.weight", draw.matrix(n_kv, shape.n_embd)
    yield f"{block}.attn_output.weight", draw.matrix(shape.n_embd, shape.n_embd)


def _attention_norms(draw: Draw, block: str, _layer: int) -> Tensors:
    yield f"{block}.attn_q_norm.weight", _ones(draw.shape.n_head_dim)
    yield f"{block}.attn_k_norm.weight", _ones(draw.shape.n_head_dim)


def _feed_forward(draw: Draw, block: str, _layer: int) -> Tensors:
    shape = draw.shape
    yield f"{block}.ffn_norm.weight", _ones(shape.n_embd)
    yield f"{block}.ffn_gate.weight", draw.matrix(shape.n_ff, shape.n_embd)
    yield f"{block}.ffn_up.weight", draw.matrix(shape.n_ff, shape.n_embd)
    yield f"{block}.ffn_down.weight", draw.matrix(shape.n_embd, shape.n_ff)


def _attention_biases(draw: Draw, block: str, _layer: int) -> Tensors:
    shape = draw.shape
    yield f"{block}.attn_q.bias", np.zeros(shape.n_embd, np.float32)
    for name in ("k", "v"):
        n_kv = shape.n_kv_heads * shape.n_head_dim
        yield f"{block}.attn_{name}.bias", np.zeros(n_kv, np.float32)


def _gemma3_norms(draw: Draw, block: str, _layer: int) -> Tensors:
    yield f"{block}.post_attention_norm.weight", _ones(draw.shape.n_embd)
    yield f"{block}.post_ffw_norm.weight", _ones(draw.shape.n_embd)


def _mamba_mixer(draw: Draw, block: str, _layer: int) -> Tensors:
    n_embd = draw.shape.n_embd
    inner = 2 * n_embd
    yield f"{block}.ssm_in.weight", draw.matrix(2 * inner, n_embd)
    yield f"{block}.ssm_conv1d.weight", draw.float_matrix(inner, _CONV_KERNEL)
    yield f"{block}.ssm_conv1d.bias", np.zeros(inner, np.float32)
    yield f"{block}.ssm_x.weight", draw.matrix(_TIME_STEP_RANK + 2 * _STATE_SIZE, inner)
    yield f"{block}.ssm_dt.weight", draw.float_matrix(inner, _TIME_STEP_RANK)
    yield f"{block}.ssm_dt.bias", np.full(inner, _SLOW, np.float32)
    # Negative, because otherwise the state grows without bound.
    decay = np.arange(1, _STATE_SIZE + 1, dtype=np.float32) / _STATE_SIZE
    yield f"{block}.ssm_a", -np.tile(decay, (inner, 1))
    yield f"{block}.ssm_d", _ones(inner)
    yield f"{block}.ssm_out.weight", draw.matrix(n_embd, inner)


def _mamba2_mixer(draw: Draw, block: str, _layer: int) -> Tensors:
    n_embd = draw.shape.n_embd
    inner = 2 * n_embd
    mixed = inner + 2 * _STATE_SIZE
    yield f"{block}.ssm_in.weight", draw.matrix(inner + mixed + _SSM_HEADS, n_embd)
    yield f"{block}.ssm_conv1d.weight", draw.float_matrix(mixed, _CONV_KERNEL)
    yield f"{block}.ssm_conv1d.bias", np.zeros(mixed, np.float32)
    yield f"{block}.ssm_dt.bias", np.full(_SSM_HEADS, _SLOW, np.float32)
    decay = np.arange(1, _SSM_HEADS + 1, dtype=np.float32) / _SSM_HEADS
    yield f"{block}.ssm_a", -decay[:, None]
    yield f"{block}.ssm_d", np.ones((_SSM_HEADS, 1), np.float32)
    yield f"{block}.ssm_norm.weight", np.ones((1, inner), np.float32)
    yield f"{block}.ssm_out.weight", draw.matrix(n_embd, inner)


def _granite_mixer(draw: Draw, block: str, layer: int) -> Tensors:
    return (_attention if _has_attention(layer) else _mamba2_mixer)(draw, block, layer)


def _falcon_feed_forward(draw: Draw, block: str, layer: int) -> Tensors:
    for name, tensor in _feed_forward(draw, block, layer):
        yield name.replace("ffn_norm.weight", "ffn_norm"), tensor


def _lfm2_mixer(draw: Draw, block: str, layer: int) -> Tensors:
    n_embd = draw.shape.n_embd
    if _has_attention(layer):
        yield from _attention(draw, block, layer)
        yield from _attention_norms(draw, block, layer)
    else:
        yield f"{block}.shortconv.conv.weight", draw.float_matrix(n_embd, _SHORTCONV)
        yield f"{block}.shortconv.in_proj.weight", draw.matrix(3 * n_embd, n_embd)
        yield f"{block}.shortconv.out_proj.weight", draw.matrix(n_embd, n_embd)


def _has_attention(layer: int) -> bool:
    return layer % 2 == 1


def _attention_keys(writer: Any, shape: Shape) -> None:
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_kv_heads)


def _rope_keys(writer: Any, shape: Shape) -> None:
    n_pairs = shape.n_head_dim // 2  # rotary pairs, divided among time, height and width
    n_time = n_pairs - 2 * (n_pairs // 3)
    writer.add_rope_dimension_sections([n_time, n_pairs // 3, n_pairs // 3, 0])


def _window_keys(writer: Any, _shape: Shape) -> None:
    writer.add_sliding_window(_WINDOW)


def _window_pattern_keys(writer: Any, _shape: Shape) -> None:
    writer.add_sliding_window_pattern(2)


def _no_attention_keys(writer: Any, _shape: Shape) -> None:
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)


def _mamba_keys(writer: Any, shape: Shape) -> None:
    writer.add_ssm_conv_kernel(_CONV_KERNEL)
    writer.add_ssm_inner_size(2 * shape.n_embd)
    writer.add_ssm_state_size(_STATE_SIZE)
    writer.add_ssm_time_step_rank(_TIME_STEP_RANK)


def _mamba2_keys(writer: Any, shape: Shape) -> None:
    writer.add_ssm_conv_kernel(_CONV_KERNEL)
    writer.add_ssm_inner_size(2 * shape.n_embd)
    writer.add_ssm_state_size(_STATE_SIZE)
    writer.add_ssm_time_step_rank(_SSM_HEADS)
    writer.add_ssm_group_count(1)


def _hybrid_keys(writer: Any, shape: Shape) -> None:
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_heads)
    heads = [shape.n_kv_heads * _has_attention(layer) for layer in range(shape.n_layers)]
    writer.add_head_count_kv(heads)


def _shortconv_keys(writer: Any, _shape: Shape) -> None:
    writer.add_shortconv_l_cache(_SHORTCONV)


@dataclass(frozen=True, slots=True)
class Architecture:
    """The metadata and tensors that one llama.cpp architecture needs besides the common ones.

    `keys` write metadata, `block` makes the tensors of one layer; each is a list of parts.
    """

    memory: str
    keys: tuple[Callable[[Any, Shape], None], ...]
    block: tuple[Callable[[Draw, str, int], Tensors], ...]
    output_norm: str = "output_norm.weight"
    # Small enough that the last token does not outweigh the state.
    embedding_gain: float = 1.5
    llama_cpp: str = ""  # llama.cpp's name for it, if it differs from ours


ARCHITECTURES = {
    "llama": Architecture("attention", (_attention_keys,), (_attention, _feed_forward)),
    # A token has several positions (time, height, width); for text they are equal.
    "qwen2vl": Architecture(
        "attention",
        (_attention_keys, _rope_keys),
        (_attention, _attention_biases, _feed_forward),
    ),
    "gemma3": Architecture(
        "sliding window",
        (_attention_keys, _window_keys, _window_pattern_keys),
        (_attention, _attention_norms, _gemma3_norms, _feed_forward),
        embedding_gain=0.25,  # gemma3 itself multiplies the embedding by sqrt(n_embd)
    ),
    "mamba": Architecture("recurrent", (_no_attention_keys, _mamba_keys), (_mamba_mixer,)),
    "mamba2": Architecture("recurrent", (_no_attention_keys, _mamba2_keys), (_mamba2_mixer,)),
    "lfm2": Architecture(
        "hybrid",
        (_hybrid_keys, _shortconv_keys),
        (_lfm2_mixer, _feed_forward),
        output_norm="token_embd_norm.weight",
    ),
    "granitehybrid": Architecture(
        "hybrid", (_hybrid_keys, _mamba2_keys), (_granite_mixer, _feed_forward)
    ),
    "falcon-h1": Architecture(
        "hybrid",
        (_attention_keys, _mamba2_keys),
        (_attention, _mamba2_mixer, _falcon_feed_forward),
    ),
    "lfm2-windowed": Architecture(
        "hybrid with a window",
        (_hybrid_keys, _shortconv_keys, _window_keys),
        (_lfm2_mixer, _feed_forward),
        output_norm="token_embd_norm.weight",
        llama_cpp="lfm2",
    ),
}


def tiny_model(
    tokenizer_json: str | os.PathLike[str] | None = None,
    *,
    seed: int = 0,
    n_layers: int = 4,
    n_embd: int = 128,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    n_ff: int = 256,
    n_ctx_train: int = 8192,
    architecture: str = "llama",
    folder: str | os.PathLike[str] | None = None,
) -> Path:
    """Return the path of a random-weight GGUF for a tokenizer (by default `tiny_tokenizer`).

    Errors: MissingExtra without gguf; InvalidConfig; UnsupportedTokenizer; MissingFile.
    Cost:   a second and a few MB at the default sizes; each set of arguments is made once.
    """
    if architecture not in ARCHITECTURES:
        raise InvalidConfig(
            f"architecture must be one of {', '.join(ARCHITECTURES)}, not {architecture!r}"
        )
    require_int("seed", seed, minimum=0)
    source = Path(tokenizer_json) if tokenizer_json is not None else tiny_tokenizer(folder)
    vocabulary = read_vocabulary(source)
    sizes = (n_layers, n_embd, n_heads, n_kv_heads, n_ff, n_ctx_train)
    shape = Shape(len(vocabulary.tokens), *sizes)
    _gguf()  # report a missing extra before creating any folder
    name = f"tiny-{architecture}-{digest(vocabulary, shape, architecture, seed)}.gguf"
    return write_once(
        cache_folder(folder) / name,
        lambda path: _write_model(path, architecture, vocabulary, shape, seed),
    )


def tiny_lora(
    model: str | os.PathLike[str],
    *,
    seed: int = 1,
    rank: int = 4,
    scale: float = 1.0,
    folder: str | os.PathLike[str] | None = None,
) -> Path:
    """Return the path of a random LoRA adapter (GGUF) for a model that `tiny_model` made.

    `scale` multiplies the weights; at 1.0 the adapter contributes as much as the matrix itself.

    Errors: MissingExtra without gguf; MissingFile; InvalidModel for a file that is not a GGUF with
            attention in its first layer.
    """
    require_int("seed", seed, minimum=0)
    require_int("rank", rank, minimum=1)
    gguf = _gguf()
    base = Path(model)
    if not base.exists():
        raise MissingFile(f"no such file: {base}")
    try:
        reader = gguf.GGUFReader(str(base))
        architecture = reader.fields["general.architecture"].contents()
        n_layers = int(reader.fields[f"{architecture}.block_count"].contents())
        query = next(part for part in reader.tensors if part.name == "blk.0.attn_q.weight")
    except (ValueError, KeyError, IndexError, StopIteration) as error:
        raise InvalidModel(
            f"{base} is not a GGUF with attention in its first layer; pass a model of tiny_model"
        ) from error
    n_in, n_out = (int(size) for size in query.shape)
    name = f"tiny-lora-{digest(base.name, seed, rank, scale, n_layers, n_out, n_in)}.gguf"

    def write(path: Path) -> None:
        writer = gguf.GGUFWriter(str(path), architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
        rng = np.random.default_rng(seed)
        for layer in range(n_layers):
            part = f"blk.{layer}.attn_q.weight"
            low = rng.standard_normal((rank, n_in), dtype=np.float32) / math.sqrt(n_in)
            high = rng.standard_normal((n_out, rank), dtype=np.float32) / math.sqrt(rank)
            writer.add_tensor(f"{part}.lora_a", low.astype(np.float32))
            writer.add_tensor(f"{part}.lora_b", (high * 1.5 * scale).astype(np.float32))
        _finish(writer)

    return write_once(cache_folder(folder) / name, write)


def _gguf() -> Any:
    try:
        import gguf  # noqa: PLC0415 (an extra)
    except ImportError:
        raise MissingExtra(
            "making a tiny model needs the gguf package: pip install 'tokcache[demo]'"
        ) from None
    return gguf


def _write_model(
    path: Path, architecture: str, vocabulary: Vocabulary, shape: Shape, seed: int
) -> None:
    gguf, recipe = _gguf(), ARCHITECTURES[architecture]
    writer = gguf.GGUFWriter(str(path), recipe.llama_cpp or architecture)
    writer.add_name(f"tokcache tiny {architecture}, random weights, seed {seed}")
    writer.add_context_length(shape.n_ctx_train)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layers)
    writer.add_layer_norm_rms_eps(_RMS_EPSILON)
    writer.add_vocab_size(shape.n_vocab)
    for add in recipe.keys:
        add(writer, shape)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)

    writer.add_tokenizer_model(vocabulary.model)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    optional = (
        (vocabulary.pre, writer.add_tokenizer_pre),
        (vocabulary.scores, writer.add_token_scores),
        (vocabulary.merges, writer.add_token_merges),
        (vocabulary.charsmap, writer.add_precompiled_charsmap),
        (vocabulary.chat_template, writer.add_chat_template),
    )
    for value, add_value in optional:
        if value:
            add_value(value)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
    writer.add_remove_extra_whitespaces(vocabulary.remove_extra_whitespaces)
    for kind, number in vocabulary.special_ids.items():
        getattr(writer, f"add_{kind}_token_id")(number)

    # The order of the tensors is that of the draws: another order would be another model.
    draw = Draw(np.random.default_rng(seed), shape)
    embedding = draw.matrix(shape.n_vocab, shape.n_embd, recipe.embedding_gain)
    writer.add_tensor("token_embd.weight", embedding)
    for layer in range(shape.n_layers):
        block = f"blk.{layer}"
        writer.add_tensor(f"{block}.attn_norm.weight", _ones(shape.n_embd))
        for part in recipe.block:
            for name, tensor in part(draw, block, layer):
                writer.add_tensor(name, tensor)
    writer.add_tensor(recipe.output_norm, _ones(shape.n_embd))
    writer.add_tensor("output.weight", draw.matrix(shape.n_vocab, shape.n_embd))
    _finish(writer)


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
