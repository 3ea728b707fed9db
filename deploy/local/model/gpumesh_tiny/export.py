"""Writes the trained network and its tokenizer as one GGUF file that llama.cpp loads."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from .network import NORM_EPSILON, ROPE_BASE, Network
from .template import CHAT_TEMPLATE, CONTROL_TOKENS, END_OF_TEXT, MARKER_TOKENS, NAME, TURN_END

# Matrices that the network keeps as one, and the names of their parts in a GGUF.
FUSED = {"qkv": ("attn_q", "attn_k", "attn_v"), "gate_up": ("ffn_gate", "ffn_up")}


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    """Vocabulary, merges and token kinds; CONTROL tokens never appear in output text, markers do."""
    model = json.loads(tokenizer.to_str())["model"]
    by_id = {number: text for text, number in tokenizer.get_vocab(with_added_tokens=True).items()}
    tokens = [by_id[number] for number in range(len(by_id))]
    kinds = dict.fromkeys(CONTROL_TOKENS, gguf.TokenType.CONTROL)
    kinds |= dict.fromkeys(MARKER_TOKENS, gguf.TokenType.USER_DEFINED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([int(kinds.get(text, gguf.TokenType.NORMAL)) for text in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(tokenizer.token_to_id(END_OF_TEXT))
    writer.add_eos_token_id(tokenizer.token_to_id(TURN_END))
    writer.add_pad_token_id(tokenizer.token_to_id(END_OF_TEXT))
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _tensors(network: Network) -> dict[str, npt.NDArray[np.float32]]:
    """GGUF tensor names to arrays [out, in]; the fused matrices are split again."""
    found: dict[str, npt.NDArray[np.float32]] = {}
    for name, tensor in network.state_dict().items():
        array = tensor.detach().float().cpu().numpy()
        name = name.replace("blocks.", "blk.")
        fused = next((key for key in FUSED if f".{key}." in name), None)
        if fused:
            pieces = np.split(array, len(FUSED[fused]))
            found |= {name.replace(fused, part): piece for part, piece in zip(FUSED[fused], pieces, strict=True)}
        else:
            found[name] = array
    return found


def export(network: Network, tokenizer: Tokenizer, path: Path) -> None:
    """Writes `path`: matrices as Q8_0, norms as F32. Raises OSError when the file cannot be written."""
    shape = network.shape
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name(NAME)
    writer.add_author("the gpumesh authors")
    writer.add_license("apache-2.0")
    writer.add_description("A toy chat model trained on template text of gpumesh's own, for demonstrations and tests.")
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_Q8_0))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_layer_norm_rms_eps(NORM_EPSILON)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_rope_dimension_count(shape.head_width)
    writer.add_vocab_size(shape.vocabulary)
    _add_tokenizer(writer, tokenizer)
    for name, array in _tensors(network).items():
        if array.ndim == 1:
            writer.add_tensor(name, np.ascontiguousarray(array, dtype=np.float32))
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
