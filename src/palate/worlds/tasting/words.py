"""The words of the tasting room: dishes, facts and the sentences a note is made of.

A fact is a verb and an adjective, said in a note exactly as its prompt says it: `tastes smoky`. A sentence is a
template with slots: `{d}` the dish, `{a}` `{b}` `{c}` facts, `{v}` an adverb.
"""

from __future__ import annotations

_TASTES = {"savoury": "smoky salty spicy tangy mild rich", "sweet": "fruity nutty buttery malty mild rich"}
_SMELLS = {
    "savoury": "garlicky herby peppery lemony fresh toasted",
    "sweet": "minty floral spiced lemony fresh toasted",
}
_FEELS = {"soft": "creamy silky smooth light thick tender", "crisp": "crunchy flaky dense light thick tender"}


def _facts(flavour: str, texture: str) -> dict[str, tuple[str, ...]]:
    adjectives = {
        "tastes": _TASTES[flavour],
        "smells": _SMELLS[flavour],
        "feels": _FEELS[texture],
        "looks": "golden bright dark pale rustic glossy",
        "comes": "warm cold sliced whole boxed garnished",
    }
    return {verb: tuple(f"{verb} {word}" for word in words.split()) for verb, words in adjectives.items()}


FACTS_OF: dict[str, dict[str, tuple[str, ...]]] = {
    "soup": _facts("savoury", "soft"),
    "stew": _facts("savoury", "soft"),
    "pie": _facts("savoury", "crisp"),
    "salad": _facts("savoury", "crisp"),
    "curry": _facts("savoury", "soft"),
    "cake": _facts("sweet", "soft"),
    "cookie": _facts("sweet", "crisp"),
    "pudding": _facts("sweet", "soft"),
}
"""The facts that make sense for a family of dishes, by their verb; a guest asks for at most one of each verb."""

DISHES: dict[str, tuple[str, ...]] = {
    "soup": ("mushroom soup", "carrot soup", "leek soup", "tomato soup", "pumpkin soup"),
    "stew": ("lentil stew", "bean stew", "lamb stew", "fish stew", "barley stew"),
    "pie": ("spinach pie", "potato pie", "cheese pie", "chicken pie", "cabbage pie"),
    "salad": ("beet salad", "cucumber salad", "radish salad", "fennel salad", "pepper salad"),
    "curry": ("chickpea curry", "shrimp curry", "tofu curry", "squash curry", "turnip curry"),
    "cake": ("hazelnut cake", "poppy cake", "peach cake", "sponge cake", "coffee cake"),
    "cookie": ("plum cookie", "pear cookie", "walnut cookie", "cherry cookie", "ginger cookie"),
    "pudding": ("bread pudding", "date pudding", "coconut pudding", "banana pudding", "quince pudding"),
}
"""The dishes of each family; every name is two words, none of which is a fact."""

FAMILY_OF: dict[str, str] = {dish: family for family, dishes in DISHES.items() for dish in dishes}
FACTS: frozenset[str] = frozenset(fact for by_verb in FACTS_OF.values() for facts in by_verb.values() for fact in facts)

ADVERBS = ("truly", "really", "always", "simply", "clearly", "certainly", "surely", "indeed")

OPENINGS: tuple[tuple[str, ...], ...] = (
    (
        "Here is the {d}.",
        "This is our {d}.",
        "You chose the {d}.",
        "Tonight we serve the {d}.",
        "The {d} is ready.",
    ),
    (
        "The {d} {a}.",
        "Our {d} {v} {a}.",
        "Tonight the {d} {a}.",
        "You will find that the {d} {a}.",
        "This {d} {a} from the first bite.",
        "We promise that the {d} {a}.",
        "The chef says the {d} {a}.",
        "Here is a {d} that {a}.",
        "We made a {d} that {v} {a}.",
        "As ever, our {d} {a}.",
    ),
    (
        "The {d} {a} and {b}.",
        "Our {d} {v} {a} and {b}.",
        "Tonight the {d} {a}, yet it {b}.",
        "You will find that the {d} {a} and {v} {b}.",
        "This {d} {a} and {b} from the first bite.",
        "We promise that the {d} {a} and {b}.",
        "The chef says the {d} {a} but {b}.",
        "Here is a {d} that {a} and {b}.",
        "We made a {d} that {a} while it {b}.",
        "As ever, our {d} {a} and {b}.",
    ),
    (
        "The {d} {a}, {b} and {c}.",
        "Our {d} {v} {a}, {b} and {c}.",
        "Tonight the {d} {a} and {b}, yet it {c}.",
        "You will find that the {d} {a}, {b} and {v} {c}.",
        "We promise that the {d} {a}, {b} and {c}.",
        "Here is a {d} that {a} and {b} while it {c}.",
    ),
)
"""First sentences by the number of facts they state, 0 to 3."""

FOLLOWINGS: tuple[tuple[str, ...], ...] = (
    (),
    (
        "It also {a}.",
        "It {v} {a} too.",
        "Guests agree that it {a}.",
        "Every bite {a}.",
        "To the last spoon it {a}.",
        "You will notice that it {a}.",
        "As a bonus it {a}.",
        "And yes, it {a}.",
        "Better still, it {a}.",
        "Many say that it {v} {a}.",
    ),
    (
        "It also {a} and {b}.",
        "It {v} {a} and {b} too.",
        "Guests agree that it {a} and {b}.",
        "Every bite {a}, and it {b}.",
        "You will notice that it {a} but {b}.",
        "As a bonus it {a} and {b}.",
        "And yes, it {a} while it {b}.",
        "Better still, it {a} and {v} {b}.",
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
RUDE_WORDS = frozenset(["leave", "stop", "silly", "away", "anyway", "bother", "hurry", "fool", "fussy", "shut"])
