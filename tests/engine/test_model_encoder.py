"""BERT embeddings equal transformers: a tiny random model under each pooling, and the MiniLM that is bundled."""

import json

import numpy as np
import pytest
import torch
import transformers
from lmserve.model import CheckpointError, RunnerOptions, load_runner, open_checkpoint

SENTENCES = [
    "A man is playing a guitar on the street.",
    "你好 世界",
    "x",
    "Paged attention keeps keys and values in blocks. " * 40,
    "Someone plays an instrument outdoors.",
]
OPTIONS = RunnerOptions(device="cpu", ops="torch", max_batch=8, max_batch_tokens=300, threads=1)


def embed(runner, sequences: list[list[int]]) -> np.ndarray:
    bounds = np.cumsum([0, *(len(tokens) for tokens in sequences)]).astype(np.int32)
    return runner.embed(np.concatenate(sequences).astype(np.int32), bounds)


@torch.inference_mode()
def expected(model, tokens: list[int], pooling: str = "mean") -> np.ndarray:
    states = model(torch.tensor([tokens])).last_hidden_state[0].numpy()
    pooled = states[0] if pooling == "cls" else states.mean(0)
    return pooled / np.linalg.norm(pooled)


def tiny(folder, **changes):
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.3,
        **changes,
    )
    model = transformers.BertModel(config).eval()
    model.save_pretrained(folder)
    return model


def write_pooling(folder, **pooling) -> None:
    modules = [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 40}))


@pytest.mark.parametrize(
    ("pooling", "flags"),
    [
        ("mean", {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}),
        ("cls", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}),
        ("cls", {"pooling_mode": "cls"}),
    ],
)
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_tiny_encoder(tmp_path, pooling, flags, activation):
    model = tiny(tmp_path, hidden_act=activation)
    write_pooling(tmp_path, **flags)
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.kind, checkpoint.max_model_len, checkpoint.config.pooling) == ("embed", 40, pooling)
    runner = load_runner(checkpoint, OPTIONS)
    assert not runner.info.can_generate
    assert runner.info.can_embed
    generator = np.random.default_rng(0)
    sequences = [generator.integers(0, 100, n).tolist() for n in (1, 40, 7, 40, 40, 3)] * 3
    for tokens, embedding in zip(sequences, embed(runner, sequences), strict=True):
        np.testing.assert_allclose(embedding, expected(model, tokens, pooling), atol=2e-5)


def test_an_encoder_does_not_generate(tmp_path):
    tiny(tmp_path)
    runner = load_runner(open_checkpoint(tmp_path), OPTIONS)
    with pytest.raises(RuntimeError, match="is an embedding model: it cannot generate"):
        runner.launch(1, 1, 1, None)


def test_modules_and_poolings_that_are_refused(tmp_path):
    tiny(tmp_path)
    write_pooling(tmp_path, pooling_mode_max_tokens=True)
    with pytest.raises(CheckpointError, match=r"pooling pooling_mode_max_tokens is not supported \(mean, cls are\)"):
        open_checkpoint(tmp_path)
    (tmp_path / "modules.json").write_text(
        json.dumps([{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}])
    )
    with pytest.raises(CheckpointError, match="module Dense is not supported"):
        open_checkpoint(tmp_path)


def test_minilm(minilm_folder):
    model = transformers.BertModel.from_pretrained(minilm_folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder)
    sequences = [tokenizer(text, truncation=True, max_length=256)["input_ids"] for text in SENTENCES]
    checkpoint = open_checkpoint(minilm_folder)
    assert checkpoint.max_model_len == 256
    found = embed(load_runner(checkpoint, OPTIONS), sequences)
    for tokens, embedding in zip(sequences, found, strict=True):
        assert np.linalg.norm(embedding) == pytest.approx(1, abs=1e-5)
        assert embedding @ expected(model, tokens) >= 0.9999
    assert found[0] @ found[4] > 0.5 > found[0] @ found[3]
