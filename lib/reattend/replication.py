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

from reattend.evidence.files import evidence_csv, evidence_rows
from reattend.evidence.samples import Exact, Points, Sample, points, six_digits
from reattend.evidence.verdicts import ClaimOutcome, judge
from reattend.parameters import Parameters, profile_values, resolve
from reattend.plots import save_png
from reattend.presentation import (
    outcome_markdown,
    record_markdown,
    smoke_markdown,
    summary_markdown,
)
from reattend.project import find_root, git, study_directory
from reattend.records import RecordError, load_record, record_paths

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
        self._started, self._cpu_started = time.monotonic(), _cpu_seconds()
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
        self._evidence: dict[tuple[str, str], Points] = {}
        self._captions: dict[str, str] = {}
        _seed_everything(seed)

    # Reading ----------------------------------------------------------------------------------------

    def show_record(self) -> None:
        """Show the citation, the question, what stands in for what, and the claims to be tested."""
        display(Markdown(record_markdown(self.record)))

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
            KeyError: no such claim. ValueError, TypeError: a test is missing, a measurement is NaN or
                lacks the labels of the unit that the record declares.
        """
        claim = self.record.claim(claim_id)
        declared = {test.id: test for test in claim.tests}
        if measured.keys() != declared.keys():
            raise ValueError(
                f"claim '{claim_id}' declares the tests {sorted(declared)}, got {sorted(measured)}"
            )
        for name, test in declared.items():
            try:
                self._evidence[claim_id, name] = points(measured[name], test.unit)
            except (TypeError, ValueError) as error:
                raise type(error)(f"claim '{claim_id}', test '{name}': {error}") from None
        outcome = judge(self.record.only(claim_id), self._evidence)[claim_id]
        if self.smoke:
            print(f"{claim_id}: measured; a smoke run yields no verdict")
            return None
        display(Markdown(outcome_markdown(claim, outcome, self.record.reading)))
        return outcome

    def finish(self) -> None:
        """Write results.json, evidence.csv and run.json, and show all verdicts.

        Raises:
            ValueError: when a claim of the record has not been tested.
        """
        tested = {claim for claim, _ in self._evidence}
        missing = [c.id for c in self.record.claims if c.tests and c.id not in tested]
        if missing:
            raise ValueError(f"claims without a measurement: {', '.join(missing)}")
        outcomes = judge(self.record, self._evidence)
        results = {
            "slug": self.record.slug,
            "profile": self.profile,
            "seed": self.seed,
            "parameters": self.parameters.model_dump(),
            "captions": list(self._captions.items()),
            "claims": {name: _measured(o) for name, o in outcomes.items() if o.tests},
        }
        text = evidence_csv(self._evidence)
        (self._directory / "evidence.csv").write_text(text, encoding="utf8")
        _write_json(self._directory / "results.json", results, self._measurements)
        _write_json(self._directory / "run.json", self._run_facts(), self._times)
        if not self.smoke:
            display(Markdown(summary_markdown(self.record, outcomes)))
            return
        where = self._directory.relative_to(self._root) if self._is_study else "figures"
        display(Markdown(f"Smoke run finished: no verdicts. Files in `{where}`."))
        display(Markdown(self._smoke_summary()))

    # Inside -----------------------------------------------------------------------------------------

    @property
    def _is_study(self) -> bool:
        return OUT_VARIABLE not in os.environ

    def _named(self, name: str, caption: str) -> None:
        if name in self._captions:
            raise ValueError(f"there is already a table or figure '{name}'")
        self._captions[name] = caption

    def _smoke_summary(self) -> str:
        """The committed verdicts of the cpu run, where there are any, beside this run's numbers."""
        place = self._root / "figures" / self.record.family / self.record.slug / "verdicts.json"
        try:
            committed = json.loads(place.read_text(encoding="utf8")).get("cpu", {})
        except (FileNotFoundError, json.JSONDecodeError):
            committed = {}
        return smoke_markdown(self.record, judge(self.record, self._evidence), committed)

    def _run_facts(self) -> dict:
        packages = ("torch", "transformers", "numpy", "pandas", "matplotlib")
        return {
            "seconds": round(time.monotonic() - self._started, 1),
            "cpu_seconds": round(_cpu_seconds() - self._cpu_started, 1),
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "device": _device_name(self.device),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "versions": {name: metadata.version(name) for name in packages},
            "commit": _commit(self._root),
            "timing_evidence": evidence_rows(self._evidence, timing=True),
        }


def _cpu_seconds() -> float:
    """CPU seconds of this process and of its children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


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
    """The commit that the code came from, with "+" when it has been edited since; None without Git.

    New files that are not in the commit count as edits.
    """
    commit = git(root, "rev-parse", "--short", "HEAD")
    edited = git(root, "status", "--porcelain", "--", "lib", "notebooks", "params.yaml")
    return f"{commit.strip()}{'+' if edited else ''}" if commit else None


def _measurement(metric, value, method, setting, seed) -> dict:
    value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"measurement {metric} ({method}, {setting}) is {value}")
    row = {"metric": metric, "method": method, "setting": str(setting), "seed": seed}
    return row | {"value": six_digits(value)}


def _measured(outcome: ClaimOutcome) -> dict:
    """What was measured for a claim, without its verdict; times are in run.json, which may differ."""
    return {
        "tests": {
            o.id: {}
            if o.test.unit == "round"
            else {"effect": six_digits(o.estimate.effect), "n": o.estimate.n}
            for o in outcome.tests
        }
    }


def _write_json(path: Path, head: dict, rows: list[dict]) -> None:
    """`head` indented, then `measurements` one a line, so that diffs stay readable."""
    text = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")
    lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows)
    body = f"[\n{lines}\n ]" if rows else "[]"
    path.write_text(f'{text},\n "measurements": {body}\n}}\n', encoding="utf8")
