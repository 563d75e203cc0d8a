"""The page bench/results.md, from the records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.speed import results
from bench.speed.results import AGREE, Record
from bench.speed.workloads import EVERY, Row

DASH = "–"


def number(value: float | None, digits: int = 2) -> str:
    """A number, or a dash where there is none."""
    return DASH if value is None else f"{value:,.{digits}f}"


def share(gflops: float, limit: float) -> str:
    """Of the limit, in percent."""
    return f"{100 * gflops / limit:.0f} %"


USUAL = 5
"""Rounds of a row; a page names those that had fewer."""


def limit_of(row: Row, part: str, record: Record) -> float:
    """The limit that a part of a row is held against: the products of drawing, or those of reading."""
    return record["limit"]["write" if part == "generate" else "read"]["best"]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def seconds(side: Mapping[str, Any] | None) -> str:
    """Median with least and most."""
    if side is None:
        return DASH
    s = side["seconds"]
    mark = f" †{side['disturbed']}" if side["disturbed"] else ""
    return f"{s['median']:.3g} ({s['min']:.3g}–{s['max']:.3g}){mark}"


def target(row: Row, record: Record) -> str:
    """The ratio asked for, and whether it is reached."""
    found = results.ratio(record)
    if row.target is None:
        return DASH
    mark = "" if found is None else (" ✓" if found >= row.target else " ✗")
    return f"{row.target:g}×{mark}"


def memory(row: Row, record: Record) -> str:
    """Peak memory of both, and whether it is what was asked for."""
    ours, found = record["palate"]["peak_mb"], results.memory(record)
    if found is None:
        return f"{ours:,.0f}"
    mark = "" if row.memory is None else (f" ≤ {row.memory:g} ✓" if found <= row.memory else f" ≤ {row.memory:g} ✗")
    return f"{ours:,.0f} / {record['peer']['peak_mb']:,.0f} = {found:.2f}{mark}"


def whole_share(row: Row, side: Mapping[str, Any] | None, record: Record) -> str:
    """GFLOP/s of a whole turn and its share of the limit."""
    if side is None or (side is record["palate"] and not row.same_models):  # another model does less than is counted
        return DASH
    return f"{side['gflops']:.0f} = {share(side['gflops'], limit_of(row, row.kind, record))}"


def main_table(known: Mapping[str, Record]) -> list[str]:
    """One line per row."""
    head = ["workload", "peer", "palate s", "peer s", "ratio", "asked", "at the limit", "tokens/s, both"]
    head += ["GFLOP/s = share of limit", "peer's", "peak MB, both"]
    rows = []
    for name, row in EVERY.items():
        if name not in known:
            continue
        record, title = known[name], row.title if row.same_models else f"{row.title} (*different model*)"
        ours, theirs, found = record["palate"], record["peer"], results.ratio(record)
        pace = f"{ours['tokens_per_second']:,.0f}" + (f" / {theirs['tokens_per_second']:,.0f}" if theirs else "")
        gain = DASH if found is None else f"**{found:.2f}×**"
        line = [title, record["peer_name"] or DASH, seconds(ours), seconds(theirs), gain, target(row, record)]
        bound = theirs is not None and row.same_models
        line += [DASH if not bound else f"{limit_of(row, row.kind, record) / theirs['gflops']:.1f}×", pace]
        line += [whole_share(row, ours, record), whole_share(row, theirs, record), memory(row, record)]
        rows.append(line)
    return table(head, rows)


def parts_table(known: Mapping[str, Record]) -> list[str]:
    """The iterations that have several parts, part by part."""
    head = ["workload", "part", "palate s", "peer s", "ratio", "palate GFLOP/s = share", "peer GFLOP/s = share"]
    rows: list[list[str]] = []
    for name, row in EVERY.items():
        record = known.get(name)
        for part, ours in (record["palate"]["parts"] if record else {}).items():
            theirs = (record["peer"] or {}).get("parts", {}).get(part)
            limit, worth = limit_of(row, part, record), ours["gflops"] > 0
            mine = f"{ours['gflops']:.0f} = {share(ours['gflops'], limit)}" if worth and row.same_models else DASH
            his = f"{theirs['gflops']:.0f} = {share(theirs['gflops'], limit)}" if theirs and worth else DASH
            gain = f"{theirs['seconds'] / ours['seconds']:.2f}×" if theirs else DASH
            cells = [number(ours["seconds"], 3), number(theirs["seconds"], 3) if theirs else DASH]
            rows.append([row.title, part, *cells, gain, mine, his])
    return table(head, rows) if rows else []


def loss_table(known: Mapping[str, Record]) -> list[str]:
    """The numbers that have to agree, and how far they do."""
    head = ["workload", "number", "steps", "palate, first and last", "peer, first and last", "apart at most", ""]
    rows = []
    for name, row in EVERY.items():
        record = known.get(name)
        found = results.apart(record) if record else None
        if record is None or found is None:
            continue
        steps = min(len(record["palate"]["compared"]), len(record["peer"]["compared"]))
        ends = [f"{s['compared'][0]:.6f}, {s['compared'][steps - 1]:.6f}" for s in (record["palate"], record["peer"])]
        rows.append([row.title, row.agree, str(steps), *ends, f"{found:.1e}", "✓" if found <= AGREE else "✗"])
    return table(head, rows) if rows else []


def limits_table(known: Mapping[str, Record]) -> list[str]:
    """The machine's limits, by model and by library."""
    head = ["model", "reading: best", "MKL", "oneDNN", "drawing: best", "MKL", "oneDNN"]
    seen: dict[str, list[str]] = {}
    for name, row in EVERY.items():
        if name in known:
            found = known[name]["limit"]
            cells = [found[kind].get(way) for kind in ("read", "write") for way in ("best", "mkl", "onednn")]
            seen.setdefault(row.model, [row.model, *(number(cell, 0) for cell in cells)])
    return table(head, list(seen.values()))


def notes(known: Mapping[str, Record]) -> list[str]:
    """What to know of single rows."""
    said = [f"- {row.title}: {row.note}." for name, row in EVERY.items() if name in known and row.note]
    few = {name: known[name]["palate"]["rounds"] for name in EVERY if name in known}
    said += [
        f"- {EVERY[name].title}, beside {known[name]['peer_name'] or 'nobody'}: {count} rounds."
        for name, count in few.items()
        if count < USUAL
    ]
    alone = [EVERY[name].title for name in EVERY if name in known and known[name]["peer"] is None]
    if alone:
        said.append(f"- The peer's environment was not there, so palate was measured alone: {'; '.join(alone)}.")
    return said


def origin(known: Mapping[str, Record]) -> list[str]:
    """Machine and versions, each that occurs."""
    machines = {", ".join(f"{k} {v}" for k, v in record["machine"].items()) for record in known.values()}
    versions: dict[str, set[str]] = {}
    for record in known.values():
        for name, side in (("palate", record["palate"]), (record["peer_name"], record["peer"])):
            if side:
                versions.setdefault(name, set()).add(", ".join(f"{k} {v}" for k, v in side["versions"].items()))
    dates = sorted({record["date"] for record in known.values()})
    found = [f"Measured {dates[0]}" + (f" to {dates[-1]}" if len(dates) > 1 else "") + " on:", ""]
    found += [f"- {one}" for one in sorted(machines)]
    return found + [f"- {name}: {'; '.join(sorted(texts))}" for name, texts in sorted(versions.items())]


HEAD = """# palate beside its peers

    export PALATE_PEERS=~/peers        # made as docs/bench.md says
    python -m bench.speed              # measures every row, writes this page and its picture
    python -m bench.speed --rows dpo-small,ppo-small --rounds 5

Both systems are in memory at once and take turns, one optimiser step, one PPO iteration or one call of `generate` each,
on the same weights (random, seed 0), token ids, batch sizes and epochs, in float32 on 2 threads. Seconds are medians of
five turns or more after a warm-up (fewer where the notes say so), with the least and the most. A turn during which
other programs used over 8 % of the machine is taken again; †n: n of the turns were disturbed all the same. A ratio
is the peer's median over palate's; "at the limit" is that of a program of matrix products alone, at the limit.

![ratios](../docs/img/speed.svg)
"""
GPU_HEAD = """# palate beside its peers on a GPU

    export PALATE_PEERS=~/peers        # made as docs/bench.md says, with a CUDA build of torch
    python -m bench.speed --gpu        # measures every row, writes this page and its picture

As [results.md](results.md), but products are in bfloat16: what learns keeps its weights, their gradients and Adam in
float32, `generate` has its weights in bfloat16. Clocks wait for the GPU; peak memory is the GPU's own.

![ratios](gpu.svg)
"""
COUNTING = """
## How the arithmetic is counted

2 FLOP per weight and token forward, 4 more backward; the blocks for real tokens only, the language-model head only
where a token is drawn or scored; attention scores are left out (under 3 % here). Both systems are credited with the
same useful work (`bench/speed/accounting.py`); what one computes beyond it (padding, logits of prompts) earns nothing.
The limit is what the machine's products reach at the model's own shapes, measured with each row
(`bench/speed/limit.py`): reading 2,048 tokens at once for whatever trains or scores, one token of 64 answers at once
for whatever draws (16,384 and 256 on a GPU). On a CPU they are in float32 by the faster of MKL and oneDNN for each
matrix. Peak memory is there that of the whole process, imports included.
"""
SAME = """
## The same numbers

Same seed, same batches, steps taken by each system with its own optimiser; the numbers of all turns are compared, the
warm-up included. Online methods draw answers of their own, so nothing is compared there; their formulas are held
against published numbers in `tests/test_golden_losses.py`, `tests/test_golden_ppo_details.py` and beside them.
"""


def page(known: Mapping[str, Record]) -> str:
    """All of bench/results.md, or of the page of a GPU's rows."""
    on_gpu = any(EVERY[name].device == "cuda" for name in known)
    parts = [GPU_HEAD if on_gpu else HEAD, *main_table(known)]
    for title, found in (("## Part by part", parts_table(known)), ("", loss_table(known))):
        if found:
            parts += ["", title, "", *found] if title else [SAME, *found]
    said = notes(known)
    parts += [COUNTING, "GFLOP/s:", "", *limits_table(known), "", *(["## Notes", "", *said, ""] if said else [])]
    return "\n".join([*parts, "## Machine and versions", "", *origin(known)]) + "\n"


def line(row: Row, record: Record) -> str:
    """A row as one line of plain text."""
    found, gap = results.ratio(record), results.apart(record)
    ours, name = record["palate"], record["peer_name"]
    said = f"{row.name}: palate {seconds(ours)} s, {ours['gflops']:.0f} GFLOP/s"
    if found is not None:
        said += f"; {name} {seconds(record['peer'])} s; {found:.2f}× (asked {target(row, record)})"
        said += f"; peak MB {memory(row, record)}"
    return said + (f"; {row.agree} apart {gap:.1e}" if gap is not None else "")
