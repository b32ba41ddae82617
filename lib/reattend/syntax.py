"""Python sources reduced to what can change a number, definition by definition.

The normal form is written by this module, not by `ast.dump`, whose text differs between Python
versions; a golden test holds it. It leaves out what only a reader sees: comments, layout, docstrings,
annotations (but those of class bodies, which pydantic and dataclasses read), the arguments of a
`raise`, the message of an `assert`, and the wording of `print`, `warn` and progress bars.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

Import = tuple[str, str, str]
"""Name bound ("" for none, "*" for all), module, name in that module ("" for the module itself)."""


@dataclass
class Unit:
    """One top-level definition or statement, or one notebook cell."""

    names: list[str]  # what it binds at the top level
    hash: str  # of its normal form
    references: list[str]  # dotted names it uses and does not bind itself
    imports: list[Import]  # inside it
    strings: list[str]  # if it uses `__file__`: its texts, some of which may name files


@dataclass
class Module:
    """What a module defines, does when it is imported, and imports; a cell is one statement."""

    definitions: list[Unit] = field(default_factory=list)
    statements: list[Unit] = field(default_factory=list)
    imports: list[Import] = field(default_factory=list)


class Analyses:
    """Modules and cells that were analysed before, by content, and those that are asked for now.

    Kept in a file, they spare a command that has nothing else to do most of its time.
    """

    def __init__(self) -> None:
        self.known: dict[str, Module] = {}
        self.asked: set[str] = set()

    def of(self, kind: str, source: str) -> Module:
        """The analysis of a "module" or a "cell".

        Raises:
            SyntaxError: when it is not Python.
        """
        key = f"{kind} {hashlib.sha256(source.encode()).hexdigest()[:24]}"
        if key not in self.known:
            tree = ast.parse(source)
            made = _module(tree) if kind == "module" else Module(statements=[_unit(tree, [])])
            self.known[key] = made
        self.asked.add(key)
        return self.known[key]

    def load(self, path: Path) -> None:
        """Read what `save` wrote; a file that is missing, damaged or of another version is no help."""
        with suppress(OSError, ValueError, TypeError, KeyError):
            stored = json.loads(path.read_text(encoding="utf8"))
            if stored["form"] == _form():
                self.known |= {key: _read(each) for key, each in stored["analyses"].items()}
                self.asked = set()
                self._stored = set(stored["analyses"])

    def save(self, path: Path) -> None:
        """Write what was asked for since, if that is not what was read."""
        if self.asked != self._stored:
            analyses = {key: _plain(self.known[key]) for key in sorted(self.asked)}
            text = json.dumps({"form": _form(), "analyses": analyses}, separators=(",", ":"))
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.{os.getpid()}")
            partial.write_text(text, encoding="utf8")
            partial.replace(path)

    _stored: set[str] = frozenset()


def _form() -> str:
    """Changes with this module, whose analyses would then be others."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def _plain(module: Module) -> list:
    units = [[list(vars(unit).values()) for unit in kind] for kind in _kinds(module)]
    return [*units, module.imports]


def _read(plain: list) -> Module:
    definitions, statements = ([Unit(*unit) for unit in kind] for kind in plain[:2])
    # A decorated definition may be both, and is then one unit.
    own = {(tuple(unit.names), unit.hash): unit for unit in definitions}
    statements = [own.get((tuple(unit.names), unit.hash), unit) for unit in statements]
    return Module(definitions, statements, [tuple(each) for each in plain[2]])


def _kinds(module: Module) -> tuple[list[Unit], list[Unit]]:
    return module.definitions, module.statements


def source_hash(source: str) -> str:
    """Hash of a source's normal form."""
    return _unit(ast.parse(source), []).hash


def _module(tree: ast.Module) -> Module:
    """The definitions, statements and imports of a module.

    Functions, classes and assignments to plain names are definitions: they count where they are used.
    Everything else counts whenever the module is imported, and so does a definition under a decorator
    of the library's own, which may register it somewhere.
    """
    found = Module()
    decorated: list[tuple[Unit, list[str]]] = []
    for statement in _kept(tree.body):
        if isinstance(statement, ast.Import | ast.ImportFrom):
            found.imports += _imported(statement)
            continue
        names = _defined(statement)
        if names is None:
            unit = _unit(statement, sorted(_stored(statement)))
            found.imports += unit.imports
            found.statements.append(unit)
        else:
            unit = _unit(statement, names)
            found.definitions.append(unit)
            roots = [_root(node) for node in getattr(statement, "decorator_list", ())]
            decorated.append((unit, roots))
    own = {name for unit in found.definitions for name in unit.names}
    own |= {bound for bound, target, _ in found.imports if target.split(".")[0] == "reattend"}
    found.statements += [unit for unit, roots in decorated if own & set(roots)]
    return found


def _defined(statement: ast.stmt) -> list[str] | None:
    """Names that a definition binds; None for a statement that is no definition."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Assign):
        targets = [t for target in statement.targets for t in getattr(target, "elts", [target])]
    elif isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    else:
        return None
    plain = all(isinstance(target, ast.Name) for target in targets)
    return [target.id for target in targets] if plain else None


def _root(node: ast.expr) -> str:
    """The name a decorator starts with."""
    while not isinstance(node, ast.Name):
        node = getattr(node, "func", None) or getattr(node, "value", None)
        if node is None:
            return ""
    return node.id


def _unit(node: ast.AST, names: list[str]) -> Unit:
    writer = _Writer()
    writer.write(node)
    text = "".join(writer.parts)
    return Unit(
        names,
        hashlib.sha256(text.encode()).hexdigest()[:16],
        sorted(writer.references),
        writer.imports,
        sorted(writer.strings) if "__file__" in writer.references else [],
    )


def _imported(node: ast.Import | ast.ImportFrom) -> list[Import]:
    if isinstance(node, ast.ImportFrom):
        source = "." * node.level + (node.module or "")
        if source == "__future__":
            return []
        return [
            ("*", source, "") if a.name == "*" else (a.asname or a.name, source, a.name)
            for a in node.names
        ]
    found: list[Import] = []
    for alias in node.names:
        if alias.asname:
            found.append((alias.asname, alias.name, ""))
        else:
            found += [(alias.name.split(".")[0],) * 2 + ("",), ("", alias.name, "")]
    return found


def _kept(body: Iterable[ast.stmt], in_class: bool = False) -> list[ast.stmt]:
    """Statements without those that do nothing: texts, `pass`, bare annotations, imports for types."""
    return [s for s in body if not _does_nothing(s, in_class)]


def _does_nothing(statement: ast.stmt, in_class: bool) -> bool:
    match statement:
        case ast.Pass() | ast.Expr(value=ast.Constant(value=str())):
            return True
        case ast.ImportFrom(module="__future__"):
            return True
        case ast.AnnAssign(value=None):
            return not in_class
        case ast.If(test=ast.Name(id="TYPE_CHECKING"), orelse=[]):
            return True
    return False


def _stored(*nodes: ast.AST) -> set[str]:
    """Names that statements bind in their own scope, but by an import or in a comprehension."""
    names: set[str] = set()
    outer: set[str] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        match node:
            case ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.Global(names=some) | ast.Nonlocal(names=some):
                outer.update(some)
        if isinstance(node, _SCOPES):
            if hasattr(node, "name"):
                names.add(node.name)
            continue
        waiting += ast.iter_child_nodes(node)
    return names - outer


_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_SCOPES = (*_COMPREHENSIONS, *_FUNCTIONS, ast.ClassDef)
_UNSEEN = {"ctx", "type_comment", "kind", "annotation", "returns", "simple", "cause"}
_BODIES = {"body", "orelse", "finalbody"}
_MESSAGES = {"print", "warn"}
_PROGRESS = {"tqdm", "trange"}


class _Writer:
    """Writes a tree's normal form and, of what it writes, collects names, imports and texts."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.references: set[str] = set()
        self.imports: list[Import] = []
        self.strings: set[str] = set()
        self._scopes: list[set[str]] = []
        self._wordless = False

    def write(self, node: object) -> None:
        """Write a node, a list of them, or a plain value."""
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            node = ast.Assign([node.target], node.value)
        if isinstance(node, ast.AST):
            special = getattr(self, f"_{type(node).__name__}", None)
            self.parts.append("(" + type(node).__name__)
            (special or self._fields)(node)
            self.parts.append(")")
        elif isinstance(node, list):
            self.parts.append("[")
            for each in node:
                self.write(each)
                self.parts.append(",")
            self.parts.append("]")
        else:
            self.parts.append(ascii(node))

    def _fields(self, node: ast.AST, *but: str) -> None:
        for name in node._fields:
            value = getattr(node, name, None)
            if name in _UNSEEN or name in but or value is None or value == []:
                continue
            if name in _BODIES and isinstance(value, list):
                value = _kept(value, in_class=isinstance(node, ast.ClassDef))
            self.parts.append(f" {name}=")
            self.write(value)

    @contextmanager
    def _scope(self, names: set[str]) -> Iterator[None]:
        self._scopes.append(names)
        yield
        self._scopes.pop()

    @contextmanager
    def _without_words(self) -> Iterator[None]:
        before, self._wordless = self._wordless, True
        yield
        self._wordless = before

    def _refer(self, dotted: str) -> None:
        name = dotted.partition(".")[0]
        if not any(name in scope for scope in self._scopes):
            self.references.add(dotted)

    # Names and texts ----------------------------------------------------------------------------------

    def _Name(self, node: ast.Name) -> None:
        self.parts.append(" " + node.id)
        self._refer(node.id)

    def _Attribute(self, node: ast.Attribute) -> None:
        names, base = [node.attr], node.value
        while isinstance(base, ast.Attribute):
            names.append(base.attr)
            base = base.value
        if isinstance(base, ast.Name):
            dotted = ".".join([base.id, *reversed(names)])
            self.parts.append(" " + dotted)
            self._refer(dotted)
        else:
            self._fields(node)

    def _Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self.strings.add(node.value)
        wordless = self._wordless and isinstance(node.value, str)
        self.parts.append(" ..." if wordless else " " + ascii(node.value))

    def _JoinedStr(self, node: ast.JoinedStr) -> None:
        """An f-string; its texts are split in other ways by other versions of Python."""
        pieces: list[str | ast.AST] = []
        for value in node.values:
            if not isinstance(value, ast.Constant):
                pieces.append(value)
            elif pieces and isinstance(pieces[-1], str):
                pieces[-1] += value.value
            elif value.value:
                pieces.append(value.value)
        for piece in pieces:
            if isinstance(piece, ast.AST) or not self._wordless:
                self.write(piece)

    def _FormattedValue(self, node: ast.FormattedValue) -> None:
        self.write(node.value)
        if not self._wordless:
            self.parts.append(f" {node.conversion}")
        if node.format_spec and node.format_spec.values:
            self.write(node.format_spec)

    # What is only read ----------------------------------------------------------------------------------

    def _Raise(self, node: ast.Raise) -> None:
        if node.exc is not None:
            self.write(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)

    def _Assert(self, node: ast.Assert) -> None:
        self.write(node.test)

    def _Call(self, node: ast.Call) -> None:
        called = getattr(node.func, "attr", None) or getattr(node.func, "id", None)
        if called in _MESSAGES:
            with self._without_words():
                self._fields(node)
        elif called in _PROGRESS:
            shown = [word for word in node.keywords if word.arg != "desc"]
            self.write([node.func, node.args, shown])
        else:
            self._fields(node)

    # Scopes -----------------------------------------------------------------------------------------------

    def _FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> None:
        arguments, body = node.args, node.body if isinstance(node.body, list) else [node.body]
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        named += [each for each in (arguments.vararg, arguments.kwarg) if each]
        self.write(getattr(node, "decorator_list", []))
        self.write([*arguments.defaults, *arguments.kw_defaults])
        with self._scope({each.arg for each in named} | _stored(*body)):
            self._fields(arguments, "defaults", "kw_defaults")
            self._fields(node, "args", "decorator_list")

    _AsyncFunctionDef = _Lambda = _FunctionDef

    def _ListComp(self, node: ast.expr) -> None:
        # The first iterable belongs to the scope around.
        self.write(node.generators[0].iter)
        with self._scope(_stored(*(each.target for each in node.generators))):
            self._fields(node)

    _SetComp = _DictComp = _GeneratorExp = _ListComp

    def _ClassDef(self, node: ast.ClassDef) -> None:
        fields = [s for s in node.body if isinstance(s, ast.AnnAssign)]
        self.write([each for field in fields for each in (field.target, field.annotation)])
        self._fields(node)

    def _Import(self, node: ast.Import | ast.ImportFrom) -> None:
        self.imports += _imported(node)
        self._fields(node)

    _ImportFrom = _Import
