"""The cast: alignment, temperature, layouts, gradients, checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from palate.batches import Tokens
from palate.cast import Cast, Layout, Seat, assemble
from palate.models.heads import fresh_head
from palate.models.load import Loaded
from palate.models.lora import adapter_parameters, merge
from palate.models.make import Make, make
from palate.models.trunk import Stream, Trunk
from palate.models.words import Shape, words
from palate.settings import PalateError

TEXTS = ["the soup is hot and the wine is red"] * 5
GOLDEN = json.loads((Path(__file__).parent / "golden" / "ppo_details.json").read_text())
ROLES = ("policy", "value", "reference")
LAYOUTS = {
    "separate": Layout(kind="separate"),
    "shared": Layout(kind="shared"),
    "adapters": Layout(kind="adapters", lora_rank=4),
    "borrowed": Layout(kind="adapters", lora_rank=4, value_adapter="policy"),
    "hydra": Layout(kind="hydra", unfrozen_blocks=1),
}


def _make(architecture: str = "gpt2", key: int = 1) -> Loaded:
    made = make(Make(architecture=architecture, hidden_size=32, layers=2, heads=4, vocabulary=280), TEXTS, key)
    with torch.random.fork_rng():
        torch.manual_seed(key)
        for p in made.trunk.parameters():
            p.data.add_(torch.randn_like(p) * 0.1)
    return made


def _batch() -> Tokens:
    """Four rows: pads right, left, in the middle, none; prompts of 3 tokens; garbage ids in the pads."""
    tokens = torch.randint(3, 260, (4, 9), generator=torch.Generator().manual_seed(2))
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[0, 7:], real[1, :2], real[2, 3:5] = False, False, False
    action = real.clone()
    action[0, :3], action[1, :5], action[2, :5], action[3, :3] = False, False, False, False
    return Tokens(tokens.masked_fill(~real, 50259), real, action)


def _slow_logp(trunk: Trunk, batch: Tokens, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One row, one token at a time, by transformers' own logits and the definition of the softmax."""
    logp, entropy = torch.zeros(batch.tokens_BT.shape), torch.zeros(batch.tokens_BT.shape)
    for b in range(batch.size):
        places = batch.real_BT[b].nonzero()[:, 0].tolist()
        row = batch.tokens_BT[b, places]
        for n in range(1, len(places)):
            if not batch.action_BT[b, places[n]]:
                continue
            logits = trunk.model(row[None, :n]).logits[0, -1].double() / temperature
            p = (logits - logits.max()).exp()
            p = p / p.sum()
            logp[b, places[n]] = p[row[n]].log()
            entropy[b, places[n]] = -(p * p.log()).sum()
    return logp, entropy


@pytest.fixture(params=list(LAYOUTS))
def layout(request: pytest.FixtureRequest) -> Layout:
    return LAYOUTS[request.param]


def _cast(layout: Layout) -> Cast:
    return assemble(layout, _make(), ROLES, key=3)


def _shaken(cast: Cast) -> Cast:
    """After some learning: everything that trains is elsewhere."""
    generator = torch.Generator().manual_seed(8)
    for p in cast.parameters(("policy", "value")).values():
        p.data.add_(0.1 * torch.randn(p.shape, generator=generator))
    return cast


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.01])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_log_probabilities_are_the_softmax_of_transformers_logits(architecture, temperature):
    made, batch = _make(architecture), _batch()
    cast = Cast({"policy": Seat(made.trunk, None, None)})
    logp_BT, entropy_BT = cast.logp("policy", batch, temperature, entropy=True)
    slow_logp, slow_entropy = _slow_logp(made.trunk, batch, temperature)
    torch.testing.assert_close(logp_BT, slow_logp, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(entropy_BT, slow_entropy, atol=1e-4, rtol=1e-4)
    assert torch.count_nonzero(logp_BT.masked_select(~batch.action_BT)) == 0
    assert torch.equal(cast.logp("policy", batch, temperature), logp_BT)


class _Scripted(Trunk):
    """A trunk that says given logits: only the arithmetic of the cast is left to test."""

    def __init__(self, logits_BTV: torch.Tensor) -> None:
        torch.nn.Module.__init__(self)
        self.given, self.vocabulary = logits_BTV, logits_BTV.shape[-1]

    def read(self, tokens_BT: torch.Tensor, real_BT: torch.Tensor) -> Stream:
        places = torch.arange(self.given.shape[0] * self.given.shape[1]).view(self.given.shape[:2])
        return Stream(self.given.flatten(0, 1), places)

    def words(self, hidden_ND, token_N, temperature=1.0, entropy=False, likeliest=False):
        shape = Shape(temperature=temperature)
        return words(lambda logits_NV: logits_NV, hidden_ND, token_N, self.vocabulary, shape, entropy, likeliest)


def test_temperature_is_that_of_the_reference_systems():
    case = GOLDEN["logprob_temperature"]
    given = torch.tensor(case["inputs"]["logits"], dtype=torch.float64)
    labels = torch.tensor(case["inputs"]["labels"])
    first = torch.zeros_like(labels[:, :1])
    tokens = torch.cat([first, labels], 1)
    real = torch.ones_like(tokens, dtype=torch.bool)
    action = real.clone()
    action[:, 0] = False
    trunk = _Scripted(torch.cat([given, torch.full_like(given[:, :1], math.nan)], 1))
    cast = Cast({"policy": Seat(trunk, None, None)})
    for name, expected in case["outputs"].items():
        temperature = float(name.removeprefix("T="))
        logp, entropy = cast.logp("policy", Tokens(tokens, real, action), temperature, entropy=True)
        torch.testing.assert_close(logp[:, 1:], torch.tensor(expected["logprobs"]).double(), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(entropy[:, 1:], torch.tensor(expected["entropy"]).double(), atol=1e-6, rtol=1e-6)


def test_response_tokens_read_the_slice_of_the_reference_systems():
    case = GOLDEN["logit_slice_alignment"]
    length, context = len(case["inputs"]["positions"]), case["inputs"]["context_length"]
    states = torch.eye(length)[None]  # the state of place i is the i-th unit vector
    trunk = _Scripted(states)
    head = fresh_head(length, "zero", 1)
    head.last.weight.data.copy_(torch.arange(length).float())
    real = torch.ones(1, length, dtype=torch.bool)
    action = real.clone()
    action[:, :context] = False
    values = Cast({"value": Seat(trunk, None, head)}).values("value", Tokens(real.long(), real, action))
    assert values[0][action[0]].tolist() == case["outputs"]["slice"]


def test_the_value_of_a_token_is_the_heads_output_on_the_token_before():
    made, batch = _make(), _batch()
    head = fresh_head(32, "reference", 5)
    head.gain.data.fill_(1.5)
    head.bias.data.fill_(0.25)
    values = Cast({"value": Seat(made.trunk, None, head)}).values("value", batch)
    for b in range(batch.size):
        places = batch.real_BT[b].nonzero()[:, 0].tolist()
        row = batch.tokens_BT[b, places]
        for t in range(batch.tokens_BT.shape[1]):
            n = sum(place < t for place in places)  # how many real tokens stand before t
            if n == 0:
                assert values[b, t] == 0
                continue
            state = made.trunk.model.base_model(row[None, :n]).last_hidden_state[0, -1]
            expected = 1.5 * (head.last.weight[0] @ state) + 0.25
            torch.testing.assert_close(values[b, t], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_score_is_read_at_the_last_real_token(architecture):
    made, batch = _make(architecture), _batch()
    head = fresh_head(32, "reference", 5)
    head.bias.data.fill_(0.25)
    scores = Cast({"reward": Seat(made.trunk, None, head)}).scores("reward", batch)
    for b in range(batch.size):
        state = made.trunk.model.base_model(batch.tokens_BT[b][batch.real_BT[b]][None]).last_hidden_state[0, -1]
        torch.testing.assert_close(scores[b], head.last.weight[0] @ state + 0.25, atol=1e-5, rtol=1e-5)


def test_the_final_value_is_the_score():
    """Detail 52: a value network that is the reward model predicts the score in the state after the answer."""
    made, batch = _make(), _batch()
    head = fresh_head(32, "reference", 5)
    cast = Cast({role: Seat(made.trunk, None, head) for role in ("value", "reward")})
    ends = batch.real_BT.shape[1] - 2
    values, scores = cast.values("value", batch), cast.scores("reward", batch)
    assert not batch.real_BT[0, ends]
    torch.testing.assert_close(values[0, ends], scores[0])


def test_the_language_model_head_runs_on_rows_before_actions_only():
    made, batch = _make(), _batch()
    rows: list[torch.Size] = []
    made.trunk.model.get_output_embeddings().register_forward_hook(lambda _m, given, _o: rows.append(given[0].shape))
    Cast({"policy": Seat(made.trunk, None, None)}).logp("policy", batch)
    assert rows == [(int(batch.action_BT.sum()), 32)]


def test_padding_and_masked_cells_do_not_matter():
    cast, batch = _shaken(_cast(LAYOUTS["shared"])), _batch()
    for garbage in (0, 1, 259, 10**6):
        other = Tokens(batch.tokens_BT.masked_fill(~batch.real_BT, garbage), batch.real_BT, batch.action_BT)
        torch.testing.assert_close(cast.logp("policy", other), cast.logp("policy", batch), atol=0, rtol=0)
        torch.testing.assert_close(cast.values("value", other), cast.values("value", batch), atol=0, rtol=0)


def test_the_first_token_has_no_past_and_gets_nothing():
    batch = _batch()
    everything = Tokens(batch.tokens_BT, batch.real_BT, batch.real_BT)
    logp = _cast(LAYOUTS["separate"]).logp("policy", everything)
    assert logp[0, 0] == logp[3, 0] == 0
    assert logp[1, 2] == 0  # the first real token after two pads on the left
    assert (logp[:, 3] != 0).tolist() == [True, True, False, True]


def test_the_layouts_start_alike(layout):
    """Whatever is shared, at the start the policy is the reference and the value promises nothing.

    Scored alike, to the bit; a pass that learns rounds GELU apart from the product before it.
    """
    cast, batch = _cast(layout), _batch()
    reference = cast.logp("reference", batch)
    torch.testing.assert_close(cast.logp("policy", batch), reference, atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(cast.logp("policy", batch), reference, atol=0, rtol=0)
    assert torch.count_nonzero(cast.values("value", batch)) == 0


def test_the_reference_stays_while_the_others_move(layout):
    cast, batch = _cast(layout), _batch()
    before = cast.logp("reference", batch)
    _shaken(cast)
    assert torch.equal(cast.logp("reference", batch), before)
    assert (cast.logp("policy", batch) - before).abs().max() > 1e-2
    assert torch.count_nonzero(cast.values("value", batch)) > 0


def test_one_pass_says_what_separate_calls_say(layout):
    cast, batch = _shaken(_cast(layout)), _batch()
    cast.logp("policy", batch)  # frozen blocks below are run once, here
    calls: list[int] = []
    for trunk in {id(seat.trunk): seat.trunk for seat in cast.roles.values()}.values():
        trunk.base.register_forward_hook(lambda *_: calls.append(1))
    logp, entropy, value = cast.logp_and_values("policy", "value", batch, 0.7)
    one_trunk = layout.kind in ("shared", "hydra") or layout.value_adapter == "policy"
    assert len(calls) == (1 if one_trunk else 2)
    slow_logp, slow_entropy = cast.logp("policy", batch, 0.7, entropy=True)
    torch.testing.assert_close((logp, entropy), (slow_logp, slow_entropy), atol=0, rtol=0)
    torch.testing.assert_close(value, cast.values("value", batch), atol=0, rtol=0)


def test_gradient_reaches_what_trains_and_nothing_else(layout):
    cast, batch = _shaken(_cast(layout)), _batch()
    logp, _, value = cast.logp_and_values("policy", "value", batch)
    (logp.sum() + value.sum() + cast.logp("reference", batch).sum()).backward()
    named = cast.parameters(("policy", "value"))
    assert all(p.grad is not None and torch.count_nonzero(p.grad) > 0 for n, p in named.items() if "wpe" not in n)
    trains = {id(p) for p in named.values()}
    modules = [m for seat in cast.roles.values() for m in (seat.trunk, seat.head) if m is not None]
    assert all(p.grad is None for m in modules for p in m.parameters() if id(p) not in trains)


def test_the_loss_of_one_role_leaves_the_others_adapter_alone():
    cast, batch = _shaken(_cast(LAYOUTS["adapters"])), _batch()
    cast.logp("policy", batch).sum().backward()
    model = cast.seat("policy").trunk.model
    assert all(p.grad is not None for p in adapter_parameters(model, "policy").values())
    assert all(p.grad is None for p in adapter_parameters(model, "value").values())


def test_what_trains_is_named_once(layout):
    cast = _cast(layout)
    named = cast.parameters(("policy", "value"))
    assert len({id(p) for p in named.values()}) == len(named)
    assert all(p.requires_grad for p in named.values())
    assert cast.parameters(("reference",)) == {}
    assert {n for n in named if n.startswith("value.head.")} == {"value.head.layers.weight", "value.head.layers.bias"}
    assert list(named) == list(_cast(layout).parameters(("policy", "value")))


def test_each_layout_trains_what_it_promises():
    size = sum(p.numel() for p in _make().trunk.parameters())
    block = sum(p.numel() for p in _make().trunk.base.h[1].parameters())
    norm = 2 * 32
    trains = {
        name: sum(p.numel() for n, p in _cast(layout).parameters(("policy", "value")).items() if ".head." not in n)
        for name, layout in LAYOUTS.items()
    }
    adapter = sum(4 * (i + o) for i, o in ((32, 96), (32, 32), (32, 128), (128, 32))) * 2
    expected = {"separate": 2 * size, "shared": size, "adapters": 2 * adapter, "borrowed": adapter}
    assert trains == {**expected, "hydra": block + norm}


def test_the_policy_alone_trains_without_the_value(layout):
    cast = _cast(layout)
    assert not [n for n in cast.parameters(("policy",)) if n.startswith("value")]


def test_a_checkpoint_brings_everything_back(layout):
    cast, batch = _shaken(_cast(layout)), _batch()
    cast.seat("value").head.gain.data.fill_(3.0)
    kept = {name: t.clone() for name, t in cast.state(("policy", "value")).items()}
    again = _cast(layout)
    again.restore(kept)
    for role, call in (("policy", again.logp), ("reference", again.logp), ("value", again.values)):
        old = cast.values if role == "value" else cast.logp
        torch.testing.assert_close(call(role, batch), old(role, batch), atol=0, rtol=0)
    torch.testing.assert_close(again.state(("policy", "value")), kept, atol=0, rtol=0)


def test_a_checkpoint_of_another_layout_is_refused():
    kept = _cast(LAYOUTS["adapters"]).state(("policy", "value"))
    with pytest.raises(PalateError, match=r"checkpoint: policy\..* does not fit"):
        _cast(LAYOUTS["shared"]).restore(kept)


def test_published_weights_are_the_policys(layout):
    cast, batch = _shaken(_cast(layout)), _batch()
    other = _make(key=9)
    other.trunk.model.load_state_dict(cast.weights("policy"))
    found = Cast({"policy": Seat(other.trunk, None, None)}).logp("policy", batch)
    torch.testing.assert_close(found, cast.logp("policy", batch), atol=1e-5, rtol=1e-5)


def test_adapters_share_one_trunk():
    cast = _cast(LAYOUTS["adapters"])
    assert len({id(seat.trunk) for seat in cast.roles.values()}) == 1
    assert cast.seat("reference").adapter is None
    expected = cast.logp("policy", _batch())
    merge(cast.seat("policy").trunk.model, "policy")
    torch.testing.assert_close(cast.logp("reference", _batch()), expected)


def test_a_role_nobody_plays_and_a_role_without_a_head_are_refused():
    cast = assemble(Layout(), _make(), ("policy",), 1)
    with pytest.raises(PalateError, match="nobody plays 'value'"):
        cast.values("value", _batch())
    with pytest.raises(PalateError, match="has no scalar head"):
        cast.scores("policy", _batch())
