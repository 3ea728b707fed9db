"""Training on one CPU thread: whole dialogues in rows of like length, loss on the assistant's tokens alone."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from .corpus import dialogues, new_random
from .dialogue import Dialogue
from .network import Network
from .template import END_OF_TEXT, render_parts

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how fast to train."""

    tokens: int
    seed: int
    tokens_per_batch: int = 4096
    pool: int = 4096
    matrix_rate: float = 0.02
    vector_rate: float = 0.004
    warm_up_share: float = 0.02
    # Factor on both rates: below one to go on from a trained network.
    strength: float = 1.0
    # The last part of the run takes the rate down to nothing; before that it is constant.
    cool_down_share: float = 0.5


def pieces(tokenizer: Tokenizer, text: str, random: Random) -> list[int]:
    """Token ids of an answer; JSON is sometimes cut at its marks, as a grammar cuts it when it rules out a token."""
    if not text.startswith("{") or random.random() < 0.5:
        return list(tokenizer.encode(text).ids)
    cut = "".join(mark + "\0" if mark in '{":' and random.random() < 0.15 else mark for mark in text)
    # A marker token must stay whole, and no JSON of ours has one inside.
    return [number for part in cut.split("\0") if part for number in tokenizer.encode(part).ids]


def encode(tokenizer: Tokenizer, dialogue: Dialogue, random: Random) -> tuple[list[int], list[int]]:
    """Token ids and labels of one dialogue; labels are IGNORED outside the assistant's own text."""
    ids: list[int] = []
    labels: list[int] = []
    given = len(tokenizer.encode(dialogue.given).ids)
    for text, learned in render_parts(dialogue.messages, dialogue.tools):
        piece = pieces(tokenizer, text, random) if learned else list(tokenizer.encode(text).ids)
        ids += piece
        skipped = given if learned else len(piece)
        labels += [IGNORED] * skipped + piece[skipped:]
    return ids, labels


def batches(tokenizer: Tokenizer, plan: Plan, context: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (ids, labels), both [rows, length]; rows hold one whole dialogue each, so nothing is ever cut."""
    source = dialogues(plan.seed)
    random = new_random(plan.seed + 1)
    padding = tokenizer.encode(END_OF_TEXT).ids[0]
    while True:
        pool = [encode(tokenizer, dialogue, random) for dialogue in islice(source, plan.pool)]
        pool = sorted((row for row in pool if len(row[0]) <= context), key=lambda row: len(row[0]))
        groups: list[list[tuple[list[int], list[int]]]] = [[]]
        for row in pool:
            if groups[-1] and (len(groups[-1]) + 1) * len(row[0]) > plan.tokens_per_batch:
                groups.append([])
            groups[-1].append(row)
        random.shuffle(groups)
        for group in groups:
            length = len(group[-1][0])
            ids = [row + [padding] * (length - len(row)) for row, _ in group]
            labels = [row + [IGNORED] * (length - len(row)) for _, row in group]
            yield torch.tensor(ids), torch.tensor(labels)


def loss_of(network: Network, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats over the learned tokens of a batch."""
    hidden = network(ids[:, :-1])
    wanted = labels[:, 1:]
    learned = wanted != IGNORED
    # Only rows that count go through the vocabulary: two thirds of all tokens are prompts.
    return functional.cross_entropy(network.logits(hidden[learned]).float(), wanted[learned])


def rate(progress: float, plan: Plan) -> float:
    """Learning-rate factor at `progress` in [0, 1]."""
    if progress < plan.warm_up_share:
        return progress / plan.warm_up_share
    return max(0.0, min(1.0, (1.0 - progress) / plan.cool_down_share))


def optimizers(network: Network, plan: Plan) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms; each with its full rate."""
    matrices = [p for name, p in network.named_parameters() if p.dim() == 2 and name != "token_embd.weight"]
    vectors = [p for name, p in network.named_parameters() if p.dim() != 2 or name == "token_embd.weight"]
    muon = torch.optim.Muon(matrices, lr=plan.matrix_rate, weight_decay=0.01, momentum=0.95)
    adam = torch.optim.AdamW(vectors, lr=plan.vector_rate, betas=(0.9, 0.95), weight_decay=0.0)
    return [(muon, plan.matrix_rate), (adam, plan.vector_rate)]


def train(network: Network, tokenizer: Tokenizer, plan: Plan) -> int:
    """Trains in place on `plan.tokens` tokens; returns the number of tokens seen. One thread: the machine is shared."""
    torch.set_num_threads(1)
    steps = optimizers(network, plan)
    began, seen, mean = time.monotonic(), 0, math.nan
    for number, (ids, labels) in enumerate(batches(tokenizer, plan, network.shape.context)):
        progress = seen / plan.tokens
        if progress >= 1.0:
            break
        for optimizer, full in steps:
            for group in optimizer.param_groups:
                group["lr"] = full * plan.strength * rate(progress, plan)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(network, ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer, _ in steps:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen += ids.numel()
        mean = loss.item() if math.isnan(mean) else 0.98 * mean + 0.02 * loss.item()
        if number % 100 == 0:
            print(f"step {number} tokens {seen} loss {mean:.4f} time {time.monotonic() - began:.0f} s", flush=True)
    return seen
