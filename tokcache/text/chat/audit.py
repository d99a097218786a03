"""Tries whether a chat template is append-only: each prompt begins with all that a server holds.

For each answer of a made-up chat (`conversations`):

1. The prompt is the rendering of the messages before the answer, with a generation prompt.
2. The answer is written as the template itself writes it when it is the last message, with the text
   as the model wrote it, up to the end-of-turn token. Prompt and answer are what a server holds.
3. The next prompt is the rendering with the answer and the messages that follow it. It must begin
   with the held text, and its ids with the held ids; else the rest is computed again.

A case that breaks is tried again with each switch of the template: `find_switches` has the names
and values, and a switch is named only if it helped.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tokcache._prefix import n_common
from tokcache.errors import RenderingFailed
from tokcache.text.chat.conversations import FIXED_TEXT, Case, Mode, Step, all_cases, as_lists
from tokcache.text.chat.process import CLOCK, TemplateProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tokcache._prefix import Sliceable
    from tokcache.text.chat.proof import Proof

_MINUTE, _DAY = dt.timedelta(seconds=61), dt.timedelta(hours=25)
_END = re.compile(r"\s*(?:<[^<>\s]+>|\[[^\[\]\s]+\])")
_BEFORE, _AFTER = 40, 60  # characters of an excerpt
_LESS = 0.9  # a cost below this share of the former one is called less


class Verdict(StrEnum):
    """The outcome of a case."""

    APPEND_ONLY = "append-only"
    END_TOKEN = "end token"  # noqa: S105 (append-only, but for the token that ends an answer)
    BREAKS = "breaks"
    LEFT_OUT = "left out"  # the template does not write the messages' texts
    REFUSED = "refused"
    FAILED = "failed"
    STOPPED = "stopped"


_GOOD = {Verdict.APPEND_ONLY, Verdict.END_TOKEN}


@dataclass(frozen=True, slots=True)
class Break:
    """A place where the next prompt differs from the held text.

    `message` is the position of the first message that is written otherwise. `place` is `prompt` if
    it lies before the answer, `answer`, or `ids` if the texts agree and the ids do not.

    Units: `n_again` of `n_held` are tokens of the held text that are computed again, or characters
           without a tokenizer.
    """

    turn: int
    message: int
    role: str
    place: str
    n_again: int
    n_held: int
    shared: str
    held: str
    rendered: str


@dataclass(frozen=True, slots=True)
class CaseResult:
    """The outcome of a case; `reason` is the template's error, or the texts that it leaves out.

    Units: `n_again` and `n_prompt` are sums over the chat, as in Break.
    """

    name: str
    title: str
    verdict: Verdict
    reason: str | None = None
    n_turns: int = 0
    n_again: int = 0
    n_prompt: int = 0
    breaks: tuple[Break, ...] = ()

    @property
    def share(self) -> float:
        """The share of all prompts that is computed again although it was held."""
        return self.n_again / self.n_prompt if self.n_prompt else 0.0


@dataclass(frozen=True, slots=True)
class Cure:
    """A switch that was tried and helped; names are those of cases.

    `lessens` has the former and the new `n_again`. `breaks` are cases that were append-only without
    the switch, and are not with it.
    """

    switch: str
    value: str | float | bool | None
    cures: tuple[str, ...]
    lessens: tuple[tuple[str, int, int], ...]
    breaks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TemplateAudit:
    """The outcome of all cases of one template.

    Units: costs are in `unit`: tokens, or characters without a tokenizer. `n_compared` renderings
           were encoded by the plain tokenizer too, and `n_different` had other ids.
    """

    name: str
    n_chars: int
    compiled_by: str
    proof: Proof
    unit: str
    cases: tuple[CaseResult, ...]
    switches: tuple[str, ...]
    cures: tuple[Cure, ...]
    n_compared: int = 0
    n_different: int = 0

    @property
    def broken(self) -> tuple[CaseResult, ...]:
        """The cases that are not append-only."""
        return tuple(case for case in self.cases if case.verdict is Verdict.BREAKS)

    @property
    def is_rendered(self) -> bool:
        """Whether at least one case was rendered and compared."""
        return any(case.verdict in {*_GOOD, Verdict.BREAKS} for case in self.cases)

    @property
    def is_append_only(self) -> bool:
        """Whether no case breaks, and at least one was rendered."""
        return self.is_rendered and not self.broken

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as a dict that JSON can hold."""
        return {**asdict(self), "append_only": self.is_append_only}


@dataclass(frozen=True, slots=True)
class Encoder:
    """The ids of a text by the wrapped and by the plain tokenizer, without added special tokens."""

    cached: Callable[[str], Sliceable]
    plain: Callable[[str], Sliceable]


@dataclass(frozen=True, slots=True)
class _Held:
    """A server's text after an answer: the prompt, all but the end-of-turn token, and all."""

    prompt: str
    text: str
    ended: str


@dataclass(slots=True)
class _Auditor:
    """Renders the cases of one template and compares their renderings."""

    process: TemplateProcess
    template: str
    encoder: Encoder | None
    variables: Mapping[str, Any] = field(default_factory=dict)
    end: str = ""
    n_compared: int = 0
    n_different: int = 0
    known: dict[str, str] = field(default_factory=dict)
    ids_of: dict[str, Sliceable] = field(default_factory=dict)

    # ---- renderings

    def render(
        self,
        case: Case,
        messages: Sequence[Mapping[str, Any]],
        *,
        prompts: bool,
        clock: dt.datetime = CLOCK,
    ) -> str:
        """Return a rendering, from the earlier ones if they have it.

        Errors: RenderingFailed.
        """
        key = json.dumps([messages, case.tools, prompts, clock.isoformat()])
        if key not in self.known:
            self.known[key] = self.process.render(
                messages,
                tools=case.tools or None,
                add_generation_prompt=prompts,
                variables=self.variables,
                clock=clock,
            )
        return self.known[key]

    def ids(self, text: str) -> Sliceable:
        """Return the ids of a text, or the text itself without a tokenizer."""
        if self.encoder is None:
            return text
        if text not in self.ids_of:
            found = self.ids_of[text] = self.encoder.cached(text)
            self.n_compared += 1
            self.n_different += list(found) != list(self.encoder.plain(text))  # type: ignore[call-overload]
        return self.ids_of[text]

    def learn_end(self, plain: Case) -> None:
        """Learn the token that ends an answer, from an answer that is the last message."""
        step = plain.steps[1]
        try:
            rendered = self.render(plain, [plain.steps[0].sent, step.sent], prompts=False)
        except RenderingFailed:
            return
        _, found, rest = rendered.rpartition(step.marks[-1])
        matched = _END.match(rest) if found else None
        self.end = matched[0].strip() if matched else ""

    def held(self, case: Case, index: int) -> _Held:
        """Return the server's text after the answer at `index`.

        Errors: RenderingFailed, with the kind LEFT_OUT if the template does not write the answer.
        """
        step = case.steps[index]
        before = [each.sent for each in case.steps[:index]]
        prompt = self.render(case, before, prompts=True)
        try:
            alone = self.render(case, [*before, step.clean or step.sent], prompts=False)
        except RenderingFailed:
            # A template may take arguments as a string only.
            if step.clean in (None, step.sent):
                raise
            alone = self.render(case, [*before, step.sent], prompts=False)
        missing = [mark for mark in step.marks if mark not in alone]
        thought = step.sent.get("reasoning_content")
        # Some templates drop the thinking even of the last answer, although their models think.
        is_dropped = missing == [thought] and "</think>" in self.template
        if missing and (not is_dropped or "tool_calls" in step.sent):
            raise RenderingFailed(Verdict.LEFT_OUT, _kind_of(step, missing))
        tail = alone[n_common(prompt, alone) :]
        stop = max(_end_of(step, tail), 0)
        at = tail.find(self.end, stop) if step.marks else tail.rfind(self.end)
        if not self.end or at < 0:
            answer, end = tail[:stop] + tail[stop:].rstrip(), ""
        else:
            answer, end = tail[:at], self.end
        lead, found, rest = answer.rpartition(step.marks[-1] if step.marks else "\0")
        if step.thinking is not None or is_dropped:
            opener = "" if prompt.rstrip().endswith("<think>") else "<think>\n"
            thinking = f"{opener}{step.thinking or thought}\n</think>\n\n"
            answer = ("" if "think>" in lead or not opener else lead) + thinking + found + rest
        elif step.generated is not None:
            answer = lead + step.generated + rest
        return _Held(prompt, prompt + answer, prompt + answer + end)

    # ---- cases

    def try_case(self, case: Case) -> CaseResult:
        """Return the outcome of a case, or of the first of its variants that is rendered."""
        first = None
        for each in (case, *case.variants):
            try:
                return self._tried(each)
            except RenderingFailed as error:
                found = CaseResult(case.name, case.title, Verdict(error.kind), error.reason)
                first = first or found
                if found.verdict is Verdict.STOPPED:
                    return found
        assert first is not None  # noqa: S101 (there is at least the case itself)
        return first

    def _tried(self, case: Case) -> CaseResult:
        compared = {
            Mode.TURNS: self._turns,
            Mode.CLOCK: self._a_day_later,
            Mode.CONTINUE: self._continued,
            Mode.NO_PROMPT: self._without_prompts,
        }
        turns = compared[case.mode](case)
        self._require_texts(case)
        breaks, n_prompt, is_ended = [], 0, True
        for turn, (index, held, rendered) in enumerate(turns, start=1):
            n_prompt += len(self.ids(rendered))
            found = self._compare(case, turn, index, held, rendered)
            if isinstance(found, Break):
                breaks.append(found)
            else:
                is_ended &= found
        verdict = Verdict.APPEND_ONLY if is_ended else Verdict.END_TOKEN
        reason = None
        if breaks:
            verdict = Verdict.BREAKS
            reason = self._why_changing(case) if case.mode is Mode.CLOCK else None
        n_again = sum(each.n_again for each in breaks)
        return CaseResult(
            case.name, case.title, verdict, reason, len(turns), n_again, n_prompt, tuple(breaks)
        )

    def _turns(self, case: Case) -> list[tuple[int, _Held, str]]:
        """Return the held text and the next prompt of each answer."""
        answers = case.answers
        turns = []
        for index, following in zip(answers, [*answers[1:], len(case.steps)], strict=True):
            messages = [step.sent for step in case.steps[:following]]
            rendered = self.render(case, messages, prompts=True)
            turns.append((index, self.held(case, index), rendered))
        return turns

    def _a_day_later(self, case: Case) -> list[tuple[int, _Held, str]]:
        """Return the prompt of each answer with the same prompt a day later."""
        turns = []
        for index in case.answers:
            messages = [step.sent for step in case.steps[:index]]
            now = self.render(case, messages, prompts=True)
            later = self.render(case, messages, prompts=True, clock=CLOCK + _DAY)
            turns.append((index, _Held(now, now, now), later))
        return turns

    def _continued(self, case: Case) -> list[tuple[int, _Held, str]]:
        """Return half of each answer with the prompt that continues it, and then the whole one."""
        turns = []
        for index in case.answers:
            step = case.steps[index]
            text = step.marks[-1]
            # A model stops between two tokens, and a word begins with its space.
            half = text[: text.index(" ", len(text) // 2)]
            before = [each.sent for each in case.steps[:index]]
            held = self.held(case, index)
            listed = [{"type": "text", "text": half}]
            content = listed if isinstance(step.sent["content"], list) else half
            last = self.render(case, [*before, {**step.sent, "content": content}], prompts=False)
            if half not in last:
                raise RenderingFailed(Verdict.LEFT_OUT, "half an answer")
            # transformers cuts the rendering after the content of the last message.
            cut = last[: last.rindex(half) + len(half)]
            written = held.text[: held.text.rindex(text) + len(half)]
            turns.append((index, _Held(held.prompt, written, written), cut))
            rest = held.ended[held.ended.rindex(text) + len(half) :]
            whole = _Held(cut, cut + rest.removesuffix(self.end), cut + rest)
            messages = [each.sent for each in case.steps[: index + 2]]
            turns.append((index, whole, self.render(case, messages, prompts=True)))
        return turns

    def _without_prompts(self, case: Case) -> list[tuple[int, _Held, str]]:
        """Return each chat that ends with an answer, with the next one.

        A generation prompt must be an addition to the chat, so the first is a chat without one
        and the same with one.
        """
        first = [case.steps[0].sent]
        without = self.render(case, first, prompts=False)
        pairs = [(0, without, self.render(case, first, prompts=True))]
        answers = case.answers
        for index, following in pairwise(answers):
            messages = [step.sent for step in case.steps[: index + 1]]
            longer = [step.sent for step in case.steps[: following + 1]]
            alone = self.render(case, messages, prompts=False)
            pairs.append((index, alone, self.render(case, longer, prompts=False)))
        stops = [_end_of(case.steps[index], alone) for index, alone, _ in pairs]
        return [
            (index, _Held("", alone[:stop], alone), longer)
            for (index, alone, longer), stop in zip(pairs, stops, strict=True)
        ]

    def _require_texts(self, case: Case) -> None:
        """Refuse a case some of whose texts the template does not write."""
        messages = [step.sent for step in case.steps]
        rendered = self.render(case, messages, prompts=True)
        for step in case.steps:
            if step.role != "assistant" and any(mark not in rendered for mark in step.marks):
                raise RenderingFailed(Verdict.LEFT_OUT, _kind_of(step, step.marks))
        if (
            case.tools
            and case.tools[0]["function"]["name"]
            not in rendered.partition(
                next(mark for step in case.steps if step.role == "assistant" for mark in step.marks)
            )[0]
        ):
            raise RenderingFailed(Verdict.LEFT_OUT, "tools")
        if case.has_images:
            parts = messages[0]["content"]
            text_alone = {**messages[0], "content": [part for part in parts if "text" in part]}
            one, other = (
                self.render(case, [message], prompts=True) for message in (messages[0], text_alone)
            )
            if one == other:
                raise RenderingFailed(Verdict.LEFT_OUT, "images")

    def _why_changing(self, case: Case) -> str:
        messages = [step.sent for step in case.steps[:2]]
        now, soon = (
            self.process.render(
                messages,
                tools=case.tools or None,
                variables=self.variables,
                clock=clock,
            )
            for clock in (CLOCK, CLOCK + _MINUTE)
        )
        again = self.process.render(
            messages, tools=case.tools or None, variables=self.variables, clock=CLOCK
        )
        if now != again:
            return "two renderings of one chat differ at the same time"
        return (
            "the clock: it changes every minute" if now != soon else "the clock: it changes daily"
        )

    # ---- comparison

    def _compare(
        self, case: Case, turn: int, index: int, held: _Held, rendered: str
    ) -> Break | bool:
        """Return where `rendered` leaves the held text; if nowhere, whether the end agrees."""
        at = n_common(held.ended, rendered)
        before, ids, next_ids = map(self.ids, (held.prompt, held.ended, rendered))
        common = n_common(ids, next_ids)
        is_merged = n_common(before, ids) < len(before)
        if is_merged:
            # Prompt and answer, encoded as one text, have a token across both; held are two.
            common = min(common, n_common(before, next_ids))
        n_again = len(ids) - common
        is_ended = at == len(held.ended)
        # A server need not hold the last token, so a difference in it alone costs nothing.
        n_end = len(ids) if is_ended else len(self.ids(held.ended[len(held.text) :]))
        if at >= len(held.text) and (n_again == 0 or (not is_ended and n_again <= n_end)):
            return is_ended
        if at >= len(held.text):
            place, message = "ids", index
            at = len(held.prompt if is_merged else held.text)
        else:
            place = "prompt" if at < len(held.prompt) else "answer"
            message = next(
                (
                    number
                    for number, step in enumerate(case.steps[:index])
                    if _end_of(step, held.ended) > at
                ),
                index,
            )
        return Break(
            turn,
            message,
            case.steps[message].role,
            place,
            n_again,
            len(ids),
            held.ended[max(0, at - _BEFORE) : at],
            held.ended[at : at + _AFTER],
            rendered[at : at + _AFTER],
        )


def _end_of(step: Step, text: str) -> int:
    return max((text.rfind(mark) + len(mark) for mark in step.marks if mark in text), default=-1)


def _kind_of(step: Step, missing: Sequence[str]) -> str:
    """Return the name of the texts of a message, for a reason."""
    if step.role == "assistant":
        if list(missing) == [step.sent.get("reasoning_content")]:
            return "thinking"
        return "tool calls" if "tool_calls" in step.sent else "answers"
    return {"system": "a system prompt", "tool": "tool results"}.get(step.role, "users' texts")


# ---- the whole audit


def audit_template(
    name: str,
    template: str,
    *,
    variables: Mapping[str, Any] | None = None,
    encoder: Encoder | None = None,
    by_transformers: bool = False,
    cases: Sequence[Case] | None = None,
    open_process: Callable[..., TemplateProcess] = TemplateProcess,
) -> TemplateAudit:
    """Try every case with a template, and every switch on the cases that break.

    `variables` are those that each rendering passes, such as `bos_token`.

    Errors: InvalidTemplate if the template can't be compiled; MissingExtra without jinja2.
    """
    with open_process(template, variables or {}, by_transformers=by_transformers) as process:
        from tokcache.text.chat.proof import prove_append_only  # noqa: PLC0415 (needs jinja2)

        auditor = _Auditor(process, template, encoder)
        chosen = list(all_cases() if cases is None else cases)
        plain = next((case for case in chosen if case.name == "plain"), all_cases()[0])
        if _takes_only_lists(auditor, plain):
            chosen, plain = [as_lists(case) for case in chosen], as_lists(plain)
        auditor.learn_end(plain)
        results = tuple(auditor.try_case(case) for case in chosen)
        return TemplateAudit(
            name,
            len(template),
            process.compiled_by,
            prove_append_only(template),
            "characters" if encoder is None else "tokens",
            results,
            tuple(process.switches),
            tuple(_cures(auditor, chosen, results, plain)),
            auditor.n_compared,
            auditor.n_different,
        )


def _takes_only_lists(auditor: _Auditor, plain: Case) -> bool:
    """Return whether a user's text is written only if its content is a list of parts."""

    def is_written(case: Case) -> bool:
        try:
            rendered = auditor.render(case, [case.steps[0].sent], prompts=True)
        except RenderingFailed:
            return False
        return case.steps[0].marks[0] in rendered

    return not is_written(plain) and is_written(as_lists(plain))


def _cures(
    auditor: _Auditor, cases: Sequence[Case], results: Sequence[CaseResult], plain: Case
) -> list[Cure]:
    """Try the broken cases again with each value of each switch, and return those that helped."""
    names = {case.name for case in cases}
    tried = [pair for pair in zip(cases, results, strict=True) if pair[0].same_as not in names]
    broken = [(case, result) for case, result in tried if result.verdict is Verdict.BREAKS]
    found: list[Cure] = []
    is_clock = any(case.mode is Mode.CLOCK for case, _ in broken)
    for switch, values in auditor.process.switches.items() if broken else ():
        for value in values:
            if value == FIXED_TEXT and not is_clock:
                continue
            trial = _Auditor(auditor.process, auditor.template, auditor.encoder, {switch: value})
            trial.ids_of = auditor.ids_of
            trial.learn_end(plain)
            cured, lessened = [], []
            for case, before in broken:
                after = trial.try_case(case)
                if after.verdict in _GOOD:
                    cured.append(case.name)
                elif after.verdict is Verdict.BREAKS and after.n_again < before.n_again * _LESS:
                    lessened.append((case.name, before.n_again, after.n_again))
            if not cured and not lessened:
                continue
            harmed = [
                case.name
                for case, before in tried
                if before.verdict in _GOOD and trial.try_case(case).verdict not in _GOOD
            ]
            cure = Cure(switch, value, tuple(cured), tuple(lessened), tuple(harmed))
            # Another value of the switch that does the same says nothing more.
            same = (cure.switch, cure.cures, cure.breaks)
            is_known = same in {(each.switch, each.cures, each.breaks) for each in found}
            if not is_known and (cured or not harmed):
                found.append(cure)
    return sorted(found, key=lambda cure: (-len(cure.cures), len(cure.breaks), cure.switch))


def n_by_verdict(audit: TemplateAudit) -> Counter[Verdict]:
    """Return the number of cases with each verdict."""
    return Counter(case.verdict for case in audit.cases)
