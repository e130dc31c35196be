"""How runs and loads look: never by colour alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Okabe & Ito, "Color Universal Design" (2008), without yellow, which is too light for lines on white.
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 2 1 2")
MARKERS = ("circle", "square", "triangle", "diamond", "cross", "plus")
# Sampled from cividis (Nunez, Anderton & Renslow, PLoS ONE 2018): even in lightness, so it also reads in grey.
_CIVIDIS = "00224e 123570 3b496c 575d6d 707173 8a8678 a59c74 c3b369 e1cc55 fee838"
CIVIDIS = np.array([[int(colour[i : i + 2], 16) for i in (0, 2, 4)] for colour in _CIVIDIS.split()])


@dataclass(frozen=True)
class LineStyle:
    """Colour, dash pattern and marker of one run: seven, six and six, so pairs repeat late."""

    colour: str
    dash: str
    marker: str


def line_style(index: int) -> LineStyle:
    """The style of run number ``index``."""
    return LineStyle(OKABE_ITO[index % 7], DASHES[index % 6], MARKERS[index % 6])


def heat_colours(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """``[..., 3]`` RGB of values in 0 .. 1."""
    position = np.clip(values, 0, 1) * (len(CIVIDIS) - 1)
    low = np.minimum(position.astype(int), len(CIVIDIS) - 2)
    mix = (position - low)[..., None]
    return np.rint(CIVIDIS[low] * (1 - mix) + CIVIDIS[low + 1] * mix).astype(np.uint8)


def number(value: float) -> str:
    """Three significant digits, as people write them: 0.0123, 45.6, 1,230, 4.5e+08."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        return f"{value:.2g}"
    if size >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def byte_size(value: float) -> str:
    """Bytes with a decimal prefix: 4.2 MB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(value) < 1000:
            return f"{number(value)} {unit}"
        value /= 1000
    return f"{number(value)} PB"
