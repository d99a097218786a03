"""The memory of generated ids: its budget, its scopes, and where it looks for an answer."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from tokcache.llama.answers import Added, Answers, Splice

Ids = NDArray[np.int32]
# Ids below 128 are the bytes of their text, 200 and above are added tokens, 150 is "ab".
END, PAIR = 200, 150
_IS_ADDED = np.arange(256) >= END
ADDED = Added(_IS_ADDED, _IS_ADDED)


@dataclass
class Work:
    is_void: bool = False


def ids(*parts: bytes | int) -> Ids:
    found = [each for part in parts for each in ([part] if isinstance(part, int) else part)]
    return np.array(found, np.int32)


def text(tokens: Ids) -> bytes:
    return b"".join(b"ab" if each == PAIR else bytes([each % 256]) for each in tokens.tolist())


def splice(answers: Answers, scope: str | None, prompt: Ids) -> Splice:
    steps = answers.splice(scope, prompt, ADDED)
    try:
        asked = next(steps)
        while True:
            asked = steps.send(text(asked))
    except StopIteration as stop:
        found: Splice = stop.value
        return found


def remember(answers: Answers, prompt: Ids, answer: Ids, scope: str = "a") -> None:
    answers.remember(answers.begin(scope, prompt), answer)


def test_answers_of_all_turns_are_spliced_and_each_looks_after_the_one_before() -> None:
    answers, prompt = Answers(), ids(b"question", END)
    plain = prompt.copy()
    for turn in range(5):
        answer = ids(b"x" * turn, PAIR, b"!")
        found = splice(answers, "a", plain)
        assert found.ids.tolist() == prompt.tolist()
        assert found.n_spliced == sum(n + 2 for n in range(turn))
        remember(answers, prompt, answer)
        more = ids(END, b"more", END)
        prompt = np.concatenate((prompt, answer, more))
        plain = np.concatenate((plain, ids(b"x" * turn, b"ab!"), more))
    assert text(prompt) == text(plain)
    assert len(answers) == 5


def test_the_newest_of_several_answers_with_the_same_text_is_taken() -> None:
    answers, prompt = Answers(), ids(b"q", END)
    for answer in (ids(PAIR, PAIR), ids(b"no"), ids(b"ab", PAIR)):
        remember(answers, prompt, answer)
    found = splice(answers, "a", np.concatenate((prompt, ids(b"abab", END))))
    assert found.ids.tolist() == [*prompt, *b"ab", PAIR, END]
    # The ids may be those of the text already: nothing takes their place.
    assert splice(answers, "a", np.concatenate((prompt, ids(b"no", END)))).n_spliced == 0


def test_an_id_outside_the_tables_counts_as_added_but_ends_no_answer() -> None:
    answers, prompt = Answers(), ids(b"q", END)
    remember(answers, prompt, ids(PAIR))
    found = splice(answers, "a", np.concatenate((prompt, ids(b"ab", 300))))
    assert (found.n_spliced, found.refusal) == (0, "splice_no_added_token_follows")
    remember(answers, ids(b"r", END), ids(PAIR, 300))
    found = splice(answers, "a", ids(b"r", END, b"ab", END))
    assert (found.n_spliced, found.refusal) == (0, "splice_added_token")


def test_bytes_that_are_not_known_exactly_are_not_compared() -> None:
    answers, prompt = Answers(), ids(b"q", END)
    remember(answers, prompt, ids(PAIR))
    steps = answers.splice("a", np.concatenate((prompt, ids(b"ab", END))), ADDED)
    next(steps)
    steps.send(b"ab")
    with pytest.raises(StopIteration) as stopped:
        steps.send(None)
    assert stopped.value.value[1:] == (0, "splice_partial_character")


def test_the_budget_counts_every_answer_and_the_least_used_go_first() -> None:
    answers, rng = Answers(20_000), random.Random(5)
    first = ids(b"first", END)
    remember(answers, first, ids(PAIR))
    for n in range(300):
        prompt = np.array(rng.choices(range(100), k=rng.randint(1, 40)), np.int32)
        remember(
            answers, prompt, np.array(rng.choices(range(100), k=rng.randint(1, 300)), np.int32)
        )
        assert answers.n_bytes <= 20_000
        if n % 5 == 0:  # used: it stays
            assert splice(answers, "a", np.concatenate((first, ids(b"ab", END)))).n_spliced == 1
    assert 10 < len(answers) < 50
    n_before = len(answers)
    remember(answers, first, np.zeros(10_000, np.int32))  # over the budget: evicts nothing
    assert len(answers) == n_before
    assert splice(answers, "a", np.concatenate((first, ids(b"ab", END)))).n_spliced == 1
    answers.clear()
    assert (len(answers), answers.n_bytes) == (0, 0)
    assert not answers._kept.lengths


def test_one_prompt_keeps_a_few_answers() -> None:
    answers, prompt = Answers(), ids(b"q", END)
    for n in range(100):
        remember(answers, prompt, ids(PAIR, n))
    assert len(answers) == 8


def test_scopes_are_apart_and_cleared_alone() -> None:
    answers, prompt = Answers(), ids(b"q", END)
    asked = np.concatenate((prompt, ids(b"ab", END)))
    for scope in ("a", "b"):
        remember(answers, prompt, ids(PAIR), scope)
    assert splice(answers, "c", asked).refusal == "splice_no_answer"
    assert splice(answers, None, asked).refusal == "splice_no_answer"
    remember(answers, prompt, ids(PAIR, PAIR), "a")  # waits to be stored
    begun = {scope: answers.begin(scope, ids(b"r", END)) for scope in ("a", "b")}
    answers.clear(lambda scope: scope == "a")
    assert splice(answers, "a", asked).n_spliced == 0
    assert splice(answers, "b", asked).n_spliced == 1
    for scope, each in begun.items():  # these were being generated
        answers.remember(each, ids(PAIR))
        found = splice(answers, scope, ids(b"r", END, b"ab", END))
        assert found.n_spliced == (scope == "b")


@pytest.mark.parametrize("is_stored", [True, False], ids=["stored", "waiting"])
def test_answers_of_a_scope_that_was_cleared_are_dropped(is_stored: bool) -> None:
    answers, prompt, work = Answers(), ids(b"q", END), Work()
    asked = np.concatenate((prompt, ids(b"ab", END)))
    answers.remember(answers.begin("a", prompt, work), ids(PAIR))
    answers.remember(answers.begin("b", prompt, Work()), ids(PAIR))
    if is_stored:
        assert splice(answers, "a", asked).n_spliced == 1
    work.is_void = True
    assert splice(answers, "b", asked).n_spliced == 1
    assert len(answers) == 1
    answers.remember(answers.begin("a", prompt, work), ids(PAIR))  # it began before the clear
    assert splice(answers, "a", asked).refusal == "splice_no_answer"
    answers.remember(answers.begin("a", prompt, Work()), ids(PAIR))
    assert splice(answers, "a", asked).n_spliced == 1


def test_threads_remember_splice_and_clear_at_once() -> None:
    answers, errors = Answers(8_000), list[BaseException]()

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(300):
                prompt = ids(bytes(rng.choices(b"pq", k=rng.randint(1, 4))), END)
                remember(answers, prompt, ids(PAIR), rng.choice("ab"))
                found = splice(answers, "a", np.concatenate((prompt, ids(b"ab", END))))
                assert text(found.ids) == text(prompt) + b"ab" + bytes([END])
                if rng.random() < 0.05:
                    answers.clear(lambda scope: scope == "a")
        except BaseException as error:  # noqa: BLE001 (shown by the test)
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert answers.n_bytes <= 8_000
