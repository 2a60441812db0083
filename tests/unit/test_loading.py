"""What checkpoints come as: wrapped text models, several files, markers of all types, named templates, bombs."""

import json
import os
import re
import struct
import threading

import numpy as np
import pytest
from lmserve import LmserveError, loading
from lmserve._core import ChatTemplate, GgufFile
from lmserve.model import CheckpointError, open_checkpoint
from lmserve.model.hf_source import without_ends_of_messages
from safetensors.numpy import save_file
from test_checkpoint import CONFIG, tensors, write_config, write_gguf, write_json


@pytest.fixture
def folder(tmp_path):
    write_config(tmp_path)
    save_file(tensors(), tmp_path / "model.safetensors")
    return tmp_path


def wrapped(names) -> dict[str, np.ndarray]:
    inside = {names(name): values for name, values in tensors().items()}
    seen = ("vision_tower.blocks.0.attn.weight", "multi_modal_projector.linear.weight", "model.audio_tower.conv.weight")
    return inside | {name: np.ones((2, 2), np.float32) for name in seen}


@pytest.mark.parametrize(
    "names",
    [
        lambda name: f"language_model.{name}",
        lambda name: name if name.startswith("lm_head") else f"model.language_model.{name.removeprefix('model.')}",
        lambda name: name,
    ],
    ids=["inside", "within the model", "beside"],
)
@pytest.mark.parametrize("architectures", [None, ["LlamaForCausalLM"]])
def test_a_wrappers_text_model_is_served_alone(tmp_path, names, architectures):
    inner = CONFIG | {"architectures": architectures}
    outer = {
        "architectures": ["SomeForConditionalGeneration"],
        "model_type": "some",
        "vision_config": {},
        "text_config": inner,
    }
    write_json(tmp_path / "config.json", outer)
    save_file(wrapped(names), tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.architecture == "llama"
    assert checkpoint.notes == ("served text-only: 3 tensors that see or hear are not loaded",)
    assert checkpoint.tensors.keys() == tensors().keys()
    assert checkpoint.eos_token_ids == [2]


def test_a_wrapper_may_say_everything_itself(tmp_path):
    write_config(tmp_path, architectures=["Qwen2VLForConditionalGeneration"], model_type="qwen2_vl", vision_config={})
    biases = {
        name.replace("weight", "bias"): np.ones(len(values), np.float32)
        for name, values in tensors().items()
        if re.search(r"[qkv]_proj", name)
    }
    seen = {"visual.patch_embed.proj.weight": np.ones((2, 2), np.float32)}
    save_file(tensors() | biases | seen, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.architecture == "qwen2"
    assert checkpoint.notes == ("served text-only: 1 tensors that see or hear are not loaded",)


@pytest.mark.parametrize("architectures", [None, []])
def test_the_type_of_a_model_stands_for_its_architecture(folder, architectures):
    write_json(folder / "config.json", CONFIG | {"architectures": architectures})
    assert open_checkpoint(folder).config.architecture == "llama"


def test_qwen3_has_heads_of_128_unless_it_says_otherwise(folder):
    write_config(folder, architectures=["Qwen3ForCausalLM"], model_type="qwen3")
    with pytest.raises(CheckpointError, match=r"q_proj.weight has shape \[8, 8\], the configuration needs \[512, 8\]"):
        open_checkpoint(folder)


def test_a_window_that_is_not_used_is_none(folder):
    write_config(folder, sliding_window=16, use_sliding_window=False)
    assert open_checkpoint(folder).max_model_len == 64


def test_the_files_of_a_split_model_are_one(tmp_path):
    write_gguf(tmp_path / "whole.gguf")
    write_gguf(tmp_path / "tiny.gguf", more={"split_max_tensors": 7})
    shards = sorted(tmp_path.glob("tiny-*.gguf"))
    assert len(shards) > 2
    whole = open_checkpoint(tmp_path / "whole.gguf")
    for shard in shards:
        checkpoint = open_checkpoint(shard)
        assert (checkpoint.name, checkpoint.path, checkpoint.config) == ("tiny", shards[0], whole.config)
        for name, tensor in whole.tensors.items():
            np.testing.assert_array_equal(checkpoint.tensors[name].dequantize(), tensor.dequantize())
    shards[1].rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(CheckpointError, match=rf"but \S+{shards[1].name} is missing"):
        open_checkpoint(shards[0])
    with pytest.raises(CheckpointError, match=r"must be named like it, ending in -00001-of-"):
        open_checkpoint(tmp_path / "elsewhere.gguf")


@pytest.mark.parametrize("kind", [1, 4])
def test_the_end_of_a_turn_ends_it_whatever_its_type(tmp_path, kind):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, types=[3, 3, kind, 1])
    assert open_checkpoint(path).eos_token_ids == [0, 1, 2]


def test_ends_of_messages_are_not_ends_of_turns():
    tokens = ["<|return|>", "<|call|>", "<|end|>"]
    assert without_ends_of_messages([0, 1, 2], tokens, 2) == [0, 1]
    assert without_ends_of_messages([0, 2], ["<|end|>"], 2) == [0, 2]


def write_tokenizer(folder, added: dict[str, int]) -> None:
    tokens = [{"id": token, "content": text, "special": False} for text, token in added.items()]
    write_json(folder / "tokenizer.json", {"added_tokens": tokens})


def test_a_template_may_end_turns_with_a_token_of_its_own(folder):
    write_tokenizer(folder, {"<|im_end|>": 7, "<|eot_id|>": 8, "<|other|>": 9})
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}<|im_end|><|other|>")
    assert open_checkpoint(folder).eos_token_ids == [2, 7]


@pytest.mark.parametrize("form", ["list", "object", "files"])
def test_templates_have_names(folder, form):
    named = {"default": "plain", "tool_use": "{{ tools | length }} tools", "rag": "R"}
    match form:
        case "list":
            given = [{"name": name, "template": template} for name, template in named.items()]
            write_json(folder / "tokenizer_config.json", {"chat_template": given})
        case "object":
            write_json(folder / "tokenizer_config.json", {"chat_template": named})
        case _:
            (folder / "additional_chat_templates").mkdir()
            (folder / "chat_template.jinja").write_text(named["default"])
            for name in ("tool_use", "rag"):
                (folder / "additional_chat_templates" / f"{name}.jinja").write_text(named[name])
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.chat_template, checkpoint.tool_template) == (named["default"], named["tool_use"])


def test_tools_choose_their_template():
    template = ChatTemplate("plain", tool_source="{{ tools[0].function.name }}")
    tools = json.dumps([{"type": "function", "function": {"name": "f"}}]).encode()
    assert template.render(b"[]") == template.render(b"[]", tools=b"[]") == "plain"
    assert template.render(b"[]", tools=tools) == template.render_prompt(b"[]", tools=tools) == "f"


def test_gguf_has_a_template_for_tools(tmp_path):
    import gguf

    path = tmp_path / "tiny.gguf"
    original = gguf.GGUFWriter.add_chat_template
    with pytest.MonkeyPatch.context() as patch:
        named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
        patch.setattr(gguf.GGUFWriter, "add_chat_template", lambda writer, _: original(writer, named))
        write_gguf(path)
    checkpoint = open_checkpoint(path)
    assert (checkpoint.chat_template, checkpoint.tool_template) == ("D", "T")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": 5}, "architectures must be a list of names, but 5 was given"),
        ({"architectures": [5]}, r"architectures must be a list of names, but \[5\] was given"),
        ({"architectures": None, "model_type": 7}, "architecture of model_type 7 is not supported"),
        ({"eos_token_id": "a"}, "eos_token_id must be a token id or a list of them, but 'a' was given"),
        ({"eos_token_id": [[1]]}, r"eos_token_id must be a token id or a list of them, but \[\[1\]\] was given"),
        ({"num_hidden_layers": 10**9}, "num_layers is 1000000000; it must be at least 1 and at most 1024"),
        ({"hidden_size": 1e308}, "it must be at least 1 and at most"),
        ({"hidden_size": float("inf")}, "wrong kind"),
        ({"num_attention_heads": []}, "wrong kind"),
        ({"max_position_embeddings": {}}, "wrong kind"),
        ({"rope_scaling": [1]}, "rope_parameters must be an object"),
        ({"text_config": {}}, "is not supported"),
    ],
)
def test_odd_configurations_are_one_line(folder, changes, says):
    write_json(folder / "config.json", CONFIG | changes)
    with pytest.raises(CheckpointError, match=says) as raised:
        open_checkpoint(folder)
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "config.json must hold an object, but holds list"),
        ("[" * 100_000, "config.json is nested too deeply"),
        ("{", "config.json is not JSON"),
        (b"\xff", "config.json is not JSON"),
    ],
)
def test_what_is_no_configuration_is_one_line(folder, text, says):
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(folder)


FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
)


@pytest.mark.parametrize("name", FILES)
def test_files_have_a_limit_in_bytes(folder, name):
    with (folder / name).open("wb") as file:
        file.truncate(1_000_000_000)
    with pytest.raises(CheckpointError, match=rf"{name} must have at most \d+ bytes, but has 1000000000"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", [*FILES, "model.safetensors"])
@pytest.mark.parametrize(
    ("make", "what"),
    [(os.mkfifo, "a FIFO"), (os.mkdir, "a folder"), (lambda path: path.symlink_to("/dev/zero"), "a device")],
)
def test_what_is_in_the_place_of_a_file_is_said_and_not_waited_for(folder, name, make, what):
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with pytest.raises(CheckpointError, match=rf"{name} is {what}, not a file"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_link_that_leads_to_itself_is_one_line(folder, name):
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(name)
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read: Too many levels of symbolic links"):
        open_checkpoint(folder)


def test_a_gguf_file_that_is_a_fifo_is_not_waited_for(tmp_path):
    path = tmp_path / "tiny.gguf"
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match=r"tiny.gguf is a FIFO, not a file"):
        open_checkpoint(path)
    with pytest.raises(LmserveError, match=r"tiny.gguf is not a regular file"):
        GgufFile(path)


def test_a_header_of_weights_is_no_larger_than_its_file(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 10**18) + bytes(100))
    with pytest.raises(CheckpointError, match=r"its header has 1000000000000000000 bytes, but the file has 108"):
        open_checkpoint(folder)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 100_000) + b"[" * 100_000)
    with pytest.raises(CheckpointError, match=r"the header of .*model.safetensors is nested too deeply"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("tensors", "keys", "says"),
    [
        (0, 2**40, "it may have at most 65536 keys, but it announces 1099511627776"),
        (2**40, 0, "it may have at most 262144 tensors, but it announces 1099511627776"),
    ],
)
def test_keys_and_tensors_of_a_gguf_file_have_a_limit(tmp_path, tensors, keys, says):
    path = tmp_path / "tiny.gguf"
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, tensors, keys))
        # As large as the disk lets a file be: there is room for a million of each.
        file.truncate(1 << 43)
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(path)


def test_a_part_that_takes_too_long_is_named_and_left(monkeypatch):
    monkeypatch.setattr(loading, "MAX_SECONDS", 0.0)
    forever = threading.Event()

    def work():
        with loading.reading("the whole"), loading.reading("the tokenizer"):
            forever.wait()

    with pytest.raises(LmserveError, match="the tokenizer must be read within 0 s, but this takes longer"):
        loading.load(work)
    forever.set()


def test_what_is_loaded_in_time_is_handed_over():
    def work():
        with loading.reading("the tokenizer"):
            pass
        return 5

    def fail():
        raise ValueError("no such model")

    assert loading.load(work) == 5
    with pytest.raises(ValueError, match="no such model"):
        loading.load(fail)


def test_blocks_have_a_limit(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", block_count=2**31)
    with pytest.raises(CheckpointError, match="num_layers is 2147483648; it must be at least 1 and at most 1024"):
        open_checkpoint(tmp_path / "tiny.gguf")
