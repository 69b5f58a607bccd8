"""dsla: one set of weights, many levels of dual-state linear attention.

`dsla.load(model=None, adapter=None, level=0)` gives a model and its tokenizer; the rest lives in the sub-packages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsla.convert.load import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    # Loading pulls in transformers; importing the package must not.
    if name == "load":
        from dsla.convert.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
