"""The cache of rendered chats against transformers: chats that grow, fork and are edited."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import tokcache
from tests.machines import assert_fails, effort
from tests.text.implementations import implementation
from tests.text.test_rendered_chats import CHATML, TOOL, check_tree, plain_tokenizer, text_of
from tokcache.text.chat import running
from tokcache.text.chat.cache import RenderCache
from tokcache.text.chat.tree import ChatTree, Node, Root

if TYPE_CHECKING:
    from tests.text.drawn_chats import Message

LAST = "{% for m in messages %}{{ m.role }}{{ m.content }}{{ 'last' if loop.last }}{% endfor %}"
AHEAD = (
    "{% for m in messages %}{{ m.content }}"
    "{% if not loop.last and messages[loop.index0 + 1].role == 'tool' %}>{% endif %}{% endfor %}"
)
COUNTED = (
    "{% set s = namespace(n=0) %}{% for m in messages %}{% set s.n = s.n + (m.content|length) %}"
    "{{ s.n }}:{{ m.content }}{% endfor %}{{ s.n }}{{ tools|length if tools }}"
)
FIRST = "{% if messages[0].role == 'system' %}{{ messages[0].content }}|{% endif %}" + CHATML
TEMPLATES = (CHATML, LAST, AHEAD, COUNTED, FIRST)
MESSAGES = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "user", "assistant", "tool"]),
        "content": st.sampled_from(["", "a", "b", "ab" * 40, "\xe9\u6c49\U0001f642", "<|im_end|>"]),
    }
)
SCOPES = st.sampled_from([None, "a", "b"])


class ChatMachine(RuleBasedStateMachine):
    name = "native"

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        implementation(self.name).use(self.patch)

    @initialize(
        template=st.sampled_from(TEMPLATES), max_bytes=st.sampled_from(["9K", "24K", "16M"])
    )
    def make(self, template: str, max_bytes: str) -> None:
        self.plain = plain_tokenizer(template)
        config = tokcache.CacheConfig(render_max_bytes=max_bytes, l1=False)
        self.wrapped = tokcache.wrap(self.plain, config)
        self.chats: list[list[Message]] = [[{"role": "user", "content": "a"}]]
        self.n_calls = 0
        self.used: set[str | None] = set()  # scopes in which a chat was rendered since the clear

    @rule(data=st.data(), more=st.lists(MESSAGES, min_size=1, max_size=3))
    def grow(self, data: st.DataObject, more: list[Message]) -> None:
        """Add messages to a chat; the shorter one stays, and may go on in another way."""
        chat = data.draw(st.sampled_from(self.chats[-6:]))
        self.chats.append([*copy.deepcopy(chat), *more])

    @rule(data=st.data(), message=MESSAGES)
    def edit(self, data: st.DataObject, message: Message) -> None:
        chat = data.draw(st.sampled_from(self.chats[-6:]))
        chat[data.draw(st.integers(0, len(chat) - 1))] = message

    @rule(
        data=st.data(),
        scope=SCOPES,
        has_prompt=st.booleans(),
        has_tools=st.booleans(),
        times=st.integers(1, 3),
    )
    def render(
        self,
        data: st.DataObject,
        scope: str | None,
        has_prompt: bool,
        has_tools: bool,
        times: int,
    ) -> None:
        chat = data.draw(st.sampled_from(self.chats[-6:]))
        kwargs: dict[str, Any] = {"add_generation_prompt": has_prompt}
        kwargs |= {"tools": [TOOL]} if has_tools else {}
        expected = text_of(self.plain, chat, **kwargs)
        for _ in range(times):
            before = self.stats().hit_messages
            assert text_of(self.wrapped.scoped(scope), chat, **kwargs) == expected
            self.n_calls += 1
            if scope not in self.used:
                assert self.stats().hit_messages == before
            self.used.add(scope)

    @rule(scope=SCOPES.filter(lambda scope: scope is not None))
    def clear_scope(self, scope: str) -> None:
        self.wrapped.cache_clear(scope=scope)
        self.used.discard(scope)
        tree = self.wrapped._tokcache.rendered._tree
        assert scope not in {root.scope for root in tree.roots.values()}

    @precondition(lambda self: self.n_calls > 20)
    @rule()
    def clear(self) -> None:
        self.wrapped.cache_clear()
        self.used.clear()
        self.n_calls = 0

    def stats(self) -> Any:
        return self.wrapped.cache_stats().render

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "wrapped"):
            return
        check_tree(self.wrapped)
        stats = self.stats()
        assert "differences" not in stats.refusals
        not_rendered = ("new_template", "failed")
        n_left = sum(stats.refusals.get(reason, 0) for reason in not_rendered)
        assert stats.hits + stats.misses + n_left <= self.n_calls
        assert stats.hit_messages <= stats.messages

    def teardown(self) -> None:
        self.patch.undo()


class ReferenceMachine(ChatMachine):
    name = "reference"


TestNativeMachine = ChatMachine.TestCase
TestNativeMachine.settings = effort(25, 25)
TestReferenceMachine = ReferenceMachine.TestCase
TestReferenceMachine.settings = effort(10, 25)


# ---- planted faults


def test_bytes_that_are_not_given_back_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    remove = ChatTree.remove

    def forgetful(self: ChatTree, node: Node) -> None:
        n_bytes = self.n_bytes
        remove(self, node)
        self.n_bytes = n_bytes - (0 if isinstance(node, Root) else n_bytes - self.n_bytes)

    monkeypatch.setattr(ChatTree, "remove", forgetful)
    assert_fails(ChatMachine)


def test_a_last_message_that_is_taken_for_settled_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def need(self: running.Run, n_messages: int) -> None:
        if n_messages < running.NEVER_SETTLED:
            self.n_needed = max(self.n_needed, n_messages)

    monkeypatch.setattr(running.Run, "need", need)
    assert_fails(ChatMachine)


def test_a_clear_that_leaves_a_tree_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def clear_scope(self: RenderCache, scope: str) -> None:
        for root in [root for root in self._tree.roots.values() if root.scope == scope]:
            if not root.children:
                self._tree.remove(root)

    monkeypatch.setattr(RenderCache, "clear_scope", clear_scope)
    assert_fails(ChatMachine)
