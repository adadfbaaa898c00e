"""Arrows between packages go one way (DESIGN: who may import whom), inside functions too, and no circle hides."""

import ast
import graphlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Rooms of atom_jax: those above know nothing of those below; those of one line may know each other, but not in a
# circle. A room inside of another one has a line of its own.
ROOMS = (
    ("typing", "files", "config", "terminal", "picture"),
    ("fields", "naming", "params", "sharding", "tokenizers"),
    ("nn",),
    ("kvcache", "chunking", "reduction"),
    ("units",),
    ("models",),
    ("session", "transfer", "data"),
    ("checkpoint",),
    ("lasting",),
    ("data.fetch", "inference"),
    ("training",),
    ("evaluation",),
    ("evaluation.tasks",),
    ("evaluation.run",),
    ("evaluation.reports",),
    ("aot", "flax_bridge", "serving"),
    ("commands",),
    ("__init__", "__main__"),
)
LEVEL = {f"atom_jax.{room}": i for i, rooms in enumerate(ROOMS) for room in rooms}
# Imported inside of functions, because they take long to import or need a package that may not be there.
SLOW = {"checkpoint.store", "tokenizers.hat", "tokenizers.json_tokenizer", "tokenizers.tiktoken", "tokenizers.train"}
FILES = sorted((ROOT / "atom_jax").rglob("*.py")) + sorted((ROOT / "pallas_kernels").rglob("*.py"))


def name_of(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def imports(path: pathlib.Path) -> list[tuple[str, bool]]:
    """(what is imported, whether inside of a function) anywhere in a file."""
    found = []

    def visit(node: ast.AST, inside: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((a.name, inside) for a in child.names)
            if isinstance(child, ast.ImportFrom) and child.module:
                found.extend((f"{child.module}.{a.name}", inside) for a in child.names)
            visit(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    visit(ast.parse(path.read_text()), False)
    return found


IMPORTS = {name_of(path): imports(path) for path in FILES}


def longest(name: str, known) -> str:
    """The longest beginning of a dotted name that is known; "" for none."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


def own(module: str) -> list[tuple[str, bool]]:
    """The modules of atom_jax that one of them imports, and whether inside of a function."""
    return [(longest(n, IMPORTS), inside) for n, inside in IMPORTS[module] if n.startswith("atom_jax.")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
    module = name_of(path)
    parts, names = module.split("."), [n for n, _ in IMPORTS[module]]
    if parts[0] == "pallas_kernels":
        assert not [n for n in names if n.startswith("atom_jax")]
        return
    assert longest(module, LEVEL), f"{module} has no room"
    level = LEVEL[longest(module, LEVEL)]
    for name, inside in own(module):
        assert LEVEL[longest(name, LEVEL)] <= level, f"{module} imports {name}"
        late = name.removeprefix("atom_jax.") in SLOW or parts[1] in ("__main__", "commands")
        assert late or not inside, f"{module} imports {name} inside of a function"
    roots = {n.split(".")[0] for n in names}
    if "orbax" in roots:
        assert module == "atom_jax.checkpoint.store"
    if module != "atom_jax.flax_bridge":
        assert not [n for n in names if n.startswith(("flax.linen", "flax.nnx"))]
    # Environments are stepped inside of compiled programs.
    if parts[1] in ("data", "tokenizers") and parts[2:3] != ["envs"]:
        assert not roots & {"jax", "flax", "optax"}


@pytest.mark.parametrize("what", ["modules", "rooms"])
def test_no_circles(what):
    known = IMPORTS if what == "modules" else LEVEL
    graph: dict[str, set[str]] = {}
    for module in IMPORTS:
        if module.startswith("atom_jax."):
            ours = longest(module, known)
            used = {longest(n, known) for n, _ in own(module)} - {ours}
            graph.setdefault(ours, set()).update(used)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_no_file_is_long():
    files = [*FILES, *(ROOT / "tests").rglob("*.py"), *ROOT.glob("*.py")]
    assert not [str(path) for path in files if len(path.read_text().splitlines()) > 400]
