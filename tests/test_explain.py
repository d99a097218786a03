"""`tokcache explain` for every kind of tokenizer, as text and as JSON, and its proof."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from rich.cells import cell_len
from rich.console import Console
from tokenizers import AddedToken, Regex, pre_tokenizers
from typer.testing import CliRunner

from tests.text.tokenizers_synthetic import RANDOM, SYNTHETIC, plain, precompiled
from tokcache import cli, samples
from tokcache.cli.explain import EngineName
from tokcache.cli.explain_report import print_explanation, visible
from tokcache.cli.explanation import Grain, Origin, explain, read_sample
from tokcache.config import ENGINES, CacheConfig
from tokcache.text import tokenizer as core
from tokcache.text.cuts.char_classes import N_CLASSES
from tokcache.text.cuts.planner import plan_cuts
from tokcache.text.segments import cache as l1
from tokcache.text.token_ids import TokenIds
from tokcache.text.tokenizer import CachedTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from tokcache.cli.explanation import Explanation
    from tokcache.text.cuts.plan import CutPlan

WITHOUT_FAST = CacheConfig(engine="tokenizers")


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["explain", *map(str, arguments)])


def as_json(*arguments: object) -> dict[str, Any]:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def saved(name: str, tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.json"
    (SYNTHETIC | RANDOM)[name]().save(str(path))
    return path


def report(found: Explanation, width: int = 80, **settings: Any) -> str:
    written = io.StringIO()
    console = Console(file=written, width=width, highlight=False, **settings)
    print_explanation(console, found)
    return written.getvalue()


def explained(name: str, text: str | None = None) -> Explanation:
    return explain(SYNTHETIC[name](), WITHOUT_FAST, text)


# ---- text and JSON


def test_the_text_output_shows_whether_texts_are_cached_and_marks_segments() -> None:
    done = run(samples.tiny_tokenizer(), "--engine", "tokenizers")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert "Model:       BPE, 2,048 tokens, 3 of them added" in lines
    assert "Whole texts: cached" in lines
    assert "Segments:    cached" in lines
    assert "Engine:      tokenizers" in lines
    assert "«<|im_start|>»│system│⏎│" in lines
    assert any(line.startswith("You│ are│ a│ careful│ assistant│.│") for line in lines)
    assert "-- chunk 4: " in done.stdout
    # Where chunks end depends on a random secret, so chunk headings may be anywhere.
    marked = "".join(line for line in lines if not line.startswith("-- chunk"))
    assert " like│:␍⏎│1│7│;│3│" in marked
    assert "Identical:   yes, " in done.stdout
    wide = [line for line in lines if cell_len(line.rstrip()) > 80]
    assert all(str(samples.tiny_tokenizer()) in line for line in wide)  # a path is not broken


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "bert_uncased", "deepseek_v3", "llama3"])
def test_segments_of_the_json_output_encoded_one_by_one_give_the_ids_of_the_text(
    name: str, tmp_path: Path
) -> None:
    path = saved(name, tmp_path)
    found = as_json(path, "--engine", "tokenizers")
    text, chunks, segments = (found["sample"][key] for key in ("text", "chunks", "segments"))
    assert "".join(one["text"] for one in segments) == text
    assert "".join(one["text"] for one in chunks) == text
    assert {one["start"] for one in chunks} < {one["start"] for one in segments}
    tokenizer = plain(SYNTHETIC[name])
    alone = [tokenizer.encode(one["text"], add_special_tokens=False).ids for one in segments]
    assert list(chain(*alone)) == tokenizer.encode(text, add_special_tokens=False).ids
    known = {one["content"] for one in found["added_tokens"]}
    assert {one["text"] for one in segments if one["is_token"]} <= known
    assert sum(one["is_token"] for one in segments) == 4
    assert found["identical"] is True


def test_a_folder_stands_for_the_tokenizer_in_it(tmp_path: Path) -> None:
    saved("gpt2", tmp_path)
    assert as_json(tmp_path)["name"] == str(tmp_path)


def test_every_rule_has_its_grain_and_reason() -> None:
    cuts = {cut.name: cut for cut in explained("starcoder").cuts}
    assert cuts["letter, punctuation | whitespace"].grain is Grain.CHUNK
    assert cuts["digit | digit"].grain is Grain.SEGMENT
    assert cuts["digit | digit"].reason == "every digit is a pre-token of its own"
    assert cuts["digit | digit"].left == ("digit",)


def test_a_rule_that_an_added_token_forbids_is_reported() -> None:
    tokenizer = SYNTHETIC["starcoder"]()
    tokenizer.add_tokens([AddedToken("22", single_word=True, normalized=False)])
    found = explain(tokenizer, WITHOUT_FAST, "in 1984 or so")
    cuts = {cut.name: cut for cut in found.cuts}
    assert cuts["digit | digit"].grain is Grain.NONE
    assert cuts["letter, punctuation | whitespace"].grain is Grain.CHUNK
    assert "nothing: added" in report(found)
    assert "in│ │1984│ or│ so│" in report(found)
    assert "in│ │1│9│8│4│ or│ so│" in report(explained("starcoder", "in 1984 or so"))


def test_rules_with_the_same_reason_share_a_row() -> None:
    shown = report(explained("llama2"))
    assert shown.count("no token of the vocabulary") == 2  # for chunks, and for segments alone
    assert "stop | other" in shown  # the last class of the row


def test_a_terminal_gets_colours_and_no_marks() -> None:
    found = explained("gpt2")
    coloured = report(found, force_terminal=True, color_system="truecolor", no_color=False)
    for background in ("48;2;207;232;255m", "48;2;255;233;179m", "48;2;122;62;157m"):
        assert background in coloured
    assert "│" not in coloured
    without = report(found, force_terminal=True, color_system="truecolor", no_color=True)
    assert "│" in without
    assert "48;2" not in without


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_line_of_a_sample_is_wider_than_the_terminal_and_nothing_is_lost(width: int) -> None:
    text = "word " * 30 + "x" * 500 + "\n你好，世界 " * 20  # noqa: RUF001 (Chinese)
    shown = report(explained("gpt2", text), width)
    sample = shown[shown.index("-- chunk 1") : shown.index("Identical")].splitlines()
    assert all(cell_len(line) <= width for line in sample)
    rest = "".join(line for line in sample if not line.startswith("--"))
    assert rest.replace("│", "") == text.replace("\n", "⏎")


def test_a_long_sample_is_shortened_in_the_text_output_but_not_in_json(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("The quick brown fox, 123.\n" * 2000)
    tokenizer = samples.tiny_tokenizer()
    done = run(tokenizer, "--text", path)
    assert "the rest is not shown; --json prints all of it" in done.stdout
    assert len(done.stdout.splitlines()) < 160
    segments = as_json(tokenizer, "--text", path)["sample"]["segments"]
    assert segments[-1]["stop"] == len(path.read_text())


def test_control_characters_are_shown_and_never_reach_the_terminal() -> None:
    shown = report(explained("gpt2", "a\x1b[31mred\x07 \x9b0m \u202eback\u200d"))
    assert not {"\x1b", "\x07", "\x9b", "\u202e", "\u200d"} & set(shown)
    assert "␛" in shown
    assert visible("\t\r\n\x7f") == "␉␍⏎␡"


def test_an_output_without_unicode_gets_escapes() -> None:
    command = [sys.executable, "-m", "tokcache", "explain", str(samples.tiny_tokenizer())]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, check=False, env=environment)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert b"\\u2502" in done.stdout
    assert done.stdout.isascii()
    done = subprocess.run([*command, "--json"], capture_output=True, check=True, env=environment)  # noqa: S603
    assert "谢谢" in json.loads(done.stdout)["sample"]["text"]


# ---- the proof


def test_answers_come_from_the_engine_then_from_segments_then_from_the_whole_text() -> None:
    found = explained("bert_uncased")
    assert [one.origin for one in found.answers] == [
        Origin.ENCODED,
        Origin.PARTS,
        Origin.WHOLE,
        Origin.WHOLE,
    ]
    with_special, without = found.answers[:2]
    assert with_special.n_tokens == without.n_tokens + 2
    assert not found.is_different


def spoil(plan: CutPlan) -> CutPlan:
    everywhere = bytes([1]) * (N_CLASSES * N_CLASSES)
    return replace(plan, coarse=everywhere, fine=everywhere)


def test_a_plan_with_unsafe_cuts_ends_with_exit_code_1(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(core, "plan_cuts", lambda tokenizer: spoil(plan_cuts(tokenizer)))
    tokenizer = samples.tiny_tokenizer()
    done = run(tokenizer, "--engine", "tokenizers")
    assert done.exit_code == 1
    assert "Identical:   NO: id " in done.stdout
    done = run(tokenizer, "--engine", "tokenizers", "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert found["identical"] is False
    assert any(one["difference"] for one in found["answers"])


def test_ids_that_run_across_a_cut_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a text whose chunks are cut wherever it may be " * 99
    assert not explained("llama2", text).is_different
    monkeypatch.setattr(core, "plan_cuts", lambda tokenizer: spoil(plan_cuts(tokenizer)))
    found = explained("llama2", text)
    assert found.is_different
    differences = [one.difference for one in found.answers]
    assert "token ids run across a cut, so the text was encoded whole" in differences


def test_a_wrong_id_ends_with_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    right = CachedTokenizer.miss

    def with_wrong_first_id(self: CachedTokenizer, *asked: Any) -> TokenIds:
        return TokenIds([right(self, *asked)[0] + 1, *right(self, *asked)[1:]])

    monkeypatch.setattr(CachedTokenizer, "miss", with_wrong_first_id)
    done = run(samples.tiny_tokenizer(), "--engine", "tokenizers")
    assert done.exit_code == 1
    assert "Identical:   NO: id 0 is " in done.stdout
    assert " in the plain tokenizer and " in done.stdout


def test_segments_are_proven_even_if_a_fast_engine_does_not_use_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("gigatoken", reason="a fast engine that takes GPT-2")
    tokenizer = samples.tiny_tokenizer()
    found = as_json(tokenizer, "--engine", "gigatoken")
    assert found["engine"] == "gigatoken"
    assert not found["looks_up_segments"]
    assert Counter(one["engine"] for one in found["answers"]) == {"gigatoken": 4, "tokenizers": 4}
    everywhere = bytes([1]) * (N_CLASSES * N_CLASSES)
    monkeypatch.setattr(core, "plan_cuts", lambda t: replace(plan_cuts(t), fine=everywhere))
    found = json.loads(run(tokenizer, "--engine", "gigatoken", "--json").stdout)
    wrong = {one["engine"] for one in found["answers"] if one["difference"]}
    assert wrong == {"tokenizers"}


def test_a_tokenizer_that_cannot_encode_the_sample_is_reported() -> None:
    found = explained("unigram_without_unk")
    assert found.why_not_compared is not None
    assert "can't encode the sample: Encountered an unknown token" in found.why_not_compared
    assert "Identical:   not compared: the plain tokenizer" in report(found)
    assert found.to_dict()["identical"] is None
    assert explained("unigram_without_unk", "the cat").answers


def settings(tokenizer: Tokenizer) -> tuple[Any, ...]:
    return tokenizer.to_str(), tokenizer.encode_special_tokens


@pytest.mark.parametrize("name", ["truncation_padding", "truncation_left", "literal_gpt2"])
def test_a_tokenizer_keeps_its_settings_and_whole_texts_are_compared(name: str) -> None:
    tokenizer = SYNTHETIC[name]()
    before = settings(tokenizer)
    found = explain(tokenizer, WITHOUT_FAST)
    assert settings(tokenizer) == before
    assert not found.is_different
    assert min(one.n_tokens for one in found.answers) > 100


# ---- refusals and reasons


def test_with_an_unknown_pattern_only_cuts_at_added_tokens_remain() -> None:
    tokenizer = SYNTHETIC["kimi"]()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s?(?<!\S)\S+"), "isolated")
    found = explain(tokenizer, WITHOUT_FAST)
    assert found.cuts == ()
    assert found.why_not_parts is None
    (refused,) = found.refused
    assert refused.startswith(
        r"pre-tokenizer Split by '\s?(?<!\S)\S+': look-behind at character 3: cuts at added"
    )
    shown = report(found)
    assert "Segments:    cached, but cut at added tokens only" in shown
    assert "Refused:     pre-tokenizer Split by" in shown
    assert len(found.sample.segments) == 8


def test_texts_that_can_not_be_cut_are_cached_whole_and_the_reason_is_shown() -> None:
    found = explained("one_letter_gpt2")
    assert found.why_not_whole is None
    assert found.why_not_parts == "added tokens of the two phases may overlap"
    assert found.engine is None
    assert {one.origin for one in found.answers} == {Origin.ENCODED, Origin.WHOLE}
    shown = report(found)
    assert "Whole texts: cached\n" in shown
    assert f"Segments:    not cached: {found.why_not_parts}\n" in shown
    assert "Sample:" not in shown
    assert found.to_dict()["sample"]["why_uncut"]


def test_nothing_is_cut_without_rules_and_added_tokens() -> None:
    tokenizer = SYNTHETIC["kimi"]()
    tokenizer.pre_tokenizer = pre_tokenizers.FixedLength(5)
    data = json.loads(tokenizer.to_str()) | {"added_tokens": []}
    found = explain(type(tokenizer).from_str(json.dumps(data)), WITHOUT_FAST)
    assert found.why_not_parts is not None
    assert found.why_not_parts.endswith("is not known: cuts at added tokens only")


def test_with_dropout_nothing_is_cached_or_compared(tmp_path: Path) -> None:
    done = run(saved("dropout_half", tmp_path))
    assert done.exit_code == 0
    reason = "BPE dropout is on, so one text has many encodings"
    assert f"Whole texts: not cached: {reason}\n" in done.stdout
    assert "Identical:   not compared: two encodings of one text may differ\n" in done.stdout
    found = as_json(tmp_path)
    assert (found["why_not_whole"], found["why_not_parts"]) == (reason, reason)
    assert (found["identical"], found["answers"]) == (None, [])


def test_a_segment_cache_that_is_switched_off_is_reported() -> None:
    found = explain(SYNTHETIC["gpt2"](), CacheConfig(l1=False))
    assert found.why_not_parts == "the segment cache is switched off (l1=False)"
    assert found.why_not_whole is None
    assert Counter(one.origin for one in found.answers) == {Origin.ENCODED: 2, Origin.WHOLE: 2}


def test_a_text_that_is_not_cut_next_to_a_whole_word_token_is_reported() -> None:
    found = explained("added_single_word_gpt2", "one wOrld\xb2 two")
    assert found.sample.why_uncut is not None
    assert "whole-word added token" in found.sample.why_uncut
    assert "14 characters, not cut: next to a whole-word" in " ".join(report(found).split())
    assert not found.is_different


# ---- added tokens, affixes, continuations


def test_added_tokens_say_whether_they_open_a_chunk_and_why_not() -> None:
    tokens = {one.content: one for one in explained("greedy_strips_first").added_tokens}
    assert tokens["<eot>"].opens
    assert tokens["<eot>"].why_not is None
    assert (tokens["<mask>"].is_cut_out, tokens["<mask>"].opens) == (True, False)
    assert tokens["<mask>"].why_not == "it includes the whitespace before it: lstrip"
    word = {one.content: one for one in explained("added_single_word_gpt2").added_tokens}
    assert word["wOrld"].why_not == "it must be a whole word: single_word"
    nested = {one.content: one for one in explained("nested_gpt2").added_tokens}
    assert nested["<s>x"].why_not == "added tokens overlap, or one is the beginning of another"
    literal = explained("literal_gpt2")
    assert not any(one.is_cut_out for one in literal.added_tokens)
    assert not any(one.is_token for one in literal.sample.segments)
    normalized = {one.content: one for one in explained("added_normalized_bert").added_tokens}
    assert normalized["wOrld"].why_not == "it is found in the normalised text"
    assert normalized["[CLS]"].opens


def test_added_tokens_are_grouped_by_kind_and_only_some_are_named() -> None:
    shown = report(explained("many_gpt2"))
    assert "cut out, but no chunk begins there (added tokens overlap" in shown
    assert " and 39 more" in shown
    shown_whitespace = report(explained("with_whitespace_gpt2"))
    assert '"New York"' in shown_whitespace
    assert "a⏎b" in shown_whitespace


def test_affixes_and_changes_of_continuations_are_shown() -> None:
    bert = explained("bert_uncased")
    assert bert.affixes is not None
    assert (bert.affixes.before, bert.affixes.after) == (("[CLS]",), ("[SEP]",))
    assert bert.continuations == ()
    llama = explained("llama2")
    places = {one.place: one.changes for one in llama.continuations}
    assert places == {"after an added token": (), "at a cut": ("without Prepend",)}
    first = {one.place: one.changes for one in explained("added_normalized_first").continuations}
    never = ("Metaspace with prepend_scheme never, not first",)
    assert first == {"after an added token": never, "at a cut": never}
    shown = report(explained("strip_qwen2"))
    assert "at a cut: Strip with strip_left False, not True" in shown


def test_a_precompiled_character_map_is_never_printed(shared_data: Path) -> None:
    made = precompiled(shared_data / "tokenizers" / "t5-small" / "tokenizer.json")
    found = explain(made["precompiled_first"](), WITHOUT_FAST)
    assert {one.place for one in found.continuations} == {"after an added token", "at a cut"}
    written = json.dumps(found.to_dict()) + report(found)
    assert len(written) < 60_000
    assert "charsmap" not in written


# ---- engines


# ---- what transformers makes of the files


def _llama_folder(folder: Path, class_name: str) -> Path:
    saved("llama2", folder)
    config = {"tokenizer_class": class_name, "unk_token": "<unk>", "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_tokenizer_that_transformers_builds_otherwise_is_shown(tmp_path: Path) -> None:
    folder = _llama_folder(tmp_path, "LlamaTokenizer")
    found = as_json(folder, "--engine", "tokenizers")["by_transformers"]
    assert found["class_name"] == "LlamaTokenizer"
    assert found["unlike_file"][:2] == ["normalizer", "pre_tokenizer"]
    assert ["pre_tokenizer", "Metaspace"] in found["recognised"]
    assert found["has_cuts"]
    assert (found["why_not_whole"], found["why_not_parts"], found["why_not"]) == (None, None, None)
    assert not found["is_different"]
    shown = run(folder, "--engine", "tokenizers").output
    assert "Auto class:  AutoTokenizer gives LlamaTokenizer, with another" in shown


def test_a_class_with_its_own_encoding_is_reported_in_words(tmp_path: Path) -> None:
    folder = _llama_folder(tmp_path, "CodeLlamaTokenizer")
    found = as_json(folder, "--engine", "tokenizers")["by_transformers"]
    assert found["why_not_whole"].startswith("CodeLlamaTokenizer has its own encode_plus")
    assert "depend on the calls before" in found["why_not_whole"]


def test_the_engine_option_has_the_values_of_the_config() -> None:
    assert tuple(one.value for one in EngineName) == ENGINES


def test_an_engine_that_cannot_be_used_says_why() -> None:
    pytest.importorskip("gigatoken", reason="the test expects gigatoken's own error message")
    found = explain(SYNTHETIC["bert_uncased"]())
    assert found.engine == "tokenizers"
    assert any(note.startswith("gigatoken can't encode") for note in found.engine_notes)
    assert "\n             gigatoken: Unsupported model type" in report(found)


def test_engines_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(l1, "installed", list)
    monkeypatch.setattr("tokcache.cli.explanation.installed", list)
    found = explain(SYNTHETIC["gpt2"]())
    assert found.engine == "tokenizers"
    install = "is not installed (pip install 'tokcache[engines]')"
    assert found.engine_notes == (f"gigatoken {install}", f"fastokens {install}")
    done = run(samples.tiny_tokenizer(), "--engine", "fastokens")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "engine='fastokens' is not installed" in done.stderr


# ---- the user's sample, and bad input


def test_the_users_sample_keeps_its_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "sample.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo \xd0\x94\xd0\xb0\r\n")
    assert read_sample(path) == "one\r\ntwo Да\r\n"
    found = as_json(samples.tiny_tokenizer(), "--text", path)
    assert found["sample"]["text"] == "one\r\ntwo Да\r\n"
    assert "careful assistant" not in run(samples.tiny_tokenizer(), "--text", path).stdout


def test_bad_input_ends_with_exit_code_2_and_one_line(tmp_path: Path) -> None:
    tiny = samples.tiny_tokenizer()
    (tmp_path / "binary").write_bytes(b"ab\xff")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "broken.json").write_text('{"version": "1.0", "model": {"type": "BPE"')
    (tmp_path / "other.json").write_text('{"name": "no tokenizer"}')
    for arguments, message in (
        ((tmp_path / "absent.json",), "no such tokenizer file"),
        ((tmp_path,), "no such tokenizer file"),
        (("",), "has no name"),
        ((tmp_path / "broken.json",), "holds no tokenizer"),
        ((tmp_path / "other.json",), "holds no tokenizer"),
        ((tiny, "--text", tmp_path / "absent"), "no such text file"),
        ((tiny, "--text", tmp_path), "can't be read"),
        ((tiny, "--text", tmp_path / "binary"), "is not UTF-8 text: byte 2 is wrong"),
        ((tiny, "--text", tmp_path / "empty"), "is empty"),
    ):
        for more in ((), ("--json",)):
            done = run(*arguments, *more)
            assert (done.exit_code, done.stdout) == (2, ""), arguments
            assert message in done.stderr
            assert done.stderr.count("\n") == 1
    assert run(tiny, "--engine", "unheard-of").exit_code == 2
    assert run().exit_code == 2


@pytest.mark.parametrize(
    "name", ["gpt2", "qwen2.5", "phi-3-mini", "t5-small", "bert-base-uncased", "minimind"]
)
def test_real_tokenizers_are_cached_in_segments_and_identical(name: str, shared_data: Path) -> None:
    found = as_json(shared_data / "tokenizers" / name)
    assert found["why_not_parts"] is None
    assert found["identical"] is True
    assert len(found["sample"]["chunks"]) == 4
    assert len(found["sample"]["segments"]) > 50
