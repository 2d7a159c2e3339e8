"""common_entries: which entries of two vocabularies are one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..arguments import described

# How an entry says that a word begins, goes on or ends there: byte-level BPE, SentencePiece, WordPiece, BPE of words.
MARKERS = ("Ġ", "▁", "##", "</w>")


def common_entries(student_tokenizer: Any, teacher_tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Returns the ids of the entries that two tokenizers both have: the same string at the same place of both results.

    The first is for ``LMHead.select`` of the student, the second for the teacher's. docs/guides/teachers.md has the two
    ways to compare such models, and what a loss over a part of the vocabulary cannot see.

    Strings are compared, and what they mean is not known here:

    - The same string is the same text only where both spell text alike. Byte-level BPE writes a space as ``Ġ`` and
      bytes as letters (``Ã©`` is é), SentencePiece writes ``▁`` and letters as they are: their ASCII entries would
      agree, few of their words, and of the rest the wrong ones. Two tokenizers with different marks of a word (those,
      WordPiece's ``##``, ``</w>``) are refused; others that spell differently are not noticed.
    - A special token is one string in both and may have another role, ``<s>`` or ``<mask>``; and one role has two
      strings: an end of text that is ``</s>`` here and ``<|im_end|>`` there is not common, and a student that is
      compared on common entries alone is not taught to stop. Leave out or append such pairs, on both sides.
    - A model may have fewer rows than its tokenizer has entries (``LMHead.select`` refuses those ids), or more.
    - That two texts are cut into tokens alike does not follow, however many entries are common.

    Args:
        student_tokenizer, teacher_tokenizer: anything whose ``get_vocab()`` returns a dict of str to int, as the
            tokenizers of transformers and of tokenizers do.

    Returns:
        ``(student_ids, teacher_ids)``, ``[k]`` int64 each, on the CPU, in ascending order of the student's. An id that
        two strings have is left out: which of them the model means is not known.

    Raises:
        TypeError: an argument has no such ``get_vocab()``.
        ValueError: the two mark words differently, or have no entry in common.

    Example::

        class Tokenizer(dict):
            def get_vocab(self):
                return dict(self)


        student, teacher = Tokenizer(a=0, b=1, c=2), Tokenizer(c=0, d=1, a=5)
        student_ids, teacher_ids = common_entries(student, teacher)
        assert student_ids.tolist() == [0, 2] and teacher_ids.tolist() == [5, 0]
    """
    student = entries_of("student_tokenizer", student_tokenizer)
    teacher = entries_of("teacher_tokenizer", teacher_tokenizer)
    marks = marker_of(student), marker_of(teacher)
    if marks[0] != marks[1]:
        raise ValueError(
            f"student_tokenizer and teacher_tokenizer must spell their entries alike, got word marks {marks[0]!r} and "
            f"{marks[1]!r}: the same string is not the same text in both; bring both vocabularies to one spelling first"
        )
    pairs = sorted((id, teacher[entry]) for entry, id in student.items() if entry in teacher)
    if not pairs:
        raise ValueError(
            f"student_tokenizer and teacher_tokenizer must have entries in common, got {len(student)} and "
            f"{len(teacher)} of which none is the same string"
        )
    student_ids, teacher_ids = zip(*pairs, strict=True)
    return (
        torch.tensor(student_ids, dtype=torch.int64, device="cpu"),
        torch.tensor(teacher_ids, dtype=torch.int64, device="cpu"),
    )


def entries_of(name: str, tokenizer: Any) -> dict[str, int]:
    """Returns the entries of a tokenizer whose id no other has."""
    get_vocab = getattr(tokenizer, "get_vocab", None)
    vocabulary = get_vocab() if callable(get_vocab) else None
    if not isinstance(vocabulary, dict) or not all(isinstance(entry, str) for entry in vocabulary):
        raise TypeError(
            f"{name} must have a get_vocab() that returns a dict of str to int, got {described(tokenizer)}: pass a "
            "tokenizer of transformers, of a processor its tokenizer"
        )
    uses = Counter(vocabulary.values())
    return {entry: id for entry, id in vocabulary.items() if uses[id] == 1}


def marker_of(entries: Iterable[str]) -> str | None:
    """Returns the mark of words that most of the entries with one have, or None."""
    counts = Counter(marker for entry in entries for marker in MARKERS if marker in entry)
    return counts.most_common(1)[0][0] if counts else None
