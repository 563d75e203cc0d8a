"""A draw is a pure function of what it is for."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from palate.randomness import generator, key, permutation, uniforms


def splitmix(state: int, counter: int) -> float:
    """SplitMix64 with Python integers."""
    mask = (1 << 64) - 1
    z = (state + 0x9E3779B97F4A7C15 * (counter + 1)) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    z ^= z >> 31
    return (z >> 11) * 2.0**-53


@given(st.integers(0, 2**64 - 1), st.integers(0, 10_000))
def test_uniforms_are_splitmix64(state: int, counter: int) -> None:
    assert uniforms(np.array([state], dtype=np.uint64), counter)[0] == splitmix(state, counter)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=8), st.integers(0, 100))
def test_a_draw_does_not_depend_on_its_neighbours(states: list[int], counter: int) -> None:
    together = uniforms(np.array(states, dtype=np.uint64), counter)
    alone = [uniforms(np.array([s], dtype=np.uint64), counter)[0] for s in states]
    assert together.tolist() == alone


def test_keys_tell_apart_what_concatenation_would_confuse() -> None:
    assert len({key("a", "bc"), key("ab", "c"), key("abc"), key(1), key("1"), key("a", 1), key("a1")}) == 7
    assert key("run", 3, "sample") == key("run", 3, "sample")


def test_uniforms_are_uniform_over_keys_and_over_counters() -> None:
    keys = np.array([key("u", i) for i in range(20_000)], dtype=np.uint64)
    across = uniforms(keys, 5)
    along = np.concatenate([uniforms(keys[:1], c) for c in range(20_000)])
    for draws in (across, along):
        counts = np.histogram(draws, bins=20, range=(0, 1))[0]
        chi = ((counts - 1000.0) ** 2 / 1000.0).sum()
        assert chi < 43.8  # chi-square, 19 degrees of freedom, one in a thousand
    assert abs(np.corrcoef(uniforms(keys, 0), uniforms(keys, 1))[0, 1]) < 0.03


def test_generators_of_different_purposes_differ_and_repeat() -> None:
    assert generator("a", 1).random() == generator("a", 1).random()
    assert generator("a", 1).random() != generator("a", 2).random()
    assert sorted(permutation(50, "x")) == list(range(50))
    assert permutation(50, "x") == permutation(50, "x") != permutation(50, "y")
