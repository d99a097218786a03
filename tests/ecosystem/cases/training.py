"""trl and sentence-transformers with tiny models."""

from __future__ import annotations

from typing import Any

from tests.ecosystem.cases.models import tiny_bert, tiny_llama
from tests.ecosystem.given import CHAT, TEXTS, Given, case

_SHORT = [text for text in TEXTS if 0 < len(text) < 400]


@case("trl", "SFTTrainer: a data set of chats tokenized, two steps", only=("sample",))
def trl_sft(given: Given) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = given.load()
    chats = [{"messages": CHAT[:2]}, {"messages": [CHAT[2], CHAT[1]]}] * 4
    made = SFTTrainer(
        model=tiny_llama(tokenizer),
        args=SFTConfig(
            output_dir=str(given.folder),
            max_steps=2,
            per_device_train_batch_size=2,
            seed=1,
            report_to=[],
            use_cpu=True,
            logging_steps=1,
            bf16=False,
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=Dataset.from_list(chats),
        processing_class=tokenizer,
    )
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    return made.train_dataset["input_ids"][:], losses, next(iter(made.get_train_dataloader()))


@case("trl", "DPOTrainer: preference pairs tokenized, two steps", only=("sample",))
def trl_dpo(given: Given) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    tokenizer = given.load()
    rows = [{"prompt": text, "chosen": " yes", "rejected": " no"} for text in _SHORT]
    made = DPOTrainer(
        model=tiny_llama(tokenizer),
        ref_model=tiny_llama(tokenizer),
        args=DPOConfig(
            output_dir=str(given.folder),
            max_steps=2,
            per_device_train_batch_size=2,
            seed=1,
            report_to=[],
            use_cpu=True,
            logging_steps=1,
            bf16=False,
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    return made.train_dataset[:], losses


@case("trl", "apply_chat_template of data_utils")
def trl_chat(given: Given) -> Any:
    from trl import apply_chat_template

    tokenizer = given.load()
    if tokenizer.chat_template is None:
        return None
    example = {"prompt": CHAT[:1], "completion": CHAT[1:2]}
    return apply_chat_template(example, tokenizer)


@case("sentence-transformers", "a Transformer module with its tokenizer: encode, save, load")
def sentence_transformer(given: Given) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    tokenizer = given.load(model_max_length=64)
    home = given.folder / "bert"
    tiny_bert(tokenizer, "BertModel").save_pretrained(home)
    tokenizer.save_pretrained(home)
    body = Transformer(str(home), max_seq_length=64)
    body.processor = tokenizer
    model = SentenceTransformer(
        modules=[body, Pooling(body.get_word_embedding_dimension())], device="cpu"
    )
    first = model.encode(TEXTS)
    model.save(str(given.folder / "saved"))
    again = SentenceTransformer(str(given.folder / "saved"), device="cpu")
    return first, again.encode(TEXTS), model.tokenize(TEXTS)


@case("sentence-transformers", "StaticEmbedding, which takes the Rust object")
def static_embedding(given: Given) -> Any:
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import StaticEmbedding

    found = []
    for tokenizer in (given.load_rust(), given.load()):
        torch.manual_seed(0)
        module = StaticEmbedding(tokenizer, embedding_dim=8)
        model = SentenceTransformer(modules=[module], device="cpu")
        first = model.encode(TEXTS)
        model.save(str(given.folder / "static"))
        again = SentenceTransformer(str(given.folder / "static"), device="cpu")
        found.append([first, again.encode(TEXTS)])
    return found
