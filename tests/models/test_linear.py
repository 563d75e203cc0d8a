"""Linear layers by either back end: the same numbers and gradients, and the plain one wherever the other is missing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from palate.models import linear
from palate.models.linear import Backend, Gains

there = pytest.mark.skipif(linear.gains().learning == 0, reason="this torch has no oneDNN products in float32")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = linear.backend()
    yield
    linear.use(before)


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _layer(kind: str, bias: bool = True) -> nn.Module:
    layer = nn.Linear(24, 40, bias=bias) if kind == "linear" else Conv1D(40, 24)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(_draw(*parameter.shape))
    return layer


def _by(backend: Backend, layer: nn.Module, x: Tensor, weight: Tensor | None) -> list[Tensor]:
    """Output and gradients, of a weighted sum or (without a weight) of a plain one, whose gradient has no strides."""
    assert linear.use(backend) == backend
    x = x.detach().requires_grad_()
    out = layer(x)
    total = out.sum() if weight is None else (out * weight).sum()
    return [out, *torch.autograd.grad(total, [x, *layer.parameters()])]


@there
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "expanded gradient"])
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
@pytest.mark.parametrize("given", ["flat", "batched", "transposed", "every other", "one row", "empty"])
def test_both_back_ends_give_the_same_numbers(given: str, kind: str, weighted: bool) -> None:
    layer = _layer("linear" if kind == "no bias" else kind, bias=kind != "no bias")
    linear.speed_up(layer)
    x = {
        "flat": _draw(17, 24),
        "batched": _draw(3, 5, 24),
        "transposed": _draw(24, 17).t(),
        "every other": _draw(34, 48)[::2, ::2],
        "one row": _draw(1, 24),
        "empty": _draw(0, 24),
    }[given]
    weight = _draw(*x.shape[:-1], 40) if weighted else None
    plain, onednn = (_by(backend, layer, x, weight) for backend in ("plain", "onednn"))
    for one, other in zip(plain, onednn, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


@there
def test_plain_is_the_layer_as_torch_and_transformers_wrote_it() -> None:
    for kind in ("linear", "conv1d"):
        layer, x = _layer(kind), _draw(17, 24)
        expected = layer(x)
        linear.speed_up(layer)
        linear.use("plain")
        assert torch.equal(layer(x), expected)
        linear.use("onednn")
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@there
@pytest.mark.parametrize("rows", [1, 5, 64, 300])
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
@pytest.mark.parametrize("backend", ["plain", "writing", "onednn"])
def test_a_weight_laid_out_for_onednn_gives_the_same_products(backend: Backend, kind: str, rows: int) -> None:
    linear.use(backend)
    layer, x = _layer("linear" if kind == "no bias" else kind, bias=kind != "no bias"), _draw(rows, 24)
    weight, bias = cast(Tensor, layer.weight), cast("Tensor | None", layer.bias)
    laid = linear.laid(weight.t() if kind == "conv1d" else weight)
    with torch.no_grad():
        torch.testing.assert_close(linear.through(layer, x, laid, bias), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("given", ["whole", "behind", "narrowed", "every other", "expanded", "one row", "one column"])
def test_a_matrix_turned_over_is_the_same_matrix(given: str) -> None:
    x = {
        "whole": _draw(17, 24),
        "behind": _draw(17, 24)[5:],
        "narrowed": _draw(17, 24)[:, 3:9],
        "every other": _draw(34, 48)[::2, ::2],
        "expanded": torch.ones(()).expand(17, 24),
        "one row": _draw(1, 24),
        "one column": _draw(24, 1),
    }[given]
    turned = linear.turned(x)
    assert torch.equal(turned, x.t())
    assert turned.is_contiguous()


def _with_gelu(family: str) -> PreTrainedModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40, "rotary_dim": 4}
    more = {"attention_types": [[["global"], 2]], "num_layers": 2} if family == "gpt_neo" else {}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return AutoModel.from_config(AutoConfig.for_model(family, **sizes, **more)).eval()


@there
@pytest.mark.parametrize("family", ["gpt2", "gptj", "gpt_neo", "codegen"])
def test_gelu_goes_with_the_product_where_nothing_learns(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same states, of fewer passes over memory; with gradients GELU has its own, as before."""
    model, tokens = _with_gelu(family), torch.arange(40).view(2, 20)
    expected = model(tokens).last_hidden_state
    linear.speed_up(model)
    linear.use("onednn")
    together: list[bool] = []
    product = linear._product  # pyright: ignore[reportPrivateUsage]

    def watched(*given: Any, **named: Any) -> Tensor:
        together.append(bool(given[3:] and given[3]))
        return product(*given, **named)

    monkeypatch.setattr(linear, "_product", watched)
    learning = model(tokens).last_hidden_state
    assert not any(together)
    with torch.no_grad():
        reading = model(tokens).last_hidden_state
    assert sum(together) == 2, "one in each block"
    torch.testing.assert_close(learning, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reading, expected, rtol=1e-5, atol=1e-5)


@there
def test_what_an_adapter_adds_comes_before_gelu() -> None:
    model, tokens = _with_gelu("gpt2"), torch.arange(20).view(1, 20)
    linear.speed_up(model)
    layer = model.get_submodule("h.0.mlp.c_fc")
    layer.register_forward_hook(lambda layer, given, output: output + 1.0)
    linear.use("plain")
    expected = model(tokens).last_hidden_state
    linear.use("onednn")
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


@there
def test_where_only_writing_gains_what_learns_and_scores_stays_as_torch_wrote_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*given: object) -> Tensor:
        raise AssertionError("a product that does not write")

    linear.use("writing")
    layer, x = _layer("linear"), _draw(17, 24)
    linear.speed_up(layer)
    weight = cast(Tensor, layer.weight)
    assert linear.lays(weight)
    assert not linear.fast(x, weight)
    assert linear.fast(x, linear.laid(weight))
    assert (linear.rounded(1001, x), linear.rounded(1001, x, writing=True)) == (1001, 1008)
    assert not linear.lays(weight.double())
    monkeypatch.setattr(linear, "_product", refuse)
    layer(x).sum().backward()
    with torch.no_grad():
        layer(x)


@there
@pytest.mark.parametrize("trains", ["x", "weight", "bias"])
def test_whatever_trains_alone_has_its_gradient(trains: str) -> None:
    found: list[Tensor] = []
    for backend in ("plain", "onednn"):
        linear.use(backend)
        given = {"x": _draw(17, 24), "weight": _draw(40, 24), "bias": _draw(40)}
        given[trains].requires_grad_()
        (linear.linear(*given.values()) * _draw(17, 40)).sum().backward()
        gradient = given[trains].grad
        assert gradient is not None
        found.append(gradient)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


@there
def test_other_formats_and_autocast_take_the_plain_path() -> None:
    linear.use("onednn")
    x, w = _draw(17, 24), _draw(40, 24)
    assert linear.fast(x, w)
    assert not linear.fast(x.double(), w.double())
    assert not linear.fast(x.bfloat16(), w.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert not linear.fast(x, w)
        assert torch.equal(linear.linear(x, w), functional.linear(x.bfloat16(), w.bfloat16()))


@pytest.mark.parametrize("fault", [AttributeError, RuntimeError])
def test_without_the_private_operator_products_are_plain(
    fault: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*given: object) -> Tensor:
        raise fault("no such operator")

    monkeypatch.setattr(linear, "_product", missing)
    linear.gains.cache_clear()
    try:
        assert linear.gains() == Gains(0.0, 0.0)
        assert linear.gains().best == "plain"
        assert linear.use("onednn") == linear.use("writing") == "plain"
        assert linear.linear(_draw(3, 24), _draw(40, 24)).shape == (3, 40)
    finally:
        linear.gains.cache_clear()


def test_an_operator_that_multiplies_otherwise_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_product", lambda x, w, b=None, gelu=False: x @ w.t() * 1.001)
    assert linear.use("onednn") == "plain"


def test_a_choice_is_kept_and_none_measures() -> None:
    linear.use("plain")
    assert linear.backend() == "plain"
    linear.use(None)
    assert linear.backend() == linear.gains().best
    found = {pair: Gains(*pair).best for pair in ((0.0, 0.0), (1.0, 1.0), (1.0, 2.0), (2.0, 2.0), (2.0, 1.0))}
    assert list(found.values()) == ["plain", "plain", "writing", "onednn", "onednn"]
    assert torch.get_num_threads() >= 1
