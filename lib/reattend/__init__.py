"""Reattend: 65 papers about attention, replicated.

`reattend.attach` puts a long-context method into any Hugging Face causal language model; everything
else is imported from the module that defines it.
"""


def __getattr__(name: str):
    # Imported on first use: `import reattend` must not cost the seconds that torch takes.
    if name == "attach":
        from reattend.attention.host import attach

        return attach
    raise AttributeError(f"module 'reattend' has no attribute {name!r}")
