"""Noticing that a server was started again, or serves another model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokcache.errors import (
    InvalidConfig,
    RequestRejected,
    ServerError,
    ServerTimeout,
    ServerUnreachable,
    ServerUnsupported,
)
from tokcache.llama.server import calls
from tokcache.llama.server.model import is_same_model, model_identity, probe_tokens
from tokcache.llama.server.results import ModelMeta, ServerProps

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokcache.llama.server.results import TokenProbabilities
    from tokcache.llama.server.settings import SlotSettings
    from tokcache.llama.server.shelf import Shelf
    from tokcache.llama.server.slot import SlotRecord
    from tokcache.llama.server.steps import Steps
    from tokcache.llama.server.table import SlotTable
    from tokcache.llama.server.trust import Trust


_NOT_FOUND = 404
_N_PROBS = 16


class Watch:
    """What the server was when it was last looked at.

    States carry no model's name: before a file is restored, the server must be the one that
    saved it, with the same model, adapters, context size and build. What else changes a state
    (the RoPE base, say) a server does not tell: at each start it is asked what it says after a
    fixed prompt, and files of a start that said something else are not used.
    """

    def __init__(
        self,
        settings: SlotSettings,
        table: SlotTable,
        shelf: Shelf,
        trust: Trust,
        check_model: Callable[[], Steps[None]],
    ) -> None:
        self._settings = settings
        self._table = table
        self._shelf = shelf
        self._trust = trust
        self._check_model = check_model
        self._identity: tuple[Any, ...] = ()
        self._adapters = ""
        # What the model said when the files were saved, and at which start that was last checked.
        self._said: TokenProbabilities | None = None
        self._checked_epoch = 0
        self.props: ServerProps | None = None
        self.meta = ModelMeta()

    @property
    def epoch(self) -> int:
        """How often all contents were forgotten."""
        return self._table.epoch

    def connect(self) -> Steps[bool]:
        """Learn what the server is, once; False where it tells nothing of use."""
        if self.props is not None:
            return True
        try:
            yield from self.look()
        except (ServerUnreachable, ServerTimeout):
            raise
        except ServerError as error:
            self._trust.degrade("server_not_understood", error)
            return False
        return True

    def refresh(self) -> Steps[ServerProps]:
        """Ask the server what it is, and notice if it is another one."""
        props: ServerProps = yield calls.props()
        # Adapters can't be added while a server runs, but their strengths can be changed.
        is_same = props == self.props
        if is_same and self._adapters:
            is_same = (yield from self._read_adapters()) == self._adapters
        if not is_same:
            yield from self.look()
        return props

    def check_in(self, slot: SlotRecord) -> Steps[bool]:
        """Compare, once a start, what the model says in `slot`; return whether that was done.

        Cost: 64 tokens are decoded, and what the slot held is gone.
        """
        epoch = self.epoch
        if self._checked_epoch == epoch:
            return False
        slot.reset()
        said = yield from self._ask(slot)
        with self._table.lock:
            if self._checked_epoch == epoch or self.epoch != epoch:
                return True
            if len(self._shelf) and not is_same_model(self._said, said):
                self._drop_files()
                self._table.reset_contents()
            self._said, self._checked_epoch = said, self.epoch
        return True

    def _ask(self, slot: SlotRecord) -> Steps[TokenProbabilities | None]:
        tokens = probe_tokens(self.meta.n_vocab)
        asked = {"n_predict": 1, "n_probs": _N_PROBS, "temperature": 0.0, "cache_prompt": False}
        try:
            completion = yield calls.completion(tokens, {**asked, "id_slot": slot.id})
        except (ServerUnreachable, ServerTimeout):
            raise
        except ServerError:
            return None
        return completion.probabilities[0] if completion.probabilities else None

    def look(self) -> Steps[None]:
        """Read what the server is; forget what another one, or another start of it, held."""
        props = yield calls.props()
        meta = yield calls.model_meta()
        adapters = yield from self._read_adapters()
        file = model_identity(props.model_path, meta)
        identity = (file, props.build, props.n_ctx, props.chat_template, adapters)
        self._require_slots(props.n_slots)
        is_other = bool(self._identity) and identity != self._identity
        if is_other:
            yield from self._check_model()
        with self._table.lock:
            if props == self.props and identity == self._identity:
                return  # another request was first to notice
            self._trust.count("restart", int(self.props not in (None, props)))
            self._adapters = adapters
            self._note(props, meta, identity, is_other=is_other)

    def _require_slots(self, n_slots: int) -> None:
        absent = [number for number in self._settings.slot_ids or () if number >= n_slots]
        if absent:
            raise InvalidConfig(f"slot_ids names slot {absent[0]}, the server has {n_slots}")

    def _read_adapters(self) -> Steps[str]:
        try:
            adapters: str = yield calls.lora_adapters()
        except (RequestRejected, ServerUnsupported) as error:
            if isinstance(error, RequestRejected) and error.status != _NOT_FOUND:
                raise
            return ""  # servers of 2024
        return adapters

    def _drop_files(self) -> None:
        self._trust.refuse("files_of_another_model", len(self._shelf))
        self._shelf.clear()
        self._trust.reset()

    def _note(
        self, props: ServerProps, meta: ModelMeta, identity: tuple[Any, ...], *, is_other: bool
    ) -> None:
        if is_other:
            self._drop_files()
        # It may have been started with a slot folder, or with context checkpoints, now.
        self._shelf.restrict(self._trust.restart())
        self._shelf.sweep()
        if self.props is None:
            self._shelf.take_stock()
        self.props, self.meta, self._identity = props, meta, identity
        self._table.reset_contents()
        self._table.resize(self._settings.slot_ids or range(props.n_slots))

    def reset(self) -> None:
        """Know nothing."""
        self.props, self._identity = None, ()
