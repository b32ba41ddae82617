"""What the files of the repository promise each other."""

import hashlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from reattend.backbones.store import catalogue as backbones
from reattend.fingerprints import notebook_sources
from reattend.parameters import PROFILES, profile_values, resolve
from reattend.pipeline.graph import load_records, render
from reattend.pipeline.judge import committed_verdicts, judge_paper, verdicts_path
from reattend.pipeline.manifests import write_fingerprints
from reattend.pipeline.notebooks import CHECKED, Notebook, source
from reattend.pipeline.notice import render_notice
from reattend.pipeline.report import MATRIX, SCOREBOARD, papers_of, readme_with_results, scoreboard
from reattend.records import FAMILIES, record_paths
from reattend.site.matrix import matrix_svg

SIZE_LIMIT = 2_500_000  # bytes; the largest are points of evidence, draws times identities
LINE_LIMIT = 510  # of code in one notebook; 400 is what to aim for


def test_dvc_yaml_follows_the_records(root):
    assert (root / "dvc.yaml").read_text() == render(root), "run `reattend sync`"


def test_notice_follows_the_catalogue(root):
    assert (root / "NOTICE.md").read_text() == render_notice(), "run `reattend sync`"


def test_what_readers_see_follows_the_results(root):
    papers, text = papers_of(root), (root / "README.md").read_text()
    assert text == readme_with_results(text, papers), "run `reattend report`"
    assert (root / MATRIX).read_text() == matrix_svg(papers), "run `reattend report`"
    assert (root / SCOREBOARD).read_text() == scoreboard(papers), "run `reattend report`"


def test_committed_results_belong_to_the_committed_code(root, tmp_path, monkeypatch):
    """Every fingerprint that dvc.lock recorded is that of code and parameters as they are."""
    monkeypatch.chdir(root)
    lock = yaml.safe_load((root / "dvc.lock").read_text())["stages"]
    stale = []
    for name in ("notebooks", "lib", "params.yaml", "constraints.txt"):
        (tmp_path / name).symlink_to(root / name)
    write_fingerprints(tmp_path)
    for slug in record_paths(root):
        stage = lock[f"replicate-{slug}"]
        recorded = {dep["path"]: dep["md5"] for dep in stage["deps"]}
        path = f"build/fingerprints/papers/{slug}.json"
        now = hashlib.md5((tmp_path / path).read_bytes()).hexdigest()
        if recorded[path] != now:
            stale.append(slug)
    assert not stale, "run `reattend repro` and commit figures/ and dvc.lock"


def test_every_paper_has_its_five_places(root):
    for slug, path in record_paths(root).items():
        family = path.parent.name
        for place in (
            path.with_suffix(".ipynb"),
            root / "lib" / "reattend" / family / f"{slug}.py",
            root / "tests" / family / f"test_{slug}.py",
            root / "figures" / family / slug / "cpu" / "results.json",
        ):
            assert place.exists(), place.relative_to(root)


@pytest.mark.parametrize("profile", PROFILES)
def test_params_satisfy_every_notebook(root, profile):
    for slug, path in record_paths(root).items():
        model = Notebook.read(path.with_suffix(".ipynb")).parameter_model()
        resolve(model, profile_values(root, slug, profile))


def test_params_name_only_known_papers(root):
    papers = yaml.safe_load((root / "params.yaml").read_text())["papers"]
    assert set(papers) == set(record_paths(root))


def test_the_default_profile_is_cpu(root):
    assert yaml.safe_load((root / "params.yaml").read_text())["profile"] == "cpu"


def test_notebooks_keep_the_form(root):
    for path in record_paths(root).values():
        notebook = Notebook.read(path.with_suffix(".ipynb"))
        assert notebook.tagged("parameters") == 'profile = "smoke"\noverrides = {}'
        code = [cell for cell in notebook.cells if cell["cell_type"] == "code"]
        checked = [cell for cell in code if source(cell).startswith(CHECKED)]
        assert len(checked) >= 4, notebook.name
        for cell in code:
            kept = bool(cell["outputs"])
            assert kept == (cell in checked), f"{notebook.name}: run `reattend tidy`"
        lines = [line.strip() for cell in code for line in source(cell).splitlines()]
        count = sum(bool(line) and not line.startswith("#") for line in lines)
        assert count <= LINE_LIMIT, f"{notebook.name}: {count} lines of code"
        assert re.match("rep.finish()", source(code[-1]).splitlines()[-1])


def test_notebooks_show_committed_figures(root):
    for path in record_paths(root).values():
        text = "".join(source(cell) for cell in Notebook.read(path.with_suffix(".ipynb")).cells)
        pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
        assert pictures, path.stem
        for picture in pictures:
            assert (path.parent / picture).resolve().exists(), f"{path.stem}: {picture}"


def test_notebooks_import_the_methods_they_attach(root):
    """Fingerprints follow imports, so a notebook must not reach a method through its name."""
    for path in record_paths(root).values():
        for text in notebook_sources(path.with_suffix(".ipynb")):
            assert not re.search(r"""attach\([^)]*,\s*["']""", text), path.stem


def test_committed_verdicts_follow_from_evidence_and_record(root):
    for slug, record in load_records(root).items():
        kept = committed_verdicts(verdicts_path(root, record))
        assert kept == judge_paper(root, record), f"{slug}: run `reattend judge`"
        assert list(kept["cpu"]) == [claim.id for claim in record.claims], slug


def test_committed_runs_keep_their_budget(root):
    """CPU seconds, children included: 600 at the most at cpu."""
    for slug, record in load_records(root).items():
        path = root / "figures" / record.family / slug / "cpu" / "run.json"
        facts = json.loads(path.read_text())
        assert facts["cpu_seconds"] <= record.budget_seconds.cpu, slug


def test_records_need_known_backbones(root):
    for record in load_records(root).values():
        assert set(record.needs.backbones) <= set(backbones())


def test_dependencies_are_the_same_everywhere(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert "reattend[notebooks]" in extras["pipeline"]
    assert "reattend[pipeline,cluster]" in extras["dev"], "dev, which `make` installs, has it all"
    wanted = project["dependencies"] + [line for lines in extras.values() for line in lines]
    wanted = [line for line in wanted if not line.startswith("reattend[")]
    names = {re.split(r"[><=\[ ]", line)[0].lower().replace("_", "-") for line in wanted}
    pins = dict(
        line.strip().lower().replace("_", "-").split("==")
        for line in (root / "constraints.txt").read_text().splitlines()
        if line.strip() and not line.startswith("#")
    )
    assert names <= pins.keys(), f"constraints.txt lacks {sorted(names - pins.keys())}"
    minima = dict(re.findall(r'"?([\w.-]+)>=([\d.]+)', " ".join(wanted)))
    for name, least in minima.items():
        pinned = pins[name.lower().replace("_", "-")]
        assert _version(pinned) >= _version(least), name
    environment = yaml.safe_load((root / "environment.yml").read_text())["dependencies"]
    pip = next(item["pip"] for item in environment if isinstance(item, dict))
    assert pip == ["--constraint constraints.txt", "torch", "--editable .[dev]"]
    python = next(item for item in environment if str(item).startswith("python="))
    assert _version(python.split("=")[1]) >= _version(project["requires-python"].strip(">="))


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def test_modules_depend_one_way():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_family_is_held_to_what_methods_may_import(root):
    tables = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["importlinter"]
    [methods] = [c for c in tables["contracts"] if c["type"] == "forbidden"]
    present = {f"reattend.{name}" for name in FAMILIES if (root / "lib/reattend" / name).is_dir()}
    assert present <= set(methods["source_modules"])


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from reattend.pipeline import cli; cli._parser(); "
        "heavy = {'torch', 'numpy', 'pandas', 'papermill', 'dvc', 'pydantic'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_package_offers_attach_lazily():
    code = (
        "import sys, reattend; assert 'torch' not in sys.modules; print(reattend.attach.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "attach\n", done.stderr


def test_tracked_files_are_small_and_clean(root):
    listed = subprocess.run(["git", "-C", root, "ls-files", "-z"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a Git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        path = root / name
        if not path.exists():
            continue
        size = path.stat().st_size
        assert size < SIZE_LIMIT, name
        if path.suffix == ".png":
            assert size <= 150_000, name
        else:
            text = path.read_text(encoding="utf8", errors="ignore")
            for place in (root, Path.home()):
                assert f"{place}/" not in text, f"{name} holds a path of this machine"
