"""The claim matrix of README.md: one row a paper, one mark a claim, as one SVG file."""

from __future__ import annotations

from html import escape

from reattend.findings import STATES, Paper
from reattend.site.marks import SIZE, class_of, shape

WIDTH = 838  # pixels of a README on a wide screen
LEFT, RIGHT, TOP = 12, 8, 30
NAME, SECONDS = 166, 66  # widths of the first and the last column
LINE, STEP = 16, SIZE + 4  # heights of a line of text, distance of two marks
TEXT = 12  # font size

_STYLE = """
svg { --ground: #ffffff; color: #1f2328; font: 12px system-ui, "Segoe UI", Helvetica, Arial, sans-serif }
.ground { fill: var(--ground); stroke: #d1d9e0 } text { fill: currentColor } .dim { fill: #59636e }
.name { font-weight: 600 } .line { stroke: #d1d9e0 }
.v-reproduced { color: #0a6b4a } .v-partially { color: #9a6200 } .v-not-reproduced { color: #b42318 }
.v-inconclusive { color: #57606a } .v-out-of-reach { color: #6e7781 } .v-not-run { color: #6e7781 }
@media (prefers-color-scheme: dark) {
svg { --ground: #0d1117; color: #e6edf3 } .ground { stroke: #3d444d } .dim { fill: #9198a1 }
.line { stroke: #3d444d }
.v-reproduced { color: #4cc38a } .v-partially { color: #e3a53a } .v-not-reproduced { color: #ff7b72 }
.v-inconclusive { color: #a2abb5 } .v-out-of-reach { color: #8b949e } .v-not-run { color: #8b949e }
}"""


def matrix_svg(papers: list[Paper]) -> str:
    """The picture: a paper's name and marks, its question's answer, the seconds of its run."""
    parts, y = [_heads()], TOP
    for paper in papers:
        text, height = _row(paper, y)
        parts.append(text)
        y += height
    parts.append(_legend(y + 20))
    height = y + 34
    frame = f'<rect class="ground" x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1}" rx="6"/>'
    said = "; ".join(f"{p.record.slug}: {', '.join(p.verdicts())}" for p in papers)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" role="img">\n'
        f"<title>Verdict of every claim, by paper</title>\n<desc>{escape(said)}</desc>\n"
        f"<style>{_STYLE}</style>\n{frame}\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _heads() -> str:
    return "".join(
        (
            _text(LEFT, 20, "paper and its claims", "dim"),
            _text(LEFT + NAME, 20, "answer to its question", "dim"),
            _text(WIDTH - RIGHT, 20, "seconds", "dim", end=True),
        )
    )


def _row(paper: Paper, y: int) -> tuple[str, int]:
    """One paper's row from height `y` on, and how high it is."""
    slug = paper.record.slug
    lines = wrapped(paper.answer(), WIDTH - LEFT - NAME - SECONDS - RIGHT)
    height = max(2, len(lines)) * LINE + 8
    parts = [f'<path class="line" d="M0 {y}.5h{WIDTH}"/>']
    parts.append(_text(LEFT, y + LINE, slug, "name"))
    for number, verdict in enumerate(paper.verdicts()):
        parts.append(mark(LEFT + number * STEP, y + LINE + 4, verdict))
    for number, line in enumerate(lines):
        parts.append(_text(LEFT + NAME, y + (number + 1) * LINE, line))
    for number, (profile, seconds) in enumerate(paper.seconds.items()):
        x, base = WIDTH - RIGHT, y + (number + 1) * LINE
        parts.append(_text(x, base, f"{profile} {seconds:.0f}", "dim", end=True))
    return "".join(parts), height


def _legend(y: int) -> str:
    parts, x = [], float(LEFT)
    for state in STATES:
        parts.append(mark(x, y - 11, state))
        parts.append(_text(x + SIZE + 5, y, state, "dim"))
        x += SIZE + 5 + text_width(state) + 18
    return "".join(parts)


def mark(x: float, y: float, verdict: str) -> str:
    """A verdict's mark with its upper left corner at (x, y)."""
    return f'<g class="{class_of(verdict)}" transform="translate({x:g} {y:g})">{shape(verdict)}</g>'


def _text(x: float, y: float, text: str, kind: str = "", end: bool = False) -> str:
    anchor = ' text-anchor="end"' if end else ""
    kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x:g}" y="{y:g}"{kind}{anchor}>{escape(text)}</text>'


def wrapped(text: str, width: float) -> list[str]:
    """`text` in lines that are no wider than `width`, by an estimate that errs on the wide side."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and text_width(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def text_width(text: str) -> float:
    """About how wide a text is in a sans-serif font of size `TEXT`."""
    return TEXT * sum(_em(character) for character in text)


def _em(character: str) -> float:
    if character in "iljtfr.,:;'|!()[] ":
        return 0.34
    if character in "mwMW@%":
        return 0.9
    return 0.72 if character.isupper() else 0.6
