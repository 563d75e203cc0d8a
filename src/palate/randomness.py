"""Counter-based randomness: a draw depends on what it is for, never on what was drawn before.

Every random number is a pure function of `(run seed, stage, step, prompt id, sample index, purpose)`. Sampling one
answer therefore does not depend on the batch around it, the number of processes, or whether the run was resumed.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def key(*parts: int | str) -> int:
    """A 64-bit key from a list of names and numbers (BLAKE2b of their unambiguous spelling)."""
    spelled = "\x1f".join(f"{type(p).__name__}:{p}" for p in parts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(spelled, digest_size=8).digest(), "little")


def uniforms(keys_B: NDArray[np.uint64], counter: int | NDArray[np.int64]) -> NDArray[np.float64]:
    """One number in [0, 1) per key for the given counter (SplitMix64, Steele et al. 2014; 53 bits).

    Counters and keys of any shapes that broadcast.
    """
    with np.errstate(over="ignore"):
        z = keys_B + _GOLDEN * np.asarray(counter + 1).astype(np.uint64)
        z = (z ^ (z >> np.uint64(30))) * _MIX_1
        z = (z ^ (z >> np.uint64(27))) * _MIX_2
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def generator(*parts: int | str) -> np.random.Generator:
    """A NumPy generator of its own for one purpose."""
    return np.random.Generator(np.random.Philox(key=key(*parts)))


def permutation(count: int, *parts: int | str) -> list[int]:
    """A permutation of range(count) for one purpose."""
    return [int(i) for i in generator(*parts).permutation(count)]
