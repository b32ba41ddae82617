"""DVC's view: what re-runs and what does not, in a throw-away checkout."""

import json
import re

import yaml

from tests.pipeline.toy import ROOT, Checkout


def ran(output: str) -> set[str]:
    return set(re.findall(r"Running stage '([^']+)'", output))


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def restored(checkout):
    checkout.run("git", "checkout", "-q", ".", check=True)


def test_nothing_to_do_after_a_run(checkout):
    done = checkout.dvc("repro", check=True)
    assert ran(done.stdout) == set()
    assert "up to date" in checkout.dvc("status", check=True).stdout


def test_a_fresh_clone_finds_committed_results_up_to_date(checkout, tmp_path):
    checkout.run("git", "clone", "-q", checkout.root, tmp_path / "clone", check=True)
    status = checkout.run(
        "git", "-C", tmp_path / "clone", "ls-files", "figures/theory/toy_a/smoke", check=True
    )
    assert "results.json" in status.stdout
    done = checkout.run("dvc", "--cd", tmp_path / "clone", "repro", "--allow-missing", check=True)
    assert ran(done.stdout) == set()


def test_a_parameter_reruns_its_paper_alone(checkout):
    params = yaml.safe_load((checkout.root / "params.yaml").read_text())
    params["papers"]["toy_a"]["smoke"]["n"] = 4
    params["papers"]["toy_b"]["cpu"]["n"] = 7  # another profile: does not count
    (checkout.root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    done = checkout.dvc("repro", check=True)
    assert ran(done.stdout) == {"fingerprint", "replicate-toy_a", "report"}
    results = json.loads((checkout.results("toy_a", "smoke") / "results.json").read_text())
    assert results["parameters"]["n"] == 4
    compared = checkout.reattend("compare")
    assert "1 measurements differ" in compared.stdout
    restored(checkout)


def test_comments_outputs_and_metadata_rerun_nothing(checkout):
    edit(
        checkout.root / "lib/reattend/evidence/samples.py", "import math", "import math  # numbers"
    )
    notebook = json.loads(checkout.notebook("toy_a").read_text())
    notebook["metadata"]["touched"] = True
    notebook["cells"][5]["outputs"] = [
        {"output_type": "stream", "name": "stdout", "text": "seen by hand"}
    ]
    checkout.notebook("toy_a").write_text(json.dumps(notebook))
    done = checkout.dvc("repro", check=True)
    assert ran(done.stdout) == {"fingerprint"}
    restored(checkout)


def test_editing_a_notebook_reruns_its_paper_and_a_failure_stops_no_other(checkout):
    for slug in ("toy_a", "toy_b"):
        edit(checkout.notebook(slug), "1 + P.scales", "2 + P.scales")
    edit(checkout.notebook("toy_a"), "import numpy", "1 / 0\\nimport numpy")
    done = checkout.reattend("repro", "--profile", "smoke", "--jobs", "1")
    assert done.returncode == 1
    assert re.search(r"failed: toy_a: .*toy_a.ipynb, cell 6 .*ZeroDivisionError", done.stdout)
    assert "toy_b: done" in done.stdout
    assert "of 2 papers have results" in done.stdout
    assert "3 measurements differ" in done.stdout  # what differs from the committed results
    kept = json.loads((checkout.results("toy_a", "smoke") / "results.json").read_text())
    assert kept["measurements"][0]["value"] < 1.9  # the earlier results
    fresh = json.loads((checkout.results("toy_b", "smoke") / "results.json").read_text())
    assert fresh["measurements"][0]["value"] > 1.9
    restored(checkout)


def test_force_reruns_what_is_up_to_date_and_finds_it_the_same(checkout):
    checkout.dvc("repro", check=True)
    done = checkout.reattend("repro", "--force", "--profile", "smoke", "toy_a", check=True)
    assert "[1/1] toy_a: done" in done.stdout
    assert "toy_b" not in done.stdout
    assert "0 measurements differ" in done.stdout
    restored(checkout)


def test_a_forced_run_goes_on_where_it_stopped(checkout):
    """Stopped by a failure, by the clock and after its last stage; then it begins anew."""
    edit(checkout.notebook("toy_b"), "import numpy", "1 / 0\\nimport numpy")
    assert checkout.reattend("repro", "--force", "--profile", "smoke").returncode == 1
    restored(checkout)
    dry = checkout.reattend("repro", "--force", "--dry", check=True)
    assert "1 of 2 papers would run" in dry.stdout
    late = checkout.reattend("repro", "--force", "--deadline", "0.01s", check=True)
    assert "left out for lack of time: toy_b; the same command goes on" in late.stdout
    done = checkout.reattend("repro", "--force", check=True)
    assert re.search(
        r"going on with the forced run of 2\S+ \S+: 1 of 2 papers are done", done.stdout
    )
    assert "toy_b: done" in done.stdout
    assert "toy_a: started" not in done.stdout
    assert "0 measurements differ" in done.stdout  # of both papers
    again = checkout.reattend("repro", "--force", check=True)
    assert "going on" not in again.stdout
    assert "toy_a: done" in again.stdout
    restored(checkout)


def test_a_forced_run_repeats_what_has_changed_since(checkout):
    edit(checkout.notebook("toy_b"), "import numpy", "1 / 0\\nimport numpy")
    checkout.reattend("repro", "--force", "--profile", "smoke")
    restored(checkout)
    edit(checkout.notebook("toy_a"), "1 + P.scales", "2 + P.scales")
    done = checkout.reattend("repro", "--force", check=True)
    assert "toy_a: done" in done.stdout
    assert "toy_b: done" in done.stdout
    restored(checkout)
    checkout.reattend("repro", "--profile", "smoke", check=True)
    restored(checkout)


def test_repro_refuses_bad_input_before_running(checkout):
    for arguments, words in (
        (["toi"], "unknown paper 'toi'"),
        (["--profile", "fast"], "unknown profile"),
    ):
        done = checkout.reattend("repro", *arguments)
        assert done.returncode == 2
        assert words in done.stderr
    edit(checkout.root / "params.yaml", "n: 3", "n: 0")
    done = checkout.reattend("repro", "--profile", "smoke")
    assert done.returncode == 2
    assert "failed: toy_a: parameter 'n' = 0" in done.stdout
    assert "toy_b: started" not in done.stdout
    restored(checkout)


def test_one_bad_paper_stops_no_other(checkout):
    """A broken notebook, then a broken record, beside a paper whose results are damaged."""
    for name, damage in (("ipynb", "{"), ("yaml", "slug: [")):
        results = checkout.results("toy_b", "smoke")
        whole = (results / "results.json").read_bytes()
        (results / "results.json").write_text("{")
        (results / "run.json").write_text("[]")
        checkout.notebook("toy_a").with_suffix(f".{name}").write_text(damage)
        done = checkout.reattend("repro")
        assert done.returncode == 2, done.stdout + done.stderr
        assert done.stderr == ""
        lines = [line for line in done.stdout.splitlines() if line.startswith("failed: ")]
        assert len(lines) == 1
        assert f"toy_a.{name}" in lines[0]
        assert "toy_b: done" in done.stdout
        assert (results / "results.json").read_bytes() == whole
        assert "replicate-toy_a" in (checkout.root / "dvc.yaml").read_text()
        restored(checkout)
    checkout.reattend("repro", check=True)
    restored(checkout)


def test_dry_says_why_and_changes_nothing(checkout):
    edit(checkout.root / "params.yaml", "n: 3", "n: 5")
    before = checkout.run("git", "status", "--porcelain", check=True).stdout
    done = checkout.reattend("repro", "--dry", check=True)
    why = "its code, record, parameters or catalogue entry changed"
    assert re.fullmatch(rf"toy_a: {why} \(about \d+ s\)", done.stdout.splitlines()[0])
    assert done.stdout.splitlines()[1:] == ["1 of 2 papers would run at profile smoke"]
    done = checkout.reattend("repro", "--dry", "--profile", "cpu", "toy_b", check=True)
    assert "toy_b: no results yet at this profile" in done.stdout
    assert checkout.run("git", "status", "--porcelain", check=True).stdout == before
    restored(checkout)


def test_a_deadline_leaves_out_what_does_not_fit(checkout):
    done = checkout.reattend("repro", "--force", "--deadline", "0.01s", check=True)
    assert "left out for lack of time: replicate" not in done.stdout
    assert "left out for lack of time: toy_a, toy_b" in done.stdout
    refused = checkout.reattend("repro", "--deadline", "soon")
    assert refused.returncode == 2
    assert "a time like 90s, 55m or 2h, not 'soon'" in refused.stderr
    restored(checkout)


def test_allow_missing_in_a_fresh_clone_runs_what_was_edited(tmp_path):
    own = Checkout(tmp_path / "own", ["toy_a", "toy_b"])
    own.write_paper("toy_a", needs={"assets": ["needles"]})
    own.reattend("sync", check=True)
    own.reattend("repro", "--profile", "smoke", check=True)
    own.commit()
    own.run("git", "clone", "-q", own.root, tmp_path / "clone", check=True)
    own.root = tmp_path / "clone"
    assert "nothing to run" in own.reattend("repro", check=True).stdout
    own.run("git", "clean", "-fdxq", check=True)
    own.run("git", "checkout", "-q", ".", check=True)
    edit(own.root / "params.yaml", "n: 3", "n: 5")
    done = own.dvc("repro", "--allow-missing", check=True)
    assert ran(done.stdout) == {"fingerprint", "replicate-toy_a", "report"}


def test_a_margin_makes_only_the_report_stale_and_dvc_shows_what_it_does(tmp_path):
    own = Checkout(tmp_path / "own", ["toy_a", "toy_b"])
    plots = own.root / ".dvc" / "plots"
    plots.mkdir()
    (plots / "verdicts.json").write_text((ROOT / ".dvc/plots/verdicts.json").read_text())
    own.reattend("repro", "--profile", "cpu", check=True)
    own.commit()
    edit(own.notebook("toy_a").with_suffix(".yaml"), "reproduced: 0.5", "reproduced: 5.0")
    assert ran(own.dvc("repro", check=True).stdout) == {"fingerprint", "report"}
    shown = own.dvc("metrics", "show", check=True).stdout
    assert max(map(len, shown.splitlines())) < 150
    assert shown.splitlines()[0].split() == [
        "Path",
        *(f"cpu.{name}" for name in ("headline", "inconclusive", "not_reproduced", "partially")),
        "cpu.reproduced",
    ]
    diff = own.dvc("metrics", "diff", check=True).stdout
    path = "figures/theory/toy_a/metrics.json"
    rows = [line.split() for line in diff.splitlines()[1:]]
    assert rows == [
        [path, "cpu.partially", "0", "1", "1"],
        [path, "cpu.reproduced", "1", "0", "-1"],
    ]
    page = own.dvc("plots", "show", "--out", tmp_path / "plots", check=True)
    assert "index.html" in page.stdout
    html = (tmp_path / "plots" / "index.html").read_text()
    assert '"verdict": "partially"' in html
    assert "DVC_METRIC" not in html


def test_dvc_experiments_set_parameters(checkout):
    done = checkout.dvc("exp", "run", "-S", "papers.toy_b.smoke.n=9")
    assert done.returncode == 0, done.stderr
    results = json.loads((checkout.results("toy_b", "smoke") / "results.json").read_text())
    assert results["parameters"]["n"] == 9
    restored(checkout)


def test_tidy_keeps_the_outputs_of_checked_cells_only(checkout):
    checkout.reattend("tidy", "toy_a", check=True)
    cells = json.loads(checkout.notebook("toy_a").read_text())["cells"]
    outputs = [cell["outputs"] for cell in cells if cell["cell_type"] == "code"]
    assert [len(each) for each in outputs] == [0, 0, 0, 1, 0, 0]
    assert outputs[3][0]["text"] in ("42\n", ["42\n"])
    before = checkout.notebook("toy_a").read_bytes()
    checkout.reattend("tidy", "toy_a", check=True)
    assert checkout.notebook("toy_a").read_bytes() == before
    restored(checkout)


def test_compare_names_bad_revisions(checkout):
    done = checkout.reattend("compare", "--ref", "nowhere")
    assert (done.returncode, "no Git revision 'nowhere'" in done.stderr) == (2, True)


def test_a_catalogue_entry_described_in_other_words_reruns_nothing(tmp_path):
    own = Checkout(tmp_path / "own", ["toy"])
    own.write_paper("toy", needs={"assets": ["needles"]})
    own.reattend("sync", check=True)
    own.reattend("repro", "--profile", "smoke", check=True)
    assert "up to date" in own.dvc("status", check=True).stdout
    catalogue = own.root / "lib/reattend/assets/catalogue.yaml"
    entries = yaml.safe_load(catalogue.read_text())
    entries["needles"]["about"] = "the same"
    catalogue.write_text(yaml.safe_dump(entries))
    assert ran(own.dvc("repro", check=True).stdout) == {"fingerprint"}
    entries["needles"]["version"] = "0"
    catalogue.write_text(yaml.safe_dump(entries))
    own.reattend("fingerprint", check=True)
    stale = ran(own.dvc("repro", "--dry", check=True).stdout)
    assert {"fetch-needles", "replicate-toy"} <= stale
