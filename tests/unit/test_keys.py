"""The keys file: what it may say, what is refused, and what a key becomes."""

from __future__ import annotations

import json
import re
from hashlib import sha256
from pathlib import Path

import pytest
from lmserve.cli import main, parser
from lmserve.cli.serve import config_of
from lmserve.config import ConfigError, ServeConfig
from lmserve.keys import ApiKey, Keyring, KeysError, Limits, read_keys

DOCS = Path(__file__).parents[2] / "docs" / "keys.md"


def keys_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(text, "utf-8")
    return path


def test_the_documented_file_is_read_as_documented(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)
    web, batch = read_keys(keys_file(tmp_path, example))
    limits = Limits(weight=3, max_in_flight=32, tokens_per_minute=120_000, max_sessions=1000, max_priority=0)
    assert web == ApiKey.of("sk-web-0123456789", "web", limits)
    assert (batch.name, batch.limits) == ("batch", Limits(max_priority=10))
    assert batch.digest == sha256(b"test").digest()


def test_a_key_and_its_digest_are_one_tenant(tmp_path: Path) -> None:
    digest = sha256(b"sk-a").hexdigest()
    (plain,) = read_keys(keys_file(tmp_path, '[[key]]\nname = "a"\nkey = "sk-a"\n'))
    (hashed,) = read_keys(keys_file(tmp_path, f'[[key]]\nname = "b"\nsha256 = "{digest}"\n'))
    assert plain.durable_name == hashed.durable_name
    assert plain.durable_name.hex() != digest
    keys = Keyring([ApiKey.of("sk-0", "zero"), hashed])
    assert (keys.tenant_of(b"sk-0"), keys.tenant_of(b"sk-a"), keys.tenant_of(b"sk-b")) == (1, 2, None)
    assert (keys.name_of(0), keys.name_of(2)) == (None, "b")
    assert json.loads(keys.tenants())[1] == {"number": 2, "limits": {}}
    assert keys.durable_names()[2] == plain.durable_name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "`key`"),
        ("key = []", "length >= 1"),
        ("[[key", "is not valid TOML"),
        ('[[key]]\nname = "a"\n', "'a' must have either key or sha256"),
        ('[[key]]\nname = "a"\nkey = "secret"\nsha256 = "' + "0" * 64 + '"\n', "either key or sha256"),
        ('[[key]]\nname = ""\nkey = "secret"\n', "$.key[0].name"),
        ('[[key]]\nname = "a"\nkey = "se cret"\n', "$.key[0].key"),
        ('[[key]]\nname = "a"\nsha256 = "secret"\n', "$.key[0].sha256"),
        ('[[key]]\nname = "a"\nkey = "secret"\nweight = 0\n', ">= 1 - at `$.key[0].weight`"),
        ('[[key]]\nname = "a"\nkey = "secret"\nweight = 1.5\n', "`int`"),
        ('[[key]]\nname = "a"\nkey = "secret"\nspeed = 1\n', "unknown field `speed`"),
        ('[[key]]\nname = "a"\nkey = "secret"\nmax_in_flight = -1\n', "$.key[0].max_in_flight"),
    ],
)
def test_a_wrong_file_is_refused_and_its_keys_are_not_told(
    tmp_path: Path, text: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = keys_file(tmp_path, text)
    with pytest.raises(KeysError, match=re.escape(expected)):
        read_keys(path)
    assert main(["serve", "--keys", str(path)]) == 2
    message = capsys.readouterr().err
    assert f"--keys {path}" in message
    assert "cret" not in message


def test_what_cannot_be_read_and_what_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeysError, match="No such file"):
        read_keys(tmp_path / "nowhere")
    (tmp_path / "binary").write_bytes(b"\xff")
    with pytest.raises(KeysError, match="not UTF-8"):
        read_keys(tmp_path / "binary")
    with pytest.raises(KeysError, match="the name 'a'"):
        Keyring([ApiKey.of("1", "a"), ApiKey.of("2", "a")])
    with pytest.raises(ConfigError, match="the same key"):
        ServeConfig(api_keys=("sk-a",), keys=(ApiKey.of("sk-a", "a"),))


def test_the_flag_adds_to_the_other_keys(tmp_path: Path) -> None:
    path = keys_file(tmp_path, '[[key]]\nname = "a"\nkey = "sk-a"\nweight = 2\n')
    given = config_of(parser().parse_args(["serve", "--api-key", "sk-b", "--keys", str(path)]))
    assert given.keyring.tenant_of(b"sk-a") == 2
    assert given.keyring.name_of(1) == "key-1"
    assert json.loads(given.keyring.tenants())[1]["limits"] == {"weight": 2}
    assert "sk-a" not in repr(given)
