"""A process that has imported what notebooks import, and forks a Jupyter kernel whenever it is asked.

    python -P kernel_server.py DESCRIPTOR

Run as a file, by `reattend.pipeline.warm_kernels`: it must never import anything of Reattend, so that
every kernel imports the library as it is when the notebook runs. Kernels are processes of their own and
share nothing but memory pages that nobody has written to.

The descriptor is that of a listening Unix socket. A request is one line of JSON with the kernel's
arguments, environment and working directory, together with the two files that are to be its stdout and
stderr; the answer is its process id. The connection stays open while the kernel lives: either side that
ends closes it.
"""

import contextlib
import importlib
import json
import os
import signal
import socket
import sys
import threading
from pathlib import Path

# Not pyplot, which looks for IPython's shell when it is imported.
MODULES = ("torch", "pandas", "scipy.stats", "matplotlib.figure", "ipykernel.kernelapp", "IPython")


def serve(listener: socket.socket) -> None:
    """Answer requests until the process is ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system reaps kernels that have ended
    with listener:
        # What IPython's kernel would say before matplotlib is imported.
        os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
        for name in MODULES:
            importlib.import_module(name)
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError, ValueError):
                request, files = receive(connection)
                if os.fork() == 0:
                    listener.close()
                    become_kernel(connection, request, files)
                for file in files:
                    os.close(file)


def receive(connection: socket.socket) -> tuple[dict, list[int]]:
    """A request, and the descriptors of the files that came with it."""
    text, files, *_ = socket.recv_fds(connection, 65536, 2)
    while not text.endswith(b"\n"):
        more = connection.recv(65536)
        if not more:
            raise ValueError("half a request")
        text += more
    return json.loads(text), files


def become_kernel(connection: socket.socket, request: dict, files: list[int]) -> None:
    """Turn this forked process into what the request's command would start; never returns."""
    try:
        os.setsid()
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        swap_paths(os.environ.get("PYTHONPATH", ""), request["env"].get("PYTHONPATH", ""))
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        for target, file in enumerate(files, start=1):
            os.dup2(file, target)
            os.close(file)
        connection.sendall(f"{os.getpid()}\n".encode())
        threading.Thread(target=end_with, args=(connection,), daemon=True).start()
        # 1: not alone, and not to be watched by IPython; `end_with` does that.
        sys.argv = ["ipykernel_launcher.py", *request["arguments"], "--IPKernelApp.parent_handle=1"]
        importlib.import_module("ipykernel.kernelapp").launch_new_instance()
    finally:
        os._exit(0)  # never back into the loop that forked it


def swap_paths(own: str, asked: str) -> None:
    """Search for modules where the request's PYTHONPATH says, not where the server's did."""
    leave = {str(Path(part).absolute()) for part in own.split(os.pathsep) if part}
    ahead = [str(Path(part).absolute()) for part in asked.split(os.pathsep) if part]
    sys.path[:] = [*ahead, *(part for part in sys.path if part not in leave)]


def end_with(connection: socket.socket) -> None:
    """End this kernel when the one that asked for it is gone."""
    with contextlib.suppress(OSError):
        connection.recv(1)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
