"""A data set or a model on its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palate.cast import Cast, Seat
from palate.check import examples, memory
from palate.check.found import Example, Memory, ModelFound
from palate.data.check import Report, check, read_all
from palate.data.encode import Encoding, PromptRow, RankedRow, TokenRow, encode_demonstrations, encode_prompts
from palate.data.encode import encode_rankings as rank
from palate.data.segments import turn_ending
from palate.data.source import Data
from palate.engines.engine import Sampling
from palate.engines.local import LocalEngine
from palate.models import peft_format
from palate.models.load import Loaded, load
from palate.models.tokenizer import PLAIN_TEMPLATE, Tokenizer
from palate.records import Demonstration, Ranking, Record
from palate.settings import PalateError

_SHOWN = 2
_GREETING = "Hello"
_SAID = 24
_CACHED = 1000


@dataclass(frozen=True)
class DataFound:
    """A data set on its own: what `palate data check` counts, and rows as a model's tokenizer lays them out."""

    report: Report
    examples: tuple[Example, ...]
    faults: tuple[str, ...] = ()


def check_data(data: Data, model: str | None, encoding: Encoding) -> DataFound:
    """What is in a source. With `model` its tokenizer counts, and rows are shown as they would be trained on.

    Raises PalateError when nothing can be read, or the model's tokenizer cannot be opened.
    """
    tokenizer = load(model, "trunk").tokenizer if model is not None else None
    reading = read_all(data)
    source = reading.part.path
    report = check(reading.records, tokenizer, encoding.max_length, source, reading)
    faults = [row.message for row in reading.bad] + ([str(reading.broken)] if reading.broken else [])
    shown: list[Example] = []
    if tokenizer is not None:
        try:
            shown = _rows(reading.records, tokenizer, encoding)
        except PalateError as fault:
            faults.append(f"{source}: {fault}")
    return DataFound(report, tuple(shown), tuple(faults))


def _rows(records: Sequence[Record], tokenizer: Tokenizer, encoding: Encoding) -> list[Example]:
    """The first records as their kind is laid out: as demonstration, as ranking, or as a prompt to answer."""
    first = list(records[:_SHOWN])
    if isinstance(first[0], Ranking):
        return [e for n, row in enumerate(rank(first, tokenizer, encoding).rows, 1) for e in _ranked(n, row, tokenizer)]
    if isinstance(first[0], Demonstration):
        rows = encode_demonstrations(first, tokenizer, encoding).rows
        return [_demonstrated(n, row, tokenizer) for n, row in enumerate(rows, 1)]
    return [_asked(n, row, tokenizer) for n, row in enumerate(encode_prompts(first, tokenizer, encoding).rows, 1)]


def _ranked(number: int, row: RankedRow, tokenizer: Tokenizer) -> list[Example]:
    width = max(len(one.tokens) for one in row.rows)
    return examples.ranked_row(f"record {number}", row, tokenizer, width)


def _demonstrated(number: int, row: TokenRow, tokenizer: Tokenizer) -> Example:
    return examples.token_row(f"record {number}", row, tokenizer, len(row.tokens))


def _asked(number: int, row: PromptRow, tokenizer: Tokenizer) -> Example:
    return examples.example(f"record {number}, a prompt", row.tokens, [False] * len(row.tokens), tokenizer)


def check_model(model: str) -> ModelFound:
    """What a model folder or hub id is and can do. Raises PalateError where it cannot be loaded."""
    loaded = load(model, "trunk")
    trunk, tokenizer = loaded.trunk, loaded.tokenizer
    speaks = trunk.causal and trunk.speaks and loaded.head is None
    facts: dict[str, Any] = {
        "family": trunk.family,
        "parameters": sum(p.numel() for p in trunk.parameters()),
        "dtype": str(trunk.dtype).removeprefix("torch."),
        "width": trunk.width,
        "context": trunk.context,
        "vocabulary": tokenizer.size,
        "causal": trunk.causal,
        "language-model head": trunk.speaks,
        "reward head": "none" if loaded.head is None else "trained" if loaded.head.trained else "untrained",
        "adapter": _is_adapter(model),
        "chat template": "its own" if tokenizer.inner.chat_template != PLAIN_TEMPLATE else "none; palate's plain one",
        "ends a turn with": repr(turn_ending(tokenizer)[0]),
        "can be": ", ".join(_uses(loaded, speaks)),
    }
    return ModelFound(model, facts, _memory(loaded), _special(tokenizer), _sample(loaded, speaks), _warnings(loaded))


def _is_adapter(model: str) -> str:
    folder = Path(model).expanduser()
    if not (folder / peft_format.CONFIG).exists():
        return "none"
    base = peft_format.read_config(folder).get("base_model_name_or_path")
    return f"LoRA on {base}, merged on loading"


def _uses(loaded: Loaded, speaks: bool) -> list[str]:
    found = ["policy"] if speaks and loaded.tokenizer.eos is not None else []
    found += ["start of a reward model"]
    found += ["reward"] if loaded.head is not None and loaded.head.trained else []
    return found


def _memory(loaded: Loaded) -> Memory:
    """What training the whole model would hold, before any activation."""
    role = "policy" if loaded.head is None else "reward"
    cast = Cast({role: Seat(loaded.trunk, None, loaded.head)})
    loaded.trunk.requires_grad_(True)
    parameters, held = memory.of_cast(cast, (role,))
    if loaded.trunk.caches:
        held["keys and values"] = _CACHED * memory.cache_bytes(loaded.trunk)
    basis = f"counted for training every weight with Adam, and {_CACHED:,} tokens written; activations come on top"
    return memory.memory(parameters, held, basis)


def _special(tokenizer: Tokenizer) -> dict[str, str]:
    ids = {"begin": tokenizer.bos, "end": tokenizer.eos, "padding": tokenizer.pad}
    return {
        name: "none" if i is None else f"{examples.visible(tokenizer.decode([i], False))} ({i})"
        for name, i in ids.items()
    }


def _sample(loaded: Loaded, speaks: bool) -> Example | None:
    """A greedy answer, so that a broken model shows."""
    if not speaks or loaded.tokenizer.eos is None:
        return None
    engine = LocalEngine(loaded.trunk, loaded.tokenizer, Sampling(max_new_tokens=_SAID))
    ids = encode_prompts([Demonstration(_GREETING)], loaded.tokenizer, Encoding()).rows[0].tokens
    said = engine.generate([ids], [0], greedy=True)
    return examples.example("greedy", said.tokens_BT[0].tolist(), said.action_BT[0].tolist(), loaded.tokenizer)


def _warnings(loaded: Loaded) -> tuple[str, ...]:
    found: list[str] = []
    if loaded.tokenizer.eos is None:
        found.append("the tokenizer has no end token: as a policy it could not stop. Name one with loading.end_token.")
    if loaded.head is not None and not loaded.head.trained:
        found.append("its reward head was never trained: its scores would be noise.")
    if not loaded.trunk.causal:
        found.append("it reads both ways: it can be a reward model, not a policy (unless make_causal: true).")
    return tuple(found)
