"""transformers itself: its server, pipelines, streamers, stop strings, Trainer; DataLoader."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
from typing import Any

from tests.ecosystem.cases.copies import answers
from tests.ecosystem.cases.models import tiny_bert, tiny_llama
from tests.ecosystem.given import CHAT, GENERATIVE, TEXTS, Given, case

_SHORT = [text for text in TEXTS if 0 < len(text) < 400]


@case("transformers", "its server's streamer (cli/serving) around generate", only=GENERATIVE)
def serving_streamer(given: Given) -> Any:
    from transformers.cli.serving.utils import DirectStreamer

    tokenizer = given.load()
    model = tiny_llama(tokenizer)

    async def answer(text: str) -> list[Any]:
        items: asyncio.Queue[Any] = asyncio.Queue()
        streamer = DirectStreamer(tokenizer._tokenizer, asyncio.get_running_loop(), items)
        inputs = tokenizer(text, return_tensors="pt")
        how = {"max_new_tokens": 16, "do_sample": False, "streamer": streamer}
        await asyncio.to_thread(model.generate, **inputs, **how)
        found = []
        while (item := await items.get()) is not None:
            found.append(item)
        return found

    return [asyncio.run(answer(text)) for text in _SHORT]


@case("transformers", "pipeline text-generation, of texts and of a chat")
def pipeline_generation(given: Given) -> Any:
    from transformers import pipeline

    tokenizer = given.load()
    pipe = pipeline("text-generation", model=tiny_llama(tokenizer), tokenizer=tokenizer)
    how = {"max_new_tokens": 8, "do_sample": False}
    found = [pipe(_SHORT, **how), pipe(_SHORT, batch_size=2, **how)]
    return [*found, pipe(CHAT, **how) if tokenizer.chat_template else None]


@case("transformers", "pipeline token-classification with offsets, each aggregation, strides")
def pipeline_tokens(given: Given) -> Any:
    from transformers import pipeline

    tokenizer = given.load(model_max_length=64)
    model = tiny_bert(tokenizer, "BertForTokenClassification", num_labels=5)
    found = []
    for strategy in ("none", "simple", "first", "average", "max"):
        pipe = pipeline(
            "token-classification", model=model, tokenizer=tokenizer, aggregation_strategy=strategy
        )
        found.append(pipe(_SHORT))
    pipe = pipeline(
        "token-classification",
        model=model,
        tokenizer=tokenizer,
        aggregation_strategy="simple",
        stride=8,
    )
    return [*found, pipe(TEXTS[-1])]


@case("transformers", "pipelines feature-extraction, text- and zero-shot-classification, fill-mask")
def pipeline_classification(given: Given) -> Any:
    from transformers import pipeline

    tokenizer = given.load(model_max_length=64)
    features = tiny_bert(tokenizer, "BertModel")
    labels = {"no": 0, "entailment": 1}
    texts = tiny_bert(tokenizer, "BertForSequenceClassification", label2id=labels)
    found: list[Any] = [
        pipeline("feature-extraction", model=features, tokenizer=tokenizer)(_SHORT),
        pipeline("text-classification", model=texts, tokenizer=tokenizer)(
            [{"text": text, "text_pair": "a pair"} for text in _SHORT]
        ),
        pipeline("zero-shot-classification", model=texts, tokenizer=tokenizer)(
            _SHORT, candidate_labels=["animals", "code"]
        ),
    ]
    if tokenizer.mask_token is not None:
        masked = tiny_bert(tokenizer, "BertForMaskedLM")
        pipe = pipeline("fill-mask", model=masked, tokenizer=tokenizer)
        found.append(pipe(f"The {tokenizer.mask_token} jumps.", targets=["dog", "cat"]))
    return found


@case("transformers", "TextStreamer and TextIteratorStreamer", only=GENERATIVE)
def streamers(given: Given) -> Any:
    from transformers import TextIteratorStreamer, TextStreamer

    class Kept(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            kept.append([text, stream_end])

    kept: list[Any] = []
    tokenizer = given.load()
    model = tiny_llama(tokenizer)
    found = []
    for text in _SHORT:
        inputs = tokenizer(text, return_tensors="pt")
        how = {"max_new_tokens": 16, "do_sample": False}
        model.generate(**inputs, **how, streamer=Kept(tokenizer, skip_prompt=True))
        pieces = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
        worker = threading.Thread(
            target=model.generate, kwargs={**inputs, **how, "streamer": pieces}
        )
        worker.start()
        found.append(list(pieces))
        worker.join()
    return kept, found


@case(
    "transformers",
    "generate with stop_strings, and with an assistant of another tokenizer",
    only=GENERATIVE,
)
def generate_with_tokenizer(given: Given) -> Any:
    tokenizer, other = given.load(), given.load()
    other.add_tokens(["quick brown"])
    model, assistant = tiny_llama(tokenizer), tiny_llama(other)
    inputs = tokenizer(_SHORT[0], return_tensors="pt")
    how = {"max_new_tokens": 12, "do_sample": False, "tokenizer": tokenizer}
    stopped = model.generate(**inputs, **how, stop_strings=["e", "\n"])
    assisted = model.generate(**inputs, **how, assistant_model=assistant, assistant_tokenizer=other)
    return stopped, assisted


def _collated(tokenizer: Any) -> Any:
    from transformers import (
        DataCollatorForLanguageModeling,
        DataCollatorForTokenClassification,
        DataCollatorWithPadding,
    )

    rows = [tokenizer(text, truncation=True, max_length=24) for text in _SHORT]
    labelled = [{**row, "labels": [0] * len(row["input_ids"])} for row in rows]
    return [
        DataCollatorWithPadding(tokenizer)(rows),
        DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows),
        DataCollatorForTokenClassification(tokenizer)(labelled),
    ]


@case("transformers", "data collators")
def collators(given: Given) -> Any:
    return _collated(given.load())


@case("transformers", "Trainer: two steps, the tokenizer saved with the model and loaded again")
def trainer(given: Given) -> Any:
    from transformers import (
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainingArguments,
    )

    tokenizer = given.load()
    rows = [tokenizer(text, truncation=True, max_length=24) for text in _SHORT * 2]
    home = given.folder / "run"
    made = Trainer(
        model=tiny_llama(tokenizer),
        args=TrainingArguments(
            output_dir=str(home),
            max_steps=2,
            per_device_train_batch_size=2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            save_steps=2,
            seed=1,
            disable_tqdm=True,
        ),
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    made.train()
    made.save_model(str(home / "final"))
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    again = [AutoTokenizer.from_pretrained(home / name) for name in ("checkpoint-2", "final")]
    return losses, [answers(one) for one in again], answers(tokenizer)


class _Rows:
    """A dataset that tokenizes in its worker, and a collator that pads there."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        return self.tokenizer(TEXTS[index % len(TEXTS)], truncation=True, max_length=20)

    def collate(self, rows: list[Any]) -> Any:
        return self.tokenizer.pad(rows, return_tensors="pt")


def _loaded(given: Given, method: str) -> Any:
    from torch.utils.data import DataLoader

    assert method in multiprocessing.get_all_start_methods()
    rows = _Rows(given.load())
    rows.tokenizer(TEXTS[0])  # used before the workers start
    dataset: Any = rows
    loader: Any = DataLoader(
        dataset,
        batch_size=4,
        num_workers=2,
        collate_fn=rows.collate,
        multiprocessing_context=method,
    )
    return list(loader), rows.tokenizer(TEXTS)


@case("torch", "DataLoader with two forked workers")
def dataloader_fork(given: Given) -> Any:
    return _loaded(given, "fork")


@case("torch", "DataLoader with two spawned workers", only=("sample",))
def dataloader_spawn(given: Given) -> Any:
    return _loaded(given, "spawn")


@case("torch", "DataLoader with two workers from a fork server", only=("sample",))
def dataloader_forkserver(given: Given) -> Any:
    return _loaded(given, "forkserver")
