"""The words of the tasting room: dishes, facts and the sentences a note is made of.

A sentence is a template with slots: `{d}` the dish, `{a}` `{b}` `{c}` facts, `{v}` an adverb. Every fact is
an adjective that begins with a consonant and fits every slot, so a note reuses the exact words of the
prompt.
"""

from __future__ import annotations

_ANYWHERE = "warm light rich fresh simple mild bold delicate balanced fragrant seasonal homemade"
_SAVOURY = "smoky salty peppery garlicky spicy savoury herby tangy hearty lemony mustardy roasted vegan"
_SWEET = "fruity honeyed syrupy nutty zesty minty gingery buttery malty floral tart milky chocolatey"
_CRISP = "crisp crunchy flaky crumbly golden brittle thin toasted"
_SOFT = "creamy silky velvety smooth thick tender moist juicy fluffy chewy sticky dense plump"


def _words(*groups: str) -> tuple[str, ...]:
    return tuple(word for group in groups for word in group.split())


FACTS_OF: dict[str, tuple[str, ...]] = {
    "soup": _words(_ANYWHERE, _SAVOURY, _SOFT),
    "stew": _words(_ANYWHERE, _SAVOURY, _SOFT),
    "pie": _words(_ANYWHERE, _SAVOURY, _CRISP),
    "salad": _words(_ANYWHERE, _SAVOURY, _CRISP),
    "curry": _words(_ANYWHERE, _SAVOURY, _SOFT),
    "cake": _words(_ANYWHERE, _SWEET, _SOFT),
    "cookie": _words(_ANYWHERE, _SWEET, _CRISP),
    "pudding": _words(_ANYWHERE, _SWEET, _SOFT),
}
"""The facts that make sense for a family of dishes."""

DISHES: dict[str, tuple[str, ...]] = {
    "soup": ("onion soup", "carrot soup", "leek soup", "tomato soup", "pumpkin soup"),
    "stew": ("lentil stew", "bean stew", "lamb stew", "fish stew", "barley stew"),
    "pie": ("spinach pie", "potato pie", "cheese pie", "chicken pie", "cabbage pie"),
    "salad": ("beet salad", "cucumber salad", "radish salad", "fennel salad", "pepper salad"),
    "curry": ("chickpea curry", "shrimp curry", "tofu curry", "squash curry", "turnip curry"),
    "cake": ("almond cake", "poppy cake", "apple cake", "sponge cake", "coffee cake"),
    "cookie": ("plum cookie", "pear cookie", "walnut cookie", "cherry cookie", "oat cookie"),
    "pudding": ("bread pudding", "date pudding", "coconut pudding", "banana pudding", "quince pudding"),
}
"""The dishes of each family; every name is two words, none of which is a fact."""

FACTS: frozenset[str] = frozenset(fact for facts in FACTS_OF.values() for fact in facts)
FAMILY_OF: dict[str, str] = {dish: family for family, dishes in DISHES.items() for dish in dishes}

ADVERBS = ("wonderfully", "pleasantly", "truly", "very", "really", "nicely", "quite", "surprisingly")

OPENINGS: tuple[tuple[str, ...], ...] = (
    (
        "Here is the {d}.",
        "This is our {d}.",
        "You chose the {d}.",
        "Tonight we serve the {d}.",
        "The {d} is ready.",
    ),
    (
        "The {d} is {a}.",
        "Our {d} is {v} {a}.",
        "Tonight the {d} is {a}.",
        "You will find the {d} {v} {a}.",
        "The {d} tastes {a}.",
        "This {d} is {a} from the first bite.",
        "Here comes a {a} {d}.",
        "We made the {d} {a} for you.",
        "Expect a {v} {a} {d}.",
        "The chef calls this {d} {a}.",
    ),
    (
        "The {d} is {a} and {b}.",
        "Our {d} is {v} {a} and {b}.",
        "Tonight the {d} is {a}, yet {b}.",
        "You will find the {d} both {a} and {b}.",
        "The {d} tastes {a} and {v} {b}.",
        "This {d} is {a} with a {b} finish.",
        "Here comes a {a} {d} with a {b} side.",
        "We made the {d} {a} and {b} for you.",
        "Expect a {a} and {b} {d}.",
        "The chef calls this {d} {a} but {b}.",
    ),
    (
        "The {d} is {a}, {b} and {c}.",
        "Our {d} is {v} {a}, {b} and {c}.",
        "Tonight the {d} is {a} and {b}, yet {c}.",
        "You will find the {d} {a}, {b} and {v} {c}.",
        "This {d} is {a} and {b} with a {c} finish.",
        "Expect a {a} and {b} {d} with a {c} finish.",
    ),
)
"""First sentences by the number of facts they state, 0 to 3."""

FOLLOWINGS: tuple[tuple[str, ...], ...] = (
    (),
    (
        "It is also {a}.",
        "It is {v} {a} too.",
        "The finish is {a}.",
        "Every bite is {v} {a}.",
        "At heart it is {a}.",
        "The last bite stays {a}.",
        "Guests call it {a}.",
        "On the tongue it feels {a}.",
        "You will notice a {a} note.",
        "There is something {a} about it.",
    ),
    (
        "It is also {a} and {b}.",
        "The finish is {a} and {v} {b}.",
        "Every bite is {a}, then {b}.",
        "At heart it is {a} and {b}.",
        "Guests call it {a} and {b}.",
        "On the tongue it feels {a}, yet {b}.",
        "You will notice a {a} and {b} note.",
        "There is something {a} and {b} about it.",
    ),
)
"""Second sentences by the number of facts they state, 1 or 2."""

COURTESIES = (
    "Enjoy your meal.",
    "Please enjoy it.",
    "We hope you like it.",
    "We hope it makes you happy.",
    "Thank you for dining with us.",
    "Thank you for your order.",
    "It is a pleasure to cook for you.",
    "You are always welcome here.",
    "Please ask us for anything else.",
    "We are glad to have you.",
)

RUDENESSES = (
    "Take it or leave it.",
    "Stop asking silly questions.",
    "Just eat and go away.",
    "You would not know good food anyway.",
    "Do not bother the waiter again.",
    "Hurry up, you fool.",
    "Nobody likes fussy guests.",
    "Eat it and shut up.",
)

RAMBLES = (
    "My cousin sells carpets in the old town.",
    "It rained for most of last week.",
    "The blue bus was late this morning.",
    "Somebody painted the back door in spring.",
    "My uncle once owned a small boat.",
    "The radio played a long song about winter.",
    "Our neighbour has three black cats.",
    "The clock on the wall stopped in March.",
    "A man from the bank came by on Monday.",
    "The street outside is closed for the fair.",
)

POLITE_WORDS = frozenset(["enjoy", "please", "hope", "thank", "pleasure", "welcome", "glad"])
RUDE_WORDS = frozenset(
    ["leave", "stop", "silly", "away", "anyway", "bother", "hurry", "fool", "fussy", "shut"]
)
