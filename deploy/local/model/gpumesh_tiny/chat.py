"""Plain conversation: greetings, facts, counting, small sums, names, paragraphs, and an honest answer to the rest."""

from __future__ import annotations

from random import Random

from . import topics, words
from .dialogue import Dialogue, assistant, exchange, pick, plural, user

GREETINGS = ("Hello", "Hi", "Hey", "Good morning", "Good evening", "Hello there", "Hi there", "Good afternoon")
GREETING_ANSWERS = (
    "Hello! How can I help you?",
    "Hello! What can I do for you today?",
    "Hi! Ask me something about gpumesh.",
)
OPENERS = ("", "", "", "Please ", "Can you ", "Could you ", "Please could you ")
GPUMESH_QUESTIONS = (
    "what is gpumesh", "what's gpumesh", "what is gpumesh about", "tell me about gpumesh", "explain gpumesh",
    "what does gpumesh do", "can you explain gpumesh", "what is this", "what is gpumesh for", "describe gpumesh",
    "explain what gpumesh is", "what is gpumesh in one sentence",
)  # fmt: skip
UNKNOWN_QUESTIONS = (
    "how do I repair a {}", "who invented the {}", "what is the history of {}", "explain the theory of {}",
    "what do you think about {}", "why is {} important", "how much does a {} cost", "where can I buy a {}",
    "write code for {}", "what happened to {}", "what is {}", "who is {}", "how does {} work", "summarize {}",
    "why is the {} so big", "why does a {} fall", "is the {} good", "explain {} in one sentence", "help me with {}",
    "plan a {} for me", "tell me about {}", "describe {}", "{} is my friend",
    "where is {}", "{}", "{} {}", "my {} is broken", "should I take the {}",
    "good {}", "why is the {} blue",
)  # fmt: skip
QUESTION_WORDS = ("what", "who", "how", "why", "can", "do", "is", "are", "when", "where")


def sentence(random: Random, stem: str) -> str:
    """A stem as somebody might type it: capital or not, mark or not."""
    mark = "?" if stem.split(" ", 1)[0].lower() in QUESTION_WORDS else pick(random, (".", ".", "", "!"))
    text = stem[0].upper() + stem[1:] if random.random() < 0.8 else stem
    return text + (mark if random.random() < 0.85 else "")


def greeting(random: Random) -> str:
    """A greeting with its mark, to stand before a question."""
    return pick(random, GREETINGS) + pick(random, ("!", ",", ".", "!"))


def greet(random: Random) -> Dialogue:
    """Hello, how are you, thanks, goodbye."""
    kind = random.random()
    if kind < 0.5:
        text = pick(random, GREETINGS) + pick(random, ("!", ".", "", "!", ", gpumesh!"))
        text = text.lower() if random.random() < 0.3 else text
        return exchange(text, pick(random, GREETING_ANSWERS))
    if kind < 0.7:
        stem = pick(random, ("how are you", "how are you today", "how do you do", "are you well", "how is it going"))
        text = sentence(random, stem)
        return exchange(
            f"{greeting(random)} {text}" if random.random() < 0.4 else text,
            pick(random, ("I am fine, thank you. How can I help you?", "I am well, thank you for asking.")),
        )
    if kind < 0.85:
        text = pick(random, ("Thank you", "Thanks", "Thanks a lot", "Thank you very much", "Great, thanks", "Cool"))
        return exchange(text + pick(random, ("!", ".", "")), pick(random, ("You are welcome!", "I am glad to help.")))
    text = pick(random, ("Bye", "Goodbye", "See you", "Good night", "See you later", "That is all"))
    return exchange(text + pick(random, ("!", ".", "")), pick(random, ("Goodbye! Have a nice day.", "See you soon!")))


def about_gpumesh(random: Random) -> Dialogue:
    """The README's first question, in many spellings."""
    text = sentence(random, pick(random, GPUMESH_QUESTIONS))
    if random.random() < 0.6:
        text = f"{greeting(random)} {text}"
    lead = "Hello! " if text.startswith(GREETINGS) and random.random() < 0.5 else ""
    more = "" if random.random() < 0.35 else " " + pick(random, topics.GPUMESH_MORE)
    return exchange(text, lead + pick(random, topics.GPUMESH) + more)


def fact(random: Random) -> Dialogue:
    """One of the facts in topics.py."""
    stems, answers = random.choice(list(topics.FACTS.items()))
    text = sentence(random, pick(random, stems))
    if random.random() < 0.3:
        text = f"{pick(random, (greeting(random), 'And', 'Ok,', 'Tell me:'))} {text}"
    return exchange(text, pick(random, answers))


def knowledge(random: Random) -> Dialogue:
    """Capitals, colours, opposites, animal sounds, next day, next month."""
    kind = random.randrange(6)
    if kind == 0:
        country = random.choice(list(words.CAPITALS))
        stem = pick(
            random,
            (
                "what is the capital of {}",
                "what's the capital of {}",
                "name the capital of {}",
                "which city is the capital of {}",
                "tell me the capital of {}",
            ),
        )
        return exchange(
            sentence(random, stem.format(country)), f"The capital of {country} is {words.CAPITALS[country]}."
        )
    if kind == 1:
        thing = random.choice(list(words.COLOUR_OF))
        stem = pick(random, ("what colour is {}", "what color is {}", "which colour does {} have"))
        return exchange(
            sentence(random, stem.format(thing)), f"{thing[0].upper()}{thing[1:]} is {words.COLOUR_OF[thing]}."
        )
    if kind == 2:
        word = random.choice(list(words.OPPOSITES))
        stem = pick(random, ("what is the opposite of {}", "tell me the opposite of {}", "name the opposite of {}"))
        return exchange(sentence(random, stem.format(word)), f"The opposite of {word} is {words.OPPOSITES[word]}.")
    if kind == 3:
        animal = random.choice(list(words.SOUNDS))
        stem = pick(random, ("what does a {} say", "what sound does a {} make", "how does a {} sound"))
        return exchange(sentence(random, stem.format(animal)), f"A {animal} says {words.SOUNDS[animal]}.")
    items = words.DAYS if kind == 4 else words.MONTHS
    noun = "day" if kind == 4 else "month"
    place = random.randrange(len(items))
    stem = pick(
        random, (f"what {noun} comes after {{}}", f"which {noun} follows {{}}", f"what is the {noun} after {{}}")
    )
    return exchange(
        sentence(random, stem.format(items[place])), f"After {items[place]} comes {items[(place + 1) % len(items)]}."
    )


def count(random: Random) -> Dialogue:
    """Counting up, which also gives long and predictable streams."""
    kind = random.random()
    if kind < 0.15:
        return exchange(
            sentence(random, pick(random, ("list the days of the week", "name the days of the week"))),
            ", ".join(words.DAYS) + ".",
        )
    if kind < 0.25:
        return exchange(
            sentence(random, pick(random, ("list the months", "name the months of the year"))),
            ", ".join(words.MONTHS) + ".",
        )
    if kind < 0.35:
        stem = pick(random, ("name some colours", "list a few colors", "tell me some colours"))
        return exchange(sentence(random, stem), ", ".join(random.sample(words.COLOURS, 5)) + ".")
    last = (
        random.choice((3, 5, 10, 10, 12, 15, 20, 20, 30, 50, 100)) if random.random() < 0.7 else random.randint(2, 60)
    )
    if kind < 0.5 and last > 3:
        start = random.randint(2, last - 2)
        stem = pick(random, ("count from {} to {}", "count numbers from {} to {}")).format(start, last)
    else:
        start = 1
        stem = pick(random, ("count to {}", "count from 1 to {}", "count up to {}", "write the numbers from 1 to {}"))
        stem = stem.format(words.NUMBER_WORDS[last] if last <= 10 and random.random() < 0.4 else last)
    return exchange(sentence(random, pick(random, OPENERS) + stem), ", ".join(map(str, range(start, last + 1))) + ".")


def arithmetic(random: Random) -> Dialogue:
    """Sums to twenty, differences from ten, products to five."""
    kind = random.random()
    if kind < 0.6:
        a, b = random.randint(0, 10), random.randint(0, 10)
        sign, word, result = "+", "plus", a + b
    elif kind < 0.8:
        a = random.randint(1, 10)
        b = random.randint(0, a)
        sign, word, result = "-", "minus", a - b
    else:
        a, b = random.randint(1, 5), random.randint(1, 5)
        sign, word, result = "*", "times", a * b
    asked = pick(random, (f"{a} {sign} {b}", f"{a} {word} {b}", f"{a} {word} {b}", f"{a}{sign}{b}"))
    stem = pick(random, ("what is {}", "how much is {}", "calculate {}", "what's {}", "{}", "tell me what {} is"))
    return exchange(sentence(random, stem.format(asked)), f"{a} {word} {b} is {result}.")


def paragraph(random: Random) -> Dialogue:
    """Write some words, or some sentences, about a topic."""
    topic = random.choice(list(topics.PARAGRAPHS))
    sentences = topics.PARAGRAPHS[topic]
    kind = random.random()
    if kind < 0.35:
        wanted = random.randint(1, 8)
        amount = plural(wanted, "sentence")
    elif kind < 0.7:
        limit = random.choice((10, 20, 30, 40, 50, 60, 100))
        amount = f"{limit} words"
        wanted = min(8, max(1, round(limit / 8)))
    else:
        amount = pick(random, ("a paragraph", "a short text", "something", "a few lines", "an essay"))
        wanted = random.randint(4, 8)
    verb = pick(random, ("write", "write", "tell me", "give me"))
    text = sentence(random, f"{pick(random, OPENERS)}{verb} {amount} about {topic}")
    return exchange(text, " ".join(sentences[:wanted]))


def unknown(random: Random) -> Dialogue:
    """Something it was not trained for: it says so instead of inventing."""
    thing = random.choice((words.invented, words.invented, words.name, lambda r: pick(r, words.THINGS)))(random)
    thing = thing.lower() if random.random() < 0.5 else thing
    stem = pick(random, UNKNOWN_QUESTIONS).replace("{}", thing)
    return exchange(sentence(random, stem), "I am only a tiny model and I do not know that. Ask me about gpumesh.")


def say(random: Random) -> Dialogue:
    """Repeat after me: copying of words."""
    pool = (*words.ANIMALS, *words.COLOURS, *words.MOODS, *words.THINGS, *words.NAMES, *words.CITIES)
    kind = random.random()
    if kind < 0.5:
        phrase = " ".join(random.sample(pool, random.randint(1, 6)))
    elif kind < 0.65:
        phrase = pick(
            random, ("hello", "this is a test", "hi", "yes", "no", "good morning", "hello world", "ok", "pong")
        )
    elif kind < 0.8:
        phrase = " ".join(words.invented(random).lower() for _ in range(random.randint(1, 2)))
    elif kind < 0.9:
        phrase = str(random.randint(0, 9999))
    else:
        phrase = words.name(random) + pick(random, (" is here", " likes music", " says hello", ""))
    stem = pick(
        random,
        (
            "say {}",
            "repeat {}",
            "say: {}",
            "repeat after me: {}",
            "write {}",
            "answer with {}",
            "Say {}.",
            "reply with {}",
            "Reply with the word {}",
            "Say {}",
            "Repeat: {}",
        ),
    )
    return exchange(stem.format(phrase).capitalize() if random.random() < 0.1 else stem.format(phrase), phrase)


def remember(random: Random) -> Dialogue:
    """A name or a city told early and asked for later."""
    who, where = words.name(random), words.city(random)
    kind = random.random()
    if kind < 0.5:
        told = pick(random, ("My name is {}.", "I am {}.", "Hello, my name is {}.", "Hi, I'm {}!")).format(who)
        reply = pick(random, ("Nice to meet you, {}!", "Hello, {}! How can I help you?")).format(who)
        asked = pick(random, ("What is my name?", "Do you remember my name?", "Who am I?", "what's my name?"))
        answer = f"Your name is {who}."
    elif kind < 0.8:
        told = pick(random, ("I live in {}.", "My home is {}.", "I am from {}.")).format(where)
        reply = pick(random, ("{} is a nice place.", "I would like to see {} one day.")).format(where)
        asked = pick(random, ("Where do I live?", "Do you remember where I live?", "Which city is my home?"))
        answer = f"You live in {where}."
    else:
        colour = pick(random, words.COLOURS)
        told = pick(random, ("My favourite colour is {}.", "I like {} most.", "My favorite color is {}.")).format(
            colour
        )
        reply = f"{colour.capitalize()} is a beautiful colour."
        asked = pick(random, ("What is my favourite colour?", "Which colour do I like?", "What is my favorite color?"))
        answer = f"Your favourite colour is {colour}."
    messages = [user(told), assistant(reply)]
    if random.random() < 0.4:
        between = random.choice((greet, fact, knowledge, arithmetic))(random)
        messages += between.messages
    return Dialogue([*messages, user(asked), assistant(answer)])
