"""Which answers count as right: a table of notations, whole completions, and what is said where answers are missing."""

from __future__ import annotations

from typing import Any, cast

import pytest
from distillation.answers import is_right
from distillation.command_line import parse_options
from distillation.options import PromptOptions
from distillation.prompts import encode_prompts, warn_of_missing_answers
from distillation.scenarios import Scenario

from .conftest import tiny_tokenizer, tiny_words

# What a completion has in its box, and the data set's answer: each pair is one and the same.
EQUAL = [
    *(
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        (r"\tfrac12", r"\frac{1}{2}"),
        (r"\frac43", r"\frac{4}{3}"),
        ("4/3", r"\frac43"),
    ),
    *((r"-\frac{1}{2}", r"\frac{-1}{2}"), (r"\frac{1}{\sqrt2}", r"\frac{\sqrt{2}}{2}"), (r"\frac{2}{4}", r"\frac12")),
    *(
        ("0.5", r"\frac{1}{2}"),
        (".5", "0.5"),
        ("7.0", "7"),
        ("1.50", r"\frac32"),
        (r"1\frac{1}{2}", "1.5"),
        ("3", "3.0"),
    ),
    *((r"90^\circ", "90"), ("90", r"90^{\circ}"), (r"10\%", "10"), ("10", r"10\%"), (r"\$36", "36"), ("36", r"\$36")),
    *(("1,234", "1234"), ("1234", r"1{,}234"), (r"\$32,348", "32348"), ("10^{3}", "1000"), (r"6 \cdot 10^2", "600")),
    *((r"\text{Evelyn}", "Evelyn"), ("Evelyn", r"\text{Evelyn}"), (r"\textbf{Evelyn}", r"\text{Evelyn}")),
    *(
        (r"\text{even}", "even"),
        ("yes", r"\text{Yes}"),
        (r"\text{June 20}", "June 20"),
        (r"\text{ odd}", r"\text{odd}"),
    ),
    *((r"(C)", "C"), ("C", "(C)"), (r"\text{(C)}", "C"), (r"\textbf{(C)}", "(C)"), (r"\text{C}", r"\text{(C)}")),
    *(
        (r"3\text{ cm}", "3"),
        (r"5\mbox{ inches}", "5"),
        ("3/4", r"\frac{3}{4}\text{ mile}"),
        ("x=5", "5"),
        ("5", "x=5"),
    ),
    *((r"2\sqrt{3}", r"\sqrt{12}"), (r"\sqrt 2", r"\sqrt{2}"), (r"11\sqrt2", r"11\sqrt{2}"), ("2x+1", "1+2x")),
    *(("x^2-1", "(x-1)(x+1)"), (r"\{1,2\}", r"\{2,1\}"), (r"[0,\infty)", r"[0, \infty)"), (r"\pm 2", "2,-2")),
    *((r"\left(3, \frac{\pi}{2}\right)", r"(3,\frac{\pi}{2})"), (r"x \in [1,2]", "[1,2]"), ("3:2", r"\frac32")),
]
DIFFERENT = [
    *(("3", "4"), (r"\frac12", r"\frac13"), ("10", "100"), ("-2", "2"), ("0.333", r"\frac13"), ("(1,2)", "(2,1)")),
    *(("[0,1]", "(0,1)"), ("(C)", "(D)"), ("Evelyn", "Briana"), ("silent", "listen"), (r"\text{silent}", "listen")),
    *(("no", "yes"), ("2x", "3x"), (r"\{1,2\}", r"\{1,3\}"), ("", "7"), ("x", "7")),
]
COMPLETIONS = [  # the text, the data set's answer, mathematics, exact match
    (r"So it is \boxed{\frac{1}{2}}.", "0.5", True, False),
    (r"We have \boxed{\frac{a}{b}} in all.", r"... hence $x = \boxed{\frac{a}{b}}$.", True, True),
    (
        r"\boxed{3} is wrong, as can be seen by putting it back into the equation that we began with: it is \boxed{4}",
        "4",
        True,
        True,
    ),
    (
        r"\boxed{4} is wrong, as can be seen by putting it back into the equation that we began with: it is \boxed{3}",
        "4",
        False,
        False,
    ),
    (r"The roots are \boxed{2} and \boxed{-2}.", "-2, 2", True, False),
    ("She sold 48 / 2 = 24 clips. 48 + 24 = 72\n#### 72", "Natalia sold 48/2 = 24. In all 72.\n#### 72", True, True),
    ("The answer is 72.", "Natalia sold 48/2 = 24. In all 72.\n#### 72", True, False),
    ("#### 1,234", "1234", True, False),
    ("#### 24", "Natalia sold 48/2 = 24. In all 72.\n#### 72", False, False),
    ("The answer is 7.", "7", True, False),
    ("The answer is 8. There were 7 apples.", "7", False, False),
    (r"Therefore the answer is $\frac{1}{2}$.", "0.5", True, False),
    (" 1 / 2 ", "1/2", True, True),
    ("Paris", "Paris", True, True),
    ("I do not know", "7", False, False),
    ("", "7", False, False),
    (r"\boxed{", "7", False, False),
]


def test_the_table_is_of_fifty_pairs() -> None:
    assert len(EQUAL) == len(set(EQUAL)) >= 50
    by_letter = sum(is_right(rf"\boxed{{{given}}}", right, "exact") for given, right in EQUAL)
    assert by_letter < 5  # what mathematics is for


@pytest.mark.parametrize(("given", "right"), EQUAL)
def test_notations_of_one_answer_are_equal(given: str, right: str) -> None:
    assert is_right(rf"The answer is \boxed{{{given}}}.", right)


@pytest.mark.parametrize(("given", "right"), DIFFERENT)
def test_different_answers_stay_different(given: str, right: str) -> None:
    assert not is_right(rf"The answer is \boxed{{{given}}}.", right)


@pytest.mark.parametrize(("text", "right", "mathematics", "exact"), COMPLETIONS)
def test_where_the_answer_of_a_completion_is(text: str, right: str, mathematics: bool, exact: bool) -> None:
    assert is_right(text, right) is mathematics
    assert is_right(text, right, "exact") is exact


WARNING = (
    "distill.py: warning: --answer-column {}: {} of 4 held-out prompts have no answer, so that right ones are not "
    "counted; "
)


@pytest.mark.parametrize(
    ("column", "answers", "said"),
    [
        ("answer", [18, "0", 0, r"\boxed{2}"], ""),
        ("answer", [18, None, " ", "7"], WARNING.format("answer", 2) + "they are p.jsonl, line 2, p.jsonl, line 3"),
        ("answr", [1, 2, 3, 4], WARNING.format("answr", 4) + "no row has it, the columns are answer, prompt"),
        ("solution", [None] * 4, WARNING.format("solution", 4) + "no row has it, the columns are prompt"),
        ("answer", [None] * 4, ""),  # prompts and nothing else
    ],
)
def test_a_dropped_accuracy_names_rows_and_column(
    column: str, answers: list[Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = PromptOptions(prompts="p.jsonl", answer_column=column)
    rows: list[tuple[str, dict[str, Any]]] = []
    for i, answer in enumerate(answers):
        kept = {} if answer is None and column != "answr" and set(answers) == {None} else {"answer": answer}
        rows.append((f"p.jsonl, line {i + 1}", {"prompt": f"w{3 + i}", **kept}))
    held_out = encode_prompts(rows, options, tiny_tokenizer(tiny_words()))
    warn_of_missing_answers(rows, options, held_out)
    assert capsys.readouterr().err.strip() == said


def test_the_option_reaches_the_check() -> None:
    tokenizer = tiny_tokenizer(tiny_words())
    [prompt] = encode_prompts([("p, line 1", {"prompt": "w3", "answer": "1/2"})], PromptOptions(), tokenizer)
    found = []
    for check in ("mathematics", "exact"):
        options = parse_options(["--answer-check", check, "--use-cpu"])
        judge = cast(Any, Scenario)("own", *[None] * 7, options, None).check(prompt)
        found.append(judge(r"\boxed{0.5}"))
    assert found == [True, False]
