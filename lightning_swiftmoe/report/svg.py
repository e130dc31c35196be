"""Charts as inline SVG: small, sharp at any size, readable without colour. Sizes are those of a phone's width."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from lightning_swiftmoe.report.style import LineStyle, heat_colours, number

WIDTH, HEIGHT = 420, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 12, 10, 38


@dataclass(frozen=True)
class Line:
    """A named line; ``x`` and ``y`` are ``[P]``."""

    name: str
    x: NDArray
    y: NDArray
    style: LineStyle


@dataclass(frozen=True)
class Frame:
    """Maps data to pixels."""

    x_min: float
    x_max: float
    y_min: float
    y_max: float

    @classmethod
    def around(cls, x: NDArray, y: NDArray, y_from: float | None = None) -> Frame:
        y_min = float(y.min()) if y_from is None else min(y_from, float(y.min()))
        y_max = float(y.max())
        pad = 0.05 * (y_max - y_min) or 0.05 * abs(y_max) or 1.0
        x_min, x_max = float(x.min()), float(x.max())
        return cls(x_min, x_max if x_max > x_min else x_min + 1, y_min - (pad if y_from is None else 0), y_max + pad)

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x_min) / (self.x_max - self.x_min) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - _BOTTOM - (value - self.y_min) / (self.y_max - self.y_min) * (HEIGHT - _TOP - _BOTTOM)


def line_chart(lines: Sequence[Line], x_label: str, y_label: str, y_from: float | None = None) -> Markup:
    """Lines with dashes and markers of their own over a common frame."""
    lines = [averaged(line, 200) for line in lines]
    frame = Frame.around(np.concatenate([ln.x for ln in lines]), np.concatenate([ln.y for ln in lines]), y_from)
    parts = [_axes(frame, x_label, y_label)]
    parts += [_line(line, frame, at) for at, line in enumerate(lines)]
    return _svg(parts, f"{y_label} against {x_label} of {', '.join(line.name for line in lines)}")


def averaged(line: Line, most: int) -> Line:
    """At most so many points, each the mean of a stretch of steps."""
    if line.x.size <= most:
        return line
    chunks = np.array_split(np.arange(line.x.size), most)
    x = np.array([line.x[c].mean() for c in chunks])
    return Line(line.name, x, np.array([line.y[c].mean() for c in chunks]), line.style)


def scatter_chart(
    x: NDArray, y: NDArray, style: LineStyle, x_label: str, y_label: str, ideal: Sequence[tuple[float, float]]
) -> Markup:
    """Points, and the dashed line they would lie on if all were ideal."""
    ideal_x, ideal_y = np.array(ideal).T
    frame = Frame.around(np.concatenate([x, ideal_x]), np.concatenate([y, ideal_y]), 0.0)
    parts = [_axes(frame, x_label, y_label)]
    path = " ".join(f"{frame.x(a):.1f},{frame.y(b):.1f}" for a, b in ideal)
    parts.append(Markup('<polyline points="{}" fill="none" stroke="#444" stroke-dasharray="6 4"/>').format(path))
    a, b = ideal[-1]
    parts.append(_text(frame.x(a) - 6, frame.y(b) + 4, "ideal", "end"))
    parts += [_marker(style.marker, frame.x(p), frame.y(q), style.colour, 3, 0.55) for p, q in zip(x, y, strict=True)]
    return _svg(parts, f"{y_label} against {x_label}, {len(x)} points, with the ideal line")


def bar_chart(values: NDArray, style: LineStyle, x_label: str, y_label: str) -> Markup:
    """One bar per value, and a line at their mean."""
    mean = float(values.mean())
    frame = Frame(-0.5, len(values) - 0.5, 0.0, max(float(values.max()), mean) * 1.08 or 1.0)
    width = max((WIDTH - _LEFT - _RIGHT) / len(values) * 0.8, 0.5)
    parts = [_axes(frame, x_label, y_label, x_whole=True)]
    parts += [
        Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill="{}"/>').format(
            frame.x(i) - width / 2, frame.y(v), width, frame.y(0) - frame.y(v), style.colour
        )
        for i, v in enumerate(values)
    ]
    y = frame.y(mean)
    parts.append(
        Markup('<line x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}" stroke="#000" stroke-dasharray="6 4"/>').format(
            _LEFT, WIDTH - _RIGHT, y, y
        )
    )
    ratio = float(values.max()) / mean if mean else 1.0
    parts.append(_text(WIDTH - _RIGHT, _TOP + 8, f"max/mean {ratio:.2f}", "end"))
    return _svg(parts, f"{y_label} by {x_label}: largest over mean {ratio:.2f}")


def stacked_bars(rows: Sequence[tuple[str, Sequence[float]]], colours: Sequence[str], unit: str) -> Markup:
    """One horizontal bar per row; segments carry the number of their phase, so that colour is not needed."""
    longest = max(sum(values) for _, values in rows) or 1.0
    height = 44 * len(rows) + 6
    parts = []
    for at, (name, values) in enumerate(rows):
        top, x = 44 * at + 18, 0.0
        parts.append(_text(0, top - 5, f"{name}: {number(sum(values))} {unit}", "start"))
        for number_, (value, colour) in enumerate(zip(values, colours, strict=True), start=1):
            width = value / longest * WIDTH
            parts.append(
                Markup(
                    '<rect x="{:.1f}" y="{}" width="{:.1f}" height="22" fill="{}" stroke="#fff" stroke-width="1"/>'
                ).format(x, top, width, colour)
            )
            if width > 12:
                parts.append(_text(x + width / 2, top + 15, str(number_), "middle", _ink(colour)))
            x += width
    return _svg(parts, "stacked bars: " + "; ".join(f"{n} {number(sum(v))} {unit}" for n, v in rows), height)


def heat_map(values: NDArray, steps: NDArray, num_experts: int) -> Markup:
    """``[T, rows]`` multiples of the fair share, on a logarithmic scale from 1/8 to 8; rows are layer by layer.

    The cells are one PNG: thousands of rectangles would weigh ten times as much.
    """
    scaled = (np.log2(np.maximum(values, 1e-9)) + 3) / 6
    image = heat_colours(scaled.T)
    height = int(min(max(4 * values.shape[1], 120), 420))
    bottom = _TOP + height
    parts = [
        Markup(
            '<image x="{}" y="{}" width="{}" height="{}" preserveAspectRatio="none" '
            'style="image-rendering:pixelated" href="{}"/>'
        ).format(_LEFT, _TOP, WIDTH - _LEFT - _RIGHT, height, png_data_uri(image))
    ]
    num_layers = values.shape[1] // num_experts
    for layer in range(num_layers):
        y = _TOP + (layer + 0.5) / num_layers * height
        parts.append(_text(_LEFT - 6, y + 4, f"layer {layer}", "end"))
        if layer:
            edge = _TOP + layer / num_layers * height
            parts.append(
                Markup('<line x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}" stroke="#fff" stroke-width="2"/>').format(
                    _LEFT, WIDTH - _RIGHT, edge, edge
                )
            )
    for at in np.linspace(0, len(steps) - 1, min(5, len(steps))).round().astype(int):
        x = _LEFT + (at + 0.5) / len(steps) * (WIDTH - _LEFT - _RIGHT)
        parts.append(_text(x, bottom + 15, number(float(steps[at])), "middle"))
    parts.append(_text((WIDTH + _LEFT) / 2, bottom + 31, "step", "middle"))
    return _svg(parts, f"load of {values.shape[1]} layers and experts over {len(steps)} steps", bottom + 38)


def heat_scale() -> Markup:
    """The colours of ``heat_map`` with their values."""
    image = heat_colours(np.linspace(0, 1, 120)[None])
    parts = [
        Markup('<image x="10" y="0" width="400" height="14" preserveAspectRatio="none" href="{}"/>').format(
            png_data_uri(image)
        )
    ]
    for at, label in enumerate(["1/8", "1/4", "1/2", "fair share", "2x", "4x", "8x"]):
        parts.append(_text(10 + at / 6 * 400, 28, label, "start" if at == 0 else "end" if at == 6 else "middle"))
    return _svg(parts, "scale from an eighth of the fair share, dark, to eight times, light", 34)


def swatch(style: LineStyle) -> Markup:
    """A short piece of a run's line for legends."""
    line = Markup('<line x1="1" x2="39" y1="8" y2="8" stroke="{}" stroke-width="2.2" stroke-dasharray="{}"/>').format(
        style.colour, style.dash
    )
    return Markup('<svg class="swatch" viewBox="0 0 40 16" aria-hidden="true">{}{}</svg>').format(
        line, _marker(style.marker, 20, 8, style.colour, 4)
    )


def png_data_uri(pixels: NDArray[np.uint8]) -> str:
    """``[rows, columns, 3]`` RGB as a PNG (RFC 2083: signature, IHDR, IDAT, IEND; filter 0 on every row)."""
    rows, columns, _ = pixels.shape
    raw = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(pixels))

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers between ``low`` and ``high``: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _axes(frame: Frame, x_label: str, y_label: str, x_whole: bool = False) -> Markup:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    parts = [Markup('<path d="M{} {}V{}H{}" fill="none" stroke="#444"/>').format(_LEFT, _TOP, bottom, right)]
    for value in ticks(frame.y_min, frame.y_max):
        y = frame.y(value)
        parts.append(Markup('<path d="M{} {:.1f}H{}" stroke="#ddd"/>').format(_LEFT, y, right))
        parts.append(_text(_LEFT - 6, y + 4, number(value), "end"))
    x_ticks = [value for value in ticks(frame.x_min, frame.x_max) if not x_whole or value == int(value)]
    parts += [_text(frame.x(value), bottom + 15, number(value), "middle") for value in x_ticks]
    parts.append(_text((WIDTH + _LEFT) / 2, HEIGHT - 5, x_label, "middle"))
    middle = (_TOP + bottom) / 2
    parts.append(
        Markup('<text x="11" y="{}" text-anchor="middle" transform="rotate(-90 11 {})">{}</text>').format(
            middle, middle, y_label
        )
    )
    return Markup("").join(parts)


def _line(line: Line, frame: Frame, at: int) -> Markup:
    points = " ".join(f"{frame.x(a):.1f},{frame.y(b):.1f}" for a, b in zip(line.x, line.y, strict=True))
    style = line.style
    drawn = Markup('<polyline points="{}" fill="none" stroke="{}" stroke-width="1.8" stroke-dasharray="{}"/>').format(
        points, style.colour, style.dash
    )
    # Runs start their markers at different places, so that lines on top of each other still show.
    where = np.linspace(0.06 + 0.025 * (at % 6), 0.94, 5) * (line.x.size - 1)
    marks = [
        _marker(style.marker, frame.x(line.x[i]), frame.y(line.y[i]), style.colour, 3.6)
        for i in sorted(set(where.round().astype(int).tolist()))
    ]
    return Markup("").join([drawn, *marks])


def _marker(kind: str, x: float, y: float, colour: str, r: float, opacity: float = 1.0) -> Markup:
    if kind == "circle":
        return Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{}" fill="{}" fill-opacity="{}"/>').format(
            x, y, r, colour, opacity
        )
    d = {
        "square": f"M{x - r:.1f} {y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}z",
        "triangle": f"M{x:.1f} {y - r * 1.2:.1f}l{r * 1.2} {r * 2.1}h{-r * 2.4}z",
        "diamond": f"M{x:.1f} {y - r * 1.4:.1f}l{r * 1.4} {r * 1.4}l{-r * 1.4} {r * 1.4}l{-r * 1.4} {-r * 1.4}z",
        "cross": f"M{x - r:.1f} {y - r:.1f}l{2 * r} {2 * r}m0 {-2 * r}l{-2 * r} {2 * r}",
        "plus": f"M{x - r * 1.2:.1f} {y:.1f}h{2.4 * r}m{-1.2 * r} {-1.2 * r}v{2.4 * r}",
    }[kind]
    is_open = kind in ("cross", "plus")
    paint = f'fill="none" stroke="{colour}" stroke-width="2"' if is_open else f'fill="{colour}"'
    return Markup('<path d="{}" {} opacity="{}"/>').format(d, Markup(paint), opacity)


def _text(x: float, y: float, text: str, anchor: str, fill: str = "#222") -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}" fill="{}">{}</text>').format(x, y, anchor, fill, text)


def _ink(colour: str) -> str:
    """Black or white, whichever stands out more (relative luminance, WCAG 2.1)."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return "#000" if 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 > 0.18 else "#fff"


def _svg(parts: Sequence[Markup], title: str, height: float = HEIGHT) -> Markup:
    return Markup('<svg viewBox="0 0 {} {:.0f}" role="img"><title>{}</title>{}</svg>').format(
        WIDTH, height, escape(title), Markup("").join(parts)
    )
