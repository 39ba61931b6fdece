"""Notes of a random program, for machines that also run without Hypothesis."""

from __future__ import annotations

import hypothesis


def note(text: str) -> None:
    """Have Hypothesis print the text with the failing program. Does nothing outside a test of Hypothesis."""
    if hypothesis.currently_in_test_context():
        hypothesis.note(text)
