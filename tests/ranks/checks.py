"""What two ranks check together, each against a world of one in the same process; run by test_two_ranks.py.

    python tests/ranks/checks.py FOLDER         with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set

Every rank writes FOLDER/rank-R.json: the name of each check with "" or what went wrong.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from palate.algorithms import dpo, ilql, kto
from palate.batches import Examples, Experience, Labelled, Loss, Pairs, Rollouts, Scored, Tokens, Trajectories
from palate.cast import Cast, Seat
from palate.checkpoint import CheckpointStore
from palate.cutting import Microbatch
from palate.engines.engine import Sampling
from palate.engines.local import LocalEngine
from palate.engines.publication import fingerprints
from palate.models.load import load
from palate.models.lora import bare_state
from palate.models.make import make
from palate.models.save import Card, save
from palate.parallel import World, joined, local, whole
from palate.settings import NotFinite, PalateError
from palate.step import Average, Job, Optimiser, Stepper

HERE = Path(__file__).resolve().parent
STRATEGIES = {"replicate": ("replicate", False), "zero2": ("zero2", False), "zero3": ("zero3", False)}
STRATEGIES |= {"zero3-offload": ("zero3", True)}
LAYOUTS = {"sft": ("separate", "adapters"), "reward": ("separate", "adapters")}
LAYOUTS |= {"ppo": ("separate", "shared", "adapters", "hydra")}
TWO, ALL = Microbatch(rows=2), Microbatch()


def law() -> ModuleType:
    """The cases of the micro-batch law, which are also those of this one."""
    spec = importlib.util.spec_from_file_location("micro", HERE.parent / "laws" / "test_microbatch_law.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MICRO = law()


def close(a: Tensor, b: Tensor, slack: float = 1e-6) -> None:
    """Equal up to `slack` of the largest number."""
    assert a.shape == b.shape, (a.shape, b.shape)
    gap = float((a - b).abs().max()) if a.numel() else 0.0
    assert gap <= slack * max(1.0, float(b.abs().max()) if b.numel() else 0.0), gap


def spread(cast: Cast, world: World) -> Cast:
    """The same cast in another world."""
    cast.world = world
    cast.spread()
    return cast


def stepper(cast: Cast, algorithm: object, world: World, **more: object) -> Stepper:
    settings = Optimiser(learning_rate=1e-3, **more)  # type: ignore[arg-type]
    return Stepper(cast.parameters(algorithm.trains), settings, world)  # type: ignore[attr-defined]


def gradients_are_those_of_one_rank(world: World, case: str, layout: str) -> None:
    cast, batch, algorithm = getattr(MICRO, f"{case}_case")(layout)
    alone = stepper(cast, algorithm, World()).gradient(batch, lambda part: algorithm.loss(cast, part), ALL)
    assert alone
    spread(cast, world)
    mine = stepper(cast, algorithm, world)
    for most in (Microbatch(rows=1), TWO, ALL, Microbatch(tokens=12), Microbatch(tokens=1000), Microbatch(3, 25)):
        together = mine.gradient(batch, lambda part: algorithm.loss(cast, part), most)
        assert MICRO.distance(alone, together) < 1e-6, (most, MICRO.distance(alone, together))


def weights_after_steps_are_those_of_one_rank(world: World, case: str, layout: str) -> None:
    ends: list[tuple[dict[str, Tensor], list[dict[str, float]]]] = []
    for where in (World(), world):
        cast, batch, algorithm = getattr(MICRO, f"{case}_case")(layout)
        walker = stepper(spread(cast, where), algorithm, where, max_grad_norm=0.5)
        seen = [walker.step(batch, lambda part, c=cast, a=algorithm: a.loss(c, part), TWO, 1e-3) for _ in range(4)]
        ends.append(({name: whole(p).clone() for name, p in cast.state(algorithm.trains).items()}, seen))
    (alone, heard_alone), (together, heard) = ends
    assert alone.keys() == together.keys()
    for name in alone:
        close(together[name], alone[name])
    for one, two in zip(heard_alone, heard, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            assert abs(one[name] - two[name]) <= 2e-6 * max(1.0, abs(one[name])), (name, one[name], two[name])


def a_second_batch_an_average_and_a_moving_reference_are_those_of_one_rank(world: World, layout: str) -> None:
    """Texts learnt beside the answers, the policy's moving average, a reference that follows it."""
    texts, ends = Examples(*MICRO.rows(5, 14, 9, 4, 11)), list[dict[str, Tensor]]()
    for where in (World(), world):
        cast, batch, algorithm = MICRO.ppo_case(layout)
        spread(cast, where)
        average = Average(cast.parameters(("policy",)), 0.8)
        walker = Stepper(cast.parameters(algorithm.trains), Optimiser(), where, average=average)
        beside = Job(texts, lambda part, c=cast: MICRO.sft.Algorithm().loss(c, part), TWO)
        for _ in range(3):
            walker.step(batch, lambda part, c=cast, a=algorithm: a.loss(c, part), TWO, 1e-3, [beside])
            cast.blend("policy", "reference", 0.5)
        kept = {name: x.clone() for name, x in walker.state().items() if name.startswith("average/")}
        with walker.averaged():
            worn = {name: whole(p).clone() for name, p in cast.parameters(("policy",)).items()}
        assert all(kept[f"average/{name}"].equal(x) for name, x in worn.items())
        ends.append({**kept, **{n: whole(x).clone() for n, x in cast.state(algorithm.trains, ("reference",)).items()}})
    assert ends[0].keys() == ends[1].keys()
    for name, alone in ends[0].items():
        close(ends[1][name], alone)


def statistics_of_a_rollout_are_those_of_one_rank(world: World, layout: str) -> None:
    """Whitening, the KL that steers its coefficient, returns: the whole rollout's, on every rank."""
    cast = MICRO.cast_for(("policy", "reference", "value"), layout)
    cast.budget = 20
    tokens, real, action = MICRO.rows(5, 14, 9, 4, 11, 7, 8)
    noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(6))
    rollouts = Rollouts(tokens, real, action, -2 + 0.1 * noise, torch.ones(7).bool(), torch.arange(7), 0, 0.8)
    scored = Scored(rollouts, noise[:, 0], torch.zeros(tokens.shape), {}, {"kl_coef": 0.1})
    algorithm = MICRO.ppo.Algorithm(whiten_rewards=True, target_kl=0.1)
    found: list[Experience] = []
    for where in (World(), world):
        with torch.no_grad():
            found.append(algorithm.prepare(spread(cast, where), scored))
    alone, together = found
    assert together.memory["kl_coef"] != 0.1
    assert abs(alone.memory["kl_coef"] - together.memory["kl_coef"]) < 1e-9
    for name in ("advantage_BT", "returns_BT", "value_BT", "logp_BT"):
        close(getattr(together, name), getattr(alone, name), 1e-5)  # whitening divides rounding by a small deviation
    for name, value in alone.metrics.items():
        assert abs(value - together.metrics[name]) < 1e-5 * max(1.0, abs(value)), name


def a_term_of_the_whole_batch_is_that_of_one_rank(world: World) -> None:
    """A KL term as KTO has: each prompt with the *next* row's answer, over the whole batch, no gradient."""
    cast, batch, _ = MICRO.sft_case("separate")
    shifted = replace(batch, tokens_BT=batch.tokens_BT.roll(1, 0), real_BT=batch.real_BT.roll(1, 0))
    shifted = replace(shifted, action_BT=shifted.real_BT & batch.action_BT)

    def term(where: World) -> Tensor:
        cast.world = where
        with torch.no_grad():
            logp_BT = cast.chunked(shifted, lambda part: cast.logp("policy", part))
        return logp_BT.sum(-1).mean().clamp(min=-100)

    alone = term(World())
    spread(cast, world)
    close(term(world), alone)


def the_kl_term_of_thumbs_is_that_of_one_rank(world: World) -> None:
    """KTO's z, read by every rank for its share of the mixed rows, and the gradient behind it."""
    cast = MICRO.cast_for(("policy", "reference"), "separate")
    with torch.no_grad():  # the policy has left its reference, in the direction in which z is positive
        for parameter in cast.seat("reference").trunk.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    batch = Labelled(*MICRO.rows(5, 14, 9, 4, 11), torch.tensor([True, False, False, True, False]))
    found: list[tuple[float, dict[str, Tensor]]] = []
    for where in (World(), world):
        algorithm = kto.Algorithm()
        walker = stepper(spread(cast, where), algorithm, where)
        with torch.no_grad():
            ready = algorithm.prepare(cast, batch)
        found.append((ready.kl, walker.gradient(ready, lambda part, a=algorithm: a.loss(cast, part), TWO)))
    (alone, slope), (together, other) = found
    assert alone > 1e-3
    assert abs(alone - together) < 1e-5
    assert MICRO.distance(slope, other) < 1e-6


def values_of_actions_are_those_of_one_rank(world: World, layout: str) -> None:
    """Heads that are whole beside a trunk that may be sharded: weights and slow copies after steps and syncs."""
    algorithm = ilql.Algorithm(alpha=0.5, steps_for_target_q_sync=2)
    tokens, real, action = MICRO.rows(5, 14, 9, 4, 11)
    batch = Trajectories(tokens, real, action, torch.randn(tokens.shape, generator=torch.Generator().manual_seed(3)))
    ends: list[dict[str, Tensor]] = []
    for where in (World(), world):
        cast = spread(MICRO.cast_for((*algorithm.trains, *algorithm.moves), layout), where)
        walker = stepper(cast, algorithm, where)
        for step in range(1, 5):
            walker.step(batch, lambda part, c=cast: algorithm.loss(c, part), TWO, 1e-3)
            algorithm.after(cast, step)
        ends.append({n: whole(x).clone() for n, x in cast.state(algorithm.trains, algorithm.moves).items()})
    assert ends[0].keys() == ends[1].keys()
    for name, alone in ends[0].items():
        close(ends[1][name], alone, slack=5e-6)  # Adam divides by small gradients: rounding grows with each step


def pairs_compared_across_the_batch_are_those_of_one_rank(world: World) -> None:
    """Losses that sort the whole batch's log-ratios, or shift by their mean: each rank has the same partners."""
    cast = MICRO.cast_for(("policy", "reference"), "separate")
    with torch.no_grad():  # the policy has left its reference
        for parameter in cast.seat("reference").trunk.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    tokens, real, action = (x.unflatten(0, (5, 2)) for x in MICRO.rows(5, 14, 9, 4, 11, 7, 8, 10, 6, 12))
    raw = Pairs(tokens, real, action, torch.ones(5), torch.zeros(5), torch.zeros_like(action))
    algorithm = dpo.Algorithm(loss_type=("aot", "aot_unpaired", "bco_pair"))
    found: list[tuple[dpo.Judged, dict[str, Tensor]]] = []
    for where in (World(), world):
        walker = stepper(spread(cast, where), algorithm, where)
        with torch.no_grad():
            ready = algorithm.prepare(cast, raw)
        found.append((ready, walker.gradient(ready, lambda part: algorithm.loss(cast, part), TWO)))
    (alone, slope), (together, other) = found
    for name in ("margin", "chosen", "rejected"):
        close(together.partner_B[name], alone.partner_B[name], 1e-5)
    assert abs(alone.shift) > 1e-4
    assert abs(alone.shift - together.shift) < 1e-6
    assert MICRO.distance(slope, other) < 1e-6


def a_batch_smaller_than_the_world_is_no_special_case(world: World) -> None:
    cast, batch, algorithm = MICRO.sft_case("separate")
    one = batch.select(torch.tensor([2]))
    alone = stepper(cast, algorithm, World()).gradient(one, lambda part: algorithm.loss(cast, part), ALL)
    spread(cast, world)
    together = stepper(cast, algorithm, world).gradient(one, lambda part: algorithm.loss(cast, part), ALL)
    assert MICRO.distance(alone, together) < 1e-6


def answers_are_those_of_one_rank(world: World) -> None:
    loaded = make(MICRO.SIZES, MICRO.TEXTS, 3)
    prompts, keys = [[5 + i % 4] * (1 + i % 5) for i in range(11)], list(range(100, 122))
    settings = Sampling(max_new_tokens=9, temperature=0.9)
    alone = LocalEngine(loaded.trunk, loaded.tokenizer, settings, batch_size=4).generate(prompts, keys)
    cast = spread(Cast({"policy": Seat(loaded.trunk, None, None)}), world)
    engine = LocalEngine(cast.seat("policy").trunk, loaded.tokenizer, settings, batch_size=4, world=world)
    together = engine.generate(prompts, keys)
    assert together.tokens_BT.equal(alone.tokens_BT)
    assert together.finished_B.equal(alone.finished_B)
    close(together.logp_BT, alone.logp_BT, 1e-5)


def a_checkpoint_goes_on_anywhere(world: World, folder: Path) -> None:
    """Steps in this world, saved, go on in a world of one, and the other way round: the same end."""

    def walk(cast: Cast, algorithm: object, walker: Stepper, batch: Examples, steps: int) -> None:
        for _ in range(steps):
            walker.step(batch, lambda part: algorithm.loss(cast, part), TWO, 1e-3)  # type: ignore[attr-defined]

    def begin(where: World) -> tuple[Cast, Examples, object, Stepper]:
        cast, batch, algorithm = MICRO.sft_case("adapters")
        return spread(cast, where), batch, algorithm, stepper(cast, algorithm, where)

    cast, batch, algorithm, walker = begin(World())
    walk(cast, algorithm, walker, batch, 5)
    straight = {name: p.clone() for name, p in cast.state(algorithm.trains).items()}
    for number, (first, then) in enumerate([(world, World()), (World(), world)]):
        cast, batch, algorithm, walker = begin(first)
        walk(cast, algorithm, walker, batch, 2)
        tensors = {f"m/{n}": whole(x) for n, x in cast.state(algorithm.trains).items()}
        tensors |= {f"o/{n}": x for n, x in walker.state().items()}
        store = CheckpointStore(folder / f"{world.strategy}-{world.offload}-{number}")
        world.first(lambda store=store, tensors=tensors: store.save(2, tensors, {}) and None)
        found = store.newest(2)
        assert found is not None
        cast, batch, algorithm, walker = begin(then)
        cast.restore({n.removeprefix("m/"): x for n, x in found[1].items() if n.startswith("m/")})
        walker.restore({n.removeprefix("o/"): x for n, x in found[1].items() if n.startswith("o/")})
        walk(cast, algorithm, walker, batch, 3)
        for name, tensor in cast.state(algorithm.trains).items():
            close(whole(tensor), straight[name])


def a_model_is_saved_whole(world: World, folder: Path) -> None:
    loaded = make(MICRO.SIZES, MICRO.TEXTS, 3)
    plain = {name: x.clone() for name, x in bare_state(loaded.trunk.model).items()}
    cast = spread(Cast({"policy": Seat(loaded.trunk, None, None)}), world)
    assert fingerprints(bare_state(loaded.trunk.model)) == fingerprints(plain)
    home = folder / f"model-{world.strategy}-{world.offload}"
    save(home, cast.seat("policy").trunk, loaded.tokenizer, Card("m", "nothing"), world=world)
    again = bare_state(load(home).trunk.model)
    assert again.keys() == plain.keys()
    assert all(again[name].equal(plain[name]) for name in plain)


def a_step_that_is_nan_on_one_rank_is_taken_on_none(world: World) -> None:
    cast, batch, algorithm = MICRO.sft_case("separate")
    spread(cast, world)
    walker = stepper(cast, algorithm, world)
    before = {name: whole(p).clone() for name, p in cast.state(algorithm.trains).items()}

    def loss(part: Examples) -> Loss:
        found = algorithm.loss(cast, part)
        broken = float("nan") if world.rank == 1 else 1.0
        terms = {name: replace(term, total=term.total * broken) for name, term in found.terms.items()}
        return replace(found, terms=terms)

    try:
        walker.step(batch, loss, TWO, 1e-3)
    except NotFinite:
        pass
    else:
        raise AssertionError("a step that was nan on rank 1 was taken")
    assert all(whole(p).equal(before[name]) for name, p in cast.state(algorithm.trains).items())
    walker.step(batch, lambda part: algorithm.loss(cast, part), TWO, 1e-3)


def weights_are_spread(world: World) -> None:
    """zero3 leaves about half of every trunk's weights on each of two ranks; zero2 of what trains; replicate none."""
    cast = MICRO.cast_for(("policy", "reference", "value"), "separate")
    spread(cast, world)
    for role, trains in (("policy", True), ("reference", False)):
        weights = list(cast.seat(role).trunk.parameters())
        share = sum(local(p).numel() for p in weights) / sum(p.numel() for p in weights)
        halved = world.strategy == "zero3" or (world.strategy == "zero2" and trains)
        assert 0.45 < share < 0.55 if halved else share == 1.0, (role, share)


def faults_are_heard_by_every_rank(world: World) -> None:
    def refuse() -> None:
        raise PalateError("no")

    for raised in (lambda: world.first(refuse), lambda: _on_rank_one(world)):
        try:
            raised()
        except PalateError:
            continue
        raise AssertionError("a rank went on")
    assert world.first(lambda: {"made": "once", "by": world.rank}) == {"made": "once", "by": 0}
    assert world.gather([world.rank] * (2 - world.rank)) == [0, 1, 0]
    assert world.any(world.rank == 1)


def _on_rank_one(world: World) -> None:
    with world.together(NotFinite):
        if world.rank == 1:
            raise NotFinite("here")


def rows_come_together_in_their_order(world: World) -> None:
    every = Tokens(torch.arange(7)[:, None], torch.ones(7, 1).bool(), torch.ones(7, 1).bool())
    cast = Cast({}, world)
    for cast.budget in (1, 2, 3, 64):
        found = cast.chunked(every, lambda part: part.tokens_BT * 2.0)
        assert found.equal(every.tokens_BT * 2.0), cast.budget


def gradients_that_are_averaged_are_noticed(world: World) -> None:
    """The bug that the gradient check is there for: ranks that average instead of adding."""

    class Averaging(World):
        def sum_gradients(self, parameters: object) -> None:
            listed = list(parameters)  # type: ignore[call-overload]
            super().sum_gradients(listed)
            for parameter in listed:
                if parameter.grad is not None:
                    parameter.grad /= self.size

    cast, batch, algorithm = MICRO.sft_case("separate")
    alone = stepper(cast, algorithm, World()).gradient(batch, lambda part: algorithm.loss(cast, part), ALL)
    wrong = Averaging(world.rank, world.size, store=world.store)
    together = stepper(cast, algorithm, wrong).gradient(batch, lambda part: algorithm.loss(cast, part), ALL)
    assert MICRO.distance(alone, together) > 0.1


def checks(folder: Path) -> Iterator[tuple[str, Callable[[World], None]]]:
    """Every check by its name; each takes the world of its strategy."""
    for strategy, case in itertools.product(STRATEGIES, LAYOUTS):
        for layout in LAYOUTS[case]:
            name = f"{strategy}: {case}, {layout}"
            yield f"{name}: gradients", lambda w, c=case, x=layout: gradients_are_those_of_one_rank(w, c, x)
            yield f"{name}: steps", lambda w, c=case, x=layout: weights_after_steps_are_those_of_one_rank(w, c, x)
    for strategy in STRATEGIES:
        for layout in ("separate", "hydra"):
            name = f"{strategy}: a second batch, an average, a moving reference, {layout}"
            yield (
                name,
                lambda w, x=layout: a_second_batch_an_average_and_a_moving_reference_are_those_of_one_rank(w, x),
            )
        for layout in LAYOUTS["ppo"]:
            name = f"{strategy}: statistics of a rollout, {layout}"
            yield name, lambda w, x=layout: statistics_of_a_rollout_are_those_of_one_rank(w, x)
        yield f"{strategy}: a term of the whole batch", a_term_of_the_whole_batch_is_that_of_one_rank
        yield f"{strategy}: the KL term of thumbs", the_kl_term_of_thumbs_is_that_of_one_rank
        for layout in ("separate", "adapters"):
            name = f"{strategy}: values of actions, {layout}"
            yield name, lambda w, x=layout: values_of_actions_are_those_of_one_rank(w, x)
        yield f"{strategy}: pairs across the batch", pairs_compared_across_the_batch_are_those_of_one_rank
        yield f"{strategy}: shares", weights_are_spread
        yield f"{strategy}: one row", a_batch_smaller_than_the_world_is_no_special_case
        yield f"{strategy}: answers", answers_are_those_of_one_rank
        yield f"{strategy}: checkpoints", lambda w: a_checkpoint_goes_on_anywhere(w, folder)
        yield f"{strategy}: models", lambda w: a_model_is_saved_whole(w, folder)
        yield f"{strategy}: nan on one rank", a_step_that_is_nan_on_one_rank_is_taken_on_none
    yield "replicate: faults", faults_are_heard_by_every_rank
    yield "replicate: rows in order", rows_come_together_in_their_order
    yield "replicate: averaging is noticed", gradients_that_are_averaged_are_noticed


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    said: dict[str, str] = {}
    with joined() as base:
        for name, check in checks(folder):
            strategy, offload = STRATEGIES[name.partition(":")[0]]
            try:
                check(World(base.rank, base.size, strategy, offload, base.store))
                said[name] = ""
            except Exception:  # whatever went wrong is the result of the check
                said[name] = traceback.format_exc()
            (folder / f"rank-{base.rank}.json").write_text(json.dumps(said))
            if base.any(bool(said[name])):  # a rank that failed may be out of step with the others
                said[name] = said[name] or "the other rank failed"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    # The verdicts are written. Threads of the process group that are still about would now and then abort the
    # interpreter on its way out; how a real run ends is tested with the command line itself.
    os._exit(0)
