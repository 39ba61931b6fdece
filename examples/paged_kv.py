"""KV memory in pages for a transformers model: a pool of slots, and what attention sees of it in one forward."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig


class PagedKV:
    """Room for the keys and values of `num_slots` tokens in every layer of a model.

    keys, values: [layers, num_slots, KV heads, head size]. What each slot holds is known to the PrefixCache alone.
    """

    def __init__(self, config: PretrainedConfig, num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        require_full_attention(config)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, num_slots, heads, size)
        # Zeros: a slot that is masked still takes part with weight 0, and 0 times a NaN of raw memory is NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


def require_full_attention(config: PretrainedConfig) -> None:
    """ValueError for a model with layers that do not keep the KV of every token, or that keep something else."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if kinds != {"full_attention"} or window:
        what = f"a sliding window of {window}" if window else ", ".join(sorted(kinds))
        raise ValueError(
            f"{config.model_type} has {what}: this example is for models with full attention in all layers"
        )


class PagedForward(DynamicCache):
    """The KV of some requests during one forward: new KV goes to its slots, and each request's own is gathered.

    table: int32 [B, at least `longest`]: the slots of each request. begins: int64 [B]: its tokens computed so far.
    count: new tokens, as many for each. longest: tokens of the longest request, the new ones included.

    An engine with a kernel for paged attention gives it the table, and gathers nothing.
    """

    def __init__(self, kv: PagedKV, table: torch.Tensor, begins: torch.Tensor, count: int, longest: int) -> None:
        super().__init__()
        self.kv = kv
        self.positions = begins[:, None] + torch.arange(count, device=begins.device)
        self.read = table[:, :longest].long()
        self.write = self.read.gather(1, self.positions)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the new KV of a layer, [B, KV heads, count, head size]; return all of it, with `longest` for `count`."""
        keys, values = self.kv.keys[layer_idx], self.kv.values[layer_idx]
        keys[self.write] = key_states.transpose(1, 2)
        values[self.write] = value_states.transpose(1, 2)
        return keys[self.read].transpose(1, 2), values[self.read].transpose(1, 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.read.shape[1] - self.positions.shape[1]

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """Additive, [B, 1, count, longest]: a token sees itself and what is before it in its own request.

        Given whole, as every version of transformers takes it; what a shorter request has behind its end is masked too.
        """
        at = torch.arange(self.read.shape[1], device=self.read.device)
        hidden = at > self.positions[:, None, :, None]
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, torch.finfo(dtype).min)
