"""Which characters a figure can draw, and how wide they are."""

from __future__ import annotations

from functools import cache
from unicodedata import combining, east_asian_width

from matplotlib import font_manager

BASE = "DejaVu Sans Mono"
"""Comes with matplotlib; every letter is as wide as every other."""
ASIAN = (
    "Noto Sans Mono CJK SC",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "SimHei",
    "Arial Unicode MS",
)
"""Fonts with Chinese, Japanese and Korean characters, of common systems."""
MISSING = "▯"
ADVANCE = 0.65
"""Width of a letter of `BASE` as a share of the font size, with room for its rounding to whole pixels."""


@cache
def families() -> tuple[str, ...]:
    """The base font, and those of `ASIAN` that are installed."""
    known = {font.name for font in font_manager.fontManager.ttflist}
    return (BASE, *(name for name in ASIAN if name in known))


def drawable(text: str) -> str:
    """The text with `MISSING` for every character that no font here has."""
    return "".join(c if ord(c) in _covered() else MISSING for c in text)


def columns_of(text: str) -> int:
    """How many letters wide a text is: Chinese characters are as wide as two, accents of their own as none."""
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def cut(text: str, columns: int) -> str:
    """The text, shortened to so many columns."""
    if columns_of(text) <= columns:
        return text
    while columns_of(text) > columns - 1:
        text = text[:-1]
    return text + "…"


@cache
def _covered() -> frozenset[int]:
    paths = [font_manager.findfont(name, fallback_to_default=False) for name in families()]
    return frozenset(code for path in paths for code in font_manager.get_font(path).get_charmap())
