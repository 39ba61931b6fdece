"""A Llama of random weights, and a tokenizer of which each word is a token: what a server without a GPU can run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCABULARY = 32_000
CONTEXT = 4_096
_NAMED = ("<unk>", "<s>", "</s>", "<pad>")
# Each role is a word before the message. `w3` asks for an answer.
_CHAT = (
    "{% for m in messages %}{{ ' w' ~ {'system': 1, 'user': 2, 'assistant': 3}[m.role] ~ ' ' ~ m.content }}"
    "{% endfor %}{% if add_generation_prompt %} w3{% endif %}"
)


def write_model(folder: Path) -> Path:
    """Write model and tokenizer into the folder, 34 MB, and return it. The words are w0, w1 and so on."""
    import torch
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    _tokenizer().save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(_settings()).float().save_pretrained(folder)
    return folder


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*_NAMED, *(f"w{number}" for number in range(VOCABULARY - len(_NAMED)))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=_NAMED[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    unknown, start, end, padding = _NAMED
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        bos_token=start,
        eos_token=end,
        pad_token=padding,
        chat_template=_CHAT,
    )


def _settings() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        tie_word_embeddings=False,
        initializer_range=0.5,  # wide, so that answers depend on the whole prompt
    )
