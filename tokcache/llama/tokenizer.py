"""The tokenizers of llama_cpp.Llama: llama.cpp's own through an L0 cache, or a wrapped one.

llama.cpp adds BOS and EOS itself, as the model's flags say, so the text is always encoded without
the special tokens of the tokenizer's post-processor. The model detokenizes, token by token.
"""

from __future__ import annotations

from operator import index
from struct import error
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np
from llama_cpp.llama_tokenizer import BaseLlamaTokenizer

from tokcache._validate import require_scope
from tokcache.errors import InvalidTokens, VocabularyMismatch
from tokcache.state.names import packed_ids
from tokcache.text.l0 import L0Cache
from tokcache.text.token_ids import TokenIds
from tokcache.text.wrappers import wrap

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


OWN_SCOPE: Any = object()
"""The default of a request's `scope=`: the scope of the object. None is the shared scope."""


class ModelTokenizer(BaseLlamaTokenizer):  # type: ignore[misc]
    """llama.cpp's own tokenizer with an L0 cache, keyed by bytes, add_bos, special and scope."""

    def __init__(self, model: Any, scope: str | None, l0: L0Cache | None = None) -> None:
        self._model = model
        self._scope = scope
        self._l0 = l0 if l0 is not None else L0Cache()
        # The scope of the last text, the list of ids that was returned for it, and its TokenIds:
        # when that list comes back as a prompt, it need not be converted.
        self._recent: tuple[str | None, list[int], TokenIds] = (None, [], TokenIds())

    def tokenize(
        self,
        text: bytes,
        add_bos: bool = True,
        special: bool = True,
        *,
        scope: str | None = OWN_SCOPE,
    ) -> list[int]:
        """Return the ids of llama.cpp's tokenizer, from the cache if the text is known."""
        scope = self._scope if scope is OWN_SCOPE else scope
        key, cache_scope, add_bos = (
            text.decode("latin-1"),
            _cache_scope(special, scope),
            bool(add_bos),
        )
        ids = self._l0.get(key, add_special_tokens=add_bos, scope=cache_scope)
        if ids is None:
            ids = TokenIds(self._model.tokenize(text, add_bos=add_bos, special=special))
            self._l0.put(key, ids, add_special_tokens=add_bos, scope=cache_scope)
        return self._listed(ids, scope)

    def _listed(self, ids: TokenIds, scope: str | None) -> list[int]:
        tokens = ids.tolist()
        self._recent = (scope, tokens, ids)
        return list(tokens)

    def cache_clear(self, *, scope: str | None = None) -> None:
        """Clear the texts of one scope, or of all.

        Errors: InvalidScope.
        """
        scope = require_scope(scope)
        if scope is None:
            self._l0.clear()
        else:
            for special in (False, True):
                self._l0.clear(scope=_cache_scope(special, scope))
        if scope in (None, self._recent[0]):
            self._recent = (None, [], TokenIds())

    def detokenize(
        self,
        tokens: list[int],
        prev_tokens: list[int] | None = None,  # noqa: ARG002 (llama_cpp's signature)
        special: bool = False,
    ) -> bytes:
        """Return the bytes of `tokens`, from the model's vocabulary."""
        return bytes(self._model.detokenize(tokens, special=special))

    def int32_ids(
        self, tokens: Sequence[int], *, scope: str | None = OWN_SCOPE
    ) -> NDArray[np.int32]:
        """Return the ids as int32; those of the last text, with or without BOS, unconverted."""
        recent_scope, recent, ids = self._recent
        if recent_scope != (self._scope if scope is OWN_SCOPE else scope):
            return int32_ids(tokens)
        n_before = len(tokens) - len(recent)
        if recent and 0 <= n_before <= 1 and list(tokens[n_before:]) == recent:
            known = np.frombuffer(memoryview(ids), np.int32)
            return known if not n_before else np.concatenate(([np.int32(tokens[0])], known))
        return int32_ids(tokens)


def _cache_scope(special: bool, scope: str | None) -> str:
    # "-" and "+" distinguish no scope from the scope named "".
    return f"{int(special)}-" if scope is None else f"{int(special)}+{scope}"


def int32_ids(tokens: Sequence[int]) -> NDArray[np.int32]:
    """Return the ids as int32.

    Errors: InvalidTokens, with the first that is not an int32.
    """
    is_bytes = isinstance(tokens, bytes | bytearray)  # their items are integers, but no ids
    try:
        if not is_bytes:
            return np.frombuffer(bytearray(packed_ids(tuple(tokens))), np.int32)
    except (error, OverflowError, TypeError):
        pass
    for position, token in enumerate(() if is_bytes else tokens):
        if not hasattr(token, "__index__"):  # its type alone: it may be a prompt's text
            found = type(token).__name__
        elif not -(1 << 31) <= index(token) < 1 << 31:
            found = f"{index(token):,}"
        else:
            continue
        raise InvalidTokens(
            f"a token id must be an int32 integer, not {found} (at position {position})"
        )
    raise InvalidTokens(f"token ids must be int32 integers, not {type(tokens).__name__}")


class WrappedTokenizer(ModelTokenizer):
    """A tokenizer that tokcache wraps, in place of the model's.

    `special=False` encodes special tokens as text. `add_bos=True` adds the tokens that llama.cpp
    adds (BOS and EOS by the model's flags), but no second BOS to a text that begins with one.
    """

    def __init__(self, model: Any, tokenizer: Any, scope: str | None) -> None:
        super().__init__(model, scope)
        self._tokenizer = tokenizer
        # The copy that encodes special tokens as text, and the generation of the tokenizer then.
        self._as_text: tuple[Any, Any] | None = None
        # The ids of its added tokens, and the generation then.
        self._added: tuple[Any, frozenset[int]] | None = None
        # llama.cpp's own answer for the empty text: the tokens that it adds to every text.
        around = model.tokenize(b"", add_bos=True, special=True)
        bos = around[:1] if around and around[0] == model.token_bos() else []
        self._before, self._after = bos, around[len(bos) :]

    def tokenize(
        self,
        text: bytes,
        add_bos: bool = True,
        special: bool = True,
        *,
        scope: str | None = OWN_SCOPE,
    ) -> list[int]:
        """Return the wrapped tokenizer's ids; with `add_bos`, those that the model adds too."""
        scope = self._scope if scope is OWN_SCOPE else scope
        try:
            string = text.decode()
        except UnicodeDecodeError:  # half a character: only llama.cpp can encode it
            return super().tokenize(text, add_bos, special, scope=scope)
        ids = self._ids(string, special, scope)
        tokens = self._listed(ids, scope)
        if not add_bos:
            return tokens
        has_bos = special and bool(self._before) and tokens[:1] == self._before
        return [*([] if has_bos else self._before), *tokens, *self._after]

    def added_ids(self) -> frozenset[int]:
        """Return the ids of the added tokens: one object until the tokenizer changes."""
        generation = _generation(self._tokenizer)
        if self._added is None or generation is None or self._added[0] is not generation:
            added = rust_tokenizer(self._tokenizer).get_added_tokens_decoder()
            self._added = generation, frozenset(added)
        return self._added[1]

    def cache_clear(self, *, scope: str | None = None) -> None:
        """Clear the texts of one scope, or of all, in the wrapped tokenizer too.

        Errors: InvalidScope.
        """
        super().cache_clear(scope=scope)
        clear = getattr(self._tokenizer, "cache_clear", None)  # it need only have `token_ids`
        if clear is not None:
            clear(scope=scope)

    def _ids(self, text: str, special: bool, scope: str | None) -> TokenIds:
        if special:
            ids = self._tokenizer.token_ids(text, add_special_tokens=False, scope=scope)
            return TokenIds(ids)
        # The generation is read before the copy is made: a change in between makes another copy.
        generation = _generation(self._tokenizer)
        if self._as_text is None or self._as_text[0] is not generation:
            plain = rust_tokenizer(self._tokenizer)
            copy = type(plain).from_str(plain.to_str())
            copy.no_truncation()
            copy.no_padding()
            copy.encode_special_tokens = True
            self._as_text = generation, copy
        return TokenIds(self._as_text[1].encode(text, add_special_tokens=False).ids)


def _generation(tokenizer: Any) -> Any:
    """Return an object that is another one after each change of a wrapped tokenizer."""
    core = getattr(tokenizer, "_tokcache", None)
    return None if core is None else core.fresh()


def rust_tokenizer(tokenizer: Any) -> Any:
    """Return the tokenizers.Tokenizer inside a wrapped or transformers tokenizer."""
    plain = tokenizer.unwrap() if hasattr(tokenizer, "unwrap") else tokenizer
    return getattr(plain, "backend_tokenizer", plain)


def model_tokenizer(model: Any, tokenizer: Any, scope: str | None) -> Any:
    """Return the tokenizer of a Llama: `tokenizer`, wrapped if it is not, or the model's own.

    Errors: VocabularyMismatch; UnsupportedTokenizer.
    """
    if tokenizer is None:
        return ModelTokenizer(model, scope)
    if isinstance(tokenizer, BaseLlamaTokenizer):
        return tokenizer
    if not hasattr(tokenizer, "token_ids"):
        tokenizer = wrap(tokenizer)
    check_vocabulary(tokenizer, model)
    return WrappedTokenizer(model, tokenizer, scope)


def check_vocabulary(tokenizer: Any, model: Any) -> None:
    """Raise VocabularyMismatch unless each id of the tokenizer is the same piece in the model.

    The model may have more ids: files are padded to round sizes.
    Cost: under a second at 150,000 ids.
    """
    vocabulary = rust_tokenizer(tokenizer).get_vocab(with_added_tokens=True)
    n_model = int(model.n_vocab())
    get_text, vocab = llama_cpp.llama_vocab_get_text, model.vocab
    for piece, token in sorted(vocabulary.items(), key=lambda item: item[1]):
        found = get_text(vocab, token) if token < n_model else None
        if found is None or not _is_same_piece(piece, found):
            there = "nothing" if found is None else repr(found.decode("utf-8", "replace"))
            raise VocabularyMismatch(
                f"tokenizer has {len(vocabulary):,} tokens, {model.path_model} has {n_model:,}; "
                f"the first that differs is id {token}: {piece!r} in the tokenizer, {there} in "
                "the model; pass the model's own tokenizer"
            )


def _is_same_piece(piece: str, found: bytes) -> bool:
    if piece.encode("utf-8", "surrogatepass") == found:
        return True
    # SentencePiece models are converted with the space as itself or as its marker.
    return piece.replace("\u2581", " ") == found.decode("utf-8", "replace").replace("\u2581", " ")
