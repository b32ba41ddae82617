"""What a paper's results depend on, all together, the hashes of it that run.json keeps, and their chain."""

from __future__ import annotations

from pathlib import Path

from reattend.assets.store import pinned
from reattend.backbones.store import made_from
from reattend.fingerprints import ANALYSES, code_fingerprint, digest, pinned_versions
from reattend.parameters import load_params, profile_values
from reattend.project import load_yaml, read_json, results_directory
from reattend.records import record_paths

ANALYSED = "build/syntax.json"  # saves analysing what has not changed


def paper_code(root: Path, notebook: Path) -> dict:
    """All that a paper's results depend on but its parameters: code, record, assets, backbones, versions.

    The record must be valid.
    """
    record = load_yaml(notebook.with_suffix(".yaml").read_text(encoding="utf8"))
    needs = record.get("needs", {})
    return code_fingerprint(notebook, record) | {
        "assets": {name: pinned(name) for name in needs.get("assets", [])},
        "backbones": {name: digest(made_from(name)) for name in needs.get("backbones", [])},
        "versions": pinned_versions(root),
    }


def all_papers(root: Path) -> dict[str, dict]:
    """`paper_code` of every paper, and its parameters at the profile of params.yaml.

    A paper that cannot be read gets a fingerprint that says so: running it tells what is wrong, and
    the others go on.
    """
    ANALYSES.load(root / ANALYSED)
    params = load_params(root)
    found = {}
    for slug, path in record_paths(root).items():
        # A paper without values is told so when it is run.
        values = params["papers"].get(slug, {}).get(params["profile"])
        try:
            found[slug] = paper_code(root, path.with_suffix(".ipynb")) | {"parameters": values}
        except Exception as error:  # whatever is wrong with it, the other papers have theirs
            found[slug] = {"unusable": f"{type(error).__name__}: {error}"}
    ANALYSES.save(root / ANALYSED)
    return found


def fingerprint(root: Path, notebook: Path, profile: str) -> dict[str, str]:
    """What run.json keeps: a hash of `paper_code`, and one of the profile's parameters."""
    ANALYSES.load(root / ANALYSED)
    return {
        "code": digest(paper_code(root, notebook)),
        "parameters": digest(profile_values(root, notebook.stem, profile)),
    }


# The chain from a run to today's code -----------------------------------------------------------------

TODAY = "made by today's code, or by code attested to be the same"
BEFORE = "made before provenance was kept"
OTHER_CODE = "made by other code"
OTHER_PARAMETERS = "made with other parameters"


def standing(root: Path, notebook: Path, profile: str) -> str | None:
    """How a paper's results at `profile` stand to the code and parameters of today; None without results.

    Raises:
        FileError: run.json or attested.json is damaged.
    """
    family, slug = notebook.parent.name, notebook.stem
    try:
        facts = read_json(results_directory(root, family, slug, profile) / "run.json")
    except FileNotFoundError:
        return None
    made_under = facts.get("fingerprint")
    if made_under is None:
        return BEFORE
    now = fingerprint(root, notebook, profile)
    if made_under["parameters"] != now["parameters"]:
        return OTHER_PARAMETERS
    return (
        TODAY if now["code"] in attested_equal(root, notebook, made_under["code"]) else OTHER_CODE
    )


def attested_path(root: Path, notebook: Path) -> Path:
    """Where a paper keeps which of its fingerprints were attested to give the same results."""
    return root / "figures" / notebook.parent.name / notebook.stem / "attested.json"


def attested(root: Path, notebook: Path) -> list[dict[str, str]]:
    """The links of a paper's chain: `old` and `new` fingerprint, and the hash of the smoke results."""
    try:
        return read_json(attested_path(root, notebook))["links"]
    except FileNotFoundError:
        return []


def attested_equal(root: Path, notebook: Path, code: str) -> set[str]:
    """`code`, and every later fingerprint that the chain leads to from it."""
    links, known, waiting = attested(root, notebook), set(), [code]
    while waiting:
        known.add(here := waiting.pop())
        waiting += [
            link["new"] for link in links if link["old"] == here and link["new"] not in known
        ]
    return known
