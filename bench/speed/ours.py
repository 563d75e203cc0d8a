"""palate's worker: a real stage, step by step. `python -m bench.speed.ours ROW.json`.

The loops are those that `palate run` goes through, with their publications, checks and logs; only the data are put in
as token ids, in the order that the peer gets them.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.speed import gpu
from bench.speed.protocol import Link, Report, serve
from bench.speed.workloads import CLIP_NORM, ONLINE, Work, given_counts
from palate.data.encode import PromptRow, RankedRow, TokenRow
from palate.data.encode_pairs import LabelRow, PairRow
from palate.engines.engine import Sampling
from palate.engines.local import LocalEngine
from palate.live import Display
from palate.models.load import Loading, load
from palate.parallel import World
from palate.randomness import key
from palate.records import Demonstration, Ranking
from palate.settings import build
from palate.stages import online, train
from palate.stopping import Stopper
from palate.workspace import Workspace

ENDLESS = 10**8
"""Steps that are never reached: nothing is saved or measured beside the steps themselves."""
SEED = 1
ALGORITHMS: dict[str, dict[str, Any]] = {
    "ppo": {"kind": "ppo", "num_ppo_epochs": 4, "num_mini_batches": 4, "old_logprobs": "sampled"},
    "grpo": {"kind": "grpo", "num_generations": 8, "beta": 0.0, "old_logprobs": "sampled"},
    "rloo": {"kind": "rloo", "num_generations": 8, "kl_coef": 0.05, "old_logprobs": "sampled"},
    "sft": {"kind": "sft"},
    "reward": {"kind": "reward"},
    "dpo": {"kind": "dpo", "beta": 0.1},
    "kto": {"kind": "kto", "beta": 0.1},
    "orpo": {"kind": "orpo", "beta": 0.1},
}
"""The peers' own settings: TRL's GRPO has no KL, its RLOO has. Old log-probabilities are the sampler's own, as in TRL's
PPO; TRL's RLOO reads its answers once more for them, which changes no number by more than rounding."""


class InOrder:
    """Batches in the order of the data, over and over, as the peer reads them."""

    def __init__(self, work: Work) -> None:
        self.work, self.per_epoch = work, ENDLESS

    def batch(self, number: int) -> list[int]:
        """The rows of step `number` (from 0), the last first where the row's note says so."""
        rows = list(self.work.batch(number))
        return rows[::-1] if self.work.row.kind == "kto" else rows


def workspace(folder: Path, name: str) -> Workspace:
    """A stage's place without a run around it."""
    world = World()
    return Workspace(folder, name, SEED, {}, world, Display(quiet=True), {}, {}, stopper=Stopper(world))


def stage_of(work: Work, folder: Path) -> Any:
    """The row as a stage's settings."""
    row = work.row
    moves = {"learning_rate": row.learning_rate, "schedule": "constant", "eps": 1e-8}
    moves |= {} if row.kind == "ppo" else {"max_grad_norm": CLIP_NORM}
    algorithm = ALGORITHMS[row.kind]
    given: dict[str, Any] = {"algorithm": algorithm, "optimiser": moves, "layout": dict(row.layout)}
    loading = {"device": row.device} | ({"compute": "bfloat16"} if row.precision == "bfloat16" else {})
    given |= {"save_steps": ENDLESS, "loading": loading}
    nothing = folder / "none.jsonl"
    nothing.write_text('{"prompt": "a", "completion": "b"}\n' * row.batch, encoding="utf-8")
    if row.kind not in ONLINE:
        model = work.reward if row.kind == "reward" else work.policy
        sizes = {"batch_size": row.batch, "max_steps": ENDLESS}
        return build("stages", {"kind": "train", "model": model, "data": str(nothing), **sizes, **given}, "stage")
    judged = {"kind": "model", "model": work.reward, "loading": loading}
    counted = {"kind": "function", "function": distinct}
    sampling = {"max_new_tokens": row.answer[1], "fixed_length": row.kind == "ppo" and not row.ends}
    given |= {
        "model": work.policy,
        "reward": judged if row.kind == "ppo" else counted,
        "prompts": str(nothing),
        "sampling": sampling,
        "rollout_batch_size": row.batch,
        "total_episodes": ENDLESS * row.batch,
        "sample_steps": ENDLESS,
    }
    if row.kind == "ppo" and row.layout["kind"] == "separate":
        given["value_model"] = work.value
    return build("stages", {"kind": "online", **given}, "stage")


def distinct(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """A reward in no time: how many different characters an answer has."""
    return [float(len(set(text))) for text in completions]


class Clock:
    """Seconds spent inside some methods of an object during one turn, and what one of them returned last."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last: dict[str, Any] = {}

    def around(self, owner: Any, method: str, name: str) -> None:
        """Time a method of this one object."""
        call: Callable[..., Any] = getattr(owner, method)

        def timed(*given: Any, **named: Any) -> Any:
            began = time.perf_counter()
            self.last[name] = call(*given, **named)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
            return self.last[name]

        setattr(owner, method, timed)

    def read(self) -> dict[str, float]:
        """What was counted, from 0 again."""
        found, self.seconds = self.seconds, {}
        return found


def online_turns(work: Work, folder: Path) -> Callable[[int], Report]:
    """A turn is a whole iteration of the online loop: publish, draw, score, prepare, all its updates, log."""
    loop = online._Loop(stage_of(work, folder), workspace(folder, "speed"), 1.0)
    texts = work.data["texts"]
    loop.prompts = [PromptRow(ids, f"{i}", texts[i], {}, texts[i]) for i, ids in enumerate(work.data["prompts"])]
    loop.order = InOrder(work)  # type: ignore[assignment]
    clock = Clock()
    clock.around(loop.engine, "generate", "generate")
    clock.around(loop, "_learn", "train")

    def turn(number: int) -> Report:
        began = time.perf_counter()
        seen = loop._iteration(number + 1)
        seconds, parts = time.perf_counter() - began, clock.read()
        parts["score"] = seconds - sum(parts.values())
        rollouts = clock.last["generate"]
        drawn = int(rollouts.action_BT.sum())
        counts = {"asked": int(rollouts.real_BT.sum()) - drawn, "drawn": drawn}
        return {"parts": parts, "counts": counts, "loss": seen.get("loss/policy_avg")}

    return turn


def given_rows(work: Work) -> list[Any]:
    """The row's data as the loop's own token rows."""
    data, kind = work.data, work.row.kind

    def joined(i: int, name: str) -> TokenRow:
        prompt, answer = data["prompts"][i], data[name][i]
        return TokenRow([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))

    if kind == "sft":
        return [TokenRow(ids, [False] + [True] * (len(ids) - 1)) for ids in data["sequences"]]
    count = range(len(data["prompts"]))
    if kind == "kto":
        return [LabelRow(joined(i, "completions"), data["labels"][i]) for i in count]
    pairs = [(joined(i, "chosen"), joined(i, "rejected")) for i in count]
    if kind == "reward":
        return [RankedRow(f"{i}", list(pair), [0, 1], None) for i, pair in enumerate(pairs)]
    return [PairRow(*pair) for pair in pairs]


def offline_turns(work: Work, folder: Path) -> Callable[[int], Report]:
    """A turn is one step of the loop over data at rest."""
    row, stage = work.row, stage_of(work, folder)
    told = [Demonstration(f"a {i}", completion=" b") for i in range(row.batch)]
    ranked = [Ranking(f"a {i}", completions=(" b", " c"), ranks=(0, 1)) for i in range(row.batch)]
    here = workspace(folder, "speed")
    loop = train._Training(stage, here, (told if row.kind == "sft" else ranked, []), 1.0)
    loop.rows, loop.order = given_rows(work), InOrder(work)  # type: ignore[assignment]

    def turn(number: int) -> Report:
        seen = loop._step(number + 1)
        found = {"counts": given_counts(work, number), "loss": seen["loss"]}
        return found | {name: seen[name] for name in ("log_odds_ratio",) if name in seen}

    return turn


def generating_turns(work: Work, folder: Path) -> Callable[[int], Report]:
    """A turn is one call of the local engine."""
    loaded = load(work.policy, how=Loading(device=work.row.device, dtype=work.row.precision))
    sampling = Sampling(max_new_tokens=work.row.answer[1], fixed_length=True)
    engine = LocalEngine(loaded.trunk, loaded.tokenizer, sampling, batch_size=work.row.batch)

    def turn(number: int) -> Report:
        prompts = [work.data["prompts"][i] for i in work.batch(number)]
        rollouts = engine.generate(prompts, [key(SEED, number, i) for i in range(len(prompts))])
        drawn = int(rollouts.action_BT.sum())
        return {"counts": {"asked": int(rollouts.real_BT.sum()) - drawn, "drawn": drawn}}

    return turn


def turns_of(work: Work, folder: Path) -> Callable[[int], Report]:
    """What a turn of this row is."""
    if work.row.kind == "generate":
        return generating_turns(work, folder)
    return online_turns(work, folder) if work.row.kind in ONLINE else offline_turns(work, folder)


def main(path: str) -> None:
    """Load, say so, take turns."""
    link = Link()
    torch.set_num_threads(2)
    work = Work.read(Path(path))
    gpu.watch(link, work.row)
    with tempfile.TemporaryDirectory() as folder:
        turn = turns_of(work, Path(folder))
        link.ready(palate=version("palate"), torch=torch.__version__, transformers=version("transformers"))
        serve(link, turn)


if __name__ == "__main__":
    main(sys.argv[1])
