"""Paged KV memory for a transformers model: a pool of slots, and the part that attention reads in a forward pass."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig


class PagedKV:
    """Memory for the keys and values of `num_slots` tokens in every layer of a model.

    keys, values: [layers, num_slots, KV heads, head size]. Only the PrefixCache knows which token a slot holds.
    """

    def __init__(self, config: PretrainedConfig, num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        require_full_attention(config)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, num_slots, heads, size)
        # Zeros: attention gives a masked slot weight 0, and 0 times a NaN from uninitialised memory is NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


def require_full_attention(config: PretrainedConfig) -> None:
    """Raise ValueError for a model with a layer that does not keep the KV of every token, or keeps something else."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if kinds != {"full_attention"} or window:
        what = f"a sliding window of {window}" if window else ", ".join(sorted(kinds))
        raise ValueError(
            f"{config.model_type} has {what}: this example is for models with full attention in all layers"
        )


class PagedForward(DynamicCache):
    """The KV of a batch of requests during one forward pass: writes new KV to its slots, and gathers all KV.

    table: int32 [B, pages of `longest` tokens or more], the pages of each request; and the slots in a page.
    begins: int64 [B], the tokens of each that are computed so far. count: new tokens of each request, equally many.
    longest: tokens of the longest request, new ones included.

    An engine with a paged-attention kernel passes the table to that kernel, and gathers nothing.
    """

    def __init__(
        self, kv: PagedKV, table: tuple[torch.Tensor, int], begins: torch.Tensor, count: int, longest: int
    ) -> None:
        super().__init__()
        self.kv = kv
        self.positions = begins[:, None] + torch.arange(count, device=begins.device)
        pages, size = table
        slots = pages[:, : -(-longest // size), None].long() * size + torch.arange(size, device=pages.device)
        self.read = slots.flatten(1)[:, :longest]
        self.write = self.read.gather(1, self.positions)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's new KV, [B, KV heads, count, head size]. Return all its KV, with `longest` for `count`."""
        keys, values = self.kv.keys[layer_idx], self.kv.values[layer_idx]
        keys[self.write] = key_states.transpose(1, 2)
        values[self.write] = value_states.transpose(1, 2)
        return keys[self.read].transpose(1, 2), values[self.read].transpose(1, 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.read.shape[1] - self.positions.shape[1]

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """Return an additive mask, [B, 1, count, longest]: a token sees itself and the tokens before it in its request.

        Every version of transformers takes a full mask. The mask also hides the columns after the end of a request.
        """
        at = torch.arange(self.read.shape[1], device=self.read.device)
        hidden = at > self.positions[:, None, :, None]
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, torch.finfo(dtype).min)
