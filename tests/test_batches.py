"""Batches are rows: select, split and trim never change what a row says."""

import torch

from palate.batches import Comparisons, Examples, Rollouts, Scored


def examples(*lengths: int, width: int = 6) -> Examples:
    place = torch.arange(width)
    ends = torch.tensor(lengths)[:, None]
    tokens = torch.arange(len(lengths) * width).reshape(len(lengths), width)
    return Examples(tokens, place < ends, (place < ends) & (place >= 1))


def test_select_takes_rows_in_order() -> None:
    batch = examples(3, 5, 2)
    picked = batch.select(torch.tensor([2, 0]))
    assert picked.tokens_BT.tolist() == [batch.tokens_BT[2].tolist(), batch.tokens_BT[0].tolist()]
    assert picked.size == 2


def test_split_covers_every_row_once() -> None:
    parts = list(examples(3, 5, 2, 4, 1).split(2))
    assert [p.size for p in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([p.tokens_BT for p in parts]), examples(3, 5, 2, 4, 1).tokens_BT)


def test_trimmed_drops_only_columns_no_mask_reaches() -> None:
    assert examples(3, 2).trimmed().tokens_BT.shape == (2, 3)
    assert examples(3, 6).trimmed().tokens_BT.shape == (2, 6)
    assert examples(0, 0).trimmed().tokens_BT.shape == (2, 6)


def test_counts_are_trained_tokens_not_cells() -> None:
    assert examples(3, 5).counts() == {"rows": 2.0, "tokens": 6.0}


def test_comparisons_place_puts_scores_back_where_they_came_from() -> None:
    present = torch.tensor([[True, True, False], [True, True, True]])
    tokens = torch.arange(12).reshape(2, 3, 2)
    real = present[..., None].expand(2, 3, 2)
    batch = Comparisons(tokens, real, present, torch.zeros(2, 3, dtype=torch.long), torch.zeros(2), real)
    answers = batch.answers()
    grid = batch.place(answers.tokens_BT[:, 0].float())
    assert grid.tolist() == [[0.0, 2.0, 0.0], [6.0, 8.0, 10.0]]
    assert batch.counts()["answers"] == 5.0


def test_nested_rows_and_parts_are_selected_together() -> None:
    e = examples(3, 5, 2)
    rollouts = Rollouts(
        e.tokens_BT, e.real_BT, e.action_BT, torch.zeros(3, 6), torch.ones(3).bool(), torch.arange(3), 7, 0.7
    )
    scored = Scored(
        rollouts, torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3, 6), {"a": torch.arange(3)}, {"kl_coef": 0.1}
    )
    picked = scored.select(torch.tensor([1]))
    assert picked.rollouts.prompt_B.tolist() == [1]
    assert picked.rollouts.temperature == 0.7
    assert picked.parts["a"].tolist() == [1]
    assert picked.memory == {"kl_coef": 0.1}
    assert picked.rollouts.length_B.tolist() == [4]
