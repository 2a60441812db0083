"""No two files import each other, be it through others, and ARCHITECTURE.md shows the rooms as they are."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rooms", ROOT / "tools" / "rooms.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rooms = load()


def test_circles_are_found(tmp_path: Path) -> None:
    """The tests below would hold for a graph without arrows."""
    assert rooms.circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}}) == [["b", "c"]]
    package = tmp_path / "p"
    package.mkdir()
    (package / "__init__.py").write_text("from p.a import A\n")
    (package / "a.py").write_text("import p.b\nclass A: pass\n")
    (package / "b.py").write_text("def f():\n    from p import A\n")
    assert rooms.circles(rooms.python_graph(package, "p")) == [["a.py", "b.py"]]
    crate = tmp_path / "src"
    (crate / "m").mkdir(parents=True)
    (crate / "lib.rs").write_text("mod m;\n")
    (crate / "m" / "mod.rs").write_text("mod a;\nmod b;\npub use a::A;\n")
    (crate / "m" / "a.rs").write_text("use super::b::{self, B};\npub struct A(B);\n")
    (crate / "m" / "b.rs").write_text("use crate::m::A;\npub struct B(Option<Box<A>>);\n")
    assert rooms.circles(rooms.rust_graph(crate)) == [["m/a.rs", "m/b.rs"]]


def test_no_two_files_of_the_package_import_each_other() -> None:
    graph = rooms.python_graph(rooms.PACKAGE, "lmserve")
    assert "model/config.py" in graph["model/options.py"] | graph["model/checkpoint.py"]
    assert rooms.circles(graph) == []


def test_no_two_files_of_the_crate_use_each_other() -> None:
    graph = rooms.rust_graph(rooms.CRATE)
    assert "engine/locks.rs" in graph["engine/health.rs"]
    assert rooms.circles(graph) == []


def test_the_picture_is_as_generated() -> None:
    written = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    assert written == rooms.page(written), "run make rooms"


def test_rooms_that_import_each_other_are_no_floors() -> None:
    assert list(rooms.floors({"a": set(), "b": {"a"}, "c": {"a", "b"}})) == [["a"], ["b"], ["c"]]
    assert rooms.needed({"a": set(), "b": {"a"}, "c": {"a", "b"}}, "c") == ["b"]
