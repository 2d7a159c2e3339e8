"""Text of models and files as HTML. A model may emit anything: markup, control characters, half a surrogate pair."""

from __future__ import annotations

import html
import math
import re
from typing import Any

LONGEST = 4_000  # characters of one completion that are shown
# Controls draw nothing or move the text around them (the bidirectional ones over the rest of the page).
INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


def escaped(value: Any) -> str:
    """``value`` as text that is safe inside an element or a quoted attribute, controls spelled out."""
    text = INVISIBLE.sub(lambda found: f"\\u{ord(found.group()):04x}", str(value))
    return html.escape(text, quote=True)


def shortened(value: Any) -> str:
    """As :func:`escaped`, the middle of a very long text left out."""
    text = str(value)
    if len(text) <= LONGEST:
        return escaped(text)
    half = LONGEST // 2
    return f"{escaped(text[:half])}\n[… {len(text) - 2 * half:,} characters left out …]\n{escaped(text[-half:])}"


def figure_text(value: float, form: str) -> str:
    """A formatted number, a dash where there is none."""
    return format(value, form).replace("%", " %") if math.isfinite(value) else "–"


def tag(name: str, *content: str, **attributes: str) -> str:
    """One element; ``content`` is HTML already. ``class_`` is the attribute ``class``."""
    stated = "".join(f' {key.rstrip("_").replace("_", "-")}="{value}"' for key, value in attributes.items())
    return f"<{name}{stated}>{''.join(content)}</{name}>"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Cells are HTML already. It scrolls inside its own box where the screen is too narrow, and says so there."""
    head = tag("tr", *(tag("th", cell) for cell in header))
    body = (tag("tr", *(tag("td", cell) for cell in row)) for row in rows)
    content = tag("table", tag("thead", head), tag("tbody", *body))
    box = tag("div", content, class_="wide", tabindex="0", role="region", aria_label="a table that may scroll sideways")
    columns = list(zip(header, *rows, strict=True))[1:]  # the first one wraps
    need = 7.4 + sum(0.9 + 0.48 * max(map(letters, column)) for column in columns)
    return tag("div", box, tag("p", "The table scrolls sideways →", class_="hint"), style=f"--need:{need:.1f}rem")


def letters(cell: str) -> int:
    """Of the longest line."""
    return max(len(re.sub("<.*?>|&|;", "", line)) for line in cell.split("<small>"))
