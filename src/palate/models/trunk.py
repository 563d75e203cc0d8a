"""A trunk: a transformers model seen as tokens → hidden states → logits, for any family, with any padding.

Rows are packed before the model sees them: one stream of real tokens, common beginnings told once (`packed`). Families
whose attention does not ask transformers' registry get rows with their pads on the right. Either way a padded cell has
the state of the last real token before it, as in lm-human-preferences (docs/ppo_details.md, detail 6). So where the
padding is, how much of it there is and which ids it holds cannot matter, whatever a family does about positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel

from palate.models import linear, words
from palate.models.attention import Bypassed, Layout, laid_out, remembered
from palate.models.packed import Packed, pack
from palate.models.words import Shape, Words
from palate.settings import PalateError

T = TypeVar("T")
UNLIMITED = 1 << 30
"""The context of families without a longest sequence."""


def position_ids(real_BT: Tensor) -> Tensor:
    """Positions that skip pads: how many real tokens stand before each place (exclusive cumulative sum)."""
    real = real_BT.long()
    return real.cumsum(-1) - real


@dataclass(frozen=True)
class Stream:
    """What a trunk made of a batch: the states of N tokens, and where each cell of the batch finds its own.

    `last_BT` is the place of the last real token at or before a cell (of the row's first, where there is none yet).
    """

    hidden_ND: Tensor
    last_BT: Tensor

    def at(self, place: Tensor) -> Tensor:
        """The states at some places of the stream, … × D; places may repeat."""
        return functional.embedding(place, self.hidden_ND)


class Ground(Protocol):
    """What knows the states of a trunk's lowest blocks; see `palate.models.bottom`."""

    def under(self, trunk: Trunk, tokens_BT: Tensor, real_BT: Tensor, packed: Packed) -> AbstractContextManager[None]:
        """Within this context a pass of `trunk` over `packed` begins above them."""
        ...


class Trunk(nn.Module):
    """tokens → hidden states → logits. Dropout is off for good, so two passes over a batch agree exactly.

    `vocabulary` is how many ids the tokenizer has: logits of ids at or beyond it are −inf. `causal` is
    measured, not believed: hidden states must not move when a later token is edited. `packs` says that rows go through
    as one stream without pads; measured too. `speaks` is False where the model has no language-model head (a reward or
    value trunk). `width` is D, `context` the longest sequence. With `compute` set, passes are under autocast to that
    format, and weights and gradients stay in theirs. `replays` says that a GPU may record steps of writing.

    Raises PalateError when the logits computed here would differ from the model's own.
    """

    def __init__(self, model: PreTrainedModel, vocabulary: int) -> None:
        super().__init__()
        self.model = model
        self.vocabulary = vocabulary
        self.recomputes = False
        self.computes_on: torch.device | None = None
        self.compute: torch.dtype | None = None
        self.ground: Ground | None = None
        self.replays = True
        _silence_dropout(model)
        linear.speed_up(model)
        # A stream may end with the pad id as a token of its own: no mask is missing then.
        vars(self.base)["warn_if_padding_and_no_attention_mask"] = _nothing
        self.first_position, self.context = _positions(self.base)
        takes = inspect.signature(self.base.forward).parameters
        self.caches = "past_key_values" in takes
        self._takes_positions = "position_ids" in takes
        self._kinds = "token_type_ids" in takes and any(
            "token_type_ids" in name for name, _ in self.base.named_buffers()
        )
        self.causal = self.packs = False
        self.causal, self.width = _measure(self)
        self.packs = _packs(self)
        self._head = _find_head(self)

    def forward(self, work: Callable[[], T]) -> T:
        """What `work` gives. Every pass goes through here, where FSDP2's hooks gather sharded weights."""
        if self.compute is None:
            return work()
        with torch.autocast(self.device.type, self.compute):
            return work()

    @property
    def base(self) -> PreTrainedModel:
        """The model without its language-model head."""
        return cast(PreTrainedModel, self.model.base_model)

    @property
    def family(self) -> str:
        """The family's name as transformers spells it, for messages and model cards."""
        return str(self.model.config.model_type)

    @property
    def speaks(self) -> bool:
        """Whether the trunk has a language-model head."""
        return self._head is not None

    @property
    def _sample(self) -> Tensor:
        """One of the weights."""
        return next(self.parameters())

    @property
    def device(self) -> torch.device:
        """Where the trunk computes; offloaded weights may lie elsewhere."""
        return self.computes_on or self._sample.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' number format; logits and everything computed from them are float32."""
        return self._sample.dtype

    @property
    def computes_in(self) -> torch.dtype:
        """The number format of its matrix products, which says how far two passes over the same tokens may differ."""
        return self.compute or self.dtype

    def checkpoint_activations(self) -> None:
        """Keep only the blocks' inputs for the backward pass and compute the rest again: memory for time."""
        how = {"use_reentrant": False, "context_fn": remembered}
        model: Any = self.model
        # Renamed within transformers 5; both take the checkpoint function's arguments first.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(how)
        # It also asks for a gradient at the embeddings, which only reentrant checkpointing needs; frozen blocks
        # below the trained ones would be walked for nothing.
        model.disable_input_require_grads()
        self.recomputes = True

    def hidden(self, tokens_BT: Tensor, real_BT: Tensor) -> Tensor:
        """Hidden states after the final norm, B×T×D; padded cells repeat the last real token before them.

        Raises PalateError when a row has more real tokens than the context.
        """
        stream = self.read(tokens_BT, real_BT)
        return stream.at(stream.last_BT)

    def read(self, tokens_BT: Tensor, real_BT: Tensor) -> Stream:
        """The same as a stream, in which no pad is and a common beginning of neighbouring rows is only once."""
        self._set_training(self.recomputes and torch.is_grad_enabled())
        self._check_length(int(real_BT.sum(-1).max()))
        if not self.packs:
            return self._read_padded(tokens_BT, real_BT)
        packed = pack(tokens_BT, real_BT, self.causal, self.usual)
        ground = self.ground
        with nullcontext() if ground is None else ground.under(self, tokens_BT, real_BT, packed):
            return Stream(self.run(packed.tokens_N, packed.position_N, packed), packed.last_BT)

    def usual(self, count: int, writing: bool = False) -> int:
        """The length to which a stream of so many tokens is filled up, so that few lengths ever come about."""
        return linear.rounded(count, self._sample, writing)

    def run(self, tokens_N: Tensor, position_N: Tensor, layout: Layout) -> Tensor:
        """States N×D of a stream whose attention follows `layout`; for trunks that pack. Positions count from 0."""
        # what leaves `forward` is a tensor and no view of one: FSDP2 hangs its hooks on it
        return self(lambda: self._run(tokens_N, position_N, layout))[0]

    def _run(self, tokens_N: Tensor, position_N: Tensor, layout: Layout) -> Tensor:
        more: dict[str, Any] = {}
        if self._takes_positions:
            more["position_ids"] = position_N[None] + self.first_position
        if self.caches:
            more["use_cache"] = False
        if self._kinds:  # these families keep a table of zeros as long as their context; a stream may be longer
            more["token_type_ids"] = torch.zeros_like(tokens_N[None])
        with laid_out(self.base, layout):
            return cast(Tensor, self.base(input_ids=tokens_N[None], **more).last_hidden_state)

    def _read_padded(self, tokens_BT: Tensor, real_BT: Tensor) -> Stream:
        rows_BS, exists_BS = _compact(tokens_BT, real_BT)
        more: dict[str, Any] = {} if self.causal else {"attention_mask": exists_BS.long()}
        if self.first_position:
            more["position_ids"] = position_ids(torch.ones_like(rows_BS)) + self.first_position
        if self.caches:
            more["use_cache"] = False
        hidden_BSD: Tensor = self(lambda: cast(Tensor, self.base(input_ids=rows_BS, **more).last_hidden_state))
        last_BT = (real_BT.long().cumsum(-1) - 1).clamp(min=0)
        begin_B = torch.arange(rows_BS.shape[0], device=rows_BS.device) * rows_BS.shape[1]
        return Stream(hidden_BSD.flatten(0, 1), last_BT + begin_B[:, None])

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Next-token logits N×V in float32, −inf at ids that are not the tokenizer's."""
        head = self._require_speech()
        logits_NV: Tensor = self(lambda: _head_logits(self.model, head, hidden_ND))
        if self.vocabulary < logits_NV.shape[-1]:
            logits_NV[..., self.vocabulary :] = float("-inf")
        return logits_NV

    def words(
        self,
        hidden_ND: Tensor,
        token_N: Tensor,
        temperature: float = 1.0,
        entropy: bool = False,
        likeliest: bool = False,
    ) -> Words:
        """What the language-model head says of each row's own token, without ever holding N×V logits."""
        self._require_speech()
        head, shape = self.head, _shape(self.model, temperature)
        asked = (head, hidden_ND, token_N, self.vocabulary, shape, entropy, likeliest)
        return Words(*self(lambda: words.said(*asked)))  # a plain tuple: FSDP2 looks for tensors in nothing else

    @property
    def head(self) -> nn.Module:
        """The language-model head: hidden states to the logits that `Shape` then scales."""
        return self.model.get_submodule(self._require_speech())

    def _require_speech(self) -> str:
        if self._head is None:
            raise PalateError(
                f"{self.family}: this model has no language-model head, so it cannot be a policy. "
                "Give the folder of a causal language model."
            )
        return self._head

    def extend(self, tokens_BS: Tensor, real_BL: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Hidden states B×S×D of S new tokens after the L−S in `cache` (None at the start), and the cache.

        `real_BL` marks the real ones among all L; pads may stand anywhere; their hidden states mean nothing.
        The cache is transformers' own and is extended in place. Raises PalateError for families that keep no
        keys and values.
        """
        if not self.caches:
            raise PalateError(
                f"{self.family}: this family keeps no keys and values, so palate cannot sample from it. "
                "Choose a transformer with attention in every block."
            )
        return self(lambda: self._extend(tokens_BS, real_BL, cache))

    def _extend(self, tokens_BS: Tensor, real_BL: Tensor, cache: Any) -> tuple[Tensor, Any]:
        self._set_training(False)
        new = tokens_BS.shape[1]
        self._check_length(int(real_BL.sum(-1).max()))
        if cache is None:
            cache = DynamicCache(config=self.model.config)
        more: dict[str, Any] = {}
        if not bool(real_BL.all()):
            more["attention_mask"] = real_BL.long()
        if self._takes_positions:
            more["position_ids"] = position_ids(real_BL)[:, -new:] + self.first_position
        ids_BS = tokens_BS.masked_fill(~real_BL[:, -new:], 0)
        out = self.base(input_ids=ids_BS, past_key_values=cache, use_cache=True, **more)
        return cast(Tensor, out.last_hidden_state), out.past_key_values

    def _set_training(self, training: bool) -> None:
        """The mode only tells transformers whether to checkpoint activations: dropout is zero in both."""
        if self.model.training != training:
            self.model.train(training)

    def _check_length(self, length: int) -> None:
        if length > self.context:
            raise PalateError(
                f"{self.family}: a sequence of {length} tokens does not fit the context of {self.context}. "
                "Shorten the prompts or the answers, or take a model with a longer context."
            )


def _nothing(*given: object) -> None:
    """Instead of a warning that would be wrong here."""


def _compact(tokens_BT: Tensor, real_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Real tokens to the left in their order, as many columns as the longest row needs; any id (0) in the pads."""
    count_B = real_BT.long().sum(-1)
    length = max(1, int(count_B.max()))
    exists_BS = torch.arange(length, device=tokens_BT.device) < count_B[:, None]
    if not torch.equal(exists_BS, real_BT[:, :length]):
        order_BS = (~real_BT).long().argsort(dim=-1, stable=True)[:, :length]
        tokens_BT = tokens_BT.gather(1, order_BS)
    return tokens_BT[:, :length].masked_fill(~exists_BS, 0), exists_BS


def _silence_dropout(model: nn.Module) -> None:
    """Every dropout probability to zero, as modules and as plain numbers, whatever the mode (detail 14)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    model.eval()


def _positions(base: PreTrainedModel) -> tuple[int, int]:
    """(first position id, longest sequence). RoBERTa-like tables keep their first places for padding."""
    config: Any = base.config.get_text_config()
    longest = next(
        (int(n) for n in (getattr(config, k, None) for k in ("max_position_embeddings", "seq_length")) if n),
        UNLIMITED,
    )
    for name, module in base.named_modules():
        table = module if isinstance(module, nn.Embedding) and name.endswith("position_embeddings") else None
        if table is not None and table.padding_idx is not None:
            first = int(table.padding_idx) + 1
            return first, longest - first
    return 0, longest


def _head_logits(model: PreTrainedModel, head: str, hidden: Tensor) -> Tensor:
    """The head's output in float32, scaled (Cohere, Granite) or capped (Gemma) as the family does."""
    return words.shaped(cast(Tensor, model.get_submodule(head)(hidden)).float(), _shape(model, 1.0))


def _shape(model: PreTrainedModel, temperature: float) -> Shape:
    config: Any = model.config.get_text_config()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return Shape(scale, getattr(config, "final_logit_softcapping", None), temperature)


def _probe(trunk: Trunk) -> tuple[Tensor, Tensor, Tensor]:
    """A short row of different ids, the same with its last token edited, and the mask that all are real."""
    rows = cast(nn.Embedding, trunk.model.get_input_embeddings()).weight.shape[0]
    tokens = (torch.arange(1, 9, device=trunk.device) * 7 % rows)[None]
    edited = tokens.clone()
    edited[0, -1] = (tokens[0, -1] + 1) % rows
    return tokens, edited, torch.ones_like(tokens, dtype=torch.bool)


@torch.no_grad()
def _measure(trunk: Trunk) -> tuple[bool, int]:
    """(causal, width), by editing the last token of a short row and looking at the states before it."""
    tokens, edited, real = _probe(trunk)
    before, after = trunk.hidden(tokens, real).float(), trunk.hidden(edited, real).float()
    moved = (before - after)[:, :-1].abs().max()
    return bool(moved <= 1e-6 * before.abs().max()), before.shape[-1]


@torch.no_grad()
def _packs(trunk: Trunk) -> bool:
    """Whether rows of a stream do not see one another and give the states of padded rows; by trying it.

    Families whose layers look only at a part of the past by a mask of their own are left on the padded path: short
    rows could not show the difference.
    """
    config: Any = trunk.model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention"} or getattr(config, "attention_chunk_size", None):
        return False
    tokens, _, _ = _probe(trunk)
    rows = torch.stack([tokens[0], tokens[0].flip(0), tokens[0].roll(3)])
    real = torch.arange(8, device=tokens.device) < torch.tensor([[8], [3], [5]], device=tokens.device)
    expected = trunk.hidden(rows, real)
    trunk.packs = True
    try:
        found = trunk.hidden(rows, real)
    except (Bypassed, RuntimeError, ValueError, TypeError, KeyError):
        return False
    finally:
        trunk.packs = False
    return close(found.float(), expected.float(), trunk.dtype)


@torch.no_grad()
def _find_head(trunk: Trunk) -> str | None:
    """The name of the module that turns hidden states into the model's own logits, or None without one."""
    outputs = trunk.model.get_output_embeddings()
    if outputs is None:
        return None
    tokens, _, real = _probe(trunk)
    more = {"position_ids": position_ids(real) + trunk.first_position} if trunk.first_position else {}
    expected = cast(Tensor, trunk.model(input_ids=tokens, **more).logits).float()
    hidden = trunk.hidden(tokens, real)
    names = [name for name, module in trunk.model.named_modules() if module is outputs]
    for name in [*names, *(n for n, _ in trunk.model.named_children() if n in ("lm_head", "cls"))]:
        found = _head_logits(trunk.model, name, hidden)
        if found.shape == expected.shape and close(found, expected, trunk.dtype):
            return name
    raise PalateError(
        f"{trunk.family}: this family does something to its logits that palate does not know, so its numbers "
        "would be wrong. Choose another family, or report the family's name."
    )


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Equal up to the rounding of `dtype`, relative to the largest logit."""
    slack = 64 * torch.finfo(dtype).eps
    return bool((found - expected).abs().max() <= slack * expected.abs().max().clamp(min=1e-6))
