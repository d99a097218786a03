"""Finds how transformers builds a tokenizer from its files, and whether that one is cached too.

`AutoTokenizer` may build other components than the file names: since version 5, Llama's class puts
a Metaspace in place of the normalizer. `tokcache explain` shows the file's tokenizer in full, and
here only what a user of `AutoTokenizer` gets instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokcache.text.engines.copying import ENCODING_PARTS, component_state
from tokcache.text.wrappers import wrap

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokcache.config import CacheConfig
    from tokcache.demo.tokenizers import TokenizerSource
    from tokcache.text.cuts.plan import CutPlan

    WhyNotParts = Callable[[CutPlan | None, str | None], str | None]


@dataclass(frozen=True, slots=True)
class ByTransformers:
    """A tokenizer as `AutoTokenizer` builds it: its class, and its components unlike the file's.

    `why_not_whole`, `why_not_parts`, `recognised` and `refused` are as in an Explanation. `why_not`
    is the reason why there is no such tokenizer. `is_different`: an answer had other ids.
    """

    class_name: str = ""
    unlike_file: tuple[str, ...] = ()
    why_not_whole: str | None = None
    why_not_parts: str | None = None
    recognised: tuple[tuple[str, str], ...] = ()
    refused: tuple[str, ...] = ()
    has_cuts: bool = False
    is_different: bool = False
    why_not: str | None = None


def by_transformers(
    source: TokenizerSource, config: CacheConfig, text: str, why_not_parts: WhyNotParts
) -> ByTransformers | None:
    """Return what `AutoTokenizer` makes of the files; None without its configuration file.

    `text` is encoded twice through the cache. None as well if transformers is not installed.
    Cost: the import of transformers and a second load of the tokenizer, some seconds.
    """
    if source.in_gguf is not None or "tokenizer_class" not in source.config:
        return None
    try:
        from transformers import AutoTokenizer  # noqa: PLC0415 (an extra, and seconds)
    except ImportError:
        return None
    try:
        plain: Any = AutoTokenizer.from_pretrained(
            str(source.path.parent), local_files_only=True, trust_remote_code=False
        )
        wrapped: Any = wrap(plain, config)
        right = plain(text)["input_ids"]
        answers = [wrapped(text)["input_ids"] for _ in range(2)]
    except Exception as error:  # noqa: BLE001 (transformers raises of every kind)
        return ByTransformers(why_not=f"{type(error).__name__}: {str(error).strip()[:120]}")
    core = wrapped._tokcache  # noqa: SLF001 (ours)
    reason = core.engine(core.fresh()).reason
    plan = None if core.l1 is None else core.l1.plan
    own, file = plain._tokenizer, source.load()  # noqa: SLF001 (its Rust tokenizer)
    return ByTransformers(
        class_name=type(plain).__name__,
        unlike_file=tuple(
            part
            for part in ENCODING_PARTS
            if component_state(getattr(own, part)) != component_state(getattr(file, part))
        ),
        why_not_whole=None if reason is None else _in_words(plain, reason),
        why_not_parts=why_not_parts(plan, reason),
        recognised=plan.recognised if plan else (),
        refused=plan.refused if plan else (),
        has_cuts=plan is not None and any(plan.fine),
        is_different=any(answer != right for answer in answers),
    )


def _in_words(plain: Any, reason: str) -> str:
    if not reason.startswith("own_"):
        return reason
    why = f"{type(plain).__name__} has its own {reason.removeprefix('own_')}"
    if hasattr(plain, "set_infilling_processor"):
        # transformers/models/code_llama/tokenization_code_llama.py: set_infilling_processor(True)
        why += ", and a prompt with a gap to fill leaves another normalizer, so that the ids of a"
        why += " text depend on the calls before"
    return why
