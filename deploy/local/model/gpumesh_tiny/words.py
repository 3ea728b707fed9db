"""The words of the corpus: names, places and things that templates combine."""

from __future__ import annotations

from random import Random


def _words(text: str) -> list[str]:
    return text.split()


_CITIES_OF_ONE_WORD = _words(
    "Paris London Berlin Madrid Rome Vienna Lisbon Dublin Oslo Stockholm Helsinki Copenhagen Amsterdam Brussels Zurich "
    "Geneva Prague Warsaw Budapest Athens Istanbul Moscow Kyiv Tokyo Kyoto Osaka Seoul Beijing Shanghai Singapore "
    "Bangkok Jakarta Manila Hanoi Mumbai Delhi Dubai Cairo Nairobi Lagos Accra Casablanca Sydney Melbourne Auckland "
    "Toronto Vancouver Montreal Boston Chicago Seattle Denver Austin Dallas Houston Miami Atlanta Portland Phoenix "
    "Lima Bogota Santiago Quito Havana Munich Hamburg Cologne Milan Naples Venice Florence Barcelona Seville Porto "
    "Lyon Nice Marseille Bordeaux Krakow Riga Tallinn Vilnius Sofia Zagreb Belgrade Reykjavik Edinburgh Glasgow "
    "Manchester Liverpool Bristol Oxford Cambridge York"
)
_CITIES_OF_TWO = ["New York", "San Francisco", "Los Angeles", "Hong Kong", "Cape Town", "Mexico City", "Buenos Aires"]
CITIES = [*_CITIES_OF_ONE_WORD, *_CITIES_OF_TWO]

NAMES = _words(
    "Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Maria Noah Olga Peter Quinn Rosa Sam Tina Uma "
    "Victor Wendy Xavier Yara Zoe Alice Bob Carol Daniel Eva Frank Hannah Ivan Julia Karl Laura Max Nina Oscar Paul "
    "Ruth Simon Tom Vera Will Amir Chen Priya Kofi Aiko Diego Fatima Lena Milo Nora Omar Sofia Theo John Jane"
)

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Spain": "Madrid", "Italy": "Rome", "Austria": "Vienna",
    "Portugal": "Lisbon", "Ireland": "Dublin", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki",
    "Denmark": "Copenhagen", "Belgium": "Brussels", "Poland": "Warsaw", "Hungary": "Budapest", "Greece": "Athens",
    "Japan": "Tokyo", "Egypt": "Cairo", "Kenya": "Nairobi", "Peru": "Lima", "Cuba": "Havana", "Chile": "Santiago",
    "England": "London", "China": "Beijing", "Thailand": "Bangkok", "Russia": "Moscow", "Ukraine": "Kyiv",
}  # fmt: skip

COLOURS = _words("red blue green yellow orange purple white black brown pink grey gold silver")

COLOUR_OF = {
    "the sky": "blue", "grass": "green", "snow": "white", "coal": "black", "a banana": "yellow", "blood": "red",
    "the sea": "blue", "a lemon": "yellow", "milk": "white", "a leaf": "green", "the sun": "yellow", "a carrot": "orange",
    "chocolate": "brown", "a tomato": "red", "night": "black", "a strawberry": "red",
}  # fmt: skip

OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "up": "down", "day": "night", "happy": "sad", "open": "closed",
    "light": "dark", "good": "bad", "old": "new", "full": "empty", "early": "late", "high": "low", "wet": "dry",
    "strong": "weak", "left": "right", "hard": "soft", "near": "far", "rich": "poor", "loud": "quiet",
}  # fmt: skip

SOUNDS = {"dog": "woof", "cat": "meow", "cow": "moo", "duck": "quack", "sheep": "baa", "lion": "roar", "bee": "buzz",
          "frog": "croak", "horse": "neigh", "owl": "hoot", "pig": "oink"}  # fmt: skip

DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words("January February March April May June July August September October November December")
NUMBER_WORDS = _words("zero one two three four five six seven eight nine ten")

ANIMALS = _words("fox rabbit cat dog bear owl mouse horse turtle duck wolf goat")
PLACES = ("forest", "village", "city", "valley", "harbour", "castle", "garden", "desert", "mountain", "island")
THINGS = ("key", "lamp", "map", "book", "clock", "boat", "stone", "bell", "coin", "kite", "box", "machine")
MOODS = ("happy", "curious", "brave", "quiet", "clever", "kind", "tired", "cheerful")
ROOMS = ("kitchen", "bedroom", "bathroom", "office", "garage", "hall", "living room", "garden")
ARTISTS = ("Mozart", "Bach", "Chopin", "Vivaldi", "Beethoven", "Debussy", "Schubert", "Verdi", "Handel", "Brahms")
LANGUAGES = ("French", "German", "Spanish", "Italian", "Japanese", "Dutch", "Polish", "Greek", "Portuguese", "Swedish")
SUBJECTS = ("lunch", "the meeting", "the report", "dinner", "the party", "the train", "the holiday", "the budget")
SEARCHES = (
    "cheap flights", "red shoes", "good coffee", "old maps", "blue paint", "fresh bread", "used bikes", "garden tools",
    "piano lessons", "train times", "winter coats", "green tea", "chess books", "running shoes", "quiet hotels",
)  # fmt: skip
WEATHERS = ("sunny", "cloudy", "rainy", "windy", "snowy", "foggy", "stormy", "clear")
SYMBOLS = ("AAPL", "GOOG", "MSFT", "NVDA", "AMD", "INTC", "TSLA", "IBM", "ORCL", "SAP")

_ONSETS = _words("b c d f g h k l m n p r s t v w z br ch cl dr fl gr kr pl pr sh sl st th tr")
_VOWELS = _words("a e i o u ai ea ee oo ou")
_CODAS = ["", "", "n", "r", "l", "s", "m", "x", "nd", "rk", "st", "t"]


def invented(random: Random) -> str:
    """A word that is in no list, so that the model learns to copy letters it has never seen together."""
    syllables = random.randint(2, 3)
    text = "".join(random.choice(_ONSETS) + random.choice(_VOWELS) + random.choice(_CODAS) for _ in range(syllables))
    return text.capitalize()


def city(random: Random) -> str:
    """Mostly a known city, sometimes an invented one, now and then in small letters."""
    found = invented(random) if random.random() < 0.15 else random.choice(CITIES)
    return found.lower() if random.random() < 0.05 else found


def name(random: Random) -> str:
    """Mostly a known first name, sometimes an invented one."""
    return invented(random) if random.random() < 0.1 else random.choice(NAMES)
