"""ILQL: golden numbers through a real cast, a slow oracle on dialogues, the laws, the slow copies, whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import palate
from palate.algorithms import ilql
from palate.batches import Loss, Tokens, Trajectories
from palate.cast import Acts, Cast, Seat
from palate.check.recipe import check_recipe
from palate.data import collate
from palate.data.encode import TokenRow
from palate.data.encode_pairs import RatedRow, encode_returns
from palate.data.encoding import Encoding
from palate.metrics import lookup
from palate.models.heads import ActionHead, ScalarHead
from palate.models.make import make
from palate.models.trunk import Stream
from palate.models.words import Shape, Words, words
from palate.records import Message, Rated
from palate.settings import PalateError, build
from palate.stages import _rows
from tests.algorithms.resuming import goes_on
from tests.laws import test_microbatch_law as law
from tests.losses.golden import part_of
from tests.stages import tiny_runs as tiny

CASE = part_of("ilql")
ROLES = ("policy", "q1", "q2", "value", "target_q1", "target_q2")
HEADS = "1-ilql/model/heads/heads.safetensors"


def made(**settings: Any) -> ilql.Algorithm:
    found = build("algorithms", {"kind": "ilql", **settings}, "algorithm")
    assert isinstance(found, ilql.Algorithm)
    return found


# --- golden ----------------------------------------------------------------------------------------------------------


class Numbered:
    """A trunk whose state after token t of row b is the unit vector 4b + t, so that a head is a table of answers."""

    vocabulary = 4

    def read(self, tokens_BT: Tensor, real_BT: Tensor) -> Stream:
        return Stream(torch.eye(8)[: tokens_BT.numel()], torch.arange(tokens_BT.numel()).view_as(tokens_BT))

    def words(self, hidden_ND: Tensor, token_N: Tensor, **asked: Any) -> Words:
        return words(lambda h_ND: h_ND @ table("policy_logits"), hidden_ND, token_N, 4, Shape(), **asked)


def table(name: str) -> Tensor:
    """A golden B×3×V or B×4 array as 8×V or 8×1, one row for each state; garbage where it says nothing."""
    given = torch.tensor(CASE[name])
    given = given if given.dim() == 3 else given[..., None]
    return nn.functional.pad(given, (0, 0, 0, 4 - given.shape[1]), value=-77.0).flatten(0, 1)


def head(name: str) -> ActionHead | ScalarHead:
    found = ScalarHead(8) if name == "v" else ActionHead(8, 4)
    layer = nn.Linear(8, table(name).shape[1], bias=False)
    layer.weight = nn.Parameter(table(name).T.contiguous())
    found.layers = layer if name == "v" else nn.Sequential(layer)
    return found


def golden(cast: type[Cast] = Cast) -> tuple[Cast, Trajectories]:
    """The golden batch: one prompt token, then three actions in the first row and two in the second."""
    trunk: Any = Numbered()
    named = {"q1": "q1", "q2": "q2", "target_q1": "target_q1", "target_q2": "target_q2", "value": "v"}
    roles = {"policy": Seat(trunk, None, None)} | {role: Seat(trunk, None, head(n)) for role, n in named.items()}
    tokens = nn.functional.pad(torch.tensor(CASE["actions"]), (1, 0), value=1)
    alive = torch.tensor(CASE["dones_not_terminal"]).bool()[:, :3]
    action = nn.functional.pad(alive, (1, 0))
    reward = nn.functional.pad(torch.tensor(CASE["rewards"]), (1, 0), value=-55.0)
    reward[~action] = float("nan")
    real = action.clone()
    real[:, 0] = True
    return cast(roles), Trajectories(tokens, real, action, reward)


def amounts(loss: Loss, batch: Tokens) -> dict[str, float]:
    """Each term as the step averages it, and all of them together."""
    counts = batch.counts()
    found = {name: float(t.total.detach()) / counts[t.per] for name, t in loss.terms.items()}
    return found | {"total": sum(found[name] * t.weight for name, t in loss.terms.items())}


SETTINGS = {"beta0": {}, "beta1": {"beta": 1}, "tau0p5_is_half_mse": {"tau": 0.5}, "single_q": {"two_qs": False}}


@pytest.mark.parametrize("name", SETTINGS)
def test_golden(name: str) -> None:
    cast, batch = golden()
    found = amounts(made(**SETTINGS[name]).loss(cast, batch), batch)
    expected = CASE["expected"][name]
    assert batch.counts()["tokens"] == expected["n"]
    for term in ("q", "v", "cql", "awac"):
        assert found[f"loss/{term}"] == pytest.approx(expected[f"loss_{term}"], abs=1e-5)
    assert found["total"] == pytest.approx(expected["total"], abs=1e-5)
    assert abs(found["loss/v"] - CASE["must_not"]["reduction_over_padded_actions_n6"]["loss_v"]) > 1e-3


def twin(change: Callable[[Acts], Acts]) -> type[Cast]:
    """A cast that gives something else than it should."""

    class Twin(Cast):
        def acts(self, *words: Any) -> Acts:
            return change(super().acts(*words))

    return Twin


TWINS: dict[str, Callable[[Acts], Acts]] = {
    "the last action bootstraps": lambda a: replace(a, after_N=torch.tensor([0.195, 0.062, -0.153, 0.334, -0.071])),
    "values are of the state after": lambda a: replace(a, value_N=a.value_N.roll(-1)),
    "no slow copies": lambda a: replace(a, target_HN=a.q_HN),
    "one of two": lambda a: replace(a, q_HN=a.q_HN[:1], total_HN=a.total_HN[:1]),
    "actions of the place before": lambda a: replace(a, q_HN=tuple(q_N.roll(1) for q_N in a.q_HN)),
}


@pytest.mark.parametrize("name", TWINS)
def test_the_golden_numbers_reject(name: str) -> None:
    cast, batch = golden(twin(TWINS[name]))
    found = amounts(made().loss(cast, batch), batch)
    assert abs(found["total"] - CASE["expected"]["beta0"]["total"]) > 1e-3


def test_gradients_are_the_golden_ones_and_the_slow_copies_get_none() -> None:
    cast, batch = golden()
    for parameter in cast.seat("target_q1").head.parameters():  # type: ignore[union-attr]
        parameter.requires_grad_(True)
    loss = made().loss(cast, batch)
    torch.stack([t.total * t.weight / 5 for t in loss.terms.values()]).sum().backward()
    layers = {role: next(iter(cast.seat(role).head.parameters())) for role in ("q1", "value", "target_q1")}  # type: ignore[union-attr]
    expected = torch.tensor(CASE["expected"]["grad_q1"]).flatten(0, 1)
    states = torch.tensor([0, 1, 2, 4, 5, 6])
    torch.testing.assert_close(layers["q1"].grad.T[states], expected, atol=1e-5, rtol=0)  # type: ignore[union-attr]
    value = next(p for n, p in cast.seat("value").head.named_parameters() if n.startswith("layers"))  # type: ignore[union-attr]
    torch.testing.assert_close(
        value.grad.T.reshape(2, 4),  # type: ignore[union-attr]
        torch.tensor(CASE["expected"]["grad_v"]),
        atol=1e-5,
        rtol=0,
    )
    assert layers["target_q1"].grad is None


def test_what_is_reported_has_a_meaning() -> None:
    cast, batch = golden()
    loss = made().loss(cast, batch)
    advantage = CASE["expected"]["beta0"]["advantage"]
    seen = {name: float(mean.total.detach()) / mean.count for name, mean in loss.metrics.items()}
    assert seen["qvalues/advantage"] == pytest.approx(sum([*advantage[0], *advantage[1][:2]]) / 5, abs=1e-5)
    assert seen["qvalues/mean"] - seen["values/mean"] == pytest.approx(seen["qvalues/advantage"], abs=1e-5)
    assert all(lookup(name) for name in (*seen, *loss.terms))


# --- a real trunk ----------------------------------------------------------------------------------------------------


def dialogue(*layouts: str) -> Trajectories:
    """Rows written as p (prompt, a user's turn), a (action) and . (padding); garbage where nothing is read."""
    draw = torch.Generator().manual_seed(3)
    width = max(map(len, layouts))
    signs = [row.ljust(width, ".") for row in layouts]
    action = torch.tensor([[c == "a" for c in row] for row in signs])
    real = torch.tensor([[c != "." for c in row] for row in signs])
    tokens = torch.randint(3, 255, action.shape, generator=draw)
    reward = torch.full(action.shape, float("nan")).masked_fill(action, 0.0)
    for b, row in enumerate(signs):
        reward[b, row.rindex("a")] = float(torch.randn((), generator=draw))
    return Trajectories(tokens, real, action, reward)


BATCH = ("ppaaapaapa", "pppaaaaa", "pa", "ppppaapppaa", "paaaaaaaaaaa", "paap")


def stirred(layout: str = "separate", roles: Sequence[str] = ROLES) -> Cast:
    """A cast whose slow copies are no copies any more."""
    cast = law.cast_for(tuple(roles), layout)
    torch.manual_seed(2)
    with torch.no_grad():
        for role in roles[1:]:
            for parameter in cast.seat(role).head.parameters():  # type: ignore[union-attr]
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return cast


@torch.no_grad()
def by_definition(cast: Cast, batch: Trajectories, s: ilql.Algorithm) -> dict[str, float]:
    """The four terms, token by token, from hidden states of rows without padding."""
    sums = dict.fromkeys(("q", "v", "cql", "awac"), 0.0)
    seats = cast.roles
    for b in range(batch.size):
        there = batch.real_BT[b]
        ids, acts, rewards = (x[b][there] for x in (batch.tokens_BT, batch.action_BT, batch.reward_BT))
        hidden = seats["policy"].trunk.hidden(ids[None], torch.ones_like(ids[None]).bool())[0]
        places = [t for t in range(len(ids)) if acts[t]]
        for n, t in enumerate(places):
            state, a = hidden[t - 1], int(ids[t])
            v = float(seats["value"].head(state))  # type: ignore[misc]
            after = float(seats["value"].head(hidden[places[n + 1] - 1])) if n + 1 < len(places) else 0.0  # type: ignore[misc]
            qs = [seats[q].head(state) for q in ("q1", "q2")]  # type: ignore[misc]
            least = min(float(seats[q].head(state)[a]) for q in ("target_q1", "target_q2"))  # type: ignore[misc]
            u = least - v
            sums["q"] += sum((float(q[a]) - float(rewards[t]) - s.gamma * after) ** 2 for q in qs)
            sums["v"] += (s.tau if u >= 0 else 1 - s.tau) * u * u
            sums["cql"] -= sum(float(q.log_softmax(-1)[a]) for q in qs)
            logp = seats["policy"].trunk.logits(state[None])[0, : seats["policy"].trunk.vocabulary].log_softmax(-1)
            sums["awac"] -= float(torch.tensor(s.beta * u).exp() * logp[a])
    count = float(batch.action_BT.sum())
    return {f"loss/{name}": total / count for name, total in sums.items()}


def test_dialogues_are_what_the_definition_says() -> None:
    """Several turns of actions in a row: what a user says in between is no action, and the return comes last."""
    cast, batch, algorithm = stirred(), dialogue(*BATCH), made(beta=0.7, tau=0.8, gamma=0.9)
    found = amounts(algorithm.loss(cast, batch), batch)
    for name, value in by_definition(cast, batch, algorithm).items():
        assert found[name] == pytest.approx(value, rel=2e-5), name


def test_a_conversation_becomes_its_turns_with_the_return_on_the_last_action() -> None:
    turns = tuple(Message(r, t) for r, t in (("user", "hot?"), ("assistant", "yes"), ("user", "salty?")))
    told = Rated(turns, completion=(Message("assistant", "no"),), rating=2.0)
    loaded = make(law.SIZES, law.TEXTS, 3)
    row = encode_returns([told], loaded.tokenizer, Encoding(turns="plain")).rows[0]
    said = [t for t, trained in zip(row.row.tokens, row.row.trained, strict=True) if trained]
    assert loaded.tokenizer.decode(said).replace(" ", "") == "yesno"
    batch = collate.trajectories([row], loaded.tokenizer.pad)
    last = int(batch.action_BT[0].nonzero()[-1])
    assert batch.reward_BT[0].nonzero().flatten().tolist() == [last]
    assert float(batch.reward_BT[0, last]) == 2.0


@pytest.mark.parametrize("layout", ["separate", "shared", "adapters", "hydra"])
def test_any_cut_any_padding_and_any_garbage_give_one_gradient(layout: str) -> None:
    cast, batch, algorithm = stirred(layout), dialogue(*BATCH), made(beta=0.5)
    whole = law.gradients(cast, batch, algorithm, batch.size)
    for size in (1, 4):
        assert law.distance(whole, law.gradients(cast, batch, algorithm, size)) < 1e-6
    wide = law.widened(law.spoiled(batch))
    assert law.distance(whole, law.gradients(cast, wide, algorithm, batch.size)) < 1e-6
    left = replace(
        batch,
        **{
            name: torch.stack([x.roll(int((~real).sum()), -1) for x, real in zip(tensor, batch.real_BT, strict=True)])
            for name, tensor in vars(batch).items()
        },
    )
    assert not bool(left.real_BT[2, 0])
    assert law.distance(whole, law.gradients(cast, left, algorithm, batch.size)) < 1e-6


@pytest.mark.parametrize(
    ("layout", "trained"),
    [
        ("separate", lambda name: True),
        ("shared", lambda name: True),
        ("adapters", lambda name: ".adapters.policy." in name),
        ("hydra", lambda name: "embed_tokens" not in name),
    ],
)
def test_every_term_reaches_the_one_trunk(layout: str, trained: Callable[[str], bool]) -> None:
    """As in trlX: Q, V and CQL shape the states that the policy speaks from."""
    cast, batch = stirred(layout), dialogue(*BATCH)
    algorithm = made()
    assert cast.trunks == [cast.seat("policy").trunk]
    trunk = {n: p for n, p in cast.parameters(algorithm.trains).items() if n.startswith("policy.")}
    assert trunk
    assert all(trained(name) for name in trunk)
    for term, part in algorithm.loss(cast, batch).terms.items():
        found = torch.autograd.grad(part.total, list(trunk.values()), retain_graph=True, allow_unused=True)
        assert sum(float(g.abs().sum()) for g in found if g is not None) > 0, term


def test_the_bootstrap_target_is_a_constant() -> None:
    """The value head learns nothing from the Q term."""
    cast, batch = stirred(), dialogue(*BATCH)
    value = [p for n, p in cast.parameters(("value",)).items() if ".head." in n]
    found = torch.autograd.grad(made().loss(cast, batch).terms["loss/q"].total, value, allow_unused=True)
    assert found == (None,) * len(value)


# --- the slow copies -------------------------------------------------------------------------------------------------


def test_the_slow_copies_move_by_alpha_every_so_many_steps_and_never_else() -> None:
    cast, algorithm = stirred(), made(alpha=0.25, steps_for_target_q_sync=3)
    moved: list[int] = []
    for step in range(1, 14):
        before = {n: p.clone() for n, p in cast.state((), algorithm.moves).items()}
        online = cast.state(("q1", "q2"))
        algorithm.after(cast, step)
        after = cast.state((), algorithm.moves)
        assert len(before) == 8
        changed = [n for n in before if not before[n].equal(after[n])]
        if changed:
            moved.append(step)
            assert len(changed) == 8
            for name in changed:
                expected = 0.75 * before[name] + 0.25 * online[name.removeprefix("target_")]
                torch.testing.assert_close(after[name], expected)
    assert moved == [3, 6, 9, 12]


# --- returns ---------------------------------------------------------------------------------------------------------


def rated(*ratings: float) -> list[RatedRow]:
    return [RatedRow(TokenRow([1, 2], [False, True]), rating) for rating in ratings]


def test_returns_are_standardised_over_the_data_set() -> None:
    case = CASE["expected"]["returns_standardised_example"]
    found = [row.rating for row in made().survey(rated(*case["returns"]))]
    assert found == pytest.approx(case["z"], abs=1e-9)
    plain = made(standardise_returns=False).survey(rated(*case["returns"]))
    assert [row.rating for row in plain] == case["returns"]


def test_held_out_returns_are_on_the_same_scale() -> None:
    """Few of them, all equal even: the scale is that of the data set."""
    rows, held = rated(*range(100)), rated(150, 150)
    found = made().survey(rows)
    (first, second) = _rows.held_like(held, rows, found, made().survey)  # type: ignore[arg-type]
    assert first.rating == second.rating == pytest.approx((150 - 49.5) / 29.0, rel=0.15)  # type: ignore[union-attr]
    plain = made(standardise_returns=False).survey
    assert _rows.held_like(held, rows, plain(rows), plain) is held  # type: ignore[arg-type]


@pytest.mark.parametrize("standardise", [True, False])
@pytest.mark.parametrize("ratings", [(2.5,), (2.5, 2.5, 2.5)])
def test_equal_returns_are_refused(standardise: bool, ratings: tuple[float, ...]) -> None:
    with pytest.raises(PalateError, match=r"returns: all \d are 2\.5, so no action is better .* Bring answers"):
        made(standardise_returns=standardise).survey(rated(*ratings))


# --- whole runs ------------------------------------------------------------------------------------------------------


def stage(model: Path, data: Path, **changes: Any) -> dict[str, Any]:
    algorithm = {"kind": "ilql", "alpha": 0.5, "steps_for_target_q_sync": 3, **changes.pop("algorithm", {})}
    found = tiny.sft(model, str(data), **changes)
    return {**found, "name": "ilql", "algorithm": algorithm}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and rated answers."""
    folder = tmp_path_factory.mktemp("ilql")
    rows = [{"prompt": p, "completion": " odd" * (1 + n % 3), "rating": n % 5} for n, p in enumerate(tiny.PROMPTS)]
    data = folder / "rated.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tiny.save_model(folder / "model"), data


def test_a_stopped_run_goes_on_with_its_slow_copies(tmp_path: Path, place: tuple[Path, Path]) -> None:
    """Stopped behind a step that is not one of a sync: the count goes on too."""
    rows = goes_on(tmp_path, ilql.Algorithm, stage(*place), 4)
    whole, again = (load_file(tmp_path / name / HEADS) for name in ("whole", "stopped"))
    assert len(rows) == 8
    assert tiny.equal(whole, again)
    assert {name.partition(".")[0] for name in whole} == {*ROLES} - {"policy"}
    assert not whole["q1.layers.2.weight"].equal(whole["target_q1.layers.2.weight"])


def test_a_run_syncs_as_often_as_its_optimiser_steps_say(
    tmp_path: Path, place: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epochs of three steps, two micro-batches each: syncs behind steps 3 and 6, by steps alone."""
    blended: list[tuple[str, str]] = []
    blend = Cast.blend
    monkeypatch.setattr(Cast, "blend", lambda self, a, b, share: blended.append((a, b)) or blend(self, a, b, share))
    split = {"path": str(place[1]), "held_out": 0.25}
    folder = tiny.run(tmp_path, {**stage(*place), "data": split, "num_train_epochs": 3, "max_steps": 8})
    assert tiny.lines(folder / "1-ilql" / "metrics.jsonl")[-1]["eval/loss/q"] > 0
    assert blended == [("q1", "target_q1"), ("q2", "target_q2")] * 2


@pytest.mark.parametrize("layout", ["shared", "adapters", "hydra"])
def test_from_rated_rows_to_steered_answers(tmp_path: Path, place: tuple[Path, Path], layout: str) -> None:
    """Trained, saved, loaded, steered; and evaluated over a list of betas beside a model without values."""
    model, data = place
    shape = {"kind": layout, "lora_rank": 4, "unfrozen_blocks": 1}
    trained = stage(model, data, layout=shape, max_steps=4, algorithm={"two_qs": layout != "hydra"})
    words = {"name": "look", "sampling": {"max_new_tokens": 4}, "rewards": {"vowels": _vowels()}}
    models = {"before": str(model), "after": "stage:ilql"}
    looked = {"kind": "evaluate", "models": models, "prompts": str(data), "steering": {"beta": [4, 0, 1]}, **words}
    folder = tiny.run(tmp_path, trained, looked)
    found = json.loads((folder / "2-look" / "evaluation.json").read_text())
    assert list(found["models"]) == ["before", "after beta 0", "after beta 1", "after beta 4"]
    assert found["baseline"] == "before"
    assert tiny.warnings(folder / "2-look") == ["before has learnt no values of its actions, so it answers unsteered"]
    distances = [found["models"][f"after beta {beta}"]["kl"]["mean"] for beta in (0, 1, 4)]
    assert len(set(distances)) == 3
    loaded = palate.load(folder / "1-ilql" / "model")
    plain, steered = (loaded.generate(tiny.PROMPTS, beta=beta, max_new_tokens=8) for beta in (0, 30))
    assert plain == loaded.generate(tiny.PROMPTS, max_new_tokens=8)
    assert steered != plain
    for bad, said in (("much", "steering.beta"), ([1, 2], "one at a time")):
        with pytest.raises(PalateError, match=said):
            loaded.generate(tiny.PROMPTS, beta=bad)  # type: ignore[arg-type]


def _vowels() -> dict[str, Any]:
    return {"kind": "function", "function": tiny.vowels}


def test_learning_goes_on_from_the_heads_that_were_left(tmp_path: Path, place: tuple[Path, Path]) -> None:
    """A second stage whose weights never move ends with the heads of the first, slow copies included."""
    still = {"learning_rate": 0.0}
    more = stage(Path("stage:ilql"), place[1], max_steps=1, optimiser=still)
    folder = tiny.run(tmp_path, stage(*place, max_steps=4), {**more, "name": "more"})
    first, second = (load_file(folder / name / "model/heads/heads.safetensors") for name in ("1-ilql", "2-more"))
    assert tiny.equal(first, second)


def test_check_knows_what_it_costs(tmp_path: Path, place: tuple[Path, Path]) -> None:
    recipe = tmp_path / "ilql.yaml"
    recipe.write_text(json.dumps({"name": "x", "output_dir": str(tmp_path / "runs"), "stages": [stage(*place)]}))
    found = check_recipe(recipe, [], True, lambda text: None)
    assert found.all_faults == ()
    seen = found.stages[0].seen
    assert seen.memory is not None
    heads = 4 * (32 * 64 + 64 + 64 * 280 + 280) + (32 * 64 + 64 + 64 + 1)
    assert sum(seen.memory.parameters.values()) > heads


def test_equal_returns_end_a_run_with_one_message(tmp_path: Path, place: tuple[Path, Path]) -> None:
    data = tmp_path / "equal.jsonl"
    data.write_text("".join(json.dumps({"prompt": p, "completion": " odd", "rating": 1}) + "\n" for p in tiny.PROMPTS))
    with pytest.raises(PalateError, match="returns: all 16 are 1, so no action is better than another"):
        tiny.run(tmp_path, stage(place[0], data))
