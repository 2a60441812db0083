"""SmolLM2-135M-Instruct from its GGUF equals transformers' Llama with the dequantized weights."""

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from lmserve.model import RunnerOptions, load_runner, open_checkpoint
from model_driver import Driver, greedy

STEPS = 16
PROMPT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nName three rivers and the seas they reach.<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def checkpoint(smollm2_gguf):
    return open_checkpoint(smollm2_gguf)


@pytest.fixture(scope="module")
def reference(checkpoint):
    config = checkpoint.config
    model = transformers.LlamaForCausalLM._from_config(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=config.context_length,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
            tie_word_embeddings=True,
        ),
        dtype=torch.float32,
    )
    weights = {name: torch.from_numpy(np.array(source.dequantize())) for name, source in checkpoint.tensors.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    model.tie_weights()
    return model.eval()


def test_equals_transformers(checkpoint, reference):
    options = RunnerOptions(device="cpu", ops="torch", max_batch=4, max_batch_tokens=64, max_model_len=256, threads=1)
    runner = load_runner(checkpoint, options)
    greedy(runner)
    tokenizer = checkpoint.tokenizer()
    prompts = [tokenizer.encode(PROMPT), tokenizer.encode("The capital of France is")]
    driver = Driver(runner)
    sequences = [driver.start(prompt) for prompt in prompts]
    driver.generate(sequences, STEPS, chunk=40)
    for prompt, sequence in zip(prompts, sequences, strict=True):
        logits = tiny_models.reference_logits(reference, sequence.tokens)[len(prompt) - 1 : -1]
        assert np.abs(np.array(sequence.logits) - logits).max() < 1e-3
        assert sequence.tokens[len(prompt) :] == logits.argmax(-1).tolist()
    assert "Paris" in tokenizer.decode(sequences[1].tokens)
