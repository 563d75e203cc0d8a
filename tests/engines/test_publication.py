"""Publications: a fingerprint that any change of a tensor changes, and an engine that must show what it holds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from palate.cast import Cast, Layout, assemble
from palate.engines.engine import Sampling
from palate.engines.local import LocalEngine
from palate.engines.publication import Publication, fingerprints
from palate.models.load import Loaded
from palate.models.lora import adapter_parameters
from palate.models.make import Architecture, Make, make
from palate.models.trunk import Trunk
from palate.settings import NotFinite, PalateError
from palate.stages import _invariants
from tests.stages import tiny_runs

FORMATS = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64),
]
LENGTHS = st.sampled_from([1, 2, 3, 7, 100, 4095, 4096, 4097, 8195, (1 << 18) - 1, (1 << 18) + 3])


def mark(tensor: Tensor) -> int:
    return fingerprints({"x": tensor})["x"]


def bits(length: int, size: int, seed: int) -> Tensor:
    """The bytes of `length` elements, any bit pattern."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (length, size), dtype=torch.uint8, generator=generator)


def as_format(raw: Tensor, dtype: torch.dtype) -> Tensor:
    return (raw & 1).bool()[:, 0] if dtype == torch.bool else raw.contiguous().view(dtype)[:, 0]


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@settings(max_examples=25, deadline=None)
@given(length=LENGTHS, place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 127), seed=st.integers(0, 9))
def test_any_changed_bit_shows(dtype: torch.dtype, length: int, place: float, bit: int, seed: int) -> None:
    size = torch.empty((), dtype=dtype).element_size()
    raw = bits(length, size, seed)
    changed = raw.clone()
    bit = 0 if dtype == torch.bool else bit % (8 * size)
    changed[int(place * length), bit // 8] ^= 1 << (bit % 8)
    assert mark(as_format(raw, dtype)) != mark(as_format(changed, dtype))


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@settings(max_examples=25, deadline=None)
@given(length=LENGTHS, first=st.integers(0, 1 << 20), second=st.integers(0, 1 << 20), seed=st.integers(0, 9))
def test_any_swap_of_unequal_elements_shows(
    dtype: torch.dtype, length: int, first: int, second: int, seed: int
) -> None:
    raw = bits(length, torch.empty((), dtype=dtype).element_size(), seed)
    raw = raw & 1 if dtype == torch.bool else raw
    order = torch.arange(length)
    order[first % length], order[second % length] = second % length, first % length
    same = bool((raw[order] == raw).all())
    assert (mark(as_format(raw, dtype)) == mark(as_format(raw[order], dtype))) == same


@pytest.mark.parametrize("distance", [1, 3, 4093, 4095, 4096, 1 << 17])
@pytest.mark.parametrize("pair", [(0.0, -0.0), (1.0, -1.0), (1.0, 1.0000001), (float("nan"), float("inf"))], ids=str)
def test_swaps_that_a_sum_over_places_could_miss(distance: int, pair: tuple[float, float]) -> None:
    """Along a row, down a column, and one down with three to the left, where weights by row and column would meet."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        if torch.tensor(pair[0], dtype=dtype).equal(torch.tensor(pair[1], dtype=dtype)) and pair[0] != 0:
            continue  # the two are one number in this format
        before = torch.zeros(1 << 18, dtype=dtype)
        before[5], before[5 + distance] = pair
        after = before.clone()
        after[5], after[5 + distance] = pair[1], pair[0]
        assert mark(before) != mark(after)


def test_words_that_change_places_inside_an_element_show() -> None:
    """0x00010002 and 0x00020001 have the same sum of words."""
    before = torch.tensor([0x00010002, 0x00020001], dtype=torch.int32)
    assert mark(before) != mark(before.flip(0))


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_the_layout_in_memory_does_not_count(dtype: torch.dtype) -> None:
    raw = as_format(bits(6000, torch.empty((), dtype=dtype).element_size(), 3), dtype)
    wide = torch.stack([raw, raw], 1)
    assert mark(wide[:, 0]) == mark(raw)
    assert mark(raw.view(60, 100).t()) == mark(raw.view(60, 100).t().contiguous())
    assert mark(raw.view(60, 100)) == mark(raw)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_nothing_and_a_single_number_have_a_fingerprint(dtype: torch.dtype) -> None:
    one = torch.ones((), dtype=dtype)
    assert mark(torch.empty((0, 3), dtype=dtype)) == 0
    assert mark(one) == mark(one[None]) != mark(torch.zeros((), dtype=dtype))


def test_it_is_the_sum_it_says_it_is() -> None:
    """Σ word · (2 · place + 1) modulo 2⁶⁴ in Python's own whole numbers, over the borders of rows and parts."""
    raw = bits((1 << 18) + 5000, 4, 1)
    planes = raw.contiguous().view(torch.int16).unbind(1)
    said = [sum(w * (2 * k + 1) for k, w in enumerate(plane.tolist())) % (1 << 64) for plane in planes]
    assert mark(as_format(raw, torch.float32)) == (said[0] << 64) + said[1]


# --- engines with weights of their own --------------------------------------------------------------------------------

TEXTS = ["a small wine with a long finish and some salt", "the soup was hot, the bread was not"]


@cache
def _tiny(architecture: Architecture) -> Loaded:
    loaded = make(
        Make(architecture=architecture, hidden_size=32, layers=2, heads=2, context=64, vocabulary=280), TEXTS, 7
    )
    with torch.no_grad():
        for weight in loaded.trunk.parameters():
            if weight.dim() > 1:
                weight.mul_(4.0)
    return loaded


def tiny(layout: str = "separate", architecture: Architecture = "llama", dtype: torch.dtype = torch.float32) -> Cast:
    loaded = copy.deepcopy(_tiny(architecture))
    loaded.trunk.model.to(dtype)  # pyright: ignore[reportCallIssue]
    cast = assemble(Layout(kind=layout, lora_rank=4), loaded, ("policy", "reference", "value"), 3)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for path, low_rank in adapter_parameters(cast.seat("policy").trunk.model, "policy").items():
            generator = torch.Generator().manual_seed(len(path))
            low_rank.copy_(torch.randn(low_rank.shape, generator=generator) * 0.2)
    return cast


class OwnWeights:
    """An engine with weights of its own, which it takes from each publication and shows.

    `take` is how it copies; `repack` is done behind that, where fingerprints no longer look.
    """

    def __init__(self, cast: Cast, tokenizer: Any, sampling: Sampling) -> None:
        trunk = copy.deepcopy(cast.seat("policy").trunk).requires_grad_(False)
        self.trunk: Trunk = trunk
        self.inner = LocalEngine(trunk, tokenizer, sampling)
        self.tokenizer = tokenizer
        self.take: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda weights: weights
        self.repack: Callable[[Trunk], None] = lambda trunk: None

    def held(self) -> dict[str, Tensor]:
        return {n: x for n, x in self.trunk.model.state_dict().items() if ".adapters." not in n}

    def publish(self, publication: Publication) -> None:
        self.trunk.model.load_state_dict(self.take(dict(publication.weights())), strict=False)
        held = {name: x.clone() for name, x in self.held().items()}
        self.repack(self.trunk)
        publication.verify(held, self.inner.listen(publication.canary), "own engine")

    def generate(self, *args: Any, **more: Any) -> Any:
        return self.inner.generate(*args, **more)


def published(cast: Cast, version: int = 3, temperature: float = 1.0) -> Publication:
    prompt = _tiny("llama").tokenizer.encode(TEXTS[0])
    return _invariants.publication(cast, _invariants.canary(prompt, temperature, cast.device), version)


def own(cast: Cast, **sampling: Any) -> OwnWeights:
    return OwnWeights(cast, _tiny("llama").tokenizer, Sampling(max_new_tokens=8, **sampling))


@torch.no_grad()
def move(cast: Cast, by: float = 0.1) -> None:
    """As an update would: every trained weight of the policy moves."""
    for parameter in cast.parameters(["policy"]).values():
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).to(parameter) * by)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("layout", ["separate", "shared", "adapters", "hydra"])
def test_an_engine_that_took_everything_is_believed(
    layout: str, architecture: Architecture, temperature: float
) -> None:
    cast = tiny(layout, architecture)
    engine = own(cast, temperature=temperature)
    move(cast)
    engine.publish(published(cast, temperature=temperature))


def swap_layers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    one, two = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))
    return {**weights, one: weights[two], two: weights[one]}


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {n: x for n, x in weights.items() if n != name}


LAYER = "model.layers.1.self_attn.q_proj.weight"
PARTIAL: dict[str, tuple[str, Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "one layer is not copied": ("separate", without(LAYER), rf"{LAYER} is not what the trainer holds"),
    "two layers are swapped": ("separate", swap_layers, r"model\.layers\.0\.mlp\.up_proj\.weight and 1 more"),
    "nothing is taken": ("separate", lambda weights: {}, r"version 3 did not arrive whole: .* and \d+ more"),
    "half of the numbers of a layer": (
        "separate",
        lambda w: {**w, LAYER: torch.cat([w[LAYER][:-1], w[LAYER][-1:] * 0])},
        rf"{LAYER} is not",
    ),
    "two numbers change places": (
        "separate",
        lambda w: {**w, LAYER: w[LAYER].flatten()[[1, 0, *range(2, w[LAYER].numel())]].view_as(w[LAYER])},
        rf"{LAYER} is not",
    ),
    "the adapter is not merged": ("adapters", lambda weights: {}, r"model\.layers\.0\.self_attn\.q_proj\.weight"),
}


@pytest.mark.parametrize("name", PARTIAL)
def test_a_partial_sync_is_found_and_the_layer_named(name: str) -> None:
    layout, take, message = PARTIAL[name]
    cast = tiny(layout)
    engine = own(cast)
    move(cast)
    engine.take = take
    with pytest.raises(PalateError, match=rf"own engine: .*{message}"):
        engine.publish(published(cast))


def test_weights_of_the_version_before_are_found() -> None:
    cast = tiny()
    engine = own(cast)
    before = published(cast, 1)
    kept = {name: x.clone() for name, x in before.weights().items()}
    engine.publish(before)
    move(cast, 1e-6)
    engine.take = lambda weights: kept
    with pytest.raises(PalateError, match=r"version 2 did not arrive whole.*stale policy"):
        engine.publish(published(cast, 2))


@torch.no_grad()
def _stale_cache(trunk: Trunk) -> None:
    trunk.model.get_submodule("model.layers.0.mlp.up_proj").weight.mul_(1.2)  # pyright: ignore[reportCallIssue]


def test_right_weights_that_speak_otherwise_are_found_by_the_canary() -> None:
    """A cache of repacked weights, say: what is held is right, what computes is not."""
    cast = tiny()
    engine = own(cast)
    engine.repack = _stale_cache
    with pytest.raises(PalateError, match=r"every weight of version 3 arrived, but the canary.*stale cache"):
        engine.publish(published(cast))


def test_the_trainers_own_memory_is_believed_and_a_view_of_it_is_read() -> None:
    """A local engine pays for no second fingerprint; the same numbers in another order are another tensor."""
    cast = tiny()
    publication = published(cast)
    spoilt = replace(publication, fingerprints=dict.fromkeys(publication.fingerprints, 0))
    spoilt.verify(dict(publication.weights()), publication.canary_logp_BT, "local engine")
    turned = {n: x.T if x.shape == (32, 32) else x for n, x in publication.weights().items()}
    with pytest.raises(PalateError, match=r"self_attn\.[qkvo]_proj\.weight and \d+ more"):
        publication.verify(turned, publication.canary_logp_BT, "local engine")


def test_an_engine_that_reads_at_another_temperature_is_found_by_the_canary() -> None:
    cast = tiny()
    engine = own(cast, temperature=0.8)
    with pytest.raises(PalateError, match="canary text has other"):
        engine.publish(published(cast))


def test_an_engine_that_hears_nan_is_not_believed() -> None:
    """nan is below no bound, and not above one either."""
    cast = tiny()
    publication = published(cast)
    silence = torch.full_like(publication.canary_logp_BT, float("nan"))
    with pytest.raises(PalateError, match="canary text has other"):
        publication.verify(publication.weights(), silence, "own engine")


def test_a_policy_that_has_diverged_is_no_fault_of_the_engine() -> None:
    """The run goes back to a checkpoint for this; it would end at once for an engine that lies."""
    cast = tiny()
    with torch.no_grad():
        cast.seat("policy").trunk.model.get_submodule("model.norm").weight.fill_(float("inf"))  # pyright: ignore[reportCallIssue]
    with pytest.raises(NotFinite, match="weights have diverged"):
        published(cast)


# --- in a real stage --------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, dict[str, Any]] = {
    "separate": {"kind": "separate"},
    "shared": {"kind": "shared"},
    "hydra": {"kind": "hydra", "unfrozen_blocks": 1},
    "adapters": {"kind": "adapters", "lora_rank": 4},
}


def stage(folder: Path, **changes: Any) -> dict[str, Any]:
    model = folder / "model"
    if not model.exists():
        tiny_runs.save_model(model)
    prompts = tiny_runs.write_prompts(folder / "prompts.jsonl")
    return tiny_runs.ppo(model, str(prompts), save_steps=100, **changes)


def with_own_weights(folder: Path, given: dict[str, Any]) -> tuple[Any, OwnWeights]:
    """The loop of a real stage whose engine holds a copy of the policy."""
    loop = tiny_runs.online_loop(folder, given)
    speaker = OwnWeights(loop.cast, loop.loaded.tokenizer, loop.stage.sampling)
    loop.engine = speaker  # pyright: ignore[reportAttributeAccessIssue]
    return loop, speaker


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stage_with_an_engine_of_its_own_weights_is_the_same_run(layout: str, tmp_path: Path) -> None:
    """Six rollouts, six publications: bit for bit, but for an adapter that is folded in there and added here."""
    given = stage(tmp_path, layout=LAYOUTS[layout])
    local = tiny_runs.online_loop(tmp_path / "local", given)
    other, _ = with_own_weights(tmp_path / "other", given)
    local.go()
    other.go()
    ours, theirs = (tiny_runs.timeless(tiny_runs.lines(tmp_path / n / "metrics.jsonl")) for n in ("local", "other"))
    assert len(ours) == 6
    state, twin = (loop.cast.state(["policy", "value"]) for loop in (local, other))
    if layout != "adapters":
        assert tiny_runs.equal(state, twin)
        assert ours == theirs
    for one, two in zip(ours, theirs, strict=True):
        assert one["objective/scores"] == pytest.approx(two["objective/scores"], abs=1e-6), "the same answers"
    assert all(torch.allclose(state[name], twin[name], atol=1e-4) for name in state)


@pytest.mark.parametrize("name", PARTIAL)
def test_a_sync_that_breaks_later_stops_the_stage_there(name: str, tmp_path: Path) -> None:
    """The first two publications arrive, the third does not: nothing is learnt from a third rollout."""
    layout, take, message = PARTIAL[name]
    loop, speaker = with_own_weights(tmp_path / "stage", stage(tmp_path, layout=LAYOUTS[layout]))
    loop.stage = loop.stage.model_copy(update={"total_episodes": 16})
    loop.go()
    loop.stage = loop.stage.model_copy(update={"total_episodes": 48})
    speaker.take = take
    with pytest.raises(PalateError, match=rf"own engine: .*{message.replace('version 3', 'version 2')}"):
        loop.go()
    assert loop.done == 2
    assert len(tiny_runs.lines(tmp_path / "stage" / "metrics.jsonl")) == 2


def test_a_stale_cache_stops_the_stage(tmp_path: Path) -> None:
    """Publications arrive, and what computes is the copy packed at the first of them."""
    loop, speaker = with_own_weights(tmp_path / "stage", stage(tmp_path))
    packed: dict[str, Tensor] = {}

    def pack_once(trunk: Trunk) -> None:
        packed.update(packed or {name: x.clone() for name, x in trunk.model.state_dict().items()})
        trunk.model.load_state_dict(packed)

    speaker.repack = pack_once
    with pytest.raises(PalateError, match=r"own engine: every weight of version 1 arrived, but the canary"):
        loop.go()
    assert loop.done == 1
