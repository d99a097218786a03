"""Tiny models with random weights, the same for the same tokenizer."""

from __future__ import annotations

from typing import Any


def tiny_llama(tokenizer: Any) -> Any:
    """Return a Llama of one layer that has the tokenizer's vocabulary."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    model: Any = LlamaForCausalLM(config)
    return model.eval()


def tiny_bert(tokenizer: Any, head: str, **settings: Any) -> Any:
    """Return a BERT of one layer: `head` is the name of its class."""
    import torch
    import transformers

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id or 0,
        **settings,
    )
    return getattr(transformers, head)(config).eval()
