"""The parts of an HTML page that needs no other file: text, tables, charts, images, and the page around them.

Every text is escaped here. The page loads nothing from elsewhere, and its security policy forbids that and any script
but its own.
"""

import base64
import hashlib
import html
import io
import json
import math
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vimd_jax.errors import printable

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 480, 280, 52, 34, 10  # of a chart and its margins
_MOST_POINTS = 400
_COLOURS = 8  # --s0 to --s7 of page.css
_LARGEST = 224  # pixels of an image's longer side


class Line(NamedTuple):
    """A line of a chart: label, points (x, y), and the number of its colour."""

    label: str
    points: list[tuple[float, float]]
    colour: int
    dashed: bool = False


def text(value: object) -> str:
    """A text as it may stand in a page, in an attribute too; characters that are not printable are shown escaped."""
    return html.escape(printable(value, None))


def page(title: str, body: str) -> str:
    """A whole page."""
    style, script = (files("vimd_jax").joinpath(name).read_text() for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{text(title)}</title>\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n{body}\n<script>{script}</script>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str, level: int = 2, name: str = "") -> str:
    """A section with a heading; "" if nothing is in it. `name` can be linked to."""
    if not any(parts):
        return ""
    anchor = f' id="{text(name)}"' if name else ""
    return f"<section{anchor}>\n<h{level}>{text(title)}</h{level}>\n" + "\n".join(filter(None, parts)) + "\n</section>"


def note(words: str) -> str:
    """A remark in small print."""
    return f'<p class="note">{text(words)}</p>'


def number(value: float, unit: str = "") -> str:
    """A number: whole, or with two decimals, below 1 three; "–" for one that is not finite."""
    if not math.isfinite(value):
        return "–"
    digits = 0 if isinstance(value, int | np.integer) or not value else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}{unit}".replace("-", "\N{MINUS SIGN}")


def table(
    titles: Sequence[str], rows: Sequence[Sequence[Any]], sorts: bool = False, marked: Sequence[bool] = ()
) -> str:
    """A table; numbers stand to the right.

    Args:
      titles: of the columns.
      rows: cells: texts, numbers, or pairs of a text and a remark below it.
      sorts: whether a click on a title sorts; the table then scrolls in a box of its own.
      marked: which rows stand out.
    """
    numeric = [
        bool(rows) and all(isinstance(row[i], int | float | np.number) for row in rows) for i in range(len(titles))
    ]
    head = "".join(
        f"<th{_class(right)}>{f'<button>{text(title)}</button>' if sorts else text(title)}</th>"
        for title, right in zip(titles, numeric)
    )
    lines = []
    for i, row in enumerate(rows):
        differs = ' class="differs"' if i < len(marked) and marked[i] else ""
        lines.append(f"<tr{differs}>{''.join(map(_cell, row, numeric))}</tr>")
    box = "wide tall" if sorts else "wide"
    body = "\n".join(lines)
    return (
        f'<div class="{box}" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
    )


def _class(right: bool) -> str:
    return ' class="number"' if right else ""


def _cell(value: Any, right: bool) -> str:
    if right:
        return f'<td class="number" data-value="{float(value)}">{text(number(value))}</td>'
    if isinstance(value, tuple):
        return f"<td>{text(value[0])}<small>{text(value[1])}</small></td>"
    breakable = re.sub(r"([_./])", r"\1<wbr>", text(value))  # where a long name may go on in the next line
    return f"<td>{breakable}</td>"


def chart(title: str, lines: Sequence[Line], logarithmic: bool = False) -> str:
    """A chart of lines over epochs, SVG; "" without points that can be drawn."""
    lines = [line._replace(points=_drawable(line.points, logarithmic)) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    points = [point for line in lines for point in line.points]
    epochs, values = zip(*points)
    x_ticks = _ticks(min(epochs), max(epochs))
    y_ticks = (_logarithmic_ticks if logarithmic else _ticks)(min(values), max(values))
    first, last, low, high = x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        right = _LEFT + (x - first) / (last - first) * (_WIDTH - _LEFT - 14)
        return right, _HEIGHT - _BOTTOM - (y - low) / (high - low) * (_HEIGHT - _BOTTOM - _TOP)

    drawn = []
    for y in y_ticks:
        height = place(first, y)[1]
        drawn.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - 14}" y1="{height:.1f}" y2="{height:.1f}"/>')
        label = f"{10**y:.3g}" if logarithmic else f"{y:g}"
        drawn.append(f'<text x="{_LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{label}</text>')
    for x in x_ticks:
        drawn.append(f'<text x="{place(x, low)[0]:.1f}" y="{_HEIGHT - 18}" text-anchor="middle">{x:g}</text>')
    drawn.append(f'<text x="{(_WIDTH + _LEFT) / 2}" y="{_HEIGHT - 3}" text-anchor="middle">epoch</text>')
    for line in lines:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line.points))
        dashes = ' stroke-dasharray="2 4"' if line.dashed else ""
        drawn.append(f'<polyline style="stroke:{_colour(line)}"{dashes} points="{path}"/>')
        if len(line.points) <= 30:
            dot = f'r="5" style="stroke:{_colour(line)};fill:none"' if line.dashed else f'r="3" fill="{_colour(line)}"'
            drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" {dot}/>' for x, y in (place(*point) for point in line.points)]
    legend = "".join(
        f'<li><i{_dashed(line)} style="border-color:{_colour(line)}"></i>{text(line.label)}</li>' for line in lines
    )
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{text(title)}">{"".join(drawn)}</svg>'
    return f'<figure><figcaption>{text(title)}</figcaption>{svg}<ul class="legend">{legend}</ul></figure>'


def _colour(line: Line) -> str:
    return f"var(--s{line.colour % _COLOURS})"


def _dashed(line: Line) -> str:
    return ' class="dashed"' if line.dashed else ""


def _drawable(points: list[tuple[float, float]], logarithmic: bool) -> list[tuple[float, float]]:
    """Finite points, as logarithms if asked for, and not more than are seen."""
    points = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y) and (y > 0 or not logarithmic)]
    kept = np.unique(np.linspace(0, len(points) - 1, min(_MOST_POINTS, len(points))).round().astype(int))
    return [(points[i][0], math.log10(points[i][1]) if logarithmic else points[i][1]) for i in kept]


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers, 1, 2 or 5 times a power of ten apart, that enclose an interval."""
    reach = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(reach / 4))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= reach / 4 * 0.999)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def _logarithmic_ticks(low: float, high: float) -> list[float]:
    """The logarithms of 1, 2 and 5 times powers of ten that enclose an interval of logarithms; of many, only powers."""
    powers = range(math.floor(low), math.ceil(high) + 2)
    ticks = [math.log10(factor) + power for power in powers for factor in (1, 2, 5)]
    first = max(i for i, tick in enumerate(ticks) if tick <= low + 1e-6)
    last = min(i for i, tick in enumerate(ticks) if tick >= high - 1e-6 and i > first)
    return ticks[first : last + 1] if last - first < 7 else [float(power) for power in powers[:-1]]


def image(pixels: np.ndarray, name: str) -> str:
    """An image (height, width, 3), uint8 or in [0, 1]; a small one is shown pixel by pixel."""
    if pixels.dtype != np.uint8:
        pixels = (255 * np.clip(pixels, 0, 1)).round().astype(np.uint8)
    picture, buffer = Image.fromarray(pixels), io.BytesIO()
    small = max(picture.size) <= 96
    picture.thumbnail((_LARGEST, _LARGEST))
    picture.save(buffer, "PNG") if small else picture.save(buffer, "JPEG", quality=85)
    kind, data = "png" if small else "jpeg", base64.b64encode(buffer.getvalue()).decode()
    shape = f' style="--ratio:{picture.width}/{picture.height}"'
    pixelated = ' class="pixels"' if small else ""
    return f'<img{pixelated}{shape} alt="{text(name)}" src="data:image/{kind};base64,{data}">'


def pictures(captioned: Sequence[tuple[dict[str, np.ndarray], str, str]]) -> str:
    """Images in a grid, each a row of views, title -> pixels, with a caption and a remark below it; "" for none."""
    if not captioned:
        return ""
    figures = []
    for views, caption, remark in captioned:
        row = "".join(
            f"<figure>{image(pixels, title)}<figcaption>{text(title)}</figcaption></figure>"
            for title, pixels in views.items()
        )
        below = f'{text(caption)}<br><span class="note">{text(remark)}</span>' if remark else text(caption)
        figures.append(f'<figure><div class="pair">{row}</div><figcaption>{below}</figcaption></figure>')
    return f'<div class="pictures" style="--views:{len(captioned[0][0])}">{"".join(figures)}</div>'


def confusion(matrix: np.ndarray, names: Sequence[str]) -> str:
    """A confusion matrix (classes, classes), rows true, that can be zoomed into."""
    rows, columns = np.nonzero(matrix)
    cells = [[int(i), int(j), int(matrix[i, j])] for i, j in zip(rows, columns)]
    data = json.dumps({"names": [printable(name, None) for name in names], "cells": cells}, separators=(",", ":"))
    data = data.replace("<", "\\u003c")  # so that no name ends the element
    return (
        f'<div class="confusion"><script type="application/json">{data}</script>'
        '<div class="tools"><button aria-label="closer">+</button><button aria-label="further">−</button>'
        "<button>whole</button></div><canvas></canvas>"
        '<p class="readout note">Point at a cell: true class → predicted class. Drag to move, double click to zoom.</p>'
        "</div>"
    )
