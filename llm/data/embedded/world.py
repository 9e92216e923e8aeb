"""The facts of the embedded world: 16 people, 8 animals, 8 objects and 8 towns, 120 facts in all.

The facts are drawn once from a constant seed and never from the data seed, so documents and tasks that were made with
different seeds always speak of the same world. Values are dealt evenly: the most frequent answer helps no one.
"""

from dataclasses import dataclass

from llm.data.embedded.splits import generator

WORLD_SEED = 1

SHE = ("Ana", "Cleo", "Eva", "Gia", "Ida", "Mia", "Uma", "Zoe")
HE = ("Ben", "Dan", "Finn", "Hugo", "Jon", "Leo", "Max", "Sam")
PEOPLE = SHE + HE
ANIMALS = ("bear", "cat", "crow", "dog", "fox", "frog", "goat", "horse")
OBJECTS = ("bell", "boat", "book", "chair", "clock", "drum", "kite", "lamp")
TOWNS = ("Ashcroft", "Dunmore", "Fernby", "Milford", "Oakton", "Redhill", "Seaview", "Wexley")

COLOURS = ("black", "blue", "brown", "green", "pink", "red", "white", "yellow")
JOBS = ("baker", "doctor", "farmer", "miller", "painter", "sailor", "singer", "teacher")
HOMES = ("attic", "barn", "cave", "forest", "garden", "hill", "pond", "river")
FEEDS = ("berries", "corn", "fish", "grass", "honey", "leaves", "roots", "seeds")
MATERIALS = ("clay", "glass", "gold", "iron", "paper", "stone", "wood", "wool")
LANDMARKS = ("bridge", "castle", "harbour", "market", "mill", "school", "temple", "tower")
CRAFTS = ("candles", "hats", "knives", "pots", "ropes", "rugs", "shoes", "toys")

KINDS = {"person": PEOPLE, "animal": ANIMALS, "object": OBJECTS, "town": TOWNS}
ATTRIBUTES: dict[str, dict[str, tuple[str, ...]]] = {
    "person": {"town": TOWNS, "job": JOBS, "pet": ANIMALS, "colour": COLOURS},
    "animal": {"colour": COLOURS, "home": HOMES, "feed": FEEDS},
    "object": {"material": MATERIALS, "owner": PEOPLE},
    "town": {"landmark": LANDMARKS, "craft": CRAFTS},
}


@dataclass(frozen=True)
class Fact:
    """One statement about the world: the `attribute` of `entity` (of this `kind`) is `value`."""

    kind: str
    entity: str
    attribute: str
    value: str


def _deal(kind: str, attribute: str, values: tuple[str, ...]) -> list[Fact]:
    """Draw one fact per entity of a kind, with the values of an attribute dealt out evenly."""
    rng = generator("world", WORLD_SEED, kind, attribute)
    entities = list(KINDS[kind])
    rng.shuffle(entities)
    deck: list[str] = []
    while len(deck) < len(entities):
        deck += rng.sample(values, len(values))
    return [Fact(kind, e, attribute, v) for e, v in zip(entities, deck, strict=False)]


FACTS = [
    fact for kind, table in ATTRIBUTES.items() for name, values in table.items() for fact in _deal(kind, name, values)
]
BY_ENTITY: dict[str, list[Fact]] = {e: [f for f in FACTS if f.entity == e] for names in KINDS.values() for e in names}
BY_ATTRIBUTE: dict[tuple[str, str], list[Fact]] = {
    (kind, name): [f for f in FACTS if (f.kind, f.attribute) == (kind, name)]
    for kind, table in ATTRIBUTES.items()
    for name in table
}


def value_of(entity: str, attribute: str) -> str:
    """Return the value of one attribute. Raises KeyError if the world has no such fact."""
    for fact in BY_ENTITY[entity]:
        if fact.attribute == attribute:
            return fact.value
    raise KeyError((entity, attribute))


def mention(kind: str, entity: str) -> str:
    """Return the name of an entity inside a sentence: animals and objects get an article."""
    return f"the {entity}" if kind in ("animal", "object") else entity


def pronoun(kind: str, entity: str) -> str:
    """Return the pronoun that stands for an entity: she, he or it."""
    if kind != "person":
        return "it"
    return "she" if entity in SHE else "he"


def capital(text: str) -> str:
    """Return `text` with its first letter in upper case and the rest untouched."""
    return text[:1].upper() + text[1:]
