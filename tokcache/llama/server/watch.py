"""Notices that a server was restarted or serves another model."""

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
    """The server's identity at the last look.

    A saved state does not name its model. Before a file is restored, the server must have the same
    model, adapters, context size and build as when it saved the file. A server does not report
    other options that change a state, such as the RoPE base. So after each start we compare its
    probabilities after a fixed prompt, and drop the files of a start with other probabilities.
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
        # The probabilities when the files were saved, and the epoch of the last comparison.
        self._said: TokenProbabilities | None = None
        self._checked_epoch = 0
        self.props: ServerProps | None = None
        self.meta = ModelMeta()

    @property
    def epoch(self) -> int:
        """The number of times that all slots were reset."""
        return self._table.epoch

    def connect(self) -> Steps[bool]:
        """Read the server's identity once; return False if its answers are not understood."""
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
        """Read the server's properties, and reset the records if anything changed."""
        props: ServerProps = yield calls.props()
        # Adapters can't be added while a server runs, but their strengths can be changed.
        is_same = props == self.props
        if is_same and self._adapters:
            is_same = (yield from self._read_adapters()) == self._adapters
        if not is_same:
            yield from self.look()
        return props

    def check_in(self, slot: SlotRecord) -> Steps[bool]:
        """Compare the model's probabilities, once per start; return whether that was done now.

        Cost: decodes 64 tokens in `slot` and so replaces its contents.
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
        """Read the server's identity; reset the records if it was restarted or replaced."""
        props = yield calls.props()
        meta = yield calls.model_meta()
        adapters = yield from self._read_adapters()
        file = model_identity(props.model_path, meta)
        identity = (file, props.build, props.n_ctx, props.chat_template, adapters)
        absent = [n for n in self._settings.slot_ids or () if n >= props.n_slots]
        if absent:
            raise InvalidConfig(f"slot_ids names slot {absent[0]}, the server has {props.n_slots}")
        is_other = bool(self._identity) and identity != self._identity
        if is_other:
            yield from self._check_model()
        with self._table.lock:
            if props == self.props and identity == self._identity:
                return  # another request noticed it first
            self._trust.count("restart", int(self.props not in (None, props)))
            self._adapters = adapters
            self._note(props, meta, identity, is_other=is_other)

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
        # The new start may have a slot folder or context checkpoints.
        self._shelf.restrict(self._trust.restart())
        self._shelf.sweep()
        if self.props is None:
            self._shelf.take_stock()
        self.props, self.meta, self._identity = props, meta, identity
        self._table.reset_contents()
        self._table.resize(self._settings.slot_ids or range(props.n_slots))

    def reset(self) -> None:
        """Reset to the unconnected state."""
        self.props, self._identity = None, ()
