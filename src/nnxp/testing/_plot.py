"""A picture of a parity report: a bar for each check, as long as its error is large. Plain SVG."""

from __future__ import annotations

from html import escape
from math import isfinite, log10
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnxp.testing.parity import Check, ParityReport

LINE, LEFT, WIDTH, RIGHT = 16, 330, 420, 90  # pixels: a line, the names, the bars, the figures
LEAST = 0.01  # units of the bound: where the bars begin
COLOURS = ("#4878a8", "#6aa84f", "#b07aa1", "#8c8c8c")
FAILED = "#c0392b"


def svg(report: ParityReport) -> str:
    """The report as an SVG image: error in units of the bound on a logarithmic scale, by layer."""
    finite = [check.ratio for check in report.checks if isfinite(check.ratio)]
    most = max(10 * report.limit, *finite, 0)

    def at(ratio: float) -> float:
        share = log10(max(min(ratio, most), LEAST) / LEAST) / log10(most / LEAST)
        return LEFT + WIDTH * share

    backends = list(dict.fromkeys(check.backend for check in report.checks))
    height = LINE * (len(report.checks) + 3)
    limit, total = at(report.limit), LEFT + WIDTH + RIGHT
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="{height}" '
        f'font-family="sans-serif" font-size="11">',
        f'<rect width="{total}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="{LINE}">error in units of the bound; {report.limit:g} are allowed: '
        f"{'all agree' if report.ok else 'NOT all agree'}</text>",
        f'<line x1="{limit:.1f}" x2="{limit:.1f}" y1="{1.5 * LINE}" y2="{height - LINE}" '
        f'stroke="{FAILED}" stroke-dasharray="4 3"/>',
    ]
    for row, check in enumerate(report.checks, start=2):
        colour = COLOURS[backends.index(check.backend) % len(COLOURS)] if check.ok else FAILED
        lines += _bar(check, row * LINE, at(check.ratio), colour)
    return "\n".join([*lines, "</svg>\n"])


def _bar(check: Check, top: float, end: float, colour: str) -> list[str]:
    name = f"{check.name} {check.what}"
    label = escape(name if len(name) <= 42 else name[:41] + "…")
    said = escape(f"{name} on {check.backend}: {check.problem or 'ok'}")
    base = top + LINE - 5
    return [
        f"<g><title>{said}</title>",
        f'<text x="{LEFT - 8}" y="{base}" text-anchor="end">{label} · {check.backend}</text>',
        f'<rect x="{LEFT}" y="{top + 2}" width="{max(end - LEFT, 1):.1f}" height="{LINE - 4}" '
        f'fill="{colour}"/>',
        f'<text x="{end + 4:.1f}" y="{base}">{check.ratio:.3g}</text></g>',
    ]
