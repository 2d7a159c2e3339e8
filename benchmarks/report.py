"""``python -m benchmarks.report`` writes docs/benchmarks.md and the README's table and plot from the CSV in docs/.

Nothing is measured here, and nothing on those pages that is a figure is written by hand.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from . import tables
from .matrix import DIVERGENCE, GROUPS, GROWTH_TOKENS, GROWTH_VOCAB, MODELS, REAL, TARGETS
from .page import QUICK_LABEL, block, replace_block
from .records import Record, read, read_facts

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE, FRONT_PAGE = ROOT / "docs" / "benchmarks", ROOT / "docs" / "benchmarks.md", ROOT / "README.md"
# The results that have a place on the page, and the one that stands on the front page.
STEMS = ("cpu", "cpu-avx2", "cpu-older", "cuda")
FRONT = "cpu"
TITLES = {
    TARGETS: "What it must reach",
    MODELS: "Heads of models",
    REAL: "Real hidden states",
    GROWTH_TOKENS: "More tokens",
    GROWTH_VOCAB: "Larger vocabularies",
    DIVERGENCE: "From a student near its teacher to one far from it",
}
# The name of a group's plot, and its caption.
PLOTS = {
    GROWTH_TOKENS: ("time", "Time against tokens"),
    GROWTH_VOCAB: ("memory", "Peak memory against tokens × vocabulary"),
    DIVERGENCE: ("error", "Relative error of the gradients against the reverse KL"),
}


def report(folder: Path, stem: str, images: str) -> str:
    """Formats the results of ``folder`` as Markdown; ``images``: where the page finds its plots."""
    records, facts = read(folder / f"{stem}.csv"), read_facts(folder / f"{stem}.json")
    level = facts.pop("level")
    parts = [QUICK_LABEL] if level == "quick" else []
    for group in GROUPS:
        mine = [record for record in records if record.group == group]
        if mine:
            parts += [f"### {TITLES[group]}", *section(group, mine, level, records)]
            parts += picture(folder, stem, images, group)
    parts += ["### Errors beside the best peer's", tables.best_peer_table(records)]
    return block(facts, parts)


def section(group: str, records: Sequence[Record], level: str, every: Sequence[Record]) -> list[str]:
    """Formats one group; the targets are looked for in ``every`` record, since some are of real hidden states."""
    if group in (GROWTH_TOKENS, GROWTH_VOCAB):
        return [tables.growth_table(records, group)]
    parts = tables.target_tables(every, level) if group == TARGETS else []
    for case, scale in dict.fromkeys((record.case, record.scale) for record in records):
        lines = [record for record in records if (record.case, record.scale) == (case, scale)]
        title = f"{case}, {scale}" if scale else case
        parts += [f"{title}{known_divergence(lines)}:", tables.case_table(lines)]
    return parts


def known_divergence(records: Sequence[Record]) -> str:
    for record in records:
        if record.divergence is not None:
            return f" (errors of the first {record.error_tokens} tokens, mean reverse KL {record.divergence:.3g} nats)"
    return ""


def picture(folder: Path, stem: str, images: str, group: str) -> list[str]:
    """Returns the Markdown of the group's plot, if there is one."""
    name, caption = PLOTS.get(group, ("", ""))
    file = f"{stem}-{name}.png"
    return [f"![{caption}]({images}/{file})"] if (folder / file).exists() else []


def front_page(folder: Path, stem: str, images: str) -> str:
    """Formats the short table, with when and where it was measured, and one plot."""
    records, facts = read(folder / f"{stem}.csv"), read_facts(folder / f"{stem}.json")
    level = facts["level"]
    mine = tables.main_case(records, level)
    parts = [QUICK_LABEL] if level == "quick" else []
    parts += [f"{record.case}; {facts['date']}, {facts['CPU']}, {facts['command']}:" for record in mine[:1]]
    parts += [tables.front_table(mine), *picture(folder, stem, images, GROWTH_VOCAB)]
    return "\n\n".join(parts)


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__).parse_args()
    from . import plots  # the only part that needs matplotlib

    for stem in STEMS:
        if (RESULTS / f"{stem}.csv").exists():
            plots.draw(read(RESULTS / f"{stem}.csv"), RESULTS, stem)
            replace_block(PAGE, f"results {stem}", report(RESULTS, stem, "benchmarks"))
    if (RESULTS / f"{FRONT}.csv").exists():
        replace_block(FRONT_PAGE, "figures", front_page(RESULTS, FRONT, "docs/benchmarks"))


if __name__ == "__main__":
    main()
