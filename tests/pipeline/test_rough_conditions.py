"""What people's machines are like: other settings, strange paths, missing programs, fewer cores."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest

from reattend.parameters import load_params
from reattend.pipeline import cores
from reattend.pipeline.errors import CommandError
from reattend.pipeline.repro import set_profile
from reattend.project import git
from tests.pipeline.toy import Checkout

pytestmark = pytest.mark.usefixtures("ordinary_kernels")


def written(checkout: Checkout) -> dict[str, bytes]:
    """What a run wrote that must not depend on where it ran."""
    files = checkout.results("toy", "smoke").iterdir()
    return {path.name: path.read_bytes() for path in files if path.name != "run.json"}


def hostile_settings(place: Path) -> dict[str, str]:
    """A user's own IPython start-up, Python start-up, matplotlib style and backend, and kernelspec."""
    change = "import numpy as np\n_f = np.random.default_rng\nnp.random.default_rng = lambda s=0: _f(9)\n"
    startup = place / "ipython" / "profile_default" / "startup"
    kernel = place / "jupyter" / "kernels" / "python3"
    for directory in (startup, kernel, place / "matplotlib"):
        directory.mkdir(parents=True)
    (startup / "00.py").write_text(change)
    (place / "startup.py").write_text(change)
    (place / "matplotlib" / "matplotlibrc").write_text("axes.facecolor: black\n")
    spec = {
        "argv": ["/usr/bin/false", "{connection_file}"],
        "display_name": "",
        "language": "python",
    }
    (kernel / "kernel.json").write_text(json.dumps(spec))
    return {
        "IPYTHONDIR": str(place / "ipython"),
        "PYTHONSTARTUP": str(place / "startup.py"),
        "MPLCONFIGDIR": str(place / "matplotlib"),
        "MPLBACKEND": "tkagg",
        "JUPYTER_PATH": str(place / "jupyter"),
    }


def programs_without_git(place: Path) -> str:
    """A PATH on which there is a shell and this Python, and no git."""
    place.mkdir()
    for name in ("sh", "env", "uname", "bash"):
        (place / name).symlink_to(shutil.which(name))
    return f"{Path(sys.executable).parent}{os.pathsep}{place}"


def test_results_do_not_depend_on_the_machine_around_them(tmp_path):
    """All at once: a user's settings, braces in the path, a long TMPDIR, an archive without .git, no git."""
    plain = Checkout(tmp_path / "plain", ["toy"], dvc=False)
    plain.reattend("run", "toy", "--profile", "smoke", check=True)
    rough = Checkout(tmp_path / "a {profile} {1} {", ["toy"])
    shutil.rmtree(rough.root / ".git")
    temporary = tmp_path / ("t" * 120)
    temporary.mkdir()
    around = hostile_settings(tmp_path / "user")
    around |= {"TMPDIR": str(temporary), "PATH": programs_without_git(tmp_path / "bin")}
    done = rough.reattend("repro", "--profile", "smoke", **around)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no Git repository here" in done.stdout
    assert "Traceback" not in done.stderr
    assert written(rough) == written(plain)
    facts = json.loads((rough.results("toy", "smoke") / "run.json").read_text())
    assert facts["commit"] is None


def test_the_parameters_cell_that_lost_its_tag(bare):
    """Through the command itself: it once replaced the cpu reference with smoke results, exit code 0."""
    bare.reattend("run", "toy", "--profile", "cpu", check=True)
    results = bare.results("toy") / "results.json"
    before = results.read_bytes()
    notebook = json.loads(bare.notebook("toy").read_text())
    notebook["cells"][1]["metadata"] = {}
    bare.notebook("toy").write_text(json.dumps(notebook))
    done = bare.reattend("run", "toy", "--profile", "cpu")
    assert done.returncode == 2
    assert "needs one cell tagged 'parameters'" in done.stderr
    assert results.read_bytes() == before


def test_results_of_another_profile_are_not_kept(bare):
    """The same by a way that cannot be seen before the notebook runs."""
    notebook = json.loads(bare.notebook("toy").read_text())
    notebook["cells"][3]["source"] = (
        'globals()["profile"] = "smoke"\n' + notebook["cells"][3]["source"]
    )
    bare.notebook("toy").write_text(json.dumps(notebook))
    done = bare.reattend("run", "toy", "--profile", "cpu")
    assert done.returncode == 1
    assert 'its results say profile "smoke" where "cpu" was asked for' in done.stderr
    assert not bare.results("toy").exists()


def test_build_on_another_disk(bare, tmp_path):
    disk = Path("/dev/shm") / f"reattend-{os.getpid()}"
    disk.mkdir()
    try:
        (bare.root / "build").symlink_to(disk)
        bare.reattend("run", "toy", "--profile", "smoke", check=True)
        assert (bare.results("toy", "smoke") / "results.json").exists()
    finally:
        shutil.rmtree(disk)


@pytest.mark.parametrize("line", ["cpu", '"cpu"', "'cpu'", "   cpu  # mine"])
def test_the_profile_is_set_however_it_is_written(tmp_path, line):
    (tmp_path / "params.yaml").write_text(f"# head\nprofile: {line}\npapers: {{}}\n")
    set_profile(tmp_path, "smoke")
    assert load_params(tmp_path)["profile"] == "smoke"
    text = (tmp_path / "params.yaml").read_text()
    assert text.startswith("# head\nprofile: smoke")
    assert ("# mine" in text) == ("# mine" in line)


def test_a_profile_without_a_line_of_its_own_is_not_ignored(tmp_path):
    (tmp_path / "params.yaml").write_text("{profile: cpu, papers: {}}\n")
    with pytest.raises(CommandError, match="needs one line like `profile: cpu`"):
        set_profile(tmp_path, "smoke")


def test_cores_are_those_this_process_may_use(monkeypatch):
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    for quota, expected in ((math.inf, 4), (2.0, 2), (2.9, 2), (0.5, 1), (16.0, 4)):
        monkeypatch.setattr(cores, "quota", lambda quota=quota: quota)
        assert cores.usable_cores() == expected


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {}, math.inf),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        # The limit of a group above holds too, and that of a container mounted as the root.
        ("0::/job/step\n", {"job/cpu.max": "200000 100000\n", "job/step/cpu.max": "max 1\n"}, 2.0),
        ("0::/elsewhere\n", {"cpu.max": "300000 100000\n"}, 3.0),
        (
            "5:cpuset:/\n4:cpu,cpuacct:/job\n",
            {
                "cpu,cpuacct/job/cpu.cfs_quota_us": "50000",
                "cpu,cpuacct/job/cpu.cfs_period_us": "100000",
            },
            0.5,
        ),
        (
            "4:cpu:/\n0::/\n",
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
            math.inf,
        ),
        ("0::/\n", {"cpu.max": "half\n"}, math.inf),
    ],
)
def test_the_quota_of_control_groups(tmp_path, own, files, expected):
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cores.quota(tmp_path, tmp_path / "own") == expected


def test_git_speaks_of_the_checkouts_own_repository_alone(bare, tmp_path, monkeypatch):
    bare.commit()
    head = git(bare.root, "rev-parse", "HEAD")
    assert len(head.strip()) == 40
    # As in a Git hook of another repository.
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other"))
    assert git(bare.root, "rev-parse", "HEAD") == head
    monkeypatch.setenv("PATH", "/nowhere")
    assert git(bare.root, "rev-parse", "HEAD") is None
