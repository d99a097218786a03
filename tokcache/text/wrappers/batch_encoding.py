"""What a transformers call returns, made from token ids: truncated, padded, with masks, as arrays.

`read` says what a call asks for, or why ids can't answer it; `make_rows` and `make_fields` make
it. tests/text/test_wrap_matrix.py compares it with what the plain tokenizer makes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any

from tokcache.errors import NotFromIds
from tokcache.text.engines.layout import Run
from tokcache.text.token_ids import TokenIds

if TYPE_CHECKING:
    from tokcache.text.engines.copying import Engine
    from tokcache.text.engines.layout import Layout, Segment, Segments

_SIDES = ("left", "right")
_FLAGS = (None, True, False)

# What a call may say beside its texts, truncation and padding, and still be answered from ids.
_ANSWERED: dict[str, tuple[object, ...]] = {
    "add_special_tokens": (True, False),
    "stride": (0,),
    "is_split_into_words": (False,),
    "return_overflowing_tokens": (False,),
    "return_offsets_mapping": (False,),
    "sanitize_control_tokens": (False,),
    "verbose": _FLAGS,
    "return_token_type_ids": _FLAGS,
    "return_attention_mask": _FLAGS,
    "return_special_tokens_mask": _FLAGS,
    "return_length": _FLAGS,
}


@dataclass(frozen=True, slots=True)
class Truncation:
    """Leave at most `max_length` tokens of a row: of its texts and what is put around them."""

    max_length: int
    strategy: str
    side: str

    def lengths(self, layout: Layout, lengths: Sequence[int]) -> Sequence[int] | None:
        """Return how many tokens of each text stay; None where tokenizers refuses."""
        room = self.max_length - layout.n_special
        n_over = sum(lengths) - room
        if room <= 0:
            return None
        if n_over <= 0:
            return lengths
        if self.strategy == "longest_first":
            return (room,) if len(lengths) == 1 else _both(lengths[0], lengths[1], room)
        place = 0 if self.strategy == "only_first" else 1
        if place >= len(lengths) or lengths[place] <= n_over:
            return None
        left = list(lengths)
        left[place] -= n_over
        return left

    def cut(self, ids: TokenIds, length: int) -> TokenIds:
        """Return what stays of the ids of one text."""
        return ids[:length] if self.side == "right" else ids[len(ids) - length :]

    def for_tokenizers(self) -> dict[str, Any]:
        """Return the arguments of `enable_truncation`."""
        return {
            "max_length": self.max_length,
            "stride": 0,
            "strategy": self.strategy,
            "direction": self.side,
        }


def _both(first: int, second: int, room: int) -> tuple[int, int]:
    """Return the lengths of two texts that are too long together: the longer one gives first."""
    short, long = sorted((first, second))
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short, long = room // 2, room // 2 + room % 2
    return (long, short) if first > second else (short, long)


@dataclass(frozen=True, slots=True)
class Padding:
    """Fill up to `length`, or to the longest row of a batch (None), and to a multiple."""

    length: int | None
    multiple_of: int | None
    side: str
    token: str
    token_id: int
    type_id: int

    def width(self, n_longest: int) -> int:
        """Return the length that shorter rows are filled up to."""
        width = n_longest if self.length is None else self.length
        multiple_of = self.multiple_of or 1
        return -(-width // multiple_of) * multiple_of

    def for_tokenizers(self) -> dict[str, Any]:
        """Return the arguments of `enable_padding`."""
        return {
            "length": self.length,
            "direction": self.side,
            "pad_id": self.token_id,
            "pad_token": self.token,
            "pad_type_id": self.type_id,
            "pad_to_multiple_of": self.multiple_of,
        }


@dataclass(frozen=True, slots=True)
class Asked:
    """What a call asks for.

    `texts` are the first texts of all rows, and the second ones if rows have two; `is_batch` says
    that the answer is a list of rows; `flags` are the fields asked for or declined by name.
    """

    texts: tuple[Sequence[str], ...]
    is_batch: bool
    add_special_tokens: bool
    truncation: Truncation | None
    padding: Padding | None
    max_length: int | None
    tensors: Any
    flags: dict[str, Any]

    @property
    def settings(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Return the truncation and the padding that the tokenizer itself would be set to."""
        return (
            None if self.truncation is None else self.truncation.for_tokenizers(),
            None if self.padding is None else self.padding.for_tokenizers(),
        )

    @property
    def inputs(self) -> list[Any]:
        """Return what the tokenizer itself would be given."""
        return list(self.texts[0] if len(self.texts) == 1 else zip(*self.texts, strict=True))


def read(wrapper: Any, asked: dict[str, Any]) -> Asked | str:
    """Return what the arguments of `_encode_plus` ask for, or why ids can't answer it."""
    try:
        return _read(wrapper, dict(asked))
    except NotFromIds as reason:
        return str(reason)


def _read(wrapper: Any, asked: dict[str, Any]) -> Asked:
    text, pair = asked.pop("text", None), asked.pop("text_pair", None)
    splits = asked.pop("split_special_tokens", None)
    if not (splits is None or splits is wrapper.split_special_tokens):
        raise NotFromIds("split_special_tokens")
    max_length, tensors = asked.pop("max_length", None), asked.pop("return_tensors", None)
    truncation = _truncation(wrapper, asked, max_length)
    padding = _padding(wrapper, asked, max_length)
    for name, value in asked.items():
        # By identity: 0 is no False to transformers.
        if not any(value is one for one in _ANSWERED.get(name, ())):
            raise NotFromIds(name if name in _ANSWERED else "other_argument")
    return Asked(
        texts=_texts(text, pair),
        is_batch=not isinstance(text, str),
        add_special_tokens=asked.get("add_special_tokens", True),
        truncation=truncation,
        padding=padding,
        max_length=max_length,
        tensors=tensors,
        flags=asked,
    )


def _texts(text: Any, pair: Any) -> tuple[Sequence[str], ...]:
    if isinstance(text, str):
        if pair is None or (isinstance(pair, str) and not pair):  # "" is no second text to it
            return ([text],)
        if isinstance(pair, str):
            return [text], [pair]
    elif isinstance(text, list | tuple) and text:
        if pair is None:
            return (text,) if _are_texts(text) else _pairs(text)
        is_even = isinstance(pair, list | tuple) and len(pair) == len(text)
        if is_even and _are_texts(text) and _are_texts(pair):
            return text, pair
    raise NotFromIds("input_type")


def _pairs(rows: Sequence[Any]) -> tuple[Sequence[str], ...]:
    if all(isinstance(row, tuple) and len(row) == 2 and _are_texts(row) for row in rows):  # noqa: PLR2004 (a pair)
        return tuple(zip(*rows, strict=True))
    raise NotFromIds("input_type")


def _are_texts(values: Sequence[Any]) -> bool:
    return all(isinstance(one, str) for one in values)


def _strategy(asked: dict[str, Any], name: str) -> str:
    value = asked.pop(name, "do_not")
    return str(getattr(value, "value", value))


def _truncation(wrapper: Any, asked: dict[str, Any], max_length: Any) -> Truncation | None:
    strategy, side = _strategy(asked, "truncation_strategy"), wrapper.truncation_side
    if strategy.startswith("do_not"):
        return None
    if type(max_length) is not int or side not in _SIDES:
        raise NotFromIds("truncation")
    return Truncation(max_length, strategy, side)


def _padding(wrapper: Any, asked: dict[str, Any], max_length: Any) -> Padding | None:
    strategy = _strategy(asked, "padding_strategy")
    multiple, side = asked.pop("pad_to_multiple_of", None), asked.pop("padding_side", None)
    if strategy.startswith("do_not"):
        return None
    side = wrapper.padding_side if side is None else side
    length = max_length if strategy == "max_length" else None
    token, token_id, type_id = wrapper.pad_token, wrapper.pad_token_id, wrapper.pad_token_type_id
    numbers = [one for one in (length, multiple) if one is not None]
    is_plain = all(type(one) is int and one > 0 for one in numbers)
    if side not in _SIDES or not is_plain or type(token_id) is not int or type(type_id) is not int:
        raise NotFromIds("padding")
    return Padding(length, multiple, side, str(token), token_id, type_id)


# ---- rows


@dataclass(frozen=True, slots=True)
class Row:
    """The ids of one row before padding, and how many of them each of its texts has."""

    segments: Segments
    lengths: Sequence[int]

    def __len__(self) -> int:
        return sum(map(len, self.segments))


def make_rows(asked: Asked, layout: Layout, found: Sequence[TokenIds]) -> list[Row] | None:
    """Return the rows of an answer; None where tokenizers can't truncate as asked.

    `found` are the ids of whole rows, or, where a row has two texts, of the first ones alone and
    then of the second ones.
    """
    if len(asked.texts) == 1:
        rows = [_one_text(asked.truncation, layout, ids) for ids in found]
    else:
        n_rows = len(asked.texts[0])
        pairs = zip(found[:n_rows], found[n_rows:], strict=True)
        rows = [_of_texts(asked.truncation, layout, pair) for pair in pairs]
    return [row for row in rows if row is not None] if None not in rows else None


def _one_text(truncation: Truncation | None, layout: Layout, ids: TokenIds) -> Row | None:
    n_tokens = len(ids) - layout.n_special
    if truncation is None or truncation.max_length >= len(ids) > layout.n_special:
        return Row([ids], (n_tokens,))
    content = ids[layout.n_before : layout.n_before + n_tokens]
    return _of_texts(truncation, layout, (content,))


def _of_texts(
    truncation: Truncation | None, layout: Layout, texts: Sequence[TokenIds]
) -> Row | None:
    lengths: Sequence[int] | None = [len(ids) for ids in texts]
    if truncation is not None and lengths is not None:
        lengths = truncation.lengths(layout, lengths)
        if lengths is None:
            return None
        texts = [truncation.cut(ids, n) for ids, n in zip(texts, lengths, strict=True)]
    return Row(layout.segments(texts), lengths or ())


# ---- fields


def make_fields(
    asked: Asked, layout: Layout, rows: Sequence[Row], names: Sequence[str]
) -> dict[str, Any]:
    """Return the fields of an answer, in the order of transformers: lists, or arrays if asked.

    `names` are the fields that this tokenizer gives when nothing is said.
    Shapes: [n_rows, n_tokens]; int64 arrays where all rows are equally long, else lists.
    """
    longest = max(map(len, rows))
    width = 0 if asked.padding is None else asked.padding.width(longest)
    is_even = width >= longest or all(len(row) == longest for row in rows)
    is_left = asked.padding is not None and asked.padding.side == "left"
    data: dict[str, Any] = {}
    for name, lines, filler in _fields(asked, layout, rows, names):
        filled = [_filled(line, Run(filler, width - _size(line)), is_left) for line in lines]
        as_arrays = asked.tensors is not None and is_even
        data[name] = (
            _as_array(filled, max(width, longest))
            if as_arrays
            else [_as_list(line) for line in filled]
        )
    if asked.flags.get("return_length"):
        data["length"] = [len(ids) for ids in data["input_ids"]]
    return data


def _fields(
    asked: Asked, layout: Layout, rows: Sequence[Row], names: Sequence[str]
) -> Iterator[tuple[str, Sequence[Segments], int]]:
    """Yield name, rows and the value that fills rows up."""
    padding = asked.padding
    yield "input_ids", [row.segments for row in rows], padding.token_id if padding else 0
    if _is_wanted("token_type_ids", asked.flags, names):
        types = [layout.type_ids(row.lengths) for row in rows]
        yield "token_type_ids", types, padding.type_id if padding else 0
    if _is_wanted("attention_mask", asked.flags, names):
        yield "attention_mask", [[Run(1, len(row))] for row in rows], 0
    if asked.flags.get("return_special_tokens_mask"):
        yield "special_tokens_mask", [layout.special_tokens_mask(row.lengths) for row in rows], 1


def _is_wanted(name: str, flags: dict[str, Any], names: Sequence[str]) -> bool:
    flag = flags.get(f"return_{name}")
    return name in names if flag is None else bool(flag)


def _size(line: Segments) -> int:
    return sum(map(len, line))


def _filled(line: Segments, filling: Run, is_left: bool) -> Segments:
    if filling.n_times <= 0:
        return line
    return [filling, *line] if is_left else [*line, filling]


def _as_list(line: Segments) -> list[int]:
    parts = [_plain(segment) for segment in line]
    return parts[0] if len(parts) == 1 else list(chain.from_iterable(parts))


def _plain(segment: Segment) -> list[int]:
    if isinstance(segment, TokenIds):
        return segment.tolist()
    return [segment.value] * segment.n_times if isinstance(segment, Run) else list(segment)


def _filling(segment: Segment) -> Any:
    if isinstance(segment, TokenIds):
        return segment.numpy()
    return segment.value if isinstance(segment, Run) else segment


def _as_array(lines: Sequence[Segments], width: int) -> Any:
    import numpy as np  # noqa: PLC0415 (60 ms of `import tokcache`)

    array = np.empty((len(lines), width), np.int64)
    for row, line in zip(array, lines, strict=True):
        start = 0
        for segment in line:
            stop = start + len(segment)
            row[start:stop] = _filling(segment)
            start = stop
    return array


# ---- answers


def ids_alone(_wrapper: Any, ids: list[int], *_rest: Any) -> list[int]:
    """Return the ids and nothing else, as `encode` does."""
    return ids


def batch_encoding(
    wrapper: Any, ids: list[int], engine: Engine, text: str, add_special_tokens: bool
) -> Any:
    """Return what a call with nothing but a text gives; None if type ids are not to be had."""
    names = wrapper.model_input_names
    data: dict[str, Any] = {"input_ids": ids}
    if "token_type_ids" in names:
        layout = engine.layout(1, add_special_tokens)
        if layout is None or not layout.is_type_zero:
            return None
        data["token_type_ids"] = [0] * len(ids)
    if "attention_mask" in names:
        data["attention_mask"] = [1] * len(ids)
    return _lazy_batch_encoding().make(data, 1, engine, [text], add_special_tokens, None, None)


def shaped(asked: Asked, engine: Engine, data: dict[str, Any]) -> Any:
    """Return the fields of a call, as tensors or as one row where it asked for that."""
    if asked.tensors is None and not asked.is_batch:
        data = {name: rows[0] if isinstance(rows[0], list) else rows for name, rows in data.items()}
    made = _lazy_batch_encoding().make(
        data, len(asked.texts), engine, asked.inputs, asked.add_special_tokens, *asked.settings
    )
    return made.convert_to_tensors(asked.tensors)


@cache
def _lazy_batch_encoding() -> Any:
    from transformers.tokenization_utils_base import BatchEncoding  # noqa: PLC0415

    class LazyBatchEncoding(BatchEncoding):
        """A BatchEncoding whose `encodings` are computed when first asked for."""

        @classmethod
        def make(cls, data: dict[str, Any], n_sequences: int, *source: Any) -> Any:
            """Return an answer; `source` are an engine and what its `encodings` is to be given."""
            made = cls.__new__(cls)
            made.__dict__.update(data=data, _n_sequences=n_sequences, _source=source)
            return made

        @property
        def _encodings(self) -> Any:
            own = self.__dict__
            if "_made" not in own:
                engine, *asked = own["_source"]
                own["_made"] = engine.encodings(*asked)
            return own["_made"]

        @_encodings.setter
        def _encodings(self, value: Any) -> None:
            self.__dict__["_made"] = value

        @property
        def is_fast(self) -> bool:
            own = self.__dict__
            return own["_made"] is not None if "_made" in own else True

        def __reduce_ex__(self, _protocol: Any) -> Any:
            plain: Any = BatchEncoding.__new__(BatchEncoding)
            plain.__setstate__({"data": self.data, "encodings": self._encodings})
            return plain.__reduce_ex__(1)

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(LazyBatchEncoding, name, getattr(BatchEncoding, name))
    return LazyBatchEncoding
