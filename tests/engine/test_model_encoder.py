"""Encoders, embedding decoders and scorers equal transformers on torch and on the kernels, alone and packed."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_gguf
import tiny_gguf_encoder
import tiny_models
import tokenizers
import torch
import transformers
from lmserve.model import CheckpointError, RunnerOptions, load_runner, open_checkpoint, plan_memory
from lmserve.model.answer_head import FRAME
from lmserve.model.rope import inverse_frequencies
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
# Their layers are of each kind, and their texts longer than windows.
ENCODERS = {
    "NomicBert": {},
    "Gte": {},
    "ModernBert": {"num_hidden_layers": 4, "local_attention": 12, "norm_bias": True, "mlp_bias": True},
    "MPNet": {"max_position_embeddings": 240, "pad_token_id": 1},
    "Gemma3Text": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "use_bidirectional_attention": True,
        "sliding_window": 12,
        "head_dim": 16,
        "num_key_value_heads": 2,
        "query_pre_attn_scalar": 16,
    },
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2, "pad_token_id": 0}
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
    own = SPECIAL if kind == "ModernBert" else {"pad_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(**BERT | own | changes)
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


@pytest.mark.parametrize("kind", ENCODERS)
def test_every_other_family(tmp_path, options, kind):
    model = tiny(tmp_path, kind, **ENCODERS[kind])
    write_modules(tmp_path, **MEAN)
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.kind, checkpoint.config.context_length) == ("embed", 40)
    runner = load_runner(checkpoint, options)
    assert not runner.info.can_generate
    assert runner.info.weight_bytes == plan_memory(checkpoint, options).weight_bytes
    given = texts()
    expected = [normalised(states_of(model, tokens).mean(0)) for tokens in given]
    assert_equal_alone_and_packed(runner, given, expected)
    found = embed(runner, given)
    assert min(vector @ wanted for vector, wanted in zip(found, expected, strict=True)) >= 0.9999


def test_distances_of_long_texts(tmp_path, options):
    # As far apart as tokens share a bucket.
    model = tiny(tmp_path, "MPNet", **ENCODERS["MPNet"])
    runner = load_runner(open_checkpoint(tmp_path), options)
    assert runner.info.max_model_len == 238
    tokens = np.random.default_rng(1).integers(2, 100, 238).tolist()
    np.testing.assert_allclose(embed(runner, [tokens])[0], normalised(states_of(model, tokens).mean(0)), atol=2e-5)


def rewrite(folder, *left_out, **changes):
    raw = {key: value for key, value in json.loads((folder / "config.json").read_text()).items() if key not in left_out}
    (folder / "config.json").write_text(json.dumps(raw | changes))


def test_nomic_as_its_publisher_has_it(tmp_path):
    tiny(tmp_path, "NomicBert")
    config = open_checkpoint(tmp_path).config
    theirs = {"n_embd": 32, "n_head": 4, "n_inner": 48, "n_layer": 2, "n_positions": 64, "layer_norm_epsilon": 1e-12}
    named = ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
    ours = (*named, "layer_norm_eps", "hidden_act", "rope_parameters")
    rewrite(tmp_path, *ours, **theirs, activation_function="swiglu", rotary_emb_base=1000, rotary_scaling_factor=None)
    assert open_checkpoint(tmp_path).config == config
    rewrite(tmp_path, rotary_scaling_factor=2, max_trained_positions=20)
    assert open_checkpoint(tmp_path).max_model_len == 20
    for changes, message in (
        ({"prenorm": True}, "prenorm True"),
        ({"prenorm": False, "qkv_proj_bias": True}, "qkv_proj_bias True is not supported"),
    ):
        rewrite(tmp_path, **changes)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path)


NOMIC_MOE = {
    "architectures": ["NomicBertModel"],
    "model_type": "nomic_bert",
    "vocab_size": 100,
    "n_embd": 32,
    "n_head": 4,
    "n_inner": 48,
    "n_layer": 4,
    "n_positions": 64,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu",
    "rotary_emb_base": 10000.0,
    "type_vocab_size": 1,
    "qkv_proj_bias": True,
    "mlp_fc1_bias": True,
    "mlp_fc2_bias": True,
    "num_experts": 8,
    "moe_every_n_layers": 2,
    "moe_top_k": 2,
    "moe_normalize_expert_weights": False,
}


def nomic_experts(folder) -> dict[str, torch.Tensor]:
    """Random weights as nomic-embed-text-v2-moe has them."""
    generator = torch.Generator().manual_seed(7)
    hidden, inner, experts = NOMIC_MOE["n_embd"], NOMIC_MOE["n_inner"], NOMIC_MOE["num_experts"]
    tensors = {}

    def add(name: str, *shape: int) -> None:
        tensors[name] = torch.randn(shape, generator=generator) * 0.3

    add("embeddings.word_embeddings.weight", 100, hidden)
    add("embeddings.token_type_embeddings.weight", 1, hidden)
    norms = ["emb_ln"]
    for index in range(NOMIC_MOE["n_layer"]):
        layer = f"encoder.layers.{index}"
        add(f"{layer}.attn.Wqkv.weight", 3 * hidden, hidden)
        add(f"{layer}.attn.Wqkv.bias", 3 * hidden)
        add(f"{layer}.attn.out_proj.weight", hidden, hidden)
        add(f"{layer}.attn.out_proj.bias", hidden)
        norms += [f"{layer}.norm1", f"{layer}.norm2"]
        if index % 2:
            add(f"{layer}.mlp.router.layer.weight", experts, hidden)
            add(f"{layer}.mlp.experts.mlp.w1", experts * inner, hidden)
            add(f"{layer}.mlp.experts.mlp.w2", experts * inner, hidden)
            add(f"{layer}.mlp.experts.bias", hidden)
        else:
            add(f"{layer}.mlp.fc1.weight", inner, hidden)
            add(f"{layer}.mlp.fc1.bias", inner)
            add(f"{layer}.mlp.fc2.weight", hidden, inner)
            add(f"{layer}.mlp.fc2.bias", hidden)
    for norm in norms:
        add(f"{norm}.weight", hidden)
        tensors[f"{norm}.weight"] += 1
        add(f"{norm}.bias", hidden)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(NOMIC_MOE))
    return tensors


def nomic_experts_states(tensors: dict[str, torch.Tensor], tokens: list[int]) -> np.ndarray:
    """The formulas of the publisher's model: transformers knows it without experts alone."""
    functional = torch.nn.functional
    hidden, inner, heads = NOMIC_MOE["n_embd"], NOMIC_MOE["n_inner"], NOMIC_MOE["n_head"]

    def linear(x, name):
        return functional.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    def norm(x, name):
        return functional.layer_norm(x, (hidden,), tensors[f"{name}.weight"], tensors[f"{name}.bias"], 1e-5)

    dim = hidden // heads
    angles = torch.outer(torch.arange(len(tokens)), 10000.0 ** -(torch.arange(0, dim, 2) / dim))
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def rotated(x):
        return x * cos + torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1) * sin

    x = tensors["embeddings.word_embeddings.weight"][tokens] + tensors["embeddings.token_type_embeddings.weight"][0]
    x = norm(x, "emb_ln")
    for index in range(NOMIC_MOE["n_layer"]):
        layer = f"encoder.layers.{index}"
        q, k, v = linear(x, f"{layer}.attn.Wqkv").view(-1, 3, heads, dim).permute(1, 2, 0, 3)
        attended = (
            functional.scaled_dot_product_attention(rotated(q), rotated(k), v).transpose(0, 1).reshape(-1, hidden)
        )
        x = norm(x + linear(attended, f"{layer}.attn.out_proj"), f"{layer}.norm1")
        if index % 2 == 0:
            made = linear(functional.gelu(linear(x, f"{layer}.mlp.fc1")), f"{layer}.mlp.fc2")
        else:
            weights = linear(x, f"{layer}.mlp.router.layer").softmax(-1)
            chosen = weights.topk(NOMIC_MOE["moe_top_k"], -1)
            up, down = (tensors[f"{layer}.mlp.experts.mlp.{name}"].view(-1, inner, hidden) for name in ("w1", "w2"))
            bias = tensors.get(f"{layer}.mlp.experts.bias", torch.zeros(hidden))
            inner_states = functional.gelu(torch.einsum("th,eih->tei", x, up))
            each = torch.einsum("tei,eih->teh", inner_states, down)
            kept = torch.zeros_like(weights).scatter(1, chosen.indices, chosen.values)
            made = (kept[..., None] * each).sum(1) + bias
        x = norm(x + made, f"{layer}.norm2")
    return x.numpy()


def test_nomic_with_experts(tmp_path, options):
    tensors = nomic_experts(tmp_path)
    write_modules(tmp_path, **MEAN)
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.kind, checkpoint.config.num_experts) == ("embed", 8)
    runner = load_runner(checkpoint, options)
    assert runner.info.weight_bytes == plan_memory(checkpoint, options).weight_bytes
    expected = [normalised(nomic_experts_states(tensors, tokens).mean(0)) for tokens in texts()]
    assert_equal_alone_and_packed(runner, texts(), expected)
    found = embed(runner, texts())
    assert min(vector @ wanted for vector, wanted in zip(found, expected, strict=True)) >= 0.9999


def test_nomic_with_experts_in_a_gguf_file(tmp_path, options):
    # As llama.cpp's converter writes them: without what is added to all that experts make.
    tensors = {name: tensor for name, tensor in nomic_experts(tmp_path).items() if not name.endswith("experts.bias")}
    path = tmp_path / "model.gguf"
    tiny_gguf_encoder.write_nomic_experts(path, tensors, NOMIC_MOE)
    checkpoint = open_checkpoint(path)
    assert checkpoint.family.name == "nomic_bert_moe"
    runner = load_runner(checkpoint, options)
    expected = [normalised(nomic_experts_states(tensors, tokens).mean(0)) for tokens in texts()]
    assert_equal_alone_and_packed(runner, texts(), expected)


def test_nomic_whose_experts_are_of_other_sizes(tmp_path):
    nomic_experts(tmp_path)
    rewrite(tmp_path, num_experts=4)
    with pytest.raises(CheckpointError, match=r"w1 has shape \[384, 32\], the configuration needs \[192, 32\]"):
        open_checkpoint(tmp_path)


def test_modernbert_of_older_files(tmp_path):
    tiny(tmp_path, "ModernBert", **ENCODERS["ModernBert"])
    config = open_checkpoint(tmp_path).config
    assert [layer.window for layer in config.attention] == [None, 7, 7, None]
    older = {"global_rope_theta": 160000.0, "local_rope_theta": 10000.0, "global_attn_every_n_layers": 3}
    rewrite(tmp_path, "layer_types", "rope_parameters", **older)
    assert open_checkpoint(tmp_path).config == config


def test_gte_of_the_publisher_scales_its_rotation(tmp_path):
    tiny(tmp_path, "Gte", type_vocab_size=0)
    rewrite(tmp_path, "rope_parameters", rope_theta=20000, rope_scaling={"type": "ntk", "factor": 8.0})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.embedding.segments is None
    rope = checkpoint.config.attention[0].rope
    assert rope is not None
    expected = 160000.0 ** -(np.arange(0, 8, 2) / 8) / 8.0 ** (2 / 8)
    np.testing.assert_allclose(inverse_frequencies(rope, 8), expected, rtol=1e-6)
    rewrite(tmp_path, logn_attention_scale=True)
    with pytest.raises(CheckpointError, match="logn_attention_scale True is not supported"):
        open_checkpoint(tmp_path)


def test_a_bidirectional_decoder_only_embeds(tmp_path):
    tiny(tmp_path, "Gemma3Text", **ENCODERS["Gemma3Text"])
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.kind, checkpoint.family.name) == ("embed", "gemma_embedding")
    rewrite(tmp_path, architectures=["Gemma3ForCausalLM"])
    with pytest.raises(CheckpointError, match=r"see those after them, so that it embeds; but modules\.json is missing"):
        open_checkpoint(tmp_path)


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


def test_a_long_text_is_computed_in_passes_of_bounded_size(tmp_path):
    model = decoder(tmp_path)
    write_modules(tmp_path, pooling_mode_lasttoken=True)
    (tmp_path / "sentence_bert_config.json").unlink()
    runner = load_runner(open_checkpoint(tmp_path), dataclasses.replace(OPTIONS, ops="cpu", max_batch_tokens=72))
    assert runner.info.max_batch_tokens == 72
    sizes = [250, 5, 40, 30, 70, 80]
    given = [np.random.default_rng(size).integers(2, 199, size).tolist() for size in sizes]
    passes = list(runner.embed_passes(np.concatenate(given).astype(np.int32), np.cumsum([0, *sizes]).astype(np.int32)))
    # 250 tokens take four; 5 and 40 take one, 30 and 70 one each, 80 two.
    assert [found is None for found in passes] == [True] * 8 + [False]
    np.testing.assert_array_equal(passes[-1], embed(runner, given))
    alone = list(runner.embed_passes(np.array(given[0], np.int32), np.array([0, 250], np.int32)))
    assert [found is None for found in alone] == [True] * 3 + [False]
    np.testing.assert_array_equal(passes[-1][0], alone[-1][0])
    np.testing.assert_allclose(alone[-1][0], normalised(states_of(model.model, given[0])[-1]), atol=2e-5)


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


GGUF_ENCODERS = {
    "Bert": ("bert", 0),
    "XLMRoberta": ("bert", 2),
    "NomicBert": ("nomic-bert", 0),
    "ModernBert": ("modern-bert", 0),
    "Gemma3Text": ("gemma-embedding", 0),
}


@pytest.mark.parametrize("kind", GGUF_ENCODERS)
def test_encoders_in_gguf_files(tmp_path, options, kind):
    architecture, padding = GGUF_ENCODERS[kind]
    changes = {"pad_token_id": 1} if padding else ENCODERS.get(kind, {})
    if kind == "ModernBert":
        # Which have no key in GGUF.
        changes = changes | {"norm_bias": False, "mlp_bias": False}
    model = tiny(tmp_path, kind, **changes)
    dense = {}
    if kind == "Gemma3Text":
        dense = {"dense_2.weight": np.random.default_rng(0).normal(size=(40, 32)).astype(np.float32)}
    path = tmp_path / "model.gguf"
    tiny_gguf_encoder.write(path, model, architecture, pooling=1, extra=dense, padding=padding)
    checkpoint = open_checkpoint(path)
    assert (checkpoint.kind, checkpoint.embedding.pooling) == ("embed", "mean")
    assert checkpoint.config.context_length == 64 - padding
    assert checkpoint.notes == ()
    runner = load_runner(checkpoint, options)
    assert not runner.info.can_generate
    means = [states_of(model, tokens).mean(0) for tokens in texts()]
    expected = [normalised(dense["dense_2.weight"] @ mean if dense else mean) for mean in means]
    assert_equal_alone_and_packed(runner, texts(), expected)


@pytest.mark.parametrize("kind", ["Bert", "XLMRoberta", "ModernBert"])
def test_gguf_files_that_rank(tmp_path, options, kind):
    torch.manual_seed(7)
    names = SPECIAL if kind == "ModernBert" else {"pad_token_id": 0 if kind == "Bert" else 1}
    config = getattr(transformers, f"{kind}Config")(**BERT, **names, num_labels=1)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    path = tmp_path / "model.gguf"
    architecture, padding = GGUF_ENCODERS[kind]
    tiny_gguf_encoder.write(path, model, architecture, pooling=4, padding=padding)
    checkpoint = open_checkpoint(path)
    assert (checkpoint.kind, checkpoint.embedding.scores) == ("embed", "sigmoid")
    assert checkpoint.embedding.segments == ((99, 64) if kind == "Bert" else None)
    runner = load_runner(checkpoint, options)
    pairs = [[*first[:20], 99, *second[:20], 99] for first, second in zip(texts(99), texts(99)[::-1], strict=True)]
    expected = []
    for pair in pairs:
        types = torch.tensor([[int(99 in pair[:at]) for at in range(len(pair))]])
        given = {"token_type_ids": types} if kind == "Bert" else {}
        with torch.inference_mode():
            expected.append(model(torch.tensor([pair]), **given).logits[0].numpy())
    assert_equal_alone_and_packed(runner, pairs, expected, atol=1e-4)


def test_a_decoder_that_answers_in_a_gguf_file(tmp_path, options):
    model = decoder(tmp_path)
    path = tmp_path / "model.gguf"
    head = model.lm_head.weight.detach().numpy()[[7, 9]]
    labels = {"qwen3.classifier.output_labels": ["yes", "no"]}
    tiny_gguf.write(path, model, "qwen3", pooling=4, extra={"cls.output.weight": head}, texts=labels)
    checkpoint = open_checkpoint(path)
    assert checkpoint.embedding.frame == FRAME
    runner = load_runner(checkpoint, options)
    assert runner.info.embedding_size == 1
    logits = []
    for tokens in texts(199):
        with torch.inference_mode():
            logits.append(model(torch.tensor([tokens])).logits[0, -1].numpy())
    assert_equal_alone_and_packed(runner, texts(199), [row[[7]] - row[[9]] for row in logits], atol=1e-4)


def test_a_folder_that_answers(tmp_path, options):
    # As sentence-transformers saves it, and as its publisher does, whose folder says nothing but its name.
    folder = tmp_path / "Qwen3-Reranker-tiny"
    model = decoder(folder)
    vocabulary = {"yes": 7, "no": 9, "[UNK]": 0}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.save(str(folder / "tokenizer.json"))
    expected = []
    for tokens in texts(199):
        with torch.inference_mode():
            row = model(torch.tensor([tokens])).logits[0, -1].numpy()
        expected.append(row[[7]] - row[[9]])
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.kind, checkpoint.embedding.frame) == ("embed", FRAME)
    assert_equal_alone_and_packed(load_runner(checkpoint, options), texts(199), expected, atol=1e-4)
    folder = folder.rename(tmp_path / "other")
    assert open_checkpoint(folder).kind == "generate"
    modules = [{"path": "", "type": "x.Transformer"}, {"path": "1_LogitScore", "type": "x.LogitScore"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_LogitScore").mkdir()
    settings = folder / "1_LogitScore" / "config.json"
    settings.write_text(json.dumps({"true_token_id": 9, "false_token_id": 7}))
    turned = [-logit for logit in expected]
    assert_equal_alone_and_packed(load_runner(open_checkpoint(folder), options), texts(199), turned, atol=1e-4)
    settings.write_text(json.dumps({"true_token_id": 9, "false_token_id": None}))
    with pytest.raises(CheckpointError, match="without false_token_id is not supported"):
        open_checkpoint(folder)
    settings.write_text(json.dumps({"true_token_id": 9, "false_token_id": 100_000}))
    with pytest.raises(CheckpointError, match="must lie in"):
        open_checkpoint(folder)


def test_a_gguf_file_that_is_not_pooled(tmp_path):
    model = decoder(tmp_path)
    path = tmp_path / "model.gguf"
    tiny_gguf.write(path, model, "qwen3", pooling=0)
    assert not load_runner(open_checkpoint(path), dataclasses.replace(OPTIONS, ops="cpu")).info.can_embed
    tiny_gguf.write(path, model, "qwen3", pooling=4)
    with pytest.raises(CheckpointError, match=r"tensor cls\.output\.weight is missing"):
        open_checkpoint(path)


SEGMENTS = {"Bert": (99, 64), "NomicBert": (99, 0), "Gte": (-1, 0)}


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("kind", ["Bert", "XLMRoberta", "Qwen3", "NomicBert", "Gte", "ModernBert", "MPNet"])
def test_scores_of_pairs(tmp_path, options, kind, labels):
    torch.manual_seed(7)
    shape = BERT if kind != "Qwen3" else tiny_models.SHAPE | {"head_dim": 16}
    names = SPECIAL if kind == "ModernBert" else {"pad_token_id": 1 if kind not in SEGMENTS else 0}
    if kind == "ModernBert":
        names = names | {"classifier_pooling": "mean" if labels == 3 else "cls", "classifier_bias": labels == 3}
    config = getattr(transformers, f"{kind}Config")(**shape, **names, num_labels=labels)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 99, "content": "[SEP]"}]}))
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.kind, checkpoint.embedding.scores) == ("embed", "sigmoid")
    assert checkpoint.embedding.segments == SEGMENTS.get(kind)
    runner = load_runner(checkpoint, options)
    assert runner.info.embedding_size == labels
    pairs, expected = [], []
    for first, second in zip(texts(99), reversed(texts(99)), strict=True):
        ends = ([*first[:20], 99], [*second[:20], 99])
        pairs.append(ends[0] + ends[1])
        types = torch.tensor([[0] * len(ends[0]) + [1] * len(ends[1])])
        given = {"token_type_ids": types} if kind in ("Bert", "NomicBert") else {}
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
