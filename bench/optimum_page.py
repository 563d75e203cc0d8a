"""The page and the picture of bench/optimum.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from bench import mutants
from bench.optimum_rows import ROWS, best_n
from palate.worlds import enumerable

Measured = Mapping[str, Mapping[str, float]]
STYLE = """
  .sheet { fill: #ffffff; } text { font: 12px system-ui, sans-serif; fill: #221c22; }
  text.small { font-size: 11px; fill: #6b6169; } text.heading { font-weight: 600; font-size: 13px; }
  .grid { stroke: #e4ddd6; } .band { fill: #e9dfe6; } .end { stroke: #221c22; stroke-width: 1.6; }
  circle { fill: #7b2d56; fill-opacity: .85; } circle.other { fill: #1f6f78; }
"""
SHORT = " | 400 batches"
"""What is added to the name of a measurement with 400 batches of pairs; it stands in until there is a whole one."""
LEFT, WIDTH, ROW, TOP = 190, 290, 22, 46
LOW, HIGH = 0.2, 1.0
"""The scores that are drawn; what lies below is drawn at the edge."""


class Line(NamedTuple):
    """One method in one world at one β."""

    row: str
    end: float | None
    band: tuple[float, float] | None
    seeds: tuple[Mapping[str, float], ...]


def name_of(row: str, world: int, beta: float, seed: int) -> str:
    """Under which a measurement is kept."""
    return f"world {world} | β {beta:g} | {row} | seed {seed}"


def end_of(row: str, world: int, beta: float) -> str:
    """Under which the score at a method's own end is kept."""
    return f"world {world} | β {beta:g} | {row} | end"


def band(row: str, world: int, beta: float, end: float | None) -> tuple[float, float] | None:
    """The scores that are right: given for world 1, around the computed end elsewhere; none where nothing is known."""
    method = ROWS[row]
    if world == 1 or (end == 1.0 and not method.finite):
        return method.bands[beta]
    if end is None or method.around is None:
        return None
    half = method.around[0 if beta > 0.3 else 1]
    return round(end - half, 3), round(end + half, 3)


def lines(known: Measured, world: int, beta: float, seeds: Sequence[int]) -> list[Line]:
    """All methods that were measured."""
    found: list[Line] = []
    for row in ROWS:
        names = [name_of(row, world, beta, seed) for seed in seeds]
        runs = [known.get(name) or known.get(name + SHORT) for name in names]
        end = known.get(end_of(row, world, beta), {}).get("share")
        if any(runs):
            found.append(Line(row, end, band(row, world, beta, end), tuple(run for run in runs if run)))
    return found


def table(found: Sequence[Line]) -> list[str]:
    """Markdown."""
    head = "| method | ends at (computed) | right is | score, by seed | KL(π*‖π) | KL(π‖π_ref) | CPU s | why |"
    rows = [head, "|---|---|---|---|---|---|---|---|"]
    for line in found:
        scores = [run["share"] for run in line.seeds]
        inside = line.band is not None and all(line.band[0] <= score <= line.band[1] for score in scores)
        mark = "" if inside or line.band is None else " ✗"
        cells = [
            line.row,
            "–" if line.end is None else f"{line.end:.3f}",
            "–" if line.band is None else _band(line.band),
            " / ".join(f"{run['share']:.4f}{'†' if 'batches' in run else ''}" for run in line.seeds) + mark,
            " / ".join(f"{run['kl_from_best']:.3f}" for run in line.seeds),
            " / ".join(f"{run['kl_from_reference']:.2f}" for run in line.seeds),
            " / ".join(f"{run['cpu_seconds']:.0f}" for run in line.seeds),
            ROWS[line.row].why,
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _band(found: tuple[float, float]) -> str:
    return f"≥ {found[0]:g}" if found[1] >= 1 else f"{found[0]:g} – {found[1]:g}"


def picture(panels: Mapping[str, Sequence[Line]]) -> str:
    """Each method a line: the band that is right, a tick where it ends by computation, a dot for each trained seed."""
    names = [row for row in ROWS if any(line.row == row for found in panels.values() for line in found)]
    width, height = LEFT + len(panels) * (WIDTH + 30), TOP + ROW * len(names) + 34
    parts = [f'<rect class="sheet" width="{width}" height="{height}"/>']
    for i, name in enumerate(names):
        parts.append(f'<text x="{LEFT - 14}" y="{TOP + ROW * i + 15}" text-anchor="end">{escape(name)}</text>')
    for k, (title, found) in enumerate(panels.items()):
        parts += _panel(LEFT + k * (WIDTH + 30), title, found, names)
    note = "bar: right · tick: computed end · dots: trained, by seed; at the left edge: below"
    parts.append(f'<text class="small" x="{LEFT}" y="{height - 6}">{note}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
    return f"{head}<style>{STYLE}</style>{''.join(parts)}</svg>\n"


def _panel(left: int, title: str, found: Sequence[Line], names: Sequence[str]) -> list[str]:
    def at(score: float) -> float:
        return left + WIDTH * (min(max(score, LOW), HIGH) - LOW) / (HIGH - LOW)

    bottom = TOP + ROW * len(names)
    parts = [f'<text class="heading" x="{left}" y="18">{escape(title)}</text>']
    for tick in (0.2, 0.4, 0.6, 0.8, 1.0):
        parts.append(f'<line class="grid" x1="{at(tick):.1f}" x2="{at(tick):.1f}" y1="{TOP - 4}" y2="{bottom}"/>')
        parts.append(f'<text class="small" x="{at(tick):.1f}" y="{TOP - 9}" text-anchor="middle">{tick:g}</text>')
    for line in found:
        y = TOP + ROW * names.index(line.row)
        if line.band is not None:
            span = at(line.band[1]) - at(line.band[0])
            parts.append(
                f'<rect class="band" x="{at(line.band[0]):.1f}" y="{y + 4}" width="{max(span, 1):.1f}" height="14"/>'
            )
        if line.end is not None:
            parts.append(
                f'<line class="end" x1="{at(line.end):.1f}" x2="{at(line.end):.1f}" y1="{y + 3}" y2="{y + 19}"/>'
            )
        for seed, run in enumerate(line.seeds):
            style = ' class="other"' if seed % 2 else ""
            parts.append(f'<circle{style} cx="{at(run["share"]):.1f}" cy="{y + 11}" r="3.6"/>')
    return parts


def of_mutants(beta: float) -> list[str]:
    """Markdown: which of the two exact tests sees which fault, measured now."""
    world = enumerable.world(1)
    rows = ["| fault | (a) at π*: ‖g‖/‖g(π_ref)‖ | (b) 1 − cos | (b) length | seen by |", "|---|---|---|---|---|"]
    for name, mutant in mutants.MUTANTS.items():
        seen = mutants.judge(mutant, world, beta)
        by = " and ".join(x for x, on in (("(a)", seen.seen_at_best), ("(b)", seen.seen_elsewhere)) if on)
        rows.append(f"| {name} | {seen.at_best:.1e} | {seen.apart:.1e} | {seen.length:.4f} | {by or '–'} |")
    for name in mutants.PAIR_MUTANTS:
        left = mutants.judge_pairs(name, world, beta)
        rows.append(f"| DPO: {name} | {left:.1e} | | | {'(a)' if left > mutants.ZERO else '–'} |")
    return rows


INTRODUCTION = """# Every method against the exact optimum

    python -m bench.optimum              # measures what is missing, writes this page
    python -m bench.optimum rloo dpo     # these rows
    python -m pytest tests/gates         # the laws and mutants below, and two trained gates

A world of 4 prompts with 1,555 answers each (`palate.worlds.enumerable`), so that the best policy at a price β of KL,
π* ∝ π_ref·exp(r/β), is known by enumeration. The policy is a GPT-2 of 26,176 weights, the reference the same network; a
row is a real palate stage from model folder to model folder, judged over all answers.

**Score** = (J − J(π_ref)) / (J* − J(π_ref)), J = E[r] − β·KL(π‖π_ref): 0 for the reference, 1 for π*. In other words it
is 1 − β·KL(π‖π*) / (J* − J(π_ref)), so the table shows KL(π*‖π) beside it: what π* says and the policy has lost.
A biased method is right when it ends at *its own* fixed point, computed from its formulas for tabular policies, groups
of 8 and endless data: a GRPO with a k3 loss that scored .99 would not be that method. Scores of different methods are
no ranking: rates were set by family, not tuned by method. β = .5 discriminates; at .1 even the collapse to one
answer scores .884.

Online: 40,960 answers, 160 rollouts of 256, two passes of two minibatches, Adam (.9, .99), rate 3e-3 falling linearly
to 0 (REINFORCE++ 1e-3, online DPO 3e-4), gradient norm 1. Offline: 20,000 pairs by the reference with Bradley–Terry
labels, 640 batches of 256, AdamW, rate 1e-3, 20 steps of warm-up, linear decay. Best of n: 8 passes over one rollout of
the reference, {n5} answers a prompt at β = .5, {n1} at .1, on 10,240 and 2,560 kept answers. † is a shorter run of
400 batches; ✗ lies outside. The exact gradient through the same network reaches .996 (β = .5) and .999 (.1): more is
not to be had.
"""

LAWS = """
## Two laws, exact

In float64, with a tabular policy and every answer as heavy as it is likely, the pages themselves (`prepare` and `loss`)
have an expected gradient without noise. **(a)** At the optimum it is zero. **(b)** At a random policy it is −∇J, in
direction and length. `tests/gates/test_gradient_laws.py` asks both of every method whose optimum is known, in seconds:

- (a) and (b): RLOO with either ratio, PPO at λ = 1 with any values (and at any λ with the true ones), REINFORCE, ReMax,
  Dr. GRPO and GRPO without scaling with the KL in the reward, CISPO.
- (a), and (b) in direction: the same with advantages normalised or whitened over the batch, REINFORCE++.
- (a) alone: GRPO scaled by its group's spread, averaged by answer, GSPO; DPO with hard or soft labels, on anyone's
  pairs; robust DPO under the flips it assumes; f-DPO at the optimum of its divergence; IPO, summed and averaged, at its
  bounded utility; length-normalised DPO, CPO and SimPO without margin at laws of their own; fine-tuning at its data's.
- Biased by a known amount (what is left at π*, β = .5): KL as a loss k2 and k3·ratio .21, k3 .39, k1 .53 (it is no KL
  at all), k3 beside a scaled reward .75, k2 in the reward .38; cDPO .26; hinge .14; KTO .49.
- REINFORCE++ with a group baseline ends at β·k/(k − 1): an answer counts in the mean that is taken off it, the KL does
  not. So do GRPO and Dr. GRPO with KL as a loss.

## Faults, and what sees them

One thing changed around a page, β = .5. (a) cannot see a wrong mask of the loss, since every advantage is 0 at π*: (b)
does.

"""


def page(known: Measured, betas: Sequence[float], worlds: Sequence[int], seeds: Sequence[int]) -> str:
    """All of bench/optimum.md."""
    parts = [INTRODUCTION.format(n5=best_n(0.5), n1=best_n(0.1)), "![scores](../docs/img/optimum.svg)", ""]
    for world in worlds:
        for beta in betas:
            found = lines(known, world, beta, seeds)
            if found:
                where = "bands set beforehand" if world == 1 else "bands around its own computed ends"
                parts += [f"## World {world}, β = {beta:g}", "", f"({where}; – is not known.)", "", *table(found), ""]
    return "\n".join([*parts, LAWS.strip("\n"), "", *of_mutants(0.5), "", *peers(known)])


def peers(known: Measured) -> list[str]:
    """Markdown: TRL's rows beside ours, where they were measured."""
    theirs = {name: run for name, run in known.items() if name.startswith("trl | ")}
    if not theirs:
        return []
    rows = [
        "## TRL 1.16 on the same world",
        "",
        "    peers/bin/python bench/optimum_trl.py    # its environment: trl 1.16, torch 2.13, transformers 5.23",
        "",
        "Same model folder, data, budget and rates, β = .5, one seed. Where the objective is the same, scores agree.",
        "TRL divides by the sample's deviation of a group (n − 1), palate by the population's: with groups of 8 that",
        "alone moves the computed end of GRPO with k3 from .766 to .795.",
        "",
        "| TRL | score | KL(π*‖π) | wall s | ours | score | wall s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, run in theirs.items():
        _, theirs_name, row = name.split(" | ")
        mine = known.get(name_of(row, 1, 0.5, 1))
        ours = f"{mine['share']:.4f} | {mine['seconds']:.0f}" if mine else "– | –"
        cells = f"{run['share']:.4f} | {run['kl_from_best']:.3f} | {run['seconds']:.0f}"
        rows.append(f"| {theirs_name} | {cells} | {row} | {ours} |")
    return [*rows, ""]
