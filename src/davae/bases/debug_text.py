"""Small text encoders with random weights, and tokenizers built in code: no files, no network.

Every tokenizer is trained in milliseconds on a few sentences, so any text is encoded, common words in one or two
tokens. The encoders are the classes of the published pipelines, with large enough random weights that another
prompt gives clearly other features.
"""

import functools
import inspect
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

from diffusers import SanaPipeline
from tokenizers import Regex, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

VOCABULARY = 1024  # tokens; the encoders' embeddings have as many rows
WIDTH = 16  # features of every text encoder but CLIP
CLIP_WIDTH = 8  # two CLIP encoders side by side have WIDTH features
CLIP_TOKENS = 77
_SPREAD = 0.5  # standard deviation of the weights: small ones would hardly respond to the prompt

_SENTENCES = (
    "a photo of a red fox in the snow, a cat, a dog, a bird, a house, a tree, a car, a street, a city, "
    "a mountain, a river, the sea, the sky, the sun, a person, a face, a flower, a chair, a table",
    "blue green yellow black white brown orange small large old new bright dark painting drawing picture",
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n",
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment "
    "based on textual prompts or user prompts. <Prompt Start>",
)


def clip(suffix: str = "", *, projection: bool) -> dict[str, Any]:
    """CLIP's text model (with projection for pipelines that have two of them); byte pairs, lower case."""
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=CLIP_WIDTH,
        projection_dim=CLIP_WIDTH,
        intermediate_size=2 * CLIP_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        initializer_factor=10.0,
    )
    vocabulary, merges = _byte_pairs(("<|startoftext|>", "<|endoftext|>"), "</w>")
    tokenizer = CLIPTokenizer(vocab=dict(vocabulary), merges=list(merges), model_max_length=CLIP_TOKENS)
    return _pair((CLIPTextModelWithProjection if projection else CLIPTextModel)(config), tokenizer, suffix)


def t5(suffix: str = "") -> dict[str, Any]:
    """T5's encoder; unigrams: whole common words, else single characters."""
    return _pair(T5EncoderModel(T5Config(**_T5)), _t5_tokenizer(), suffix)


def umt5() -> dict[str, Any]:
    """UMT5's encoder with T5's tokenizer."""
    return _pair(UMT5EncoderModel(UMT5Config(**_T5)), _t5_tokenizer())


def gemma() -> dict[str, Any]:
    """Gemma 2 without its head; byte pairs with a start token and byte fallback."""
    bytes_ = (f"<0x{byte:02X}>" for byte in range(256))
    vocabulary, merges = _characters(("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *bytes_))
    tokenizer = GemmaTokenizer(vocab=dict(vocabulary), merges=list(merges), model_max_length=2048)
    return _pair(Gemma2Model(Gemma2Config(**_DECODER, head_dim=8, query_pre_attn_scalar=8)), tokenizer)


def qwen() -> dict[str, Any]:
    """Qwen2.5-VL with a minimal vision tower; byte pairs with the chat's special tokens."""
    text = {**_DECODER, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision = {
        "depth": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [0],
    }
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "vision_start_token_id": 3, "vision_end_token_id": 4}
    config = Qwen2_5_VLConfig(
        text_config=text | tokens, vision_config=vision, image_token_id=5, video_token_id=6, **tokens
    )
    vocabulary, merges = _byte_pairs(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    tokenizer = Qwen2Tokenizer(vocab=dict(vocabulary), merges=list(merges), model_max_length=2048)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return _pair(Qwen2_5_VLForConditionalGeneration(config), tokenizer)


def _pair(encoder: PreTrainedModel, tokenizer: Any, suffix: str = "") -> dict[str, Any]:
    """By the names that pipelines give them."""
    return {f"text_encoder{suffix}": encoder.eval(), f"tokenizer{suffix}": tokenizer}


def _t5_tokenizer() -> T5Tokenizer:
    words = sorted({word.strip(",:.") for text in _corpus() for word in text.split()})
    characters = sorted({c for text in _corpus() for c in text} | set(map(chr, range(33, 127))))
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(c, -8.0) for c in characters if not c.isspace()]
    pieces += [(f"▁{word}", -4.0) for word in words if word][: VOCABULARY - len(pieces)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 2 * WIDTH,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
}
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": _SPREAD,
}


@functools.cache
def _corpus() -> tuple[str, ...]:
    # With the instruction that SANA puts in front of every prompt, or that alone would be a thousand tokens.
    instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return (*_SENTENCES, *instruction)


_WORDS_WITH_SPACE = pre_tokenizers.Split(Regex(r" ?[^\s\p{P}]+|\p{P}|\s"), "isolated")


@functools.cache
def _byte_pairs(special: tuple[str, ...], end_of_word: str = "") -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of `VOCABULARY` tokens over bytes, learned from the sentences above."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*special, *alphabet, *(byte + end_of_word for byte in alphabet if end_of_word)]
    split = pre_tokenizers.Whitespace() if end_of_word else _WORDS_WITH_SPACE
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = _words(pre_tokenizers.Sequence([split, to_bytes]), _corpus())
    merges = _learned_merges(words, VOCABULARY - len(tokens), end_of_word)
    tokens += [left + right for left, right in merges]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}, merges


@functools.cache
def _characters(special: tuple[str, ...]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges over characters, with a mark for spaces and bytes for everything else."""
    corpus = [text.replace(" ", "\u2581") for text in _corpus()]
    words = _words(pre_tokenizers.Split("\u2581", "merged_with_previous"), corpus)
    tokens = [*special, *sorted({character for word in words for character in word})]
    merges = _learned_merges(words, VOCABULARY - len(tokens))
    tokens += [left + right for left, right in merges]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}, merges


def _words(splitter: pre_tokenizers.PreTokenizer, corpus: Sequence[str]) -> Counter[str]:
    return Counter(word for text in corpus for word, _ in splitter.pre_tokenize_str(text))


def _learned_merges(words: Counter[str], count: int, end_of_word: str = "") -> list[tuple[str, str]]:
    """The most frequent pairs, merged one after the other; of equals the first in alphabetical order.

    The tokenizers library's own trainer breaks ties differently in every process, which makes other pipelines.
    """
    parts = {word: [*word[:-1], word[-1] + end_of_word] for word in words}
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in parts.items():
            for pair in itertools.pairwise(symbols):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        parts = {word: _merged(symbols, best) for word, symbols in parts.items()}
    return merges


def _merged(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in symbols:
        joins = bool(merged) and merged[-1] == pair[0] and symbol == pair[1]
        merged[-1:] = [merged[-1] + symbol] if joins else [*merged[-1:], symbol]
    return merged
