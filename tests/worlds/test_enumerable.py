"""The enumerable world: its published numbers, its network as other software reads it, its data and their laws."""

from __future__ import annotations

import math
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from palate.catalogue import listing
from palate.data.encode import Encoding
from palate.data.encode_pairs import encode_labels, encode_pairs
from palate.data.source import Data, load
from palate.models.load import load as load_model
from palate.records import Demonstration, Ranking, Rated, Unpaired, text_of
from palate.settings import PalateError
from palate.worlds import enumerable
from palate.worlds.small import gpt2, law, tree

BETAS = (0.1, 0.5)


@pytest.fixture(scope="module")
def world() -> enumerable.World:
    return enumerable.world(1)


def rounded(values: Tensor, digits: int = 2) -> list[float]:
    return [round(float(v), digits) for v in values]


# the tree --------------------------------------------------------------------------------------------


def test_every_answer_is_listed_once():
    assert len(tree.ANSWERS) == len(set(tree.ANSWERS)) == 1555
    assert Counter(len(a) for a in tree.ANSWERS if a[-1] == 6) == {1: 1, 2: 6, 3: 36, 4: 216}
    assert sum(6 not in a for a in tree.ANSWERS) == 1296
    assert tree.STATES == 259
    assert tree.ROW_RT.shape == (864, 4)


def any_table(seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    logits_PSV = torch.randn(4, tree.STATES, tree.SYMBOLS, generator=random, dtype=torch.float64)
    return logits_PSV.log_softmax(-1)


def test_a_table_is_a_law_of_answers():
    """Against the product of next-token probabilities written as a walk through each answer."""
    table_PSV = any_table()
    logp_PK = tree.answer_logp(table_PSV)
    assert torch.allclose(logp_PK.exp().sum(-1), torch.ones(4, dtype=torch.float64), atol=1e-12)
    for answer in [(6,), (3, 6), (5, 0, 6), (1, 2, 3, 6), (0, 0, 0, 0), (5, 4, 3, 2)]:
        expected = sum(table_PSV[2, tree.state_of(answer[:t]), s] for t, s in enumerate(answer))
        assert torch.isclose(logp_PK[2, tree.NUMBER_OF[answer]], torch.as_tensor(expected), atol=1e-13)


def test_a_law_of_answers_is_one_table():
    table_PSV = any_table()
    again_PSV = tree.table_of(tree.answer_logp(table_PSV))
    assert torch.allclose(again_PSV, table_PSV, atol=1e-10)
    sure_PSV = tree.table_of(enumerable.world(1).surest())
    assert torch.equal(tree.answer_logp(sure_PSV).exp(), enumerable.world(1).surest().exp())


def test_reach_is_the_sum_over_answers_that_pass():
    table_PSV = any_table()
    reach_PS, logp_PK = tree.reach_logp(table_PSV).exp(), tree.answer_logp(table_PSV)
    for beginning in [(), (4,), (0, 5), (3, 3, 1)]:
        passing = [k for k, a in enumerate(tree.ANSWERS) if a[: len(beginning)] == beginning]
        expected_P = logp_PK[:, passing].exp().sum(-1)
        assert torch.allclose(reach_PS[:, tree.state_of(beginning)], expected_P, atol=1e-13)


# the published numbers of world 1 --------------------------------------------------------------------

PUBLISHED = {
    0.1: (1.3409, [2.33, 3.76, 1.57, 4.45], [3.38, 2.24, 1.86, 2.00], 13.4, 3.03),
    0.5: (0.7272, [0.37, 0.65, 0.79, 1.55], [4.77, 4.31, 2.84, 4.04], 1.45, 0.84),
}


@pytest.mark.parametrize("beta", BETAS)
def test_the_optimum_is_the_published_one(world: enumerable.World, beta: float):
    value, kl_P, entropy_P, back, forth = PUBLISHED[beta]
    best_PK = world.best(beta)
    assert round(float(world.best_value(beta).mean()), 4) == value
    assert rounded(law.kl(best_PK, world.reference_PK)) == kl_P
    assert rounded(law.entropy(best_PK)) == entropy_P
    assert float(law.kl(world.reference_PK, best_PK).mean()) == pytest.approx(back, abs=0.05 if back > 2 else 0.005)
    assert round(float(law.kl(best_PK, world.reference_PK).mean()), 2) == forth


def test_the_reference_is_the_published_one(world: enumerable.World):
    length_P = law.expectation(world.reference_PK, tree.LENGTH_K.double().expand(4, -1))
    entropy_P = law.entropy(world.reference_PK)
    assert float(length_P.mean()) == pytest.approx(3.38, abs=0.005)
    assert float((entropy_P / length_P).mean()) == pytest.approx(1.5, abs=1e-6)
    assert 4.4 < entropy_P.min() < entropy_P.max() < 5.45
    mean_P = law.expectation(world.reference_PK, world.reward_PK)
    assert torch.allclose(mean_P, torch.zeros(4, dtype=torch.float64), atol=1e-12)
    assert float(law.expectation(world.reference_PK, world.reward_PK.square()).mean()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("beta", "factor", "share", "distance"),
    [
        (0.1, 0.5, 0.971, None),
        (0.1, 0.8, 0.997, None),
        (0.1, 1.25, 0.997, None),
        (0.1, 2, 0.964, None),
        (0.5, 0.5, 0.844, 0.226),
        (0.5, 0.8, 0.985, 0.022),
        (0.5, 1.25, 0.986, 0.021),
        (0.5, 2, 0.868, 0.193),
    ],
)
def test_the_optimum_of_another_beta(
    world: enumerable.World, beta: float, factor: float, share: float, distance: float | None
):
    judged = world.score(world.best(beta * factor), beta)
    assert round(judged.share, 3) == share
    assert distance is None or round(judged.kl_to_best, 3) == distance


@pytest.mark.parametrize(("beta", "n", "share"), [(0.1, 64, 0.964), (0.5, 8, 0.873), (0.5, 4, 0.872), (0.5, 64, 0.05)])
def test_best_of_n_is_the_published_law(world: enumerable.World, beta: float, n: int, share: float):
    assert world.share(world.best_of(n), beta) == pytest.approx(share, abs=0.0011 if n == 64 and beta == 0.5 else 5e-4)


def test_the_surest_policy_and_the_clipped_reward_score_as_published(world: enumerable.World):
    assert world.share(world.surest(), 0.1) == pytest.approx(0.8835, abs=5e-5)
    assert world.share(world.surest(), 0.5) == pytest.approx(-1.695, abs=5e-4)
    for beta, share in ((0.1, 0.814), (0.5, 0.862)):
        clipped_PK = law.tilted(world.reference_PK, world.reward_PK.clamp(-1, 1), beta)
        assert round(world.share(clipped_PK, beta), 3) == share


# laws, against other ways to the same numbers --------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("beta", BETAS)
def test_what_is_lost_is_the_distance_to_the_best(number: int, beta: float):
    """J* − J(π) = β·KL(π‖π*) for any π: J, π* and J* are computed by three formulas that must fit together."""
    world = enumerable.world(number)
    for logp_PK in (tree.answer_logp(any_table(3)), world.reference_PK, world.best(beta / 3), world.best_of(16)):
        lost_P = world.best_value(beta) - world.value(logp_PK, beta)
        assert torch.allclose(lost_P, beta * law.kl(logp_PK, world.best(beta)), atol=1e-10)
    judged = world.score(tree.answer_logp(any_table(3)), beta)
    assert judged.share == pytest.approx(1 - beta * judged.kl_to_best / float(world.best_value(beta).mean()), abs=1e-10)
    assert judged.value == pytest.approx(judged.reward - beta * judged.kl_from_reference, abs=1e-10)
    assert world.share(world.reference_PK, beta) == 0.0
    assert world.score(world.best(beta), beta).kl_from_best == pytest.approx(0.0, abs=1e-12)


def test_another_world_is_another_world(world: enumerable.World):
    """World 2 by the same code; its numbers are pinned so that nobody's bands move unnoticed."""
    other = enumerable.world(2)
    assert not torch.equal(other.reward_PK, world.reward_PK)
    found = [round(float(other.best_value(beta).mean()), 4) for beta in BETAS]
    assert found == [1.7496, 0.9714]
    length_P = law.expectation(other.reference_PK, tree.LENGTH_K.double().expand(4, -1))
    assert float((law.entropy(other.reference_PK) / length_P).mean()) == pytest.approx(1.5, abs=1e-6)


def test_best_of_n_is_what_drawing_gives(world: enumerable.World):
    rng = np.random.default_rng(0)
    p_K = world.reference_PK[1].exp().numpy()
    drawn = rng.choice(len(p_K), size=(100_000, 3), p=p_K / p_K.sum())
    reward_K = world.reward_PK[1].numpy()
    best = drawn[np.arange(len(drawn)), reward_K[drawn].argmax(1)]
    seen_K = np.bincount(best, minlength=len(p_K)) / len(drawn)
    law_K = world.best_of(3)[1].exp().numpy()
    assert law_K.sum() == pytest.approx(1, abs=1e-12)
    likely = law_K > 2e-3
    assert np.abs(seen_K - law_K)[likely].max() < 5 * math.sqrt(law_K.max() / len(drawn))
    assert np.abs(world.best_of(1).exp().numpy() - world.reference_PK.exp().numpy()).max() < 1e-12


def test_the_reward_is_the_formula_written_slowly(world: enumerable.World):
    """Likes of symbols and of neighbours explain the reward's order up to the noise, through the squash."""
    random = torch.Generator().manual_seed(1001)
    for _, shape in (item for item in gpt2.shapes(enumerable.SIZES) if len(item[1]) > 1):
        torch.randn(math.prod(shape), generator=random)
    u, b = torch.randn(4, 7, generator=random), torch.randn(7, 7, generator=random)
    noise_PK = torch.randn(4, 1555, generator=random).double()
    for x in range(4):
        raw_K = torch.tensor(
            [
                sum(float(u[x, s]) + float(b[before, s]) for before, s in zip((x, *answer), answer, strict=False))
                for answer in tree.ANSWERS
            ],
            dtype=torch.float64,
        )
        p_K = world.reference_PK[x].exp()
        for squash in (False, True):
            raw_K = 2 * torch.tanh((raw_K + 0.1 * noise_PK[x]) / 2) if squash else raw_K
            raw_K = (raw_K - p_K @ raw_K) / (p_K @ (raw_K - p_K @ raw_K).square()).sqrt()
        scale = (0.5, 0.8, 1.2, 1.5)[x] / math.sqrt((0.25 + 0.64 + 1.44 + 2.25) / 4)
        assert torch.allclose(raw_K * scale, world.reward_PK[x], atol=1e-5)


# the network -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return enumerable.write_reference(tmp_path_factory.mktemp("world") / "reference")


def test_palate_and_transformers_read_the_reference(world: enumerable.World, folder: Path):
    loaded = load_model(folder)
    assert sum(p.numel() for p in loaded.trunk.parameters()) == 26_176
    assert loaded.trunk.context == 8
    published: torch.nn.Module = GPT2LMHeadModel.from_pretrained(folder).eval()

    def ours(tokens_RT: Tensor) -> Tensor:
        hidden_RTD = loaded.trunk.hidden(tokens_RT, torch.ones_like(tokens_RT, dtype=torch.bool))
        return loaded.trunk.logits(hidden_RTD).log_softmax(-1)

    for next_logp in (ours, lambda tokens_RT: published(tokens_RT).logits.log_softmax(-1)):
        with torch.no_grad():
            logp_PK = tree.answer_logp(tree.table(next_logp))
        assert (logp_PK - world.reference_PK).abs().max() < 1e-5
        judged = world.score_network(next_logp, 0.5)
        assert judged.share == pytest.approx(0, abs=1e-5)
        assert judged.kl_from_reference == pytest.approx(0, abs=1e-9)


def test_weights_are_drawn_in_the_order_of_the_parameters(folder: Path):
    published = GPT2LMHeadModel.from_pretrained(folder)
    names = [(name, tuple(p.shape)) for name, p in published.named_parameters()]
    assert names == list(gpt2.shapes(enumerable.SIZES))


def test_symbols_are_letters(folder: Path):
    tokenizer = load_model(folder).tokenizer
    assert tokenizer.encode("abcdef<eos>") == list(range(7))
    assert tokenizer.eos == tokenizer.pad == 6
    assert tokenizer.decode([2, 0, 6]) == "ca"
    for answer in tree.ANSWERS[::50]:
        assert enumerable.symbols(tokenizer.decode(answer)) == answer
    for wrong in ("abcde", "abg", "A"):
        with pytest.raises(PalateError, match=r"is no answer. Give at most 4 of the letters abcdef"):
            enumerable.symbols(wrong)


def test_the_reward_function_reads_the_table(world: enumerable.World):
    found = enumerable.score(["a", "d", "b"], ["", "ffff", "ce"])
    places = [(0, (6,)), (3, (5, 5, 5, 5)), (1, (2, 4, 6))]
    assert found == [float(world.reward_PK[x, tree.NUMBER_OF[a]]) for x, a in places]
    assert enumerable.score(["a"], [""], world=[2]) == [float(enumerable.world(2).reward_PK[0, 0])]
    with pytest.raises(PalateError, match="'e' is no prompt"):
        enumerable.score(["e"], ["a"])


# the data --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", enumerable.SHAPES)
def test_a_longer_call_begins_as_a_shorter_one(shape: str):
    assert enumerable.records(shape, 21, 5) == enumerable.records(shape, 60, 5)[:21]
    if shape != "prompts":
        assert enumerable.records(shape, 21, 5) != enumerable.records(shape, 21, 6)
    assert len(load(Data(path=f"world:enumerable/{shape}", rows=20), 0)) == 20


def number_of(completion: object) -> int:
    return tree.NUMBER_OF[enumerable.symbols(str(completion))]


def test_pairs_are_drawn_by_the_reference_and_labelled_by_bradley_terry(world: enumerable.World):
    pairs = [p for p in enumerable.records("pairs", 4000, 0) if isinstance(p, Ranking)]
    right, expected, reward = list[bool](), list[float](), list[float]()
    for pair in pairs:
        assert pair.ranks == (0, 1)
        assert pair.probability is None
        x = "abcd".index(text_of(pair.prompt))
        chosen, rejected = (float(world.reward_PK[x, number_of(c)]) for c in pair.completions)
        assert pair.columns["probability"] == pytest.approx(1 / (1 + math.exp(rejected - chosen)))
        right.append(chosen > rejected)
        expected.append(1 / (1 + math.exp(-abs(chosen - rejected))))
        reward += [chosen, rejected]
    error = math.sqrt(0.25 / len(pairs))
    assert np.mean(right) == pytest.approx(np.mean(expected), abs=4 * error)
    assert np.mean(reward) == pytest.approx(0, abs=0.06)
    assert Counter(p.prompt for p in pairs).most_common()[-1][1] > 900
    assert len({p.key for p in pairs}) == len(pairs)
    soft = [p for p in enumerable.records("pairs", 10, 0, soft=True) if isinstance(p, Ranking)]
    assert [p.probability for p in soft] == [p.columns["probability"] for p in pairs[:10]]


def test_thumbs_are_the_two_sides_of_a_pair():
    pairs, thumbs = enumerable.records("pairs", 50, 3), enumerable.records("labelled", 100, 3)
    for pair, up, down in zip(pairs, thumbs[::2], thumbs[1::2], strict=True):
        assert isinstance(pair, Ranking)
        assert isinstance(up, Unpaired)
        assert isinstance(down, Unpaired)
        assert (up.completion, down.completion) == pair.completions
        assert up.label
        assert not down.label


def test_rated_answers_follow_the_reference(world: enumerable.World):
    rated = [r for r in enumerable.records("rated", 4000, 1) if isinstance(r, Rated)]
    scores = enumerable.score([text_of(r.prompt) for r in rated], [text_of(r.completion) for r in rated])
    assert [r.rating for r in rated] == scores
    assert np.mean(np.square(scores)) == pytest.approx(1, abs=0.1)
    first = Counter(number_of(r.completion) for r in rated if r.prompt == "a")
    for number, times in first.most_common(5):
        p = float(world.reference_PK[0, number].exp())
        assert times / sum(first.values()) == pytest.approx(p, abs=4 * math.sqrt(p / sum(first.values())))


def test_demonstrations_can_be_the_best_of_several(world: enumerable.World):
    best = [d for d in enumerable.records("demonstrations", 1500, 0, best_of=8) if isinstance(d, Demonstration)]
    scores = enumerable.score([text_of(d.prompt) for d in best], [text_of(d.completion) for d in best])
    expected = float(law.expectation(world.best_of(8), world.reward_PK).mean())
    assert np.mean(scores) == pytest.approx(expected, abs=0.06)
    assert expected > 1


def test_a_cut_answer_has_no_end_token(folder: Path):
    """With max_length 5, a row is the prompt and the answer's own symbols, whether it ended or was cut."""
    loaded, records = load_model(folder), enumerable.records("pairs", 300, 0)
    rows = encode_pairs(records, loaded.tokenizer, Encoding(max_length=5), loaded.trunk.context).rows
    for row, pair in zip(rows, records, strict=True):
        assert isinstance(pair, Ranking)
        for side, completion in zip(row.rows, pair.completions, strict=True):
            answer = enumerable.symbols(str(completion))
            assert side.tokens == ["abcd".index(text_of(pair.prompt)), *answer]
            assert side.trained == [False] + [True] * len(answer)
    labelled = encode_labels(enumerable.records("thumbs", 50, 0), loaded.tokenizer, Encoding(max_length=5), 8)
    assert len(labelled.rows) == 50


def test_wrong_words_are_told_with_the_right_ones():
    assert "best policy that is known exactly" in listing("worlds")["enumerable"]
    with pytest.raises(PalateError, match=r"no shape 'pair'.*Did you mean 'pairs'"):
        enumerable.records("pair", 3, 0)
    with pytest.raises(PalateError, match=r"no setting 'sofd'.*Did you mean 'soft'"):
        enumerable.records("pairs", 3, 0, sofd=True)


def test_answers_spell_and_read_back():
    for answer in tree.ANSWERS:
        assert enumerable.symbols(enumerable.spelled(answer)) == answer
    assert len({enumerable.spelled(a) for a in tree.ANSWERS}) == 1555
    assert tree.state_of((5, 5, 5)) == 258
    assert {tree.state_of(a) for n in range(4) for a in product(range(6), repeat=n)} == set(range(259))
