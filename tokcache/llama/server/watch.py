"""Notices that a server was restarted or serves another model."""

from __future__ import annotations

from dataclasses import dataclass
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
    from tokcache.llama.server.slot import SlotRecord
    from tokcache.llama.server.steps import Steps

_NOT_FOUND = 404
_N_PROBS = 16


@dataclass(frozen=True, slots=True)
class Identity:
    """A server's identity at one look; its saved files fit another start with an equal `state_key`.

    `state_key` names the model file, the build, the context size, the template and the adapters.
    """

    props: ServerProps
    meta: ModelMeta
    adapters: str
    state_key: tuple[Any, ...]


class Watch:
    """A server's identity at the last look, and its probabilities after a fixed prompt.

    A saved state does not name its model. Before a file is restored, the server must have the same
    model, adapters, context size and build as when it saved the file. A server does not report
    other options that change a state, such as the RoPE base. So `Preparation` compares its
    probabilities after a fixed prompt once after each start. If they differ, it drops all files
    that were saved before.
    """

    def __init__(
        self, slot_ids: tuple[int, ...] | None, check_vocabulary: Callable[[], Steps[None]]
    ) -> None:
        self._slot_ids = slot_ids or ()
        self._check_vocabulary = check_vocabulary
        self.identity: Identity | None = None
        # The probabilities at the last comparison, and `SlotTable.epoch` at that time, which grows
        # with each start of the server.
        self._probabilities: TokenProbabilities | None = None
        self.compared_epoch = 0

    @property
    def props(self) -> ServerProps | None:
        """The server's properties, None before the first look."""
        return self.identity.props if self.identity else None

    @property
    def meta(self) -> ModelMeta:
        """The model's metadata, empty before the first look."""
        return self.identity.meta if self.identity else ModelMeta()

    def look_for_change(self) -> Steps[Identity | None]:
        """Return the server's identity if it is not the one of the last look.

        Errors: InvalidConfig if the server lacks a slot of the settings; ServerError; those of the
                check of the vocabulary, which another model must pass.
        """
        known = self.identity
        props: ServerProps = yield calls.props()
        is_same = known is not None and props == known.props
        # Adapters can't be added while a server runs, but their strengths can be changed.
        if known is not None and is_same and known.adapters:
            is_same = (yield from self._adapters()) == known.adapters
        if is_same:
            return None
        meta = yield calls.model_meta()
        adapters = yield from self._adapters()
        model_file = model_identity(props.model_path, meta)
        state_key = (model_file, props.build, props.n_ctx, props.chat_template, adapters)
        absent = [n for n in self._slot_ids if n >= props.n_slots]
        if absent:
            raise InvalidConfig(f"slot_ids names slot {absent[0]}, the server has {props.n_slots}")
        if known is not None and state_key != known.state_key:
            yield from self._check_vocabulary()
        return Identity(props, meta, adapters, state_key)

    def _adapters(self) -> Steps[str]:
        try:
            adapters: str = yield calls.lora_adapters()
        except (RequestRejected, ServerUnsupported) as error:
            if isinstance(error, RequestRejected) and error.status != _NOT_FOUND:
                raise
            return ""  # servers of 2024 have no /lora-adapters
        return adapters

    def probe(self, slot: SlotRecord) -> Steps[TokenProbabilities | None]:
        """Return the model's probabilities after the fixed prompt, None if it reports none.

        Cost: decodes 64 tokens in `slot` and so replaces its contents.
        """
        slot.reset()  # the probe takes its place
        tokens = probe_tokens(self.meta.n_vocab)
        settings = {"n_predict": 1, "n_probs": _N_PROBS, "temperature": 0.0, "cache_prompt": False}
        try:
            completion = yield calls.completion(tokens, {**settings, "id_slot": slot.id})
        except (ServerUnreachable, ServerTimeout):
            raise
        except ServerError:
            return None
        return completion.probabilities[0] if completion.probabilities else None

    def remember_and_compare(self, probabilities: TokenProbabilities | None) -> bool:
        """Remember probabilities; return whether they show the model of the last comparison.

        False at the first comparison, and if one of the two has none: then nothing is shown.
        """
        is_same = is_same_model(self._probabilities, probabilities)
        self._probabilities = probabilities
        return is_same

    def reset(self) -> None:
        """Reset to the unconnected state; the last probabilities stay for the next comparison."""
        self.identity = None
