"""Stories of four to twenty-odd sentences; the long ones give streams of 150 to 300 tokens."""

from __future__ import annotations

from random import Random

from . import words
from .dialogue import Dialogue, exchange, pick

SHORT = ("Tell me a story.", "Tell me a short story.", "Write a short story.", "Can you tell me a story?",
         "Please tell me a story.", "I would like a story.", "Write a story.", "tell me a story")  # fmt: skip
LONG = ("Tell me a long story.", "Write a long story.", "Please tell me a long story.", "Can you tell me a long story?",
        "Tell me a very long story.", "I want a long story.", "Write a very long story.", "tell me a long story")  # fmt: skip


def _beginning(who: str, animal: str, place: str, mood: str, thing: str, random: Random) -> list[str]:
    """Who, where, and what was found."""
    return [
        pick(
            random,
            (
                "Once upon a time there was a {m} {a} called {w}.",
                "Long ago a {m} {a} called {w} was born.",
                "There once lived a {m} {a} called {w}.",
            ),
        ).format(m=mood, a=animal, w=who),
        pick(
            random,
            (
                "{w} lived near the {p}.",
                "{w} had a small house at the edge of the {p}.",
                "{w} knew every path in the {p}.",
            ),
        ).format(w=who, p=place),
        pick(
            random,
            (
                "One morning {w} found an old {t}.",
                "One day {w} saw a {t} in the grass.",
                "On a cold evening {w} found a strange {t}.",
            ),
        ).format(w=who, t=thing),
        pick(
            random,
            (
                "The {t} was small, but it shone like the sun.",
                "The {t} was dusty and very heavy.",
                "The {t} made a soft sound.",
            ),
        ).format(t=thing),
    ]


def _middle(who: str, friend: str, other: str, place: str, thing: str, random: Random) -> list[str]:
    """A friend, a way and three troubles."""
    return [
        pick(random, ('"Whose {t} is this?" asked {w}.', '"Where does this {t} come from?" said {w}.')).format(
            t=thing, w=who
        ),
        pick(random, ("{w} showed it to a friend, a {o} called {f}.", "{w} took it to {f}, an old {o}.")).format(
            w=who, o=other, f=friend
        ),
        pick(random, ('"I have seen it before," said {f}.', '"It belongs to somebody far away," said {f}.')).format(
            f=friend
        ),
        pick(random, ("So the two friends went on a long way.", "The two friends packed bread and water and left.")),
        pick(random, ("They walked all day and slept under a tree.", "They walked until the stars came out.")),
        pick(random, ("In the night it began to rain.", "At midnight a strong wind came up.")),
        pick(random, ("{f} was afraid, but {w} sang a song.", "{w} was afraid, but {f} told a funny story.")).format(
            f=friend, w=who
        ),
        pick(random, ("The next day they came to a wide river.", "In the morning they reached a deep river.")),
        pick(
            random, ("There was no bridge, so they built a small boat.", "The bridge was broken, so they had to swim.")
        ),
        pick(random, ("On the other side stood a high wall.", "On the other side they saw a light.")),
        pick(random, ("{w} knocked three times.", "{w} called as loud as possible.")).format(w=who),
        pick(random, ("A door opened and an old woman came out.", "A door opened and an old man looked at them.")),
        pick(random, ('"You have found my {t}!" said the old one.', '"My {t}!" cried the old one with joy.')).format(
            t=thing
        ),
        pick(random, ("For many years it had been lost in the {p}.", "It had been stolen and left in the {p}.")).format(
            p=place
        ),
    ]


def _ending(who: str, friend: str, place: str, random: Random) -> list[str]:
    """Thanks, the way home, and what was learned."""
    return [
        pick(random, ("As a thank-you they got a bag of gold.", "As a thank-you they got a warm meal and a song.")),
        pick(random, ("Then {w} and {f} went home together.", "After a week {w} and {f} went home.")).format(
            w=who, f=friend
        ),
        pick(
            random, ("Everybody in the {p} wanted to hear what had happened.", "There was a big party in the {p}.")
        ).format(p=place),
        pick(random, ("From that day on {w} was never alone.", "From that day on {w} helped everybody.")).format(w=who),
        pick(
            random, ("And they were friends for ever.", "And if you listen, you can still hear them laugh.", "The end.")
        ),
    ]


def tell(random: Random, about: str | None, *, long: bool) -> str:
    """One story; `about` is an animal or None for any."""
    animal = about or pick(random, words.ANIMALS)
    other = pick(random, [kind for kind in words.ANIMALS if kind != animal])
    who, friend = random.sample(words.NAMES, 2)
    place, thing, mood = pick(random, words.PLACES), pick(random, words.THINGS), pick(random, words.MOODS)
    start = _beginning(who, animal, place, mood, thing, random)
    middle = _middle(who, friend, other, place, thing, random)
    end = _ending(who, friend, place, random)
    if long:
        return " ".join(start + middle + end)
    return " ".join([*start, middle[1], middle[2], middle[12], end[1], end[4]])


def story(random: Random) -> Dialogue:
    """A request for a story, long or short, perhaps about an animal."""
    long = random.random() < 0.45
    if random.random() < 0.5:
        return exchange(pick(random, LONG if long else SHORT), tell(random, None, long=long))
    animal = pick(random, words.ANIMALS)
    kind = "long story" if long else pick(random, ("story", "short story"))
    verb = pick(random, ("Tell me", "Write", "Write me", "Please tell me", "Can you tell me"))
    mark = "?" if verb.startswith("Can") else "."
    article = "an" if animal[0] in "aeiou" else "a"
    return exchange(f"{verb} a {kind} about {article} {animal}{mark}", tell(random, animal, long=long))
