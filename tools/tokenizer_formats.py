"""Read a tokenizer of tokenizers 1.0 with tokenizers 0.2x: a prototype for the move to 1.0.

`python tools/tokenizer_formats.py FOLDER FILE…`: FOLDER has tokenizers 1.0
(`pip install --pre --target FOLDER 'tokenizers>=1.0.0rc3'`), and each FILE is a tokenizer.json of
either format.

tokenizers 1.0 has neither `to_str` nor component objects, but its pickle holds a tokenizer.json of
format 2.0. Here this is translated back to format 1.0, from which tokenizers 0.2x makes the
components that our planner reads. For each file, three tokenizers must give the same ids: the one
that 1.0 loads, the translated one, and the one that 0.2x loads from the file if it can. The cuts
that the planner derives from the translated one are compared with those of the file, too.

docs/reference/next-tokenizers.md says what this showed.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tokcache.text.cuts.planner import plan_cuts
from tokcache.text.engines.fast import probe_texts

# Runs with tokenizers 1.0: prints the tokenizer's JSON and the ids of the texts from stdin.
_CHILD = """
import json, pickle, sys
sys.path.insert(0, sys.argv[1])
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[2])
texts = json.load(sys.stdin)
def ids_of(tokenizer):
    return [tokenizer.encode(text).ids for text in texts]
print(json.dumps({
    "json": tokenizer.__reduce__()[1][0],
    "ids": ids_of(tokenizer),
    "ids_of_pickled": ids_of(pickle.loads(pickle.dumps(tokenizer))),
}))
"""
_BYTES_ONLY = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}


def as_format_1(description: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer.json of format 2.0 as one of format 1.0; format 1.0 as it is.

    Errors: ValueError for a format, normalizer or post-processor that is not known, and for a
            vocabulary that has lost tokens.
    """
    version = description.get("version")
    if version == "1.0":
        return description
    if version != "2.0":
        raise ValueError(f"the tokenizer.json has format {version!r}; 1.0 and 2.0 are known")
    found = {**description, "version": "1.0"}
    found.pop("role_to_token", None)
    model = dict(found["model"])
    token_of = {token["id"]: token["content"] for token in found["added_tokens"]}
    if model.pop("byte_level", False):
        # Format 2.0 writes the bytes of added tokens as it writes those of all tokens.
        texts = {token_id: text for text, token_id in model["vocab"].items()}
        texts |= {token_id: text for token_id, text in token_of.items() if token_id in texts}
        model["vocab"] = {text: token_id for token_id, text in texts.items()}
        for first, second in model["merges"]:
            if first + second not in model["vocab"]:
                raise ValueError(
                    f"the vocabulary lacks {first + second!r}, which a merge makes: an added token "
                    "has the same text, and format 2.0 has kept one of the two"
                )
        split = found["pre_tokenizer"]
        steps = [] if split is None else split.get("pretokenizers", [split])
        found["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*steps, _BYTES_ONLY]}
        found["decoder"] = {**_BYTES_ONLY, "use_regex": True}
    found["model"] = model
    _move_metaspace(found)
    after = found["post_processor"]
    if after is not None:
        found["post_processor"] = _post_processor(after, model, token_of)
    return found


def _move_metaspace(found: dict[str, Any]) -> None:
    """Make the pre-tokenizer Metaspace of a normalizer and a split, as format 2.0 writes it.

    tokenizers 0.2x reads a MetaspaceNormalizer as a Prepend, because of its field `prepend`.
    """
    normalizer = found["normalizer"] or {}
    steps = normalizer.get("normalizers", [normalizer])
    if not any(step.get("type") == "MetaspaceNormalizer" for step in steps):
        return
    split = found["pre_tokenizer"]
    own = steps[-1]
    if own["type"] != "MetaspaceNormalizer" or split != {
        "type": "Split",
        "pattern": {"String": own["replacement"]},
        "behavior": "MergedWithNext",
        "invert": False,
    }:
        raise ValueError("a MetaspaceNormalizer is known only as the last one, before its split")
    found["normalizer"] = {"type": "Sequence", "normalizers": steps[:-1]} if steps[:-1] else None
    metaspace = {
        "type": "Metaspace",
        "replacement": own["replacement"],
        "prepend_scheme": own["prepend"],
        "split": True,
    }
    words = [{"type": "WhitespaceSplit"}] if own["drop_whitespace"] else []
    found["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*words, metaspace]}


def _post_processor(
    after: dict[str, Any], model: dict[str, Any], token_of: dict[int, str]
) -> dict[str, Any]:
    if after["type"] != "TemplateProcessing":
        raise ValueError(f"the post-processor {after['type']!r} of format 2.0 is not known")
    vocab = model["vocab"]  # Unigram's is a list of texts and scores
    if isinstance(vocab, dict):
        names = {token_id: text for text, token_id in vocab.items()} | token_of
    else:
        names = dict(enumerate(text for text, _ in vocab)) | token_of
    used: dict[str, dict[str, Any]] = {}

    def step(one: dict[str, Any]) -> dict[str, Any]:
        type_id = one.get("type_id", 0)
        if "seq" in one:
            return {"Sequence": {"id": one["seq"], "type_id": type_id}}
        name = "".join(names[token_id] for token_id in one["ids"])
        used[name] = {
            "id": name,
            "ids": one["ids"],
            "tokens": [names[token_id] for token_id in one["ids"]],
        }
        return {"SpecialToken": {"id": name, "type_id": type_id}}

    return {
        "type": "TemplateProcessing",
        "single": [step(one) for one in after["single"]],
        "pair": [step(one) for one in after["pair"]],
        "special_tokens": used,
    }


def compare(folder: Path, file: Path) -> str:
    """Return a line that says whether all readers of one file agree."""
    own = None
    if json.loads(file.read_bytes()).get("version") == "1.0":
        own = Tokenizer.from_file(str(file))
        rng = random.Random(0)  # noqa: S311 (the same texts every time)
        texts = probe_texts(own)
        texts += ["".join(rng.choices(texts, k=5)) for _ in range(500)]
    else:
        texts = file.read_text("utf-8", "replace")[:100_000].split(",")
    done = subprocess.run(  # noqa: S603 (our own code)
        [sys.executable, "-c", _CHILD, str(folder), str(file)],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return "tokenizers 1.0 can't read it: " + done.stderr.strip().splitlines()[-1]
    theirs = json.loads(done.stdout)
    said = [f"{len(texts)} texts"]
    if theirs["ids_of_pickled"] != theirs["ids"]:
        said.append("1.0 differs from itself after a pickle")
    try:
        translated = Tokenizer.from_str(json.dumps(as_format_1(json.loads(theirs["json"]))))
    except ValueError as error:
        return ", ".join([*said, f"not translated: {error}"])
    for name, reader in (("translated", translated), ("0.2x", own)):
        if reader is not None:
            ids = [encoding.ids for encoding in reader.encode_batch(texts)]
            pairs = zip(ids, theirs["ids"], strict=True)
            said.append(f"{name} differs from 1.0 in {sum(a != b for a, b in pairs)}")
    if own is not None:
        cuts = [sum(plan_cuts(reader).fine) for reader in (own, translated)]
        said.append(f"cut at {cuts[0]} pairs of classes, {cuts[1]} when translated")
    return ", ".join(said)


def main() -> None:
    """Compare the readers of each file."""
    folder, *files = map(Path, sys.argv[1:])
    for file in files:
        print(f"{file.parent.name}/{file.name}: {compare(folder, file)}", flush=True)


if __name__ == "__main__":
    main()
