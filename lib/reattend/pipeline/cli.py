"""The command `reattend`. Each command imports what it needs, so that `--help` is immediate."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn


def main(arguments: list[str] | None = None) -> None:
    """Run one command; exit code 0, 1 for a failed run or a difference, 2 for bad input."""
    options = _parser().parse_args(arguments)
    sys.exit(_guarded(lambda: options.command(options)))


def _guarded(command: Callable[[], int | None]) -> int:
    from reattend.pipeline.errors import CommandError

    try:
        return command() or 0
    except KeyboardInterrupt:
        print("\nreattend: stopped; earlier results are untouched", file=sys.stderr)
        return 130
    except CommandError as error:
        print(f"reattend: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "reattend":
            raise
        extra = "cluster" if error.name in ("dask", "distributed") else "pipeline"
        print(
            f"reattend: this command needs {error.name}; `pip install 'reattend[{extra}]'`",
            file=sys.stderr,
        )
        return 1
    except OSError as error:
        where = f": {_from_here(error.filename)}" if error.filename else ""
        print(f"reattend: {error.strerror or error}{where}", file=sys.stderr)
        return 1
    except (ValueError, RuntimeError) as error:
        # Wrong records, parameters, assets and backbones: their messages name the cure.
        if type(error).__module__.split(".")[0] != "reattend":
            raise
        print(f"reattend: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def _from_here(path: str | bytes | int) -> str:
    """A path relative to the working directory where it lies in it."""
    path = Path(os.fsdecode(path)) if not isinstance(path, int) else Path(str(path))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every command does."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"reattend: {message} (see `{self.prog} --help`)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="reattend", description="Replicate papers about attention; see README.md."
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(name: str, function: Callable, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(command=function)
        return command

    fetch = add("fetch", _fetch, "fetch and verify assets (default: all that the papers need)")
    fetch.add_argument("names", nargs="*", metavar="asset")

    build = add(
        "build", _build, "build backbones and their reports (default: all that the papers need)"
    )
    build.add_argument("names", nargs="*", metavar="backbone")
    build.add_argument("--profile", help="smoke, cpu or gpu (default: that of params.yaml)")

    run = add("run", _run, "execute one paper's notebook and keep its results")
    run.add_argument("paper")
    run.add_argument("--profile", help="smoke, cpu or gpu (default: that of params.yaml)")
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another parameter value (results then go to build/study)",
    )

    repro = add("repro", _repro, "bring results up to date through DVC's graph")
    repro.add_argument("papers", nargs="*", metavar="paper", help="default: all")
    repro.add_argument("--profile", help="set the profile in params.yaml first")
    repro.add_argument("--force", action="store_true", help="run even what is up to date")
    repro.add_argument(
        "-j", "--jobs", type=_positive, help="stages at a time (default: one a core)", metavar="N"
    )
    repro.add_argument("--dry", action="store_true", help="say what would run and why, a line each")
    repro.add_argument(
        "--deadline",
        type=_duration,
        metavar="55m",
        help="start only what will end within this time, as many papers as fit (s, m or h)",
    )
    repro.add_argument(
        "--scheduler",
        type=_address,
        metavar="ADDRESS",
        help="a Dask scheduler whose workers share these files",
    )

    judge = add("judge", _judge, "verdicts from stored evidence and records, without running")
    judge.add_argument("papers", nargs="*", metavar="paper", help="default: all")

    power = add("power", _power, "what would decide each open test, at what cost")
    power.add_argument("papers", nargs="*", metavar="paper", help="default: all")
    power.add_argument("--profile", help="cpu or gpu (default: that of params.yaml)")
    power.add_argument(
        "--pilot",
        action="append",
        default=[],
        metavar="CLAIM.TEST=EFFECT:SPREAD",
        help="before a run: a pilot's effect and its standard deviation over units (one paper)",
    )

    grow = add("grow", _grow, "run the next look of papers whose claims are open")
    grow.add_argument("papers", nargs="*", metavar="paper", help="default: all")
    grow.add_argument("--profile", help="cpu or gpu (default: that of params.yaml)")
    grow.add_argument("--budget", type=_duration, metavar="30m", help="time to spend (s, m or h)")

    report = add("report", _report, "judge, and write the claim matrix and README's results")
    report.add_argument("--html", action="store_true", help="build the site instead, into site/")
    report.add_argument(
        "--no-notebooks", action="store_true", help="leave the notebooks out of the site: quicker"
    )

    show = add("show", _show, "a paper's claims, verdicts and evidence")
    show.add_argument("paper")

    study = add("study", _study, "open copies of the notebooks in JupyterLab")
    study.add_argument("paper", nargs="?", help="default: the list of all")
    study.add_argument("options", nargs="*", help="for JupyterLab, after --")

    compare = add("compare", _compare, "hold the results against the committed ones")
    compare.add_argument("papers", nargs="*", metavar="paper", help="default: all")
    compare.add_argument("--ref", default="HEAD", help="Git revision (default: HEAD)")
    compare.add_argument(
        "--study",
        action="store_true",
        help="those of runs with other values (run --set), e.g. seeds",
    )

    attest = add("attest", _attest, "let results stand whose code has changed, if smoke agrees")
    attest.add_argument(
        "papers", nargs="*", metavar="paper", help="default: all whose results other code has made"
    )
    attest.add_argument("--ref", default="HEAD", help="commit of that code (default: HEAD)")

    add("sync", _sync, "generate dvc.yaml and NOTICE.md from records and catalogues")
    add("fingerprint", _fingerprint, "hash what each paper's results depend on (used by DVC)")

    new = add("new", _new, "write the five places of a paper from templates")
    new.add_argument("family")
    new.add_argument("paper")

    check = add("check", _check, "say what papers still lack")
    check.add_argument("papers", nargs="*", metavar="paper", help="default: all")

    tidy = add("tidy", _tidy, "run a notebook at smoke and keep the outputs of its checked cells")
    tidy.add_argument("papers", nargs="+", metavar="paper")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1, not '{text}'")
    return int(text)


def _duration(text: str) -> float:
    """Seconds of '90s', '55m', '1.5h'."""
    units = {"s": 1, "m": 60, "h": 3600}
    try:
        seconds = float(text[:-1]) * units[text[-1:]]
    except (ValueError, KeyError):
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"a time like 90s, 55m or 2h, not '{text}'")
    return seconds


def _address(text: str) -> str:
    # The port is what Dask does not ask for, and then waits in vain.
    found = re.fullmatch(r"(tcp|tls|ws|wss|ucx)://(\[[0-9a-fA-F:]+\]|[\w.-]+):(\d{1,5})", text)
    if not found or not 0 < int(found[3]) < 65536:
        raise argparse.ArgumentTypeError(f"an address like tcp://host:8786, not '{text}'")
    return text


def _root() -> Path:
    from reattend.pipeline.errors import CommandError
    from reattend.project import find_root

    try:
        root = find_root()
    except FileNotFoundError as error:
        raise CommandError(str(error), exit_code=2) from None
    _check_library(root)
    return root


def _check_library(root: Path) -> None:
    """Refuse to work in one clone with the library of another: results would name code that did not run."""
    from reattend.fingerprints import LIBRARY
    from reattend.pipeline.errors import CommandError

    own = root / "lib" / "reattend"
    if own.is_dir() and own.resolve() != LIBRARY.resolve():
        raise CommandError(
            f"this environment holds the library of another clone ({LIBRARY}); "
            f"run `pip install -e .` here, or set PYTHONPATH={own.parent}",
            exit_code=2,
        )


def _profile(root: Path, given: str | None) -> str:
    from reattend.parameters import PROFILES, load_params
    from reattend.pipeline.errors import CommandError

    params = load_params(root)  # also where the profile is given: what reads it later is far away
    if given is None:
        return params["profile"]
    if given not in PROFILES:
        raise CommandError(f"unknown profile '{given}'; there are: {', '.join(PROFILES)}", 2)
    return given


def _fix_threads() -> None:
    """Let what this process builds, on the way to a run or in a kernel that it starts, be what
    `reattend repro` builds: clones, notebooks and the pipeline share one cache.

    Sums that are split by threads round differently. PyTorch reads the number when it is first imported.
    """
    from reattend.pipeline.run import threads

    os.environ.update(threads())


def _check_names(kind: str, names: list[str], known: Iterable[str]) -> None:
    """Refuse the first name that is not known, before anything is done for the others."""
    from reattend.pipeline.errors import CommandError

    if unknown := [name for name in names if name not in known]:
        raise CommandError(f"unknown {kind} '{unknown[0]}'; there are: {', '.join(known)}", 2)


def _fetch(options: argparse.Namespace) -> None:
    from reattend.assets.store import catalogue, fetch
    from reattend.pipeline.graph import load_records, needed_assets
    from reattend.pipeline.manifests import write_asset_manifest

    root = _root()
    records = load_records(root).values()
    names = options.names or sorted({name for record in records for name in needed_assets(record)})
    _check_names("asset", names, catalogue())
    for name in names:
        fetch(name)
        write_asset_manifest(root, name)
        print(f"{name}: verified")


def _build(options: argparse.Namespace) -> None:
    from reattend.backbones.reports.page import write_report
    from reattend.backbones.store import build, catalogue
    from reattend.pipeline.graph import load_records, needed_backbones
    from reattend.pipeline.manifests import write_backbone_manifest

    _fix_threads()
    root = _root()
    profile = _profile(root, options.profile)
    records = load_records(root).values()
    names = options.names or list(
        dict.fromkeys(name for record in records for name in needed_backbones(record))
    )
    _check_names("backbone", names, catalogue())
    for name in names:
        build(name, profile)
        report = write_report(name, profile, root)
        write_backbone_manifest(root, name, profile)
        print(f"{name}: ready" + (f", report in {report.relative_to(root)}" if report else ""))


def _run(options: argparse.Namespace) -> None:
    from reattend.pipeline.orphans import end_with_repro
    from reattend.pipeline.run import run

    end_with_repro()
    _fix_threads()
    root = _root()
    profile = _profile(root, options.profile)
    target = run(root, options.paper, profile, _overrides(options.set))
    print(f"{options.paper} ({profile}): results in {target.relative_to(root)}")


def _overrides(assignments: list[str]) -> dict:
    import yaml

    from reattend.pipeline.errors import CommandError
    from reattend.project import load_yaml

    overrides = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise CommandError(f"--set takes NAME=VALUE, got '{text}'", exit_code=2)
        if name in overrides:
            raise CommandError(f"--set {name}: given twice", exit_code=2)
        try:
            overrides[name] = load_yaml(value)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise CommandError(f"--set {name}: '{value}' is not a YAML value", 2) from None
    return overrides


def _repro(options: argparse.Namespace) -> int:
    from reattend.pipeline.cores import usable_cores
    from reattend.pipeline.preflight import check_repository, check_scheduler
    from reattend.pipeline.repro import Options, repro

    root = _root()
    profile = _profile(root, options.profile)
    check_repository(root)
    if options.scheduler:
        check_scheduler(options.scheduler)
    jobs = options.jobs or usable_cores()
    asked = Options(
        jobs,
        force=options.force,
        dry=options.dry,
        scheduler=options.scheduler,
        deadline=options.deadline,
    )
    return repro(root, options.papers, profile, asked)


def _judge(options: argparse.Namespace) -> int:
    from reattend.pipeline.judge import judge_papers

    return judge_papers(_root(), options.papers)


def _power(options: argparse.Namespace) -> int:
    from reattend.pipeline.errors import CommandError
    from reattend.pipeline.power import pilot_power, power

    root = _root()
    if options.pilot:
        if len(options.papers) != 1:
            raise CommandError("--pilot speaks of one paper; name it", exit_code=2)
        return pilot_power(root, options.papers[0], options.pilot)
    return power(root, options.papers, _profile(root, options.profile))


def _grow(options: argparse.Namespace) -> int:
    from reattend.pipeline.grow import grow
    from reattend.pipeline.run import run

    _fix_threads()
    root = _root()
    return grow(root, options.papers, _profile(root, options.profile), options.budget, run)


def _report(options: argparse.Namespace) -> None:
    from reattend.pipeline.report import write_report, write_site

    root = _root()
    if options.html:
        print(f"written: {write_site(root, notebooks=not options.no_notebooks).relative_to(root)}")
    else:
        write_report(root)


def _show(options: argparse.Namespace) -> None:
    from reattend.pipeline.show import show

    show(_root(), options.paper)


def _study(options: argparse.Namespace) -> None:
    from reattend.pipeline.study import study

    _fix_threads()
    study(_root(), options.paper, options.options)


def _compare(options: argparse.Namespace) -> int:
    from reattend.pipeline.compare import compare

    root = _root()
    return compare(root, options.papers, _profile(root, None), options.ref, options.study)


def _attest(options: argparse.Namespace) -> int:
    from reattend.pipeline.attest import attest

    _fix_threads()
    return attest(_root(), options.papers, options.ref)


def _sync(options: argparse.Namespace) -> None:
    from reattend.pipeline.graph import sync
    from reattend.pipeline.notice import write_notice

    root = _root()
    changed = [
        name
        for name, wrote in (("dvc.yaml", sync(root)), ("NOTICE.md", write_notice(root)))
        if wrote
    ]
    print(f"written: {', '.join(changed)}" if changed else "dvc.yaml and NOTICE.md are up to date")


def _fingerprint(options: argparse.Namespace) -> None:
    from reattend.pipeline.manifests import write_fingerprints

    write_fingerprints(_root())


def _new(options: argparse.Namespace) -> None:
    from reattend.pipeline.new import write_paper

    root = _root()
    for path in write_paper(root, options.family, options.paper):
        print(f"written: {path.relative_to(root)}")
    print(f"next: `reattend sync`, then `reattend check {options.paper}` says what is left to do")


def _check(options: argparse.Namespace) -> int:
    from reattend.pipeline.check import check

    return check(_root(), options.papers)


def _tidy(options: argparse.Namespace) -> None:
    from reattend.pipeline.run import tidy_paper
    from reattend.records import record_paths

    root = _root()
    _check_names("paper", options.papers, record_paths(root))
    for slug in options.papers:
        tidy_paper(root, slug)
        print(f"{slug}: checked outputs renewed")


if __name__ == "__main__":
    main()
