"""Vocabularies in GGUF files of all kinds, against tokenizers built by the models' own tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import tokenizers
from lmserve._core import GgufFile, Tokenizer
from test_tokenizer import CONTROL, GPT2, bert, differences, small_bpe, strings, unigram, write_byte_level
from tokenizers import Regex, models, normalizers, pre_tokenizers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

__all__ = ["small_bpe"]

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
QWEN2 = GGUF_PRE_TOKENIZER_SPLITS["qwen2"]
LLAMA3 = GGUF_PRE_TOKENIZER_SPLITS["llama3"]
GPT4O = GGUF_PRE_TOKENIZER_SPLITS["gpt-4o"]
CJK = "[一-龥\u3040-\u309f\u30a0-\u30ff]+"
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KIMI = "|".join(
    [
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        + CONTRACTIONS
        + "?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        + CONTRACTIONS
        + "?",
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ]
)
SPLITS: dict[str, list[str]] = {name: [split] for name, split in GGUF_PRE_TOKENIZER_SPLITS.items()} | {
    "glm4": [LLAMA3],
    "exaone4": [GPT2],
    "mellum2": [r"\p{N}", GPT2],
    "stablelm2": [QWEN2],
    "grok-2": [QWEN2],
    "deepseek-v3": [r"\p{N}{1,3}", CJK, DEEPSEEK],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}"],
    "falcon": [r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"],
    "viking": [r" ?[^(\s|.,!?\x{2026}\x{3002}\x{ff0c}\x{3001}\x{964}\x{6d4}\x{60c})]+", r"\p{N}"],
    "seed-coder": [
        CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "bailingmoe": [
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    ],
    "superbpe": [r"\p{N}+", r"(?=(\d{3})+(?!\d))"],
    "kimi-k2": [KIMI],
    "tiny_aya": [r"\d{1,3}(?=(?:\d{3})*\b)", GPT4O],
}
WHOLE_WORDS = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"}
WHOLE_WORDS |= {"tekken", "llama4", "glm4"}
COMPOSED = {"qwen2", "deepseek-r1-qwen", "qwen35"}
# Those of llama.cpp that no case above names.
OTHERS = """minicpm5 deepseek-llm spark2_5 youtu mpt starcoder phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de
a.x-4.0 mellum modern-bert jina-v1-en jina-v2-code roberta-bpe jais-2 refact command-r olmo dbrx smaug-bpe poro-chat
chatglm-bpe glm5 jais codeshell bloom gpt3-finnish exaone exaone-moe chameleon minerva-7b granite-embed-multi-97m
cohere2moe trillion granite-docling bailingmoe2 llada-moe hunyuan hunyuan-dense hy_v4 joyai-llm ufakzeka afmoe laguna
solar-open"""
ENDS = {"<|begin|>": CONTROL, "<|end|>": CONTROL}


@pytest.mark.parametrize("pre", sorted(SPLITS))
def test_words_are_cut_as_the_models_own_file_says(pre: str, small_bpe: tokenizers.Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    write_byte_level(path, small_bpe, pre, ENDS)
    ours = Tokenizer.from_gguf(GgufFile(path))
    oracle = tokenizers.Tokenizer.from_str(small_bpe.to_str())
    oracle.model.ignore_merges = pre in WHOLE_WORDS
    cuts = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in SPLITS[pre]]
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    oracle.pre_tokenizer = pre_tokenizers.Sequence([*cuts, words])
    if pre in COMPOSED:
        oracle.normalizer = normalizers.NFC()
    assert differences(ours, oracle, strings(400, seed=5), add_special=False) == []


@pytest.mark.parametrize("pre", OTHERS.split())
def test_every_kind_gives_texts_back(pre: str, small_bpe: tokenizers.Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    write_byte_level(path, small_bpe, pre, ENDS)
    ours = Tokenizer.from_gguf(GgufFile(path))
    for text in [*strings(100, seed=6), "1234567 don't 漢字かな 12"]:
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("digits", ["1", "12", "123", "1234", "12345", "123456", "1234567"])
def test_digits_go_in_threes_from_the_last_one(digits: str, small_bpe: tokenizers.Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    write_byte_level(path, small_bpe, "afmoe", ENDS)
    ours = Tokenizer.from_gguf(GgufFile(path))
    first = len(digits) % 3 or 3
    groups = [digits[:first], *(digits[at : at + 3] for at in range(first, len(digits), 3))]
    assert ours.encode(digits) == [token for group in groups for token in ours.encode(group)]


def written(path: Path, kind: str, tokens: list[str], types: list[int], scores: list[float] | None = None) -> Tokenizer:
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if scores is not None:
        writer.add_token_scores(scores)
    for name in ("[CLS]", "<s>"):
        if name in tokens:
            writer.add_bos_token_id(tokens.index(name))
    for name in ("[UNK]", "<unk>"):
        if name in tokens:
            writer.add_unk_token_id(tokens.index(name))
    if "[SEP]" in tokens:
        writer.add_sep_token_id(tokens.index("[SEP]"))
    if "</s>" in tokens:
        writer.add_eos_token_id(tokens.index("</s>"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return Tokenizer.from_gguf(GgufFile(path))


def test_word_pieces_are_those_of_bert(tmp_path: Path) -> None:
    oracle = bert()
    oracle.no_truncation()
    oracle.no_padding()
    vocab = json.loads(oracle.to_str())["model"]["vocab"]
    original = sorted(vocab, key=vocab.__getitem__)
    special = [token.startswith("[") and token.endswith("]") and len(token) > 1 for token in original]
    stored = [
        token if kept else token[2:] if token.startswith("##") else f"▁{token}"
        for token, kept in zip(original, special, strict=True)
    ]
    ours = written(tmp_path / "a.gguf", "bert", stored, [3 if kept else 1 for kept in special])
    texts = [text for text in strings(800, seed=7) if not {"[", "▁"} & set(text)]
    assert differences(ours, oracle, texts, add_special=False) == []
    assert ours.encode("x", add_special=True)[::2] == [vocab["[CLS]"], vocab["[SEP]"]]


def test_unigram_pieces_are_the_most_likely(tmp_path: Path) -> None:
    trained = json.loads(unigram().to_str())
    pieces = trained["model"]["vocab"]
    tokens, scores = [token for token, _ in pieces], [score for _, score in pieces]
    types = [2 if token == "<unk>" else 3 if token.startswith("<") and token.endswith(">") else 1 for token in tokens]
    ours = written(tmp_path / "a.gguf", "t5", tokens, types, scores)
    # The scores of a file have 32 bits.
    exact = [(token, float(gguf.np.float32(score))) for token, score in pieces]
    oracle = tokenizers.Tokenizer(models.Unigram(exact, trained["model"]["unk_id"]))
    oracle.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")])
    oracle.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    texts = [text for text in strings(600, seed=8) if "<" not in text]
    assert differences(ours, oracle, texts, add_special=False) == []


def test_gemma4_merges_over_spaces(tmp_path: Path) -> None:
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<pad>", "<eos>", "<bos>", *bytes_, "▁", "a", "b", "▁a", "ab", "▁ab", "\n", "\n\n"]
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "gemma4")
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *([6] * 256), *([1] * 8)])
    writer.add_token_merges(["▁ a", "a b", "▁ ab", "\n \n"])
    writer.add_bos_token_id(2)
    writer.add_add_bos_token(True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    ours = Tokenizer.from_gguf(GgufFile(tmp_path / "a.gguf"))

    def ids(*names: str) -> list[int]:
        return [tokens.index(name) for name in names]

    assert ours.encode("ab a\n\nb", add_special=True) == ids("<bos>", "ab", "▁a", "\n\n", "b")
    assert ours.encode("é") == ids("<0xC3>", "<0xA9>")
    assert ours.decode(ours.encode(" ab  a\né")) == " ab  a\né"
