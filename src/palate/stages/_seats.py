"""Who speaks in a stage: models opened, roles seated, rewards at hand, the result saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from pydantic import BeforeValidator, SerializeAsAny

from palate.algorithms.protocol import Offline, Online, Warns
from palate.cast import Cast, Layout, assemble
from palate.cutting import FROZEN, Microbatch
from palate.data.segments import stop_tokens
from palate.engines.engine import Sampling
from palate.engines.local import LocalEngine
from palate.engines.steering import Steer
from palate.evidence import digest
from palate.models import load as loading
from palate.models.heads import ScalarHead
from palate.models.load import Loaded, Loading, Use
from palate.models.make import Make, make
from palate.models.save import Card, save
from palate.models.tokenizer import Tokenizer
from palate.randomness import key
from palate.records import Record
from palate.rewards.reward import Scorer, resolve
from palate.settings import Choice, PalateError, build
from palate.workspace import Workspace, named_stages

T = TypeVar("T")


def as_value_error(ask: Callable[[], T]) -> T:
    """What `ask` returns; its PalateError becomes a ValueError, to which pydantic adds the place of the setting."""
    try:
        return ask()
    except PalateError as fault:
        raise ValueError(str(fault).lstrip(": .")) from None


def _algorithm(given: Any) -> Any:
    if not isinstance(given, Mapping):
        return given
    return as_value_error(lambda: build("algorithms", cast(Mapping[str, Any], given)))


AnyAlgorithm = Annotated[SerializeAsAny[Choice], BeforeValidator(_algorithm)]
"""The type of a setting that holds an algorithm of any kind."""


def references(*models: Any) -> list[str]:
    """The earlier stages named among some models."""
    return named_stages(model for model in models if isinstance(model, str))


def files(*models: Any) -> list[str]:
    """The files of local model folders, whose content counts for the stage cache."""
    folders = [Path(m).expanduser() for m in models if isinstance(m, str) and not m.startswith("stage:")]
    return [str(f) for folder in folders if folder.is_dir() for f in sorted(folder.glob("*")) if f.is_file()]


def judges(*rewards: Any) -> list[str]:
    """The models named inside rewards, those of mixtures included."""
    found: list[str] = []
    for reward in rewards:
        model = getattr(reward, "model", None)
        found += [model] if isinstance(model, str) else []
        found += judges(*getattr(reward, "rewards", ()))
    return found


def open_model(model: str | Make, here: Workspace, role: str, how: Loading, texts: Iterable[str] = ()) -> Loaded:
    """The model a stage starts from; `role` decides what it must be able to do."""
    if isinstance(model, Make):
        return make(model, texts, key(here.seed, "make", here.name), how)
    uses: Mapping[str, Use] = {"policy": "policy", "value": "reward", "reward": "trunk"}
    return loading.load(here.resolve(model), uses[role], how)


def at_hand(asked: Scorer | None, here: Workspace) -> Scorer | None:
    """A reward whose `stage:NAME` models are the folders those stages left."""
    return None if asked is None else resolve(asked, lambda name: Path(here.resolve(name)))


def engine(
    cast: Cast, tokenizer: Tokenizer, sampling: Sampling, records: Sequence[Record], steer: Steer | None = None
) -> LocalEngine:
    """The engine that speaks for the policy; conversations also end at the chat template's end of turn.

    Where the value reads what the policy reads, it speaks beside it.
    """
    if any(not isinstance(r.prompt, str) for r in records) and not sampling.fixed_length:
        ends = tuple(i for i in stop_tokens(tokenizer) if i != tokenizer.eos)
        sampling = sampling.model_copy(update={"stop_token_ids": (*sampling.stop_token_ids, *ends)})
    seat = cast.roles["policy"]
    value = cast.seat("value").head if "value" in cast.roles and cast.together("policy", "value") else None
    beside = value if isinstance(value, ScalarHead) else None
    return LocalEngine(seat.trunk, tokenizer, sampling, seat.adapter, world=cast.world, steer=steer, value=beside)


def offline_cast(
    loaded: Loaded,
    layout: Layout,
    algorithm: Offline,
    counter: int,
    here: Workspace,
    without: Sequence[str] = (),
    tokens: int | None = None,
) -> Cast:
    """Who learns from data at rest, and who else it takes, except for `without`: roles whose words are known.

    `tokens` are those of a micro-batch, where the stage sets them.
    """
    roles = [role for role in _roles(algorithm) if role not in without]
    return _budgeted(assemble(layout, loaded, roles, counter, world=here.world), tokens, here)


def online_cast(
    loaded: Loaded,
    value: Loaded | None,
    layout: Layout,
    algorithm: Online,
    counter: int,
    here: Workspace,
    tokens: int | None = None,
) -> Cast:
    """The policy, its frozen start as the reference where one is needed, and whoever else trains.

    Tells the user what the algorithm has to say of its settings. `tokens` as in `offline_cast`.
    """
    for text in algorithm.warnings() if isinstance(algorithm, Warns) else ():
        here.warn(f"algorithm: {text}")
    return _budgeted(assemble(layout, loaded, _roles(algorithm), counter, value, here.world), tokens, here)


def _budgeted(cast: Cast, tokens: int | None, here: Workspace) -> Cast:
    """The cast, its budget the one asked for or that of rank 0: ranks have to cut a batch alike."""
    cast.budget = here.world.first(lambda: FROZEN * tokens if tokens else cast.budget)
    return cast


def microbatch(stage: Any, afforded: int) -> Microbatch:
    """What a stage takes through its models at a time: what it sets, or else `afforded` tokens."""
    rows, tokens = stage.microbatch_size, stage.tokens_per_microbatch
    return Microbatch(rows, tokens or (None if rows else afforded))


def _roles(algorithm: Offline | Online) -> tuple[str, ...]:
    first, *others = algorithm.trains
    return tuple(dict.fromkeys((first, *algorithm.needs, *others, *algorithm.moves)))


def keep(
    here: Workspace,
    cast: Cast,
    loaded: Loaded,
    role: str,
    stage: Choice,
    sources: Sequence[str],
    metrics: Mapping[str, float],
) -> None:
    """Save the model of `role` as `model/` in the stage's folder, with a card that says where it comes from.

    Values of actions that were learnt beside a policy are saved with it.
    """
    seat = cast.seat(role)
    head = seat.head if isinstance(seat.head, ScalarHead) else None
    if head is not None:
        head.trained = True
    card = Card(
        title=f"{here.folder.parent.name}: {here.name}",
        base=loaded.source,
        data={Path(f).name: digest(Path(f)) for f in sources},
        settings=stage.model_dump(mode="json"),
        metrics=metrics,
    )
    heads = cast.acting()
    save(here.folder / "model", seat.trunk, loaded.tokenizer, card, head, seat.adapter, here.world, heads)
