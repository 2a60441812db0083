"""Which file of the crate and of the package imports which, and the picture of their rooms in ARCHITECTURE.md."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "lmserve"
CRATE = ROOT / "src"
BEGIN = "<!-- rooms -->"
END = "<!-- end of rooms -->"

Graph = dict[str, set[str]]


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one node (Tarjan, 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph.get(node, set()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for node in graph:
        if node not in index:
            visit(node)
    return sorted(found)


def python_imports(tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    """(module, name) of every import at run time."""
    if isinstance(tree, ast.If) and ast.unparse(tree.test) == "TYPE_CHECKING":
        for statement in tree.orelse:
            yield from python_imports(statement)
        return
    if isinstance(tree, ast.Import):
        yield from ((name.name, None) for name in tree.names)
    elif isinstance(tree, ast.ImportFrom) and tree.module:
        yield from ((tree.module, name.name) for name in tree.names)
    for child in ast.iter_child_nodes(tree):
        yield from python_imports(child)


def python_graph(package: Path, name: str) -> Graph:
    """Which file of a package imports which. A name that an `__init__.py` hands on is of the file that defines it."""
    trees = {file: ast.parse(file.read_text("utf-8")) for file in sorted(package.rglob("*.py"))}
    files: dict[str, Path] = {}
    for file in trees:
        parts = file.relative_to(package).with_suffix("").parts
        files[".".join((name, *(parts[:-1] if parts[-1] == "__init__" else parts)))] = file
    given: dict[tuple[str, str], tuple[str, str | None]] = {}
    for module, file in files.items():
        if file.name == "__init__.py":
            for source, imported in python_imports(trees[file]):
                if imported is not None and source in files:
                    given[module, imported] = (source, imported)

    def file_of(module: str, imported: str | None) -> Path | None:
        while imported is not None and (module, imported) in given and given[module, imported] != (module, imported):
            module, imported = given[module, imported]
        if imported is not None and f"{module}.{imported}" in files:
            return files[f"{module}.{imported}"]
        compiled = files[module].parent / f"{imported}.pyi" if module in files else None
        return None if compiled and compiled.exists() else files.get(module)

    graph: Graph = {}
    for file, tree in trees.items():
        used = {file_of(module, imported) for module, imported in python_imports(tree)} - {None, file}
        graph[file.relative_to(package).as_posix()] = {
            other.relative_to(package).as_posix() for other in used if other is not None
        }
    return graph


def shipped(file: Path) -> str:
    """A Rust file without its comments and its `mod tests`."""
    return re.sub(r"//.*", "", file.read_text("utf-8")).partition("#[cfg(test)]\nmod tests")[0]


def use_trees(code: str) -> Iterator[tuple[bool, tuple[str, ...]]]:
    """(public, path) of every name that a `use` brings in."""

    def expand(text: str, before: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        text = text.strip()
        head, brace, rest = text.partition("{")
        if not brace:
            path = re.sub(r"\s+as\s+\w+", "", text)
            yield (*before, *(part.strip() for part in path.split("::") if part.strip()))
            return
        parts = tuple(part.strip() for part in head.split("::") if part.strip())
        inner = rest.rstrip().removesuffix("}")
        depth, begin = 0, 0
        for at, letter in enumerate(inner + ","):
            depth += (letter == "{") - (letter == "}")
            if letter == "," and depth == 0:
                if inner[begin:at].strip():
                    yield from expand(inner[begin:at], (*before, *parts))
                begin = at + 1

    for match in re.finditer(r"^\s*(pub(?:\([^)]*\))?\s+)?use\s+([^;]+);", code, re.MULTILINE):
        for path in expand(match[2], ()):
            yield match[1] is not None, path


def rust_graph(crate: Path) -> Graph:
    """Which file of a crate uses which. A name that a module's `pub use` hands on is of the file that defines it."""
    files: dict[tuple[str, ...], Path] = {}
    for file in sorted(crate.rglob("*.rs")):
        parts = file.relative_to(crate).with_suffix("").parts
        files[parts[:-1] if parts[-1] in {"mod", "lib"} else parts] = file
    code = {module: shipped(file) for module, file in files.items()}

    def absolute(module: tuple[str, ...], path: tuple[str, ...]) -> tuple[str, ...] | None:
        if path[0] == "crate":
            return path[1:]
        at = module
        while path and path[0] in {"self", "super"}:
            at, path = (at[:-1] if path[0] == "super" else at), path[1:]
        return (*at, *path) if at != module or (*module, *path[:1]) in files else None

    given: dict[tuple[str, ...], tuple[str, ...]] = {}
    for module, text in code.items():
        for public, path in use_trees(text):
            target = absolute(module, path)
            if public and target:
                given[*module, target[-1]] = target

    def file_of(path: tuple[str, ...]) -> Path | None:
        for _ in range(8):
            known = next(
                (n for n in range(len(path), 0, -1) if path[:n] in given and given[path[:n]] != path[:n]), None
            )
            if known is None or path[:known] in files:
                break
            path = (*given[path[:known]], *path[known:])
        return next((files[path[:n]] for n in range(len(path), 0, -1) if path[:n] in files), None)

    def encloses(outer: Path, inner: Path) -> bool:
        """A module and those inside it may know each other: what is inside belongs to it."""
        folder = outer.parent if outer.name == "mod.rs" else outer.with_suffix("")
        return folder in inner.parents

    graph: Graph = {}
    for module, text in code.items():
        used: set[Path | None] = set()
        paths = [path for public, path in use_trees(text) if not public]
        paths += [tuple(match[0].split("::")) for match in re.finditer(r"\b(?:crate|super)(?:::\w+)+", text)]
        for path in paths:
            target = absolute(module, path)
            if target:
                used.add(file_of(target))
        file = files[module]
        graph[file.relative_to(crate).as_posix()] = {
            other.relative_to(crate).as_posix()
            for other in used
            if other and other != file and not encloses(file, other) and not encloses(other, file)
        }
    return graph


def rooms(graph: Graph) -> dict[str, set[str]]:
    """The first folder of each file, or the file itself, with the rooms that it imports."""

    def room(file: str) -> str:
        first, _, rest = file.partition("/")
        return first if rest else first.removesuffix(".rs").removesuffix(".py")

    found: dict[str, set[str]] = {}
    for file, others in graph.items():
        found.setdefault(room(file), set()).update(room(other) for other in others)
    return {name: others - {name} for name, others in found.items()}


def floors(graph: Mapping[str, set[str]]) -> Iterator[list[str]]:
    """The rooms from the ground up: each imports only what stands on lower floors."""
    left = dict(graph)
    built: set[str] = set()
    while left:
        floor = sorted(name for name, others in left.items() if others <= built)
        if not floor:
            raise ValueError(f"these rooms import each other: {', '.join(sorted(left))}")
        yield floor
        built.update(floor)
        for name in floor:
            del left[name]


def needed(graph: Mapping[str, set[str]], name: str) -> list[str]:
    """The rooms that `name` imports, without those that one of them imports already."""

    def below(room: str) -> set[str]:
        return graph[room].union(*(below(other) for other in graph[room]))

    return sorted(graph[name] - set().union(*(below(other) for other in graph[name])))


def picture() -> str:
    """Each room with those it stands on, from the top floor down, for the crate and for the package."""
    parts = []
    for title, imports in (("src/", rust_graph(CRATE)), ("python/lmserve/", python_graph(PACKAGE, "lmserve"))):
        found = rooms(imports)
        names = found.keys() - {"lib", "__init__", "__main__"}
        graph = {name: found[name] & names for name in names}
        width = max(map(len, graph)) + 2
        lines = [title]
        for floor in reversed(list(floors(graph))):
            lines += [f"  {name:<{width}}{', '.join(needed(graph, name))}".rstrip() for name in floor]
        parts.append("\n".join(lines))
    return "```text\n" + "\n\n".join(parts) + "\n```\n"


def page(text: str) -> str:
    """ARCHITECTURE.md with the picture of today."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{picture()}{END}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(page(path.read_text("utf-8")), "utf-8")
