"""Forked kernels: as isolated as those that Jupyter starts itself, and gone when they should be."""

import json
import os
import subprocess
import sys
import tempfile

import nbformat
import pytest
from jupyter_client.provisioning import KernelProvisionerFactory
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError

from reattend.pipeline.run import kernel_config, threads
from reattend.pipeline.warm_kernels import VARIABLE, ForkedKernel, kernel_server, provisioner
from tests.pipeline.toy import PATIENCE, wait_until

LOADED = "import sys\nprint('torch' in sys.modules, [m for m in sys.modules if 'reattend' in m])"
EXPERIMENT = """\
import hashlib, io
import matplotlib.pyplot as plt
import torch
torch.manual_seed(0)
layer = torch.nn.Linear(20, 3)
layer(torch.randn(50, 20)).square().sum().backward()
print(layer.weight.grad.tolist(), torch.get_num_threads(), plt.get_backend())
figure, axes = plt.subplots()
axes.plot(layer.weight.grad.T)
file = io.BytesIO()
figure.savefig(file, metadata={"Software": None})
print(hashlib.sha256(file.getvalue()).hexdigest())
"""


@pytest.fixture(scope="module")
def server():
    """A kernel server for these tests."""
    with kernel_server(os.environ | threads()):
        yield os.environ[VARIABLE]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run cells in a kernel of their own, as the environment says; what they printed."""

    def in_own_kernel(*cells: str) -> str:
        for name, value in (threads() | provisioner()).items():
            monkeypatch.setenv(name, value)
        KernelProvisionerFactory.clear_instance()  # it reads the environment once
        content = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
        place = {"metadata": {"path": str(tmp_path)}}
        NotebookClient(
            content,
            kernel_name="python3",
            resources=place,
            config=kernel_config(),
            startup_timeout=PATIENCE,
        ).execute()
        outputs = [output for cell in content.cells for output in cell.outputs]
        return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")

    yield in_own_kernel
    KernelProvisionerFactory.clear_instance()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_kernels_start_with_torch_and_without_the_library(server, run):
    assert run(LOADED) == "True []\n"


def test_a_server_in_a_long_directory(run, monkeypatch, tmp_path):
    long = tmp_path / ("t" * 120)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(tempfile, "tempdir", None)  # which remembers
    monkeypatch.setenv(VARIABLE, "the server of the other tests")  # put back afterwards
    with kernel_server(os.environ | threads()):
        assert os.environ[VARIABLE].startswith(str(long))
        assert run(LOADED) == "True []\n"


def test_a_kernel_sees_nothing_of_those_before(server, run, tmp_path):
    look = (
        "import os, random, torch, pandas\n"
        "print(torch.get_default_dtype(), hasattr(torch, 'mark'), os.environ.get('MARK'))\n"
        "print(pandas.get_option('display.precision'), torch.are_deterministic_algorithms_enabled())\n"
        "print(os.getcwd())"
    )
    spoil = (
        "torch.set_default_dtype(torch.float64); torch.mark = True; os.environ['MARK'] = '1'\n"
        "pandas.set_option('display.precision', 3); torch.use_deterministic_algorithms(True)\n"
        "os.chdir('/')"
    )
    first = run(look, spoil, look)
    before = f"torch.float32 False None\n6 False\n{tmp_path}\n"
    assert first == before + "torch.float64 True 1\n3 True\n/\n"
    assert run(look) == before


def test_results_are_those_of_an_ordinary_kernel(server, run, monkeypatch):
    forked = run(EXPERIMENT)
    monkeypatch.delenv(VARIABLE)
    monkeypatch.delenv("JUPYTER_DEFAULT_PROVISIONER_NAME")
    assert run(LOADED) == "False []\n"
    assert run(EXPERIMENT) == forked


def test_a_kernel_searches_where_its_own_environment_says(server, run, monkeypatch, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "reattend.py").write_text("here = 'mine'")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "mine"))
    assert run("import reattend\nprint(reattend.here)") == "mine\n"


def test_a_server_in_a_server_gives_way_to_the_first(server):
    with kernel_server(os.environ | threads()):
        assert os.environ[VARIABLE] != server
    assert os.environ[VARIABLE] == server


def test_a_kernel_that_dies_is_noticed(server, run):
    with pytest.raises(DeadKernelError):
        run("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")


def test_an_interrupted_cell_stops(server, run):
    assert run(
        "import os, signal\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    import time\n    time.sleep(3600)\n"
        "except KeyboardInterrupt:\n    print('interrupted')"
    ) == ("interrupted\n")


def test_a_kernel_ends_with_the_one_that_asked_for_it(server):
    ask = (
        "import sys, time\n"
        "from reattend.pipeline.warm_kernels import ForkedKernel\n"
        "request = {'arguments': [], 'env': {}, 'cwd': '/'}\n"
        f"print(ForkedKernel({server!r}, request).pid, flush=True)\n"
        "time.sleep(3600)"
    )
    client = subprocess.Popen([sys.executable, "-c", ask], stdout=subprocess.PIPE, text=True)
    pid = int(client.stdout.readline())
    assert is_alive(pid)
    client.kill()
    client.communicate()
    wait_until(lambda: not is_alive(pid))


def test_the_end_of_a_kernel_is_seen_by_polling_and_by_waiting(server, tmp_path):
    request = {"arguments": [], "env": dict(os.environ), "cwd": str(tmp_path)}
    polled, waited = ForkedKernel(server, request), ForkedKernel(server, request)
    assert polled.poll() is None
    polled.kill()
    wait_until(lambda: polled.poll() is not None)
    waited.terminate()
    assert waited.wait(timeout=PATIENCE) != 0


def test_without_a_server_kernels_start_as_usual(run, monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "nobody"))
    assert run(LOADED) == "False []\n"


def test_a_bad_request_does_not_end_the_server(server, run):
    import socket

    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(server)
        connection.sendall(json.dumps({"arguments": []}).encode())
    assert run("print(1)") == "1\n"
