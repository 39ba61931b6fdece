"""The forms that a batch of sequences may have, and functions that overwrite a batch or a result after the call."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from flatradix import Ragged
from tests.support.oracle import LARGEST

POISON = 2**30 + 7


def as_lists(sequences: list[list[int]], device: torch.device) -> Any:
    return [list(sequence) for sequence in sequences]


def as_arrays(sequences: list[list[int]], device: torch.device) -> Any:
    return [array("q", sequence) for sequence in sequences]


def as_numpy(sequences: list[list[int]], device: torch.device) -> Any:
    """Return numpy arrays, int32 if all values fit. Every second array is strided."""
    wide = any(abs(value) > LARGEST for sequence in sequences for value in sequence)
    parts = [np.array(sequence, np.int64 if wide else np.int32) for sequence in sequences]
    return [part if i % 2 else np.repeat(part, 2)[::2] for i, part in enumerate(parts)]


def as_tensors(sequences: list[list[int]], device: torch.device) -> Any:
    return [torch.tensor(sequence, dtype=torch.int64) for sequence in sequences]


def as_ragged(sequences: list[list[int]], device: torch.device) -> Any:
    return Ragged.from_sequences(sequences)


def as_tensors_there(sequences: list[list[int]], device: torch.device) -> Any:
    return [torch.tensor(sequence, dtype=torch.int64, device=device) for sequence in sequences]


def as_ragged_there(sequences: list[list[int]], device: torch.device) -> Any:
    """Return the only form of which the host knows nothing but the number of queries and of tokens."""
    return Ragged.from_sequences(sequences).to(device)


Form = Callable[[list[list[int]], torch.device], Any]
FORMS: tuple[Form, ...] = (as_lists, as_arrays, as_numpy, as_tensors, as_ragged)
FORMS_THERE: tuple[Form, ...] = (as_tensors_there, as_ragged_there, as_ragged_there)


def poison(value: Any) -> None:
    """Overwrite arguments or results of a call: the tree must not keep any of their memory."""
    if isinstance(value, Ragged):
        value.values.fill_(POISON)
    elif isinstance(value, torch.Tensor):
        value.fill_(POISON)
    elif isinstance(value, np.ndarray):
        value[:] = POISON
    elif isinstance(value, list | array) and len(value):
        for position, part in enumerate(value):
            if isinstance(part, int):
                value[position] = POISON
            else:
                poison(part)


def poison_results(results: Sequence[Any]) -> None:
    for result in results:
        poison(result.lengths)
        poison(result.handles)
        if hasattr(result, "prefix_lengths"):
            poison(result.prefix_lengths)
