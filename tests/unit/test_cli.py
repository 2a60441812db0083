"""The command line, up to where a server would start."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
from lmserve import __version__
from lmserve.assets import MINILM, SMOLLM2, Asset, AssetError
from lmserve.cli import main, parser
from lmserve.cli.errors import CommandError
from lmserve.cli.serve import config_of
from lmserve.config import GIB, MIB, ConfigError, ServeConfig, format_size, parse_size
from lmserve.source import PUBLISHED, ModelSource, SourceError, find_model


def config(*arguments: str) -> ServeConfig:
    return config_of(parser().parse_args(["serve", *arguments]))


def stderr_of_usage_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `lmserve serve` says to arguments that it refuses before it imports anything."""
    try:
        code: object = main(["serve", *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    output = capsys.readouterr()
    assert output.out == ""
    return output.err


def test_no_argument_is_all_defaults() -> None:
    assert config() == ServeConfig()
    assert (config().host, config().port) == ("127.0.0.1", 23333)


def test_positional_arguments() -> None:
    given = config("./model", "0.0.0.0", "8000")
    assert (given.model, given.host, given.port) == ("./model", "0.0.0.0", 8000)


def test_every_flag_reaches_its_setting(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# ours\nfile-key-1\n\nfile-key-2  # theirs\n")
    given = config(
        *("--host", "::1", "--port", "0", "--api-key", "a", "--api-key", "b", "--api-key-file", str(keys)),
        *("--max-body", "1MiB", "--cors-origin", "https://a.example", "--cors-origin", "*", "--grace", "2.5"),
        *("--allowed-host", "a.example", "--allowed-host", "::1"),
        *("--log-level", "debug", "--served-model-name", "m", "--served-model-name", "n", "--device", "cuda:1"),
        *("--dtype", "bf16", "--max-model-len", "4096", "--max-batch", "8", "--max-batch-tokens", "256"),
        *("--max-queue", "7", "--kv-memory", "1.5GiB", "--no-prefix-cache"),
        *("--gpu-memory-fraction", "0.5"),
    )
    assert given == ServeConfig(
        host="::1",
        port=0,
        api_keys=("a", "b", "file-key-1", "file-key-2"),
        served_model_names=("m", "n"),
        device="cuda:1",
        dtype="bf16",
        max_model_len=4096,
        max_batch=8,
        max_batch_tokens=256,
        kv_memory=3 * GIB // 2,
        gpu_memory_fraction=0.5,
        max_queue=7,
        prefix_cache=False,
        max_body=MIB,
        cors_origins=("https://a.example", "*"),
        allowed_hosts=("a.example", "::1"),
        grace=2.5,
        log_level="debug",
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--port", "65536"], "--port must lie in [0, 65535], but 65536 was given"),
        (["--port", "http"], "a whole number expected, but 'http' was given"),
        (["m", "h", "1", "--port", "2"], "--port 2 contradicts PORT 1"),
        (["--host", "a b"], "--host must be a host name or an address, but 'a b' was given"),
        (["--max-batch", "0"], "--max-batch must lie in [1, 4096], but 0 was given"),
        (["--max-batch-tokens", "0"], "--max-batch-tokens must lie in [1, 1048576], but 0 was given"),
        (["--max-model-len", "0"], "--max-model-len must lie in [1, "),
        (["--max-queue", "-1"], "--max-queue must lie in [1, 1000000], but -1 was given"),
        (["--kv-memory", "2 parsecs"], "a size such as 2GiB, 512MiB or a number of bytes expected, but '2 parsecs'"),
        (["--kv-memory", "1"], "--kv-memory must lie in ["),
        (["--gpu-memory-fraction", "1.5"], "--gpu-memory-fraction must lie in [0.01, 1], but 1.5 was given"),
        (["--grace", "nan"], "--grace must lie in [0, 3600], but nan was given"),
        (
            ["--otlp-endpoint", "grpc://c"],
            "--otlp-endpoint must be a URL such as http://127.0.0.1:4318 (OTLP over HTTP), but 'grpc://c' was given",
        ),
        (["--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N, but 'tpu' was given"),
        (["--dtype", "int3"], "invalid choice: 'int3'"),
        (
            ["--cors-origin", "example.org"],
            "--cors-origin must be * or an origin such as https://",
        ),
        (["--cors-origin", "https://example.org/"], "--cors-origin must be"),
        (["--cors-origin", "https://Example.org"], "--cors-origin must be"),
        (["--cors-origin", ""], "--cors-origin must be"),
        (
            ["--allowed-host", "http://a.example"],
            "--allowed-host must be * or a host name without scheme",
        ),
        (["--allowed-host", "a.example:80"], "--allowed-host must be"),
        (["--api-key", ""], "--api-key key 1 must be printable ASCII"),
        (["--api-key", "k", "--api-key", "k"], "--api-key contains the same entry twice"),
        (["--served-model-name", " "], "--served-model-name must be printable and not empty, but ' ' was given"),
        (["--api-key-file", "/nowhere/keys"], "--api-key-file /nowhere/keys cannot be read"),
        (["--api-key-file", "/dev/null"], "--api-key-file /dev/null contains no key"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in stderr_of_usage_error(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ("127.0.0.1",)),
        (["--host", "localhost"], ("localhost",)),
        (["--host", "0.0.0.0"], None),
        (["--api-key", "k"], None),
        (["--allowed-host", "a.example"], ("a.example", "127.0.0.1")),
        (["--host", "0.0.0.0", "--api-key", "k", "--allowed-host", "a.example"], ("a.example", "0.0.0.0")),
    ],
)
def test_names_that_requests_may_give(arguments: list[str], expected: tuple[str, ...] | None) -> None:
    from lmserve.cli.server import allowed_hosts

    assert allowed_hosts(config(*arguments)) == expected


def test_keys_are_in_no_message() -> None:
    given = ServeConfig(api_keys=("sk-secret",))
    assert "sk-secret" not in repr(given)
    with pytest.raises(ConfigError) as caught:
        ServeConfig(api_keys=("sk secret",))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("2GiB", 2 * GIB), ("2g", 2 * 10**9), ("0.5 MiB", MIB // 2), ("1kb", 1000), ("1Ti", 1024 * GIB)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e3", "1 gig", "1GiB2", "inf"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="a size is a number and a unit"):
        parse_size(text)


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2 * GIB, "2 GiB")])
def test_sizes_for_people(size: int, text: str) -> None:
    assert format_size(size) == text


def test_version() -> None:
    result = subprocess.run([sys.executable, "-m", "lmserve", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == f"lmserve {__version__}\n"


def test_help_tells_a_default_and_a_meaning_of_every_flag() -> None:
    for command in commands().values():
        for action in command._actions:
            assert action.help, action.dest
            if action.option_strings and action.nargs != 0:
                assert "(default: " in action.help, action.option_strings


def commands() -> dict[str, argparse.ArgumentParser]:
    (subparsers,) = [a for a in parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(subparsers.choices)


def test_failure_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "no-such-model"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("lmserve: error: 'no-such-model' is not a file or folder here")


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Bundled models are in the cache."""
    monkeypatch.setattr("lmserve.source.fetch", lambda asset, _: tmp_path / asset.name)
    return tmp_path


def test_nothing_is_the_default_model_under_lmdeploys_name_too(fetched: Path) -> None:
    expected = ModelSource(
        fetched / SMOLLM2.name, ("SmolLM2-135M-Instruct", "internlm-chat-7b"), PUBLISHED[SMOLLM2.name]
    )
    assert find_model(None) == find_model(SMOLLM2.name) == expected


def test_bundled_model_by_name(fetched: Path) -> None:
    assert find_model(MINILM.name) == ModelSource(fetched / MINILM.name, ("all-MiniLM-L6-v2",))


def test_paths_are_served_under_their_name(tmp_path: Path) -> None:
    folder, file = tmp_path / "Tiny-Llama.v2", tmp_path / "tiny.Q8_0.gguf"
    folder.mkdir()
    file.touch()
    assert find_model(str(folder)) == ModelSource(folder, ("Tiny-Llama.v2",))
    assert find_model(str(file)) == ModelSource(file, ("tiny.Q8_0",))


def test_other_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.touch()
    with pytest.raises(SourceError, match=r"model\.bin is neither a GGUF file \(\*\.gguf\) nor a folder"):
        find_model(str(file))


def test_hub_without_a_network_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SourceError, match=r"owner/model is not in the hub's cache here") as caught:
        find_model("owner/model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("command", ["pull", "fetch"])
def test_pull_prints_the_path(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fake(asset: Asset, _progress: object) -> Path:
        return Path("/cache") / asset.name

    monkeypatch.setattr("lmserve.source.fetch", fake)
    assert main([command, "all-MiniLM-L6-v2"]) == 0
    assert capsys.readouterr().out == "/cache/all-MiniLM-L6-v2\n"


def test_pull_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_asset: Asset, _progress: object) -> Path:
        raise AssetError("no index could be reached")

    monkeypatch.setattr("lmserve.source.fetch", fail)
    assert main(["pull"]) == 1
    assert capsys.readouterr().err == "lmserve: error: no index could be reached\n"


def test_chat_without_a_server_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda _prompt: "hello")
    assert main(["chat", "--url", "http://127.0.0.1:9"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("lmserve: error: no server answers at http://127.0.0.1:9")
    assert error.count("\n") == 1


def test_command_error_has_its_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_arguments: argparse.Namespace) -> int:
        raise CommandError("out of patience", exit_code=2)

    monkeypatch.setattr("lmserve.cli.models.run_pull", fail)
    assert main(["pull"]) == 2
    assert capsys.readouterr().err == "lmserve: error: out of patience\n"
