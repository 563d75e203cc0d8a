"""Saving: folders that transformers, vLLM and PEFT users open as they are."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, GenerationConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from palate.checkpoint import sync_file, sync_folder, system_faults
from palate.models import peft_format
from palate.models.heads import Head, ScalarHead
from palate.models.load import ACTING_FOLDER, ACTING_NOTE, ACTING_WEIGHTS, HEAD_NOTE, HEAD_WEIGHTS, quiet
from palate.models.lora import bare_state
from palate.models.tokenizer import Tokenizer
from palate.models.trunk import Trunk
from palate.parallel import World

_EMPTY: Mapping[str, Any] = {}
_NO_HEADS: Mapping[str, Head] = {}


@dataclass(frozen=True)
class Card:
    """What a reader of the model should know; becomes README.md.

    `data` maps each data set to its hash, `settings` is the stage as it was resolved, `metrics` its last numbers.
    """

    title: str
    base: str
    made_by: str = ""
    data: Mapping[str, str] = field(default_factory=lambda: _EMPTY)
    settings: Mapping[str, Any] = field(default_factory=lambda: _EMPTY)
    metrics: Mapping[str, float] = field(default_factory=lambda: _EMPTY)


def save(
    folder: Path,
    trunk: Trunk,
    tokenizer: Tokenizer,
    card: Card,
    head: ScalarHead | None = None,
    adapter: str | None = None,
    world: World | None = None,
    heads: Mapping[str, Head] = _NO_HEADS,
) -> None:
    """Write a model folder, whole or not at all: under a temporary name first, durable, then renamed.

    Without a head: a causal language model, with the values of its actions in `heads/` where there are `heads`. With
    a head: a reward model, which `palate.models.load` reads exactly and AutoModelForSequenceClassification reads where
    the family has that class (gain folded into the score, the bias kept beside it). With an adapter: its weights
    merged, and the adapter itself in `adapter/` in PEFT's format.

    In a world of several ranks each has to call it: sharded weights come together here, and rank 0 writes.
    """
    state = bare_state(trunk.model, adapter)
    adapted = peft_format.adapter_tensors(trunk.model, adapter) if adapter is not None else {}
    with system_faults(folder):
        (world or World()).first(lambda: _write(folder, trunk, tokenizer, card, head, state, (adapter, adapted), heads))


def _write(
    folder: Path,
    trunk: Trunk,
    tokenizer: Tokenizer,
    card: Card,
    head: ScalarHead | None,
    state: dict[str, Tensor],
    adapter: tuple[str | None, dict[str, Tensor]],
    heads: Mapping[str, Head],
) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with quiet():
        if head is None:
            _save_speaker(partial, trunk, tokenizer, state)
        else:
            _save_judge(partial, trunk, tokenizer, head, state)
    if heads:
        save_acting(partial, heads)
    name, tensors = adapter
    if name is not None:
        task = "CAUSAL_LM" if head is None else "FEATURE_EXTRACTION"
        peft_format.save_adapter(trunk.model, name, partial / "adapter", card.base, task, tensors)
    tokenizer.save(partial)
    (partial / "README.md").write_text(_readme(card, trunk, head), encoding="utf-8")
    for file in sorted(f for f in partial.rglob("*") if f.is_file()):
        sync_file(file)
    _swap(partial, folder)


def _swap(partial: Path, folder: Path) -> None:
    """Rename into place; an older folder of that name is moved aside first and then deleted."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _save_speaker(folder: Path, trunk: Trunk, tokenizer: Tokenizer, state: dict[str, Tensor]) -> None:
    model = trunk.model
    model.generation_config = _generation(model, tokenizer)
    model.save_pretrained(folder, state_dict=state)


def _generation(model: PreTrainedModel, tokenizer: Tokenizer) -> GenerationConfig:
    """Stop at the tokenizer's end and at whatever ended the base model's answers (`<|eot_id|>` and its like)."""
    before: Any = getattr(model.generation_config, "eos_token_id", None)
    ends = [tokenizer.end, *([before] if isinstance(before, int) else before or [])]
    known = list(dict.fromkeys(int(i) for i in ends if i < tokenizer.size))
    return GenerationConfig(
        bos_token_id=tokenizer.bos,
        eos_token_id=known[0] if len(known) == 1 else known,
        pad_token_id=tokenizer.pad,
        do_sample=True,
    )


def _save_judge(folder: Path, trunk: Trunk, tokenizer: Tokenizer, head: ScalarHead, weights: dict[str, Tensor]) -> None:
    base = trunk.base
    inside = f"{base.base_model_prefix}." if trunk.model is not base else ""
    state = {k.removeprefix(inside): v for k, v in weights.items() if k.startswith(inside)}
    if head.kind == "linear" and trunk.causal and trunk.family in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        _save_classifier(folder, base, state, head, tokenizer)
    else:
        base.save_pretrained(folder, state_dict=state)
    save_head(folder, head)


def save_head(folder: Path, head: ScalarHead) -> None:
    """Write the head beside a trunk's files, as `palate.models.load.load_head` reads it."""
    save_file({k: v.detach().cpu().contiguous() for k, v in head.state_dict().items()}, folder / HEAD_WEIGHTS)
    note = {
        "role": "reward",
        "head": head.kind,
        "trained": head.trained,
        "gain": float(head.gain.detach()),
        "bias": float(head.bias.detach()),
        "reads": "the last real token: score = gain * head(hidden) + bias",
    }
    (folder / HEAD_NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def save_acting(folder: Path, heads: Mapping[str, Head]) -> None:
    """Write the heads beside a policy, by role, as `palate.models.load.load_acting` reads them."""
    inside = folder / ACTING_FOLDER
    inside.mkdir()
    tensors = {
        f"{role}.{k}": v.detach().cpu().contiguous() for role, h in heads.items() for k, v in h.state_dict().items()
    }
    save_file(tensors, inside / ACTING_WEIGHTS)
    notes = {r: {"head": h.kind} if isinstance(h, ScalarHead) else {"tokens": h.tokens} for r, h in heads.items()}
    (inside / ACTING_NOTE).write_text(json.dumps(notes, indent=2) + "\n", encoding="utf-8")


def _save_classifier(
    folder: Path, base: PreTrainedModel, state: dict[str, Tensor], head: ScalarHead, tokenizer: Tokenizer
) -> None:
    """The family's sequence classifier around our trunk. It is built without memory: only its names are needed."""
    config: Any = type(base.config).from_dict(base.config.to_dict())
    config.num_labels, config.pad_token_id = 1, tokenizer.pad
    with torch.device("meta"):
        shell: Any = AutoModelForSequenceClassification.from_config(config)
    score = cast(nn.Linear, shell.score)
    tensors = {f"{shell.base_model_prefix}.{name}": value for name, value in state.items()}
    tensors["score.weight"] = (head.last.weight.detach() * head.gain.detach()).to(next(iter(state.values())).dtype)
    for _ in (name for name, _ in score.named_parameters() if name == "bias"):
        tensors["score.bias"] = head.last.bias.detach() * head.gain.detach() + head.bias.detach()
    shell.save_pretrained(folder, state_dict=tensors)


def _readme(card: Card, trunk: Trunk, head: ScalarHead | None) -> str:
    """The model card, with the header that the hub reads."""
    kind = "text-generation" if head is None else "text-classification"
    lines = ["---", f"base_model: {json.dumps(card.base)}", "library_name: transformers", f"pipeline_tag: {kind}"]
    lines += ["tags: [palate]", "---", "", f"# {card.title}", ""]
    role = "language model" if head is None else "reward model"
    size = sum(p.numel() for p in trunk.base.parameters())
    lines += [f"A {trunk.family} {role} of {size:,} parameters, trained with palate from `{card.base}`. {card.made_by}"]
    if head is not None:
        lines += [
            "",
            f"Score = {float(head.gain.detach()):.6g} × head(last token) + {float(head.bias.detach()):.6g}.",
            "",
        ]
        lines += ["`palate` reads it exactly; transformers' sequence classifier gives the score without the bias."]
    lines += _table("Data", ("data set", "hash"), card.data)
    lines += _table("Metrics", ("metric", "value"), {k: f"{v:.6g}" for k, v in card.metrics.items()})
    if card.settings:
        lines += ["", "## Settings", "", "```json", json.dumps(card.settings, indent=2, default=str), "```"]
    return "\n".join(lines) + "\n"


def _table(title: str, columns: tuple[str, str], rows: Mapping[str, str]) -> list[str]:
    if not rows:
        return []
    body = [f"| {name} | {value} |" for name, value in rows.items()]
    return ["", f"## {title}", "", f"| {columns[0]} | {columns[1]} |", "|---|---|", *body]
