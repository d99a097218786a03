"""Text splitters that count tokens: langchain, semchunk, semantic-text-splitter."""

from __future__ import annotations

from typing import Any

from tests.ecosystem.given import TEXTS, Given, case

_DOCUMENT = "\n\n".join(TEXTS * 2)


@case("langchain-text-splitters", "from_huggingface_tokenizer of two splitters")
def langchain_split(given: Given) -> Any:
    from langchain_text_splitters import CharacterTextSplitter, RecursiveCharacterTextSplitter

    tokenizer = given.load()
    found = []
    for kind in (CharacterTextSplitter, RecursiveCharacterTextSplitter):
        splitter = kind.from_huggingface_tokenizer(tokenizer, chunk_size=40, chunk_overlap=8)
        found.append(splitter.split_text(_DOCUMENT))
    return found


@case("semchunk", "chunkerify, one process and two, with overlap")
def semchunk_split(given: Given) -> Any:
    import semchunk

    chunker = semchunk.chunkerify(given.load(), chunk_size=30)
    one = chunker(_DOCUMENT, offsets=True)
    two = chunker([_DOCUMENT, TEXTS[-1]], processes=2)
    return one, two, chunker(_DOCUMENT, overlap=0.25)


@case("semchunk", "chunkerify of the Rust object")
def semchunk_rust(given: Given) -> Any:
    import semchunk

    return [
        [kind, semchunk.chunkerify(tokenizer, chunk_size=30)(_DOCUMENT)]
        for kind, tokenizer in given.both_rust()
    ]


@case("semantic-text-splitter", "from_huggingface_tokenizer of text and Markdown (the Rust object)")
def semantic_split(given: Given) -> Any:
    from semantic_text_splitter import MarkdownSplitter, TextSplitter

    found = []
    for kind, tokenizer in given.both_rust():
        for splitter in (TextSplitter, MarkdownSplitter):
            made = splitter.from_huggingface_tokenizer(tokenizer, 30)
            found.append([kind, splitter.__name__, made.chunks(_DOCUMENT)])
    return found


@case("chonkie", "TokenChunker and RecursiveChunker, which look at the name of the type")
def chonkie_split(given: Given) -> Any:
    from chonkie import RecursiveChunker, TokenChunker

    found = []
    for tokenizer in (given.load(), given.load_rust()):
        for chunker in (TokenChunker, RecursiveChunker):
            chunks = chunker(tokenizer, chunk_size=30).chunk(_DOCUMENT)
            found.append([[one.text, one.token_count] for one in chunks])
    return found
