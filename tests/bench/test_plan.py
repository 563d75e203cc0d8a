"""The plan's formulas against numbers worked out by hand, and its activations against what a real model keeps."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench import plan, plan_page
from bench.plan import Cluster, Work
from bench.sizes import KINDS, SEVEN, SEVENTY, Model
from palate.check.memory import activations

PLAIN = Cluster(8, busy=1.0, read_share=1.0, wire_share=1.0)
SMALL = Model("small", 3, 256, 128, 768, 500, 4)


def test_activations_are_what_transformers_llama_keeps() -> None:
    config = LlamaConfig(
        vocab_size=SMALL.vocabulary,
        hidden_size=SMALL.width,
        intermediate_size=SMALL.inner,
        num_hidden_layers=SMALL.layers,
        num_attention_heads=SMALL.heads,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).model
    ids = torch.arange(512).remainder(SMALL.vocabulary)[None]
    kept = activations(lambda: model(ids, use_cache=False), model.parameters())
    assert kept == pytest.approx(plan.activations(SMALL, 512, False), rel=0.1)


def test_recomputing_keeps_the_input_of_each_block_and_one_inside() -> None:
    inside = plan.activations(replace(SMALL, layers=1), 10, False)
    assert plan.activations(SMALL, 10, True) == 10 * 3 * 256 * 2 + inside


def test_keys_and_values_of_a_token() -> None:
    assert plan.cache(SEVEN, 1) == 2 * 2 * 32 * 1024  # two of them, two bytes, 32 blocks, 8 heads of 128
    assert plan.cache(SEVENTY, 10) == 10 * 2 * 2 * 80 * 1024


def test_decoding_alone_reads_the_weights_and_with_many_multiplies() -> None:
    one = plan.decode_seconds(SEVEN, PLAIN, 1, 1, 0)
    assert one == pytest.approx(2 * SEVEN.multiplied / 3.35e12)
    crowd = plan.decode_seconds(SEVEN, PLAIN, 1, 10_000, 0)
    assert crowd == pytest.approx(2 * SEVEN.multiplied * 10_000 / 989e12)
    four = plan.decode_seconds(SEVENTY, PLAIN, 4, 1, 0)
    assert four == pytest.approx(2 * SEVENTY.multiplied / 4 / 3.35e12 + 2 * 80 * 15e-6)


def test_writing_takes_the_longest_answer_and_then_the_queue() -> None:
    work = Work(answers=1, prompt=0, mean=1000, longest=1)
    alone = plan.generation_seconds(SEVEN, PLAIN, 1, 1, work)
    assert alone == pytest.approx(plan.decode_seconds(SEVEN, PLAIN, 1, 1, 0))
    some, more = (plan.generation_seconds(SEVEN, PLAIN, 1, 1, Work(answers=n)) for n in (300, 3000))
    assert more > 4 * some
    assert plan.generation_seconds(SEVENTY, PLAIN, 1, 1, Work()) == math.inf  # its weights alone do not fit


def test_lengths_have_the_mean_that_was_asked_for() -> None:
    uncut = plan._geometric(1024, 4096)
    stop = 1 / uncut
    mean = sum((1 - stop) ** t for t in range(4096))  # the chance that there is a token t
    assert mean == pytest.approx(1024, rel=1e-6)


def test_learning_counts_products_by_layout() -> None:
    work = Work(scorings=3, updates=2)
    assert [plan.update_products(kind, work, False) for kind in KINDS] == [12, 6, 8, 1]
    assert [plan.update_products(kind, work, True) for kind in KINDS] == [16, 8, 12, 8 / 6]
    assert [plan.scoring_products(kind, work) for kind in KINDS] == [6, 6, 6, pytest.approx(13 / 3)]
    score, update = plan.learning_seconds(SEVEN, "separate", PLAIN, 8, work, True)
    assert score == pytest.approx(6 * SEVEN.multiplied * work.tokens / (8 * 989e12))
    assert update == pytest.approx(16 * SEVEN.multiplied * work.tokens / (8 * 989e12))


def test_bytes_on_the_wire_by_hand() -> None:
    work = Work(answers=8, prompt=0, mean=2000, updates=2)
    # 2,000 tokens on each of 8 ranks are 2 micro-batches of 1,000; 8 bytes a parameter; 7 of 8 shards are elsewhere
    assert plan.wire_bytes(SEVEN, "separate", 8, work, 1000) == 2 * 2 * 8 * SEVEN.total * 7 / 8
    assert plan.wire_bytes(SEVEN, "adapters", 8, work, 1000) == 2 * 2 * 4 * SEVEN.total * 7 / 8
    assert plan.published_bytes(SEVEN, "separate") == 2 * 7_241_732_096
    assert plan.published_bytes(SEVEN, "adapters") == 2 * 41_943_040


def test_an_update_is_no_faster_than_its_wire_and_needs_room() -> None:
    slow = replace(PLAIN, inside=1e9)
    work = Work()
    _, update = plan.learning_seconds(SEVEN, "separate", slow, 8, work, True)
    assert update == pytest.approx(plan.wire_bytes(SEVEN, "separate", 8, work, work.micro) / 1e9)
    assert plan.learning_seconds(SEVENTY, "separate", PLAIN, 8, work, True) == (math.inf, math.inf)


def test_one_ahead_takes_the_longer_side() -> None:
    assert plan.Step(5.0, 1.0, 2.0, 0.5, False).total == 8.5
    assert plan.Step(5.0, 1.0, 2.0, 0.5, True).total == 5.5
    best = plan.best_split(SEVEN, Cluster(8), Work(), 1)
    totals = [plan.step(SEVEN, Cluster(8), Work(), s, 1).total for s in range(1, 8)]
    assert plan.step(SEVEN, Cluster(8), Work(), best, 1).total == min(totals)


def test_published_steps_are_met_within_a_third() -> None:
    for what, theirs, ours in plan.published():
        assert ours == pytest.approx(theirs, rel=1 / 3), what


def test_the_page_holds_the_tables_of_today() -> None:
    page = Path(plan.__file__).with_suffix(".md").read_text(encoding="utf-8")
    assert plan.MARKS[0] + plan_page.tables() + plan.MARKS[1] in page
