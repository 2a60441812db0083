"""docs/models.md says what the registry of families has, and every family that generates is tested."""

import importlib.util
from pathlib import Path

import pytest
from lmserve.model.errors import CheckpointError
from lmserve.model.families import all_families, gguf_family, hf_family

ROOT = Path(__file__).parents[2]


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_as_generated():
    written = (ROOT / "docs" / "models.md").read_text("utf-8")
    assert written == load(ROOT / "tools" / "models.py").page(), "run make models"


def test_every_family_that_generates_is_compared_with_transformers():
    tested = load(ROOT / "tests" / "engine" / "tiny_models.py").CONFIGS.keys()
    assert {family.name for family in all_families() if family.kind == "generate"} <= tested


@pytest.mark.parametrize(
    ("raw", "part"),
    [
        (
            {"architectures": ["X"], "text_config": {"linear_num_value_heads": 32}},
            "it has layers with a recurrent state",
        ),
        ({"architectures": ["GPT2LMHeadModel"], "n_positions": 1024}, "it has positions that are learned"),
    ],
)
def test_a_refusal_says_which_part_is_missing(raw, part):
    with pytest.raises(CheckpointError, match=part):
        hf_family(raw)


def test_the_file_that_is_called_like_an_architecture_gives_the_same_family_as_the_whole_list():
    of_gguf = {}
    for family in all_families():
        assert all(hf_family({"architectures": [name]}) is family for name in family.hf_architectures)
        of_gguf.setdefault((family.gguf_architecture, family.gguf_experts), family)
    del of_gguf[None, False]
    assert all(gguf_family(name, experts=experts) is family for (name, experts), family in of_gguf.items())
    assert len(of_gguf) > 30
