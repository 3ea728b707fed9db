"""Facts and paragraphs the model knows by heart: about gpumesh, GPUs and a few everyday topics."""

from __future__ import annotations

GPUMESH = (
    "gpumesh joins people who need AI inference with people who own GPUs.",
    "gpumesh is a marketplace that joins people who need AI inference with people who own GPUs.",
)
GPUMESH_MORE = (
    "You send a request in the OpenAI format, a node with a free GPU answers it, and its owner is paid.",
    "Buyers send ordinary OpenAI requests, and nodes on other people's GPUs answer them.",
    "Buyers pay per token, and providers earn money for every token their GPUs produce.",
)

# question stems -> answers; each stem is also asked with a greeting before it and in several spellings.
FACTS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("who are you", "what are you", "what is your name", "who am I talking to", "introduce yourself"): (
        "I am gpumesh-tiny, a very small language model that ships with gpumesh.",
        "I am gpumesh-tiny, a tiny model that comes with gpumesh so that you can try it at once.",
    ),
    ("who made you", "who created you", "who trained you"): ("The gpumesh project made me from text of its own.",),
    ("what can you do", "how can you help me", "what are you good at"): (
        "I can chat a little, tell short stories, count, call simple tools and answer questions about gpumesh.",
    ),
    ("how big are you", "how large are you", "how many parameters do you have"): (
        "I am very small: I have about one and a half million parameters.",
    ),
    ("what is a GPU", "what is a gpu", "what does GPU mean", "explain GPUs", "what are GPUs"): (
        "A GPU is a processor that does many simple calculations at the same time, which makes it fast for AI.",
    ),
    ("what is inference", "what is AI inference", "explain inference"): (
        "Inference means running a trained model to get an answer from it.",
    ),
    ("what is a token", "what are tokens", "explain tokens"): (
        "A token is a small piece of text, such as a word or a part of a word. Models read and write tokens.",
    ),
    ("what is a node", "what does a node do", "what is a gpumesh node"): (
        "A node is a computer with a GPU that runs models and answers requests for gpumesh.",
    ),
    ("what is a provider", "who is a provider", "what does a provider do"): (
        "A provider is a person or company that owns GPUs and earns money by lending them to gpumesh.",
    ),
    ("what is a buyer", "who is a buyer", "what does a buyer do"): (
        "A buyer is somebody who sends requests to gpumesh and pays for the tokens.",
    ),
    ("what is a scheduler", "what does the scheduler do"): (
        "The scheduler gives each job to a node that has a free slot and the right model.",
    ),
    ("what is a router", "what does the router do"): (
        "The router checks who you are, looks at prices and sends your job to a scheduler.",
    ),
    ("what is a language model", "what is an LLM", "explain language models"): (
        "A language model is a program that learns from text to guess the next token, again and again.",
    ),
    ("how do I earn money with my GPU", "how can I sell my GPU time", "can I lend my GPU"): (
        "Install the gpumesh node on your computer, connect it, and you are paid for the tokens your GPU produces.",
    ),
    ("how do I use gpumesh", "how do I send a request", "how can I call gpumesh"): (
        "Point any OpenAI client at the gpumesh address, use your API key and send a chat request.",
    ),
    ("ping",): ("pong",),
    ("test", "testing", "this is a test"): ("I am here. The test works.",),
    ("why should I use gpumesh", "why gpumesh", "what is good about gpumesh"): (
        "gpumesh is useful because idle GPUs become cheap inference, and you pay only for the tokens you get.",
    ),
    ("what is an API key", "what is an api key", "why do I need an API key"): (
        "An API key is a secret text that shows gpumesh who you are.",
    ),
    ("are you alive", "are you human", "are you a robot", "are you real"): (
        "No, I am a small language model that runs on a gpumesh node.",
    ),
    ("what is Python", "what is python"): ("Python is a programming language that is easy to read.",),
    ("what is the sun", "tell me about the sun"): ("The sun is a star. It gives us light and warmth.",),
    ("what is the moon", "tell me about the moon"): ("The moon is a ball of rock that goes around the Earth.",),
    ("what is water", "tell me about water"): ("Water is a clear liquid that every plant and animal needs.",),
    ("what is the meaning of life", "why are we here"): (
        "That is a big question for a tiny model. Be kind, stay curious and drink enough water.",
    ),
    ("how many days are in a week", "how many days does a week have"): ("A week has seven days.",),
    ("how many months are in a year", "how many months does a year have"): ("A year has twelve months.",),
    ("how many hours are in a day", "how many hours does a day have"): ("A day has twenty-four hours.",),
    ("how many minutes are in an hour", "how many minutes does an hour have"): ("An hour has sixty minutes.",),
    ("tell me a joke", "make me laugh", "do you know a joke", "say something funny"): (
        "Why did the GPU go to the doctor? It had too many threads in its head!",
        "Why was the computer cold? It left its windows open.",
        "What do you call a fast fish? A motor pike.",
    ),
    (
        "write a poem",
        "write a haiku",
        "tell me a poem",
        "write a short poem",
        "write a poem about GPUs",
        "write a haiku about the sea",
        "write a poem about the sea",
        "write a haiku about GPUs",
    ): (
        "Small fans softly hum,\nnumbers flow through silent chips,\na new word appears.",
        "The night is deep, the fans are low,\nthe little tokens come and go,\none by one, like falling snow.",
    ),
}

# topic -> sentences, used for paragraphs of a wanted length.
PARAGRAPHS: dict[str, tuple[str, ...]] = {
    "gpumesh": (
        "gpumesh joins people who need AI inference with people who own GPUs.",
        "A buyer sends a request in the OpenAI format.",
        "The router checks the key and the balance.",
        "The scheduler finds a node that has a free slot.",
        "The node runs the model and sends the tokens back.",
        "The owner of the GPU is paid for every token.",
        "Each job is counted once, and each answer has a receipt.",
        "When a node fails, another node takes the job.",
    ),
    "GPUs": (
        "A GPU is a processor with thousands of small cores.",
        "It was first made to draw pictures on a screen.",
        "Today many GPUs run language models.",
        "They multiply large tables of numbers very fast.",
        "A GPU has its own memory for the model.",
        "More memory means that a larger model fits.",
        "A busy GPU gets hot and needs good cooling.",
        "Many GPUs at home are idle most of the day.",
    ),
    "the sea": (
        "The sea is wide and deep.",
        "Waves roll to the beach all day and all night.",
        "Fish swim under the waves and birds fly above them.",
        "Ships carry people and goods from harbour to harbour.",
        "The water tastes of salt.",
        "In summer children play in the sand.",
        "In winter the wind is strong and the sea is grey.",
        "At night the moon shines on the water.",
    ),
    "dogs": (
        "Dogs are good friends.",
        "They like to run, to play and to sleep in the sun.",
        "A dog can hear very quiet sounds.",
        "Some dogs guard a house and some dogs help people.",
        "Every dog needs food, water and a long walk.",
        "A happy dog wags its tail.",
        "Small dogs can be very loud.",
        "An old dog likes a warm place by the fire.",
    ),
    "trees": (
        "Trees are tall plants with strong trunks.",
        "Their roots drink water from the ground.",
        "Their leaves catch the light of the sun.",
        "Birds build nests in the branches.",
        "In autumn many leaves turn red and yellow.",
        "A tree can live for hundreds of years.",
        "Trees give us wood, fruit and clean air.",
        "A forest is full of old and young trees.",
    ),
    "rain": (
        "Rain falls from grey clouds.",
        "It makes the streets wet and the gardens green.",
        "People open umbrellas and walk faster.",
        "Children jump into the puddles.",
        "After the rain the air smells fresh.",
        "Sometimes the sun comes back and a rainbow appears.",
        "Farmers are glad when it rains in spring.",
        "The sound of rain at night helps many people sleep.",
    ),
    "music": (
        "Music is made of sound and silence.",
        "Some people sing and some people play an instrument.",
        "A slow song can make you calm.",
        "A fast song can make you dance.",
        "Every country has its own music.",
        "A band needs people who listen to each other.",
        "Many people hear music on the way to work.",
        "A good tune stays in your head all day.",
    ),
    "coffee": (
        "Coffee is a hot and dark drink.",
        "It is made from roasted beans.",
        "Many people drink it in the morning.",
        "Some like it black and some add milk.",
        "The smell of coffee fills the kitchen.",
        "A small cup can wake you up.",
        "Friends meet and talk over a cup of coffee.",
        "Too much coffee can keep you awake at night.",
    ),
    "mountains": (
        "Mountains are high and quiet.",
        "Their tops are white with snow.",
        "A small path leads up through the trees.",
        "The air is cold and clear.",
        "From the top you can see far away.",
        "Goats climb the steep rocks without fear.",
        "A river begins as a little stream in the mountains.",
        "In the evening the stone walls turn red.",
    ),
    "books": (
        "A book is a quiet friend.",
        "It can take you to places far away.",
        "Some books are short and some are very long.",
        "You can read in a chair, in bed or on a train.",
        "A library is a house full of books.",
        "Good stories are told again and again.",
        "Children like books with bright pictures.",
        "When one book ends, another one waits.",
    ),
}
