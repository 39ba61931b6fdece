"""Models for the example: random weights from a config, or a checkpoint in a folder."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

# hidden size, intermediate size, layers, attention heads, KV heads, vocabulary
SIZES = {
    "tiny": (128, 256, 2, 4, 2, 512),
    "small": (384, 1024, 6, 6, 2, 4096),
    "0.5b": (896, 4864, 24, 14, 2, 151936),
    "1.5b": (1536, 8960, 28, 12, 2, 151936),
}


def config_of(size: str) -> Qwen2Config:
    """Return a Qwen2 config. The two larger sizes have the shapes of Qwen2-0.5B and Qwen2-1.5B."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SIZES[size]
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        use_sliding_window=False,
        # Larger than for training: with such weights the logits depend clearly on the tokens attended to.
        initializer_range=2 / hidden**0.5,
    )


def random_model(size: str, seed: int, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(size), attn_implementation="sdpa")
    return model.to(device, dtype).eval()


def model_from(folder: str, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """Load a checkpoint from disk; nothing is downloaded. Raises ValueError if the folder has none."""
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} is no folder with a model: it has no config.json")
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, attn_implementation="sdpa")
    return model.to(device, dtype).eval()


def num_parameters(model: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())
