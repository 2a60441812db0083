"""Encoders, embedding decoders and scorers equal transformers on torch and on the kernels, alone and packed."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_gguf
import tiny_models
import torch
import transformers
from lmserve.model import CheckpointError, RunnerOptions, load_runner, open_checkpoint, plan_memory
from safetensors.torch import save_file

SENTENCES = [
    "A man is playing a guitar on the street.",
    "你好 世界",
    "x",
    "Paged attention keeps keys and values in blocks. " * 40,
    "Someone plays an instrument outdoors.",
]
OPTIONS = RunnerOptions(device="cpu", max_batch=8, max_batch_tokens=300, threads=2)
BERT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
MEAN = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}


@pytest.fixture(params=["torch", "cpu"])
def options(request):
    return dataclasses.replace(OPTIONS, ops=request.param)


def embed(runner, sequences: list[list[int]]) -> np.ndarray:
    bounds = np.cumsum([0, *(len(tokens) for tokens in sequences)]).astype(np.int32)
    return runner.embed(np.concatenate(sequences).astype(np.int32), bounds)


@torch.inference_mode()
def states_of(model, tokens: list[int]) -> np.ndarray:
    return model(torch.tensor([tokens])).last_hidden_state[0].numpy()


def pooled(states: np.ndarray, pooling: str) -> np.ndarray:
    if pooling == "cls":
        return states[0]
    if pooling == "last":
        return states[-1]
    weights = np.arange(1, len(states) + 1) if pooling == "weighted" else np.ones(len(states))
    return (states * weights[:, None]).sum(0) / weights.sum()


def normalised(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def tiny(folder, kind="Bert", **changes):
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(**BERT | changes)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    model.save_pretrained(folder)
    return model


def write_modules(folder, *further, **pooling) -> None:
    modules = [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        *further,
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 40}))


def texts(vocab: int = 100) -> list[list[int]]:
    generator = np.random.default_rng(0)
    # No token of XLM-R's is padding's, whose positions it does not count.
    return [generator.integers(2, vocab, n).tolist() for n in (1, 40, 7, 40, 40, 3)] * 3


def assert_equal_alone_and_packed(runner, sequences, expected, atol=2e-5) -> None:
    together = embed(runner, sequences)
    for tokens, found, wanted in zip(sequences, together, expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=atol)
        alone = embed(runner, [tokens])[0]
        if runner.info.device == "cpu" and hasattr(runner, "native"):
            np.testing.assert_array_equal(found, alone)
        else:
            np.testing.assert_allclose(found, alone, atol=2e-5)


@pytest.mark.parametrize(
    ("pooling", "flags"),
    [
        ("mean", MEAN),
        ("cls", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}),
        ("cls", {"pooling_mode": "cls"}),
        ("last", {"pooling_mode_lasttoken": True}),
        ("last", {"pooling_mode": "lasttoken"}),
        ("weighted", {"pooling_mode_weightedmean_tokens": True}),
    ],
)
def test_every_pooling(tmp_path, options, pooling, flags):
    model = tiny(tmp_path)
    write_modules(tmp_path, **flags)
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.kind, checkpoint.max_model_len, checkpoint.embedding.pooling) == ("embed", 40, pooling)
    runner = load_runner(checkpoint, options)
    assert not runner.info.can_generate
    assert runner.info.can_embed
    expected = [normalised(pooled(states_of(model, tokens), pooling)) for tokens in texts()]
    assert_equal_alone_and_packed(runner, texts(), expected)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
@pytest.mark.parametrize("kind", ["Bert", "XLMRoberta", "Roberta"])
def test_every_encoder(tmp_path, options, kind, activation):
    # As bge-m3: the first two of its positions are no token's.
    model = tiny(tmp_path, kind, hidden_act=activation, pad_token_id=1, type_vocab_size=1 if kind != "Bert" else 2)
    write_modules(tmp_path, **MEAN)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.context_length == 40
    runner = load_runner(checkpoint, options)
    expected = [normalised(states_of(model, tokens).mean(0)) for tokens in texts()]
    assert_equal_alone_and_packed(runner, texts(), expected)


def test_positions_that_no_token_has_shorten_the_context(tmp_path):
    tiny(tmp_path, "XLMRoberta", pad_token_id=1)
    assert open_checkpoint(tmp_path).max_model_len == 62


def test_planned_memory_is_what_an_encoder_takes(tmp_path):
    tiny(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    for quantize in ("auto", "q8"):
        runner = load_runner(checkpoint, dataclasses.replace(OPTIONS, ops="cpu", quantize=quantize))
        assert (
            runner.info.weight_bytes
            == plan_memory(checkpoint, dataclasses.replace(OPTIONS, quantize=quantize)).weight_bytes
        )
        assert runner.info.num_blocks == 0


def test_dense_layers_come_after_pooling(tmp_path, options):
    model = tiny(tmp_path)
    write_modules(
        tmp_path,
        {"path": "2_Dense", "type": "sentence_transformers.models.Dense"},
        {"path": "3_Normalize", "type": "sentence_transformers.models.Normalize"},
        **MEAN,
    )
    folder = tmp_path / "2_Dense"
    folder.mkdir()
    weight, bias = torch.randn(20, 32), torch.randn(20)
    save_file({"linear.weight": weight, "linear.bias": bias}, folder / "model.safetensors")
    activation = "torch.nn.modules.activation.Tanh"
    (folder / "config.json").write_text(json.dumps({"in_features": 32, "activation_function": activation}))
    runner = load_runner(open_checkpoint(tmp_path), options)
    assert runner.info.embedding_size == 20
    means = [states_of(model, tokens).mean(0) for tokens in texts()]
    expected = [normalised(np.tanh(weight.numpy() @ mean + bias.numpy())) for mean in means]
    assert_equal_alone_and_packed(runner, texts(), expected)
    save_file({"linear.weight": torch.randn(20, 31)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has shape \[20, 31\], but takes vectors of 32 numbers"):
        open_checkpoint(tmp_path)


def test_an_encoder_does_not_generate(tmp_path, options):
    tiny(tmp_path)
    runner = load_runner(open_checkpoint(tmp_path), options)
    with pytest.raises(RuntimeError, match="is an embedding model and cannot generate"):
        runner.launch(1, 1, 1, None)


def test_modules_and_poolings_that_are_refused(tmp_path):
    tiny(tmp_path)
    write_modules(tmp_path, pooling_mode_max_tokens=True)
    with pytest.raises(CheckpointError, match=r"pooling_mode_max_tokens is not supported \(mean, cls, last, weighted"):
        open_checkpoint(tmp_path)
    write_modules(tmp_path, **MEAN, include_prompt=False)
    with pytest.raises(CheckpointError, match="a pooling that leaves out the prompt is not supported"):
        open_checkpoint(tmp_path)
    (tmp_path / "modules.json").write_text(
        json.dumps([{"path": "2_LSTM", "type": "sentence_transformers.models.LSTM"}])
    )
    with pytest.raises(CheckpointError, match="module LSTM is not supported"):
        open_checkpoint(tmp_path)


def decoder(folder):
    torch.manual_seed(5)
    config = tiny_models.CONFIGS["qwen3"]()
    model = transformers.Qwen3ForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("bare", [False, True])
def test_a_decoder_that_embeds(tmp_path, options, bare):
    # As Qwen3-Embedding: of its last token, and some are saved without the model's own prefix and architecture.
    model = decoder(tmp_path)
    if bare:
        model.model.save_pretrained(tmp_path)
    write_modules(tmp_path, pooling_mode_lasttoken=True)
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.kind, checkpoint.embedding.pooling, checkpoint.embedding.dimensions) == ("embed", "last", (0,))
    runner = load_runner(checkpoint, options)
    assert not runner.info.can_generate
    expected = [normalised(states_of(model.model, tokens)[-1]) for tokens in texts(199)]
    assert_equal_alone_and_packed(runner, texts(199), expected)


@pytest.mark.parametrize(("number", "pooling"), [(1, "mean"), (2, "cls"), (3, "last")])
def test_a_gguf_file_is_pooled_as_it_says(tmp_path, options, number, pooling):
    model = decoder(tmp_path)
    path = tmp_path / "model.gguf"
    tiny_gguf.write(path, model, "qwen3", pooling=number)
    checkpoint = open_checkpoint(path)
    assert (checkpoint.kind, checkpoint.embedding.pooling) == ("embed", pooling)
    runner = load_runner(checkpoint, options)
    expected = [normalised(pooled(states_of(model.model, tokens), pooling)) for tokens in texts(199)]
    assert_equal_alone_and_packed(runner, texts(199), expected)


def test_a_gguf_file_that_is_not_pooled(tmp_path):
    model = decoder(tmp_path)
    path = tmp_path / "model.gguf"
    tiny_gguf.write(path, model, "qwen3", pooling=0)
    assert not load_runner(open_checkpoint(path), dataclasses.replace(OPTIONS, ops="cpu")).info.can_embed
    tiny_gguf.write(path, model, "qwen3", pooling=4)
    with pytest.raises(CheckpointError, match="pooling_type 4 is not supported"):
        open_checkpoint(path)


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("kind", ["Bert", "XLMRoberta", "Qwen3"])
def test_scores_of_pairs(tmp_path, options, kind, labels):
    torch.manual_seed(7)
    shape = BERT if kind != "Qwen3" else tiny_models.SHAPE | {"head_dim": 16}
    names = {"num_labels": labels, "pad_token_id": 1 if kind != "Bert" else 0}
    config = getattr(transformers, f"{kind}Config")(**shape, **names)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 99, "content": "[SEP]"}]}))
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.kind, checkpoint.embedding.scores) == ("embed", "sigmoid")
    assert checkpoint.embedding.segments == ((99, 64) if kind == "Bert" else None)
    runner = load_runner(checkpoint, options)
    assert runner.info.embedding_size == labels
    pairs, expected = [], []
    for first, second in zip(texts(99), reversed(texts(99)), strict=True):
        ends = ([*first[:20], 99], [*second[:20], 99])
        pairs.append(ends[0] + ends[1])
        given = {"token_type_ids": torch.tensor([[0] * len(ends[0]) + [1] * len(ends[1])])} if kind == "Bert" else {}
        with torch.inference_mode():
            expected.append(model(torch.tensor([pairs[-1]]), **given).logits[0].numpy())
    assert_equal_alone_and_packed(runner, pairs, expected, atol=1e-4)


def test_minilm(minilm_folder, options):
    model = transformers.BertModel.from_pretrained(minilm_folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder)
    sequences = [tokenizer(text, truncation=True, max_length=256)["input_ids"] for text in SENTENCES]
    checkpoint = open_checkpoint(minilm_folder)
    assert checkpoint.max_model_len == 256
    expected = [normalised(states_of(model, tokens).mean(0)) for tokens in sequences]
    runner = load_runner(checkpoint, options)
    assert_equal_alone_and_packed(runner, sequences, expected)
    found = embed(runner, sequences)
    for vector, wanted in zip(found, expected, strict=True):
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
        assert vector @ wanted >= 0.9999
    assert found[0] @ found[4] > 0.5 > found[0] @ found[3]
