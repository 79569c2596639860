"""Small pieces of HTML, and how numbers are written in them."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from jaxad.report.table import number_of


def section(title: str, body: str) -> str:
    """A box of the page; no heading if the title is empty."""
    return f"<section>{f'<h2>{title}</h2>' if title else ''}{body}</section>"


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, safe: bool = False) -> str:
    """A table that scrolls in its own box. Cells are escaped unless `safe` says that they are HTML."""
    top = f"<thead><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr></thead>" if head else ""
    body = "".join(f"<tr>{''.join(f'<td>{c if safe else escape(c)}</td>' for c in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'


def escape(value: Any) -> str:
    """Text that is safe inside HTML and its attributes."""
    return html.escape(str(value), quote=True)


def fixed(value: Any) -> str:
    """Three decimals, for measures between 0 and 1; a dash if it is no number."""
    number = number_of(value)
    return f"{number:.3f}" if math.isfinite(number) else "–"


def short(value: Any) -> str:
    """Whole, or three significant digits; a dash if it is no number."""
    number = number_of(value)
    if not math.isfinite(number):
        return "–"
    return f"{number:,.0f}" if abs(number) >= 1000 or number == int(number) else f"{number:.3g}"


def duration(value: float) -> str:
    """Seconds, or minutes where they are many."""
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s" if value < 120 else f"{value / 60:.1f} min"
