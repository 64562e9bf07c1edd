"""Short words for tokens, places and layers, the same in tables, figures and pages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def readable(word: str | None) -> str:
    """A token as something one can see: control characters and blanks are written out."""
    if word is None:
        return "token"
    if not word.strip(" "):
        return repr(word)
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in word.strip(" "))


def ranges(layers: Iterable[int]) -> str:
    """Ascending layers in few characters: ``1-3, 5``; ``-`` for none."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ", ".join(parts) or "-"


def short(value: float | None, digits: int = 3) -> str:
    """A number with few significant digits and no exponent where one can do without."""
    if value is None:
        return "-"
    if value != value:
        return "nan"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:.0f}" if abs(value) < 1e6 else f"{value:.1e}"
    text = f"{value:.{digits}g}"
    return f"{value:.{digits}f}" if "e" in text else text


def neat(text: str) -> str:
    """A description with its long decimal numbers cut to four digits."""
    return re.sub(r"\d+\.\d{4,}", lambda found: f"{float(found[0]):.4g}", text)


def aligned(lines: Sequence[Sequence[str]], heads: int = 1) -> str:
    """Rows of cells as a table for a terminal, with a rule under the ``heads`` first rows."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = [
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in lines
    ]
    padded.insert(heads, "  ".join("-" * w for w in widths))
    return "\n".join(line.rstrip() for line in padded)


def plural(count: int, noun: str) -> str:
    """``1 V-sink``, ``2 V-sinks``, ``no V-sinks``."""
    return f"{count or 'no'} {noun}{'' if count == 1 else 's'}"
