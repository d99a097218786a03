"""Openers of messages, and the states that are saved where later prompts part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from tests.integration import chat_templates
from tests.integration.models import keep_logits, llama, store
from tokcache import samples
from tokcache.errors import InvalidConfig
from tokcache.llama.openers import Openers, derive

from llama_cpp.llama_chat_format import Jinja2ChatFormatter  # isort: skip (models skips without it)

if TYPE_CHECKING:
    from collections.abc import Callable

START, END = "<|im_start|>", "<|im_end|>\n"
USER, ASSISTANT = f"{START}user\n", f"{START}assistant\n"
RECURRENT = ("mamba", "mamba2", "lfm2", "falcon-h1", "lfm2-windowed")
BLOCK = 512  # no multiple of it is in these chats: only stops at messages count
LONG = "the import system of Python finds and loads modules " * 3


def tiny() -> tuple[Tokenizer, set[int]]:
    """Return the tiny tokenizer with the added tokens of several templates, and their ids."""
    tokenizer = Tokenizer.from_file(str(samples.tiny_tokenizer()))
    names = (
        "<|start_header_id|> <|end_header_id|> <|eot_id|> [INST] [/INST] </s> <s> "
        "<start_of_turn> <end_of_turn> <|user|> <|assistant|> <|end|> "
        "<\uff5cUser\uff5c> <\uff5cAssistant\uff5c> <\uff5cend\u2581of\u2581sentence\uff5c>"
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names.split()])
    return tokenizer, set(tokenizer.get_added_tokens_decoder())


def derived(template: str) -> Any:
    """Return the texts of a template's openers."""
    tokenizer, added = tiny()
    formatter = Jinja2ChatFormatter(template, "</s>", "<s>")
    found = derive(
        lambda chat: str(formatter(messages=chat).prompt),
        lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids),
        added.__contains__,
    )
    return found and tuple(tokenizer.decode(list(x), skip_special_tokens=False) for x in found)


@pytest.mark.parametrize(
    ("template", "openers"),
    [
        ("CHATML", (USER, ASSISTANT)),
        (
            "LLAMA_3",
            tuple(
                f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant")
            ),
        ),
        ("MISTRAL", ("[INST]", "[/INST]")),
        ("GEMMA", ("<start_of_turn>user\n", "<start_of_turn>model\n")),
        ("PHI_3", ("<|user|>\n", "<|assistant|>\n")),
        ("DEEPSEEK", ("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>")),
    ],
)
def test_the_openers_of_families_are_derived(template: str, openers: tuple[str, str]) -> None:
    found = derived(getattr(chat_templates, template))
    # A space next to the message's text may be one token with it.
    assert found == openers


def test_an_opener_ends_where_thinking_is_opened_and_later_dropped() -> None:
    opened = chat_templates.CHATML.replace("assistant\\n' }}\n", "assistant\\n<think>\\n' }}\n", 1)
    assert opened != chat_templates.CHATML
    assert derived(opened) == (USER, ASSISTANT)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}assistant: ",
        "{% for m in messages %}{{ '<s>' + m.content }}{% endfor %}",  # one opener for both
        "<s>a fixed text",
    ],
)
def test_a_template_without_openers_has_none(template: str) -> None:
    assert derived(template) is None


def test_places_of_a_prompt() -> None:
    openers = Openers(user=(1, 5), assistant=(1, 6))
    ids = [9, 1, 5, 30, 30, 2, 1, 6, 31, 2, 1, 5, 32, 33, 2]
    asked = np.array([*ids, 1, 6], np.int32)
    assert openers.places(asked) == (17, 12, 8)  # the question begins at 12
    tools = np.array([*asked, 34, 2, 1, 7, 35, 2, 1, 6], np.int32)
    assert openers.places(tools) == (25, 17, 8)  # and ends at 17
    assert openers.places(np.array([1, 6], np.int32)) == (2, 0, 0)
    assert openers.places(np.array([1], np.int32)) == (0, 0, 0)
    assert openers.places(np.array([], np.int32)) == (0, 0, 0)


# Decoded tokens


def chat(llm: Any) -> Callable[..., int]:
    """Return a function that asks a prompt, and returns how many tokens of it were decoded."""

    def ask(text: str, n: int = 4) -> int:
        ids = llm.tokenize(text.encode(), add_bos=False, special=True)
        steps = llm.generate(ids, temp=0.0)
        for _ in range(n):
            next(steps)
        steps.close()
        return int(llm.last_reuse.n_decoded)

    return ask


def n_ids(llm: Any, *texts: str) -> int:
    return sum(len(llm.tokenize(text.encode(), add_bos=False, special=True)) for text in texts)


FIRST = f"{START}system\n{LONG}{END}{USER}{LONG}first{END}"
THINKING = f"{ASSISTANT}<think>\n"


@pytest.mark.parametrize("architecture", RECURRENT)
def test_a_prompt_parts_where_thinking_is_dropped(architecture: str) -> None:
    model = samples.tiny_model(architecture=architecture)
    llm = llama(store(block_tokens=BLOCK), model=model)
    ask = chat(llm)
    n_first = ask(FIRST + THINKING)
    assert n_first == n_ids(llm, FIRST, THINKING)
    # The next prompt has the answer without its thinking: it parts after the opener.
    second = f"{LONG}{END}{USER}{LONG}second{END}"
    assert ask(FIRST + ASSISTANT + second + THINKING) == n_ids(llm, second, THINKING)
    # The same question in other words parts at its beginning.
    other = f"other{END}"
    history = f"{FIRST}{ASSISTANT}{LONG}{END}{USER}"
    assert ask(history + other + THINKING) == n_ids(llm, other, THINKING)
    # The same prompt again is decoded from the opener's end.
    assert ask(history + other + THINKING) == n_ids(llm, "<think>\n")
    assert llm.prefix_cache.stats().refusals == {}
    llm.prefix_cache._check()


@pytest.mark.parametrize("architecture", RECURRENT)
def test_logits_after_such_a_restore_are_those_of_an_uncached_run(architecture: str) -> None:
    model = samples.tiny_model(architecture=architecture)
    cached, uncached = llama(store(block_tokens=BLOCK), model=model), llama(model=model)
    for llm in (cached, uncached):
        keep_logits(llm)
    history = f"{FIRST}{ASSISTANT}{LONG}{END}{USER}"
    for text in (
        f"{FIRST}{THINKING}",
        f"{history}one{END}{THINKING}",
        f"{history}two{END}{THINKING}",
    ):
        uncached.reset()
        for llm in (cached, uncached):
            chat(llm)(text)
        first = cached.last_reuse.n_prompt - cached.last_reuse.n_decoded
        n_prompt = cached.last_reuse.n_prompt
        # Other batches change them by up to 0.05, a wrong state by 0.2 to 9.
        worst = np.abs(cached.scores[first:n_prompt] - uncached.scores[first:n_prompt]).max()
        assert worst <= 0.05
    assert cached.last_reuse.n_restored > 2 * len(LONG.split())


def test_a_question_with_tools_is_left_at_its_end() -> None:
    llm = llama(store(block_tokens=BLOCK), model=samples.tiny_model(architecture="lfm2"))
    ask = chat(llm)
    loop = f"<think>\nI need a tool.\n</think>\ncall{END}{START}tool\n{LONG}{END}"
    ask(FIRST + ASSISTANT + loop + THINKING)  # a new process begins in the middle of a loop
    rest = f"call{END}{START}tool\n{LONG}{END}{ASSISTANT}Done.{END}{USER}second{END}"
    n_decoded = ask(FIRST + ASSISTANT + rest + THINKING)
    assert n_decoded == n_ids(llm, rest, THINKING)


def test_without_openers_a_prompt_is_reused_on_the_grid_and_that_is_counted() -> None:
    llm = llama(store(block_tokens=BLOCK), model=samples.tiny_model(architecture="lfm2"))
    llm._states._find_openers = lambda: None
    ask = chat(llm)
    ask(FIRST + THINKING)
    later = FIRST + ASSISTANT + f"An answer.{END}{USER}second{END}" + THINKING
    assert ask(later) == n_ids(llm, later)
    assert ask(later) == 1  # the state before the last token
    assert llm.prefix_cache.stats().refusals == {"openers_unknown": 1}


def test_given_openers_replace_those_of_the_template() -> None:
    texts = {"user": "<|endoftext|>", "assistant": "<|im_start|>"}
    model = samples.tiny_model(architecture="lfm2")
    llm = llama(store(block_tokens=BLOCK), model=model, message_openers=texts)
    ask = chat(llm)
    prompt = f"{LONG}<|endoftext|>{LONG}<|im_start|>"
    ask(prompt + "<think>")
    assert ask(prompt + "other") == n_ids(llm, "other")


@pytest.mark.parametrize(
    ("openers", "message"),
    [
        ({"user": "<|im_start|>user\n"}, "must be"),
        ({"user": "<|im_start|>user\n", "assistant": ""}, "must be"),
        ("<|im_start|>", "must be"),
    ],
)
def test_openers_of_another_shape_are_refused(openers: Any, message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        llama(store(), message_openers=openers)


def test_given_openers_without_added_tokens_are_refused() -> None:
    model = samples.tiny_model(architecture="lfm2")
    with pytest.raises(InvalidConfig, match="added tokens"):
        llama(store(), model=model, message_openers={"user": "User:", "assistant": "Bot:"})


@pytest.mark.parametrize("most", [4, 9])
def test_the_states_of_a_conversation_are_bounded(most: int, tmp_path: Any) -> None:
    cache = store(block_tokens=BLOCK, conversation_snapshots=most, disk=tmp_path)
    llm = llama(cache, model=samples.tiny_model(architecture="lfm2"))
    llm.wait_for_fingerprint()
    ask = chat(llm)
    text = f"{USER}first question{END}"
    for turn in range(8):
        ask(text + THINKING)
        cache.flush()  # a state that waits to be written is not removed
        text += f"{ASSISTANT}The answer of turn {turn} to a question.{END}{USER}{LONG}{END}"
    other = f"{USER}another question{END}{THINKING}"
    ask(other)
    cache.flush()
    stats = cache.stats()
    assert stats.n_states == most + 2  # two of the other conversation
    assert stats.saved_bytes > 0
    assert stats.evictions > 0
    snapshots = cache._store.memory.snapshots
    (root_key,) = {each.root_key for each in snapshots}
    assert cache.disk is not None
    assert cache.disk.lengths(root_key) == snapshots.lengths(root_key)  # files are gone, too
    cache._check()
    llm.close()
    cache.close()
