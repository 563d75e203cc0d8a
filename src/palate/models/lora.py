"""Low-rank adapters that are worn, not installed: which adapter speaks is part of the graph, never a mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

_worn: ContextVar[str | None] = ContextVar("palate_worn_adapter", default=None)


@contextmanager
def wear(name: str | None) -> Iterator[None]:
    """Within this context every adapted layer adds the low-rank term of `name`; None is the bare trunk."""
    token = _worn.set(name)
    try:
        yield
    finally:
        _worn.reset(token)


def remember_adapter() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` for torch.utils.checkpoint: the recomputation wears what the forward pass wore.

    Without it the backward pass would recompute with whatever is worn by then, and the gradients would be silently
    wrong: they would belong to another function than the loss.
    """
    return nullcontext(), wear(_worn.get())
