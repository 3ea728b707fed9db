"""The tools of the corpus: each family makes a definition, a request, its right arguments, a result and an answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from . import chat, words
from .dialogue import pick, plural, tool

PREFIXES = ("", "", "", "", "Please ", "Can you ", "Could you ", "Hi! ", "Hello, ")


@dataclass(frozen=True, slots=True)
class Use:
    """One use of a tool: its definition, the request, the right arguments, a result and the sentence made of it."""

    definition: dict[str, Any]
    request: str
    arguments: dict[str, Any]
    result: str
    answer: str

    @property
    def name(self) -> str:
        """The function's name."""
        return str(self.definition["function"]["name"])


def _ask(random: Random, *stems: str) -> str:
    """A request from one of the stems: questions stay as they are, orders may get a polite beginning."""
    stem = pick(random, stems)
    if stem.split(" ", 1)[0].removesuffix("'s") in chat.QUESTION_WORDS:
        return chat.sentence(random, stem)
    prefix = pick(random, PREFIXES)
    mark = "?" if prefix.startswith(("Can", "Could")) else pick(random, (".", "", "!", " please."))
    text = prefix + stem
    return (text[0].upper() + text[1:] if random.random() < 0.8 else text) + mark


def weather(random: Random) -> Use:
    """get_weather(city): the one every example uses, so it has the most names."""
    where, sky, degrees = words.city(random), pick(random, words.WEATHERS), random.randint(-9, 39)
    today = pick(random, ("", "", "", " today", " now", " right now", " tomorrow"))
    name = pick(
        random, ("get_weather", "get_weather", "get_weather", "get_current_weather", "weather", "fetch_weather")
    )
    key = pick(random, ("city", "city", "location", "location", "place"))
    request = _ask(
        random,
        f"what is the weather in {where}",
        f"what's the weather in {where}",
        f"how is the weather in {where}",
        f"what is the weather like in {where}{today}",
        f"is it raining in {where}",
        f"what's the weather like in {where}{today}",
        f"how warm is it in {where}{today}",
        f"what is the weather in {where}{today}",
        f"what's the weather in {where}{today}",
        f"tell me the weather in {where}",
        f"check the weather in {where}",
        f"get the weather for {where}",
        f"show me the weather for {where}",
        f"is it cold in {where}",
        f"do I need an umbrella in {where}",
        f"what is the temperature in {where}",
    )
    kind = random.randrange(5)
    unit = pick(random, ("temperature", "temp", "temperature_c", "degrees"))
    facts: dict[str, Any] = {unit: degrees, pick(random, ("condition", "weather", "sky")): sky}
    if kind == 0:
        return Use(
            tool(name, {key: "string"}),
            request,
            {key: where},
            f"{sky}, {degrees} degrees",
            f"In {where} it is {sky} and {degrees} degrees.",
        )
    if kind == 1:
        return Use(tool(name, {key: "string"}), request, {key: where}, sky, f"In {where} it is {sky}.")
    if kind == 2:
        return Use(
            tool(name, {key: "string"}),
            request,
            {key: where},
            json.dumps({unit: degrees}),
            f"In {where} it is {degrees} degrees.",
        )
    if kind == 3:
        facts = {key: where, **facts}
    return Use(
        tool(name, {key: "string"}),
        request,
        {key: where},
        json.dumps(facts),
        f"In {where} it is {sky} and {degrees} degrees.",
    )


def clock(random: Random) -> Use:
    """get_time(city)."""
    where = words.city(random)
    time = f"{random.randint(0, 23):02d}:{random.randint(0, 59):02d}"
    name = pick(random, ("get_time", "get_time", "get_current_time", "current_time", "clock"))
    key = pick(random, ("city", "city", "location", "place"))
    request = _ask(
        random,
        f"what time is it in {where}",
        f"what is the time in {where}",
        f"tell me the time in {where}",
        f"what's the time in {where}",
        f"give me the local time in {where}",
        f"what time is it now in {where}",
        f"check the time in {where}",
    )
    result = time if random.random() < 0.5 else json.dumps({"time": time})
    return Use(tool(name, {key: "string"}), request, {key: where}, result, f"It is {time} in {where}.")


def timer(random: Random) -> Use:
    """set_timer(minutes): an integer copied from the text."""
    minutes = random.randint(1, 90)
    name = pick(random, ("set_timer", "set_timer", "start_timer", "timer"))
    length = plural(minutes, "minute")
    request = _ask(
        random,
        f"set a timer for {length}",
        f"start a timer for {length}",
        f"remind me in {length}",
        f"set a {minutes} minute timer",
        f"wake me in {length}",
        f"start a {minutes} minute timer",
        f"count down {length}",
    )
    return Use(
        tool(name, {"minutes": "integer"}),
        request,
        {"minutes": minutes},
        pick(random, ("ok", "done", '{"status": "ok"}', '{"ok": true}')),
        f"The timer is set for {length}.",
    )


def calculator(random: Random) -> Use:
    """add(a, b) or multiply(a, b): two integers in order."""
    a, b = random.randint(1, 99), random.randint(1, 99)
    kind = random.randrange(3)
    name = (
        ("add", "add_numbers", "sum"),
        ("multiply", "multiply_numbers", "product"),
        ("subtract", "minus", "difference"),
    )[kind]
    sign, verb = (("+", "plus"), ("*", "times"), ("-", "minus"))[kind]
    order = (f"add {a} and {b}", f"multiply {a} and {b}", f"calculate {a} minus {b}")[kind]
    total = (a + b, a * b, a - b)[kind]
    request = _ask(
        random,
        f"what is {a} {verb} {b}",
        f"how much is {a} {verb} {b}",
        order,
        f"what is {a} {sign} {b}",
        f"calculate {a} {sign} {b}",
    )
    result = str(total) if random.random() < 0.6 else json.dumps({"result": total})
    return Use(
        tool(pick(random, name), {"a": "integer", "b": "integer"}),
        request,
        {"a": a, "b": b},
        result,
        f"{a} {verb} {b} is {total}.",
    )


def message(random: Random) -> Use:
    """send_message(to, text): a name and some words."""
    who, what = words.name(random), pick(random, words.SUBJECTS)
    name = pick(random, ("send_message", "send_message", "send_email", "send_mail", "notify"))
    to = pick(random, ("to", "to", "name", "recipient"))
    key = pick(random, ("text", "subject", "message", "topic"))
    request = _ask(
        random,
        f"send {who} a message about {what}",
        f"write to {who} about {what}",
        f"send a message to {who} about {what}",
        f"tell {who} about {what}",
        f"send an email to {who} about {what}",
    )
    return Use(
        tool(name, {to: "string", key: "string"}),
        request,
        {to: who, key: what},
        pick(random, ("sent", "ok", '{"status": "sent"}')),
        f"I sent {who} a message about {what}.",
    )


def light(random: Random) -> Use:
    """turn_on_light(room), turn_off_light(room): two tools that differ by one word."""
    room, state = pick(random, words.ROOMS), pick(random, ("on", "off"))
    request = _ask(
        random,
        f"turn {state} the light in the {room}",
        f"switch {state} the {room} light",
        f"turn the light {state} in the {room}",
        f"turn {state} the lamp in the {room}",
    )
    return Use(
        tool(f"turn_{state}_light", {"room": "string"}),
        request,
        {"room": room},
        pick(random, ("ok", "done")),
        f"The light in the {room} is {state}.",
    )


def music(random: Random) -> Use:
    """play_music(artist)."""
    artist = words.invented(random) if random.random() < 0.3 else pick(random, words.ARTISTS)
    key = pick(random, ("artist", "artist", "name"))
    request = _ask(
        random,
        f"play some {artist}",
        f"play music by {artist}",
        f"put on something by {artist}",
        f"play {artist}",
        f"I want to hear {artist}",
    )
    return Use(
        tool(pick(random, ("play_music", "play", "play_song")), {key: "string"}),
        request,
        {key: artist},
        pick(random, ("playing", "ok")),
        f"Now playing {artist}.",
    )


def web_search(random: Random) -> Use:
    """search(query)."""
    what = pick(random, words.SEARCHES)
    key = pick(random, ("query", "query", "q", "text"))
    request = _ask(
        random,
        f"search for {what}",
        f"look up {what}",
        f"find {what}",
        f"search the web for {what}",
        f"find information about {what}",
    )
    found = pick(random, ("3 results", "12 results", "a good page", "nothing"))
    return Use(
        tool(pick(random, ("search", "web_search", "search_web")), {key: "string"}),
        request,
        {key: what},
        found,
        f"I searched for {what} and found {found}.",
    )


def stock(random: Random) -> Use:
    """get_stock_price(symbol)."""
    symbol, price = pick(random, words.SYMBOLS), random.randint(10, 900)
    key = pick(random, ("symbol", "symbol", "ticker"))
    request = _ask(
        random,
        f"what is the price of {symbol}",
        f"how much is {symbol}",
        f"get the stock price of {symbol}",
        f"tell me the price of {symbol}",
        f"check {symbol}",
    )
    result = str(price) if random.random() < 0.5 else json.dumps({"price": price})
    return Use(
        tool(pick(random, ("get_stock_price", "stock_price", "get_price")), {key: "string"}),
        request,
        {key: symbol},
        result,
        f"The price of {symbol} is {price}.",
    )


def translate(random: Random) -> Use:
    """translate(text, language)."""
    word, language = pick(random, (*words.ANIMALS, *words.COLOURS, *words.THINGS)), pick(random, words.LANGUAGES)
    request = _ask(
        random,
        f"translate {word} to {language}",
        f"translate {word} into {language}",
        f"what is {word} in {language}",
        f"how do you say {word} in {language}",
    )
    foreign = words.invented(random).lower()
    key = pick(random, ("language", "language", "target", "to"))
    return Use(
        tool("translate", {"text": "string", key: "string"}),
        request,
        {"text": word, key: language},
        foreign,
        f"In {language} {word} is {foreign}.",
    )


def lookup(random: Random) -> Use:
    """A tool with an invented name: the name itself must be copied from the list."""
    verb = pick(random, ("get", "find", "open", "show", "delete", "book", "check", "start", "stop"))
    noun = pick(random, (*words.THINGS, "order", "table", "room", "file", "car", "ticket", "user", "account"))
    target = words.name(random) if random.random() < 0.5 else str(random.randint(1, 999))
    key = pick(random, ("id", "name", "number", f"{noun}_id"))
    request = _ask(
        random,
        f"{verb} the {noun} {target}",
        f"{verb} {noun} {target}",
        f"{verb} the {noun} of {target}",
        f"{verb} the {noun} for {target}",
    )
    state = pick(random, ("ok", "done", "ready", "open", "closed"))
    return Use(tool(f"{verb}_{noun}", {key: "string"}), request, {key: target}, state, f"The {noun} {target}: {state}.")


FAMILIES: tuple[Callable[[Random], Use], ...] = (
    weather, weather, weather, weather, clock, clock, timer, timer, calculator, calculator, message, light, music,
    web_search, stock, translate, lookup, lookup,
)  # fmt: skip
