"""The tables of bench/plan.md, from the formulas of bench/plan.py."""

from __future__ import annotations

import math

from bench import plan
from bench.plan import Cluster, Step, Work
from bench.sizes import KINDS, MIXED, Model, gigabytes, held, state


def tables() -> str:
    """All of them, as Markdown."""
    parts = [*_assumed()]
    for model, cluster, parallel in plan.CASES:
        parts += ["", f"## {model.name} on {cluster.gpus} GPUs of 80 GB", ""]
        parts += [*_memory(model, cluster), "", *_sampler(model, cluster, parallel)]
        parts += ["", *_moved(model, cluster), "", *_steps(model, cluster, parallel)]
    return "\n".join([*parts, "", *_checked(), ""])


def _assumed() -> list[str]:
    c, w = Cluster(8), Work()
    return [
        f"One iteration is {w.answers:,} answers of {w.mean:,} tokens on average (geometric, cut at {w.longest:,}) to",
        f"prompts of {w.prompt}; one pass over them; {w.scorings} forward passes without gradient (reference, value,",
        "reward; old log-probabilities are the sampler's). GPUs are H100s by their data sheet:",
        f"{c.flops / 1e12:.0f} TFLOP/s, {c.reads / 1e12:.2f} TB/s, {c.inside / 1e9:.0f} GB/s each way inside a node,",
        f"{c.between / 1e9:.0f} GB/s between nodes. Assumed shares of these: {c.busy:.0%} of the products,",
        f"{c.read_share:.0%} of the reads, {c.wire_share:.0%} of the wires. All figures are computed unless they say",
        "*published*.",
    ]


def _memory(model: Model, cluster: Cluster) -> list[str]:
    micro = 4096
    kept, again = (gigabytes(plan.activations(model, micro, r)) for r in (False, True))
    rows = [
        f"Memory of a GPU that trains, under zero3 over all {cluster.gpus}. Activations of {micro:,} tokens: {kept},",
        f"with recomputing {again}.",
        "The last columns are the largest micro-batch in tokens that fits when 90 % of the GPU may be filled.",
        "",
        "| layout | weights | gradients | Adam | gathered, logits | all but activations | fits | fits, recomputing |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind in KINDS:
        found = state(held(model, kind, plan.top_blocks(model)), MIXED)
        shard, gathered = plan.trainer_shares(model, kind, cluster.gpus)
        parts = [gigabytes(found[name] / cluster.gpus) for name in ("weights", "gradients", "moments")]
        fits = [_tokens(plan.largest_microbatch(model, kind, cluster.gpus, cluster, r)) for r in (False, True)]
        cells = [kind, *parts, gigabytes(gathered), gigabytes(shard + gathered), *fits]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _tokens(fits: int) -> str:
    return f"{fits:,}" if fits else "nothing"


def _sampler(model: Model, cluster: Cluster, parallel: int) -> list[str]:
    work, live, context = Work(), 256, 1024
    slots = plan.sampler_slots(model, cluster, parallel, work)
    rate = live / plan.decode_seconds(model, cluster, parallel, live, context)
    share = gigabytes(2 * model.total / parallel)
    room = gigabytes(0.9 * cluster.memory - 2 * model.total / parallel)
    return [
        f"A sampler is {parallel} GPU{'s' * (parallel > 1)}: {share} of weights on each leave {room} for keys and",
        f"values, {plan.cache(model, 1) / 1e3:.0f} kB a token over all of them: {slots:,} answers of mean length.",
        f"It writes {rate:,.0f} tokens/s ({rate / parallel:,.0f} a GPU) with {live} answers of {context:,} tokens.",
    ]


def _moved(model: Model, cluster: Cluster) -> list[str]:
    work = Work()
    rows = [
        "Bytes moved in a step, for each GPU: all-gathers and reduce-scatters of the update, in micro-batches of the",
        f"size that fits (at most {work.micro:,} tokens), and what a sampler is sent afterwards.",
        "",
        "| layout | update | seconds on the wire | publication | seconds |",
        "|---|---|---|---|---|",
    ]
    for kind in KINDS:
        fits = plan.largest_microbatch(model, kind, cluster.gpus, cluster, True)
        micro = min(work.micro, fits)
        moved = plan.wire_bytes(model, kind, cluster.gpus, work, micro) if micro else math.inf
        sent = plan.published_bytes(model, kind)
        wire = cluster.wire(cluster.gpus)
        sizes = f"{gigabytes(moved)} | {moved / wire:.1f} | {_megabytes(sent)} | {sent / wire:.3f}"
        rows.append(f"| {kind} | {sizes} |")
    return rows


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB" if size < 1e9 else gigabytes(size)


def _steps(model: Model, cluster: Cluster, parallel: int) -> list[str]:
    rows = [
        "Seconds of a PPO iteration, activations recomputed. *In turn*: all GPUs write, then all learn. *One ahead*:",
        "samplers have GPUs of their own, in the split that is fastest, and write the next batch meanwhile. Layouts",
        "other than *separate* are other models, not the same work done faster.",
        "",
        "| layout | in turn: write | score | update | publish | step | one ahead: GPUs | write | learn | step | gain |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    work = Work()
    for kind in KINDS:
        samplers = plan.best_split(model, cluster, work, parallel, kind)
        turn = plan.step(model, cluster, work, 0, parallel, kind)
        ahead = plan.step(model, cluster, work, samplers, parallel, kind)
        rows.append(f"| {' | '.join([kind, *_cells(turn, ahead, samplers, cluster.gpus)])} |")
    return rows


def _cells(turn: Step, ahead: Step, samplers: int, gpus: int) -> list[str]:
    inside = (turn.generate, turn.score, turn.update, turn.publish, turn.total)
    learn = ahead.score + ahead.update
    split = f"{samplers} + {gpus - samplers}"
    gain = f"{turn.total / ahead.total - 1:+.0%}"
    return [*(f"{s:.1f}" for s in inside), split, *(f"{s:.1f}" for s in (ahead.generate, learn, ahead.total)), gain]


def _checked() -> list[str]:
    rows = [
        "## The same formulas on published steps",
        "",
        "| step | published | computed | off by |",
        "|---|---|---|---|",
    ]
    for what, theirs, ours in plan.published():
        rows.append(f"| {what} | {theirs:.1f} s | {ours:.1f} s | {ours / theirs - 1:+.0%} |")
    seven = plan.SEVEN
    rate = 256 / plan.decode_seconds(seven, Cluster(1), 1, 256, 1024)
    rows.append(f"| decoding 7 B on one H100, tokens/s | ~6,300 | {rate:,.0f} | {rate / 6300 - 1:+.0%} |")
    return rows
