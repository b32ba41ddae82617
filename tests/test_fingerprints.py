"""Fingerprints move with meaning only, on made-up modules and on the suite's own graph."""

import ast
import json
import re
import shutil
import textwrap
import time

import pytest

from reattend.fingerprints import (
    LIBRARY,
    NO_RESULT,
    code_fingerprint,
    definitions,
    module_fingerprint,
    notebook_sources,
    pinned_versions,
    result_bearing,
)
from reattend.pipeline.provenance import all_papers
from reattend.project import load_yaml
from reattend.records import record_paths
from reattend.syntax import Analyses, source_hash

# The normal form --------------------------------------------------------------------------------------

EVERY_SYNTAX = '''
"""Module."""
from __future__ import annotations
import a.b.c, d as e
from f import g as h, i
X: int = 1_000; Y = Z = (1.5e-3, 2j, b"\\x00", "é\\u200b🇨🇭", None, ..., True, -0.0, 10**30)
first, *rest = [*Y, *range(3)]
D = {"a": 1, **{}, 2: {3, 4}}
@decorate(1)
async def coroutine(p, /, q: int = 1, *args: str, k, l=2, **kw) -> None:
    """Doc."""
    async with p as q, r: await q
    async for s in t: yield s
    return
def function():
    global X
    def inner():
        nonlocal_ = 1
        nonlocal nonlocal_
    x = lambda u, *v, w=1: (u, v) if w else [n async for n in m if n if not o]
    text = f"a{x!r:>{width}}b" "c" f"{y=}" f"{z:}" f"" f"{'q'}{d['k']}"
    return {k: v for k, v in D.items()}, {z for z in D}, (z for z in D), x[1:2, ::3, ...]
class C(B, metaclass=M):
    field: "int"
    other: list[int] = []
    __slots__ = ()
    def method(self): return super().method().attr[0](*self.a, **self.b)
try:
    assert X == 1 and Y is not None or not Z, "message"
    raise ValueError(f"words {X}") from error
except* (TypeError, KeyError) as caught:
    pass
try: del X, Y[0], Z.a
except Exception: raise
else: X += 1; X //= 2; X @= 3
finally: print("words", X, file=sys.stderr)
while (n := 10) > 5 >= 1 != 2 <= 3 < 4 in x not in y:
    if n: break
    elif 1: continue
    else: ...
else: pass
for i, (j, k) in enumerate(range(3)): ~i ^ j & k | -i << 2 >> +1 % 3
with open("f") as f, g(): yield_ = 1
match command:
    case [1, -2, "a" | None, *_]: pass
    case {"k": v, **others} if v: pass
    case Point(x=0, y=[a, _]) as whole: pass
    case str() | True: pass
'''
GOLDEN = "f4f64cea31944505"


def test_the_normal_form_is_the_same_in_every_python():
    assert source_hash(EVERY_SYNTAX) == GOLDEN


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ('def f(x):\n    """Doc."""\n    return x + 1  # why', "def f(x):\n  return (x+1)"),
        ("def f(x: int) -> int:\n    y: int = 1\n    z: str\n    return y", "def f(x):\n    y = 1\n    return y"),
        ("raise ValueError(f'{x} is wrong: {hint(x)}') from None", "raise ValueError('no')"),
        ("assert x, 'words'", "assert x"),
        ("print(f'loss {x:.2f} of', n, end='')", "print(f'Loss: {x:.3f}', n, end=' ')"),
        ("for x in tqdm(xs, desc='one'): pass", "for x in tqdm(xs): pass"),
        ("warnings.warn('a')", "warnings.warn('b')"),
        ("'text'\nx = 1\npass", "x = 1"),
        ("if TYPE_CHECKING:\n    import a\nx = 1", "x = 1"),
        ("class A(M):\n    '''Doc.'''\n    x = 1", "class A(M):\n    x = 1"),
    ],
)  # fmt: skip
def test_what_only_a_reader_sees_does_not_count(one, other):
    assert source_hash(one) == source_hash(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x = 'a'", "x = 'b'"),
        ("x = 1", "x = 1.0"),
        ("x = 1", "x = True"),
        ("x = f'{a}'", "x = f'{a!r}'"),
        ("x = f'{a:2}'", "x = f'{a:3}'"),
        ("def f(x=1): pass", "def f(x=2): pass"),
        ("raise ValueError('a')", "raise KeyError('a')"),
        ("assert x", "assert y"),
        ("print(f(1))", "print(f(2))"),
        ("print(next(rows))", "print(rows)"),
        ("for x in tqdm(xs): pass", "for x in tqdm(ys): pass"),
        ("class A(M):\n    x: int = 1", "class A(M):\n    x: float = 1"),
        ("class A(M):\n    x: int\n    y: int", "class A(M):\n    y: int\n    x: int"),
        ("class A(M):\n    x: int = 1\n    y = 2", "class A(M):\n    x = 1\n    y: int = 2"),
        ("if x:\n    y\nelse:\n    z", "if x:\n    y\n    z"),
        ("f(a, *b)", "f(a, b)"),
        ("match x:\n case None: 1", "match x:\n case True: 1"),
    ],
)
def test_what_a_number_may_depend_on_counts(one, other):
    assert source_hash(one) != source_hash(other)


# What is reached --------------------------------------------------------------------------------------


@pytest.fixture
def library(tmp_path):
    files = {
        "__init__.py": "",
        "a.py": """
            import numpy as np
            from reattend.sub import b
            from reattend.sub.b import deep
            from reattend.plots import draw

            SIZE = 3

            def used(x):
                return b.helper(x) * np.ones(SIZE)

            def unused(x):
                return deep(x)

            def local(deep):
                return deep(1)

            def within():
                from reattend.c import TABLE
                return TABLE

            def hands_on():
                return unused.__name__, apply(b)

            def file():
                return Path(__file__).with_name("table.json")
        """,
        "table.json": "[1]",
        "other.json": "[1]",
        "plots.py": "def draw():\n    return 1\n",
        "sub/__init__.py": "",
        "sub/b.py": """
            def helper(x):
                return [deeper(y) for y in x]

            def deeper(y):
                return y

            def deep(x):
                return 1

            def never():
                return 2
        """,
        "c.py": """
            KINDS = {}
            def register(f):
                KINDS[f.__name__] = f
                return f

            @register
            def kind():
                return 1

            def plain():
                return 2

            TABLE = KINDS
            TABLE["more"] = 1
        """,
        "star.py": "from reattend.sub.b import *\n",
        "lazy.py": """
            import reattend.sub.b as m
            import reattend.sub.b

            X = reattend.sub.b.deep

            def f():
                return m.deep(1)
        """,
    }
    for name, text in files.items():
        path = tmp_path / "reattend" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return tmp_path / "reattend"


def reached(library, *sources):
    """{module: names} of definitions, without imports."""
    found = definitions(sources, library)["definitions"]
    names = {
        module.removeprefix("reattend."): {n for n in names if not n.startswith("import ")}
        for module, names in found.items()
    }
    return {module: each for module, each in names.items() if each}


ALL_OF_B = {"helper", "deeper", "deep", "never"}
USED_OF_C = {"TABLE", "KINDS", "statement", "kind", "register"}


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("from reattend.a import used", {}),
        ("from reattend.a import used\nused(1)", {"a": {"used", "SIZE"}, "sub.b": {"helper", "deeper"}}),
        ("import reattend.a\nreattend.a.SIZE", {"a": {"SIZE"}}),
        ("from reattend import a as m\nm.SIZE", {"a": {"SIZE"}}),
        ("from reattend.a import local\nlocal(1)", {"a": {"local"}}),
        ("from reattend.a import draw\ndraw()", {}),
        ("def f():\n    from reattend.a import SIZE as S\n    return S", {"a": {"SIZE"}}),
        ("from reattend.sub.b import deep\nclass A:\n    x = deep", {"sub.b": {"deep"}}),
        ("from reattend.a import SIZE\n[SIZE for SIZE in SIZE]", {"a": {"SIZE"}}),
        ("from reattend.a import within\nwithin()", {"a": {"within"}, "c": USED_OF_C}),
        ("from reattend.lazy import f\nf()", {"lazy": {"f"}, "sub.b": {"deep"}}),
        ("from reattend.lazy import X\nX()", {"lazy": {"X"}, "sub.b": {"deep"}}),
        ("import reattend.sub.b as m\ng(m)", {"sub.b": ALL_OF_B}),
        ("from reattend.star import *", {"sub.b": ALL_OF_B}),
        ("from reattend.a import hands_on\nhands_on()", {"a": {"hands_on", "unused"}, "sub.b": ALL_OF_B}),
    ],
)  # fmt: skip
def test_names_are_followed(library, cell, expected):
    assert reached(library, cell) == expected


def test_names_are_followed_from_cell_to_cell(library):
    assert reached(library, "from reattend.a import SIZE", "print(SIZE)") == {"a": {"SIZE"}}


def test_another_definition_of_the_same_name_counts(library):
    cell = "from reattend.a import used\nused(1)"
    before = definitions([cell], library)
    (library / "c.py").write_text("def helper(x):\n    return [deeper(y) for y in x]\n")
    text = (library / "a.py").read_text()
    (library / "a.py").write_text(
        text.replace("from reattend.sub import b", "from reattend import c as b")
    )
    assert definitions([cell], library) != before
    (library / "a.py").write_text(text.replace("import numpy as np", "import torch as np"))
    assert definitions([cell], library) != before
    (library / "a.py").write_text(text)
    assert definitions([cell], library) == before


def test_a_file_that_a_definition_names_counts(library):
    cell = "from reattend.a import file\nfile()"
    before = definitions([cell], library)
    assert list(before["files"]) == ["table.json"]
    (library / "other.json").write_text("[2]")
    assert definitions([cell], library) == before
    (library / "table.json").write_text("[2]")
    assert definitions([cell], library) != before


def test_a_backbone_depends_on_what_its_build_uses(library):
    (library / "c.py").write_text("def build():\n    return step()\ndef step():\n    return 1\n")
    before = module_fingerprint("reattend.c", library)
    edit(library / "c.py", "return 1", "return 2")
    assert module_fingerprint("reattend.c", library) != before
    after = module_fingerprint("reattend.c", library)
    (library / "c.py").write_text((library / "c.py").read_text() + "def load():\n    return 1\n")
    assert module_fingerprint("reattend.c", library) == after


def test_analyses_are_kept_and_a_damaged_file_heals(tmp_path):
    path = tmp_path / "syntax.json"
    source = "@f\ndef f():\n    return g.h\nimport g\nX[1] = 2\n"
    first = Analyses()
    made = first.of("module", source)
    first.save(path)
    again = Analyses()
    again.load(path)
    assert again.known.keys() == first.known.keys()
    assert again.of("module", source) == made
    path.write_text(path.read_text()[:100])
    damaged = Analyses()
    damaged.load(path)
    assert not damaged.known
    damaged.of("cell", source)
    damaged.save(path)
    again = Analyses()
    again.load(path)
    assert len(again.known) == 1


# Records and versions ---------------------------------------------------------------------------------


def test_of_a_record_only_what_a_run_reads_counts():
    record = {
        "title": "T",
        "claims": [
            {"id": "c", "says": "s", "tests": [{"id": "t", "unit": "seed", "reproduced": 1}]}
        ],
        "needs": {"assets": ["b", "a"]},
        "reported": {"t": {"columns": ["x"], "rows": [[1]]}},
    }
    before = result_bearing(record)
    other = json.loads(json.dumps(record))
    other |= {"title": "U", "budget_seconds": {"cpu": 1}, "needs": {"assets": ["a", "b"]}}
    other["claims"][0] |= {"says": "else", "about": "training", "placebo": "none: why"}
    other["claims"][0]["tests"][0] |= {"reproduced": 2, "role": "gate", "statistic": "mean"}
    assert result_bearing(other) == before
    for path, value in (
        (["claims", 0, "id"], "d"),
        (["claims", 0, "tests", 0, "unit"], "item"),
        (["claims", 0, "tests", 0, "statistic"], "median"),
        (["needs", "assets"], ["a"]),
        (["reported", "t", "rows"], [[2]]),
    ):
        other = json.loads(json.dumps(record))
        place = other
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
        assert result_bearing(other) != before, path


def test_versions_are_those_of_the_reference_platform(tmp_path):
    (tmp_path / "constraints.txt").write_text("numpy==2.4.6\ntorch==2.13.0\ntransformers==5.23.0\n")
    assert pinned_versions(tmp_path) == {"torch": "2.13", "numpy": "2.4", "transformers": "5.23"}


# The real graph ---------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path, root):
    """A copy of the suite's library and notebooks to edit, and which papers an edit changes."""
    shutil.copytree(LIBRARY, tmp_path / "reattend", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(root / "notebooks", tmp_path / "notebooks")

    def fingerprints():
        return {
            path.stem: code_fingerprint(
                path.with_suffix(".ipynb"), load_yaml(path.read_text()), tmp_path / "reattend"
            )
            for path in sorted((tmp_path / "notebooks").glob("*/*.yaml"))
        }

    before = fingerprints()

    def changed():
        after = fingerprints()
        return {slug for slug in after if after[slug] != before[slug]}

    return tmp_path, changed


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def papers_using(root, module, name):
    return {
        slug
        for slug, path in record_paths(root).items()
        if name in definitions(notebook_sources(path.with_suffix(".ipynb")))["definitions"].get(module, {})
    }  # fmt: skip


def test_comments_docstrings_and_messages_change_nothing(checkout):
    path, changed = checkout
    for file in (path / "reattend").rglob("*.py"):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                node.exc.args = [ast.Constant("other words")]
            elif isinstance(node, ast.FunctionDef):
                node.returns = None
                if ast.get_docstring(node):
                    node.body[0].value.value = "Other words."
        file.write_text(ast.unparse(tree) + "\n# a remark\n")
    assert changed() == set()


def test_new_definitions_that_nobody_uses_change_nothing(checkout):
    path, changed = checkout
    for file in (path / "reattend").rglob("*.py"):
        new = "\n\nUNUSED = [1]\n\n\ndef _unused_helper(x):\n    return x\n"
        file.write_text(file.read_text() + new)
    assert changed() == set()


def test_what_bears_on_no_result_changes_nothing(checkout):
    path, changed = checkout
    for name in [name for name in NO_RESULT if ":" not in name]:
        file = (path / "reattend").joinpath(*name.split(".")[1:]).with_suffix(".py")
        if file.exists():
            file.write_text(
                "import json\nEDITED = json.dumps(1)\nprint(EDITED)\n" + file.read_text()
            )
    assert changed() == set()


def test_editing_outputs_and_metadata_changes_nothing(checkout):
    path, changed = checkout
    for file in (path / "notebooks").glob("*/*.ipynb"):
        notebook = json.loads(file.read_text())
        notebook["metadata"]["touched"] = True
        for cell in notebook["cells"]:
            cell["metadata"]["collapsed"] = True
            if cell["cell_type"] == "code":
                cell["outputs"], cell["execution_count"] = [], None
        file.write_text(json.dumps(notebook))
    assert changed() == set()


def test_editing_a_method_changes_those_who_use_it(checkout, root):
    path, changed = checkout
    edit(path / "reattend/long_context/flexprefill.py", "\n    return ", "\n    return 0 * ")
    assert changed() == {"flexprefill"}


def test_editing_a_shared_function_changes_just_those_who_use_it(checkout, root):
    path, changed = checkout
    edit(path / "reattend/training/loop.py", "optimiser.step()", "optimiser.step(None)")
    expected = papers_using(root, "reattend.training.loop", "train")
    assert {"icl_regression", "halonet"} <= expected
    assert "flexprefill" not in expected
    assert changed() == expected


def test_what_a_module_does_when_it_is_imported_counts(checkout, root):
    path, changed = checkout
    operator = path / "reattend/attention/block_sparse.py"
    operator.write_text(operator.read_text() + "\ntorch.set_default_dtype(torch.float64)\n")
    assert "flexprefill" in changed()
    assert not {"zoology", "efficient_probing"} & changed()


def test_editing_the_replication_changes_all(checkout, root):
    path, changed = checkout
    edit(path / "reattend/replication.py", "torch.manual_seed(seed)", "torch.manual_seed(seed + 1)")
    assert changed() == set(record_paths(root))


def test_editing_a_cell_or_a_claim_changes_its_paper(checkout):
    path, changed = checkout
    edit(path / "notebooks/language_modeling/zoology.yaml", "- id: ", "- id: x")
    assert changed() == {"zoology"}


def test_the_whole_suite_takes_a_moment(root, tmp_path):
    for name in ("notebooks", "params.yaml", "constraints.txt"):
        (tmp_path / name).symlink_to(root / name)
    all_papers(tmp_path)
    started = time.process_time()
    papers = all_papers(tmp_path)
    assert time.process_time() - started < 0.06 * len(papers)  # 17 papers: 1 s; measured: 0.2 s


# What fingerprints rely on ----------------------------------------------------------------------------

BY_NAME = {
    "__init__.py",
    "backbones/store.py",
    "backbones/reports/page.py",  # a report is no part of what is built
    "attention/registry.py",
}


def import_problems(source: str) -> list[str]:
    """Ways of importing, or of finding files, that fingerprints do not follow."""
    problems = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                problems.append(f"line {node.lineno}: relative import")
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Name) and node.id in ("__import__", "exec", "eval", "globals"):
            names = [node.id]
        else:
            continue
        refused = ("importlib", "importlib.import_module", "importlib.resources", "runpy", "imp",
                   "pkgutil", "__import__", "exec", "eval", "globals")  # fmt: skip
        if isinstance(node, ast.ImportFrom) and node.module == "importlib":
            names = names[1:]
        problems += [f"line {node.lineno}: {name}" for name in names if name in refused]
    return problems


@pytest.mark.parametrize(
    "source",
    [
        "from . import a",
        "from ..a import b",
        "import importlib",
        "from importlib import import_module",
        "from importlib.resources import files",
        "x = __import__('a')",
        "exec('import a')",
    ],
)
def test_imports_that_cannot_be_followed_are_seen(source):
    assert import_problems(source)
    assert not import_problems("from importlib import metadata\nfrom reattend.a import b")


def test_library_and_notebooks_import_by_name(root):
    """Fingerprints follow names, so nothing may be reached through a string."""
    for path in sorted(LIBRARY.rglob("*.py")):
        name = path.relative_to(LIBRARY).as_posix()
        if name not in BY_NAME and not name.startswith("pipeline/"):
            assert not import_problems(path.read_text()), name
    for path in record_paths(root).values():
        for source in notebook_sources(path.with_suffix(".ipynb")):
            assert not import_problems(source), path.stem
            by_name = r"from reattend import attach|reattend\.attach\b|attention\.registry"
            assert not re.search(by_name, source), f"{path.stem}: import attach from attention.host"


def test_every_use_of_file_names_a_file_that_counts():
    for path in sorted(LIBRARY.rglob("*.py")):
        module = "reattend." + path.relative_to(LIBRARY).with_suffix("").as_posix().replace(
            "/", "."
        )
        if module in (*NO_RESULT, "reattend.fingerprints", "reattend.syntax"):
            continue
        analysed = Analyses().of("module", path.read_text())
        for unit in analysed.definitions + analysed.statements:
            if "__file__" in unit.references and not module.startswith(
                ("reattend.pipeline", "reattend.site")
            ):
                named = [text for text in unit.strings if (path.parent / text).is_file()]
                assert named, f"{module}: {unit.names} uses __file__ and names no file beside it"


def test_what_bears_on_no_result_exists():
    for name in NO_RESULT:
        module, _, definition = name.partition(":")
        file = LIBRARY.joinpath(*module.split(".")[1:]).with_suffix(".py")
        assert file.exists(), name
        assert f"def {definition}" in file.read_text(), name
