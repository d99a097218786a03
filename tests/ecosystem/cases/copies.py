"""Copies and pickles by the standard library, dill and cloudpickle, and through ZMQ."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.ecosystem.given import CHAT, TEXTS, Given, case


def answers(tokenizer: Any) -> Any:
    """Return the answers of a transformers tokenizer to its most common calls."""
    ids = [tokenizer.encode(text) for text in TEXTS]
    padded = tokenizer(TEXTS, padding=True, truncation=True, max_length=32)
    return {
        "class": type(tokenizer).__name__,
        "ids": ids,
        "call": [tokenizer(text) for text in TEXTS],
        "padded": padded,
        "pairs": tokenizer(TEXTS[0], TEXTS[3], return_offsets_mapping=True),
        "again": [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS],
        "decoded": [tokenizer.decode(row, skip_special_tokens=True) for row in ids],
        "chat": chat_ids(tokenizer),
    }


def chat_ids(tokenizer: Any) -> Any:
    """Return the ids of a chat; None without a template."""
    if tokenizer.chat_template is None:
        return None
    return tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)


def rust_answers(tokenizer: Any) -> Any:
    """Return the answers of a `tokenizers.Tokenizer` to its most common calls."""
    found = tokenizer.encode_batch(TEXTS)
    return {
        "ids": [one.ids for one in found],
        "offsets": [one.offsets for one in found],
        "decoded": tokenizer.decode_batch([one.ids for one in found]),
        "size": tokenizer.get_vocab_size(),
    }


@case("copy", "copy.copy of a used tokenizer, then both used and one changed")
def copy_shallow(given: Given) -> Any:
    first = given.load()
    before = answers(first)
    second = copy.copy(first)
    second.padding_side = "left"
    second.init_kwargs["mark"] = 1  # a shallow copy shares its containers
    return before, answers(second), answers(first), first.padding_side, "mark" in first.init_kwargs


@case("copy", "copy.deepcopy, added tokens on one side only")
def copy_deep(given: Given) -> Any:
    first = given.load()
    second = copy.deepcopy(first)
    second.add_tokens(["quick brown"])
    second.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    third = copy.deepcopy(second)
    return answers(first), answers(second), answers(third), len(first), len(second), len(third)


@case("tokenizers", "copy and deepcopy of the Rust object")
def copy_rust(given: Given) -> Any:
    found = []
    for kind, first in given.both_rust():
        copies = copy.copy(first), copy.deepcopy(first)
        copies[1].add_tokens(["quick brown"])
        found.append([kind, *map(rust_answers, (first, *copies))])
    return found


@case("pickle", "round trips with every protocol, of the object, its class and a bound method")
def pickle_protocols(given: Given) -> Any:
    first = given.load()
    first.add_tokens(["quick brown"])
    first.note = {"set": "by a library"}
    found: list[Any] = [answers(first)]
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(first, protocol))
        found.append([answers(again), again.note])
    kind = pickle.loads(pickle.dumps(type(first)))
    method = pickle.loads(pickle.dumps(first.encode))
    return found, kind.__name__, kind.__module__, method(TEXTS[0])


# Loads a pickle in a process that can't import tokcache.
_WITHOUT = """
import json, pickle, sys
class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == 'tokcache':
            raise ImportError('tokcache is not installed here')
sys.meta_path.insert(0, Refused())
def answer(data):
    try:
        found = pickle.loads(data)
        ids = [getattr(row, 'ids', row) for row in map(found.encode, json.loads(sys.argv[2]))]
    except Exception as error:
        return repr(error)
    return [type(found).__module__, type(found).__qualname__, ids]
with open(sys.argv[1], 'rb') as file:
    print(json.dumps({name: answer(data) for name, data in pickle.load(file).items()}))
"""


@case("pickle", "loaded in another process that has no tokcache (pickle, cloudpickle, dill)")
def pickle_without_tokcache(given: Given) -> Any:
    import cloudpickle
    import dill

    objects = {"transformers": given.load(), "rust": given.load_rust()}
    dumped = {
        f"{library.__name__} {kind}": library.dumps(tokenizer)
        for library in (pickle, cloudpickle, dill)
        for kind, tokenizer in objects.items()
    }
    path = given.folder / "pickles"
    path.write_bytes(pickle.dumps(dumped))
    arguments = [sys.executable, "-c", _WITHOUT, str(path), json.dumps(TEXTS)]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def _function(tokenizer: Any) -> Any:
    def encode(texts: list[str]) -> Any:
        return [tokenizer.encode(text) for text in texts]

    return encode


@case("cloudpickle", "a function that closes over the tokenizer, as ray sends it")
def cloudpickle_closure(given: Given) -> Any:
    import cloudpickle

    tokenizer = given.load()
    again = cloudpickle.loads(cloudpickle.dumps(_function(tokenizer)))
    return again(TEXTS), answers(cloudpickle.loads(cloudpickle.dumps(tokenizer)))


@case("dill", "a function that closes over the tokenizer, and the tokenizer")
def dill_closure(given: Given) -> Any:
    import dill

    tokenizer = given.load()
    again = dill.loads(dill.dumps(_function(tokenizer), recurse=True))
    return again(TEXTS), answers(dill.loads(dill.dumps(tokenizer)))


@case("pyzmq", "a tokenizer sent over a socket as SGLang sends its requests")
def zmq_object(given: Given) -> Any:
    import zmq

    context = zmq.Context()
    with context.socket(zmq.PAIR) as here, context.socket(zmq.PAIR) as there:
        here.bind("inproc://tokenizers")
        there.connect("inproc://tokenizers")
        here.send_pyobj({"tokenizer": given.load(), "batch": given.load()(TEXTS)})
        got = there.recv_pyobj()
    context.term()
    return answers(got["tokenizer"]), got["batch"], type(got["batch"]).__name__


@case("transformers", "save_pretrained and from_pretrained; the files are equal")
def save_and_load(given: Given) -> Any:
    from transformers import AutoTokenizer

    first = given.load()
    first.add_tokens(["quick brown"])
    first(TEXTS, padding=True, truncation=True, max_length=8)
    first.save_pretrained(given.folder / "saved")
    files = {path.name: path.read_text() for path in sorted((given.folder / "saved").iterdir())}
    again = AutoTokenizer.from_pretrained(given.folder / "saved")
    third = type(first).from_pretrained(given.folder / "saved")
    return _without_paths(files, given), answers(again), answers(third)


def _without_paths(files: dict[str, str], given: Given) -> dict[str, str]:
    places = (str(given.folder), str(given.source), str(Path.cwd()))
    for place in places:
        files = {name: text.replace(place, "…") for name, text in files.items()}
    return files


@case("tokenizers", "as an argument of DecodeStream, BaseTokenizer, EncodingVisualizer")
def rust_callables(given: Given) -> Any:
    from tokenizers.decoders import DecodeStream
    from tokenizers.implementations.base_tokenizer import BaseTokenizer
    from tokenizers.tools.visualizer import EncodingVisualizer

    found = []
    for kind, tokenizer in given.both_rust():
        ids = tokenizer.encode(TEXTS[3]).ids
        streams = DecodeStream(skip_special_tokens=False), DecodeStream(ids[:3], True)
        pieces = [[stream.step(tokenizer, id_) for id_ in ids] for stream in streams]
        base = BaseTokenizer(tokenizer)
        html = EncodingVisualizer(tokenizer, default_to_notebook=False)(TEXTS[0])
        found.append([kind, pieces, base.encode(TEXTS[0]).ids, base.to_str(), html])
    return found


@case("transformers", "PreTrainedTokenizerFast(tokenizer_object=…), train_new_from_iterator")
def tokenizer_object(given: Given) -> Any:
    import transformers

    fast: Any = transformers.PreTrainedTokenizerFast
    found: list[Any] = []
    for kind, tokenizer in given.both_rust():
        made = fast(tokenizer_object=tokenizer)
        made.add_special_tokens({"eos_token": "<|eos|>"})
        found.append([kind, [made.encode(text) for text in TEXTS], made.decode([1, 2, 3])])
    trained = given.load().train_new_from_iterator(TEXTS, 400)
    # Two trainings of a plain tokenizer also differ if pairs are equally frequent.
    return found, type(trained).__name__, len(trained), trained.all_special_tokens


@case("tokenizers", "attributes set on the Rust object: decode and encode_batch replaced, a mark")
def rust_attributes(given: Given) -> Any:
    tokenizer = given.load()
    backend = tokenizer.backend_tokenizer
    plain_decode, plain_batch = backend.decode, backend.encode_batch
    backend.mark = {"set": "by a library"}
    backend.decode = lambda *args, **kwargs: plain_decode(*args, **kwargs).upper()
    decoded = tokenizer.decode(tokenizer.encode(TEXTS[0]))
    backend.encode_batch = lambda texts, **kwargs: plain_batch(
        [text.lower() for text in texts], **kwargs
    )
    return tokenizer.backend_tokenizer.mark, decoded, tokenizer(TEXTS), tokenizer.encode("ABC dEf")
