"""Reattend: 65 papers about attention, replicated.

`reattend.attach` puts a long-context method into any Hugging Face causal language model; everything
else is imported from the module that defines it.
"""

import importlib


def __getattr__(name: str):
    # Imported on first use: `import reattend` must not cost the seconds that torch takes. And by
    # name, which fingerprints do not follow: a paper depends on the attention core only if it
    # imports it.
    if name == "attach":
        return importlib.import_module("reattend.attention.host").attach
    raise AttributeError(f"module 'reattend' has no attribute {name!r}")
