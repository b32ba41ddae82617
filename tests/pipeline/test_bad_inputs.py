"""Bad input ends in one line that names the cure, with the right exit code, and nothing is lost.

Every case goes through the command line, in this process; a kernel or DVC that starts is a failure.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from reattend.locks import locked
from reattend.pipeline import cli, run
from reattend.pipeline.judge import judge_papers
from tests.pipeline.toy import KERNEL, ROOT, Checkout

BAD, FAILED = 2, 1  # exit codes
PARAMS, LOCK = "params.yaml", "dvc.lock"
RECORD, NOTEBOOK = "notebooks/theory/toy.yaml", "notebooks/theory/toy.ipynb"
RESULTS, FACTS = "figures/theory/toy/cpu/results.json", "figures/theory/toy/cpu/run.json"
CONFLICT = "<<<<<<< HEAD\n{}\n=======\n[]\n>>>>>>> other\n"
SCRATCH = ("build", ".git", ".site-new")
RUN = ["run", "toy", "--profile", "cpu"]


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A checkout whose one paper has results at smoke and cpu, committed."""
    made = Checkout(tmp_path_factory.mktemp("template") / "checkout", ["toy"], dvc=False)
    shutil.rmtree(made.root / "lib")  # this process has its own
    (made.root / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc" / "config", made.root / ".dvc")
    (made.root / LOCK).write_text("schema: '2.0'\nstages: {}\n")
    with (
        contextlib.chdir(made.root),
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        for profile in ("smoke", "cpu"):
            _run_cells(made, profile)
        judge_papers(made.root, [])
    made.commit()
    shutil.rmtree(made.root / ".git" / "hooks", ignore_errors=True)
    return made.root


def _run_cells(checkout: Checkout, profile: str) -> None:
    """What a kernel would do, here."""
    cells = json.loads(checkout.notebook("toy").read_text())["cells"]
    namespace = {"profile": profile, "overrides": {}}
    os.environ["REATTEND_OUT"] = str(checkout.results("toy", profile))
    try:
        for cell in cells[2:]:
            exec("".join(cell["source"]), namespace)
    finally:
        del os.environ["REATTEND_OUT"]


@pytest.fixture
def place(template, tmp_path, monkeypatch) -> Path:
    """A copy of it to spoil, as working directory; kernels and DVC are not to be started there."""
    root = tmp_path / "checkout"
    shutil.copytree(template, root, symlinks=True)
    monkeypatch.chdir(root)
    monkeypatch.setattr(run, "_has_gpu", lambda: False)

    def no_kernel(*_, **__):
        raise AssertionError("a kernel was started")

    monkeypatch.setattr(run, "execute", no_kernel)
    popen = subprocess.Popen

    def no_dvc(command, *arguments, **options):
        assert "dvc" not in command, "DVC was started"
        return popen(command, *arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", no_dvc)
    return root


def snapshot(root: Path) -> dict[str, bytes]:
    """All files but those that are made anew at every run."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.relative_to(root).parts[0] not in SCRATCH
    }


def ends(
    root: Path, capsys, arguments: list[str], code: int, words: str, written: str | None = None
) -> str:
    """Run a command that must fail and may write one file; its one line."""
    before = snapshot(root)
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    errors = capsys.readouterr().err.lstrip("\n")  # after ^C on a terminal
    assert len(errors.strip().splitlines()) == 1, errors
    assert errors.startswith("reattend: "), errors
    assert words in errors
    assert len(errors) < 600, errors
    assert str(root) not in errors  # paths are relative to the root
    assert ended.value.code == code, errors
    after = snapshot(root)
    assert {name for name in before | after if before.get(name) != after.get(name)} <= {written}
    return errors


# Arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "arguments are required: command"),
        (["rune"], "invalid choice: 'rune'"),
        (["run"], "required: paper"),
        (["run", "toi"], "unknown paper 'toi'; there are: toy"),
        (["run", ""], "unknown paper ''"),
        (["run", NOTEBOOK], "unknown paper"),
        (["run", "../toy"], "unknown paper '../toy'"),
        (["run", "toy", "other"], "unrecognized arguments: other"),
        (["run", "toy", "--porfile", "cpu"], "unrecognized arguments: --porfile"),
        (["run", "toy", "--profile"], "--profile: expected one argument"),
        (["run", "toy", "--profile", "fast"], "unknown profile 'fast'; there are: smoke, cpu, gpu"),
        (["run", "toy", "--profile", "CPU"], "unknown profile 'CPU'"),
        (["run", "toy", "--profile", ""], "unknown profile ''"),
        (["run", "toy", "--profile", "gpu"], "needs a CUDA GPU"),
        (["repro", "toi"], "unknown paper 'toi'"),
        (["repro", "toy", "toi"], "unknown paper 'toi'"),
        (["repro", "--profile", "fast"], "unknown profile 'fast'"),
        (["repro", "--jobs", "0"], "a whole number of at least 1, not '0'"),
        (["repro", "--jobs", "-1"], "not '-1'"),
        (["repro", "--jobs=-1"], "not '-1'"),
        (["repro", "--jobs", "1.5"], "not '1.5'"),
        (["repro", "--jobs", "all"], "not 'all'"),
        (["repro", "--jobs", "²"], "not '²'"),
        (["repro", "--scheduler", "foo"], "an address like tcp://host:8786, not 'foo'"),
        (["repro", "--scheduler", ""], "not ''"),
        (["repro", "--scheduler", "tcp://"], "not 'tcp://'"),
        (["repro", "--scheduler", "tcp://host"], "not 'tcp://host'"),
        (["repro", "--scheduler", "host:8786"], "not 'host:8786'"),
        (["repro", "--scheduler", "http://host:8786"], "not 'http://host:8786'"),
        (["repro", "--scheduler", "tcp://host:port"], "not 'tcp://host:port'"),
        (["repro", "--scheduler", "tcp://host:70000"], "not 'tcp://host:70000'"),
        (["fetch", "nope"], "unknown asset 'nope'; there are: "),
        (["fetch", "needles", "nope"], "unknown asset 'nope'"),
        (["build", "nope"], "unknown backbone 'nope'; there are: "),
        (["build", "--profile", "fast"], "unknown profile 'fast'"),
        (["judge", "toi"], "unknown paper 'toi'"),
        (["power", "toi"], "unknown paper 'toi'"),
        (["power", "--profile", "fast"], "unknown profile 'fast'"),
        (["power", "toy", "--pilot", "gain"], "a pilot is claim.test=effect:spread, not 'gain'"),
        (["power", "toy", "--pilot", "gain.mean=1:x"], "a pilot is claim.test=effect:spread"),
        (["power", "toy", "--pilot", "gain.mean=1:0"], "a pilot's spread is a number above 0"),
        (["power", "toy", "--pilot", "gain.mean=nan:1"], "a pilot's spread is a number above 0"),
        (["power", "toy", "--pilot", "gain.sum=1:1"], "'toy' has no test 'gain.sum'"),
        (["power", "--pilot", "gain.mean=1:1"], "speaks of one paper"),
        (["repro", "--deadline", "soon"], "a time like 90s, 55m or 2h, not 'soon'"),
        (["repro", "--deadline", "0m"], "not '0m'"),
        (["grow", "toi"], "unknown paper 'toi'"),
        (["grow", "--budget", "soon"], "a time like 90s, 55m or 2h, not 'soon'"),
        (["grow", "--budget", "-5m"], "--budget: expected one argument"),
        (["grow", "--budget", "55"], "not '55'"),
        (["grow", "--budget", "infs"], "not 'infs'"),
        (["compare", "toi"], "unknown paper 'toi'"),
        (["compare", "--ref", "nowhere"], "no Git revision 'nowhere'"),
        (["compare", "--ref", ""], "no Git revision ''"),
        (["compare", "--ref", "--all"], "--ref: expected one argument"),
        (["tidy"], "required: paper"),
        (["tidy", "toy", "toi"], "unknown paper 'toi'"),
        (["report", "toy"], "unrecognized arguments: toy"),
    ],
)
def test_arguments(place, capsys, arguments, words):
    ends(place, capsys, arguments, BAD, words)


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["n"], "--set takes NAME=VALUE, got 'n'"),
        (["=5"], "--set takes NAME=VALUE"),
        ([""], "--set takes NAME=VALUE"),
        (["n=["], "--set n: '[' is not a YAML value"),
        (["n=*a"], "is not a YAML value"),
        (["n=\0"], "is not a YAML value"),
        (["n={a: 1, a: 2}"], "is not a YAML value"),
        (["n=!!python/object/apply:os.getcwd []"], "is not a YAML value"),
        (["n=1", "n=2"], "--set n: given twice"),
        (["m=3"], "unknown parameter 'm'; this notebook has: n, scales"),
        (["profile=smoke"], "unknown parameter 'profile'"),
        (["n=0"], "parameter 'n' = 0: must be a whole number (>= 1, <= 100): number of points"),
        (["n=101"], "parameter 'n' = 101"),
        (["n=0100000"], "parameter 'n' = 100000"),
        (["n=1.5"], "parameter 'n' = 1.5"),
        (["n=true"], "parameter 'n' = True: must be a whole number"),
        (["n=yes"], "parameter 'n' = 'yes'"),
        (["n=1:30"], "parameter 'n' = '1:30'"),
        (["n='3'"], "parameter 'n' = '3'"),
        (["n="], "parameter 'n' = None"),
        (["n=null"], "parameter 'n' = None"),
        (["n={}"], "parameter 'n' = {}"),
        (["n=[1, 2]"], "parameter 'n' = [1, 2]"),
        (["n=.nan"], "parameter 'n' = nan"),
        (["n=.inf"], "parameter 'n' = inf"),
        (["n=2020-01-01"], "parameter 'n' = '2020-01-01'"),
        (["scales=0.1"], "parameter 'scales' = 0.1: must be a list of numbers"),
        (["scales=[]"], "parameter 'scales' = []"),
        (["scales=[0]"], "parameter 'scales': every element must be > 0"),
        (["scales=[wide]"], "'wide': must be a list of numbers"),
        (["scales=[true]"], "True: must be a list of numbers"),
        (["scales=[.nan]"], "must be a list of numbers"),
        (["scales=[[1]]"], "must be a list of numbers"),
        (["scales={a: 1}"], "must be a list of numbers"),
    ],
)
def test_set(place, capsys, assignments, words):
    arguments = [part for text in assignments for part in ("--set", text)]
    ends(place, capsys, [*RUN, *arguments], BAD, words)


def test_numbers_are_read_as_in_params(place, monkeypatch):
    given = []
    monkeypatch.setattr(
        cli, "_overrides", lambda texts, read=cli._overrides: given.append(read(texts))
    )
    with contextlib.suppress(SystemExit, AssertionError):
        cli.main([*RUN, "--set", "n=010", "--set", "scales=[1e-3, 0x10]"])
    assert given == [{"n": 10, "scales": [1e-3, 16]}]


# Files that people edit ---------------------------------------------------------------------------


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda root: _write(root / name, content.encode())


def raw(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda root: _write(root / name, content)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def gone(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


def directory(name: str) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        (root / name).unlink()
        (root / name).mkdir()

    return spoil


def replaced(name: str, old: str, new: str) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        before = (root / name).read_text()
        assert old in before
        (root / name).write_text(before.replace(old, new, 1))

    return spoil


def changed(name: str, edit: Callable[[dict], object]) -> Callable[[Path], None]:
    """Edit what a YAML or JSON file holds."""

    def spoil(root: Path) -> None:
        path = root / name
        value = yaml.safe_load(path.read_text())
        edit(value)
        dump = json.dumps if path.suffix != ".yaml" else yaml.safe_dump
        path.write_text(dump(value))

    return spoil


def toy(params: dict) -> dict:
    return params["papers"]["toy"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (text(PARAMS, ""), "needs the keys 'profile' and 'papers'"),
        (text(PARAMS, "# nothing\n"), "needs the keys"),
        (text(PARAMS, "[]"), "needs the keys"),
        (text(PARAMS, "cpu"), "needs the keys"),
        (text(PARAMS, "profile: cpu"), "needs the keys"),
        (text(PARAMS, "papers: {}"), "needs the keys"),
        (text(PARAMS, "profile: cpu\npapers:\n  toy: [1"), "params.yaml, line 3: not valid YAML"),
        (text(PARAMS, "profile: cpu\n\tpapers: {}"), "params.yaml, line 2: not valid YAML"),
        (text(PARAMS, "profile: cpu\npapers: *all"), "params.yaml, line 2: not valid YAML"),
        (text(PARAMS, "profile: cpu\npapers: !paper {}"), "params.yaml, line 2: not valid YAML"),
        (text(PARAMS, "profile: cpu\npapers: {}\n---\n{}"), "params.yaml, line 3: not valid YAML"),
        (text(PARAMS, "profile: \0"), "params.yaml: not valid YAML"),
        (text(PARAMS, f"profile: cpu\n{CONFLICT}"), "params.yaml, line 2: an unresolved merge"),
        (raw(PARAMS, b"profile: cpu # \xe9"), "params.yaml: not a text in UTF-8"),
        (raw(PARAMS, "profile: cpu".encode("utf-16")), "params.yaml: not a text in UTF-8"),
        (
            text(PARAMS, "profile: cpu\nprofile: smoke"),
            "line 2: not valid YAML (the key 'profile' is",
        ),
        (replaced(PARAMS, "n: 20", "n: 20\n      n: 30"), "(the key 'n' is there twice)"),
        (replaced(PARAMS, "papers:\n", "papers:\n  toy: {}\n"), "(the key 'toy' is there twice)"),
        (changed(PARAMS, lambda p: p.update(profile="fast")), "unknown profile 'fast'"),
        (changed(PARAMS, lambda p: p.update(profile=None)), "unknown profile None"),
        (changed(PARAMS, lambda p: p.update(profile=["cpu"])), "unknown profile ['cpu']"),
        (changed(PARAMS, lambda p: p.update(profile=True)), "unknown profile True"),
        (changed(PARAMS, lambda p: p.update(papers=None)), "'papers' must map each paper"),
        (changed(PARAMS, lambda p: p.update(papers=["toy"])), "'papers' must map each paper"),
        (changed(PARAMS, lambda p: p.update(papers="toy")), "'papers' must map each paper"),
        (
            changed(PARAMS, lambda p: p["papers"].pop("toy")),
            "unknown paper 'toy'; params.yaml has: none",
        ),
        (
            changed(PARAMS, lambda p: p["papers"].update(toy=None)),
            "'toy' must map profiles to values",
        ),
        (
            changed(PARAMS, lambda p: p["papers"].update(toy=[1])),
            "'toy' must map profiles to values",
        ),
        (changed(PARAMS, lambda p: toy(p).update(fast={})), "'toy' has a profile 'fast'"),
        (changed(PARAMS, lambda p: toy(p).pop("cpu")), "'toy' has no profile 'cpu'"),
        (
            changed(PARAMS, lambda p: toy(p).update(cpu=[1])),
            "'toy', 'cpu' must map names to values",
        ),
        (
            changed(PARAMS, lambda p: toy(p).update(cpu="n")),
            "'toy', 'cpu' must map names to values",
        ),
        (changed(PARAMS, lambda p: toy(p).update(cpu=None)), "no value for the parameter 'n'"),
        (changed(PARAMS, lambda p: toy(p)["cpu"].update({3: 4})), "'toy', 'cpu': 3 is no name"),
        (changed(PARAMS, lambda p: toy(p)["cpu"].pop("n")), "no value for the parameter 'n'"),
        (changed(PARAMS, lambda p: toy(p)["cpu"].update(n=0)), "parameter 'n' = 0"),
        (changed(PARAMS, lambda p: toy(p)["cpu"].update(n=True)), "parameter 'n' = True"),
        (changed(PARAMS, lambda p: toy(p)["cpu"].update(n="3")), "parameter 'n' = '3'"),
        (changed(PARAMS, lambda p: toy(p)["cpu"].update(m=3)), "unknown parameter 'm'"),
        (changed(PARAMS, lambda p: toy(p)["cpu"].update(scales=[])), "parameter 'scales' = []"),
        (changed(PARAMS, lambda p: toy(p)["cpu"].update(scales=None)), "parameter 'scales' = None"),
    ],
)
@pytest.mark.parametrize("command", ["run", "repro"])
def test_params(place, capsys, spoil, words, command):
    spoil(place)
    if command == "repro" and is_of_one_paper(words):
        pytest.skip("stops that paper alone; see test_graph.py")
    ends(place, capsys, [command, "toy", "--profile", "cpu"], BAD, words)


def is_of_one_paper(words: str) -> bool:
    return "parameter" in words or words.startswith(("unknown paper", "'toy' has no"))


@pytest.mark.parametrize("spoil", [gone(PARAMS), directory(PARAMS)])
def test_no_params(place, capsys, spoil):
    spoil(place)
    ends(place, capsys, RUN, BAD, "not inside a Reattend checkout")


def first(record: dict) -> dict:
    return record["claims"][0]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (text(RECORD, ""), "toy.yaml: must be a mapping"),
        (text(RECORD, "[]"), "toy.yaml: must be a mapping"),
        (text(RECORD, "slug: [toy"), "notebooks/theory/toy.yaml, line 1: not valid YAML"),
        (replaced(RECORD, "year: 2020", f"year: 2020\n{CONFLICT}"), "an unresolved merge"),
        (
            replaced(RECORD, "year: 2020", "year: 2020\nyear: 2021"),
            "(the key 'year' is there twice)",
        ),
        (raw(RECORD, b"title: \xff"), "notebooks/theory/toy.yaml: not a text in UTF-8"),
        (changed(RECORD, lambda r: r.update({3: 4})), "toy.yaml: 3: "),
        (changed(RECORD, lambda r: r.update(titel="x")), "toy.yaml: titel: "),
        (changed(RECORD, lambda r: r.pop("title")), "toy.yaml: title: "),
        (changed(RECORD, lambda r: r.update(title="")), "toy.yaml: title: "),
        (changed(RECORD, lambda r: r.update(year="then")), "toy.yaml: year: "),
        (changed(RECORD, lambda r: r.update(slug="toi")), "toy.yaml: slug and family"),
        (changed(RECORD, lambda r: r.update(family="vision")), "toy.yaml: slug and family"),
        (changed(RECORD, lambda r: r.update(family="toys")), "toy.yaml: family: "),
        (changed(RECORD, lambda r: r.update(needs=None)), "toy.yaml: needs: "),
        (changed(RECORD, lambda r: r.update(needs=["smollm2"])), "toy.yaml: needs: "),
        (changed(RECORD, lambda r: r.update(needs={"asset": []})), "toy.yaml: needs.asset: "),
        (
            changed(RECORD, lambda r: r.update(needs={"assets": ["x"]})),
            "needs.assets: unknown 'x'; there",
        ),
        (
            changed(RECORD, lambda r: r.update(needs={"backbones": ["x"]})),
            "needs.backbones: unknown 'x'",
        ),
        (changed(RECORD, lambda r: r.update(claims=None)), "toy.yaml: claims: "),
        (changed(RECORD, lambda r: r.update(claims=[])), "toy.yaml: claims: "),
        (changed(RECORD, lambda r: r.update(claims=["gain"])), "toy.yaml: claims.0: "),
        (changed(RECORD, lambda r: r["claims"].append(first(r))), "two claims have the same id"),
        (changed(RECORD, lambda r: first(r).update(id="Gain 1")), "toy.yaml: claims.Gain 1.id: "),
        (
            changed(RECORD, lambda r: first(r).update(tests=[])),
            "needs either 'tests' or 'out_of_reach'",
        ),
        (changed(RECORD, lambda r: first(r)["tests"][0].pop("unit")), "tests.mean.unit: "),
        (changed(RECORD, lambda r: r.update(budget_seconds={"cpu": -1})), "budget_seconds.cpu: "),
        (
            lambda root: shutil.copy(root / RECORD, _made(root / "notebooks/vision")),
            "two records of one",
        ),
        (gone(RECORD), "unknown paper 'toy'"),
        (directory(RECORD), "notebooks/theory/toy.yaml: is a directory"),
    ],
)
@pytest.mark.parametrize("command", [RUN, ["judge", "toy"]])
def test_records(place, capsys, spoil, words, command):
    spoil(place)
    if "needs." in words and "unknown" in words and command != RUN:
        pytest.skip("judging needs neither assets nor backbones")
    ends(place, capsys, command, BAD, words)


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def cells(edit: Callable[[list], object]) -> Callable[[Path], None]:
    return changed(NOTEBOOK, lambda notebook: edit(notebook["cells"]))


def source(number: int, code: str) -> Callable[[Path], None]:
    return cells(lambda found: found[number - 1].update(source=code))


def tags(number: int, *names: str) -> Callable[[Path], None]:
    return cells(lambda found: found[number - 1].update(metadata={"tags": list(names)}))


WHOLE = {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": KERNEL}}


def notebook(**changes) -> Callable[[Path], None]:
    return text(NOTEBOOK, json.dumps(WHOLE | changes))


SCHEMA = "from reattend.parameters import Parameters\nclass A(Parameters):\n    n: int\n"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (gone(NOTEBOOK), "no notebook toy.ipynb beside its record"),
        (directory(NOTEBOOK), "notebooks/theory/toy.ipynb: is a directory"),
        (text(NOTEBOOK, ""), "notebooks/theory/toy.ipynb, empty"),
        (text(NOTEBOOK, "{}"), "toy.ipynb is not a notebook: its nbformat is None, not 4"),
        (text(NOTEBOOK, "[]"), "toy.ipynb: must hold a mapping"),
        (text(NOTEBOOK, "null"), "toy.ipynb: must hold a mapping"),
        (text(NOTEBOOK, '{"cells": ['), "toy.ipynb, line 1: not valid JSON"),
        (text(NOTEBOOK, "print(1)"), "toy.ipynb, line 1: not valid JSON"),
        (text(NOTEBOOK, "[" * 100_000), "toy.ipynb: not valid JSON (nested too deeply)"),
        (replaced(NOTEBOOK, '"cells"', CONFLICT), "an unresolved merge"),
        (raw(NOTEBOOK, b'{"cells": "\xff"}'), "toy.ipynb: not a text in UTF-8"),
        (notebook(nbformat=3, worksheets=[]), "its nbformat is 3, not 4"),
        (notebook(cells=[], metadata=None), "it has no metadata"),
        (notebook(), "it has no list of cells"),
        (notebook(cells=None), "it has no list of cells"),
        (notebook(cells={}), "it has no list of cells"),
        (notebook(cells=[1]), "cell 1 is not a cell"),
        (notebook(cells=[]), "needs one cell tagged 'parameters', has 0"),
        (source(6, None), "cell 6 is not a cell"),
        (source(6, 5), "cell 6 is not a cell"),
        (source(6, "%matplotlib inline"), "cell 6 (%matplotlib inline): an IPython magic"),
        (source(6, "import os\n!ls"), "cell 6 (!ls): an IPython magic"),
        (source(6, "%%time\nx = 1"), "cell 6 (%%time): an IPython magic"),
        (source(6, "print?"), "cell 6 (print?): an IPython magic"),
        (source(6, "x = (1"), "cell 6 (x = (1): '(' was never closed"),
        (source(6, "if x:\nprint(x)"), "cell 6 (print(x)): expected an indented block"),
        (source(6, "x = '\0'"), "cell 6 (x = "),
        (source(6, 'profile = "smoke"'), "cell 6: sets profile again"),
        (source(6, "if True:\n    overrides = {}"), "cell 6: sets overrides again"),
        (source(6, "for profile in ('smoke', 'cpu'): pass"), "cell 6: sets profile again"),
        (tags(2), "needs one cell tagged 'parameters', has 0"),
        (tags(2, "Parameters"), "needs one cell tagged 'parameters', has 0"),
        (tags(4, "parameters"), "needs one cell tagged 'parameters', has 2"),
        (tags(4, "injected-parameters"), "is an executed copy"),
        (cells(lambda c: c[1].update(cell_type="raw")), "tagged 'parameters' must be a code cell"),
        (source(2, 'PROFILE = "smoke"'), "tagged 'parameters' must set profile and overrides"),
        (source(2, 'profile = "smoke"'), "tagged 'parameters' must set profile and overrides"),
        (source(2, ""), "tagged 'parameters' must set profile and overrides"),
        (source(2, "profile, overrides, n = 'cpu', {}, 5"), "and nothing else"),
        (tags(3), "needs one cell tagged 'schema', has 0"),
        (tags(4, "schema"), "needs one cell tagged 'schema', has 2"),
        (source(3, "1 / 0"), "the cell tagged 'schema': ZeroDivisionError: division by zero"),
        (source(3, "raise SystemExit('enough')"), "the cell tagged 'schema': SystemExit: enough"),
        (source(3, "import nowhere"), "'schema': ModuleNotFoundError: No module named 'nowhere'"),
        (source(3, "return 1"), "'schema': SyntaxError: 'return' outside function"),
        (source(3, "raise ValueError('one\\ntwo')"), "'schema': ValueError: one"),
        (source(3, "n = 1"), "must declare one Parameters class, has 0"),
        (source(3, SCHEMA + "class B(A):\n    m: int"), "must declare one Parameters class, has 2"),
    ],
)
@pytest.mark.parametrize("command", ["run", "tidy"])
def test_notebooks(place, capsys, spoil, words, command):
    spoil(place)
    ends(place, capsys, [command, "toy"], BAD, words)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (text(LOCK, f"schema: '2.0'\n{CONFLICT}"), "dvc.lock, line 2: an unresolved merge"),
        (text(LOCK, "stages: ["), "dvc.lock, line 1: not valid YAML"),
        (text(LOCK, "stages:\n  a: {}\n  a: {}\n"), "dvc.lock, line 3: not valid YAML"),
        (text(LOCK, ""), "dvc.lock holds no stages"),
        (text(LOCK, "[]"), "dvc.lock holds no stages"),
        (text(LOCK, "stages: []"), "dvc.lock holds no stages"),
        (raw(LOCK, b"\xff\xfe"), "dvc.lock: not a text in UTF-8"),
        (directory(LOCK), "dvc.lock: is a directory"),
        (gone(".dvc/config"), "no .dvc/config in the project's root"),
    ],
)
def test_dvc_files(place, capsys, spoil, words):
    spoil(place)
    ends(place, capsys, ["repro"], BAD, words)


# Results ------------------------------------------------------------------------------------------

DAMAGE = [
    (lambda good: "", "empty"),
    (lambda good: "\n", "empty"),
    (lambda good: good[: len(good) // 2], "not valid JSON"),
    (lambda good: CONFLICT.format(good), "line 1: an unresolved merge"),
    (lambda good: "[]", "must hold a mapping"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGE)
def test_damaged_results_that_are_compared(place, capsys, damage, words):
    good = (place / RESULTS).read_text()
    (place / RESULTS).write_text(damage(good))
    line = ends(place, capsys, ["compare", "toy"], BAD, words)
    assert RESULTS in line


@pytest.mark.parametrize("damage", [damage for damage, _ in DAMAGE])
def test_damaged_facts_that_are_judged(place, capsys, damage):
    good = (place / FACTS).read_text()
    (place / FACTS).write_text(damage(good))
    ends(place, capsys, ["judge", "toy"], BAD, "run.json")


@pytest.mark.parametrize(
    ("name", "arguments"), [(FACTS, []), (RESULTS, ["--html", "--no-notebooks"])]
)
@pytest.mark.parametrize(("damage", "words"), DAMAGE)
def test_damaged_results_that_are_reported(place, capsys, name, arguments, damage, words):
    good = (place / name).read_text()
    (place / name).write_text(damage(good))
    line = ends(place, capsys, ["report", *arguments], BAD, words)
    assert name in line


def coming_back(place: Path, monkeypatch, edit: Callable[[Path], object]) -> None:
    """Have a notebook leave the results of an earlier run, edited."""

    def execute(_, __, profile, ___, out, ____):
        shutil.copytree(place / "figures/theory/toy" / profile, out, dirs_exist_ok=True)
        edit(out)

    monkeypatch.setattr(run, "execute", execute)


def test_the_fake_notebook_succeeds(place, capsys, monkeypatch):
    coming_back(place, monkeypatch, lambda out: None)
    with pytest.raises(SystemExit) as ended:
        cli.main(RUN)
    assert ended.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda out: (out / "results.json").unlink(), "ended without results"),
        (lambda out: (out / "run.json").unlink(), "ended without results"),
        (lambda out: (out / "results.json").write_text(""), "wrote a damaged file"),
        (lambda out: (out / "results.json").write_text('{"slug": "toy"'), "wrote a damaged file"),
        (lambda out: (out / "results.json").write_text("[]"), "wrote a damaged file"),
        (lambda out: (out / "run.json").write_text("{"), "wrote a damaged file"),
        (
            lambda out: changed("results.json", lambda r: r.update(slug="toi"))(out),
            'slug "toi" where',
        ),
        (
            lambda out: changed("results.json", lambda r: r.update(profile="smoke"))(out),
            'profile "smoke" where "cpu" was asked for',
        ),
        (
            lambda out: changed("results.json", lambda r: r["parameters"].update(n=3))(out),
            'parameters {"n": 3, "scales": [0.1]} where {"n": 20, "scales": [0.1]} was asked for',
        ),
        (
            lambda out: changed("results.json", lambda r: r.pop("parameters"))(out),
            "parameters null",
        ),
    ],
)
def test_results_that_are_not_what_was_asked_for(place, capsys, monkeypatch, edit, words):
    coming_back(place, monkeypatch, edit)
    ends(place, capsys, RUN, FAILED, words)


# Circumstances ------------------------------------------------------------------------------------


def test_results_that_cannot_take_their_place_are_kept(place, capsys, monkeypatch):
    coming_back(place, monkeypatch, lambda out: None)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(
        run.shutil, "copytree", lambda source, target, **options: _copy(source, target)
    )
    _copy = full
    coming = place / "figures/theory/toy/cpu"

    def execute(_, __, ___, ____, out, _____):
        for path in coming.iterdir():
            shutil.copy(path, out)

    monkeypatch.setattr(run, "execute", execute)
    line = ends(place, capsys, RUN, FAILED, "No space left on device; earlier results kept")
    assert "what this run found: build/kept/toy-cpu" in line
    kept = place / "build" / "kept" / "toy-cpu"
    assert {p.name for p in kept.iterdir()} == {p.name for p in coming.iterdir()}


def test_verdicts_that_cannot_be_judged_keep_the_new_results(place, capsys, monkeypatch):
    coming_back(place, monkeypatch, lambda out: None)
    gpu = place / "figures/theory/toy/gpu"
    gpu.mkdir()
    (gpu / "evidence.csv").write_text("claim\n")
    why = "figures/theory/toy/gpu: evidence.csv without run.json"
    line = ends(place, capsys, RUN, FAILED, why, written=FACTS)  # which names its fingerprint
    assert "the new results are in figures/theory/toy/cpu" in line


def test_a_paper_that_is_being_run(place, capsys):
    with locked(place / "build" / "locks" / "toy.lock", wait=False):
        ends(place, capsys, RUN, FAILED, "'toy' is being run by another process")


def test_a_second_repro(place, capsys):
    with locked(place / "build" / "locks" / "repro.lock", wait=False):
        ends(place, capsys, ["repro"], FAILED, "another `reattend repro` is at work")


def test_build_is_a_file(place, capsys):
    (place / "build").write_text("")
    ends(place, capsys, RUN, FAILED, "Not a directory: build/locks")


def test_a_scheduler_that_does_not_answer(place, capsys):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{unused.getsockname()[1]}"
        arguments = ["repro", "--scheduler", address]
        ends(place, capsys, arguments, FAILED, f"no Dask scheduler answers at {address}")


def test_outside_a_checkout(place, capsys, monkeypatch, tmp_path):
    for command in (RUN, ["repro"], ["report"], ["judge"], ["compare"], ["sync"]):
        monkeypatch.chdir(tmp_path)
        ends(place, capsys, command, BAD, "not inside a Reattend checkout")


def test_no_git(place, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    ends(place, capsys, ["compare"], BAD, "no Git revision 'HEAD'")


def test_a_commit_of_a_repository_around_it_is_not_its_own(place, capsys):
    shutil.rmtree(place / ".git")
    outer = {"cwd": place.parent, "check": True, "capture_output": True}
    subprocess.run(["git", "init", "-q"], **outer)
    author = ["-c", "user.name=t", "-c", "user.email=t@t.invalid"]
    subprocess.run(["git", *author, "commit", "-q", "--allow-empty", "-m", "outer"], **outer)
    ends(place, capsys, ["compare"], BAD, "no Git revision 'HEAD'")
    from reattend.replication import _commit

    assert _commit(place) is None


def test_ctrl_c(place, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "execute", interrupted)
    ends(place, capsys, RUN, 130, "stopped; earlier results are untouched")
    assert not list((place / "build" / "running").iterdir())
