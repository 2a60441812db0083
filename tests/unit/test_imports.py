"""Who may import whom, in Python and in Rust: the rules of ARCHITECTURE.md."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "lmserve"
CRATE = ROOT / "src"

# Each Rust module may use those before it, and the kernels (`cpu`) only the error type.
RUST_LAYERS = (
    "error",
    "panics",
    "cpu",
    "gguf",
    "request",
    "tenant",
    "text",
    "guided",
    "tier",
    "kv",
    "sched",
    "session",
    "wire",
    "engine",
    "sim",
    "bindings",
)
# The first holds the files of the docs page, the second is a part of `opentelemetry`, the third is for uvicorn.
USED_BY_NAME = {"flask-swagger-ui", "opentelemetry-exporter-otlp-proto-http", "websockets"}
# torch brings triton where there are wheels of it.
DISTRIBUTIONS = {"triton": "torch", "huggingface_hub": "huggingface-hub", "opentelemetry": "opentelemetry-sdk"}


@dataclass(frozen=True)
class Import:
    """One import at run time."""

    path: str  # of the file, under the package
    module: str


def runtime_imports(tree: ast.AST, path: str) -> Iterator[Import]:
    """Every import in `tree` but those for the type checker alone."""
    if isinstance(tree, ast.If) and ast.unparse(tree.test) == "TYPE_CHECKING":
        for statement in tree.orelse:
            yield from runtime_imports(statement, path)
        return
    if isinstance(tree, ast.Import):
        for name in tree.names:
            yield Import(path, name.name)
    elif isinstance(tree, ast.ImportFrom):
        assert tree.level == 0, f"{path}:{tree.lineno}: imports are absolute"
        for name in tree.names:
            yield Import(path, f"{tree.module}.{name.name}")
    for child in ast.iter_child_nodes(tree):
        yield from runtime_imports(child, path)


def package_imports() -> list[Import]:
    found: list[Import] = []
    for file in sorted(PACKAGE.rglob("*.py")):
        found += runtime_imports(ast.parse(file.read_text("utf-8")), file.relative_to(PACKAGE).as_posix())
    return found


IMPORTS = package_imports()


def importers(module: str) -> list[Import]:
    return [i for i in IMPORTS if i.module == module or i.module.startswith(module + ".")]


def test_imports_are_found() -> None:
    """The tests below would hold for a package that nobody read."""
    assert importers("msgspec")
    assert importers("torch")
    tree = ast.parse("if TYPE_CHECKING:\n import a\nelse:\n import b\ndef f():\n from c import d\n")
    assert [i.module for i in runtime_imports(tree, "")] == ["b", "c.d"]


def test_schemas_import_msgspec_alone() -> None:
    allowed = sys.stdlib_module_names | {"msgspec"}
    for i in IMPORTS:
        if i.path.startswith("schemas/"):
            assert i.module.split(".")[0] in allowed or i.module.startswith("lmserve.schemas"), i


def test_litestar_is_imported_only_by_the_http_layer() -> None:
    assert {i.path for i in importers("litestar") if i.path != "app.py" and not i.path.startswith("api/")} == set()


def test_uvicorn_is_imported_only_by_the_server() -> None:
    assert {i.path for i in importers("uvicorn")} == {"connection.py", "server.py"}


def test_torch_is_imported_only_by_the_model_loop() -> None:
    assert {i.path for i in importers("torch") if not i.path.startswith("model/")} == set()


def test_opentelemetry_is_imported_by_tracing_alone() -> None:
    assert {i.path for i in importers("opentelemetry")} == {"api/http/tracing.py"}
    assert {i.path for i in importers("lmserve.api.http.tracing")} == {"cli/tracing.py"}


def test_model_loop_knows_nothing_above_it() -> None:
    above = ("app", "server", "api", "schemas", "engine", "cli", "config", "assets", "source")
    for i in IMPORTS:
        if i.path.startswith("model/"):
            assert not any(
                i.module == f"lmserve.{name}" or i.module.startswith(f"lmserve.{name}.") for name in above
            ), i


def test_engine_and_schemas_know_nothing_of_http() -> None:
    for i in IMPORTS:
        if i.path.startswith(("engine/", "schemas/")):
            assert not i.module.startswith(("lmserve.api", "lmserve.app", "lmserve.server", "lmserve.cli")), i


def test_the_benchmark_knows_no_server() -> None:
    for i in IMPORTS:
        if i.path.startswith("bench/") and i.module.startswith("lmserve."):
            assert i.module.startswith("lmserve.bench.") or i.module == "lmserve.__version__", i


@pytest.mark.parametrize(
    "module", ["lmserve", "lmserve.cli", "lmserve.config", "lmserve.schemas", "lmserve.engine.load", "lmserve.model"]
)
def test_importing_loads_neither_torch_nor_litestar(module: str) -> None:
    script = f"import sys, {module}; print(*sorted({{'torch', 'litestar', 'transformers'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


@pytest.mark.parametrize(
    ("module", "late"),
    [
        ("lmserve", {"numpy", "msgspec"}),
        ("lmserve.cli", {"numpy", "httpx"}),
        ("lmserve.cli.server", {"httpx", "rich", "gguf", "lmserve.model.families.llama"}),
    ],
)
def test_importing_does_not_load_what_few_starts_need(module: str, late: set[str]) -> None:
    script = f"import sys, {module}; print(*sorted({late!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def test_every_public_name_can_be_imported() -> None:
    import lmserve

    assert set(lmserve.MODULES) == set(lmserve.__all__) - {"__version__"}
    for name in lmserve.MODULES:
        assert getattr(lmserve, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Server'"):
        _ = lmserve.Server


def test_dependencies_are_those_that_are_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = (line for lines in project["optional-dependencies"].values() for line in lines)
    declared = {re.match(r"[\w.-]+", line)[0] for line in (*project["dependencies"], *extras)}
    top = {i.module.split(".")[0] for i in IMPORTS} - sys.stdlib_module_names - {"lmserve"}
    assert {DISTRIBUTIONS.get(name, name) for name in top} == declared - USED_BY_NAME


def rust_files() -> list[tuple[str, Path]]:
    """(layer, file): the first module below the crate's root."""
    files = sorted(CRATE.rglob("*.rs"))
    return [(f.relative_to(CRATE).parts[0].removesuffix(".rs"), f) for f in files if f != CRATE / "lib.rs"]


def rust_code(file: Path) -> str:
    """The file without its comments."""
    return re.sub(r"//.*", "", file.read_text("utf-8"))


def test_rust_layers_import_only_what_is_below() -> None:
    used = set()
    for layer, file in rust_files():
        code = rust_code(file)
        assert "crate::{" not in code, f"{file}: one `use` for each module"
        for name in re.findall(r"\bcrate::(\w+)", code):
            if name == layer:
                continue
            used.add((layer, name))
            where = f"{file.relative_to(ROOT)} uses crate::{name}"
            if layer == "cpu":
                assert name == "error", where
            elif layer != "bindings" or name != "cpu":
                assert name in RUST_LAYERS[: RUST_LAYERS.index(layer)], where
    assert ("text", "error") in used


def test_only_the_engine_and_the_kernels_own_threads() -> None:
    spawn = re.compile(r"\bthread::(spawn|Builder|scope)\b|\brayon::")
    owners = {file.relative_to(CRATE).as_posix() for _, file in rust_files() if spawn.search(before_tests(file))}
    assert {owner for owner in owners if not owner.startswith("engine/") and owner != "cpu/pool.rs"} == set()


def test_pyo3_is_used_only_by_the_bindings() -> None:
    users = {
        layer for layer, file in rust_files() if re.search(r"\bpyo3\b|#\[py(class|methods|function)", rust_code(file))
    }
    assert users == {"bindings"}


def before_tests(file: Path) -> str:
    """The code that ships: `mod tests` stands last in a file."""
    return rust_code(file).partition("#[cfg(test)]\nmod tests")[0]
