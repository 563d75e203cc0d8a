"""The cast: who speaks. Roles on trunks give token log-probabilities, values and scores.

Index t of every `_BT` tensor speaks about token t. The state before token t is the hidden state of the token before
it; the one shift of the code base is `_before`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn import functional

from palate import losses
from palate.batches import Tokens
from palate.cutting import FROZEN, Microbatch, affordable, cut
from palate.models.heads import ActionHead, Head, ScalarHead
from palate.models.hydra import block_stack
from palate.models.load import Loaded
from palate.models.lora import bare_state, wear
from palate.models.seats import ACTING, Layout, Seat, take_seats, trained_parameters
from palate.models.trunk import Stream, Trunk, position_ids
from palate.models.words import Words
from palate.parallel import World, local, part_like, whole
from palate.settings import NotFinite, PalateError, nearest

__all__ = ["Acts", "Cast", "Layout", "Seat", "assemble"]


H = TypeVar("H", ScalarHead, ActionHead)


@dataclass(frozen=True)
class Acts:
    """What the policy and the heads beside it say of the N actions of a batch, in the order of `asked_BT`.

    Of each head `q_HN` and `target_HN` have the action's own value and `total_HN` log Σ exp over all actions; `value_N`
    is the value of the state before the action, `after_N` of the state before the row's next action, 0 where there is
    none.
    """

    asked_BT: Tensor
    token_N: Tensor
    logp_N: Tensor
    entropy_N: Tensor
    q_HN: tuple[Tensor, ...]
    total_HN: tuple[Tensor, ...]
    target_HN: tuple[Tensor, ...]
    value_N: Tensor
    after_N: Tensor


def assemble(
    layout: Layout,
    start: Loaded,
    roles: Sequence[str],
    key: int,
    value_start: Loaded | None = None,
    world: World | None = None,
) -> Cast:
    """The cast of a run from one loaded model (`palate.models.seats.take_seats`), its trunks spread over the world."""
    cast = Cast(take_seats(layout, start, roles, key, value_start), world)
    cast.spread()
    return cast


class Cast:
    """Maps each role to its seat and lets it speak. Callers say who, never which module, wrapper or adapter."""

    def __init__(self, roles: Mapping[str, Seat], world: World | None = None) -> None:
        self.roles = dict(roles)
        self.world = world or World()

    @property
    def device(self) -> torch.device:
        """Where the first role's weights are; batches go there."""
        return next(iter(self.roles.values())).trunk.device

    @property
    def trunks(self) -> list[Trunk]:
        """Every trunk once, in the order of the roles."""
        return list({id(seat.trunk): seat.trunk for seat in self.roles.values()}.values())

    def spread(self) -> None:
        """Shard the trunks over the ranks, as the world's strategy says; once, before anything trains."""
        for trunk in self.trunks:
            trunk.computes_on = trunk.device
            trains = any(p.requires_grad for p in trunk.parameters())
            self.world.shard(trunk, lambda trunk=trunk: block_stack(trunk), trains)

    def seat(self, role: str) -> Seat:
        """The seat of a role. Raises PalateError when nobody plays it."""
        if role not in self.roles:
            raise PalateError(f"nobody plays {role!r}.{nearest(role, self.roles)} Cast: {', '.join(self.roles)}.")
        return self.roles[role]

    @cached_property
    def budget(self) -> int:
        """Real tokens of one pass without gradient; a stage may set it."""
        return FROZEN * min(affordable(trunk) for trunk in self.trunks)

    def chunked(self, batch: Tokens, speak: Callable[[Tokens], Tensor]) -> Tensor:
        """What `speak` says of every row (B×…), asked for `budget` tokens at a time and each rank for its share.

        For passes without gradient over a whole batch. Raises NotFinite where something said is not a number.
        """
        parts = cut(batch, Microbatch(tokens=self.budget), self.world)
        said = [speak(part) for part, _ in self.world.deal(parts)]
        found = self.world.gather_rows(said, [part.size for part in parts])
        broken = int((~found.isfinite()).sum())
        if broken:
            raise NotFinite(f"a forward pass gave {broken} of {found.numel()} numbers that are not finite.")
        return found

    @overload
    def logp(self, role: str, batch: Tokens, temperature: float = 1.0, entropy: Literal[False] = False) -> Tensor: ...

    @overload
    def logp(
        self, role: str, batch: Tokens, temperature: float = 1.0, *, entropy: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...

    def logp(
        self, role: str, batch: Tokens, temperature: float = 1.0, entropy: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """log π(token t | before) B×T in float32, 0 off the action mask; with `entropy` also that distribution's.

        Logits are divided by `temperature` before the log-softmax (detail 9), and are computed for the rows whose
        next token is an action and for no others. A token with nothing before it has no log-probability and gets 0.
        """
        seat = self.seat(role)
        said = _speech(seat, _read(seat, batch), batch, temperature, entropy)
        return said if entropy else said[0]

    def recital(self, role: str, batch: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """(logp_BT, entropy_BT, likeliest_BT) of given text: the last says where the token was the likeliest one."""
        seat = self.seat(role)
        asked_BT, said = _words(seat, _read(seat, batch), batch, 1.0, entropy=True, likeliest=True)
        assert said.entropy_N is not None
        assert said.likeliest_N is not None
        right_N = said.likeliest_N == batch.tokens_BT[asked_BT]
        return (
            _place(asked_BT, said.logp_N),
            _place(asked_BT, said.entropy_N.detach()),
            _place(asked_BT, right_N),
        )

    def values(self, role: str, batch: Tokens, head_only: bool = False) -> Tensor:
        """Value B×T of the state before each token: the head's output on the token before, 0 where there is none.

        Defined for every t, also on padding after the answer: there it is the value of the final state. With
        `head_only` no gradient goes below the head.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not head_only):
            stream = _read(self.seat(role), batch)
        return _values(self._head(role), stream, batch)

    def together(self, one: str, other: str) -> bool:
        """Whether two roles speak through the same trunk and adapter."""
        first, second = self.seat(one), self.seat(other)
        return (first.trunk, first.adapter) == (second.trunk, second.adapter)

    def logp_and_values(
        self, policy: str, value: str, batch: Tokens, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(logp_BT, entropy_BT, value_BT), by one forward pass when both roles share trunk and adapter."""
        speaker, judge = self.seat(policy), self.seat(value)
        stream = _read(speaker, batch)
        logp_BT, entropy_BT = _speech(speaker, stream, batch, temperature, True)
        if not self.together(policy, value):
            stream = _read(judge, batch)
        return logp_BT, entropy_BT, _values(self._head(value), stream, batch)

    def acts(self, policy: str, q: Sequence[str], targets: Sequence[str], value: str, batch: Tokens) -> Acts:
        """Log-probabilities and values of every action, by one pass through the policy's trunk and adapter.

        Nothing of size V is kept off the action rows, and no gradient flows from `targets`. A token with nothing before
        it is no action. Raises PalateError for a role that sits elsewhere or has no head of its kind.
        """
        seat, stream = self.seat(policy), _read(self.seat(policy), batch)
        asked_BT = _asked(batch)
        token_N, state_ND = batch.tokens_BT[asked_BT], stream.at(_before(stream.last_BT)[asked_BT[:, 1:]])
        said = seat.trunk.words(state_ND, token_N, entropy=True)
        assert said.entropy_N is not None
        value_N = self._beside(policy, value, ScalarHead)(state_ND)
        worth = [self._beside(policy, role, ActionHead).taken(state_ND, token_N) for role in q]
        with torch.no_grad():
            slow = [self._beside(policy, role, ActionHead).taken(state_ND, token_N) for role in targets]
        return Acts(
            asked_BT=asked_BT,
            token_N=token_N,
            logp_N=said.logp_N,
            entropy_N=said.entropy_N.detach(),
            q_HN=tuple(one.logit_N for one in worth),
            total_HN=tuple(one.total_N for one in worth),
            target_HN=tuple(one.logit_N for one in slow),
            value_N=value_N,
            after_N=losses.next_value(_place(asked_BT, value_N), asked_BT)[asked_BT],
        )

    def acting(self) -> dict[str, Head]:
        """The heads beside the policy that say what its actions are worth, by role; none where nobody plays them."""
        roles = [role for role in self.roles if role in ACTING]
        beside = [*roles, *(role for role in ("value",) if roles and role in self.roles)]
        return {role: head for role in beside if (head := self.seat(role).head) is not None}

    def _beside(self, policy: str, role: str, kind: type[H]) -> H:
        """The head of a role that reads what the policy's trunk and adapter give."""
        seat, other = self.seat(policy), self.seat(role)
        if not isinstance(other.head, kind) or (seat.trunk, seat.adapter) != (other.trunk, other.adapter):
            raise PalateError(f"role {role!r} has no {kind.__name__} beside {policy!r}.")
        return other.head

    def scores(self, role: str, batch: Tokens) -> Tensor:
        """The head's output B at the last real token of each row (detail 18), gain and bias applied."""
        stream = _read(self.seat(role), batch)
        return self._head(role)(stream.at(stream.last_BT[:, -1]))  # behind the last real token its state is repeated

    def token_scores(self, role: str, batch: Tokens) -> Tensor:
        """The head's output B×T at each token itself, gain and bias applied; 0 on padding."""
        stream = _read(self.seat(role), batch)
        return _spread(self._head(role)(stream.hidden_ND), stream.last_BT).masked_fill(~batch.real_BT, 0.0)

    def _head(self, role: str) -> ScalarHead:
        head = self.seat(role).head
        if not isinstance(head, ScalarHead):
            raise PalateError(f"role {role!r} has no scalar head, so it gives neither values nor scores.")
        return head

    def parameters(self, roles: Sequence[str]) -> dict[str, nn.Parameter]:
        """What trains when these roles do, each parameter once, by a name that is the same in every run."""
        found: dict[int, tuple[str, nn.Parameter]] = {}
        for role in roles:
            seat = self.seat(role)
            own = {f"{self._owner(seat.trunk)}.{path}": p for path, p in trained_parameters(seat).items()}
            own |= {f"{role}.head.{n}": p for n, p in _head_parameters(seat).items() if p.requires_grad}
            for name, parameter in own.items():
                found.setdefault(id(parameter), (name, parameter))
        return dict(found.values())

    def _owner(self, trunk: Trunk) -> str:
        """The first role that sits on the trunk gives it its name."""
        return next(role for role, seat in self.roles.items() if seat.trunk is trunk)

    def state(self, trains: Sequence[str], moves: Sequence[str] = ()) -> dict[str, Tensor]:
        """What a checkpoint keeps of these roles: everything that trains, and their heads with gain and bias.

        Roles that move without gradient are kept whole. Frozen weights are not in it: they come from where the model
        was loaded. Sharded weights are given as they are; `parallel.whole` brings them together.
        """
        kept: dict[str, Tensor] = {name: p.detach() for name, p in self.parameters(trains).items()}
        for role in moves:
            kept |= {name: p.detach() for name, p in self._weights(role).items()}
        for role in trains:
            kept |= {f"{role}.head.{n}": p.detach() for n, p in _head_parameters(self.seat(role)).items()}
        return kept

    def _weights(self, role: str) -> dict[str, nn.Parameter]:
        """Every weight of a role that sits on a trunk of its own, or the head alone where the trunk is another's."""
        seat, found = self.seat(role), dict[str, nn.Parameter]()
        if self._owner(seat.trunk) == role:
            found |= {f"{role}.{path}": p for path, p in seat.trunk.model.named_parameters()}
        return found | {f"{role}.head.{n}": p for n, p in _head_parameters(seat).items()}

    @torch.no_grad()
    def blend(self, source: str, target: str, share: float) -> None:
        """target ← (1 − share) · target + share · source, for the trunk (where the target has one) and the head.

        A moving average, a target network, or with share 1 a copy. Weights that both share stay what they are. Raises
        PalateError where the target has no weights of its own to move.
        """
        moved = 0
        theirs = {name.partition(".")[2]: p for name, p in self._all(source).items()}
        for name, weight in self._weights(target).items():
            other = theirs.get(name.partition(".")[2])
            if other is not None and other is not weight:
                here = part_like(weight, whole(other)).to(local(weight))  # the two may be sharded differently
                local(weight).lerp_(here, share)
                moved += 1
        if not moved:
            raise PalateError(
                f"{target}: it has no weights of its own, so it cannot follow {source}. Use layout separate or shared."
            )

    def _all(self, role: str) -> dict[str, nn.Parameter]:
        seat = self.seat(role)
        named = {f"{role}.{path}": p for path, p in seat.trunk.model.named_parameters()}
        return named | {f"{role}.head.{n}": p for n, p in _head_parameters(seat).items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave. Raises PalateError when it is of another model or layout."""
        known: dict[str, Tensor] = {}
        for role, seat in self.roles.items():
            if self._owner(seat.trunk) == role:
                known |= {f"{role}.{path}": p for path, p in seat.trunk.model.named_parameters()}
            known |= {f"{role}.head.{name}": p for name, p in _head_parameters(seat).items()}
        for name, tensor in tensors.items():
            if name not in known or known[name].shape != tensor.shape:
                raise PalateError(f"checkpoint: {name} does not fit this model and layout. Start the stage afresh.")
            local(known[name]).copy_(part_like(known[name], tensor))

    def weights(self, role: str) -> dict[str, Tensor]:
        """The role's model under transformers' own names, its adapter merged: what an engine publishes."""
        seat = self.seat(role)
        return bare_state(seat.trunk.model, seat.adapter)


def _head_parameters(seat: Seat) -> dict[str, nn.Parameter]:
    return dict(seat.head.named_parameters()) if seat.head is not None else {}


def _read(seat: Seat, batch: Tokens) -> Stream:
    with wear(seat.adapter):
        return seat.trunk.read(batch.tokens_BT, batch.real_BT)


def _before(place_BT: Tensor) -> Tensor:
    """The entry of the place before, along T; one column falls away. The one shift: place t−1 speaks of token t."""
    return place_BT[:, :-1]


def _asked(batch: Tokens) -> Tensor:
    """Which cells are actions with something before them."""
    return batch.action_BT & (position_ids(batch.real_BT) > 0)


def _words(
    seat: Seat, stream: Stream, batch: Tokens, temperature: float, entropy: bool, likeliest: bool = False
) -> tuple[Tensor, Words]:
    """(asked_BT, words): which cells have a log-probability, and what is said of their tokens, in their order."""
    asked_BT = _asked(batch)
    state_ND = stream.at(_before(stream.last_BT)[asked_BT[:, 1:]])
    with wear(seat.adapter):
        return asked_BT, seat.trunk.words(state_ND, batch.tokens_BT[asked_BT], temperature, entropy, likeliest)


def _place(asked_BT: Tensor, x_N: Tensor) -> Tensor:
    """Numbers of the asked cells at their places, zeros elsewhere."""
    return x_N.new_zeros(asked_BT.shape).masked_scatter(asked_BT, x_N)


def _spread(x_N: Tensor, place: Tensor) -> Tensor:
    """Numbers of a stream at some of its places, which may repeat."""
    return functional.embedding(place, x_N[:, None])[..., 0]


def _speech(seat: Seat, stream: Stream, batch: Tokens, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
    """Log-probabilities B×T of the action tokens and, if asked, entropies B×T; zeros elsewhere."""
    asked_BT, said = _words(seat, stream, batch, temperature, entropy)
    logp_BT = _place(asked_BT, said.logp_N)
    return logp_BT, torch.zeros_like(logp_BT) if said.entropy_N is None else _place(asked_BT, said.entropy_N)


def _values(head: ScalarHead, stream: Stream, batch: Tokens) -> Tensor:
    value_BT = functional.pad(_spread(head(stream.hidden_ND), _before(stream.last_BT)), (1, 0))
    return value_BT.masked_fill(position_ids(batch.real_BT) == 0, 0.0)
