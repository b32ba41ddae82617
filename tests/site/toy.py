"""A checkout with two made-up papers, one judged at two profiles and one not run, for pages about it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from reattend.evidence import Exact, Sample
from reattend.evidence.files import evidence_csv, evidence_rows
from reattend.evidence.samples import points
from reattend.pipeline.report import papers_of, write_report
from reattend.records import Record

CLAIMS = [
    {
        "id": "keeps_score",
        "says": "Toy attention keeps the score of dense attention",
        "where": "Table 1",
        "reported": "89.2 against 88.7",
        "about": "backbone",
        "placebo": "none: a toy has no idea to remove",
        "tests": [
            {
                "id": "loss",
                "measures": "score of toy minus dense, points",
                "better": "higher",
                "unit": "item",
                "reproduced": 0.0,
                "negligible": 0.5,
            },
            {
                "id": "shuffled",
                "measures": "the same with shuffled scores",
                "better": "higher",
                "unit": "item",
                "role": "control",
                "reproduced": 0.0,
                "negligible": 0.5,
            },
        ],
    },
    {
        "id": "identity",
        "says": "At full budget it equals dense attention",
        "where": "Section 3",
        "reported": "stated",
        "about": "operator",
        "tests": [
            {
                "id": "difference",
                "measures": "largest difference",
                "better": "equal",
                "unit": "exact",
                "margin": 0.1,
            },
            {
                "id": "speed",
                "measures": "times as fast as dense",
                "better": "higher",
                "unit": "round",
                "reproduced": 1.0,
                "negligible": 1.05,
            },
        ],
    },
    {
        "id": "latency",
        "says": "It is three times as fast at 128k tokens",
        "where": "Figure 5",
        "reported": "659 ms, 271 ms",
        "out_of_reach": "needs 128k tokens",
    },
]
MATHEMATICS = "# Toy\n\nMass is $p_j = \\frac1b \\sum_i P_{ij}$.\n\n$$o = \\sum_j p_j v_j$$\n\n"


def record(slug: str, **changes) -> dict:
    """A record as its YAML file has it."""
    return {
        "slug": slug,
        "family": "long_context",
        "title": f"{slug.capitalize()}: a made-up paper",
        "authors": "Nobody",
        "year": 2024,
        "venue": "nowhere",
        "question": "Reading costs much. Can a toy read less?",
        "stands_on": "made-up numbers, `Sample` and <b>nothing</b> else",
        "reported": {
            "scores": {
                "source": "Table 1",
                "columns": ["method", "average"],
                "rows": [["dense", 88.7], ["toy", 89.2], ["other", 61.6]],
            }
        },
        "claims": CLAIMS,
        "deviations": ["Small & made up."],
    } | changes


def make(root: Path) -> Path:
    """Write the checkout into `root`."""
    (root / "params.yaml").write_text("profile: cpu\npapers: {}\n")
    (root / "README.md").write_text("# Toy\n\n<!-- scoreboard -->\n<!-- /scoreboard -->\n\nEnd.\n")
    for slug in ("judged", "waiting"):
        write_paper(root, record(slug))
    write_run(root, "judged", "cpu", effect=0.25, n=8)
    write_run(root, "judged", "gpu", effect=3.0, n=40)
    write_model_report(root, "mae", "cpu")
    write_report(root)
    return root


def write_paper(root: Path, text: dict) -> None:
    """One paper's record and notebook; the notebook shows a committed picture."""
    place = root / "notebooks" / text["family"]
    place.mkdir(parents=True, exist_ok=True)
    (place / f"{text['slug']}.yaml").write_text(yaml.safe_dump(text, sort_keys=False))
    picture = f"![curve](../../figures/{text['family']}/judged/cpu/figure1.png)\n"
    cells = [
        ("markdown", MATHEMATICS + picture),
        ("code", "# NBVAL_CHECK_OUTPUT\nprint(6 * 7)"),
    ]
    content = {
        "cells": [_cell(number, *cell) for number, cell in enumerate(cells)],
        "metadata": {"language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    (place / f"{text['slug']}.ipynb").write_text(json.dumps(content))


def _cell(number: int, kind: str, source: str) -> dict:
    cell = {"id": f"c{number}", "cell_type": kind, "metadata": {}, "source": source}
    output = {"output_type": "stream", "name": "stdout", "text": "42\n"}
    return cell | ({"outputs": [output], "execution_count": 1} if kind == "code" else {})


def write_run(root: Path, slug: str, profile: str, effect: float, n: int) -> None:
    """What a run leaves: figures, a table, results, evidence, times."""
    home = root / "figures" / "long_context" / slug / profile
    home.mkdir(parents=True)
    spread = np.linspace(-1.5, 1.5, n)
    samples = {
        ("keeps_score", "loss"): (Sample(effect + spread, item=range(n)), "item"),
        ("keeps_score", "shuffled"): (Sample(spread - 9, item=range(n)), "item"),
        ("identity", "difference"): (Exact(0.0), "exact"),
        ("identity", "speed"): (Sample(np.linspace(1.8, 2.2, 9), round=range(9)), "round"),
    }
    evidence = {key: points(sample, unit) for key, (sample, unit) in samples.items()}
    (home / "evidence.csv").write_text(evidence_csv(evidence))
    write_pictures(home)
    facts = {
        "seconds": 12.4,
        "device": "a machine",
        "timing_evidence": evidence_rows(evidence, True),
    }
    (home / "run.json").write_text(json.dumps(facts))


def write_model_report(root: Path, name: str, profile: str) -> None:
    """What `reattend build` leaves of a model that reports on itself."""
    home = root / "figures" / "backbones" / name / profile
    home.mkdir(parents=True)
    write_pictures(home)


def write_pictures(home: Path) -> None:
    """A table and a figure with their captions."""
    captions = [["figure1", "Figure 1. A curve"], ["table1", "Table 1. Scores"]]
    (home / "results.json").write_text(json.dumps({"captions": captions}))
    (home / "table1.csv").write_text("method,score\ndense,83.92857\ntoy,84.1\n")
    Image.new("RGB", (640, 200), "white").save(home / "figure1.png")


def records(root: Path) -> dict[str, Record]:
    """The checkout's records by slug."""
    return {paper.record.slug: paper.record for paper in papers_of(root)}
