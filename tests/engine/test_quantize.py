"""`lmserve quantize`: what it writes is read by llama.cpp's package, by the server, and near to what was read."""

from __future__ import annotations

import resource
import subprocess
import sys

import gguf
import numpy as np
import pytest
import tiny_gguf
import torch
import transformers
from lmserve._core import encode_blocks
from lmserve.cli import main
from lmserve.errors import LmserveError
from lmserve.model import RunnerOptions, load_runner, open_checkpoint
from lmserve.quantize import MIXTURES

LAYERS = 8
# The squared error of weights from Student's t distribution, as a part of their squares, that a type may have.
# llama-quantize has 0.0069 with Q4_K and 0.00046 with Q6_K.
MOST = {"Q8_0": 0.00006, "Q4_1": 0.0075, "Q5_1": 0.0018, "Q4_K": 0.0069, "Q5_K": 0.0018, "Q6_K": 0.00046}


def llama(path, **sizes):
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"num_hidden_layers": LAYERS, "vocab_size": 96, "max_position_embeddings": 128} | sizes
    transformers.set_seed(5)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, tie_word_embeddings=False)).eval()
    tiny_gguf.write(path, model, "llama", "F16")
    return model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "model-F16.gguf"
    llama(path)
    return path


def tensors(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def metadata(path):
    fields = gguf.GGUFReader(path).fields
    return {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}


@pytest.mark.parametrize("kind", MOST)
def test_blocks_are_what_another_reader_reads(kind):
    weights = (np.random.default_rng(1).standard_t(5, (96, 768)) * 0.02).astype(np.float32)
    blocks = np.frombuffer(encode_blocks(kind, weights, 3), np.uint8).reshape(96, -1)
    read = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    assert ((read - weights) ** 2).sum() < MOST[kind] * (weights**2).sum()
    # The number of threads changes nothing.
    assert encode_blocks(kind, weights, 1) == blocks.tobytes()


def test_what_cannot_be_blocks_is_refused():
    for kind, weights, words in [
        ("Q2_K", np.zeros(256, np.float32), "Q2_K was given"),
        ("Q4_K", np.zeros(100, np.float32), "blocks of 256 weights, but 100 were given"),
        ("Q8_0", np.full(32, np.nan, np.float32), "one is NaN"),
        ("Q8_0", np.full(32, 7e4, np.float32), "one is 70000"),
    ]:
        with pytest.raises(LmserveError, match=words):
            encode_blocks(kind, weights, 1)


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_file_keeps_all_but_its_weights(source, tmp_path, capsys, kind):
    target = tmp_path / "out.gguf"
    assert main(["quantize", str(source), str(target), "--type", kind, "--threads", "2"]) == 0
    assert "bits a weight" in capsys.readouterr().out
    before, after = metadata(source), metadata(target)
    assert after.pop("general.file_type") == MIXTURES[kind].file_type
    assert after.pop("general.quantization_version") == 2
    before.pop("general.file_type", None)
    assert after == before
    stored, written = tensors(source), tensors(target)
    assert list(written) == list(stored)
    for name, tensor in written.items():
        values = stored[name].data.astype(np.float32)
        if values.ndim == 1:
            np.testing.assert_array_equal(tensor.data, stored[name].data)
            continue
        read = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert ((read - values) ** 2).sum() < MOST[tensor.tensor_type.name] * (values**2).sum()
    kinds = {name: tensor.tensor_type.name for name, tensor in written.items()}
    mixture = MIXTURES[kind]
    assert kinds["output.weight"] == kinds["blk.0.attn_v.weight"] == kinds["blk.7.ffn_down.weight"] == mixture.more
    assert kinds["token_embd.weight"] == kinds["blk.1.attn_v.weight"] == kinds["blk.0.attn_q.weight"] == mixture.few
    load_runner(open_checkpoint(target), RunnerOptions(max_batch=2, kv_memory=16 << 20))


def test_rows_that_are_no_blocks_of_256_get_smaller_ones(tmp_path):
    source, target = tmp_path / "in.gguf", tmp_path / "out.gguf"
    llama(source, hidden_size=96, intermediate_size=160, num_hidden_layers=2)
    assert main(["quantize", str(source), str(target)]) == 0
    kinds = {tensor.tensor_type.name for tensor in tensors(target).values()}
    assert kinds == {"F32", "Q4_1", "Q8_0"}


def test_what_is_rounded_already_is_rounded_again_only_where_asked_for(source, tmp_path, capsys):
    once, twice = tmp_path / "q8.gguf", tmp_path / "q4.gguf"
    assert main(["quantize", str(source), str(once), "--type", "Q8_0"]) == 0
    assert main(["quantize", str(once), str(twice)]) == 1
    assert "is Q8_0 already" in capsys.readouterr().err
    assert not twice.exists()
    assert main(["quantize", str(once), str(twice), "--allow-requantize"]) == 0
    assert {tensor.tensor_type.name for tensor in tensors(twice).values()} == {"F32", "Q4_K", "Q6_K"}


def test_errors_are_one_line_and_leave_nothing(source, tmp_path, capsys):
    target = tmp_path / "out.gguf"
    broken = tmp_path / "nan.gguf"
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny_sizes()))
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    tiny_gguf.write(broken, model, "llama", "F32")
    (tmp_path / "there.gguf").write_bytes(b"mine")
    for arguments, words in [
        ([str(broken), str(target)], "blk.0.ffn_down.weight: weights must lie in"),
        ([str(tmp_path), str(target)], "is a folder"),
        ([str(source), str(source), "--overwrite"], "use another name"),
        ([str(source), str(tmp_path / "there.gguf")], "use --overwrite"),
        ([str(source), str(tmp_path / "no" / "out.gguf")], "cannot be written"),
        ([str(source), str(target), "--threads", "0"], "--threads must lie in [1, 1024]"),
    ]:
        assert main(["quantize", *arguments]) == 1
        error = capsys.readouterr().err
        assert words in error
        assert error.splitlines()[-1].startswith("lmserve: error: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nan.gguf", "there.gguf"]
    assert (tmp_path / "there.gguf").read_bytes() == b"mine"


def tiny_sizes():
    return {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": 96,
    }


def test_a_full_disk_is_one_line_and_leaves_nothing(source, tmp_path):
    target = tmp_path / "out.gguf"
    done = subprocess.run(
        [sys.executable, "-m", "lmserve", "quantize", str(source), str(target)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"lmserve: error: {target} cannot be written: ")
    assert list(tmp_path.iterdir()) == []
