"""Random walks: short ways to a goal in a small directed graph, learnt from walks that know no goal.

The toy task of trlX (after Chen et al. 2021, Decision Transformer, figure 2): 21 nodes, an edge for every tenth
pair, node 0 the goal, walks of at most 10 nodes. A node is a letter, a to u, and one token; the start is the
prompt, the rest of the walk the answer, and the end token ends it. A walk is worth how close it is to the
shortest way, in [0, 1].

Every byte-level tokenizer that palate makes with `vocabulary: 259` gives one token per node; `write_model` leaves a
network that has the nodes and the end token alone.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from palate.randomness import generator, key
from palate.records import Demonstration, Prompt, Rated, Record, Unpaired, preference
from palate.settings import PalateError, Settings, nearest, parse
from palate.worlds.small import gpt2

__all__ = [
    "GOAL",
    "LETTERS",
    "LONGEST",
    "SHAPES",
    "Graph",
    "Walks",
    "graph",
    "legal_tokens",
    "optimality",
    "pool",
    "records",
    "score",
    "write_model",
]

LETTERS = "abcdefghijklmnopqrstu"
"""The 21 nodes; a, node 0, is the goal."""
GOAL, EDGE, LONGEST = 0, 0.1, 10
WORLD = 133
"""The graph that is meant when none is named: its walks score .36 on average, as those of the published toy do."""


@dataclass(frozen=True)
class Graph:
    """Which node may follow which, and how many nodes the shortest way to the goal has."""

    edge_NN: NDArray[np.bool_]
    """[i, j]: j may follow i. Nothing follows the goal, nothing follows itself, every other node leads somewhere."""
    shortest_N: tuple[float, ...]
    """Nodes of the shortest way, both ends counted: 1 for the goal, infinite where there is none."""


@lru_cache(maxsize=16)
def graph(world: int = WORLD) -> Graph:
    """Graph number `world`, drawn anew until every node leads somewhere."""
    nodes = len(LETTERS)
    rng = generator("random walks", "graph", world)
    while True:
        edge_NN = rng.random((nodes, nodes)) < EDGE
        np.fill_diagonal(edge_NN, False)
        if edge_NN.any(1).all():
            break
    edge_NN[GOAL] = False
    return Graph(edge_NN, _shortest(edge_NN))


def _shortest(edge_NN: NDArray[np.bool_]) -> tuple[float, ...]:
    """Breadth first from the goal, against the edges."""
    nodes_N = [math.inf] * len(edge_NN)
    nodes_N[GOAL] = 1
    waiting = deque([GOAL])
    while waiting:
        node = waiting.popleft()
        for before in np.flatnonzero(edge_NN[:, node]):
            if nodes_N[int(before)] == math.inf:
                nodes_N[int(before)] = nodes_N[node] + 1
                waiting.append(int(before))
    return tuple(nodes_N)


def optimality(prompt: str, completion: str, world: int = WORLD) -> float:
    """(10 − n) / (10 − n*) of a walk of n nodes to the goal where n* nodes are the fewest possible, in [0, 1].

    0 for a walk that never comes there or needs 10 nodes or more, takes a step that is no edge or names no node
    before it does, or says nothing; 0 too for one that begins at the goal, and where even the shortest way has 10
    nodes or more. What is said after the goal does not count.
    """
    place = graph(world)
    walk = prompt + completion
    if not walk or walk[0] not in LETTERS or walk[0] == LETTERS[GOAL]:
        return 0.0
    best = place.shortest_N[LETTERS.index(walk[0])]
    if best >= LONGEST:
        return 0.0
    for length, (here, there) in enumerate(pairwise(walk), 2):
        if there not in LETTERS or not place.edge_NN[LETTERS.index(here), LETTERS.index(there)]:
            return 0.0
        if there == LETTERS[GOAL]:
            return max(LONGEST - length, 0) / (LONGEST - best)
    return 0.0


def score(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """The optimality as a reward function. A column `world` names the graph of each row; the default without it."""
    worlds = columns.get("world") or [WORLD] * len(prompts)
    return [optimality(p, c, int(w)) for p, c, w in zip(prompts, completions, worlds, strict=True)]


def legal_tokens(node_N: Sequence[int], size: int, world: int = WORLD) -> NDArray[np.bool_]:
    """[i, j]: token j may follow token i, size×size, for decoding along edges only.

    `node_N` are the token ids of the nodes, in the order of `LETTERS`. No edge constrains what is not a node, so all
    is legal after such a token, and every token that is none (the end token) after a node.
    """
    legal_VV = np.ones((size, size), dtype=np.bool_)
    ids_N = np.array(node_N)
    legal_VV[np.ix_(ids_N, ids_N)] = graph(world).edge_NN
    return legal_VV


class Walks(Settings):
    """Which graph is walked, how much is known of it, and what counts as good."""

    world: int = Field(default=WORLD, ge=0)
    """Number of the graph."""
    walks: int = Field(default=1000, ge=2)
    """Walks there are in all; every shape of data is made of these."""
    best: float = Field(default=1.0, gt=0, le=1)
    """Demonstrations only: the share of the walks that is kept, those of the highest optimality."""
    threshold: float = Field(default=0.5, ge=0, le=1)
    """Labelled walks only: the least optimality that gets a thumb up."""


def records(shape: str, rows: int, seed: int, **options: object) -> list[Record]:
    """`rows` records of one shape, a pure function of the arguments; `options` are the fields of `Walks`.

    The first n rows of a longer call equal a call for n. Prompts are the 20 starts, over and over. Raises PalateError
    for an unknown shape or option, and for more rows than the walks give.
    """
    asked = parse(Walks, options, "world random_walks")
    if shape not in SHAPES:
        raise PalateError(
            f"world random_walks: there is no shape {shape!r}.{nearest(shape, SHAPES)} Known: {', '.join(SHAPES)}."
        )
    found = list(islice(SHAPES[shape](asked, seed), max(rows, 0)))
    if len(found) < rows:
        few = f"{asked.walks} walks give {len(found)} {shape}, {rows} were asked for"
        raise PalateError(f"world random_walks: {few}. Ask for fewer rows, or set options.walks higher.")
    return found


def pool(world: int, walks: int, seed: int) -> list[tuple[str, float]]:
    """The walks of one seed with their optimality. Each starts anywhere but at the goal and ends there or is cut."""
    return list(_pool(world, walks, seed))


@lru_cache(maxsize=8)
def _pool(world: int, walks: int, seed: int) -> tuple[tuple[str, float], ...]:
    edge_NN = graph(world).edge_NN
    found = [_walk(edge_NN, generator("random walks", "walk", world, seed, number)) for number in range(walks)]
    return tuple((walk, optimality(walk[0], walk[1:], world)) for walk in found)


def _walk(edge_NN: NDArray[np.bool_], rng: np.random.Generator) -> str:
    node = int(rng.integers(1, len(LETTERS)))
    walk = [node]
    while len(walk) < LONGEST and node != GOAL:
        node = int(rng.choice(np.flatnonzero(edge_NN[node])))
        walk.append(node)
    return "".join(LETTERS[n] for n in walk)


def _prompts(asked: Walks, seed: int) -> Iterator[Record]:
    starts = [letter for letter in LETTERS if letter != LETTERS[GOAL]]
    for row in count():
        yield Prompt(starts[row % len(starts)], {"world": asked.world})


def _demonstrations(asked: Walks, seed: int) -> Iterator[Record]:
    walks = _pool(asked.world, asked.walks, seed)
    by_worth = sorted(range(len(walks)), key=lambda number: -walks[number][1])
    for number in sorted(by_worth[: round(asked.best * len(walks))]):
        walk = walks[number][0]
        yield Demonstration(walk[0], {"world": asked.world}, completion=walk[1:])


def _rated(asked: Walks, seed: int) -> Iterator[Record]:
    for walk, worth in _pool(asked.world, asked.walks, seed):
        yield Rated(walk[0], {"world": asked.world}, completion=walk[1:], rating=worth)


def _labelled(asked: Walks, seed: int) -> Iterator[Record]:
    for walk, worth in _pool(asked.world, asked.walks, seed):
        yield Unpaired(walk[0], {"world": asked.world}, completion=walk[1:], label=worth >= asked.threshold)


def _pairs(asked: Walks, seed: int) -> Iterator[Record]:
    """Different pairs of walks with one start and unequal optimality, the better one chosen."""
    walks = _pool(asked.world, asked.walks, seed)
    by_start = {walk[0]: [w for w in walks if w[0][0] == walk[0]] for walk, _ in walks}
    seen = set[tuple[str, str]]()
    for row in range(100 * len(walks)):
        rng = generator("random walks", "pair", asked.world, seed, row)
        first = walks[int(rng.integers(len(walks)))]
        beside = by_start[first[0][0]]
        second = beside[int(rng.integers(len(beside)))]
        better, worse = sorted((first, second), key=lambda walk: -walk[1])
        if better[1] > worse[1] and (better[0], worse[0]) not in seen:
            seen.add((better[0], worse[0]))
            yield preference(better[0][0], better[0][1:], worse[0][1:], columns={"world": asked.world})


SHAPES: dict[str, Callable[[Walks, int], Iterator[Record]]] = {
    "prompts": _prompts,
    "demonstrations": _demonstrations,
    "pairs": _pairs,
    "rated": _rated,
    "labelled": _labelled,
    "thumbs": _labelled,
}
"""Every shape of data the world gives; `thumbs` is `labelled` as the tasting room calls it."""


def write_model(folder: Path | str, seed: int = 0, width: int = 64, layers: int = 2, heads: int = 4) -> Path:
    """A network that has walked nowhere, as a model folder: GPT-2's form, 21 letters and the end token.

    The same seed gives the same weights, as wide as torch draws them by itself: embeddings N(0, 1), so that nodes are
    far apart from the start, the rest 1/√(3·inputs). From embeddings of .08, what one walk teaches spills over to
    others: the same methods then end up to .2 lower (docs/why.md). Its tokenizer knows the letters and refuses
    everything else.
    """
    sizes = gpt2.Sizes(len(LETTERS) + 1, positions=16, width=width, layers=layers, heads=heads)
    random = torch.Generator().manual_seed(key("random walks", "weights", seed) >> 1)
    return gpt2.write(
        Path(folder),
        gpt2.draw(sizes, random, embedding=1.0, matrix=None, head=(3 * width) ** -0.5, gain=3**-0.5),
        sizes,
        LETTERS,
    )
