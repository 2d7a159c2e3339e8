"""Whether a completion gives the right answer, for prompts that come with one."""

from __future__ import annotations

BOXED = r"\boxed{"


def exact_match(completion: str, answer: str) -> bool:
    r"""Whether the completion's answer is ``answer`` to the letter, white space aside.

    Its answer is what is in its last ``\boxed{...}``, or the whole of it where nothing is boxed. No mathematics is
    done: 1/2 and 0.5 differ.
    """
    return squeezed(last_boxed(completion) or completion) == squeezed(last_boxed(answer) or answer)


def last_boxed(text: str) -> str | None:
    start = text.rfind(BOXED)
    if start < 0:
        return None
    depth = 0
    for place in range(start + len(BOXED) - 1, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + len(BOXED) : place]
    return None


def squeezed(text: str) -> str:
    return "".join(text.split())
