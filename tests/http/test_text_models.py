"""Models that embed and score texts, served whole: XLM-R with a unigram tokenizer, BERT with WordPiece."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from conftest import ServerThread
from lmserve.app import create_app
from lmserve.config import ServeConfig
from lmserve.engine.load import ModelPlan
from lmserve.model import open_checkpoint
from lmserve.model.answer_head import FRAME
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from wire import error_of

WORDS = ["the", "cat", "sat", "on", "a", "mat", "dog", "ran", "query", "far", "what", "has", "fur"]
LETTERS = "abcdefghijklmnopqrstuvwxyz:"
CAT, DOG, LONG = "the cat sat on a mat", "a dog ran far", "the cat sat on a mat " * 20
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}


def unigram() -> tokenizers.Tokenizer:
    """As XLM-R's: pieces with scores, words begin with a mark, <s> and </s> around texts."""
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -2.0 - index / 10) for index, word in enumerate(WORDS)]
    pieces += [
        ("▁", -5.0),
        *((letter, -6.0 - index / 10) for index, letter in enumerate("abcdefghijklmnopqrstuvwxyz:")),
    ]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    special = [("<s>", 0), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> </s> $B </s>", special)
    return tokenizer


def word_pieces() -> tokenizers.Tokenizer:
    """As BERT's."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    tokens = list(dict.fromkeys(tokens))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    special = [("[CLS]", 2), ("[SEP]", 3)]
    pair = "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", pair, special)
    return tokenizer


def save(folder: Path, model: Any, tokenizer: tokenizers.Tokenizer, files: dict[str, Any]) -> None:
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value))


class Served:
    """A client of a served model, the model, and its tokenizer."""

    def __init__(self, client: httpx.Client, model: Any, tokenizer: tokenizers.Tokenizer) -> None:
        self.client = client
        self.model = model
        self.tokenizer = tokenizer

    def post(self, route: str, **fields: Any) -> Any:
        response = self.client.post(route, json=fields)
        assert response.status_code == 200, response.text
        return response.json()

    def embed(self, texts: list[str], **fields: Any) -> np.ndarray:
        data = self.post("/v1/embeddings", input=texts, **fields)["data"]
        return np.array([item["embedding"] for item in data])

    @torch.inference_mode()
    def vector(self, ids: list[int]) -> np.ndarray:
        states = self.model(torch.tensor([ids])).last_hidden_state[0].numpy()
        mean = states.mean(0)
        return mean / np.linalg.norm(mean)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    @torch.inference_mode()
    def logits(self, first: str, second: str) -> np.ndarray:
        pair = self.tokenizer.encode(first, second)
        types = {"token_type_ids": torch.tensor([pair.type_ids])} if "Bert" in type(self.model).__name__[:4] else {}
        return self.model(torch.tensor([pair.ids]), **types).logits[0].numpy()


def serve(folder: Path, model: Any, tokenizer: tokenizers.Tokenizer) -> Iterator[Served]:
    engine = ModelPlan(folder, ServeConfig(threads=1)).load_async_engine()
    with (
        ServerThread(create_app(engine, ["texts"])) as thread,
        httpx.Client(base_url=thread.url, timeout=60) as client,
    ):
        yield Served(client, model, tokenizer)


@pytest.fixture(scope="module")
def xlm_r(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder, tokenizer = tmp_path_factory.mktemp("xlm-r"), unigram()
    torch.manual_seed(1)
    config = transformers.XLMRobertaConfig(
        vocab_size=tokenizer.get_vocab_size(), pad_token_id=1, type_vocab_size=1, max_position_embeddings=34, **SIZES
    )
    model = transformers.XLMRobertaModel(config).eval()
    modules = [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    prompts = {"prompts": {"query": "query: ", "passage": "far "}, "default_prompt_name": None}
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": {"pooling_mode_mean_tokens": True},
        "config_sentence_transformers.json": prompts,
    }
    save(folder, model, tokenizer, files)
    config_json = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config_json | {"matryoshka_dimensions": [8, 16]}))
    yield from serve(folder, model, tokenizer)


@pytest.fixture(scope="module")
def nomic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Its files are those of a model whose name alone says how vectors are cut."""
    folder, tokenizer = tmp_path_factory.mktemp("nomic") / "nomic-embed-text-v1.5", word_pieces()
    torch.manual_seed(5)
    sizes = SIZES | {"hidden_size": 128, "num_attention_heads": 2}
    config = transformers.NomicBertConfig(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=64, **sizes)
    model = transformers.NomicBertModel(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name.lower():
            # As transformers starts them, vectors would have no mean.
            torch.nn.init.normal_(parameter, 0.5 if name.endswith("weight") else 0.2, 0.3)
    modules = [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    files = {"modules.json": modules, "1_Pooling/config.json": {"pooling_mode_mean_tokens": True}}
    save(folder, model, tokenizer, files)
    yield from serve(folder, model, tokenizer)


@pytest.fixture(scope="module", params=["Bert", "XLMRoberta"])
def reranker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    kind = request.param
    folder, tokenizer = tmp_path_factory.mktemp("reranker"), word_pieces() if kind == "Bert" else unigram()
    torch.manual_seed(2)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=tokenizer.get_vocab_size(),
        pad_token_id=0 if kind == "Bert" else 1,
        num_labels=1,
        max_position_embeddings=40,
        **SIZES | ({} if kind == "Bert" else {"type_vocab_size": 1}),
    )
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    save(folder, model, tokenizer, {})
    yield from serve(folder, model, tokenizer)


def test_texts_are_tokenized_and_embedded_as_by_transformers(xlm_r: Served) -> None:
    texts = [CAT, DOG, "Wörter, 你好", "x", f"  {CAT}  {DOG}"]
    found = xlm_r.embed(texts)
    for text, vector in zip(texts, found, strict=True):
        np.testing.assert_allclose(vector, xlm_r.vector(xlm_r.ids(text)), atol=2e-5)
        np.testing.assert_array_equal(vector, xlm_r.embed([text])[0])


def test_prompts_by_name_and_by_type(xlm_r: Served) -> None:
    plain, query, passage = xlm_r.embed([CAT, f"query: {CAT}", f"far {CAT}"])
    same = [
        ({}, plain),
        ({"prompt_name": "query"}, query),
        ({"prompt_name": "passage"}, passage),
        ({"input_type": "query"}, query),
        ({"input_type": "search_query"}, query),
        ({"input_type": "document"}, passage),
        ({"input_type": "search_document"}, passage),
        ({"input_type": "clustering"}, plain),
    ]
    for fields, expected in same:
        np.testing.assert_array_equal(xlm_r.embed([CAT], **fields)[0], expected)


def test_rerank_gives_query_and_documents_their_prompts(xlm_r: Served) -> None:
    query, cat, dog = xlm_r.embed([f"query: {CAT}", f"far {CAT}", f"far {DOG}"])
    results = xlm_r.post("/v1/rerank", query=CAT, documents=[CAT, DOG])["results"]
    assert {item["index"]: item["relevance_score"] for item in results} == pytest.approx(
        {0: query @ cat, 1: query @ dog}, abs=1e-5
    )


def test_only_lengths_that_the_model_was_trained_for(xlm_r: Served) -> None:
    whole = xlm_r.embed([CAT])[0]
    for length in (8, 16, 32):
        expected = whole[:length] / np.linalg.norm(whole[:length])
        np.testing.assert_allclose(xlm_r.embed([CAT], dimensions=length)[0], expected, atol=1e-6)
    response = xlm_r.client.post("/v1/embeddings", json={"input": CAT, "dimensions": 12})
    assert "dimensions must be 8, 16, 32" in error_of(response, 400, param="dimensions")["message"]


@torch.inference_mode()
def test_nomics_vectors_pass_a_layer_norm_before_they_are_cut(nomic: Served) -> None:
    states = nomic.model(torch.tensor([nomic.ids(CAT)])).last_hidden_state[0]
    # As its publisher has it: https://huggingface.co/nomic-ai/nomic-embed-text-v1.5
    pooled = states.mean(0, keepdim=True)
    cut = torch.nn.functional.layer_norm(pooled, pooled.shape[1:])[:, :64]
    expected = torch.nn.functional.normalize(cut)[0].numpy()
    np.testing.assert_allclose(nomic.embed([CAT], dimensions=64)[0], expected, atol=2e-4)
    assert np.abs(nomic.vector(nomic.ids(CAT)).mean()) > 1e-3
    np.testing.assert_allclose(nomic.embed([CAT], dimensions=128)[0], nomic.vector(nomic.ids(CAT)), atol=2e-4)
    response = nomic.client.post("/v1/embeddings", json={"input": CAT, "dimensions": 100})
    assert "dimensions must be 64, 128, 256, 512" in error_of(response, 400, param="dimensions")["message"]


def test_a_long_text_is_refused_or_cut(xlm_r: Served) -> None:
    ids = xlm_r.ids(LONG)
    response = xlm_r.client.post("/v1/embeddings", json={"input": [CAT, LONG]})
    error = error_of(response, 400, "context_length_exceeded", "input")
    assert f"at most 32 tokens, but input 1 has {len(ids)}" in error["message"]
    first, last = ids[0], ids[-1]
    for fields, expected in [
        ({"truncate_prompt_tokens": -1}, [*ids[:31], last]),
        ({"truncate": True}, [*ids[:31], last]),
        ({"truncate": "END"}, [*ids[:31], last]),
        ({"truncate": "START"}, [first, *ids[-31:]]),
        ({"truncate_prompt_tokens": 5}, [*ids[:4], last]),
        ({"truncate_prompt_tokens": 5, "truncate": "START"}, [first, *ids[-4:]]),
        ({"truncate_prompt_tokens": 5000}, [*ids[:31], last]),
    ]:
        reply = xlm_r.post("/v1/embeddings", input=LONG, **fields)
        assert reply["usage"]["prompt_tokens"] == len(expected)
        np.testing.assert_allclose(reply["data"][0]["embedding"], xlm_r.vector(expected), atol=2e-5)
    np.testing.assert_array_equal(xlm_r.embed([CAT], truncate=True), xlm_r.embed([CAT]))
    cut = xlm_r.post("/v1/embeddings", input=[[5, 6, 7, 8]], truncate_prompt_tokens=2)
    np.testing.assert_allclose(cut["data"][0]["embedding"], xlm_r.vector([5, 6]), atol=2e-5)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt_name": "title"}, "prompt_name"),
        ({"prompt_name": "query", "input_type": "query"}, "prompt_name"),
        ({"input": [[5, 6]], "prompt_name": "query"}, "prompt_name"),
        ({"input": [[5, 6]], "input_type": "query"}, "input_type"),
        ({"truncate_prompt_tokens": 2}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"truncate": "MIDDLE"}, "truncate"),
        ({"dimensions": 33}, "dimensions"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": []}, "input"),
        ({"input": ["a"] * 100_000}, "input"),
        ({"input": [[5, 99999]]}, "input"),
    ],
)
def test_what_the_model_does_not_have_is_named(xlm_r: Served, fields: dict[str, Any], param: str) -> None:
    error_of(xlm_r.client.post("/v1/embeddings", json={"input": CAT, **fields}), 400, param=param)


def test_a_model_of_texts_does_not_chat(xlm_r: Served, reranker: Served) -> None:
    for served in (xlm_r, reranker):
        response = served.client.post("/v1/completions", json={"prompt": CAT})
        assert response.status_code == 400


def test_pairs_are_scored_as_by_transformers(reranker: Served) -> None:
    documents = [DOG, CAT, "Wörter", "what has fur"]
    expected = [1 / (1 + np.exp(-float(reranker.logits(CAT, text)[0]))) for text in documents]
    scores = reranker.post("/v1/score", text_1=CAT, text_2=documents)["data"]
    assert [item["score"] for item in scores] == pytest.approx(expected, abs=1e-5)
    results = reranker.post("/v1/rerank", query=CAT, documents=documents)["results"]
    assert [item["index"] for item in results] == sorted(range(4), key=lambda index: -expected[index])
    assert [item["relevance_score"] for item in results] == pytest.approx(sorted(expected, reverse=True), abs=1e-5)
    alone = reranker.post("/v1/score", text_1=[CAT], text_2=[DOG])["data"]
    assert alone[0]["score"] == scores[0]["score"]


def test_a_long_document_is_refused_or_cut(reranker: Served) -> None:
    response = reranker.client.post("/v1/rerank", json={"query": CAT, "documents": [DOG, LONG]})
    assert "documents[1] has" in error_of(response, 400, "context_length_exceeded", "documents")["message"]
    most = 40 if type(reranker.model).__name__.startswith("Bert") else 38
    reranker.tokenizer.enable_truncation(most, strategy="only_second")
    try:
        expected = 1 / (1 + np.exp(-float(reranker.logits(CAT, LONG)[0])))
    finally:
        reranker.tokenizer.no_truncation()
    reply = reranker.post("/v1/score", text_1=CAT, text_2=LONG, truncate_prompt_tokens=-1)
    assert reply["data"][0]["score"] == pytest.approx(expected, abs=1e-5)
    assert reply["usage"]["prompt_tokens"] == most
    response = reranker.client.post("/v1/score", json={"text_1": LONG, "text_2": CAT, "truncate_prompt_tokens": -1})
    assert response.status_code == 400


def test_a_model_that_scores_embeds_nothing(reranker: Served) -> None:
    response = reranker.client.post("/v1/embeddings", json={"input": CAT})
    assert "cannot compute embeddings" in error_of(response, 400, param="model")["message"]


def test_raw_scores_are_logits(reranker: Served) -> None:
    documents = [DOG, CAT, "what has fur"]
    logits = [float(reranker.logits(CAT, text)[0]) for text in documents]
    order = sorted(range(3), key=lambda index: -logits[index])
    for raw, expected in ((True, logits), (None, [1 / (1 + np.exp(-logit)) for logit in logits])):
        reply = reranker.post("/rerank", query=CAT, texts=documents, raw_scores=raw, return_text=True)
        assert [item["index"] for item in reply] == order
        assert [item["score"] for item in reply] == pytest.approx([expected[index] for index in order], abs=1e-4)
        assert [item["text"] for item in reply] == [documents[index] for index in order]
    body = {"query": CAT, "texts": [LONG]}
    error_of(reranker.client.post("/rerank", json=body), 400, "context_length_exceeded")
    cut = reranker.post("/v1/score", text_1=CAT, text_2=LONG, truncate_prompt_tokens=-1)["data"][0]["score"]
    assert reranker.post("/rerank", **body, truncate=True) == [{"index": 0, "score": cut}]
    assert reranker.post("/rerank", **body, truncate=True, truncation_direction="Left") != [{"index": 0, "score": cut}]


def as_float32(vectors: Any) -> list[list[float]]:
    """What the digits of a reply stand for: some routes write more of them."""
    rows: list[list[float]] = np.array(vectors, np.float32).tolist()
    return rows


def test_documents_are_cut_to_their_tokens(reranker: Served, xlm_r: Served) -> None:
    # The prompt for documents, a token, counts.
    for served, most in ((reranker, 3), (xlm_r, 4)):
        for route in ("/v1/rerank", "/v2/rerank", "/rerank"):
            reply = served.post(route, query=CAT, documents=[LONG, DOG], max_tokens_per_doc=most)
            # The query is not cut.
            expected = served.post(route, query=CAT, documents=["the cat sat", "a dog ran"])
            scores = [
                {item["index"]: item["relevance_score"] for item in answer["results"]} for answer in (reply, expected)
            ]
            assert scores[0] == scores[1]
            assert reply["usage"] == expected["usage"]
        # A document that stays too long is refused all the same.
        long = {"query": CAT, "documents": [CAT, LONG], "max_tokens_per_doc": 100}
        error = error_of(served.client.post("/v2/rerank", json=long), 400, "context_length_exceeded", "documents")
        assert "documents[1] has" in error["message"]
    error_of(xlm_r.client.post("/rerank", json={"query": CAT, "texts": [DOG], "max_tokens_per_doc": 3}), 400)


def test_errors_name_the_fields_of_their_route(xlm_r: Served, reranker: Served) -> None:
    for fields, param, words in (
        ({"texts": [CAT, LONG]}, "texts", "texts[1] has"),
        ({"texts": [CAT], "output_dimension": 12}, "output_dimension", "output_dimension must be 8, 16, 32"),
        ({"texts": [CAT, DOG], "max_tokens": 2}, "max_tokens", "texts[0] was to be truncated to 2"),
    ):
        message = error_of(xlm_r.client.post("/v2/embed", json=fields), 400, param=param)["message"]
        assert words in message
        assert "input" not in message.replace("an input", "")
    response = xlm_r.client.post("/embed", json={"inputs": [CAT, [5, 99999]]})
    error_of(response, 400, param="inputs")
    message = error_of(xlm_r.client.post("/embed", json={"inputs": [[5], [5, 99999]]}), 400, param="inputs")["message"]
    assert "inputs[1] has 99999" in message
    response = reranker.client.post("/v1/score", json={"text_1": CAT, "text_2": [CAT, LONG]})
    response_of_query = xlm_r.client.post("/v2/rerank", json={"query": LONG, "documents": [CAT]})
    message = error_of(response_of_query, 400, "context_length_exceeded", "query")["message"]
    assert "but query has" in message
    assert "text_2[1] has" in error_of(response, 400, "context_length_exceeded", "text_2")["message"]


def test_embed_takes_what_the_model_has(xlm_r: Served) -> None:
    assert as_float32(xlm_r.post("/embed", inputs=[CAT, DOG])) == as_float32(xlm_r.embed([CAT, DOG]))
    found = xlm_r.post("/embed", inputs=CAT, prompt_name="query", dimensions=8)
    assert as_float32(found) == as_float32(xlm_r.embed([CAT], prompt_name="query", dimensions=8))
    assert xlm_r.post("/embed", inputs=[[5, 6]]) == xlm_r.post("/embed", inputs=[5, 6])
    error_of(xlm_r.client.post("/embed", json={"inputs": LONG}), 400, "context_length_exceeded")
    for direction, cut in (("Left", "START"), ("right", "END"), (None, "END")):
        found = xlm_r.post("/embed", inputs=LONG, truncate=True, truncation_direction=direction)
        assert as_float32(found) == as_float32(xlm_r.embed([LONG], truncate=cut))


def test_texts_in_lower_case(tmp_path: Path) -> None:
    tokenizer = word_pieces()
    torch.manual_seed(5)
    config = transformers.BertConfig(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=40, **SIZES)
    model = transformers.BertModel(config).eval()
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    save(tmp_path, model, tokenizer, {})

    def tokens(text: str) -> list[int]:
        return open_checkpoint(tmp_path).tokenizer().encode(text, add_special=True)

    assert tokens(CAT.upper()) != tokens(CAT)
    for name in ("tokenizer_config.json", "sentence_bert_config.json"):
        (tmp_path / name).write_text(json.dumps({"do_lower_case": True}))
        assert tokens(CAT.upper()) == tokens(CAT) == tokenizer.encode(CAT).ids
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / name).unlink()


def test_pairs_are_put_into_the_words_of_a_model_that_answers(tmp_path: Path) -> None:
    tokenizer = word_pieces()
    tokenizer.post_processor = None
    tokenizer.add_tokens(["yes", "no"])
    torch.manual_seed(6)
    config = transformers.Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(), num_key_value_heads=2, head_dim=8, max_position_embeddings=400, **SIZES
    )
    folder = tmp_path / "qwen3-reranker"
    model = transformers.Qwen3ForCausalLM(config).eval()
    save(folder, model, tokenizer, {})
    words, rows = FRAME, [tokenizer.token_to_id(word) for word in ("yes", "no")]
    after = tokenizer.encode(words.after).ids

    def expected(query: str, document: str, most: int = 400) -> float:
        ids = tokenizer.encode(f"{words.before}{query}{words.between} {document}").ids[: most - len(after)] + after
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, -1]
        return float(logits[rows].softmax(-1)[0])

    for served in serve(folder, model, tokenizer):
        documents = [DOG, CAT, "what has fur"]
        scores = [item["score"] for item in served.post("/v1/score", text_1=CAT, text_2=documents)["data"]]
        assert scores == pytest.approx([expected(CAT, text) for text in documents], abs=1e-4)
        ranked = served.post("/rerank", query=CAT, texts=documents)
        assert [item["score"] for item in ranked] == pytest.approx(sorted(scores, reverse=True), abs=1e-6)
        body = {"text_1": CAT, "text_2": LONG * 4}
        error_of(served.client.post("/v1/score", json=body), 400, "context_length_exceeded")
        cut = served.post("/v1/score", **body, truncate_prompt_tokens=-1)
        assert cut["usage"]["prompt_tokens"] == 400
        assert cut["data"][0]["score"] == pytest.approx(expected(CAT, LONG * 4), abs=1e-4)
        error_of(served.client.post("/v1/embeddings", json={"input": CAT}), 400, param="model")
        error_of(served.client.post("/v1/classify", json={"input": CAT}), 400, param="model")


@pytest.mark.parametrize("several", [False, True])
def test_labels(tmp_path: Path, several: bool) -> None:
    tokenizer = word_pieces()
    torch.manual_seed(4)
    labels = {0: "calm", 1: "joy", 2: "fear"}
    config = transformers.BertConfig(
        vocab_size=tokenizer.get_vocab_size(), num_labels=3, id2label=labels, max_position_embeddings=40, **SIZES
    )
    config.problem_type = "multi_label_classification" if several else None
    model = transformers.BertForSequenceClassification(config).eval()
    save(tmp_path, model, tokenizer, {})
    for served in serve(tmp_path, model, tokenizer):
        texts = [CAT, "what has fur"]
        reply = served.post("/v1/classify", input=texts)
        assert reply["object"] == "list"
        for text, item in zip(texts, reply["data"], strict=True):
            with torch.inference_mode():
                logits = model(torch.tensor([served.ids(text)])).logits[0]
            expected = (logits.sigmoid() if several else logits.softmax(-1)).tolist()
            assert item["probs"] == pytest.approx(expected, abs=1e-5)
            assert (item["label"], item["num_classes"]) == (labels[int(logits.argmax())], 3)
        assert served.post("/classify", input=texts[1])["data"][0]["probs"] == reply["data"][1]["probs"]
        error_of(served.client.post("/v1/classify", json={"input": [CAT, LONG]}), 400, "context_length_exceeded")
        error_of(served.client.post("/v1/score", json={"text_1": CAT, "text_2": CAT}), 400, param="model")
