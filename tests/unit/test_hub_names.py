"""What names of models mean, and what the names of GGUF files tell."""

from __future__ import annotations

import re

import pytest
from lmserve.assets import ASSETS
from lmserve.hub.errors import HubError
from lmserve.hub.names import REPOSITORY, HubName, UrlName, read_name, read_short_name, served_name, short_names
from lmserve.hub.repository import RemoteFile, choose, label_of, quantizations

ENDPOINT = "https://hub.example"
SHA = "0" * 64


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("owner/name", HubName("owner/name")),
        ("owner/name:Q4_K_M", HubName("owner/name", "Q4_K_M")),
        ("hf.co/owner/name:Q4_K_M", HubName("owner/name", "Q4_K_M")),
        ("https://hf.co/owner/name", HubName("owner/name")),
        ("https://hf.co/owner/name:Q8_0", HubName("owner/name", "Q8_0")),
        ("https://hub.example/owner/name/tree/main", HubName("owner/name")),
        ("https://hub.example/owner/name/blob/main/a/b%20c.gguf", HubName("owner/name", "a/b c.gguf")),
        ("https://hub.example/owner/name/resolve/main/m.gguf?download=true", HubName("owner/name", "m.gguf")),
        ("https://files.example/x/m.Q8_0.gguf", UrlName("https://files.example/x/m.Q8_0.gguf")),
        (f"http://files.example/m.gguf#sha256={SHA}", UrlName("http://files.example/m.gguf", SHA)),
        ("no-such-model", None),
        ("folder/model.gguf", None),
        ("/a/b", None),
    ],
)
def test_forms(text: str, name: HubName | UrlName | None) -> None:
    assert read_name(text, ENDPOINT) == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("https://files.example/model.bin", "a model's URL ends in .gguf"),
        ("ftp://files.example/m.gguf", "begins with http:// or https://"),
        ("https://files.example/m.gguf#sha256=12", "followed by 64 hexadecimal digits"),
    ],
)
def test_urls_that_name_no_model(text: str, message: str) -> None:
    with pytest.raises(HubError, match=re.escape(message)):
        read_name(text, ENDPOINT)


def test_short_names() -> None:
    table = {"ab": {"default": "4b", "4b": "o/ab-4b", "30b-a3b": "o/ab-30b", "1b": "Bundled"}}
    assert read_short_name("ab", table) == HubName("o/ab-4b", None, "ab:4b")
    assert read_short_name("ab:latest", table) == HubName("o/ab-4b", None, "ab:4b")
    assert read_short_name("AB:4B", table) == HubName("o/ab-4b", None, "ab:4b")
    assert read_short_name("ab:4b:q8_0", table) == HubName("o/ab-4b", "q8_0", "ab:4b")
    assert read_short_name("ab:4b-q8_0", table) == HubName("o/ab-4b", "q8_0", "ab:4b")
    assert read_short_name("ab:30b-a3b-q4_k_m", table) == HubName("o/ab-30b", "q4_k_m", "ab:30b-a3b")
    assert read_short_name("ab:1b", table) == "Bundled"
    assert read_short_name("abc", table) is None
    for wrong in ("ab:7b", "ab:default"):
        with pytest.raises(HubError, match="ab is known in the sizes 4b, 30b-a3b, 1b, but"):
            read_short_name(wrong, table)


def test_names_that_servers_give() -> None:
    assert served_name("qwen3") == "qwen3:4b"
    assert served_name("smollm2:135m") == "SmolLM2-135M-Instruct"
    assert served_name("hf.co/owner/name:Q8_0") == "owner/name:Q8_0"
    assert served_name("./model.gguf") == "./model.gguf"


def test_the_table_of_short_names_is_whole() -> None:
    for name, sizes in short_names().items():
        assert sizes["default"] in sizes, name
        for size, target in sizes.items():
            assert size == "default" or target in ASSETS or REPOSITORY.fullmatch(target), (name, size)


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("Qwen3-4B-Q4_K_M.gguf", "Q4_K_M"),
        ("qwen2.5-0.5b-instruct-q8_0.gguf", "Q8_0"),
        ("model-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("model.IQ3_XXS.gguf", "IQ3_XXS"),
        ("BF16/model-00001-of-00002.gguf", "BF16"),
        ("Q6_K/model-00001-of-00002.gguf", "Q6_K"),
        ("model-f16.gguf", "F16"),
        ("SmolLM2.gguf", "SmolLM2"),
    ],
)
def test_labels(path: str, label: str) -> None:
    assert label_of(path) == label


def test_models_among_the_files() -> None:
    paths = ["b-Q8_0.gguf", "a-Q4_0.gguf", "mmproj-a-f16.gguf", "README.md"]
    shards = [f"Q2_K/a-Q2_K-0000{n}-of-00002.gguf" for n in (1, 2)]
    files = [RemoteFile(path, 10 + n, SHA) for n, path in enumerate([*paths, *reversed(shards)])]
    known = quantizations(files)
    assert [(q.label, [f.path for f in q.files]) for q in known] == [
        ("Q8_0", ["b-Q8_0.gguf"]),
        ("Q4_0", ["a-Q4_0.gguf"]),
        ("Q2_K", shards),
    ]
    assert known[2].size == 14 + 15
    assert choose("q8_0", known, "o/n").label == "Q8_0"
    assert choose("a-Q4_0.gguf", known, "o/n").label == "Q4_0"
    with pytest.raises(HubError, match=r"o/n has Q8_0, Q4_0, Q2_K, but Q5_K was requested"):
        choose("Q5_K", known, "o/n")
    twice = quantizations([*files, RemoteFile("c-Q8_0.gguf", 99, SHA)])
    with pytest.raises(HubError, match=r"more than once; name one of: o/n:b-Q8_0.gguf, o/n:c-Q8_0.gguf"):
        choose("Q8_0", twice, "o/n")
