"""Finds the first difference between two requests, in the order in which prompts are built."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from tokcache._prefix import n_common
from tokcache.differences.alignment import Run, equal_runs
from tokcache.differences.classes import Difference, DifferenceClass
from tokcache.differences.request import Kind, Message, Part, Request, parse_request
from tokcache.differences.texts import canonical, classify
from tokcache.errors import InvalidRequest

_FIRST = 0xF0000  # the private-use planes have 131,072 characters, one for each distinct message
_SIMILAR = 0.3  # share of equal text from which on two messages are one that was edited
# Inside a message these mean that the message was edited; the names are those for whole prompts.
_OF_PROMPTS = {
    DifferenceClass.APPENDED,
    DifferenceClass.SHORTENED,
    DifferenceClass.INSERTED,
    DifferenceClass.DROPPED,
    DifferenceClass.OTHER_TEXT,
}
_CONTINUED = {DifferenceClass.SAME, DifferenceClass.APPENDED, DifferenceClass.SHORTENED}


def compare_requests(before: Any, after: Any) -> Difference:
    """Return the first difference between an earlier request and a later one.

    Both are a `Request`, or JSON as `parse_request` takes it. Units: `n_shared` and `n_lost` count
    code points of the texts, without the markers that a chat template puts around them.

    Errors: InvalidRequest if one is not a request, or if both can't share a prompt: they name two
            models, or one is a plain text and the other a chat.
    Cost:   O(n log n) for n words.
    """
    old = before if isinstance(before, Request) else parse_request(before)
    new = after if isinstance(after, Request) else parse_request(after)
    if old.model and new.model and old.model != new.model:
        raise InvalidRequest(
            f"the requests name two models, {old.model!r} and {new.model!r}; models share no "
            "prompts, so compare requests of one model"
        )
    if old.is_plain != new.is_plain:
        raise InvalidRequest(
            "one request is a plain text and the other has messages; compare two of one kind"
        )
    if old.is_plain:
        found = dataclasses.replace(
            classify(old.messages[0].parts[0].text, new.messages[0].parts[0].text),
            field=new.messages[0].field,
        )
        return _with_parameters(found, old, new)
    found, n_equal = _in_messages(old.messages, new.messages)
    # Templates write the tools after the system text, Anthropic writes them before it.
    is_system = bool(new.messages) and new.messages[0].role in ("system", "developer")
    is_behind = is_system and new.api != "anthropic"
    is_in_system = is_behind and found.kind not in _CONTINUED and found.message in (None, 0)
    if old.tools == new.tools:
        n_tools = sum(len(tool.text) for tool in new.tools)
        if is_in_system:
            return dataclasses.replace(found, n_lost=found.n_lost + n_tools)
        found = dataclasses.replace(found, n_shared=found.n_shared + n_tools)
        return _with_parameters(found, old, new)
    in_tools = _in_tools(old.tools, new.tools)
    if is_in_system:
        return dataclasses.replace(found, n_lost=found.n_lost + in_tools.n_shared + in_tools.n_lost)
    n_system = new.messages[0].n_chars if is_behind else 0
    return dataclasses.replace(
        in_tools,
        n_shared=in_tools.n_shared + n_system,
        n_lost=in_tools.n_lost + max(0, n_equal - n_system),
    )


def _with_parameters(found: Difference, old: Request, new: Request) -> Difference:
    """Return the difference, or that of settings and parameters if the texts have none."""
    if found.kind not in _CONTINUED:
        return found
    for kind, left, right in (
        (DifferenceClass.SETTINGS, old.settings, new.settings),
        (DifferenceClass.PARAMETERS, old.parameters, new.parameters),
    ):
        names = [name for name in {**left, **right} if left.get(name) != right.get(name)]
        if kind is DifferenceClass.PARAMETERS and found.kind is not DifferenceClass.SAME:
            break
        if names:
            texts = [json.dumps(each.get(names[0]), ensure_ascii=False) for each in (left, right)]
            inner = classify(*texts)
            is_lost = kind is DifferenceClass.SETTINGS
            return dataclasses.replace(
                inner,
                kind=kind,
                field=names[0],
                n_shared=0 if is_lost else found.n_shared,
                n_lost=min(old.n_chars, new.n_chars) if is_lost else 0,
            )
    return found


def _in_tools(old: tuple[Part, ...], new: tuple[Part, ...]) -> Difference:
    """Return the first difference between two lists of tools that are not equal."""
    at = next(
        (index for index, (left, right) in enumerate(zip(old, new, strict=False)) if left != right),
        min(len(old), len(new)),
    )
    left, right = (one[at].text if at < len(one) else "" for one in (old, new))
    inner = classify(left, right)
    kind = DifferenceClass.TOOLS
    if sorted(canonical(json.loads(tool.text)) for tool in old) == sorted(
        canonical(json.loads(tool.text)) for tool in new
    ):
        kind = DifferenceClass.REORDERED
    elif len(old) == len(new) and inner.kind in (
        DifferenceClass.DATE,
        DifferenceClass.RANDOM,
        DifferenceClass.COUNTER,
        DifferenceClass.WHITE_SPACE,
    ):
        kind = inner.kind
    in_both = {tool.text for tool in old}
    return dataclasses.replace(
        inner,
        kind=kind,
        field=(new if at < len(new) else old)[at].field,
        n_shared=sum(len(tool.text) for tool in new[:at]) + inner.position,
        n_lost=inner.n_lost + sum(len(tool.text) for tool in new[at + 1 :] if tool.text in in_both),
    )


def _in_messages(old: tuple[Message, ...], new: tuple[Message, ...]) -> tuple[Difference, int]:
    """Return the first difference, and the number of characters in equal messages."""
    runs = _runs_of_messages(old, new)
    at = runs[0].length
    n_before = sum(message.n_chars for message in new[:at])
    n_behind = sum(
        message.n_chars for run in runs[1:] for message in new[run.after : run.after + run.length]
    )
    n_equal = n_before + n_behind
    if at == len(old) or at == len(new):
        kind = DifferenceClass.APPENDED if len(new) > at else DifferenceClass.SHORTENED
        if len(old) == len(new):
            kind = DifferenceClass.SAME
        message = (new if len(new) > at else old)[at] if len(old) != len(new) else None
        return _at(Difference(kind, n_shared=n_before), message), n_equal
    stops = (runs[1].before, runs[1].after) if len(runs) > 1 else (len(old), len(new))
    gone, come = old[at : stops[0]], new[at : stops[1]]
    if not gone or not come:
        message = (gone or come)[0]
        changed = gone or come
        kinds = {part.kind for one in changed for part in one.parts}
        kind = DifferenceClass.DROPPED if gone else DifferenceClass.INSERTED
        texts = [
            "\n".join(part.text for one in side for part in one.parts) for side in (gone, come)
        ]
        found = Difference(
            DifferenceClass.THINKING if kinds == {Kind.THINKING} else kind,
            0,
            len(texts[0]),
            len(texts[1]),
            before_text=texts[0],
            after_text=texts[1],
        )
    else:
        message = come[0]
        found = _in_message(gone[0], come[0], is_last=at == len(old) - 1)
        n_most = max(gone[0].n_chars, come[0].n_chars)
        is_one = found.kind not in (DifferenceClass.EDITED, DifferenceClass.OTHER_TEXT) or (
            gone[0].role == come[0].role and found.n_shared + found.n_lost >= _SIMILAR * n_most
        )
        if not is_one:
            kind = DifferenceClass.EDITED if len(gone) == len(come) else DifferenceClass.INSERTED
            if not n_behind:
                kind = DifferenceClass.OTHER_TEXT
            elif len(gone) > len(come):
                kind = DifferenceClass.DROPPED  # a summary may stand in the place of many
            elif sum(run.length for run in runs[1:]) < len(gone):
                kind = DifferenceClass.OTHER_TEXT  # a sentence that two chats have in common
            found = dataclasses.replace(found, kind=kind)
    return _at(
        dataclasses.replace(
            found, n_shared=n_before + found.n_shared, n_lost=n_behind + found.n_lost
        ),
        message,
    ), n_equal


def _at(found: Difference, message: Message | None) -> Difference:
    if message is None:
        return found
    return dataclasses.replace(
        found, field=found.field or message.field, message=message.index, role=message.role
    )


def _runs_of_messages(old: tuple[Message, ...], new: tuple[Message, ...]) -> list[Run]:
    """Return the equal runs of two lists of messages."""
    names: dict[Any, str] = {}
    # Each distinct message becomes one character, so runs of text are runs of messages.
    left, right = (
        "".join(names.setdefault(one.key, chr(_FIRST + len(names))) for one in side)
        for side in (old, new)
    )
    runs = equal_runs(left, right)
    at = runs[0].length
    # Messages such as "go on" occur often. If all that follows one changed message is where it
    # was, that is the better reading than an equal message at the end.
    n_next = n_common(left[at + 1 :], right[at + 1 :])
    if n_next and at + 1 + n_next == min(len(left), len(right)):
        return [runs[0], Run(at + 1, at + 1, n_next)]
    return runs


def _in_message(old: Message, new: Message, *, is_last: bool) -> Difference:
    """Return the first difference between two messages that are not equal."""
    if old.role != new.role and old.key[1:] == new.key[1:]:
        return Difference(
            DifferenceClass.ROLE,
            0,
            len(old.role),
            len(new.role),
            field=f"{new.field}.role",
            n_lost=new.n_chars,
            before_text=old.role,
            after_text=new.role,
        )
    sides = [[(part.kind, part.text) for part in one.parts] for one in (old, new)]
    at = n_common(*sides)
    left, right = (one.parts[at] if at < len(one.parts) else None for one in (old, new))
    inner = classify(left.text if left else "", right.text if right else "")
    kind = inner.kind
    for part_kind, meant in (
        (Kind.THINKING, DifferenceClass.THINKING),
        (Kind.IMAGE, DifferenceClass.IMAGE),
    ):
        is_kind = [part is not None and part.kind is part_kind for part in (left, right)]
        if not any(is_kind):
            continue
        rests = (
            "\n".join(each.text for each in one.parts if each.kind is not part_kind)
            for one in (old, new)
        )
        if classify(*rests).kind is DifferenceClass.OTHER_TEXT:
            continue  # another message, which has thinking or an image too
        kind = meant
        if not all(is_kind):
            # The part is there on one side only: nothing of the other side stands in its place.
            left, right = (
                part if each else None for part, each in zip((left, right), is_kind, strict=True)
            )
            inner = classify(left.text if left else "", right.text if right else "")
    if kind in _OF_PROMPTS:
        is_prefill = is_last and new.role == "assistant" and inner.kind is DifferenceClass.APPENDED
        if not (inner.before + inner.after).strip():
            kind = DifferenceClass.WHITE_SPACE
        elif is_prefill and left:
            kind = DifferenceClass.APPENDED
        else:
            kind = DifferenceClass.EDITED
    part = right or left
    later = sum(len(one[1]) for one in sides[1][at:] if one in sides[0][at:])
    return dataclasses.replace(
        inner,
        kind=kind,
        field=part.field if part else new.field,
        n_shared=sum(len(text) for _, text in sides[1][:at]) + inner.position,
        n_lost=later + (inner.n_lost if left and right else 0),
    )
