"""Completions token by token: a deeper colour is a larger entropy of the teacher's, a line below is an open gate."""

from __future__ import annotations

from statistics import fmean

from .records import Record
from .text import escaped, shortened, tag

SAMPLES_PER_STEP = 4
MOST = 1_000  # tokens of one completion that are shown
WRITERS = {"teacher": "the teacher's", "data": "given"}  # all others are the student's
VERDICTS = {"True": ("right", "right"), "False": ("wrong", "wrong")}
ENTROPY, GATE = 0, 3  # places in a token's figures; between them reverse and forward KL


def completions(recorded: dict[str, list[Record]], tau: float | None) -> str:
    """Some completions of the first, the middle and the last step that has any, of every run."""
    chosen: list[tuple[str, str, list[Record]]] = []
    for run, samples in recorded.items():
        steps = list(dict.fromkeys(sample.get("step") for sample in samples))
        for step in dict.fromkeys((steps[0], steps[len(steps) // 2], steps[-1])):
            mine = [sample for sample in samples if sample.get("step") == step][:SAMPLES_PER_STEP]
            summary = tag("summary", escaped(f"{run}, step {step}"))
            chosen.append((summary, ' open=""' if step == steps[-1] else "", mine))
    largest = max((entropy for *_, mine in chosen for one in mine for entropy in column(one, ENTROPY)), default=0)
    blocks = [
        f"<details{opened}>{summary}{''.join(one_completion(sample, largest) for sample in mine)}</details>"
        for summary, opened, mine in chosen
    ]
    return "".join([tag("h2", "Completions"), legend(largest, tau) if largest else "", *blocks]) if blocks else ""


def column(sample: Record, place: int) -> list[float]:
    """One figure of a sample's tokens, where it is known."""
    return [row[place] for row in sample.get("figures", []) if row[place] is not None]


def legend(largest: float, tau: float | None) -> str:
    """The scale of the colours, in nats, and what else is to be seen."""
    mark = f'<i style="left:{100 * tau / largest:.1f}%"></i>' if tau is not None and 0 < tau < largest else ""
    said = (
        f"Colour: the teacher's entropy H<sub>t</sub> at each token{f', the mark is τ = {tau:g}' if mark else ''}. "
        '<span class="gate">Underlined</span>: the gate is open, a forward KL is in the loss. Point at a token, or tap '
        "it, for its figures."
    )
    scale = tag("div", "0", tag("b", mark), f"{largest:.2f} nats", class_="scale")
    return tag("div", scale, tag("p", said, class_="quiet"), class_="tokens")


def one_completion(sample: Record, largest: float) -> str:
    verdict, kind = VERDICTS.get(str(sample.get("correct")), ("not checked", "quiet"))
    tags = [tag("span", verdict, class_=f"tag {kind}")]
    if writer := WRITERS.get(str(sample.get("writer"))):
        tags.append(tag("span", writer, class_="tag quiet"))
    if sample.get("ended") is False:
        tags.append(tag("span", "never ended", class_="tag wrong"))
    parts = [shortened(sample.get("completion", ""))]
    if entropies := column(sample, ENTROPY):
        parts = [one_token(*token, largest) for token in zip(sample["tokens"], sample["figures"], strict=True)]
        if len(parts) > MOST:
            parts[MOST // 2 : -MOST // 2] = [f"\n[… {len(parts) - MOST:,} tokens left out …]\n"]
        opened, said = sum(gate > 0 for gate in column(sample, GATE)), f"H<sub>t</sub> {fmean(entropies):.2f} nats on "
        said += f"average, at most {max(entropies):.2f}; gate open at {opened} of {len(sample['tokens'])} tokens"
        tags.append(tag("span", said, class_="quiet"))
    prompt = tag("pre", shortened(sample.get("prompt", "")), class_="prompt")
    return tag("div", prompt, tag("pre", *parts, class_="completion tokens"), *tags, class_="sample")


def one_token(text: str, figures: list[float | None], largest: float) -> str:
    """A token on its colour. Half a character has no text of its own, and the end of a line none that is seen."""
    entropy, reverse_kl, forward_kl, gate = ("–" if value is None else f"{value:.2f}" for value in figures)
    said = f"H_t {entropy}, reverse KL {reverse_kl}, forward KL {forward_kl} nats; gate {gate}"
    about = {"style": f"--h:{(figures[ENTROPY] or 0) / (largest or 1):.2f}", "tabindex": "-1", "data-figures": said}
    return tag("span", escaped(text or "·").replace("\n", "↵\n"), class_="gate" if figures[GATE] else "", **about)
