"""The marks of verdicts: a shape and a colour each, so that neither has to be seen alone."""

from __future__ import annotations

from reattend.evidence.verdicts import (
    INCONCLUSIVE,
    NOT_REPRODUCED,
    OUT_OF_REACH,
    PARTIALLY,
    REPRODUCED,
)
from reattend.findings import NOT_RUN, STATES

SIZE = 14  # of the box that a mark is drawn in

_RING = '<circle cx="7" cy="7" r="5.5" fill="none" stroke="currentColor" stroke-width="2"/>'
_SHAPES = {
    REPRODUCED: '<circle cx="7" cy="7" r="6.5" fill="currentColor"/>'
    '<path d="M4 7.2 6.2 9.5 10 4.8" fill="none" stroke="var(--ground)" stroke-width="1.8"/>',
    PARTIALLY: _RING + '<path d="M7 1.5a5.5 5.5 0 0 0 0 11z" fill="currentColor"/>',
    NOT_REPRODUCED: '<rect x=".8" y=".8" width="12.4" height="12.4" rx="1.5" fill="currentColor"/>'
    '<path d="M4.3 4.3l5.4 5.4m0-5.4L4.3 9.7" stroke="var(--ground)" stroke-width="1.8"/>',
    INCONCLUSIVE: _RING
    + '<path d="M5.2 5.6a1.8 1.8 0 1 1 2.4 1.7q-.6.3-.6 1.1M7 9.6v1.2" fill="none" '
    'stroke="currentColor" stroke-width="1.4"/>',
    OUT_OF_REACH: '<path d="M2.5 7h9" stroke="currentColor" stroke-width="2"/>',
    NOT_RUN: '<circle cx="7" cy="7" r="5" fill="none" stroke="currentColor" stroke-width="1.2" '
    'stroke-dasharray="2 2"/>',
}
MEANINGS = {
    REPRODUCED: "the interval lies wholly beyond the margin",
    PARTIALLY: "between the margins, or part of the claim",
    NOT_REPRODUCED: "wholly on the other side",
    INCONCLUSIVE: "few points, on a margin, or cannot be asked here",
    OUT_OF_REACH: "cannot be asked at this scale",
    NOT_RUN: "no committed run yet",
}
CHARACTERS = dict(zip(STATES, "●◐✕?–○", strict=True))
"""One character a verdict, for the terminal and for Markdown."""


def class_of(verdict: str) -> str:
    """The CSS class of a verdict."""
    return "v-" + verdict.replace(" ", "-")


def shape(verdict: str) -> str:
    """The SVG shapes of a verdict's mark, in a box of `SIZE`; `--ground` is the colour behind it."""
    return _SHAPES[verdict]
