"""Libraries that constrain generation: xgrammar, outlines, llguidance."""

from __future__ import annotations

import json
from typing import Any

from tests.ecosystem.cases.models import tiny_llama
from tests.ecosystem.given import GENERATIVE, TEXTS, Given, case

_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}
_ANSWER = '{"name": "Ann", "age": 41}'


@case("xgrammar", "TokenizerInfo, a JSON schema compiled, masks while an answer is accepted")
def xgrammar_mask(given: Given) -> Any:
    import xgrammar

    tokenizer = given.load()
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer)
    compiled = xgrammar.GrammarCompiler(info).compile_json_schema(json.dumps(_SCHEMA))
    matcher = xgrammar.GrammarMatcher(compiled)
    masks = []
    for id_ in tokenizer.encode(_ANSWER, add_special_tokens=False):
        mask = xgrammar.allocate_token_bitmask(1, info.vocab_size)
        matcher.fill_next_token_bitmask(mask)
        masks.append([mask.tolist(), matcher.accept_token(id_)])
    metadata = info.dump_metadata(), info.vocab_size, info.stop_token_ids
    return metadata, info.decoded_vocab[:500], masks


@case("xgrammar", "its logits processor in generate of a tiny Llama", only=GENERATIVE)
def xgrammar_generate(given: Given) -> Any:
    import xgrammar
    from xgrammar.contrib.hf import LogitsProcessor

    tokenizer = given.load()
    model = tiny_llama(tokenizer)
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=model.config.vocab_size)
    compiled = xgrammar.GrammarCompiler(info).compile_json_schema(json.dumps(_SCHEMA))
    made = model.generate(
        **tokenizer("An answer:", return_tensors="pt"),
        max_new_tokens=12,
        do_sample=False,
        logits_processor=[LogitsProcessor(compiled)],
    )
    return made, tokenizer.batch_decode(made)


@case("llguidance", "LLTokenizer of a transformers tokenizer, a grammar's masks", only=GENERATIVE)
def llguidance_mask(given: Given) -> Any:
    import llguidance
    import llguidance.hf
    import llguidance.numpy

    tokenizer = given.load()
    made = llguidance.hf.from_tokenizer(tokenizer)
    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(_SCHEMA))
    matcher = llguidance.LLMatcher(made, grammar)
    masks = []
    for id_ in made.tokenize_str(_ANSWER):
        mask = llguidance.numpy.allocate_token_bitmask(1, made.vocab_size)
        llguidance.numpy.fill_next_token_bitmask(matcher, mask, 0)
        masks.append([mask.tolist(), matcher.consume_token(id_)])
    texts = [made.tokenize_str(text) for text in TEXTS]
    return made.vocab_size, made.eos_token, texts, masks, matcher.get_error()


@case("llguidance", "LLTokenizer of the Rust object's to_str()", only=GENERATIVE)
def llguidance_rust(given: Given) -> Any:
    import llguidance

    found = []
    for kind, tokenizer in given.both_rust():
        made = llguidance.LLTokenizer(tokenizer.to_str())
        found.append([kind, made.vocab_size, [made.tokenize_str(text) for text in TEXTS]])
    return found


@case(
    "outlines",
    "from_transformers and a generator with each backend; hash and == of tokenizers",
    only=GENERATIVE,
)
def outlines_generate(given: Given) -> Any:
    import outlines
    from outlines.models.transformers import TransformerTokenizer

    tokenizer = given.load()
    model = outlines.from_transformers(tiny_llama(tokenizer), tokenizer)
    found: dict[str, Any] = {}
    for backend in ("outlines_core", "xgrammar", "llguidance"):
        generate = outlines.Generator(model, outlines.regex("[0-9]{3}-[a-c]{2}"), backend=backend)
        found[backend] = generate("A number:", max_new_tokens=12, do_sample=False)
    made, other = TransformerTokenizer(given.load()), TransformerTokenizer(given.load())
    changed = given.load()
    changed.add_tokens(["quick brown"])
    found["equal"] = made == other, hash(made) == hash(other)
    found["unequal"] = made == TransformerTokenizer(changed)
    return found


@case("outlines_core", "Vocabulary and Index made from get_vocab(), the allowed ids")
def outlines_core_index(given: Given) -> Any:
    from outlines_core import Guide, Index, Vocabulary

    tokenizer = given.load()
    vocabulary: dict[str, list[int]] = {}
    for token, id_ in tokenizer.get_vocab().items():
        if id_ not in tokenizer.all_special_ids:
            vocabulary.setdefault(tokenizer.convert_tokens_to_string([token]), []).append(id_)
    vocabulary.pop("", None)
    guide = Guide(Index("[0-9]{2}", Vocabulary(tokenizer.eos_token_id or 0, vocabulary)))
    return sorted(guide.get_tokens())
