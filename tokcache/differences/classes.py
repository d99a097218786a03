"""The classes of differences between two prompts, each with its cure, and the first difference."""

from __future__ import annotations

import dataclasses
from enum import StrEnum


class DifferenceClass(StrEnum):
    """Why one prompt does not begin with another one."""

    SAME = "same"
    APPENDED = "appended"
    SHORTENED = "shortened"
    DATE = "date_or_clock"
    RANDOM = "uuid_or_random"
    COUNTER = "counter"
    REORDERED = "reordered"
    WHITE_SPACE = "white_space"
    EDITED = "edited"
    DROPPED = "dropped"
    INSERTED = "inserted"
    THINKING = "thinking_dropped"
    ROLE = "role_changed"
    TOOLS = "tools_changed"
    IMAGE = "image_changed"
    SETTINGS = "prompt_settings"
    PARAMETERS = "parameters"
    OTHER_TEXT = "other_text"
    TEMPLATE = "template"
    RE_ENCODING = "re_encoding"

    @property
    def meaning(self) -> str:
        """Return the class as a sentence about the second prompt."""
        return _MEANINGS[self][0]

    @property
    def cure(self) -> str:
        """Return one sentence that says what to change."""
        return _MEANINGS[self][1]

    @property
    def is_reused(self) -> bool:
        """Return whether all of the earlier prompt that the later one needs can be reused."""
        return self in _REUSED


_NOTHING = "Nothing to change."
_MEANINGS = {
    DifferenceClass.SAME: ("Both prompts are equal.", _NOTHING),
    DifferenceClass.APPENDED: ("The second prompt continues the first one.", _NOTHING),
    DifferenceClass.SHORTENED: ("The second prompt is the beginning of the first one.", _NOTHING),
    DifferenceClass.DATE: (
        "A date or a time changed.",
        "Move the date to the end of the last message, or round it to the day.",
    ),
    DifferenceClass.RANDOM: (
        "A random value changed: a UUID, a nonce, a hash or an id.",
        "Leave it out, keep one value for the whole session, or move it to the last message.",
    ),
    DifferenceClass.COUNTER: (
        "A number changed.",
        "Move numbers that change with each request to the end of the last message.",
    ),
    DifferenceClass.REORDERED: (
        "The same JSON keys, tools or lines are in another order.",
        "Write them in one fixed order: sort tools by name and JSON by key.",
    ),
    DifferenceClass.WHITE_SPACE: (
        "Only white space or invisible characters changed.",
        "Send every message exactly as it was sent before: do not trim or reformat it.",
    ),
    DifferenceClass.EDITED: (
        "A text was edited.",
        "Leave earlier messages as they were sent, and put new text into a new message.",
    ),
    DifferenceClass.DROPPED: (
        "Text or messages were dropped.",
        "Keep earlier messages; if the history must be shortened, do it rarely and in large steps.",
    ),
    DifferenceClass.INSERTED: (
        "Text or messages were inserted before earlier ones.",
        "Append new text after all earlier messages.",
    ),
    DifferenceClass.THINKING: (
        "The thinking of an earlier turn was dropped or added.",
        "Send the thinking of earlier turns back as it was, or never send it.",
    ),
    DifferenceClass.ROLE: (
        "The role of a message changed.",
        "Send every message with the role that it had before.",
    ),
    DifferenceClass.TOOLS: (
        "The tools are not the same: one was added, removed or described in other words.",
        "Send one fixed list of tools for the whole session.",
    ),
    DifferenceClass.IMAGE: (
        "An image changed, or was added or removed.",
        "Keep the images of earlier messages, byte for byte.",
    ),
    DifferenceClass.SETTINGS: (
        "A setting changed that chat templates write into the prompt.",
        "Keep this setting for the whole session.",
    ),
    DifferenceClass.PARAMETERS: (
        "Only parameters changed that do not touch the prompt.",
        _NOTHING,
    ),
    DifferenceClass.OTHER_TEXT: (
        "The prompts go on with different texts.",
        "Nothing to change, unless both should be one conversation.",
    ),
    DifferenceClass.TEMPLATE: (
        "The messages are the same, but the chat template renders an earlier turn differently.",
        "Use a template that renders earlier turns as before: see `tokcache explain --chat`.",
    ),
    DifferenceClass.RE_ENCODING: (
        "The generated ids differ from those of their text encoded again.",
        "Pass `splice=True`, or send the next prompt as token ids, the generated ones included.",
    ),
}
_REUSED = {
    DifferenceClass.SAME,
    DifferenceClass.APPENDED,
    DifferenceClass.SHORTENED,
    DifferenceClass.PARAMETERS,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """The first difference between two prompts.

    Units: `position` is the first code point that differs in `before_text` and `after_text`, the
           texts of `field`. [start, before_stop) of the one was replaced by [start, after_stop)
           of the other; `start` is before `position` if a value, such as a date, begins alike.
           `n_shared` is the number of equal code points in
           front of the difference, and `n_lost` of those after it that the earlier prompt holds as
           well: they would have been reused without this difference.
    """

    kind: DifferenceClass
    position: int = 0
    before_stop: int = 0
    after_stop: int = 0
    start: int = 0
    # "" for a plain text, else a path such as "system", "tools[2]" or "messages[3].content[0]".
    field: str = ""
    message: int | None = None
    role: str | None = None
    n_shared: int = 0
    n_lost: int = 0
    # The caller's own texts: they stay out of the repr, which may reach a log.
    before_text: str = dataclasses.field(default="", repr=False)
    after_text: str = dataclasses.field(default="", repr=False)

    @property
    def before(self) -> str:
        """Return the text that was replaced."""
        return self.before_text[self.start : self.before_stop]

    @property
    def after(self) -> str:
        """Return the text in its place."""
        return self.after_text[self.start : self.after_stop]

    @property
    def cure(self) -> str:
        """Return one sentence that says what to change."""
        return self.kind.cure
