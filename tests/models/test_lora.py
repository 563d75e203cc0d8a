"""Adapters: worn, not installed; the adapter law; merging; what trains. PEFT is the oracle."""

from __future__ import annotations

import pytest
import torch

from palate.models.lora import (
    adapter_names,
    adapter_parameters,
    add_adapter,
    bare_state,
    merge,
    target_paths,
    wear,
)
from palate.models.trunk import Trunk
from palate.settings import PalateError

TOKENS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(5))
REAL = torch.ones_like(TOKENS, dtype=torch.bool)


def _adapted(build, family: str = "llama", *names: str) -> Trunk:
    """A trunk with adapters whose B is not zero, so that they speak."""
    trunk = Trunk(build(family), 60)
    for name in names or ("policy",):
        add_adapter(trunk.model, name, 4, 8.0, "all-linear", 1)
        generator = torch.Generator().manual_seed(len(name))
        for path, parameter in adapter_parameters(trunk.model, name).items():
            if path.endswith(".b"):
                parameter.data.normal_(0, 0.1, generator=generator)
    return trunk


def _logits(trunk: Trunk, name: str | None) -> torch.Tensor:
    with wear(name):
        return trunk.logits(trunk.hidden(TOKENS, REAL))[..., :60]


def test_a_fresh_adapter_changes_nothing_and_freezes_the_trunk(build, family):
    trunk = Trunk(build(family), 60)
    before = _logits(trunk, None)
    add_adapter(trunk.model, "policy", 4, 8.0, "all-linear", 1)
    assert torch.equal(_logits(trunk, "policy"), before)
    training = {path for path, p in trunk.model.named_parameters() if p.requires_grad}
    assert training == set(adapter_parameters(trunk.model, "policy"))


def test_only_the_worn_adapter_is_heard(build, family):
    trunk = _adapted(build, family, "policy", "value")
    bare, policy, value = (_logits(trunk, name) for name in (None, "policy", "value"))
    assert (policy - bare).abs().max() > 1e-3
    assert (policy - value).abs().max() > 1e-3
    with wear("policy"):
        assert torch.equal(_logits(trunk, None), bare)
        assert torch.equal(_logits(trunk, "policy"), policy)
    assert torch.equal(_logits(trunk, None), bare)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_merged_speaks_as_worn(build, family):
    trunk = _adapted(build, family, "policy", "value")
    expected = _logits(trunk, "policy")
    state = bare_state(trunk.model, "policy")
    other = build(family)
    other.load_state_dict(state)
    torch.testing.assert_close(_logits(Trunk(other, 60), None), expected, atol=1e-5, rtol=1e-5)
    merge(trunk.model, "policy")
    torch.testing.assert_close(_logits(trunk, None), expected, atol=1e-5, rtol=1e-5)
    assert adapter_names(trunk.model) == {"value"}


def _gradients(trunk: Trunk, between: str | None) -> dict[str, torch.Tensor]:
    """Gradients of policy and value losses when another adapter is worn between forward and backward."""
    trunk.zero_grad()
    loss = _logits(trunk, "policy").square().mean()
    with wear("value"):
        loss = loss + trunk.hidden(TOKENS, REAL).square().mean()
    with wear(between):
        loss.backward()
    return {path: p.grad.clone() for path, p in trunk.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "gpt_neox", "qwen3"])
def test_adapter_law_checkpointed_gradients_equal_plain_ones(build, family):
    trunk = _adapted(build, family, "policy", "value")
    plain = _gradients(trunk, None)
    trunk.checkpoint_activations()
    for between in (None, "policy", "value"):
        torch.testing.assert_close(_gradients(trunk, between), plain, atol=1e-6, rtol=1e-4)
    assert {path.split(".adapters.")[1].split(".")[0] for path in plain} == {"policy", "value"}


def test_without_remembering_the_adapter_the_gradients_would_be_wrong(build):
    """The sabotaged twin: checkpointing that forgets what was worn gives other gradients, and no error."""
    trunk = _adapted(build, "llama", "policy", "value")
    trunk.packs = False  # how a stream attends would be forgotten too, which other shapes give away
    plain = _gradients(trunk, None)
    trunk.checkpoint_activations()
    trunk.model.activation_checkpointing_enable({"use_reentrant": False})
    forgetful = _gradients(trunk, "value")
    worst = max(
        float((forgetful[k] - plain[k]).norm() / plain[k].norm()) for k in plain if "policy" in k and k in forgetful
    )
    assert worst > 0.1


def test_recomputing_happens_at_all(build):
    """The law above would hold trivially if nothing were checkpointed."""
    trunk = _adapted(build, "llama", "policy")
    trunk.checkpoint_activations()
    calls: list[int] = []
    trunk.base.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    _logits(trunk, "policy").square().mean().backward()
    assert len(calls) == 2


def test_targets_are_chosen_by_name(build):
    model = build("llama")
    assert all(path.endswith(("q_proj", "v_proj")) for path in target_paths(model, ("q_proj", "v_proj")))
    assert len(target_paths(model, ("q_proj", "v_proj"))) == 4
    assert len(target_paths(model, "all-linear")) == 14
    assert not [path for path in target_paths(model, "all-linear") if "lm_head" in path]
    assert target_paths(model, "layers.1.mlp.up_proj") == ["model.layers.1.mlp.up_proj"]


def test_unknown_targets_and_taken_names_are_refused(build):
    model = build("llama")
    with pytest.raises(PalateError, match=r"called 'q_prj'. Did you mean 'q_proj'"):
        add_adapter(model, "policy", 4, 8.0, ("q_prj",), 1)
    add_adapter(model, "policy", 4, 8.0, "all-linear", 1)
    with pytest.raises(PalateError, match="already has one of that name"):
        add_adapter(model, "policy", 4, 8.0, "all-linear", 1)


def test_the_key_decides_the_start(build):
    def start(key: int) -> list[torch.Tensor]:
        model = build("llama")
        add_adapter(model, "policy", 4, 8.0, "all-linear", key)
        return [p.detach() for p in adapter_parameters(model, "policy").values()]

    torch.testing.assert_close(start(1), start(1), atol=0, rtol=0)
    assert any(not torch.equal(a, b) for a, b in zip(start(1), start(2), strict=True))
    bound = 32**-0.5
    assert max(float(p.abs().max()) for p in start(1)) <= 1 / 32**0.5 + 1e-6
    assert max(float(p.abs().max()) for p in start(1)) > 0.9 * bound
