"""The values a swept setting takes: a list, or a distribution that a number is drawn from.

`0.05,0.1,0.5`, `grid(0.05,0.1,0.5)` and `choice(0.05,0.1,0.5)` are lists; `loguniform(1e-6,1e-4)` is a distribution.
Names and meanings are those of trlX's sweeps (there from Ray Tune). A distribution is its quantile function, so a
draw is a pure function of one uniform number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from palate.settings import PalateError, nearest, value_of

_CALL = re.compile(r"([A-Za-z_]+)\((.*)\)", re.DOTALL)
_LISTS = ("choice", "grid", "grid_search")
_OPEN, _CLOSE, _QUOTES = "([{", ")]}", "'\""


@dataclass(frozen=True)
class Values:
    """A swept setting with the values it takes, each as the text it was written as."""

    key: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Drawn:
    """A swept setting that is drawn anew for every trial."""

    key: str
    quantile: Callable[[float], float]
    """The value below which a share u of the draws lies, for u in [0, 1)."""
    logarithmic: bool = False

    def text(self, uniform: float) -> str:
        """The value at a uniform number, written so that YAML reads the same number back."""
        return number_text(self.quantile(uniform))


Axis = Values | Drawn


def axis(assignment: str) -> Axis | None:
    """The axis that `key=values` describes; None for a plain value, which is the same in every trial.

    Raises PalateError for an empty list, an empty or a repeated value, bounds in the wrong order, an unknown name.
    """
    key, _, text = assignment.partition("=")
    text = text.strip()
    call = _CALL.fullmatch(text)
    if call is not None and _is_call(text):
        name, parts = call[1], split(call[2])
        if name in _LISTS:
            return _values(key, parts)
        return _drawn(key, name, parts)
    parts = split(text)
    return _values(key, parts) if len(parts) > 1 else None


def split(text: str) -> list[str]:
    """The parts between commas that stand outside brackets and quotes; of an empty text, none."""
    parts, start, depth, quote = list[str](), 0, 0, ""
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in _QUOTES and not text[start:place].strip():
            quote = letter
        elif letter in _OPEN + _CLOSE:
            depth += 1 if letter in _OPEN else -1
        elif letter == "," and depth == 0:
            parts.append(text[start:place].strip())
            start = place + 1
    last = text[start:].strip()
    return [*parts, last] if parts or last else []


def _is_call(text: str) -> bool:
    """Whether the last bracket closes the first one: `a(1),b(2)` is a list of two."""
    return len(split(text)) == 1


def _values(key: str, texts: Sequence[str]) -> Values:
    if not texts:
        raise PalateError(f"{key}: the list of values is empty. Write at least two, as in {key}=0.1,0.5.")
    read: list[Any] = []
    for text in texts:
        if not text:
            raise PalateError(
                f"{key}: there is nothing between two commas, or behind the last. Mend {','.join(texts)!r}."
            )
        value = plain(value_of(f"{key}={text}")[1])
        if value in read and type(value) is type(read[read.index(value)]):
            raise PalateError(f"{key}: {texts[read.index(value)]} and {text} are the same value. Leave one out.")
        read.append(value)
    return Values(key, tuple(texts))


def plain(value: Any) -> Any:
    """A value as it compares: 1, 1.0, `1e0` (which YAML takes for a text) are one number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def number_text(value: float) -> str:
    """A number as YAML 1.1 reads one: `1e-05` would be a text there, `1.0e-05` is not."""
    text = repr(value)
    mantissa, e, power = text.partition("e")
    return f"{mantissa}.0e{power}" if e and "." not in mantissa else text


def _uniform(low: float, high: float) -> Callable[[float], float]:
    return lambda u: min(high, low + (high - low) * u)


def _loguniform(low: float, high: float) -> Callable[[float], float]:
    return lambda u: min(high, max(low, low * (high / low) ** u))


def _randint(low: float, high: float) -> Callable[[float], float]:
    return lambda u: min(int(high) - 1, int(low) + math.floor((high - low) * u))


def _lograndint(low: float, high: float) -> Callable[[float], float]:
    return lambda u: min(int(high) - 1, max(int(low), math.floor(low * (high / low) ** u)))


def _normal(mean: float, deviation: float) -> Callable[[float], float]:
    return lambda u: NormalDist(mean, deviation).inv_cdf(max(u, 2.0**-54))


@dataclass(frozen=True)
class _Law:
    """A distribution by name: `arguments` as shown in messages, `make` gives its quantile function."""

    arguments: str
    make: Callable[[float, float], Callable[[float], float]]
    bounded: bool = True
    whole: bool = False
    logarithmic: bool = False
    step: bool = False


LAWS = {
    "uniform": _Law("low,high", _uniform),
    "quniform": _Law("low,high,step", _uniform, step=True),
    "loguniform": _Law("low,high", _loguniform, logarithmic=True),
    "qloguniform": _Law("low,high,step", _loguniform, logarithmic=True, step=True),
    "randint": _Law("low,high", _randint, whole=True),
    "qrandint": _Law("low,high,step", _uniform, whole=True, step=True),
    "lograndint": _Law("low,high", _lograndint, whole=True, logarithmic=True),
    "qlograndint": _Law("low,high,step", _loguniform, whole=True, logarithmic=True, step=True),
    "normal": _Law("mean,deviation", _normal, bounded=False),
    "randn": _Law("mean,deviation", _normal, bounded=False),
    "qrandn": _Law("mean,deviation,step", _normal, bounded=False, step=True),
}
"""Every distribution. `randint` and `lograndint` leave `high` out, as in NumPy and Ray; all others reach it."""


def _drawn(key: str, name: str, parts: Sequence[str]) -> Drawn:
    known = [*LAWS, *_LISTS]
    if name not in LAWS:
        raise PalateError(f"{key}: there is no {name}(…).{nearest(name, known)} Known: {', '.join(known)}.")
    law = LAWS[name]
    shape = f"{name}({law.arguments})"
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        raise PalateError(f"{key}: {name}({','.join(parts)}) needs numbers: {shape}.") from None
    if len(numbers) != law.arguments.count(",") + 1 or not all(map(math.isfinite, numbers)):
        raise PalateError(f"{key}: {name}({','.join(parts)}) is not of the shape {shape}.")
    _check_law(f"{key}: {name}({','.join(parts)})", law, numbers)
    quantile = law.make(numbers[0], numbers[1])
    if law.step:
        quantile = _stepped(quantile, numbers, law)
    return Drawn(key, quantile, law.logarithmic)


def _check_law(said: str, law: _Law, numbers: Sequence[float]) -> None:
    first, second = numbers[:2]
    if not law.bounded and second <= 0:
        raise PalateError(f"{said}: the deviation must be above 0.")
    if law.bounded and first >= second:
        fault = (
            "the bounds are in the wrong order"
            if first > second
            else "the bounds are equal, so there is nothing to draw"
        )
        raise PalateError(f"{said}: {fault}. Write the lower one first, the higher one second.")
    if law.logarithmic and first <= 0:
        raise PalateError(f"{said}: a logarithm needs a lower bound above 0.")
    if law.whole and any(n != int(n) for n in numbers):
        raise PalateError(f"{said}: whole numbers are needed.")
    if law.step and numbers[2] <= 0:
        raise PalateError(f"{said}: the step must be above 0.")
    if law.step and law.bounded and math.ceil(first / numbers[2] - 1e-9) > math.floor(second / numbers[2] + 1e-9):
        raise PalateError(f"{said}: no multiple of the step lies between the bounds. Take a smaller step.")


def _stepped(quantile: Callable[[float], float], numbers: Sequence[float], law: _Law) -> Callable[[float], float]:
    """The nearest multiple of the step; where that would leave the bounds, the last multiple inside them."""
    low, high, step = numbers
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)

    def at(u: float) -> float:
        count = round(quantile(u) / step)
        if law.bounded:
            count = min(last, max(first, count))
        return int(count * step) if law.whole else float(f"{count * step:.12g}")

    return at
