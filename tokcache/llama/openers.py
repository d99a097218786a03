"""Openers: the ids that open a user's message and an answer, found in the model's chat template.

1. `derive` renders two short chats in the template: a question, and the same with an answer and
   another question. Both end with the prompt for the next answer.
2. The opener of a user's message begins with an added token, ends before the message's text, and
   is the shortest one that the longer chat has once for each question.
3. That of an answer ends where the prompt for an answer differs from the same answer in the longer
   chat: a template that opens the thinking of a new answer, and drops it later, differs there.
4. The ids next to a message's text may depend on the text. So this is done for several texts, and
   the beginnings that all openers have in common are kept.
5. `places` finds the openers in the ids of a prompt.

An opener without an added token is not looked for: a message could have the same text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tokcache._prefix import n_common
from tokcache.errors import InvalidConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

# How texts may begin: a letter of either case, a digit, a bracket.
_BEGINNINGS = ("Where", "the", "7 of", "[1]")
_N_QUESTIONS = 2  # of the longer chat, and as many answers


class Places(NamedTuple):
    """Where later prompts of the same chat are likely to part from a prompt.

    Units: tokens, 0 for none. From `answer` on, the prompt for an answer may be written otherwise
           once it is answered. `question` is the end of the last question if answers follow it,
           else its beginning. `opening` is the end of the first question.
    """

    answer: int = 0
    question: int = 0
    opening: int = 0


class Openers(NamedTuple):
    """The ids that open a user's message and an answer."""

    user: tuple[int, ...]
    assistant: tuple[int, ...]

    def places(self, ids: NDArray[np.int32]) -> Places:
        """Return where later prompts are likely to part from the prompt `ids`."""
        answers, questions = _ends(ids, self.assistant), _ends(ids, self.user)
        if not len(answers):
            return Places()
        if not len(questions):
            return Places(int(answers[-1]))
        opening = answers[answers > questions[0]][:1]
        following = answers[answers > questions[-1]]
        question = following[0] if len(following) > 1 else questions[-1]
        return Places(int(answers[-1]), int(question), int(opening.sum()))


def _ends(ids: NDArray[np.int32], opener: tuple[int, ...]) -> NDArray[np.int64]:
    """Return the positions after each occurrence of `opener`."""
    starts = np.flatnonzero(ids[: max(len(ids) - len(opener) + 1, 0)] == opener[0])
    for at, token in enumerate(opener[1:], 1):
        starts = starts[ids[starts + at] == token]
    return starts + len(opener)


def derive(
    render: Callable[[list[dict[str, str]]], str],
    encode: Callable[[str], list[int]],
    is_added: Callable[[int], bool],
) -> Openers | None:
    """Return the openers of a template; None if its messages do not open with added tokens.

    `render` returns the text of a chat and the prompt for the next answer, `encode` the text's ids.

    Errors: those of `render`.
    """
    users, assistants, probes = [], [], []
    for word in _BEGINNINGS:
        question, answer, other = f"{word} alpha one", f"{word} beta two", f"{word} gamma three"
        thinking = {"role": "assistant", "content": answer, "reasoning_content": f"{word} delta"}
        chat = [{"role": "user", "content": question}]
        asked = render(chat)
        longer = render([*chat, thinking, {"role": "user", "content": other}])
        if question not in asked or other not in longer:
            return None
        ids, probe = encode(asked), encode(longer)
        n_before_other = n_common(encode(longer[: longer.index(other)]), probe)
        users.append(_shortest(probe[:n_before_other], probe, is_added))
        n_question = n_common(encode(asked[: asked.index(question) + len(question)]), ids)
        opening = ids[n_question : n_common(ids, probe)]
        # If all messages begin with one token, an answer does, too: it may have other added tokens.
        if users[-1] and users[-1][0] in opening:
            opening = opening[len(opening) - 1 - opening[::-1].index(users[-1][0]) :]
            assistants.append(tuple(opening))
        else:
            assistants.append(_shortest(opening, probe, is_added))
        probes.append(np.array(probe, np.int32))
    openers = Openers(_common(users), _common(assistants))
    is_right = all(openers) and all(
        len(_ends(probe, opener)) == _N_QUESTIONS for probe in probes for opener in openers
    )
    return openers if is_right else None


def _shortest(ids: list[int], probe: list[int], is_added: Callable[[int], bool]) -> tuple[int, ...]:
    """Return the shortest end of `ids` that begins with an added token.

    `probe` must have it once for each question; empty if there is none.
    """
    whole = np.array(probe, np.int32)
    for at in reversed(range(len(ids))):
        opener = tuple(ids[at:])
        if is_added(opener[0]) and len(_ends(whole, opener)) == _N_QUESTIONS:
            return opener
    return ()


def _common(openers: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the beginning that all have in common."""
    first, *others = openers
    return first[: min(n_common(first, each) for each in others)]


def encoded(
    texts: Mapping[str, str], encode: Callable[[str], list[int]], is_added: Callable[[int], bool]
) -> Openers:
    """Return the openers with these texts, by role.

    Errors: InvalidConfig.
    """
    openers = Openers(*(tuple(encode(texts[role])) for role in Openers._fields))
    for role, opener in zip(Openers._fields, openers, strict=True):
        if not any(map(is_added, opener)):
            raise InvalidConfig(
                f"message_openers[{role!r}] has none of the tokenizer's added tokens; leave "
                "message_openers out, and states are saved at multiples of block_tokens"
            )
    return openers


def checked_openers(texts: Mapping[str, str] | None) -> dict[str, str] | None:
    """Return a copy of `message_openers`.

    Errors: InvalidConfig.
    """
    if texts is None:
        return None
    is_right = isinstance(texts, dict) and set(texts) == {*Openers._fields}
    if not is_right or not all(isinstance(text, str) and text for text in texts.values()):
        raise InvalidConfig(
            'message_openers must be {"user": text, "assistant": text}, the texts that open a '
            f"message, not {texts!r}"
        )
    return dict(texts)
