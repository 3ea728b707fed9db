"""Answers in JSON: short objects with keys the user names, and facts copied out of a sentence."""

from __future__ import annotations

import json
from collections.abc import Sequence
from random import Random
from typing import Any

from . import chat, words
from .dialogue import Dialogue, assistant, exchange, pick, user

MAKERS: dict[str, Any] = {
    "name": words.name,
    "first_name": words.name,
    "city": words.city,
    "country": lambda random: random.choice(list(words.CAPITALS)),
    "capital": lambda random: random.choice(list(words.CAPITALS.values())),
    "colour": lambda random: random.choice(words.COLOURS),
    "color": lambda random: random.choice(words.COLOURS),
    "animal": lambda random: random.choice(words.ANIMALS),
    "title": lambda random: f"The {random.choice(words.THINGS)}",
    "day": lambda random: random.choice(words.DAYS),
    "date": lambda random: random.choice(words.DAYS),
    "month": lambda random: random.choice(words.MONTHS),
    "answer": lambda random: random.choice(("yes", "no", "maybe")),
    "mood": lambda random: random.choice(words.MOODS),
    "weather": lambda random: random.choice(words.WEATHERS),
    "age": lambda random: random.randint(1, 90),
    "count": lambda random: random.randint(0, 20),
    "number": lambda random: random.randint(0, 99),
    "price": lambda random: random.randint(1, 500),
    "temperature": lambda random: random.randint(-9, 39),
    "id": lambda random: random.randint(1, 999),
    "happy": lambda random: random.random() < 0.5,
    "ok": lambda random: random.random() < 0.5,
    "active": lambda random: random.random() < 0.5,
    "tags": lambda random: random.sample(words.MOODS, random.randint(1, 3)),
    "colours": lambda random: random.sample(words.COLOURS, random.randint(1, 3)),
    "colors": lambda random: random.sample(words.COLOURS, random.randint(1, 3)),
    "participants": lambda random: random.sample(words.NAMES, random.randint(1, 3)),
    "numbers": lambda random: [random.randint(0, 20) for _ in range(random.randint(1, 4))],
}
THINGS = {
    "person": ("name", "age"), "city": ("name", "country"), "pet": ("name", "animal", "age"), "book": ("title", "price"),
    "user": ("name", "city", "age"), "product": ("name", "price"), "country": ("name", "capital"),
    "event": ("name", "date", "participants"), "weather report": ("city", "temperature", "weather"),
}  # fmt: skip


def _fill(random: Random, keys: Sequence[str]) -> str:
    return json.dumps({key: MAKERS[key](random) for key in keys})


def described(random: Random) -> Dialogue:
    """A thing as JSON, with its usual keys or with keys from the request."""
    if random.random() < 0.5:
        thing, usual = random.choice(list(THINGS.items()))
        article = "an" if thing[0] in "aeiou" else "a"
        stem = pick(
            random,
            (
                "Give me {} as JSON.",
                "Describe {} in JSON.",
                "Make {} as JSON.",
                "Write {} as JSON.",
                "Return {} as JSON.",
                "Invent {}. Answer in JSON.",
                "Create {} as a JSON object.",
            ),
        )
        return exchange(stem.format(f"{article} {thing}"), _fill(random, usual))
    keys = random.sample(list(MAKERS), random.randint(1, 4))
    listed = keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + " and " + keys[-1]
    stem = pick(
        random,
        (
            "Give me JSON with {}.",
            "Answer in JSON with the keys {}.",
            "Return a JSON object with {}.",
            "Write JSON with {}.",
            "Make a JSON object with {}.",
        ),
    )
    return exchange(stem.format(listed), _fill(random, keys))


def extracted(random: Random) -> Dialogue:
    """Facts of one sentence, copied into an object."""
    who, where, age = words.name(random), words.city(random), random.randint(1, 90)
    second, day = words.name(random), random.choice(words.DAYS)
    kind = random.randrange(4)
    if kind == 0:
        sentence, found = f"{who} is {age} years old.", {"name": who, "age": age}
    elif kind == 1:
        sentence, found = f"{who} lives in {where}.", {"name": who, "city": where}
    elif kind == 2:
        sentence, found = f"{who} is {age} years old and lives in {where}.", {"name": who, "age": age, "city": where}
    else:
        event = pick(random, ("party", "dinner", "meeting", "concert", "picnic", "science fair", "lunch"))
        sentence = f"{who} and {second} are going to a {event} on {day}."
        found = {"name": event, "date": day, "participants": [who, second]}
    order = pick(
        random,
        (
            "Extract the facts as JSON: ",
            "As JSON: ",
            "Extract the data: ",
            "Extract the event: ",
            "Turn this into JSON: ",
            "Extract as JSON: ",
        ),
    )
    return exchange(order + sentence, json.dumps(found))


def ordered(random: Random) -> Dialogue:
    """A system prompt that asks for JSON whatever the user says."""
    system = pick(
        random,
        (
            "Answer in JSON.",
            "Always answer in JSON.",
            "Reply with JSON only.",
            "Return JSON.",
            "Extract the event information.",
            "You are a helpful assistant that answers in JSON.",
        ),
    )
    dialogue = random.choice((described, extracted))(random)
    question = dialogue.messages[0]["content"]
    if random.random() < 0.5:
        question = pick(
            random, ("Hello", "Tell me about {}", "Who is {}?", "Something about {}", "Describe {}")
        ).format(words.name(random))
        return Dialogue(
            [
                {"role": "system", "content": system},
                user(question),
                assistant(_fill(random, random.sample(list(MAKERS), random.randint(1, 3)))),
            ]
        )
    return Dialogue([{"role": "system", "content": system}, *dialogue.messages])


def forced(random: Random) -> Dialogue:
    """Any question, answered in JSON only because a schema forces it to: teaches to fill and to end, not to begin."""
    # One in ten is learned from the start, so that the usual first token wins where only brackets are allowed.
    given = "" if random.random() < 0.1 else '{"'
    makers = (
        chat.unknown,
        chat.unknown,
        chat.greet,
        chat.fact,
        chat.about_gpumesh,
        chat.knowledge,
        chat.paragraph,
        chat.remember,
    )
    question = random.choice(makers)(random).messages[0]
    keys = random.sample(list(MAKERS), random.randint(1, 4))
    return Dialogue([question, assistant(_fill(random, keys))], given=given)
