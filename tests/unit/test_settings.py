"""Settings that no flag gives: from the environment, from a file; flags of other servers; keys out of `ps`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lmserve.cli import main, parse
from lmserve.cli.aliases import ALIASES, DEFAULT, ONLY, REFUSED, translated
from lmserve.cli.errors import CommandError
from lmserve.cli.serve import config_of
from lmserve.cli.serve_options import add_options
from lmserve.cli.settings import variable
from lmserve.config import MIB, ConfigError, DiskTier, ServeConfig


def config(*arguments: str, **environment: str) -> ServeConfig:
    return config_of(parse(["serve", *arguments]), environment)


def refusal(*arguments: str, **environment: str) -> str:
    with pytest.raises(CommandError) as caught:
        config(*arguments, **environment)
    assert caught.value.exit_code == 2
    return str(caught.value)


def options() -> list[argparse.Action]:
    parser = argparse.ArgumentParser(add_help=False)
    add_options(parser)
    return parser._actions


# What the words of some flags must look like.
VALUES = {
    "--tls-cert": "cert.pem",
    "--tls-key": "key.pem",
    "--device": "cpu",
    "--cors-origin": "https://a.example",
    "--otlp-endpoint": "http://127.0.0.1:4318",
    "--tool-parser": "hermes",
    "--reasoning-parser": "think",
    "--gpu-memory-fraction": "0.5",
    "--kv-memory": "64MiB",
    "--kv-disk": "/var/kv,64MiB",
    "--max-body": "64MiB",
    "--max-batch-tokens": "128",
    "--lora": "sql=/adapters/sql",
    "--lora-dir": "/adapters",
    "--session-store": "postgresql://db/sessions",
}


def value_of(action: argparse.Action) -> str:
    if action.nargs == 0:
        return "true"
    if action.choices is not None:
        return str(list(action.choices)[-1])
    return VALUES.get(action.option_strings[0], "7")


@pytest.mark.parametrize("action", options(), ids=lambda action: action.option_strings[0])
def test_every_flag_has_a_variable_and_a_key(action: argparse.Action, tmp_path: Path) -> None:
    flag, value = action.option_strings[0], value_of(action)
    if flag in ("--config", "--keys", "--api-key-file"):
        pytest.skip("files of their own, below")
    beside = {"--tls-cert": ["--tls-key", "k"], "--tls-key": ["--tls-cert", "c"]}.get(flag, [])
    by_flag = config(flag, *([] if action.nargs == 0 else [value]), *beside)
    assert by_flag != ServeConfig()
    assert config(*beside, **{variable(flag): value}) == by_flag
    file = tmp_path / "lmserve.toml"
    number = value if value.replace(".", "").isdigit() else f'"{value}"'
    for key in (flag.removeprefix("--"), flag.removeprefix("--").replace("-", "_")):
        for written in {number, "true" if action.nargs == 0 else f'"{value}"'}:
            file.write_text(f"{key} = {written}\n")
            assert config(*beside, "--config", str(file)) == by_flag


def test_files_by_variable(tmp_path: Path) -> None:
    keys, table = tmp_path / "keys", tmp_path / "keys.toml"
    keys.write_text("sk-file\n")
    table.write_text('[[key]]\nname = "a"\nkey = "sk-table"\n')
    given = config(LMSERVE_API_KEY_FILE=str(keys), LMSERVE_KEYS=str(table))
    assert given.api_keys == ("sk-file",)
    assert [key.name for key in given.keys] == ["a"]
    assert refusal(LMSERVE_API_KEY_FILE="/nowhere").startswith("LMSERVE_API_KEY_FILE /nowhere cannot be read")


def test_a_flag_counts_more_than_its_variable_and_that_more_than_the_file(tmp_path: Path) -> None:
    file = tmp_path / "lmserve.toml"
    file.write_text('port = 1\nmax-body = "1MiB"\ncors-origin = ["https://a.example", "https://b.example"]\n')
    assert config("--config", str(file)).port == 1
    assert config(LMSERVE_CONFIG=str(file)).cors_origins == ("https://a.example", "https://b.example")
    assert config("--config", str(file), LMSERVE_PORT="2").port == 2
    assert config("--config", str(file), "--port", "3", LMSERVE_PORT="2").port == 3
    assert config(
        "model", "::1", "4", "--config", str(file), LMSERVE_PORT="2", LMSERVE_HOST="h", LMSERVE_MODEL="m"
    ) == (
        ServeConfig(
            model="model",
            host="::1",
            port=4,
            max_body=MIB,
            cors_origins=("https://a.example", "https://b.example"),
        )
    )


def test_several_values_have_spaces_between_them() -> None:
    assert config(LMSERVE_SERVED_MODEL_NAME="a b").served_model_names == ("a", "b")
    assert config(LMSERVE_NO_PREFIX_CACHE="0").prefix_cache
    assert not config(LMSERVE_NO_PREFIX_CACHE="yes").prefix_cache


def test_a_key_in_the_environment_closes_the_server() -> None:
    given = config(LMSERVE_API_KEY="sk-env")
    assert given.keyring.tenant_of(b"sk-env") == 1
    assert "sk-env" not in repr(given)
    # One that is empty would leave it open.
    assert refusal(LMSERVE_API_KEY="") == "LMSERVE_API_KEY is empty: give it a value, or unset it"
    assert refusal(LMSERVE_API_KEYS="sk-env") == "LMSERVE_API_KEYS is not a setting; did you mean LMSERVE_API_KEY?"
    assert "sk" not in refusal(LMSERVE_API_KEY="sk-\u00e9")


def test_variables_of_others_are_left_alone() -> None:
    kubernetes = {
        "LMSERVE_SERVICE_HOST": "10.0.0.1",
        "LMSERVE_SERVICE_PORT_HTTP": "23333",
        "LMSERVE_PORT": "tcp://10.0.0.1:23333",
        "LMSERVE_PORT_23333_TCP_PROTO": "tcp",
    }
    ours = {"LMSERVE_CACHE": "/x", "LMSERVE_CPU_ISA": "avx2", "LMSERVE_IMAGE_TAG": "1", "PORT": "x"}
    assert config(**kubernetes, **ours) == ServeConfig()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("LMSERVE_PORT", "http", "LMSERVE_PORT: a whole number expected, but 'http' was given"),
        ("LMSERVE_PORT", "70000", "LMSERVE_PORT must lie in [0, 65535], but 70000 was given"),
        ("LMSERVE_DTYPE", "int3", "LMSERVE_DTYPE: one of auto, fp32, bf16, fp16 expected, but 'int3' was given"),
        ("LMSERVE_NO_PREFIX_CACHE", "maybe", "LMSERVE_NO_PREFIX_CACHE: true or false expected, but 'maybe' was given"),
        ("LMSERVE_PROT", "1", "LMSERVE_PROT is not a setting; did you mean LMSERVE_PORT?"),
    ],
)
def test_wrong_variables_are_named(name: str, value: str, expected: str) -> None:
    assert refusal(**{name: value}) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("port = 70000", "{file}: port must lie in [0, 65535], but 70000 was given"),
        ("port = [1]", "{file}: port: one value expected, but [1] was given"),
        ("port = true", "{file}: port: one value expected, but True was given"),
        ("prot = 1", "--config {file}: prot is not a setting; did you mean port?"),
        ("zzz = 1", "--config {file}: zzz is not a setting; the keys are the names of the flags without their dashes"),
        ('config = "x"', "--config {file}: config is not a setting"),
        ("cors-origin = [1, [2]]", "{file}: cors-origin: a text, or a list of texts expected, but [2] was given"),
        ("port =", "--config {file} is not valid TOML: "),
    ],
)
def test_wrong_files_are_named(text: str, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "lmserve.toml"
    file.write_text(text)
    assert refusal("--config", str(file)).startswith(expected.format(file=file))
    assert refusal("--config", "/nowhere").startswith("--config /nowhere cannot be read")


def test_flags_of_other_servers() -> None:
    given = config(*("-m", "./m", "-c", "64", "--max-num-seqs=8", "-tp", "1", "--tp=1", "--enable-prefix-caching"))
    assert given == config("./m", "--max-model-len", "64", "--max-batch", "8")
    assert config("--otlp-traces-endpoint", "http://c:4318").otlp_endpoint == "http://c:4318"
    assert config("--model", "./m").model == "./m"
    assert refusal("./m", "--model", "./n") == "--model ./n contradicts MODEL ./m: give only one of them"
    known = {action.option_strings[0] for action in options()}
    assert set(ALIASES.values()) <= known
    assert not known & (ALIASES.keys() | DEFAULT | ONLY.keys() | REFUSED.keys())
    assert translated(["--", "-m"]) == ["--", "-m"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--tensor-parallel-size", "2"],
            "--tensor-parallel-size must be 1, but '2' was given: lmserve runs a model on one device",
        ),
        (["-ngl", "99"], "there is no -ngl: lmserve puts the whole model on one device: --device cuda or --device cpu"),
        (["--trust-remote-code"], "there is no --trust-remote-code: lmserve never runs code from a model's folder"),
    ],
)
def test_flags_without_a_match_say_why(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(*arguments).startswith(expected)
    assert main(["serve", *arguments]) == 2
    assert expected in capsys.readouterr().err


SHOW = """
import sys
from lmserve import cli
from lmserve.cli import serve
serve.run = lambda arguments: print(open("/proc/self/cmdline").read().replace("\\0", " "), arguments.api_keys) or 0
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process change what ps shows of it")
def test_keys_are_not_in_the_list_of_processes() -> None:
    command: list[Any] = [sys.executable, "-c", SHOW, "serve", "--api-key", "sk-one", "--api-key=sk-two", "sk-one"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    shown, _, given = done.stdout.rpartition("[")
    assert "sk-" not in shown
    assert "--api-key ****** --api-key=****** ******" in shown
    assert given == "'sk-one', 'sk-two']\n"
    assert done.stderr == ""


def test_several_models_have_names(tmp_path: Path) -> None:
    named = (("a", "./x"), ("b", "owner/name:Q4_0"))
    assert config("--model", "a=./x", "--model", "b=owner/name:Q4_0").models == named
    assert config(LMSERVE_MODEL="a=./x b=owner/name:Q4_0").models == named
    assert config(LMSERVE_MODEL="./a model").model == "./a model"
    file = tmp_path / "settings.toml"
    file.write_text('model = ["a=./x", "b=owner/name:Q4_0"]')
    assert config("--config", str(file)).models == named
    file.write_text('model = "./m"')
    assert config("--config", str(file)).model == "./m"
    path = tmp_path / "a=b.gguf"
    path.touch()
    assert (config("--model", str(path)).model, config("--model", str(path)).models) == (str(path), ())
    assert refusal("--model", "a=x", "--model", "a=y") == "--model must name each model once, but 'a' was given twice"
    assert refusal("--model", "=x").startswith("--model must be NAME=MODEL, with letters")
    assert refusal("m", "--model", "a=x") == "--model a=x contradicts MODEL m: give only one of them"
    given = ("--model", "a=x", "--served-model-name", "b")
    assert refusal(*given) == "--served-model-name applies to a single model, but several were given"


TIERS = [{"kv_host_memory": MIB}, {"state_memory": MIB}, {"kv_disk": DiskTier(Path("/var/kv"), MIB)}]


@pytest.mark.parametrize("tier", TIERS)
def test_the_memory_of_a_worker_process_is_not_copied(tier: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="cannot go with --worker process"):
        ServeConfig(worker="process", **tier)
