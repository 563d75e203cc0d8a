"""Collation: rows on the left, pads on the right, masks carried."""

import pytest
import torch

from palate.data.collate import comparisons, examples
from palate.data.encode import RankedRow, TokenRow

LONG = TokenRow([5, 6, 9], [False, True, True])
SHORT = TokenRow([9, 9], [False, True])


@pytest.mark.parametrize("length", [None, 5])
def test_examples_are_padded_on_the_right_even_when_pad_is_a_real_token(length):
    batch = examples([LONG, SHORT], pad=9, length=length)
    columns = length or 3
    assert batch.tokens_BT.tolist() == [[5, 6, 9] + [9] * (columns - 3), [9] * columns]
    assert batch.real_BT.sum(-1).tolist() == [3, 2]
    assert batch.action_BT.sum(-1).tolist() == [2, 1]
    assert batch.tokens_BT.dtype == torch.int64
    assert batch.counts() == {"rows": 2.0, "tokens": 3.0}


def test_a_row_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="3 tokens does not fit into 2"):
        examples([LONG], pad=0, length=2)


def test_comparisons_of_unequal_numbers_of_answers():
    rows = [RankedRow("a", [LONG, SHORT, SHORT], [0, 2, 1], None), RankedRow("b", [SHORT, LONG], [1, 0], 2.5)]
    batch = comparisons(rows, pad=0)
    assert batch.tokens_BKT.shape == (2, 3, 3)
    assert batch.present_BK.tolist() == [[True, True, True], [True, True, False]]
    assert batch.rank_BK.tolist() == [[0, 2, 1], [1, 0, 0]]
    assert batch.margin_B.tolist() == [0.0, 2.5]
    assert batch.answers().tokens_BT.tolist() == [[5, 6, 9], [9, 9, 0], [9, 9, 0], [9, 9, 0], [5, 6, 9]]
    assert batch.counts() == {"rows": 2.0, "answers": 5.0, "tokens": 7.0}
    assert not batch.real_BKT[1, 2].any()
