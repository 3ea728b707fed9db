"""Makes the model: `python -m gpumesh_tiny make --out FOLDER [--tokens N] [--seed N]`."""

from __future__ import annotations

import argparse
import json
import time
from itertools import islice
from pathlib import Path

import torch

from .corpus import dialogues
from .export import export
from .network import Network, Shape
from .template import NAME, render
from .tokenizer import load_tokenizer, train_tokenizer
from .train import Plan, train

# Dialogues the tokenizer is fitted on; more change almost no merge.
TOKENIZER_DIALOGUES = 20_000
DEFAULT_TOKENS = 22_000_000
DEFAULT_SEED = 7
ONWARD_STRENGTH = 0.4


def make(out: Path, tokens: int, seed: int, onward: Path | None) -> None:
    """Tokenizer, training, export; writes `gpumesh-tiny.gguf` and `tokenizer.json` to `out`.

    `onward` is the folder of an earlier run to go on from, with its tokenizer and a gentler rate.
    """
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    if onward:
        tokenizer = load_tokenizer(onward / "tokenizer.json")
    else:
        texts = (render(d.messages, d.tools) for d in islice(dialogues(seed), TOKENIZER_DIALOGUES))
        tokenizer = train_tokenizer(texts)
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    torch.manual_seed(seed)
    network = Network(Shape(vocabulary=tokenizer.get_vocab_size()))
    earlier = {"training_tokens": 0, "seconds": 0}
    if onward:
        network.load_state_dict(torch.load(onward / "network.pt", weights_only=True))
        earlier = json.loads((onward / "training.json").read_text())
    parameters = sum(parameter.numel() for parameter in network.parameters())
    seen = train(network, tokenizer, Plan(tokens=tokens, seed=seed, strength=ONWARD_STRENGTH if onward else 1.0))
    # The weights before quantisation, so that an export can be made again without training.
    torch.save(network.state_dict(), out / "network.pt")
    export(network, tokenizer, out / f"{NAME}.gguf")
    facts = {
        "parameters": parameters,
        "training_tokens": earlier["training_tokens"] + seen,
        "onward_tokens": seen if onward else 0,
        "seed": seed,
        "seconds": earlier["seconds"] + round(time.monotonic() - began),
    }
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts))


def main() -> None:
    """Reads the command line and makes the model."""
    parser = argparse.ArgumentParser(prog="gpumesh_tiny", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpumesh-tiny.gguf and tokenizer.json")
    parser.add_argument("--tokens", type=int, default=DEFAULT_TOKENS, help="training tokens")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="seed of text, initial weights and order")
    parser.add_argument("--onward", type=Path, help="folder of an earlier run to go on from")
    arguments = parser.parse_args()
    make(arguments.out, arguments.tokens, arguments.seed, arguments.onward)


if __name__ == "__main__":
    main()
