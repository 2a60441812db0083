"""The model's own sampling: where it is read from, what is refused, and what a request that leaves it out gets."""

import json

import gguf
import pytest
from lmserve.config import ServeConfig
from lmserve.engine.load import ModelPlan
from lmserve.engine.submission import SamplingParams, StopParams, Submission, Text, with_defaults
from lmserve.model import CheckpointError
from lmserve.model.generation_defaults import NONE, GenerationDefaults, from_generation_config, from_gguf
from lmserve.source import PUBLISHED, find_model

QWEN3 = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [1, 2]}


def test_generation_config():
    found = from_generation_config(QWEN3)
    assert found == GenerationDefaults("generation_config.json", temperature=0.6, top_k=20, top_p=0.95)
    assert str(found) == "temperature 0.6, top_k 20, top_p 0.95"
    assert from_generation_config({"eos_token_id": 2, "max_length": 20}) == NONE
    assert from_generation_config({"do_sample": False, "temperature": 0.9}).temperature == 0
    assert from_generation_config({"max_new_tokens": 2048}).max_tokens == 2048


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"temperature": "hot"}, "temperature must be a number, but 'hot' was given"),
        ({"top_p": True}, "top_p must be a number, but True was given"),
        ({"temperature": float("nan")}, "temperature must be a number, but nan was given"),
        ({"top_p": 1.5}, r"top_p must lie in \[0, 1\], but 1.5 was given"),
        ({"repetition_penalty": 0}, r"repetition_penalty must lie in \[0.01, 10\], but 0 was given"),
    ],
)
def test_what_is_no_default_is_refused(raw, says):
    with pytest.raises(CheckpointError, match=says):
        from_generation_config(raw)


def test_gguf_keys_are_those_of_the_format():
    keys = gguf.Keys.General
    metadata = {
        keys.SAMPLING_TEMP: 0.20000000298023224,
        keys.SAMPLING_TOP_K: 40,
        keys.SAMPLING_TOP_P: 0.8999999761581421,
        keys.SAMPLING_MIN_P: 0.05000000074505806,
        keys.SAMPLING_PENALTY_REPEAT: 1.100000023841858,
    }
    expected = {"temperature": 0.2, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1}
    assert from_gguf(metadata).given() == expected
    assert from_gguf({}) == NONE


def test_only_what_is_left_out_is_filled_in():
    defaults = GenerationDefaults("x", temperature=0.2, top_p=0.9, max_tokens=512)
    asked = Submission(route="chat", input=Text("x"), sampling=SamplingParams(top_p=1.0, seed=3))
    filled = with_defaults(asked, defaults)
    assert filled.sampling == SamplingParams(temperature=0.2, top_p=1.0, seed=3)
    assert filled.stopping == StopParams(default_max_tokens=512)
    exact = Submission(route="chat", input=Text("x"), stopping=StopParams(max_tokens=9))
    assert with_defaults(exact, defaults).stopping == StopParams(max_tokens=9)
    assert with_defaults(asked, NONE) is asked


def test_the_bundled_model_has_its_publishers(smollm2_gguf):
    published = PUBLISHED["SmolLM2-135M-Instruct"]
    assert find_model(None).published == published
    assert published.given() == {"temperature": 0.2, "top_p": 0.9, "max_tokens": 512}
    assert ModelPlan(smollm2_gguf, ServeConfig(), published).defaults == published
    assert ModelPlan(smollm2_gguf, ServeConfig(generation_config="none"), published).defaults == NONE


def test_a_folders_own_defaults_come_before_any_others(tmp_path):
    from test_checkpoint import save_file, tensors, write_config

    write_config(tmp_path)
    save_file(tensors(), tmp_path / "model.safetensors")
    (tmp_path / "generation_config.json").write_text(json.dumps(QWEN3))
    plan = ModelPlan(tmp_path, ServeConfig(kv_memory=1 << 20), GenerationDefaults("x", top_k=1))
    assert plan.defaults.given() == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    assert plan.checkpoint.eos_token_ids == [1, 2]
