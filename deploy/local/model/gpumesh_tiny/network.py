"""A small Llama in PyTorch: RMSNorm, rotary positions in interleaved pairs (as GGUF's `llama` wants), SwiGLU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

NORM_EPSILON = 1e-5
ROPE_BASE = 10_000.0
WRITTEN_OUT_LENGTH = 512


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the network; rows are multiples of 32 so that Q8_0 blocks fit."""

    vocabulary: int
    context: int = 2048
    width: int = 128
    layers: int = 6
    heads: int = 4
    feed_forward: int = 352

    @property
    def head_width(self) -> int:
        """Numbers per attention head."""
        return self.width // self.heads


def rope_tables(length: int, head_width: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine, both [length, head_width / 2]."""
    frequencies = ROPE_BASE ** (-torch.arange(0, head_width, 2).float() / head_width)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turns pairs (0,1), (2,3), ... of the last axis; x is [batch, heads, length, head_width]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1).flatten(-2)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention over [batch, heads, length, head_width].

    Short rows are written out: PyTorch's fused CPU kernel spends a third of a training step in its backward pass.
    """
    length = query.shape[-2]
    if length > WRITTEN_OUT_LENGTH:
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    future = torch.full((length, length), -torch.inf, dtype=query.dtype).triu(1)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + future
    return scores.softmax(dim=-1).to(value.dtype) @ value


class Block(nn.Module):
    """One transformer layer with pre-normalisation."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        width, hidden = shape.width, shape.feed_forward
        self.attn_norm = nn.RMSNorm(width, eps=NORM_EPSILON)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_output = nn.Linear(width, width, bias=False)
        self.ffn_norm = nn.RMSNorm(width, eps=NORM_EPSILON)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.ffn_down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """x and the answer are [batch, length, width]."""
        batch, length, width = x.shape
        split = self.qkv(self.attn_norm(x)).view(batch, length, 3, self.shape.heads, self.shape.head_width)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = attend(rotate(query, cosine, sine), rotate(key, cosine, sine), value)
        x = x + self.attn_output(mixed.transpose(1, 2).reshape(batch, length, width))
        gate, up = self.gate_up(self.ffn_norm(x)).chunk(2, dim=-1)
        return x + self.ffn_down(functional.silu(gate) * up)


class Network(nn.Module):
    """Token ids [batch, length] to hidden states [batch, length, width]; the output matrix is the embedding's."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.output_norm = nn.RMSNorm(shape.width, eps=NORM_EPSILON)
        cosine, sine = rope_tables(shape.context, shape.head_width)
        self.register_buffer("cosine", cosine, persistent=False)
        self.register_buffer("sine", sine, persistent=False)
        residual_scale = (2 * shape.layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                scale = residual_scale if name.endswith(("attn_output.weight", "ffn_down.weight")) else 1.0
                nn.init.normal_(parameter, std=0.04 * scale)

    def forward(self, ids: Tensor) -> Tensor:
        """Hidden states after the last norm; multiply by `token_embd.weight` for logits."""
        length = ids.shape[1]
        x = self.token_embd(ids)
        for block in self.blocks:
            x = block(x, self.cosine[:length], self.sine[:length])
        return self.output_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits over the vocabulary for any leading shape of `hidden`."""
        return functional.linear(hidden, self.token_embd.weight)
