"""Tool dialogues: choose the tool, copy its arguments from the user's words, and put the result into a sentence."""

from __future__ import annotations

from random import Random
from typing import Any

from . import chat, families, words
from .dialogue import Dialogue, assistant, call, pick, user

NO_TOOL = "I have no tool for that."


def with_distractors(random: Random, use: families.Use) -> list[dict[str, Any]]:
    """The right tool among none to three others of other names, in any order."""
    tools = [use.definition]
    for _ in range(random.choice((0, 0, 1, 1, 2, 3))):
        candidate = random.choice(families.FAMILIES)(random).definition
        # Two tools for the same job would make the right answer a matter of taste.
        if not any(_same_job(candidate, entry) for entry in tools):
            tools.append(candidate)
    random.shuffle(tools)
    return tools


def _same_job(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """True when both names are one, or speak of the same thing."""
    if first["function"]["name"] == second["function"]["name"]:
        return True

    def stems(entry: dict[str, Any]) -> set[str]:
        return set(entry["function"]["name"].split("_")) - {"get", "current", "set", "start", "turn", "on", "off"}

    jobs = (
        {"weather"},
        {"time", "clock", "current_time"},
        {"timer"},
        {"add", "sum"},
        {"multiply", "product"},
        {"message", "email", "mail", "notify"},
        {"music", "play", "song"},
        {"search"},
        {"price"},
        {"subtract", "minus"},
    )
    ours, theirs = stems(first), stems(second)
    return any(ours & job and theirs & job for job in jobs)


def tool_use(random: Random) -> Dialogue:
    """One request and its call; mostly also the result and the answer, sometimes a second request."""
    use = random.choice(families.FAMILIES)(random)
    tools = with_distractors(random, use)
    messages = [user(use.request), call(use.name, use.arguments)]
    kind = random.random()
    if kind < 0.55:
        messages += [{"role": "tool", "content": use.result}, assistant(use.answer)]
    if kind < 0.12:
        messages += random.choice((chat.greet, chat.about_gpumesh, chat.fact))(random).messages
    return Dialogue(messages, tools)


def weather_twice(random: Random) -> Dialogue:
    """A second city in the same conversation, asked for in few words."""
    first = families.weather(random)
    key = next(iter(first.arguments))
    where = words.city(random)
    asked = pick(random, ("And in {}?", "What about {}?", "And {}?", "How about {}?")).format(where)
    messages = [
        user(first.request),
        call(first.name, first.arguments),
        {"role": "tool", "content": first.result},
        assistant(first.answer),
        user(asked),
        call(first.name, {key: where}),
    ]
    return Dialogue(messages, with_distractors(random, first))


def no_tool(random: Random) -> Dialogue:
    """Tools are there, but the question is small talk, or none of them fits."""
    use = random.choice(families.FAMILIES)(random)
    tools = with_distractors(random, use)
    if random.random() < 0.2:
        other = random.choice((families.weather, families.clock, families.timer, families.music, families.stock))(
            random
        )
        if not any(_same_job(other.definition, entry) for entry in tools):
            return Dialogue([user(other.request), assistant(NO_TOOL)], tools)
    talk = random.choice((chat.greet, chat.greet, chat.about_gpumesh, chat.fact, chat.knowledge, chat.remember))(random)
    return Dialogue(talk.messages, tools)


def forced_call(random: Random) -> Dialogue:
    """Small talk where the request demands a call: after the words comes a call all the same, and then the end."""
    talk = random.choice((chat.greet, chat.about_gpumesh, chat.fact))(random)
    use = random.choice(families.FAMILIES)(random)
    said = talk.messages[1]["content"]
    turn = {**call(use.name, use.arguments), "content": said}
    return Dialogue([talk.messages[0], turn], with_distractors(random, use), given=said)
