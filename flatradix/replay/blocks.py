"""The block size of a trace: how many tokens each of its hash ids stands for. No line of a trace says it."""

from __future__ import annotations

BLOCK_TOKENS = 512
_ENOUGH = 10  # requests that have to agree before a power of two is believed
_MOST = 1 << 20


class BlockSizes:
    """The block sizes with which all requests so far have as many ids as blocks."""

    def __init__(self) -> None:
        self._least, self._most = 1, _MOST
        self._requests = 0

    def add(self, tokens: int, ids: int) -> None:
        """Note a request of `tokens` tokens and `ids` ids."""
        self._requests += 1
        if ids:
            self._least = max(self._least, -(-tokens // ids))
        elif tokens:
            self._most = 0
        if ids > 1:
            self._most = min(self._most, -(-tokens // (ids - 1)) - 1)
        elif ids == 1 and tokens == 0:
            self._most = 0

    def found(self) -> int | None:
        """Return the block size, or None if the requests do not tell: then some request does not fit 512."""
        if self._least <= BLOCK_TOKENS <= self._most:
            return BLOCK_TOKENS
        if self._least == self._most:
            return self._least
        powers = [1 << power for power in range(21) if self._least <= 1 << power <= self._most]
        return powers[0] if len(powers) == 1 and self._requests >= _ENOUGH else None


def check(tokens: int, ids: int, size: int) -> None:
    """Raise ValueError unless a request of `tokens` tokens has one id for each block of `size` tokens."""
    blocks = -(-tokens // size)
    if ids != blocks:
        raise ValueError(
            f"too {'few' if ids < blocks else 'many'} hash_ids: {ids} for an input_length of {tokens}; "
            f"at {size} tokens a block it takes {blocks} (--block-size says otherwise)"
        )
