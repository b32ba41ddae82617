"""Papermill's engine, with fewer writes: an executed copy with figures takes milliseconds to write."""

from __future__ import annotations

from pathlib import Path

from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from papermill.engines import NBClientEngine, NotebookExecutionManager, papermill_engines
from traitlets import default

from reattend.pipeline.notebooks import note_cell

NAME = "reattend"
SAVE_EVERY = 5.0  # seconds between two writes of the executed copy


class _Manager(NotebookExecutionManager):
    """Notes every cell that begins, and writes the executed copy now and then and at the end."""

    def save(self, **details) -> None:
        if (self.now() - self.last_save_time).total_seconds() >= SAVE_EVERY:
            super().save(**details)

    def cell_start(self, cell, cell_index=None, **details) -> None:
        note_cell(Path(self.output_path), cell_index + 1, len(self.nb.cells))
        super().cell_start(cell, cell_index, **details)

    def notebook_complete(self, **details) -> None:
        super().notebook_complete(**details)
        super().save(**details)


class _OwnPython(AsyncKernelManager):
    """Starts kernels of this very Python: a user's other "python3" kernelspec may come first.

    What a kernel writes past Jupyter, such as its last words when Ctrl-C ends it, goes into a file.
    """

    last_words: Path  # set by a subclass for each run

    @default("kernel_spec_manager")
    def _kernel_spec_manager_default(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[])

    async def start_kernel(self, **options) -> None:
        with self.last_words.open("w") as file:
            await super().start_kernel(stderr=file, **options)


class _Engine(NBClientEngine):
    """Papermill's own engine with the manager above."""

    @classmethod
    def execute_notebook(
        cls, nb, kernel_name, output_path, progress_bar, log_output=False, **options
    ):
        manager = _Manager(nb, output_path, log_output, progress_bar, SAVE_EVERY)
        manager.notebook_start()
        try:
            cls.execute_managed_notebook(
                manager,
                kernel_name,
                log_output=log_output,
                kernel_manager_class=type(
                    "OwnPython",
                    (_OwnPython,),
                    {"last_words": Path(output_path).with_suffix(".stderr")},
                ),
                **options,
            )
        finally:
            manager.notebook_complete()
        return manager.nb


papermill_engines.register(NAME, _Engine)
