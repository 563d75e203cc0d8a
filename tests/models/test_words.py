"""What a head says of known tokens, block by block, against the whole log-softmax in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from palate.models import words as module
from palate.models.words import Shape, shaped, words

SHAPES = {
    "plain": Shape(),
    "temperature": Shape(temperature=0.7),
    "scaled": Shape(scale=0.3, temperature=1.3),
    "capped": Shape(scale=1.2, cap=2.0, temperature=0.8),
}
VOCABULARY = 33


def _given(bias: bool = True) -> tuple[torch.Tensor, nn.Linear, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    head = nn.Linear(8, 40, bias=bias).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    hidden = torch.randn(301, 8, generator=draw, dtype=torch.float64, requires_grad=True)
    return hidden, head, torch.randint(0, VOCABULARY, (301,), generator=draw)


def _oracle(hidden, head, token, shape):
    logits = shaped(head(hidden)[:, :VOCABULARY], shape)
    logp = logits.log_softmax(-1)
    logit = logits.gather(-1, token[:, None])[:, 0]
    return logit, logits.logsumexp(-1), -(logp.exp() * logp).sum(-1), logits.argmax(-1)


def _gradients(parts, weights, inputs):
    total = sum((w * part).sum() for w, part in zip(weights, parts, strict=True) if w is not None)
    return torch.autograd.grad(total, inputs)


@pytest.mark.parametrize("kept", [0, 1 << 24], ids=["computed again", "kept"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("kind", ["linear", "no bias", "any head"])
def test_numbers_and_gradients(monkeypatch, kept, shape, kind):
    monkeypatch.setattr(module, "KEEP", kept)
    monkeypatch.setattr(module, "_LEAST", 50)
    monkeypatch.setattr(module, "_BLOCK", 1)
    hidden, head, token = _given(bias=kind != "no bias")
    asked = (lambda x: head(x)) if kind == "any head" else head
    found = words(asked, hidden, token, VOCABULARY, shape, entropy=True, likeliest=True)
    logit, total, entropy, likeliest = _oracle(hidden, head, token, shape)
    for ours, theirs in ((found.logit_N, logit), (found.total_N, total), (found.entropy_N, entropy)):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(found.logp_N, logit - total, atol=1e-12, rtol=1e-12)
    assert torch.equal(found.likeliest_N, likeliest)
    draw = torch.Generator().manual_seed(4)
    three = [torch.randn(301, generator=draw, dtype=torch.float64) for _ in range(3)]
    inputs = (hidden, *head.parameters())
    for weights in (three, [three[0], -three[0], None], [None, None, three[2]], [three[0], None, None]):
        ours = (
            _gradients((found.logit_N, found.total_N, found.entropy_N), weights, inputs) if weights is three else None
        )
        again = words(asked, hidden, token, VOCABULARY, shape, entropy=True)
        ours = ours or _gradients((again.logit_N, again.total_N, again.entropy_N), weights, inputs)
        theirs = _gradients(_oracle(hidden, head, token, shape)[:3], weights, inputs)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


def test_nobody_asked():
    hidden, head, _ = _given()
    found = words(head, hidden[:0], torch.zeros(0).long(), VOCABULARY, Shape(), entropy=True)
    assert found.logp_N.shape == found.entropy_N.shape == (0,)
    found.logp_N.sum().backward()
    assert not head.weight.grad.any()


def test_frozen_heads_and_frozen_states():
    hidden, head, token = _given()
    head.requires_grad_(False)
    words(head, hidden, token, VOCABULARY, Shape()).logp_N.sum().backward()
    assert hidden.grad is not None
    assert head.weight.grad is None
    head.requires_grad_(True)
    words(head, hidden.detach(), token, VOCABULARY, Shape()).logp_N.sum().backward()
    assert head.weight.grad is not None


def test_a_head_that_is_listened_to_is_asked_itself():
    """An adapter on the head adds its term by a hook; multiplying the weight out would leave it off."""
    hidden, head, token = _given()
    plain = words(head, hidden, token, VOCABULARY, Shape()).logp_N
    head.register_forward_hook(lambda layer, given, out: out * 2)
    torch.testing.assert_close(
        words(head, hidden, token, VOCABULARY, Shape()).logp_N,
        (2 * head.weight @ hidden.T + 2 * head.bias[:, None])
        .T[:, :VOCABULARY]
        .log_softmax(-1)
        .gather(-1, token[:, None])[:, 0],
    )
    assert not torch.allclose(words(head, hidden, token, VOCABULARY, Shape()).logp_N, plain)


def test_half_precision_is_made_wide():
    hidden, head, token = _given()
    said = words(head.to(torch.bfloat16), hidden.to(torch.bfloat16), token, VOCABULARY, Shape(), entropy=True)
    assert said.logp_N.dtype == said.entropy_N.dtype == torch.float32
    said.logp_N.sum().backward()
    assert head.weight.grad.dtype == torch.bfloat16


def test_huge_logits_do_not_overflow():
    hidden, head, token = _given()
    said = words(head.float(), hidden.float() * 1e4, token, VOCABULARY, Shape(), entropy=True)
    assert bool(said.logp_N.isfinite().all() and said.entropy_N.isfinite().all())
    said.logp_N.sum().backward()
    assert bool(head.weight.grad.isfinite().all())
