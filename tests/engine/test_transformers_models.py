"""Models without a family of their own run through transformers, with our cache: they equal transformers alone."""

import json
import sys

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from lmserve.model import RunnerOptions, load_runner, open_checkpoint
from lmserve.model.errors import CheckpointError, OptionError
from lmserve.model.interface import NO_TOKEN
from model_driver import Driver
from safetensors.torch import load_file, save_file

OPTIONS = RunnerOptions(device="cpu", max_batch=16, max_batch_tokens=128, threads=1)
STEPS = 24
SHAPE = tiny_models.SHAPE | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ALL_HEADS = SHAPE | {"num_key_value_heads": 6}
GPT2 = {
    "vocab_size": 199,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 6,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    # Learned positions, and tied embeddings.
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
    # One key head for all, stored with the queries.
    "gpt_bigcode": lambda: transformers.GPTBigCodeConfig(**GPT2, multi_query=True),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**ALL_HEADS),
    "gptj": lambda: transformers.GPTJConfig(**GPT2, rotary_dim=4),
    "opt": lambda: transformers.OPTConfig(**ALL_HEADS, ffn_dim=80, word_embed_proj_dim=48),
    "phi": lambda: transformers.PhiConfig(**SHAPE),
    "gemma": lambda: transformers.GemmaConfig(**SHAPE, head_dim=16),
    "glm4": lambda: transformers.Glm4Config(**SHAPE, head_dim=16),
    "olmo": lambda: transformers.OlmoConfig(**SHAPE, clip_qkv=2.0),
    "helium": lambda: transformers.HeliumConfig(**SHAPE, head_dim=8),
    # Experts.
    "ernie4_5_moe": lambda: transformers.Ernie4_5_MoeConfig(
        **SHAPE, moe_num_experts=6, moe_k=2, moe_intermediate_size=40, moe_layer_start_index=1
    ),
    # Two attentions in a layer.
    # As E2B: the last layers take keys and values of others, and each layer has embeddings of its own.
    "gemma3n": lambda: transformers.Gemma3nTextConfig(
        **SHAPE | {"num_hidden_layers": 4, "intermediate_size": [80] * 4},
        head_dim=16,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=12,
        vocab_size_per_layer_input=199,
        laurel_rank=8,
        activation_sparsity_pattern=[0.95, 0.0, 0.0, 0.0],
    ),
    "diffllama": lambda: transformers.DiffLlamaConfig(**SHAPE),
    # Keys that are wider than the values.
    "youtu": lambda: transformers.YoutuConfig(
        **ALL_HEADS, kv_lora_rank=32, q_lora_rank=24, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=16
    ),
    # Windows, soft-caps and scales.
    "vaultgemma": lambda: transformers.VaultGemmaConfig(
        **SHAPE, head_dim=16, sliding_window=24, attn_logit_softcapping=20.0, final_logit_softcapping=10.0
    ),
}


def make(name, folder):
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=list(CONFIGS))
def models(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    reference = make(request.param, folder)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.notes == ("runs through transformers, which is slower than a family of its own",)
    return reference, load_runner(checkpoint, OPTIONS)


def prompts(count, seed):
    generator = np.random.default_rng(seed)
    return [[int(t) for t in generator.integers(3, 199, length)] for length in generator.integers(2, 90, count)]


def assert_equal(reference, sequence, prompt_length):
    logits = tiny_models.reference_logits(reference, sequence.tokens)[prompt_length - 1 : -1]
    assert len(sequence.logits) == len(logits)
    assert np.abs(np.array(sequence.logits) - logits).max() < 1e-3
    assert sequence.tokens[prompt_length:] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("chunk", [None, 7], ids=["whole", "chunks-of-7"])
def test_a_batch_of_mixed_lengths(models, chunk):
    reference, runner = models
    driver = Driver(runner)
    given = prompts(8, seed=1)
    sequences = [driver.start(prompt) for prompt in given]
    driver.generate(sequences, STEPS, **({} if chunk is None else {"chunk": chunk}))
    for prompt, sequence in zip(given, sequences, strict=True):
        assert_equal(reference, sequence, len(prompt))


def test_shared_prefix_preempted_continued_and_rewound(models):
    reference, runner = models
    driver = Driver(runner)
    prefix = np.random.default_rng(5).integers(3, 199, 50).tolist()
    tail, turn, other = prompts(3, seed=6)
    first = driver.start(prefix + tail)
    driver.generate([first], STEPS)
    assert_equal(reference, first, len(prefix + tail))
    second = driver.start(prefix + turn, share=first)
    assert second.computed == 48
    driver.generate([second], 10)
    driver.preempt(second)
    driver.generate([second], STEPS - 10)
    assert_equal(reference, second, len(prefix + turn))
    known = len(first.tokens)
    first.tokens += turn
    first.logits = []
    driver.generate([first], STEPS)
    assert_equal(reference, first, known + len(turn))
    first.tokens[known:] = other
    driver.rewind(first, known - 1)
    first.logits = []
    driver.generate([first], STEPS)
    assert_equal(reference, first, known + len(other))


@torch.inference_mode()
def test_embeddings_are_pooled_causal_states(models):
    reference, runner = models
    given = prompts(4, seed=7)
    bounds = np.cumsum([0, *(len(prompt) for prompt in given)]).astype(np.int32)
    found = runner.embed(np.concatenate(given).astype(np.int32), bounds)
    for prompt, embedding in zip(given, found, strict=True):
        states = reference.base_model(torch.tensor([prompt]), use_cache=False).last_hidden_state[0].mean(0).numpy()
        np.testing.assert_allclose(embedding, states / np.linalg.norm(states), atol=1e-5)


def test_the_text_model_within_one_that_sees_is_served(tmp_path):
    """As Gemma 3n is published."""
    reference = make("gemma3n", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    save_file(renamed | {"model.vision_tower.conv.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    inner = json.loads((tmp_path / "config.json").read_text())
    inner.pop("architectures")
    written(tmp_path, model_type="gemma3n", architectures=["Gemma3nForConditionalGeneration"], text_config=inner)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.notes[1] == "served text-only: what sees or hears is not loaded"
    runner = load_runner(checkpoint, OPTIONS)
    driver = Driver(runner)
    (prompt,) = prompts(1, seed=3)
    sequence = driver.start(prompt)
    driver.generate([sequence], STEPS, chunk=7)
    assert_equal(reference, sequence, len(prompt))


def test_rows_that_are_no_numbers_harm_no_neighbour(tmp_path):
    make("gpt_neox", tmp_path)
    runner = load_runner(open_checkpoint(tmp_path), OPTIONS)
    (prompt,) = prompts(1, seed=8)
    alone = Driver(runner)
    good = alone.start([token for token in prompt if token != 5])
    alone.generate([good], 4)
    with torch.no_grad():
        runner.model.model.base_model.embed_in.weight[5] = torch.nan
    driver = Driver(runner)
    neighbour, bad = driver.start(good.tokens[: len(good.tokens) - 4]), driver.start([7, 5, 9])
    driver.step([(bad, 3), (neighbour, len(neighbour.tokens))])
    assert runner.buffers.sampled[0] == NO_TOKEN
    assert neighbour.tokens[-1] == good.tokens[-4]


def written(folder, **config):
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "rwkv", "architectures": ["RwkvForCausalLM"]}, "layers with a recurrent state"),
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "layers of type linear_attention"),
        ({"model_type": "bloom", "architectures": ["BloomForCausalLM"]}, "does not take the positions of its tokens"),
        ({"model_type": "falcon", "architectures": ["FalconForCausalLM"]}, "a pass without weights fails"),
        ({"model_type": "doge", "architectures": ["DogeForCausalLM"]}, "its attention asks for attention_mask"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "has no causal language model"),
        (
            {"model_type": "gpt2", "architectures": ["GPT2ForQuestionAnswering"]},
            "of type 'gpt2' is GPT2LMHeadModel, not",
        ),
        ({"model_type": "nobody", "architectures": ["NobodyForCausalLM"]}, "has no causal language model"),
        (
            {
                "model_type": "gpt_neox",
                "architectures": ["GPTNeoXForCausalLM"],
                "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
            },
            "depends on the longest sequence",
        ),
        (
            {"model_type": "minimax", "architectures": ["MiniMaxForCausalLM"], "num_hidden_layers": 4},
            "layers of type linear_attention",
        ),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_what_cannot_run_is_refused_by_name(tmp_path, config, reason):
    with pytest.raises(CheckpointError, match=rf"is not supported .*nor does it run through transformers: .*{reason}"):
        open_checkpoint(written(tmp_path, **config))


def test_without_transformers_the_error_says_what_to_install(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("lmserve.model.transformers")]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    folder = written(tmp_path, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    with pytest.raises(CheckpointError, match=r"pip install 'lmserve\[transformers\]'"):
        open_checkpoint(folder)


def test_the_cpu_kernels_do_not_run_it(tmp_path):
    make("gpt2", tmp_path)
    with pytest.raises(OptionError, match="runs through transformers, on torch alone"):
        load_runner(open_checkpoint(tmp_path), RunnerOptions(device="cpu", ops="cpu"))


def test_a_model_that_would_compute_something_else_is_refused(tmp_path, monkeypatch):
    make("gpt2", tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    from lmserve.model import transformers_runner

    monkeypatch.setattr(transformers_runner, "as_wide", lambda value, key: value * 1.1)
    with pytest.raises(CheckpointError, match="its logits are not those of transformers alone"):
        load_runner(checkpoint, OPTIONS)
