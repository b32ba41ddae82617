"""The one object a notebook talks to: parameters, seeds, results, figures, verdicts."""

from __future__ import annotations

import inspect
import json
import math
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from IPython.display import Code, Image, Markdown, display
from matplotlib.figure import Figure
from tqdm import tqdm

from reattend.parameters import Parameters, profile_values, resolve
from reattend.plots import save_png
from reattend.project import find_root, study_directory
from reattend.records import RecordError, load_record, record_paths
from reattend.verdicts import (
    ClaimOutcome,
    Exact,
    Sample,
    TestOutcome,
    conclude,
    decide,
    interval_text,
)

OUT_VARIABLE = "REATTEND_OUT"  # set by `reattend run`: the directory to write to


class Replication:
    """One run of one paper's notebook at one profile.

    Args:
        slug: the paper.
        Parameters: the notebook's parameter model (its cell tagged `schema`).
        profile: "smoke" (never yields a verdict), "cpu" or "gpu".
        overrides: parameter values that replace those of the profile.
        seed: of Python's, NumPy's and torch's generators.

    Raises:
        ParameterError: unknown paper, profile, parameter or wrong value.
        RecordError: the record cannot be used.
        RuntimeError: profile "gpu" without a GPU.
    """

    def __init__(
        self,
        slug: str,
        *,
        Parameters: type[Parameters],
        profile: str,
        overrides: dict | None = None,
        seed: int = 0,
    ) -> None:
        self._started = time.monotonic()
        root = find_root()
        self.parameters = resolve(Parameters, profile_values(root, slug, profile), overrides)
        records = record_paths(root)
        if slug not in records:
            raise RecordError(f"no record notebooks/*/{slug}.yaml")
        self.record = load_record(records[slug])
        self.profile = profile
        self.smoke = profile == "smoke"
        self.seed = seed
        self.device = _device(profile)
        self.reported = {
            name: pd.DataFrame(table.rows, columns=table.columns)
            for name, table in self.record.reported.items()
        }
        self._root = root
        self._directory = _output_directory(root, self.record.family, slug, profile)
        self._measurements: list[dict] = []
        self._times: list[dict] = []
        self._outcomes: dict[str, ClaimOutcome] = {}
        self._captions: dict[str, str] = {}
        _seed_everything(seed)

    # Reading ----------------------------------------------------------------------------------------

    def show_record(self) -> None:
        """Show the citation, the question, what stands in for what, and the claims to be tested."""
        display(Markdown(_record_markdown(self.record)))

    def show_source(self, thing: Callable) -> None:
        """Show the library's source of a function or class."""
        display(Code(inspect.getsource(thing), language="python"))

    def progress(self, items: Iterable, label: str, total: int | None = None) -> Iterable:
        """Iterate over `items` with a progress bar."""
        return tqdm(items, desc=label, total=total, mininterval=1.0, file=sys.stdout)

    # Writing ----------------------------------------------------------------------------------------

    def log(
        self,
        metric: str,
        value: float,
        *,
        method: str = "",
        setting: str | int | float = "",
        seed: int | None = None,
    ) -> None:
        """Keep one measurement for results.json.

        Raises:
            ValueError: for NaN or infinity: a result that is not a number is an error upstream.
        """
        self._measurements.append(_measurement(metric, value, method, setting, seed))

    def log_time(
        self,
        metric: str,
        value: float,
        *,
        method: str = "",
        setting: str | int | float = "",
        seed: int | None = None,
    ) -> None:
        """Keep one time, rate or memory reading for run.json: those differ from run to run."""
        self._times.append(_measurement(metric, value, method, setting, seed))

    def table(self, name: str, frame: pd.DataFrame, caption: str) -> None:
        """Write a table as `<name>.csv` and show it."""
        self._named(name, caption)
        frame.to_csv(self._directory / f"{name}.csv", index=False, float_format="%.6g")
        shown = frame.to_html(index=False, float_format=lambda x: f"{x:.4g}", na_rep="", border=0)
        display(Markdown(f"**{caption}**\n\n{shown}"))

    def figure(self, name: str, figure: Figure, caption: str) -> None:
        """Write a figure as `<name>.png`, show it and close it."""
        self._named(name, caption)
        path = self._directory / f"{name}.png"
        save_png(figure, path)
        display(Image(data=path.read_bytes()), Markdown(f"*{caption}*"))

    def claim(self, claim_id: str, **measured: Sample | Exact) -> ClaimOutcome | None:
        """Test one claim of the record and show its verdict; at smoke, only check that it can be.

        Args:
            claim_id: the claim's id in the record.
            measured: one `Sample` or `Exact` for each of the claim's tests, by test id.

        Raises:
            KeyError: no such claim or test. ValueError: a test is missing, or a measurement is NaN.
        """
        claim = self.record.claim(claim_id)
        declared = {test.id for test in claim.tests}
        if measured.keys() != declared:
            raise ValueError(
                f"claim '{claim_id}' declares the tests {sorted(declared)}, got {sorted(measured)}"
            )
        outcomes = [decide(test, measured[test.id]) for test in claim.tests]
        outcome = conclude(claim, outcomes)
        self._outcomes[claim_id] = outcome
        if self.smoke:
            print(f"{claim_id}: measured; a smoke run yields no verdict")
            return None
        display(Markdown(_outcome_markdown(claim, outcome)))
        return outcome

    def finish(self) -> None:
        """Write results.json and run.json, and show all verdicts.

        Raises:
            ValueError: when a claim of the record has not been tested.
        """
        for claim in self.record.claims:
            if claim.out_of_reach:
                self._outcomes[claim.id] = conclude(claim, [])
        missing = [c.id for c in self.record.claims if c.id not in self._outcomes]
        if missing:
            raise ValueError(f"claims without a measurement: {', '.join(missing)}")
        outcomes = [self._outcomes[claim.id] for claim in self.record.claims]
        results = {
            "slug": self.record.slug,
            "profile": self.profile,
            "seed": self.seed,
            "parameters": self.parameters.model_dump(),
            "captions": list(self._captions.items()),
            "claims": {o.id: _stored(o, self.smoke) for o in outcomes},
        }
        _write_json(self._directory / "results.json", results, self._measurements)
        _write_json(self._directory / "run.json", self._run_facts(outcomes), self._times)
        where = self._directory.relative_to(self._root) if self._is_study else "figures"
        if self.smoke:
            display(Markdown(f"Smoke run finished: no verdicts. Files in `{where}`."))
        else:
            display(Markdown(_summary_markdown(self.record, outcomes)))

    # Inside -----------------------------------------------------------------------------------------

    @property
    def _is_study(self) -> bool:
        return OUT_VARIABLE not in os.environ

    def _named(self, name: str, caption: str) -> None:
        if name in self._captions:
            raise ValueError(f"there is already a table or figure '{name}'")
        self._captions[name] = caption

    def _run_facts(self, outcomes: list[ClaimOutcome]) -> dict:
        packages = ("torch", "transformers", "numpy", "pandas", "matplotlib")
        timing = {f"{o.id}.{t.id}": _numbers(t) for o in outcomes for t in o.tests if t.timing}
        return {
            "seconds": round(time.monotonic() - self._started, 1),
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "device": _device_name(self.device),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "versions": {name: metadata.version(name) for name in packages},
            "commit": _commit(self._root),
            "timing_tests": timing,
        }


def _output_directory(root: Path, family: str, slug: str, profile: str) -> Path:
    """The directory the pipeline gave, or a fresh one under build/study."""
    if OUT_VARIABLE in os.environ:
        directory = Path(os.environ[OUT_VARIABLE])
    else:
        directory = study_directory(root, family, slug, profile)
        shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _device(profile: str) -> torch.device:
    if profile != "gpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError("profile 'gpu' needs a CUDA GPU, and torch sees none; use profile 'cpu'")
    return torch.device("cuda")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


def _seed_everything(seed: int) -> None:
    # Deterministic cuBLAS needs its workspace fixed before the first CUDA call.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Convolutions on a GPU otherwise round to ten bits, which exact accounts do not survive.
    torch.backends.cudnn.allow_tf32 = False


def _commit(root: Path) -> str | None:
    """The commit that the code came from, with "+" when it has been edited since; None without Git."""
    if shutil.which("git") is None:
        return None

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)

    commit = git("rev-parse", "--short", "HEAD").stdout.strip()
    edited = git("diff", "--quiet", "HEAD", "--", "lib", "notebooks", "params.yaml").returncode
    return f"{commit}+" if commit and edited else commit or None


def _round(value: float) -> float:
    """Six significant digits: what two runs on one machine must agree on."""
    return float(f"{value:.6g}")


def _measurement(metric, value, method, setting, seed) -> dict:
    value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"measurement {metric} ({method}, {setting}) is {value}")
    row = {"metric": metric, "method": method, "setting": str(setting), "seed": seed}
    return row | {"value": _round(value)}


def _numbers(outcome: TestOutcome) -> dict:
    numbers = {"effect": _round(outcome.effect), "n": outcome.n}
    if math.isfinite(outcome.low):
        numbers |= {"low": _round(outcome.low), "high": _round(outcome.high)}
    if outcome.points:
        numbers["points"] = [_round(point) for point in outcome.points]
    return numbers


def _stored(outcome: ClaimOutcome, smoke: bool) -> dict:
    """A claim for results.json. Numbers of timing tests are in run.json, which may differ."""
    tests = {
        t.id: ({} if t.timing else _numbers(t)) | {"verdict": None if smoke else t.verdict}
        for t in outcome.tests
    }
    undecided = smoke and outcome.tests
    stored = {"verdict": None if undecided else outcome.verdict, "tests": tests}
    return stored | ({"reason": outcome.reason} if outcome.reason and not undecided else {})


def _write_json(path: Path, head: dict, rows: list[dict]) -> None:
    """`head` indented, then `measurements` one a line, so that diffs stay readable."""
    text = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")
    lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows)
    body = f"[\n{lines}\n ]" if rows else "[]"
    path.write_text(f'{text},\n "measurements": {body}\n}}\n', encoding="utf8")


# Markdown ---------------------------------------------------------------------------------------------


def _record_markdown(record) -> str:
    code = f" Code: [{record.code}](https://github.com/{record.code})." if record.code else ""
    rows = [
        f"| `{claim.id}` | {claim.says} ({claim.where}) | {claim.reported} | "
        + (
            "<br>".join(f"{t.measures}: {margins(t)}" for t in claim.tests)
            or f"out of reach: {claim.out_of_reach}"
        )
        + " |"
        for claim in record.claims
    ]
    table = "\n".join(
        [
            "| claim | what the paper says | reported | how it is tested here |",
            "| --- | --- | --- | --- |",
            *rows,
        ]
    )
    return (
        f"{record.citation}{code}\n\n{record.question}\n\n**Here:** {record.stands_on}\n\n{table}"
    )


def margins(test) -> str:
    """A test's margins in words."""
    if test.better == "equal":
        return f"reproduced within ±{test.margin:g}"
    sign, other = ("≥", "<") if test.better == "higher" else ("≤", ">")
    bad = test.reproduced if test.not_reproduced is None else test.not_reproduced
    control = "; a control, which must fail" if test.control else ""
    return f"reproduced {sign} {test.reproduced:g}, not reproduced {other} {bad:g}{control}"


def _outcome_markdown(claim, outcome: ClaimOutcome) -> str:
    lines = [
        f"- {test.measures}: **{interval_text(o.effect, o.low, o.high)}** (n = {o.n}); {margins(test)} → "
        f"{o.verdict}" + (f"; points {', '.join(f'{p:.3g}' for p in o.points)}" if o.points else "")
        for test, o in zip(claim.tests, outcome.tests, strict=True)
    ]
    reason = f" ({outcome.reason})" if outcome.reason else ""
    return f"`{claim.id}`: **{outcome.verdict}**{reason}\n\n" + "\n".join(lines)


def _summary_markdown(record, outcomes: list[ClaimOutcome]) -> str:
    rows = []
    for claim, outcome in zip(record.claims, outcomes, strict=True):
        ours = "; ".join(
            f"{interval_text(o.effect, o.low, o.high)} (n = {o.n})" for o in outcome.tests
        )
        rows.append(f"| {claim.says} | {claim.reported} | {ours} | **{outcome.verdict}** |")
    table = "\n".join(["| claim | reported | ours | verdict |", "| --- | --- | --- | --- |", *rows])
    deviations = "\n".join(f"- {line}" for line in record.deviations)
    return table + (f"\n\nWhat differs from the paper:\n\n{deviations}" if deviations else "")
