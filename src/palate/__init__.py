"""palate teaches a language model taste.

    import palate
    taught = palate.sft("gpt2", "demonstrations.jsonl")
    better = palate.train(taught, reward=my_function, prompts=["Describe the soup."])
    better.generate("Describe the bread.")

Importing this loads neither torch nor transformers; the first use of a name does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from palate.door import Trained, load, reward, sft, train

__version__ = "0.1.0"
__all__ = ["Trained", "__version__", "load", "reward", "sft", "train"]

_DOOR = ("Trained", "load", "reward", "sft", "train")


def __getattr__(name: str) -> Any:
    """The names of the Python door, and every module and folder of the package, when they are first asked for."""
    if name in _DOOR:
        return getattr(import_module("palate.door"), name)
    try:
        return import_module(f"palate.{name}")
    except ModuleNotFoundError as fault:
        if fault.name != f"palate.{name}":
            raise  # the module is there, and something it needs is not
        raise AttributeError(f"module 'palate' has no attribute {name!r}") from None
