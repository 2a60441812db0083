"""Tokenizers against the `tokenizers` package: byte-level BPE from GGUF, and every kind of tokenizer.json."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import tokenizers
from lmserve._core import GgufFile, Tokenizer
from lmserve.errors import LmserveError
from text_samples import SENTENCES, strings
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

CONTROL, USER_DEFINED = 3, 4
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"


def differences(ours: Tokenizer, oracle: tokenizers.Tokenizer, texts: list[str], *, add_special: bool) -> list[str]:
    """Texts that the two cut differently."""
    expected = oracle.encode_batch(texts, add_special_tokens=add_special)
    pairs = zip(texts, expected, strict=True)
    return [text for text, want in pairs if ours.encode(text, add_special=add_special) != want.ids]


def byte_level_trainer(size: int) -> trainers.BpeTrainer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)


@pytest.fixture(scope="module")
def smollm2_oracle(smollm2_gguf: Path) -> tokenizers.Tokenizer:
    file = GgufFile(smollm2_gguf)
    tokens, types = file.get("tokenizer.ggml.tokens"), file.get("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in file.get("tokenizer.ggml.merges")]
    oracle = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    oracle.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    oracle.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    oracle.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in special])
    return oracle


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Tokenizer:
    return Tokenizer.from_gguf(GgufFile(smollm2_gguf))


def test_smollm2_encodes_as_the_oracle(smollm2: Tokenizer, smollm2_oracle: tokenizers.Tokenizer) -> None:
    texts = strings(10_000, seed=1, markers=("<|im_start|>", "<|im_end|>", "<|im_st"))
    assert differences(smollm2, smollm2_oracle, texts, add_special=False) == []


def test_smollm2_decodes_as_the_oracle(smollm2: Tokenizer, smollm2_oracle: tokenizers.Tokenizer) -> None:
    rng = random.Random(2)
    for _ in range(3000):
        tokens = [rng.randrange(smollm2.vocab_size + 3) for _ in range(rng.randint(0, 30))]
        for skip_special in (True, False):
            expected = smollm2_oracle.decode(tokens, skip_special_tokens=skip_special)
            assert smollm2.decode(tokens, skip_special=skip_special) == expected


def test_smollm2_gives_texts_back(smollm2: Tokenizer) -> None:
    # Its vocabulary lacks bytes that its training text never had.
    pieces = [smollm2.token_bytes(token) for token in range(smollm2.vocab_size)]
    known = {piece[0] for piece in pieces if piece is not None and len(piece) == 1}
    texts = [text for text in strings(3000, seed=3) if set(text.encode()) <= known]
    assert len(texts) > 1000
    for text in texts:
        assert smollm2.decode(smollm2.encode(text), skip_special=False) == text


def test_smollm2_knows_its_special_tokens(smollm2: Tokenizer) -> None:
    assert smollm2.vocab_size == 49152
    assert smollm2.token_to_id("<|im_end|>") == 2
    assert smollm2.is_special(2)
    assert not smollm2.is_special(49151)
    assert not smollm2.is_special(2**32 - 1)
    assert smollm2.token_to_id("no such token") is None
    assert smollm2.encode("<|im_start|>user\n<|im_end|>") == [1, *smollm2.encode("user\n"), 2]
    assert smollm2.decode([1, 2]) == ""
    assert smollm2.token_bytes(2) == b"<|im_end|>"
    assert smollm2.token_bytes(2**32 - 1) is None


def test_bytes_of_tokens_add_up_to_the_text(smollm2: Tokenizer) -> None:
    for text in SENTENCES:
        pieces = [smollm2.token_bytes(token) for token in smollm2.encode(text)]
        assert b"".join(piece for piece in pieces if piece is not None) == text.encode()


@pytest.fixture(scope="module")
def small_bpe() -> tokenizers.Tokenizer:
    oracle = tokenizers.Tokenizer(models.BPE())
    oracle.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    oracle.train_from_iterator(SENTENCES * 4, byte_level_trainer(1200))
    return oracle


def write_byte_level(
    path: Path, trained: tokenizers.Tokenizer, pre: str, special: dict[str, int], **flags: bool
) -> None:
    """A GGUF file with the vocabulary of `trained` and further tokens of the given types."""
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, *special])
    writer.add_token_types([*([1] * len(tokens)), *special.values()])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(len(tokens))
    writer.add_eos_token_id(len(tokens) + 1)
    for key, flag in flags.items():
        writer.add_bool(f"tokenizer.ggml.{key}", flag)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


SPECIAL = {
    "<|begin|>": CONTROL,
    "<|end|>": CONTROL,
    "<think>": USER_DEFINED,
    "<\uff5codd\u2581one\uff5c>": CONTROL,
    "   ": USER_DEFINED,
}
IGNORE_MERGES = {"llama-bpe", "tekken"}


def test_a_marker_that_is_typed_as_text_is_one_token(small_bpe: tokenizers.Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    write_byte_level(path, small_bpe, "gpt-2", {"<s>": CONTROL, "</s>": CONTROL, "<|im_end|>": 1})
    ours = Tokenizer.from_gguf(GgufFile(path))
    assert ours.is_special(ours.vocab_size - 1)
    assert ours.encode("a<|im_end|>")[-1] == ours.vocab_size - 1


@pytest.mark.parametrize("pre", ["gpt-2", "default", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o", "dbrx"])
def test_words_are_cut_as_each_family_cuts_them(pre: str, small_bpe: tokenizers.Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    write_byte_level(path, small_bpe, pre, SPECIAL, add_bos_token=True, add_eos_token=True)
    ours = Tokenizer.from_gguf(GgufFile(path))
    oracle = tokenizers.Tokenizer.from_str(small_bpe.to_str())
    oracle.model.ignore_merges = pre in IGNORE_MERGES
    splits = {**GGUF_PRE_TOKENIZER_SPLITS, "smollm": r"\p{N}"}
    if pre in splits:
        split = pre_tokenizers.Split(Regex(splits[pre]), behavior="isolated")
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre == "smollm")
        oracle.pre_tokenizer = pre_tokenizers.Sequence([split, words])
    if pre == "default":
        patterns = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")
        cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        oracle.pre_tokenizer = pre_tokenizers.Sequence([*cuts, words])
    if pre == "qwen2":
        oracle.normalizer = normalizers.NFC()
    oracle.decoder = decoders.ByteLevel()
    oracle.add_tokens(
        [tokenizers.AddedToken(token, special=kind == CONTROL, normalized=False) for token, kind in SPECIAL.items()]
    )
    first = small_bpe.get_vocab_size()
    around = [("<|begin|>", first), ("<|end|>", first + 1)]
    oracle.post_processor = processors.TemplateProcessing(single="<|begin|> $A <|end|>", special_tokens=around)
    texts = strings(2500, seed=4, markers=tuple(SPECIAL))
    assert differences(ours, oracle, texts, add_special=True) == []
    for text in texts[:500]:
        tokens = ours.encode(text)
        assert ours.decode(tokens, skip_special=True) == oracle.decode(tokens, skip_special_tokens=True)


def test_rules_that_are_not_known_are_refused(small_bpe: tokenizers.Tokenizer, tmp_path: Path) -> None:
    write_byte_level(tmp_path / "a.gguf", small_bpe, "my-own-rules", SPECIAL)
    with pytest.raises(LmserveError, match="my-own-rules") as caught:
        Tokenizer.from_gguf(GgufFile(tmp_path / "a.gguf"))
    assert caught.value.status == 400


def test_kinds_that_are_not_known_are_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "rwkv7")
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list(["[UNK]", "a"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(LmserveError, match="rwkv"):
        Tokenizer.from_gguf(GgufFile(tmp_path / "a.gguf"))


def bert() -> tokenizers.Tokenizer:
    oracle = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    oracle.normalizer = normalizers.BertNormalizer(lowercase=True)
    oracle.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    oracle.train_from_iterator(SENTENCES * 4, trainer)
    oracle.decoder = decoders.WordPiece()
    around = [(token, oracle.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    oracle.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    oracle.enable_truncation(8)
    oracle.enable_padding(length=8)
    return oracle


def unigram() -> tokenizers.Tokenizer:
    oracle = tokenizers.Tokenizer(models.Unigram())
    oracle.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    oracle.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=special, unk_token="<unk>", show_progress=False)
    oracle.train_from_iterator(SENTENCES * 4, trainer)
    oracle.decoder = decoders.Metaspace()
    # Scores of so few digits are read alike by every reader; the last bit of longer ones decides between equal paths.
    data = json.loads(oracle.to_str())
    data["model"]["vocab"] = [[piece, round(score, 6)] for piece, score in data["model"]["vocab"]]
    return tokenizers.Tokenizer.from_str(json.dumps(data))


def byte_fallback() -> tokenizers.Tokenizer:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=pieces, show_progress=False, limit_alphabet=60)
    oracle = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    oracle.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    oracle.train_from_iterator(SENTENCES * 4, trainer)
    clean = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    oracle.decoder = decoders.Sequence(clean)
    return oracle


def byte_level() -> tokenizers.Tokenizer:
    oracle = tokenizers.Tokenizer(models.BPE())
    oracle.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    oracle.train_from_iterator(SENTENCES * 4, byte_level_trainer(800))
    oracle.decoder = decoders.ByteLevel()
    oracle.add_special_tokens(["<|endoftext|>"])
    oracle.add_tokens([tokenizers.AddedToken("naïve", single_word=True), tokenizers.AddedToken("été ", rstrip=True)])
    return oracle


def bare() -> tokenizers.Tokenizer:
    oracle = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    oracle.pre_tokenizer = pre_tokenizers.Whitespace()
    return oracle


@pytest.mark.parametrize("train", [bert, unigram, byte_fallback, byte_level, bare])
def test_a_tokenizer_json_means_what_it_means_to_the_oracle(train: Callable[[], tokenizers.Tokenizer]) -> None:
    data = train().to_str()
    ours, oracle = Tokenizer.from_json(data.encode()), tokenizers.Tokenizer.from_str(data)
    oracle.no_truncation()
    oracle.no_padding()
    texts = strings(2500, seed=5, markers=("</s>", "[SEP]", "<|endoftext|>", "naïve", "été"))
    assert differences(ours, oracle, texts, add_special=True) == []
    rng = random.Random(6)
    for text in texts[:1500]:
        tokens = oracle.encode(text).ids if rng.random() < 0.5 else [rng.randrange(800) for _ in range(12)]
        for skip_special in (True, False):
            expected = oracle.decode(tokens, skip_special_tokens=skip_special)
            assert ours.decode(tokens, skip_special=skip_special) == expected


def test_every_word_of_a_piece_has_the_mark_that_it_has_in_the_whole_text() -> None:
    # As XLM-R: words are cut at spaces first, and then each gets the mark.
    oracle = unigram()
    oracle.normalizer = normalizers.NFKC()
    steps = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    oracle.pre_tokenizer = pre_tokenizers.Sequence(steps)
    ours = Tokenizer.from_json(oracle.to_str().encode())
    assert ours.works_in_pieces
    for text in strings(400, seed=9, markers=("</s>", "▁", "  ")):
        expected = oracle.encode(text).ids
        for piece_bytes in (16, 64):
            assert ours.encode(text, add_special=True, piece_bytes=piece_bytes) == expected, text


def test_minilm_encodes_and_decodes_as_the_oracle(minilm_folder: Path) -> None:
    data = (minilm_folder / "tokenizer.json").read_bytes()
    ours, oracle = Tokenizer.from_json(data), tokenizers.Tokenizer.from_str(data.decode())
    oracle.no_truncation()
    oracle.no_padding()
    texts = strings(4000, seed=8, markers=("[SEP]", "[MASK]"))
    assert differences(ours, oracle, texts, add_special=True) == []
    for text in texts:
        tokens = ours.encode(text, add_special=True)
        assert ours.decode(tokens) == oracle.decode(tokens)


MALFORMED = [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": {"type": "BPE"}}', b"[" * 100_000]


@pytest.mark.parametrize("data", MALFORMED, ids=range(len(MALFORMED)))
def test_files_that_are_no_tokenizer_are_refused(data: bytes) -> None:
    with pytest.raises(LmserveError) as caught:
        Tokenizer.from_json(data)
    assert caught.value.status == 400


def test_a_file_that_breaks_its_promises_later_is_refused_then() -> None:
    data = json.loads(bert().to_str())
    data["post_processor"]["special_tokens"] = {}
    ours = Tokenizer.from_json(json.dumps(data).encode())
    assert ours.decode(ours.encode("The dog")) == "the dog"
    with pytest.raises(LmserveError, match="tokenized") as caught:
        ours.encode("The dog", add_special=True)
    assert caught.value.status == 400


def test_a_merge_that_cuts_a_character_is_refused() -> None:
    model = {"type": "BPE", "vocab": {"a": 0, "é": 1}, "merges": [["a", "é"]], "continuing_subword_prefix": "#"}
    with pytest.raises(LmserveError) as caught:
        Tokenizer.from_json(json.dumps({"version": "1.0", "added_tokens": [], "model": model}).encode())
    assert caught.value.status == 400
