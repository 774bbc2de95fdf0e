"""Charts as inline SVG that takes its colours from the page: light, dark, wide or narrow."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 480.0, 300.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 24.0, 12.0, 44.0
_TICKS = 5


@dataclass(frozen=True)
class Series:
    """Points of one colour.

    Attributes:
        name: Shown where a point is pointed at.
        colour: Number of the page's colour, from 0.
        points: ``x, y``.
        style: ``line``, ``dashed``, ``dots``, or ``big`` dots.
        low_high: An interval of ``y`` for each point, or none.
    """

    name: str
    colour: int
    points: Sequence[tuple[float, float]]
    style: str = "line"
    low_high: Sequence[tuple[float, float]] = ()


def chart(series: Sequence[Series], x_label: str, y_label: str, *, from_zero: bool = False) -> str:
    """An SVG element; points that are not finite are left out.

    Args:
        series: Later ones lie above earlier ones.
        x_label: Below the horizontal axis.
        y_label: Above the vertical one.
        from_zero: Whether the horizontal axis begins at 0.
    """
    points = [p for s in series for p in s.points if _finite(p)]
    ends = [
        (x, e)
        for s in series
        for (x, _), pair in zip(s.points, s.low_high, strict=False)
        for e in pair
    ]
    ends = [p for p in ends if _finite(p)]
    if not points:
        return "<p>Nothing was measured.</p>"
    xs = _Axis([x for x, _ in points] + ([0.0] if from_zero else []), _LEFT, _WIDTH - _RIGHT)
    ys = _Axis([y for _, y in points + ends], _HEIGHT - _BOTTOM, _TOP + 14)
    drawn = [_grid(xs, ys), *(_drawn(s, xs, ys) for s in series)]
    labels = (
        f'<text class="axis" x="{(_LEFT + _WIDTH - _RIGHT) / 2:.0f}" y="{_HEIGHT - 8:.0f}" '
        f'text-anchor="middle">{escape(x_label)}</text>'
        f'<text class="axis" x="4" y="14">{escape(y_label)}</text>'
    )
    title = escape(f"{y_label} against {x_label}")
    return (
        f'<svg viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" aria-label="{title}">'
        f"{''.join(drawn)}{labels}</svg>"
    )


class _Axis:
    """Where values lie between two places, and the round values to mark."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        low, high = min(values), max(values)
        spread = high - low or abs(high) or 1.0
        step = _round_step(spread / _TICKS)
        # all values, and their round neighbours
        self._low = math.floor(low / step) * step
        self._high = max(math.ceil(high / step) * step, self._low + step)
        self._start, self._end = start, end
        count = round((self._high - self._low) / step)
        self.ticks = [self._low + i * step for i in range(count + 1)]
        # as many as show the step, which may be 2.5 or 0.25
        self._decimals = next(d for d in range(16) if math.isclose(round(step, d), step))

    def place(self, value: float) -> float:
        share = (value - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)

    def label(self, value: float) -> str:
        return f"{value:z,.{self._decimals}f}"


def _round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= least * (1 - 1e-9))


def _grid(xs: _Axis, ys: _Axis) -> str:
    lines = [
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{ys.place(y):.1f}" '
        f'y2="{ys.place(y):.1f}"/><text x="{_LEFT - 6}" y="{ys.place(y) + 4:.1f}" '
        f'text-anchor="end">{ys.label(y)}</text>'
        for y in ys.ticks
    ]
    lines += [
        f'<text x="{xs.place(x):.1f}" y="{_HEIGHT - _BOTTOM + 17}" text-anchor="middle">'
        f"{xs.label(x)}</text>"
        for x in xs.ticks
    ]
    return "".join(lines)


def _drawn(series: Series, xs: _Axis, ys: _Axis) -> str:
    places = [(xs.place(x), ys.place(y)) for x, y in series.points if _finite((x, y))]
    colour = f"c{series.colour}"
    title = f"<title>{escape(series.name)}</title>"
    if series.style in ("line", "dashed"):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        return f'<polyline class="{colour} {series.style}" points="{path}">{title}</polyline>'
    bars = [
        f'<line class="{colour} bar" x1="{xs.place(x):.1f}" x2="{xs.place(x):.1f}" '
        f'y1="{ys.place(low):.1f}" y2="{ys.place(high):.1f}"/>'
        for (x, _), (low, high) in zip(series.points, series.low_high, strict=False)
        if _finite((low, high))
    ]
    radius = 6 if series.style == "big" else 3
    dots = [
        f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">{title}</circle>'
        for x, y in places
    ]
    return "".join(bars + dots)


def _finite(values: tuple[float | None, ...]) -> bool:
    return all(v is not None and math.isfinite(v) for v in values)
