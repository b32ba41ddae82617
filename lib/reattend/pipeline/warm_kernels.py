"""Kernels that are forked from a process with torch and its like imported: seconds less a notebook.

`reattend repro` keeps such a process (`kernel_server.py`) for the length of a run and names its socket
in the environment; `reattend run` then has Jupyter start its kernel through the provisioner below. Each
notebook still gets a fresh process, in which no module of Reattend has been imported.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jupyter_client.provisioning import LocalProvisioner

from reattend.pipeline.isolation import isolation
from reattend.pipeline.orphans import end_with_parent

VARIABLE = "REATTEND_KERNELS"  # the server's socket, for everything that `reattend repro` starts
PROVISIONER = "reattend-forked"  # as pyproject.toml registers it
PATIENCE = 60  # seconds that the server gets for its imports


@contextmanager
def kernel_server(environment: dict[str, str]) -> Iterator[None]:
    """A kernel server for the length of a `with` block, for all that this process starts meanwhile.

    Args:
        environment: the server's; what modules read when they are imported must be that of the
            notebooks.
    """
    with tempfile.TemporaryDirectory(prefix="reattend-") as directory:
        path = f"{directory}/kernels"
        program = str(Path(__file__).with_name("kernel_server.py"))
        with socket.socket(socket.AF_UNIX) as listener:
            # Here, so that who asks before the server is up waits for it.
            with _short(path) as address:
                listener.bind(address)
            listener.listen()
            server = subprocess.Popen(
                [sys.executable, "-P", program, str(listener.fileno())],
                env=environment | isolation(Path(directory)),
                cwd=directory,  # matplotlib reads settings where it is imported
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[listener.fileno()],
                start_new_session=True,  # Ctrl-C is not for it
                preexec_fn=end_with_parent,
            )
        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = path
        try:
            yield
        finally:
            os.environ.pop(VARIABLE)
            if before is not None:
                os.environ[VARIABLE] = before
            server.kill()
            server.wait()


@contextmanager
def _short(path: str) -> Iterator[str]:
    """A socket's path by way of its open directory: the system takes 107 bytes, TMPDIR may have more."""
    directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{os.path.basename(path)}"
    finally:
        os.close(directory)


def provisioner() -> dict[str, str]:
    """What tells Jupyter to fork its kernels; nothing where there is no server."""
    return {"JUPYTER_DEFAULT_PROVISIONER_NAME": PROVISIONER} if VARIABLE in os.environ else {}


class ForkedProvisioner(LocalProvisioner):
    """Starts kernels by asking the server; as usual where that cannot give what is asked for."""

    async def launch_kernel(self, cmd: list[str], **options):
        if "ipykernel_launcher" not in cmd:
            return await super().launch_kernel(cmd, **options)
        request = {
            "arguments": cmd[cmd.index("ipykernel_launcher") + 1 :],
            "env": options.get("env") or dict(os.environ),
            "cwd": str(options.get("cwd") or Path.cwd()),
        }
        try:
            self.process = ForkedKernel(os.environ[VARIABLE], request)
        except OSError:  # the server is gone
            return await super().launch_kernel(cmd, **options)
        self.pid = self.pgid = self.process.pid
        return self.connection_info


class ForkedKernel:
    """A kernel that is another process's child, with what Jupyter uses of `subprocess.Popen`.

    Args:
        path: the server's socket.
        request: arguments of the kernel, its environment and working directory.

    Raises:
        OSError: when no kernel was started.
    """

    stdin = stdout = stderr = None

    def __init__(self, path: str, request: dict) -> None:
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.settimeout(PATIENCE)
        try:
            with _short(path) as address:
                self._connection.connect(address)
            text = json.dumps(request).encode() + b"\n"
            sent = socket.send_fds(self._connection, [text], [1, 2])
            self._connection.sendall(text[sent:])
            answer = self._connection.recv(64)
            if not answer.endswith(b"\n"):
                raise OSError("the kernel server ended")
        except OSError:
            self._connection.close()
            raise
        self.pid = int(answer)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """None while the kernel lives; its exit code is not known here, so 1 when it has ended."""
        if self.returncode is None:
            self._connection.setblocking(False)
            try:
                ended = self._connection.recv(1) == b""
            except BlockingIOError:
                ended = False
            except OSError:
                ended = True
            self._note(ended)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the kernel."""
        if self.returncode is None:
            self._connection.settimeout(timeout)
            self._note(self._connection.recv(1) == b"")
        return self.returncode or 0

    def send_signal(self, number: int) -> None:
        """Signal the kernel, if it still lives."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask the kernel to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the kernel."""
        self.send_signal(signal.SIGKILL)

    def _note(self, ended: bool) -> None:
        if ended:
            self.returncode = 1
            self._connection.close()
