"""Examples of embeddings, scores and token ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from msgspec import Struct

from lmserve.api.http.examples.values import ASKED, CREATED, MODEL
from lmserve.schemas.cohere import EmbedReply, EmbedRequest
from lmserve.schemas.embeddings import EmbeddingsReply, EmbeddingsRequest
from lmserve.schemas.scoring import ClassifyReply, ClassifyRequest, RerankReply, RerankRequest, ScoreReply, ScoreRequest
from lmserve.schemas.tei import AnyRerankRequest, InputsRequest, RankedText
from lmserve.schemas.tokenize import (
    DetokenizeReply,
    DetokenizeRequest,
    EncodeReply,
    EncodeRequest,
    TokenizeReply,
    TokenizeRequest,
    TokenizerInfoReply,
)

EXAMPLES: Final[Mapping[type[Struct], tuple[Any, ...]]] = {
    EmbeddingsRequest: ({"model": MODEL, "input": ["Hello world!", "Good morning."]},),
    EmbeddingsReply: (
        {
            "object": "list",
            "data": [{"object": "embedding", "embedding": [0.6, -0.8], "index": 0}],
            "model": MODEL,
            "usage": {"prompt_tokens": 3, "total_tokens": 3},
        },
    ),
    EmbedRequest: (
        {"model": MODEL, "texts": ["Hello world!"], "input_type": "search_document", "embedding_types": ["int8"]},
    ),
    EmbedReply: (
        {
            "id": "embed-1f2e3d",
            "embeddings": {"int8": [[95, -127]]},
            "texts": ["Hello world!"],
            "meta": {
                "api_version": {"version": "2"},
                "billed_units": {"input_tokens": 3},
                "tokens": {"input_tokens": 3, "output_tokens": 0},
            },
            "response_type": "embeddings_by_type",
        },
    ),
    InputsRequest: ({"inputs": ["Hello world!", "Good morning."], "truncate": True},),
    ScoreRequest: ({"model": MODEL, "text_1": "A cat.", "text_2": ["A kitten.", "A spanner."]},),
    ScoreReply: (
        {
            "id": "score-1f2e3d",
            "object": "list",
            "created": CREATED,
            "model": MODEL,
            "data": [
                {"index": 0, "object": "score", "score": 0.84},
                {"index": 1, "object": "score", "score": 0.11},
            ],
            "usage": {"prompt_tokens": 10, "total_tokens": 10},
        },
    ),
    RerankRequest: (
        {"model": MODEL, "query": "What has whiskers?", "documents": ["A spanner.", "A cat."], "top_n": 1},
        {"model": MODEL, "query": "What has whiskers?", "documents": [{"text": "A cat."}], "return_documents": False},
    ),
    RerankReply: (
        {
            "id": "rerank-1f2e3d",
            "model": MODEL,
            "usage": {"total_tokens": 12, "prompt_tokens": 12},
            "meta": {
                "api_version": {"version": "2"},
                "billed_units": {"search_units": 1},
                "tokens": {"input_tokens": 12, "output_tokens": 0},
            },
            "results": [{"index": 1, "document": {"text": "A cat."}, "relevance_score": 0.62}],
        },
    ),
    AnyRerankRequest: (
        {"query": "What has whiskers?", "texts": ["A spanner.", "A cat."], "raw_scores": True},
        {"query": "What has whiskers?", "documents": ["A spanner.", "A cat."], "top_n": 1},
    ),
    RankedText: ({"index": 1, "score": 0.62}, {"index": 1, "text": "A cat.", "score": 0.62}),
    ClassifyRequest: ({"model": MODEL, "input": ["What a fine day!"]},),
    ClassifyReply: (
        {
            "id": "classify-1f2e3d",
            "object": "list",
            "created": CREATED,
            "model": MODEL,
            "data": [{"index": 0, "label": "joy", "probs": [0.9, 0.1], "num_classes": 2}],
            "usage": {"prompt_tokens": 7, "total_tokens": 7},
        },
    ),
    TokenizeRequest: (
        {"prompt": "Hello world!", "return_token_strs": True},
        {"messages": ASKED, "add_generation_prompt": True},
    ),
    TokenizeReply: (
        {"count": 3, "max_model_len": 8192, "tokens": [19556, 905, 17], "token_strs": ["Hello", " world", "!"]},
    ),
    DetokenizeRequest: ({"tokens": [72, 105]},),
    DetokenizeReply: ({"prompt": "Hello world!"},),
    TokenizerInfoReply: (
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}",
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
            "unk_token": None,
            "model_max_length": 8192,
        },
    ),
    EncodeRequest: ({"input": ["Hello world!", "Hi"]},),
    EncodeReply: ({"input_ids": [[19556, 905, 17], [26843]], "length": [3, 1]},),
}
