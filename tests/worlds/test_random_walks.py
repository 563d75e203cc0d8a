"""The random walks: a graph as stated, a score without trlX's two faults, data that are what they claim."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palate.catalogue import listing
from palate.data.encode import Encoding, encode_demonstrations
from palate.data.source import Data, load
from palate.models.load import load as load_model
from palate.models.make import Make, make
from palate.records import Demonstration, Prompt, Ranking, Rated, Unpaired
from palate.settings import PalateError
from palate.worlds import random_walks as world
from palate.worlds.random_walks import LETTERS, WORLD

NODES = range(len(LETTERS))


def fewest(edge_NN: np.ndarray) -> list[float]:
    """Nodes of the shortest way to node 0 by powers of the matrix, not by breadth first."""
    found = [float("inf")] * len(edge_NN)
    ways_NN = np.eye(len(edge_NN), dtype=int)
    for steps in range(len(edge_NN)):
        for node in NODES:
            if ways_NN[node, 0] and found[node] == float("inf"):
                found[node] = steps + 1
        ways_NN = (ways_NN @ edge_NN > 0).astype(int)
    return found


def worth(walk: str, number: int, start_of: Callable[[int], int] = lambda node: node) -> float:
    """The published metric the slow way, its two faults mended. `start_of` puts the first one back."""
    edge_NN = world.graph(number).edge_NN
    nodes = [LETTERS.find(letter) for letter in walk]
    if not nodes or nodes[0] <= 0:
        return 0.0
    best = fewest(edge_NN)[start_of(nodes[0])]
    goal = nodes.index(0) if 0 in nodes else 99
    legal = all(a >= 0 and b >= 0 and edge_NN[a, b] for a, b in pairwise(nodes[: goal + 1]))
    if not legal or goal + 1 >= 10 or best >= 10:
        return 0.0
    return (10 - (goal + 1)) / (10 - best)


# the graph -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [WORLD, 0, 3, 14])
def test_the_graph_is_as_stated(number: int):
    place = world.graph(number)
    assert place.edge_NN.shape == (21, 21)
    assert not place.edge_NN.diagonal().any()
    assert not place.edge_NN[0].any()
    assert place.edge_NN[1:].any(1).all()
    assert list(place.shortest_N) == fewest(place.edge_NN)


def test_another_number_is_another_graph():
    assert not np.array_equal(world.graph(1).edge_NN, world.graph(2).edge_NN)
    shares = [world.graph(number).edge_NN[1:].mean() for number in range(200)]
    assert np.mean(shares) == pytest.approx(0.1, abs=0.02)  # a little more, for a node without an edge is refused


def test_every_start_of_the_usual_graph_leads_to_the_goal():
    assert all(2 <= nodes <= 9 for nodes in world.graph().shortest_N[1:])


# the score -------------------------------------------------------------------------------------------


def shortest_way(start: int, number: int = WORLD) -> str:
    place, walk = world.graph(number), [start]
    while walk[-1] != 0:
        ahead = [int(n) for n in np.flatnonzero(place.edge_NN[walk[-1]])]
        walk.append(min(ahead, key=lambda node: place.shortest_N[node]))
    return "".join(LETTERS[node] for node in walk)


@pytest.mark.parametrize("start", list(NODES)[1:])
def test_the_shortest_way_is_worth_one(start: int):
    way = shortest_way(start)
    assert world.optimality(way[0], way[1:]) == 1.0
    assert world.optimality(way[0], way[1:-1]) == 0.0  # stops before the goal
    assert world.optimality(way[0], way[1:] + "zz") == 1.0  # what is said after it does not count
    assert world.optimality(way, "") == 1.0


def test_a_walk_that_begins_at_the_goal_is_worth_nothing():
    assert world.optimality("a", "") == world.optimality("a", "bcd") == world.optimality("", "a") == 0.0


def test_a_start_whose_best_way_is_the_longest_is_worth_nothing():
    for number, nodes in ((14, 10.0), (3, float("inf"))):
        far = [node for node in NODES if world.graph(number).shortest_N[node] == nodes]
        assert far, "this graph was chosen for such a start"
        for node in far:
            way = shortest_way(node, number) if nodes == 10.0 else LETTERS[node]
            assert world.optimality(way[0], way[1:], number) == 0.0


def test_what_is_no_walk_is_worth_nothing():
    way = shortest_way(5)
    stranger = next(LETTERS[n] for n in NODES if not world.graph().edge_NN[5, n] and n)
    for prompt, completion in (
        ("", ""),
        ("f", ""),
        ("f", "?" + way[1:]),
        ("f", stranger + way[1:]),
        ("?", "a"),
        ("F", "a"),
    ):
        assert world.optimality(prompt, completion) == 0.0


def test_ten_nodes_are_too_many():
    """Every walk the graph allows from one start: its worth falls with its length and is 0 from ten nodes on."""
    edge_NN, found = world.graph().edge_NN, dict[int, set[float]]()
    walks = [[5]]
    for _ in range(10):
        walks = [[*w, int(n)] for w in walks for n in np.flatnonzero(edge_NN[w[-1]])][:4000]
        for walk in (w for w in walks if w[-1] == 0):
            text = "".join(LETTERS[n] for n in walk)
            found.setdefault(len(walk), set()).add(world.optimality(text[0], text[1:]))
    best = world.graph().shortest_N[5]
    assert found == {n: {max(10 - n, 0) / (10 - best)} for n in found}
    assert max(found) > 10


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=LETTERS[:7] + "z", max_size=11), st.sampled_from([0, 3, 14, WORLD]))
def test_any_text_is_worth_what_the_slow_way_says(text: str, number: int):
    assert world.optimality(text[:1], text[1:], number) == worth(text, number)


def test_the_published_fault_is_seen():
    """Reading the entry of the node before, as the published metric did, gives other numbers on the same walks."""
    walks = [walk for walk, _ in world.pool(WORLD, 100, 0)]
    scores = world.score([w[0] for w in walks], [w[1:] for w in walks])
    assert scores == [worth(w, WORLD) for w in walks]
    assert scores != [worth(w, WORLD, lambda node: node - 1) for w in walks]


def test_the_column_names_the_graph():
    way = shortest_way(5, 1)
    assert world.score([way[0]] * 2, [way[1:]] * 2, world=[1, WORLD])[0] == 1.0
    assert world.score([way[0]], [way[1:]]) == [worth(way, WORLD)]


# the walks -------------------------------------------------------------------------------------------


def test_the_walks_are_those_of_the_published_toy():
    """Mean score .358 and 20 starts there; legal, never from the goal, ended there or after ten nodes."""
    pools = [world.pool(WORLD, 1000, seed) for seed in range(6)]
    assert np.mean([s for walks in pools for _, s in walks]) == pytest.approx(0.358, abs=0.01)
    walks, edge_NN = pools[0], world.graph().edge_NN
    assert len({walk[0] for walk, _ in walks}) == 20
    for walk, _ in walks:
        nodes = [LETTERS.index(letter) for letter in walk]
        assert all(edge_NN[a, b] for a, b in pairwise(nodes))
        assert 0 not in nodes[:-1]
        assert len(nodes) == 10 or nodes[-1] == 0
    starts = Counter(walk[0] for walk, _ in walks)
    assert min(starts.values()) > 25
    assert max(starts.values()) < 80


def test_walks_depend_on_nothing_but_their_number():
    assert world.pool(WORLD, 50, 3) == world.pool(WORLD, 1000, 3)[:50] != world.pool(WORLD, 50, 4)


# the data --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", world.SHAPES)
def test_a_longer_call_begins_as_a_shorter_one(shape: str):
    assert world.records(shape, 30, 0) == world.records(shape, 200, 0)[:30]
    if shape != "prompts":
        assert world.records(shape, 30, 0) != world.records(shape, 30, 1)


def test_pairs_share_their_start_and_the_better_is_chosen():
    pairs = world.records("pairs", 2022, 0)
    for pair in pairs:
        assert isinstance(pair, Ranking)
        chosen, rejected = (world.optimality(str(pair.prompt), str(c)) for c in pair.completions)
        assert chosen > rejected
        assert pair.ranks == (0, 1)
    assert len({(p.prompt, p.completions) for p in pairs if isinstance(p, Ranking)}) == 2022
    assert {p.prompt for p in pairs} == set(LETTERS[1:])


def test_rated_and_labelled_walks_say_what_the_score_says():
    for rated, labelled in zip(world.records("rated", 300, 0), world.records("labelled", 300, 0), strict=True):
        assert isinstance(rated, Rated)
        assert isinstance(labelled, Unpaired)
        assert rated.completion == labelled.completion
        assert rated.rating == world.optimality(str(rated.prompt), str(rated.completion))
        assert labelled.label == (rated.rating >= 0.5)
    up = [r.label for r in world.records("labelled", 300, 0, threshold=0.9) if isinstance(r, Unpaired)]
    assert 0 < sum(up) < 100


def test_the_best_share_is_the_best():
    kept = world.records("demonstrations", 300, 0, best=0.3)
    scores = sorted((s for _, s in world.pool(WORLD, 1000, 0)), reverse=True)[:300]
    worths = [world.optimality(str(d.prompt), str(d.completion)) for d in kept if isinstance(d, Demonstration)]
    assert sorted(worths, reverse=True) == scores
    assert np.mean(worths) > 0.9
    with pytest.raises(PalateError, match=r"1000 walks give 300 demonstrations, 301 were asked for.*Ask for fewer"):
        world.records("demonstrations", 301, 0, best=0.3)


def test_prompts_are_the_twenty_starts_over_and_over():
    prompts = world.records("prompts", 45, 0)
    assert [p.prompt for p in prompts[:20]] == list(LETTERS[1:])
    assert prompts[20:40] == prompts[:20]
    assert all(type(p) is Prompt and p.columns == {"world": WORLD} for p in prompts)


def test_a_wrong_word_is_told_with_the_right_one():
    with pytest.raises(PalateError, match=r"no shape 'pair'.*Did you mean 'pairs'"):
        world.records("pair", 3, 0)
    with pytest.raises(PalateError, match=r"no setting 'wolrd'.*Did you mean 'world'"):
        world.records("pairs", 3, 0, wolrd=3)


def test_the_library_finds_the_world():
    assert "short ways to a goal" in listing("worlds")["random_walks"]
    for shape in world.SHAPES:
        assert len(load(Data(path=f"world:random_walks/{shape}", rows=40, shuffle=False), 0)) == 40
    best = load(Data(path="world:random_walks/demonstrations", rows=30, options={"best": 0.03}), 0)
    assert (
        np.mean([world.optimality(str(d.prompt), str(d.completion)) for d in best if isinstance(d, Demonstration)]) == 1
    )


# tokens ----------------------------------------------------------------------------------------------


def test_every_node_is_one_token(tmp_path: Path):
    written = load_model(world.write_model(tmp_path / "model", width=16, heads=2))
    letters = written.tokenizer
    assert letters.encode(LETTERS) == list(NODES)
    assert letters.eos == 21
    assert letters.size == 22
    assert letters.decode([3, 1, 0, 21]) == "dba"
    walks = world.records("demonstrations", 200, 0)
    for row, walk in zip(encode_demonstrations(walks, letters, Encoding(), 16).rows, walks, strict=True):
        assert isinstance(walk, Demonstration)
        assert row.tokens == [LETTERS.index(c) for c in f"{walk.prompt}{walk.completion}"] + [21]
        assert row.trained == [False] + [True] * (len(str(walk.completion)) + 1)
    made = make(Make(hidden_size=8, layers=1, heads=1, vocabulary=259), [LETTERS], 0).tokenizer
    assert len({*made.encode(LETTERS)}) == len(made.encode(LETTERS)) == 21


def test_the_same_seed_writes_the_same_network(tmp_path: Path):
    def weights(name: str, seed: int) -> torch.Tensor:
        return load_model(world.write_model(tmp_path / name, seed, 16, 1, 2)).trunk.model.lm_head.weight.detach()

    assert torch.equal(weights("a", 1), weights("b", 1))
    assert not torch.equal(weights("a", 1), weights("c", 2))


def test_legal_tokens_are_the_edges():
    ids = [40 - node for node in NODES]
    legal_VV = world.legal_tokens(ids, 50)
    edge_NN = world.graph().edge_NN
    assert all(legal_VV[ids[a], ids[b]] == edge_NN[a, b] for a, b in product(NODES, NODES))
    assert legal_VV[45].all()
    assert legal_VV[:, 45].all()
    assert legal_VV.shape == (50, 50)
