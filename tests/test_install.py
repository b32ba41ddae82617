"""What `pip install reattend` brings: enough for a method, and everything that lies in the library."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

CORE = {"jaxtyping", "numpy", "safetensors", "scipy", "torch", "transformers"}
# Rooms that work without Jupyter, DVC and the files of a checkout.
CORE_ROOMS = (
    "attention",
    "trunks",
    "generation",
    "language_modeling",
    "long_context",
    "multimodal_llm",
    "recommendation",
    "speech",
    "theory",
    "vision",
    "vision_language",
)

ATTACH = """
import importlib, torch, transformers
import reattend

for name in {modules}:
    importlib.import_module(name)
torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2,
)
model = transformers.LlamaForCausalLM(config).eval()
tokens = torch.arange(40)[None]
with torch.no_grad():
    plain = model(tokens).logits
    with reattend.attach(model, "flexprefill", gamma=1.0) as method:
        torch.testing.assert_close(model(tokens).logits, plain)
assert method.density() == 1, method.density()
with reattend.attach(model, "quest", budget=16) as method:
    model.generate(tokens, max_new_tokens=3, do_sample=False)
assert 0 < method.density("decode") < 1, method.density("decode")
"""


def test_the_core_is_light(root):
    names = {Requirement(line).name for line in project(root)["dependencies"]}
    assert names == CORE
    # A build of torch for CUDA brings its libraries in distributions of their own.
    own = [n for n in closure(CORE) if not n.startswith(("nvidia-", "cuda-", "triton"))]
    assert len(own) < 60


def test_a_method_attaches_in_an_environment_of_the_core_alone(root, tmp_path):
    """An isolated Python that sees the core's distributions, and none of the other two hundred."""
    installed = tmp_path / "installed"
    installed.mkdir()
    for distribution in closure(CORE).values():
        for top in {path.parts[0] for path in distribution.files if path.parts[0] != ".."}:
            source = Path(distribution.locate_file(top))
            if source.suffix != ".pth" and not (installed / top).exists():
                (installed / top).symlink_to(source)
    missing = isolated(installed, root, "import pandas")
    assert "No module named 'pandas'" in missing.stderr
    modules = [
        ".".join(path.relative_to(root / "lib").with_suffix("").parts)
        for room in CORE_ROOMS
        for path in sorted((root / "lib" / "reattend" / room).rglob("*.py"))
        if path.name != "__init__.py"
    ]
    done = isolated(installed, root, ATTACH.format(modules=modules))
    assert done.returncode == 0, done.stderr
    command = "from reattend.pipeline.cli import main; main(['run', 'any'])"
    refused = isolated(installed, root, command)
    assert refused.returncode == 1
    assert re.fullmatch(
        r"reattend: this command needs \w+; `pip install 'reattend\[pipeline\]'`\n", refused.stderr
    ), refused.stderr


def test_every_import_is_declared(root):
    owners = metadata.packages_distributions()
    extras = project(root)["optional-dependencies"]
    lines = [*project(root)["dependencies"], *extras["notebooks"], *extras["pipeline"]]
    declared = {canonical(Requirement(line).name) for line in lines} | {"dask", "distributed"}
    for path in sorted((root / "lib").rglob("*.py")):
        for name in imports(path):
            found = {canonical(owner) for owner in owners.get(name, [name])}
            assert found & declared, f"{path.relative_to(root)} imports {name}"


def test_the_wheel_holds_all_that_lies_in_the_library(root, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(
        root / "lib", source / "lib", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("reattend/")}
    lying = {p.relative_to(root / "lib").as_posix() for p in library_files(root / "lib")}
    assert held == lying
    assert "reattend/assets/catalogue.yaml" in held


def library_files(lib: Path) -> Iterator[Path]:
    for path in (lib / "reattend").rglob("*"):
        if path.is_file() and not {"__pycache__", ".ipynb_checkpoints"} & set(path.parts):
            yield path


def project(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


def canonical(name: str) -> str:
    return name.lower().replace("_", "-")


def closure(names: set[str]) -> dict[str, metadata.Distribution]:
    """The installed distributions that `names` need, themselves included."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [Requirement(name) for name in names]
    while waiting:
        wanted = waiting.pop()
        key = canonical(str(wanted).split(";")[0])
        if key in found:
            continue
        found[key] = metadata.distribution(wanted.name)
        for line in found[key].requires or []:
            needed = Requirement(line)
            extras = ("", *wanted.extras)
            if not needed.marker or any(needed.marker.evaluate({"extra": e}) for e in extras):
                waiting.append(needed)
    return found


def isolated(installed: Path, root: Path, code: str) -> subprocess.CompletedProcess:
    """A Python without site-packages, environment variables and the working directory on its path."""
    begin = f"import sys; sys.path += {[str(root / 'lib'), str(installed)]}\n"
    command = [sys.executable, "-I", "-S", "-c", begin + code]
    return subprocess.run(command, capture_output=True, text=True, cwd=root)


def imports(path: Path) -> set[str]:
    """First names of the modules from elsewhere that a source imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names)
