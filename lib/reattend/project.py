"""Where things lie in a checkout, how its YAML and JSON files are read, and what its Git says."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import yaml


class FileError(ValueError):
    """A file that cannot be read as what it should be; one line that names file, line and cure."""


# The C parser where PyYAML was built with it: ten times as fast.
class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """YAML 1.2 as DVC reads it (010 is ten, 1:30 and yes are texts), and every key once."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 (PyYAML's interface)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"the key '{key.value}' is there twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("merge", r"<<", "<"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
    )


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def find_root(start: Path | None = None) -> Path:
    """The checkout that `start` (default: the working directory) lies in.

    Raises:
        FileNotFoundError: outside a checkout.
    """
    here = (start or Path.cwd()).resolve()
    for directory in (here, *here.parents):
        if (directory / "params.yaml").is_file() and (directory / "notebooks").is_dir():
            return directory
    raise FileNotFoundError(
        "not inside a Reattend checkout (no params.yaml above the working directory); cd into one"
    )


def study_directory(root: Path, family: str, slug: str, profile: str) -> Path:
    """Where a notebook that is run by hand writes: never over the committed results."""
    return root / "build" / "study" / family / slug / profile


def results_directory(root: Path, family: str, slug: str, profile: str) -> Path:
    """Where the pipeline puts a paper's tables, figures and results."""
    return root / "figures" / family / slug / profile


def load_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        yaml.YAMLError: when it is not valid, or has a key twice.
    """
    return yaml.load(text, Loader=_Loader)


def read_yaml(path: Path) -> Any:
    """The value of a YAML file.

    Raises:
        FileError: names the file and the line. FileNotFoundError: there is none.
    """
    text = read_text(path)
    try:
        return load_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        # An end that comes too early is reported on the line after the last.
        where = f", line {min(mark.line + 1, len(text.splitlines()))}" if mark else ""
        problem = getattr(error, "problem", None) or "a character that YAML does not know"
        raise FileError(f"{_shown(path)}{where}: not valid YAML ({problem})") from None
    except (ValueError, RecursionError) as error:
        raise FileError(f"{_shown(path)}: not valid YAML ({error})") from None


def read_json(path: Path) -> dict:
    """The mapping in a JSON file.

    Raises:
        FileError: names the file and the line. FileNotFoundError: there is none.
    """
    text = read_text(path)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        what = f"line {error.lineno}: not valid JSON ({error.msg})" if text.strip() else "empty"
        raise FileError(f"{_shown(path)}, {what}") from None
    except RecursionError:
        raise FileError(f"{_shown(path)}: not valid JSON (nested too deeply)") from None
    if not isinstance(value, dict):
        raise FileError(f"{_shown(path)}: must hold a mapping, not a {type(value).__name__}")
    return value


def read_text(path: Path) -> str:
    """A text file of the checkout.

    Raises:
        FileError: it is not UTF-8 or holds an unresolved merge. FileNotFoundError: there is none.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise FileError(f"{_shown(path)}: not a text in UTF-8; save it as that") from None
    except IsADirectoryError:
        raise FileError(f"{_shown(path)}: is a directory where a file should be") from None
    if conflict := re.search(r"^(<{7}|>{7}) ", text, re.MULTILINE):
        line = text.count("\n", 0, conflict.start()) + 1
        raise FileError(
            f"{_shown(path)}, line {line}: an unresolved merge; choose a side, or restore the file "
            f"(git checkout --ours or --theirs)"
        )
    return text


def _shown(path: Path) -> str:
    """A file's path in its checkout, for messages."""
    try:
        return path.resolve().relative_to(find_root(path.parent)).as_posix()
    except (FileNotFoundError, ValueError):
        return path.name


def git(root: Path, *arguments: str) -> str | None:
    """What a Git command on the checkout's own repository prints.

    None when the command fails, Git is not installed, or the checkout is none of its own (an archive
    unpacked inside another repository, whose commits say nothing about it).
    """
    environment = {name: v for name, v in os.environ.items() if not name.startswith("GIT_")}
    environment["GIT_CEILING_DIRECTORIES"] = str(root.resolve().parent)
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], env=environment, capture_output=True
        )
    except OSError:
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None
