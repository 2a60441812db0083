"""Models by name, from a hub on loopback into a cache of huggingface_hub's layout, and out of it."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import tiny_gguf
import tiny_models
from hub_standin import COMMIT, StandIn, hub_standin
from lmserve.cli import main
from lmserve.cli.progress import DownloadProgress
from lmserve.hub import download as downloads
from lmserve.source import SourceError, find_model, weights_file

REPOSITORY = "owner/tiny-GGUF"
LABELS = ("Q4_0", "Q8_0", "F32")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A tiny model, in files of each quantization."""
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny_models.make("llama", folder, hidden_size=192, intermediate_size=64, head_dim=32)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    for label in LABELS:
        path = folder / f"tiny-{label}.gguf"
        tiny_gguf.write(path, model, "llama", label)
        files[path.name] = path.read_bytes()
    return files


@pytest.fixture
def hub(models: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("LMSERVE_CACHE", str(tmp_path / "lmserve"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(downloads, "PAUSE_SECONDS", 0)
    with hub_standin() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        hub.files[REPOSITORY] = {f"tiny-{label}.gguf": models[f"tiny-{label}.gguf"] for label in LABELS}
        hub.files["owner/tiny"] = {name: data for name, data in models.items() if not name.endswith(".gguf")}
        yield hub


def test_the_largest_that_fits_is_chosen_and_told(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    source = find_model(REPOSITORY, tell=told.append)
    assert source.names == (REPOSITORY, f"{REPOSITORY}:Q8_0")
    assert source.path.read_bytes() == hub.files[REPOSITORY]["tiny-Q8_0.gguf"]
    (line,) = told
    assert f"{REPOSITORY} has Q4_0, Q8_0, F32. lmserve takes Q8_0, the largest that fits into memory" in line
    # What was chosen once holds, and nothing more is asked.
    hub.files.clear()
    assert find_model(REPOSITORY).path == source.path


def test_one_that_does_not_fit_is_not_chosen(hub: StandIn) -> None:
    hub.claimed["tiny-Q8_0.gguf"] = 1 << 50
    assert find_model(REPOSITORY).path.name == "tiny-Q4_0.gguf"
    assert hub.bytes_of("tiny-Q8_0.gguf") == 0
    hub.files["owner/huge"] = {"a-Q4_0.gguf": b"x", "a-Q8_0.gguf": b"x"}
    hub.claimed |= {"a-Q4_0.gguf": 1 << 50, "a-Q8_0.gguf": 1 << 51}
    with pytest.raises(SourceError, match=r"the smallest, Q4_0, has 1125899906842624 bytes, but \d+ are free"):
        find_model("owner/huge")


def test_a_quantization_by_name_is_placed_where_huggingface_hub_finds_it(hub: StandIn) -> None:
    source = find_model(f"hf.co/{REPOSITORY}:q4_0")
    assert source.names == (f"{REPOSITORY}:Q4_0", REPOSITORY)
    theirs = huggingface_hub.try_to_load_from_cache(
        REPOSITORY, "tiny-Q4_0.gguf", cache_dir=huggingface_hub.constants.HF_HUB_CACHE
    )
    assert theirs == str(source.path)
    scanned = huggingface_hub.scan_cache_dir(huggingface_hub.constants.HF_HUB_CACHE)
    assert scanned.warnings == []
    assert [(repo.repo_id, repo.nb_files) for repo in scanned.repos] == [(REPOSITORY, 1)]
    assert [revision.commit_hash for repo in scanned.repos for revision in repo.revisions] == [COMMIT]


def test_a_folder_model_comes_whole_and_is_checked(hub: StandIn) -> None:
    source = find_model("owner/tiny")
    assert source.names == ("owner/tiny",)
    assert {path.name for path in source.path.iterdir()} >= {"config.json", "model.safetensors"}
    sent = len(hub.sent)
    assert find_model("owner/tiny") == source
    assert len(hub.sent) == sent
    hub.files["owner/other"] = dict(hub.files["owner/tiny"])
    hub.damaged.add("config.json")
    with pytest.raises(SourceError, match=r"config.json is damaged: checksum [0-9a-f]{40} expected, but"):
        find_model("owner/other")


def test_a_download_that_breaks_off_goes_on_where_it_was(hub: StandIn) -> None:
    size = len(hub.files[REPOSITORY]["tiny-Q4_0.gguf"])
    hub.break_after = [1000, 0, 500]
    find_model(f"{REPOSITORY}:Q4_0")
    assert [first for _, first, _ in hub.sent] == [0, 1000, 1000, 1500]
    assert hub.bytes_of("tiny-Q4_0.gguf") == size


def test_the_next_process_goes_on_where_the_last_one_gave_up(hub: StandIn) -> None:
    hub.break_after = [1000, 0, 0, 0, 0, 0]
    with pytest.raises(SourceError, match=r"stopped after 1000 bytes: .*\. The next attempt continues from there"):
        find_model(f"{REPOSITORY}:Q4_0")
    hub.sent.clear()
    seen: list[int] = []
    find_model(f"{REPOSITORY}:Q4_0", lambda done, _total: seen.append(done))
    assert hub.sent[0][1] == 1000
    assert seen[0] == 1000


def test_damage_is_told_and_not_kept(hub: StandIn) -> None:
    hub.damaged.add("tiny-Q4_0.gguf")
    with pytest.raises(SourceError, match=r"tiny-Q4_0\.gguf is damaged: checksum [0-9a-f]{64} expected, but"):
        find_model(f"{REPOSITORY}:Q4_0")
    hub.damaged.clear()
    assert find_model(f"{REPOSITORY}:Q4_0").path.is_file()


def test_a_new_commit_hides_nothing_that_is_here(hub: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    find_model(f"{REPOSITORY}:Q4_0")
    hub.commit = "beef" + "0" * 36
    find_model(f"{REPOSITORY}:Q8_0")
    assert hub.bytes_of("tiny-Q4_0.gguf") == len(hub.files[REPOSITORY]["tiny-Q4_0.gguf"])
    assert main(["list"]) == 0
    assert capsys.readouterr().out.count(f"{REPOSITORY}:Q") == 2


def test_a_path_of_any_characters(hub: StandIn) -> None:
    hub.files["owner/odd"] = {"a #1?/m 100%.gguf": hub.files[REPOSITORY]["tiny-Q4_0.gguf"]}
    assert find_model("owner/odd").path.name == "m 100%.gguf"


def test_a_full_disk_is_told_before_the_first_byte(hub: StandIn) -> None:
    hub.claimed["tiny-Q8_0.gguf"] = 1 << 60
    with pytest.raises(SourceError, match=r"bytes free, but 1152921504606846976 more are needed"):
        find_model(f"{REPOSITORY}:Q8_0")
    assert hub.sent == []


def test_two_at_once_download_once(hub: StandIn) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(find_model(f"{REPOSITORY}:Q4_0").path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(found), len(set(found))) == (3, 1)
    assert hub.bytes_of("tiny-Q4_0.gguf") == len(hub.files[REPOSITORY]["tiny-Q4_0.gguf"])


def test_a_url_with_a_checksum(hub: StandIn) -> None:
    # Not the hub of the settings: a server like any other.
    url = hub.url.replace("127.0.0.1", "localhost") + f"/{REPOSITORY}/resolve/main/tiny-Q4_0.gguf"
    checksum = hashlib.sha256(hub.files[REPOSITORY]["tiny-Q4_0.gguf"]).hexdigest()
    source = find_model(f"{url}#sha256={checksum}")
    assert (source.path.name, source.names) == ("tiny-Q4_0.gguf", ("tiny-Q4_0",))
    other = url.replace("Q4_0", "Q8_0")
    with pytest.raises(SourceError, match="is damaged: checksum"):
        find_model(f"{other}#sha256={checksum}")


def test_a_url_where_nobody_answers(hub: StandIn) -> None:
    with pytest.raises(SourceError, match=r"^http://127\.0\.0\.1:9/m\.gguf cannot be reached: "):
        find_model("http://127.0.0.1:9/m.gguf")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("owner/nothing", r"the hub has no model owner/nothing, or it needs a login \(hf auth login\): HTTP 404"),
        (f"{REPOSITORY}:Q5_K_M", "has Q4_0, Q8_0, F32, but Q5_K_M was requested"),
        ("owner/text", "has neither GGUF nor safetensors files"),
        ("qwen3:5b", "qwen3 is known in the sizes 0.6b"),
        ("qwem3", "did you mean qwen3"),
    ],
)
def test_what_there_is_not(hub: StandIn, name: str, message: str) -> None:
    hub.files["owner/text"] = {"README.md": b"text"}
    with pytest.raises(SourceError, match=message):
        find_model(name)


def test_a_file_that_would_leave_the_cache_is_refused(hub: StandIn) -> None:
    hub.files["owner/evil"] = {"../../evil.gguf": b"GGUF"}
    with pytest.raises(SourceError, match="is not a path in a repository"):
        find_model("owner/evil")


def test_a_gated_model_needs_the_token_which_goes_to_the_hub(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_test"
    with pytest.raises(SourceError, match="it needs a login"):
        find_model(f"{REPOSITORY}:Q4_0")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    assert find_model(f"{REPOSITORY}:Q4_0").path.is_file()


def test_pull_list_show_and_rm(hub: StandIn, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["show", f"{REPOSITORY}:Q4_0"]) == 0
    shown = capsys.readouterr().out
    assert "Family    llama" in shown
    assert " fit into the KV cache" in shown
    # A plan reads the header alone.
    assert main(["list"]) == 0
    assert capsys.readouterr().out == "NAME  SIZE  FETCHED\n"
    for label in ("Q4_0", "Q8_0"):
        assert main(["pull", f"{REPOSITORY}:{label}"]) == 0
    output = capsys.readouterr()
    assert output.out.splitlines()[1].endswith("tiny-Q8_0.gguf")
    assert "100 %" in output.err
    assert main(["list"]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]} == {
        f"{REPOSITORY}:Q4_0",
        f"{REPOSITORY}:Q8_0",
    }
    weights = weights_file(find_model(f"{REPOSITORY}:Q4_0").path, "auto", "q8")
    assert weights is not None
    weights.parent.mkdir(parents=True)
    weights.touch()
    assert main(["rm", f"{REPOSITORY}:q4_0"]) == 0
    assert capsys.readouterr().out.startswith(f"{REPOSITORY}:Q4_0: ")
    assert not weights.exists()
    assert [path.name for path in (tmp_path / "hub").rglob("*.gguf")] == ["tiny-Q8_0.gguf"]
    assert main(["rm", REPOSITORY]) == 0
    assert list((tmp_path / "hub").glob("models--*")) == []
    capsys.readouterr()
    assert main(["rm", REPOSITORY]) == 1
    assert (
        capsys.readouterr().err
        == f"lmserve: error: {REPOSITORY} is not in the cache; lmserve list shows the models that are\n"
    )


def test_models_of_every_kind_are_listed_and_removed(hub: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    url = hub.url.replace("127.0.0.1", "localhost") + f"/{REPOSITORY}/resolve/main/tiny-Q4_0.gguf"
    find_model(url)
    find_model("owner/tiny")
    find_model(f"{REPOSITORY}:Q8_0")
    assert main(["list"]) == 0
    names = {line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]}
    assert names == {"tiny-Q4_0", "owner/tiny", f"{REPOSITORY}:Q8_0"}
    assert main(["rm", url, "owner/tiny", f"hf.co/{REPOSITORY}"]) == 0
    capsys.readouterr()
    assert main(["list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert main(["rm", "qwen3:99b"]) == 1
    assert "qwen3 is known in the sizes" in capsys.readouterr().err


def test_the_short_names_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--known"]) == 0
    assert "qwen3:4b, qwen3" in capsys.readouterr().out


@pytest.mark.parametrize("width", [10, 30, 60, 80, 120, 300])
def test_the_line_of_a_download_fits_any_terminal(width: int) -> None:
    progress = DownloadProgress("owner/a-model-with-a-long-name-GGUF:Q4_K_M")
    for done in (0, 1 << 20, 5 << 30, 10 << 30):
        line = progress.line(done, 10 << 30, 123 << 20, width)
        assert 0 < len(line) <= width
        assert f"{10 * done // (1 << 30)} %" in line or width < 12
    assert len(progress.line(5 << 30, 0, 1 << 20, width)) <= width
