"""A reference that follows the policy: every so many steps, by a share."""

from __future__ import annotations

from palate.cast import Cast
from palate.settings import PalateError


def require_movable(cast: Cast) -> None:
    """Raise PalateError where the reference has no weight of its own that could follow the policy."""
    policy, reference = (cast.seat(role).trunk for role in ("policy", "reference"))
    if {id(p) for p in reference.parameters()} <= {id(p) for p in policy.parameters()}:
        raise PalateError(
            "ref_model_sync_steps: the reference has no weights of its own that could follow the policy. Use layout "
            "separate or shared, or hydra with unfrozen_blocks above 0."
        )


def follow(cast: Cast, step: int, every: int | None, share: float) -> None:
    """Behind every `every`-th optimiser step the reference becomes (1 − share) of itself and share of the policy."""
    if every and step % every == 0:
        cast.blend("policy", "reference", share)
