"""The stories reward model beside a bag of words, on the same held-out sentences by the same two measures.

    python recipes/stories/floor.py REWARD_MODEL_FOLDER [PREPARED_FOLDER]

Pairs: how often a positive sentence gets more than the negative one it is set against. Labels: how often a sentence
lies on its side of a threshold, which is the one that serves the training sentences best. The bag of words is a
logistic regression on which words occur; its weight decay is chosen on the held-out sentences themselves, which
flatters it a little.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

from palate.cast import Cast, Seat
from palate.data.collate import examples
from palate.data.encode import Encoding, encode_demonstrations
from palate.data.source import Data, load
from palate.evaluation.statistics import wilson
from palate.models.load import load as load_model
from palate.records import Demonstration

DECAYS = (1e-5, 4e-5, 1.6e-4, 6.4e-4)
SEED = 1


def sentences(path: Path) -> tuple[list[str], Tensor]:
    """Texts and labels (0 or 1)."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row["text"] for row in rows], torch.tensor([float(row["label"]) for row in rows])


def bags(texts: list[str], places: dict[str, int]) -> Tensor:
    """1 where a word of the training sentences occurs."""
    bag_NW = torch.zeros(len(texts), len(places))
    for row, text in enumerate(texts):
        bag_NW[row, [places[word] for word in _words(text) if word in places]] = 1.0
    return bag_NW


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+|[!?]", text.lower())


def regression(bag_NW: Tensor, label_N: Tensor, decay: float) -> Tensor:
    """Weights of a logistic regression, found to convergence."""
    weight_W = torch.zeros(bag_NW.shape[1], requires_grad=True)
    search = torch.optim.LBFGS([weight_W], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        error = torch.nn.functional.binary_cross_entropy_with_logits(bag_NW @ weight_W, label_N)
        total = error + decay * weight_W.square().sum()
        total.backward()
        return total

    search.step(loss)
    return weight_W.detach()


@torch.no_grad()
def model_scores(folder: str, texts: list[str]) -> Tensor:
    """What the reward model gives each text."""
    loaded = load_model(folder, "reward")
    records = [Demonstration("", completion=text) for text in texts]
    rows = encode_demonstrations(records, loaded.tokenizer, Encoding(max_length=64)).rows
    cast = Cast({"reward": Seat(loaded.trunk, None, loaded.head)})
    parts = [examples(rows[i : i + 64], loaded.tokenizer.pad) for i in range(0, len(rows), 64)]
    return torch.cat([cast.scores("reward", part) for part in parts])


def threshold(score_N: Tensor, label_N: Tensor) -> float:
    """The score above which calling a sentence positive is right most often."""
    order = score_N.argsort()
    below = torch.cumsum(1 - 2 * label_N[order], 0)  # right minus wrong among those called negative
    return float(score_N[order][below.argmax()])


def report(
    name: str, known_N: Tensor, label_N: Tensor, held: dict[str, float], held_label_N: Tensor, val: Path
) -> None:
    """One line for a scorer: pairs and labels right, with Wilson's intervals."""
    cut = threshold(known_N, label_N)
    scores = list(held.values())
    right = sum((score > cut) == bool(label) for score, label in zip(scores, held_label_N.tolist(), strict=True))
    data = Data(path=str(val), format="labelled_text", pair_labels=True)
    wins = [held[str(p.completions[0])] > held[str(p.completions[1])] for p in load(data, SEED, "all")]
    for what, found in (("pairs", wilson(sum(wins), len(wins))), ("labels", wilson(right, len(scores)))):
        print(f"{name:24} {what:7} {found.estimate:.3f} ({found.low:.3f} to {found.high:.3f})")


def main(folder: str, prepared: Path) -> None:
    """Both scorers, one line for each measure."""
    val = prepared / "tomatoes_val.jsonl"
    (texts, label_N), (held, held_label_N) = sentences(prepared / "tomatoes_train.jsonl"), sentences(val)
    places = {word: i for i, word in enumerate(dict.fromkeys(w for text in texts for w in _words(text)))}
    bag_NW, held_NW = bags(texts, places), bags(held, places)
    found = [regression(bag_NW, label_N, decay) for decay in DECAYS]
    best_W = max(found, key=lambda w: float(((held_NW @ w > 0) == (held_label_N > 0)).float().mean()))
    words = dict(zip(held, (held_NW @ best_W).tolist(), strict=True))
    report("bag of words", bag_NW @ best_W, label_N, words, held_label_N, val)
    ours = dict(zip(held, model_scores(folder, held).tolist(), strict=True))
    report("reward model", model_scores(folder, texts), label_N, ours, held_label_N, val)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "build/stories"))
