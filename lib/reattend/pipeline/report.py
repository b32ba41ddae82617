"""What the suite found, for readers: figures/claims.svg, the README's table, figures/scoreboard.csv.

The best evidence for each claim: gpu before cpu. The site (`reattend report --html`) shows the rest.
"""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

from reattend.findings import Conclusion, Paper, count_line, read_papers
from reattend.pipeline.graph import MATRIX, SCOREBOARD, read_records
from reattend.pipeline.judge import judge_usable
from reattend.pipeline.manifests import write_text
from reattend.presentation import interval_text, markdown_table
from reattend.records import Claim
from reattend.site.marks import CHARACTERS
from reattend.site.matrix import matrix_svg

COLUMNS = (
    "family",
    "paper",
    "claim",
    "says",
    "reported",
    "ours",
    "n",
    "verdict",
    "profile",
    "seconds",
)
_SECTION = "(?<=<!-- {0} -->\n).*?(?=<!-- /{0} -->)"


def write_report(root: Path) -> list[Paper]:
    """Judge, then write the claim matrix, the scoreboard and the README's part about results."""
    judge_usable(root)
    papers = papers_of(root)
    write_text(root / MATRIX, matrix_svg(papers))
    write_text(root / SCOREBOARD, scoreboard(papers))
    readme = root / "README.md"
    if readme.exists():
        text = readme.read_text(encoding="utf8")
        renewed = readme_with_results(text, papers)
        if renewed != text:
            write_text(readme, renewed)
    return papers


def write_site(root: Path, notebooks: bool) -> Path:
    """Build the site into `site/`; where it begins.

    Raises:
        AssetError: KaTeX is neither in the cache nor to be had.
    """
    from reattend.site.build import build_site

    build_site(root, read_records(root)[0], root / "site", notebooks)
    return root / "site" / "index.html"


def papers_of(root: Path) -> list[Paper]:
    """All papers of a checkout with what their runs found."""
    return read_papers(root, read_records(root)[0])


def readme_with_results(text: str, papers: list[Paper]) -> str:
    """README's text with its results, and the last column of its methods, renewed."""
    results = re.compile(_SECTION.format("scoreboard"), re.DOTALL)
    methods = re.compile(_SECTION.format("methods"), re.DOTALL)
    text = results.sub(lambda found: f"\n{_results(papers)}\n\n", text)
    return methods.sub(lambda found: _with_claims(found.group(), papers), text)


def _with_claims(methods: str, papers: list[Paper]) -> str:
    """The table of methods with the marks of the paper in whose module each method lives.

    The table is taken as it stands, because making it anew imports every method.
    """
    marks = {paper.record.slug: _marks(paper) for paper in papers}

    def filled(row: re.Match) -> str:
        return f"{row['cells']}| {marks[row['slug']]} |" if row["slug"] in marks else row.group()

    row = r"(?P<cells>\| \[\w+\]\([\w/]*?(?P<slug>\w+)\.py\).*)\|[^|\n]*\|$"
    return re.sub(row, filled, methods, flags=re.MULTILINE)


def _results(papers: list[Paper]) -> str:
    picture = f"![The verdict of every claim, a row a paper]({MATRIX})"
    rows = [
        [
            f"[{paper.record.slug}](notebooks/{paper.record.family}/{paper.record.slug}.ipynb)",
            paper.record.question,
            paper.answer(),
            _marks(paper),
            ", ".join(f"{profile} {s:.0f}" for profile, s in paper.seconds.items()),
        ]
        for paper in papers
    ]
    table = markdown_table(["notebook", "question", "answer", "claims", "seconds"], rows)
    summary = "The questions in full, with links to the notebooks"
    details = f"<details><summary>{summary}</summary>\n\n{table}\n\n</details>"
    return f"{count_line(papers)}\n\n{picture}\n\n{details}"


def _marks(paper: Paper) -> str:
    return " ".join(CHARACTERS[verdict] for verdict in paper.verdicts())


def scoreboard(papers: list[Paper]) -> str:
    """The text of scoreboard.csv: every claim with what was reported, measured and concluded."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for paper in papers:
        writer.writerows(_row(paper, claim) for claim in paper.record.claims)
    return out.getvalue()


def numbers(found: Conclusion) -> str:
    """What the tests of a claim measured, in few digits."""
    return "; ".join(
        f"{name.replace('_', ' ')} {interval_text(t['effect'], t.get('low'), t.get('high'))}"
        for name, t in (found.tests or {}).items()
    )


def _row(paper: Paper, claim: Claim) -> list[str]:
    record, best = paper.record, paper.best(claim)
    sizes = ", ".join(dict.fromkeys(str(t["n"]) for t in (best.tests or {}).values()))
    seconds = paper.seconds.get(best.profile)
    row = [record.family, record.slug, claim.id, claim.says, claim.reported, numbers(best), sizes]
    return [*row, best.verdict, best.profile, "" if seconds is None else f"{seconds:.0f}"]
