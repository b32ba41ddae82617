"""One test drawn: the interval of each profile against the margins, and the points behind it.

An SVG to stand inside a page; its colours are the page's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from reattend.evidence.samples import VALUE, Points
from reattend.presentation import interval_text, margins_text
from reattend.records import Test
from reattend.site.marks import class_of

WIDTH, LEFT, RIGHT = 380, 34, 10
ROW, TOP, BOTTOM = 34, 20, 22
MOST_POINTS = 120  # drawn of one profile; more only make a smear
ROOM = 4.0  # points may stretch the axis to so many times what intervals and margins need


@dataclass(frozen=True)
class Measured:
    """A test's outcome at one profile (of verdicts.json) and its points, where they are effects."""

    profile: str
    found: Mapping
    points: tuple[float, ...] = ()

    @property
    def ends(self) -> tuple[float, float]:
        """The interval; of a number without one, the number."""
        effect = self.found["effect"]
        return self.found.get("low", effect), self.found.get("high", effect)


def effects_of(points: Points | None, statistic: str) -> tuple[float, ...]:
    """The points of a test whose mean or median is its effect; of other statistics, none."""
    if points is None or statistic not in ("mean", "median") or set(points.quantities) != {VALUE}:
        return ()
    values = points.quantities[VALUE]
    step = math.ceil(len(values) / MOST_POINTS)
    return tuple(float(value) for value in values[::step])


def found_text(found: Mapping) -> str:
    """A test's effect and interval, as verdicts.json has them, in few digits."""
    return interval_text(found["effect"], found.get("low"), found.get("high"))


def interval_svg(test: Test, measured: Sequence[Measured]) -> str:
    """The picture, one line a profile; empty where nothing was measured."""
    if not measured:
        return ""
    axis = _Axis.of(test, measured)
    height = TOP + ROW * len(measured) + BOTTOM
    parts = [*_zones(test, axis, height - BOTTOM), _scale(axis, height)]
    for number, one in enumerate(measured):
        parts.append(_line(one, axis, TOP + ROW * number + ROW / 2))
    return (
        f'<svg class="interval" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(_in_words(test, measured), quote=True)}">{"".join(parts)}</svg>'
    )


def _in_words(test: Test, measured: Sequence[Measured]) -> str:
    found = "; ".join(f"{one.profile} {found_text(one.found)}" for one in measured)
    return f"{test.measures}: {found}; {margins_text(test)}"


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float

    @classmethod
    def of(cls, test: Test, measured: Sequence[Measured]) -> _Axis:
        """Room for intervals and margins, and for the points where they are not far off."""
        needed = [end for one in measured for end in one.ends] + list(_margins(test))
        low, high = min(needed), max(needed)
        span = high - low or abs(high) or 1.0
        points = [point for one in measured for point in one.points]
        if points and max(*points, high) - min(*points, low) <= ROOM * span:
            low, high = min(*points, low), max(*points, high)
            span = max(high - low, span)
        return cls(low - 0.08 * span, high + 0.08 * span)

    def x(self, value: float) -> float:
        """Where a value lies, or the nearer edge."""
        share = (value - self.low) / (self.high - self.low)
        return LEFT + min(1.0, max(0.0, share)) * (WIDTH - LEFT - RIGHT)

    def shows(self, value: float) -> bool:
        """Whether a value lies on the axis."""
        return self.low <= value <= self.high


def _margins(test: Test) -> dict[float, str]:
    """Each margin and its name."""
    if test.better == "equal":
        return {-test.margin: "−margin", test.margin: "margin"}
    named = {"negligible": test.negligible, "not reproduced": test.not_reproduced}
    named["reproduced"] = test.reproduced
    return {value: name for name, value in named.items() if value is not None}


def _zones(test: Test, axis: _Axis, foot: float) -> list[str]:
    """Where an interval must lie to be reproduced, where it is lost, and the margins between."""
    if test.better == "equal":
        zones = [("zone-held", -test.margin, test.margin)]
        zones += [("zone-lost", -math.inf, -test.margin), ("zone-lost", test.margin, math.inf)]
    else:
        lost = next(
            bound
            for bound in (test.not_reproduced, test.negligible, test.reproduced)
            if bound is not None
        )
        up = test.better == "higher"
        zones = [
            ("zone-held", *((test.reproduced, math.inf) if up else (-math.inf, test.reproduced)))
        ]
        zones.append(("zone-lost", *((-math.inf, lost) if up else (lost, math.inf))))
    parts = [
        f'<rect class="{kind}" x="{axis.x(low):.1f}" y="{TOP}" '
        f'width="{axis.x(high) - axis.x(low):.1f}" height="{foot - TOP:g}"/>'
        for kind, low, high in zones
    ]
    return parts + _margin_lines(test, axis, foot)


def _margin_lines(test: Test, axis: _Axis, foot: float) -> list[str]:
    parts, taken = [], -math.inf
    for value, name in sorted(_margins(test).items()):
        x = axis.x(value)
        kind = "margin" if name in ("reproduced", "margin", "−margin") else "margin weak"
        parts.append(f'<path class="{kind}" d="M{x:.1f} {TOP - 4}V{foot:g}"/>')
        half = 3.3 * len(name)
        middle = min(max(x, half), WIDTH - half)
        if middle - half > taken:
            parts.append(f'<text class="note" x="{middle:.1f}" y="{TOP - 8}">{name}</text>')
            taken = middle + half
    return parts


def _scale(axis: _Axis, height: float) -> str:
    """The axis with a few round numbers."""
    foot = height - BOTTOM
    parts = [f'<path class="axis" d="M{LEFT} {foot:g}H{WIDTH - RIGHT}"/>']
    for tick in _ticks(axis.low, axis.high):
        x = axis.x(tick)
        parts.append(f'<path class="axis" d="M{x:.1f} {foot:g}v4"/>')
        parts.append(f'<text class="note" x="{x:.1f}" y="{foot + 16:g}">{tick:g}</text>')
    return "".join(parts)


def _ticks(low: float, high: float) -> list[float]:
    """Two to six round numbers between `low` and `high`."""
    rough = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [float(f"{step * i:.6g}") for i in range(first, last + 1)]


def _line(one: Measured, axis: _Axis, y: float) -> str:
    """One profile: its points, its interval, its effect."""
    low, high = one.ends
    drawn = [point for point in one.points if axis.shows(point)]
    heights = np.linspace(-1, 1, 7)[np.arange(len(drawn)) * 3 % 7] * 7
    points = "".join(
        f'<circle class="point" cx="{axis.x(point):.1f}" cy="{y + dy:.1f}" r="1.8"/>'
        for point, dy in zip(drawn, heights, strict=True)
    )
    bar = ""
    if "low" in one.found:
        a, b = axis.x(low), axis.x(high)
        bar = f'<path class="bar" d="M{a:.1f} {y:g}H{b:.1f}M{a:.1f} {y - 5:g}v10M{b:.1f} {y - 5:g}v10"/>'
    effect = axis.x(one.found["effect"])
    return (
        f'<text class="note start" x="2" y="{y + 4:g}">{escape(one.profile)}</text>{points}'
        f'<g class="{class_of(one.found["verdict"])}">{bar}'
        f'<path class="effect" d="M{effect:.1f} {y - 5:g}l5 5-5 5-5-5z"/></g>'
    )
