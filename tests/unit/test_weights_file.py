"""Where the file of packed weights of a model is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from lmserve import source
from lmserve.source import weights_file


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LMSERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


def test_it_lies_beside_the_model_one_for_each_rounding(tmp_path: Path, cache: Path) -> None:
    model = tmp_path / "model.gguf"
    model.touch()
    assert weights_file(model, "auto", "auto") == tmp_path / "model.gguf.lmserve"
    assert weights_file(model, "auto", "q4") == tmp_path / "model.gguf.q4.lmserve"
    folder = tmp_path / "folder"
    folder.mkdir()
    assert weights_file(folder, "auto", "q8") == folder / "weights.q8.lmserve"
    assert weights_file(folder, "off", "q8") is None


def test_it_lies_in_the_cache_where_the_folder_cannot_be_written_or_is_the_hubs(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob, model = tmp_path / "blob", tmp_path / "snapshot" / "model.gguf"
    blob.touch()
    model.parent.mkdir()
    model.symlink_to(blob)
    (model.parent / "config.json").symlink_to(blob)
    plain = tmp_path / "plain.gguf"
    plain.touch()
    monkeypatch.setattr(source.os, "access", lambda path, mode: path != tmp_path)
    for path in (model, model.parent, plain):
        found = weights_file(path, "auto", "auto")
        assert found is not None
        assert found.parent == cache
        assert found.name.startswith(f"{path.name}-")
    # What somebody has put there is used nevertheless.
    beside = tmp_path / "plain.gguf.lmserve"
    beside.touch()
    assert weights_file(plain, "auto", "auto") == beside


def test_a_folder_may_be_chosen_for_models_of_one_name(tmp_path: Path) -> None:
    chosen = tmp_path / "chosen"
    files = {weights_file(tmp_path / name / "model.gguf", str(chosen), "auto") for name in ("a", "b")}
    assert len(files) == 2
    assert {file.parent for file in files if file is not None} == {chosen}
    again = weights_file(Path(os.path.relpath(tmp_path / "a" / "model.gguf")), str(chosen), "auto")
    assert again in files
