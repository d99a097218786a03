"""The answers of transformers calls, made from token ids: truncated, padded, with masks, as arrays.

1. `read` reads the arguments of a call into `Asked`, or says why ids can't answer the call.
2. `make_rows` truncates the ids and puts the special tokens around them.
3. `make_fields` makes the fields, which `shaped` turns into a BatchEncoding.

tests/text/test_wrap_matrix.py compares the answers with those of the plain tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
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

# The arguments besides texts, truncation and padding, and the values with which ids can answer.
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
    """Truncation of a row to `max_length` tokens, of its texts and the special tokens together."""

    max_length: int
    strategy: str
    side: str

    def lengths(self, layout: Layout, lengths: Sequence[int]) -> Sequence[int] | None:
        """Return how many tokens of each text are kept; None where tokenizers raises an error."""
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
        """Return the `length` ids of one text that are kept."""
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
    """Return the lengths of two texts that are too long together, as tokenizers truncates them.

    The longer text is cut down to the length of the shorter one, then both to a half of the room.
    """
    short, long = sorted((first, second))
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short, long = room // 2, room // 2 + room % 2
    return (long, short) if first > second else (short, long)


@dataclass(frozen=True, slots=True)
class Padding:
    """Padding to `length`, or to the longest row of a batch (None), and to a multiple."""

    length: int | None
    multiple_of: int | None
    side: str
    token: str
    token_id: int
    type_id: int

    def width(self, n_longest: int) -> int:
        """Return the length to which rows are padded, if the longest has `n_longest` tokens."""
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
    """The arguments of a call.

    `texts` are the first texts of all rows, then the second ones if rows have two. `is_batch` says
    that the answer is a list of rows. `flags` are the arguments that ask for fields by name.
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
        """The arguments of `enable_truncation` and `enable_padding` for this call, or None."""
        return (
            None if self.truncation is None else self.truncation.for_tokenizers(),
            None if self.padding is None else self.padding.for_tokenizers(),
        )

    @property
    def inputs(self) -> list[Any]:
        """The texts or pairs in the form that `encode_batch` takes."""
        return list(self.texts[0] if len(self.texts) == 1 else zip(*self.texts, strict=True))


def read(wrapper: Any, asked: dict[str, Any]) -> Asked | str:
    """Return the arguments of an `_encode_plus` call, or the reason why ids can't answer it."""
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
    truncation = None
    strategy, side = _strategy(asked, "truncation_strategy"), wrapper.truncation_side
    if not strategy.startswith("do_not"):
        if type(max_length) is not int or side not in _SIDES:
            raise NotFromIds("truncation")
        truncation = Truncation(max_length, strategy, side)
    padding = _padding(wrapper, asked, max_length)
    for name, value in asked.items():
        # By identity: transformers does not take 0 for False.
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
        if pair is None or (
            isinstance(pair, str) and not pair
        ):  # transformers ignores a second text ""
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
    """The ids of one row before padding, and the number of tokens of each of its texts."""

    segments: Segments
    lengths: Sequence[int]

    def __len__(self) -> int:
        return sum(map(len, self.segments))


def make_rows(asked: Asked, layout: Layout, found: Sequence[TokenIds]) -> list[Row] | None:
    """Return the rows of an answer; None where tokenizers raises an error over the truncation.

    `found` are the ids of whole rows if a row has one text. If it has two, they are the ids of the
    first texts without special tokens, then those of the second texts.
    """
    truncation, n_rows = asked.truncation, len(asked.texts[0])
    is_pair = len(asked.texts) > 1
    rows = []
    for index, ids in enumerate(found[:n_rows]):
        if is_pair:
            texts: Sequence[TokenIds] = (ids, found[n_rows + index])
        else:
            n_tokens = len(ids) - layout.n_special
            if truncation is None or truncation.max_length >= len(ids) > layout.n_special:
                rows.append(Row([ids], (n_tokens,)))
                continue
            texts = (ids[layout.n_before : layout.n_before + n_tokens],)
        lengths: Sequence[int] = [len(one) for one in texts]
        if truncation is not None:
            kept = truncation.lengths(layout, lengths)
            if kept is None:
                return None
            texts = [truncation.cut(one, n) for one, n in zip(texts, kept, strict=True)]
            lengths = kept
        rows.append(Row(layout.segments(texts), lengths))
    return rows


# ---- fields


def make_fields(
    asked: Asked, layout: Layout, rows: Sequence[Row], names: Sequence[str]
) -> dict[str, Any]:
    """Return the fields of an answer, in the order of transformers: lists, or arrays if asked.

    `names` are the fields that this tokenizer returns by default.
    Shapes: [n_rows, n_tokens]; int64 arrays where all rows are equally long, else lists.
    """
    padding = asked.padding
    longest = max(map(len, rows))
    width = 0 if padding is None else padding.width(longest)
    is_even = width >= longest or all(len(row) == longest for row in rows)
    is_left = padding is not None and padding.side == "left"

    # The name of each field, its rows, and the value with which rows are padded.
    fields: list[tuple[str, Sequence[Segments], int]] = [
        ("input_ids", [row.segments for row in rows], padding.token_id if padding else 0)
    ]
    if _is_wanted("token_type_ids", asked.flags, names):
        types = [layout.type_ids(row.lengths) for row in rows]
        fields.append(("token_type_ids", types, padding.type_id if padding else 0))
    if _is_wanted("attention_mask", asked.flags, names):
        fields.append(("attention_mask", [[Run(1, len(row))] for row in rows], 0))
    if asked.flags.get("return_special_tokens_mask"):
        masks = [layout.special_tokens_mask(row.lengths) for row in rows]
        fields.append(("special_tokens_mask", masks, 1))

    data: dict[str, Any] = {}
    for name, lines, filler in fields:
        filled = []
        for line in lines:
            n_missing = width - sum(map(len, line))
            if n_missing > 0:
                filling = Run(filler, n_missing)
                line = [filling, *line] if is_left else [*line, filling]  # noqa: PLW2901 (filled)
            filled.append(line)
        if asked.tensors is not None and is_even:
            data[name] = _as_array(filled, max(width, longest))
        else:
            lists = [[_plain(segment) for segment in line] for line in filled]
            data[name] = [
                one[0] if len(one) == 1 else list(chain.from_iterable(one)) for one in lists
            ]
    if asked.flags.get("return_length"):
        data["length"] = [len(ids) for ids in data["input_ids"]]
    return data


def _is_wanted(name: str, flags: dict[str, Any], names: Sequence[str]) -> bool:
    flag = flags.get(f"return_{name}")
    return name in names if flag is None else bool(flag)


def _plain(segment: Segment) -> list[int]:
    if isinstance(segment, TokenIds):
        return segment.tolist()
    return [segment.value] * segment.n_times if isinstance(segment, Run) else list(segment)


def _as_array(lines: Sequence[Segments], width: int) -> Any:
    import numpy as np  # noqa: PLC0415 (60 ms of `import tokcache`)

    array = np.empty((len(lines), width), np.int64)
    for row, line in zip(array, lines, strict=True):
        start = 0
        for segment in line:
            stop = start + len(segment)
            values: Any = segment
            if isinstance(segment, TokenIds):
                values = segment.numpy()
            elif isinstance(segment, Run):
                values = segment.value
            row[start:stop] = values
            start = stop
    return array


# ---- answers


def ids_alone(_wrapper: Any, ids: list[int], *_rest: Any) -> list[int]:
    """Return the ids alone, as `encode` does."""
    return ids


def batch_encoding(
    wrapper: Any, ids: list[int], engine: Engine, text: str, add_special_tokens: bool
) -> Any:
    """Return the answer to a call with one text and no options; None if type ids are unknown."""
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
    """Return the answer with these fields: as tensors, and one row only, if the call asks so."""
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
            """Return an answer; `source` are an engine and the arguments for its `encodings`."""
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
