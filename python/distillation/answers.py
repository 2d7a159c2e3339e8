"""Whether a completion gives the right answer, for prompts that come with one."""

from __future__ import annotations

MARK = "####"  # GSM8K's, before the answer


def is_right(completion: str, answer: str, check: str = "mathematics") -> bool:
    r"""Whether the completion's answer equals ``answer`` as math-verify judges, or with ``"exact"`` to the letter.

    An answer is what is in the last ``\boxed{...}`` (and in those right beside it), or after the last ``####``. Where
    there is neither, ``"exact"`` takes all of the text, white space aside, and ``"mathematics"`` what math-verify finds
    in it: ``The answer is 7.``
    """
    from latex2sympy2_extended.math_normalization import extract_boxed_content
    from math_verify import parse, verify

    given, right = (extract_boxed_content(text.rpartition(MARK)[2]) for text in (completion, answer))
    if squeezed(given) == squeezed(right) or check == "exact":
        return squeezed(given) == squeezed(right)
    if squeezed(right).isalnum() and sum(map(str.isalpha, right)) > 2:
        right = rf"\text{{{right}}}"  # a word, else to mathematics a product of letters in any order
    return bool(verify(parse(rf"\boxed{{{right}}}"), parse(completion.rpartition(MARK)[2])))


def squeezed(text: str) -> str:
    return "".join(text.split())
