"""The whole corpus: a weighted mixture, system prompts, long conversations, and the held-out rule applied."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from . import chat, stories, structured, tools, words
from .dialogue import Dialogue, Maker, is_held_out, pick

SYSTEM_PROMPTS = (
    "You are a helpful assistant.", "You are a helpful assistant.", "You are gpumesh-tiny.", "Be brief.", "Be kind.",
    "You are a friendly assistant.", "Answer in one sentence.", "You are a concise assistant.", "Answer shortly.",
    "You are a helpful assistant with tools.", "Use the tools when needed.", "Answer the user's question.",
)  # fmt: skip
# Filled with a mood, an animal and a name; the model learns to answer the user and not the decoration.
ROLES = (
    "You are a {0} {1}.", "You are a {0} assistant for {2}.", "You help {2}.", "You are {2}.", "Talk like a {1}.",
    "You are a {0} {1} called {2}. Answer the user.", "The user is {2}. Be {0}.",
)  # fmt: skip

# Weight of each part; tools and copying need the most examples, facts only have to be repeated.
MIXTURE: tuple[tuple[float, Maker], ...] = (
    (0.30, tools.tool_use),
    (0.03, tools.weather_twice),
    (0.11, tools.no_tool),
    (0.006, tools.forced_call),
    (0.07, chat.about_gpumesh),
    (0.07, chat.fact),
    (0.05, chat.knowledge),
    (0.03, chat.greet),
    (0.04, chat.arithmetic),
    (0.05, chat.count),
    (0.05, chat.paragraph),
    (0.03, chat.unknown),
    (0.08, chat.say),
    (0.04, chat.remember),
    (0.06, stories.story),
    (0.05, structured.described),
    (0.03, structured.extracted),
    (0.02, structured.ordered),
    (0.05, structured.forced),
)
# The same questions must be answered at every length, so these are not subject to the held-out rule.
EXEMPT_PROMPTS = frozenset({*stories.SHORT, *stories.LONG, "Hello! What is gpumesh?"})


def new_random(seed: int) -> Random:
    """The one source of chance of the corpus."""
    return Random(seed)  # noqa: S311 - reproducible text, nothing secret


def held_out(dialogue: Dialogue) -> bool:
    """True when one of its prompts belongs to evaluation."""
    return any(is_held_out(prompt) and prompt not in EXEMPT_PROMPTS for prompt in dialogue.prompts())


def with_system(random: Random, dialogue: Dialogue) -> Dialogue:
    """A system prompt in front of some dialogues."""
    if random.random() < 0.25 and dialogue.messages[0]["role"] != "system":
        text = pick(random, SYSTEM_PROMPTS)
        if random.random() < 0.4:
            text = pick(random, ROLES).format(
                pick(random, words.MOODS), pick(random, words.ANIMALS), words.name(random)
            )
        return Dialogue([{"role": "system", "content": text}, *dialogue.messages], dialogue.tools, dialogue.given)
    return dialogue


def conversation(random: Random, turns: int) -> Dialogue:
    """Several plain dialogues in one, so that the model answers the last question and not the first."""
    makers = (chat.greet, chat.about_gpumesh, chat.fact, chat.knowledge, chat.arithmetic, chat.count, chat.paragraph,
              chat.say, chat.remember, chat.unknown, stories.story)  # fmt: skip
    messages = [message for _ in range(turns) for message in random.choice(makers)(random).messages]
    return Dialogue(messages)


def dialogues(seed: int) -> Iterator[Dialogue]:
    """Training dialogues without end; none of them contains a held-out prompt."""
    random = new_random(seed)
    weights, makers = [weight for weight, _ in MIXTURE], [maker for _, maker in MIXTURE]
    while True:
        chance = random.random()
        if chance < 0.08:
            dialogue = conversation(random, random.randint(2, 4))
        elif chance < 0.09:
            dialogue = conversation(random, random.randint(10, 30))
        else:
            dialogue = random.choices(makers, weights)[0](random)
        if not held_out(dialogue):
            yield with_system(random, dialogue)


def evaluation(maker: Maker, count: int, seed: int) -> Iterator[Dialogue]:
    """`count` dialogues of `maker` whose first prompt is held out and not repeated."""
    random = new_random(seed)
    seen: set[str] = set()
    while len(seen) < count:
        dialogue = maker(random)
        prompt = dialogue.prompts()[0]
        if is_held_out(prompt) and prompt not in EXEMPT_PROMPTS and prompt not in seen:
            seen.add(prompt)
            yield dialogue
