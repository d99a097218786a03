"""Noticing that a server was started again, or serves another model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokcache.errors import InvalidConfig, ServerError, ServerUnreachable
from tokcache.llama.server import calls
from tokcache.llama.server.model import model_identity
from tokcache.llama.server.results import ModelMeta, ServerProps

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokcache.llama.server.settings import SlotSettings
    from tokcache.llama.server.shelf import Shelf
    from tokcache.llama.server.steps import Steps
    from tokcache.llama.server.table import SlotTable
    from tokcache.llama.server.trust import Trust


class Watch:
    """What the server was when it was last looked at.

    States carry no model's name: before a file is restored, the server must be the one that
    saved it, with the same model, adapters, context size and build. `epoch` counts the starts.
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
        self.props: ServerProps | None = None
        self.meta = ModelMeta()
        self.epoch = 0

    def connect(self) -> Steps[bool]:
        """Learn what the server is, once; False where it tells nothing of use."""
        if self.props is not None:
            return True
        try:
            yield from self.look()
        except ServerUnreachable:
            raise
        except ServerError as error:
            self._trust.degrade("server_not_understood", error)
            return False
        return True

    def refresh(self) -> Steps[ServerProps]:
        """Ask the server what it is, and notice if it is another one."""
        props: ServerProps = yield calls.props()
        if props != self.props:
            yield from self.look()
        return props

    def look(self) -> Steps[None]:
        """Read what the server is; forget what another one, or another start of it, held."""
        props = yield calls.props()
        meta = yield calls.model_meta()
        adapters = yield from self._adapters()
        file = model_identity(props.model_path, meta)
        identity = (file, props.build, props.n_ctx, props.chat_template, adapters)
        self._require_slots(props.n_slots)
        is_other = bool(self._identity) and identity != self._identity
        if is_other:
            yield from self._check_model()
        with self._table.lock:
            if props == self.props and not is_other:
                return  # another request was first to notice
            self.epoch += 1
            self._trust.count("restart", int(self.props is not None))
            self._note(props, meta, identity, is_other=is_other)

    def _require_slots(self, n_slots: int) -> None:
        absent = [number for number in self._settings.slot_ids or () if number >= n_slots]
        if absent:
            raise InvalidConfig(f"slot_ids names slot {absent[0]}, the server has {n_slots}")

    def _adapters(self) -> Steps[str]:
        try:
            adapters: str = yield calls.lora_adapters()
        except ServerUnreachable:
            raise
        except ServerError:  # servers of 2024
            return ""
        return adapters

    def _note(
        self, props: ServerProps, meta: ModelMeta, identity: tuple[Any, ...], *, is_other: bool
    ) -> None:
        if is_other:
            self._trust.refuse("files_of_another_model", len(self._shelf))
            self._shelf.clear()
            self._trust.learn_anew()
        self._trust.can_save = True  # it may have been started with a slot folder now
        self._shelf.sweep()
        self.props, self.meta, self._identity = props, meta, identity
        self._table.forget_contents()
        self._table.resize(self._settings.slot_ids or range(props.n_slots))

    def forget(self) -> None:
        """Know nothing."""
        self.props, self._identity = None, ()
