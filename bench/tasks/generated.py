"""Two tasks made by a generator, for machines without data: word order, and reading an order form.

Rows come from a keyed hash, so they are the same on every machine and for every library version.
Train and test are kept apart by what they ask about: a pair of words that test asks about is never
asked about in train (`_is_test`), so no test row can appear in train.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from peftdyno.bench.task import Row, SplitNames, Task, text

T = TypeVar("T")

NUM_ROWS = {"train": 2000, "test": 400}

ANIMALS = (
    *(
        "fox",
        "heron",
        "goat",
        "beetle",
        "otter",
        "pony",
        "magpie",
        "hedgehog",
        "lizard",
        "donkey",
        "salmon",
        "moth",
    ),
    *(
        "rabbit",
        "crow",
        "badger",
        "snail",
        "horse",
        "parrot",
        "squirrel",
        "turtle",
        "wolf",
        "duck",
        "mouse",
        "spider",
    ),
)
COLOURS = (
    *(
        "red",
        "green",
        "yellow",
        "purple",
        "white",
        "grey",
        "orange",
        "brown",
        "blue",
        "black",
        "pink",
        "turquoise",
    ),
    *("crimson", "beige"),
)
OBJECTS = (
    *(
        "kettle",
        "ladder",
        "scarf",
        "lantern",
        "bench",
        "bucket",
        "kite",
        "drum",
        "teapot",
        "carpet",
        "basket",
        "door",
    ),
    *("bicycle", "curtain", "hammer", "mirror", "pillow", "vase", "wagon", "fence"),
)
NAMES = (
    *("Mia", "Omar", "Lucia", "Pavel", "Aiko", "Bruno", "Hanna", "Kofi", "Elena", "Tariq", "Greta", "Mateo"),
    *("Ingrid", "Rafael", "Zuzana", "Dmitri", "Amara", "Felix", "Noor", "Stefan"),
)
CITIES = (
    *(
        "Oslo",
        "Lima",
        "Porto",
        "Cairo",
        "Riga",
        "Quito",
        "Ghent",
        "Osaka",
        "Tunis",
        "Perth",
        "Leeds",
        "Turin",
    ),
    *("Malmo", "Dakar", "Split", "Basel"),
)
PLACES = (
    *("behind the bakery", "near the station", "at the market", "on the hill", "by the canal", "in the yard"),
    *("outside the library", "under the bridge", "at the fair", "along the coast road"),
)
TIMES = (
    "On Monday",
    "Last winter",
    "After lunch",
    "Early today",
    "Before the storm",
    "During the break",
    "At noon",
)
ITEMS = (
    *("lamps", "chairs", "mugs", "towels", "candles", "notebooks", "blankets", "spoons", "brushes", "plates"),
    *("gloves", "clocks", "ropes", "jars", "tents", "helmets"),
)
NUMBER_WORDS = (
    *("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)


class Draws:
    """A stream of choices that depends on its key alone."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.count = 0

    def below(self, stop: int) -> int:
        """A number in [0, stop)."""
        self.count += 1
        digest = hashlib.blake2b(f"{self.key}/{self.count}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % stop

    def pick(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.below(len(items))]

    def pick_two(self, items: Sequence[T]) -> tuple[T, T]:
        """Two different items."""
        first = self.below(len(items))
        second = (first + 1 + self.below(len(items) - 1)) % len(items)
        return items[first], items[second]


def _is_test(task: str, asked: str) -> bool:
    """Whether what a row asks about belongs to test; about a fifth does."""
    return Draws(f"{task}/split/{asked}").below(5) == 0


def _rows(task: str, split: str, draw: Callable[[Draws], tuple[str, Row]]) -> list[dict[str, Any]]:
    """Distinct rows of a split; `draw` returns what a row asks about, and the row."""
    rows: dict[str, dict[str, Any]] = {}
    number = 0
    while len(rows) < NUM_ROWS[split]:
        number += 1
        asked, row = draw(Draws(f"{task}/{split}/{number}"))
        if _is_test(task, asked) == (split == "test"):
            rows.setdefault(repr(sorted(row.items())), dict(row))
    return list(rows.values())


ORDER_SENTENCES = (
    "{time} {name} saw {first} and {second} {place}.",
    "{name} walked past {first}, then stopped at {second} {place}.",
    "The photo shows {first} next to {second}; {name} took it {place}.",
    "{name} asked about {first} before asking about {second}.",
    "{place_cap}, {name} found {first} right beside {second}.",
    "In the story that {name} wrote, {first} stands in front of {second}.",
    "{name} sold {first} {place} and kept {second}.",
    "{time} there was {first} {place}, and not far from it {second}.",
    "A note from {name}: please look after {first} and {second}.",
    "{name} drew {first} on one page and {second} on the next.",
)
ANIMAL_PHRASES = (
    "a {animal}",
    "the old {animal}",
    "one {animal}",
    "a sleepy {animal}",
    "somebody's {animal}",
)
COLOUR_PHRASES = (
    "a {colour} {thing}",
    "the {colour} {thing}",
    "a broken {colour} {thing}",
    "one {colour} {thing}",
)
FILLERS = (
    "",
    "",
    " It was getting late.",
    " Nobody else noticed.",
    " {name} smiled.",
    " The bus came soon after.",
)


def _order_row(draws: Draws) -> tuple[str, Row]:
    animal, colour = draws.pick(ANIMALS), draws.pick(COLOURS)
    phrases = [
        draws.pick(ANIMAL_PHRASES).format(animal=animal),
        draws.pick(COLOUR_PHRASES).format(colour=colour, thing=draws.pick(OBJECTS)),
    ]
    label = draws.below(2)
    place, name = draws.pick(PLACES), draws.pick(NAMES)
    sentence = (draws.pick(ORDER_SENTENCES) + draws.pick(FILLERS)).format(
        time=draws.pick(TIMES),
        name=name,
        place=place,
        place_cap=place[0].upper() + place[1:],
        first=phrases[label],
        second=phrases[1 - label],
    )
    return f"{animal}/{colour}", {"text": sentence, "label": label}


ORDER_FORMS = (
    "{name} from {city} wants {count} {items}.",
    "Please send {count} {items} to {name} in {city}.",
    "{name}, {city}: {items}, {count} of them.",
    "We owe {name} {count} {items}, to be shipped to {city}.",
    "For {name} ({city}) pack {count} {items}.",
    "{count} {items} go to {city}, care of {name}.",
    "To {city} for {name}: {items} x {count}.",
)


def _extract_row(draws: Draws) -> tuple[str, Row]:
    names, cities, items = (draws.pick_two(values) for values in (NAMES, CITIES, ITEMS))
    counts = [draws.below(len(NUMBER_WORDS)) for _ in range(2)]
    forms = [
        draws.pick(ORDER_FORMS).format(
            name=names[index],
            city=cities[index],
            items=items[index],
            count=draws.pick((str(counts[index] + 2), NUMBER_WORDS[counts[index]])),
        )
        for index in range(2)
    ]
    forms = [form[0].upper() + form[1:] for form in forms]
    row = {
        "orders": " ".join(forms if draws.below(2) else forms[::-1]),
        "customer": names[0],
        "answer": f"{counts[0] + 2} | {items[0]} | {cities[0]}",
    }
    return f"{items[0]}/{cities[0]}", row


def order_rows(split: str) -> list[dict[str, Any]]:
    """Rows of gen-order: text, label (0 the animal comes first, 1 the colour does)."""
    return _rows("gen-order", split, _order_row)


def extract_rows(split: str) -> list[dict[str, Any]]:
    """Rows of gen-extract: orders, customer, answer."""
    return _rows("gen-extract", split, _extract_row)


def customer_line(row: Row) -> str:
    """The customer asked for."""
    return f"Customer: {text(row, 'customer')}"


TASKS = (
    Task(
        name="gen-order",
        category="generated",
        metric="macro_f1",
        splits=SplitNames(test=("test",)),
        instruction="Does this text mention an animal or a colour first? Reply with animal or colour.",
        inputs=("text",),
        labels=("animal", "colour"),
        generate=order_rows,
        max_new_tokens=8,
    ),
    Task(
        name="gen-extract",
        category="generated",
        metric="exact_match",
        splits=SplitNames(test=("test",)),
        instruction="What did the customer order? Reply with number | goods | city, the number in digits.",
        inputs=("orders", customer_line),
        target="answer",
        generate=extract_rows,
        max_new_tokens=24,
    ),
)
