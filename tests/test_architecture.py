"""The layers of the packages: a module may import only from its own row and the rows above it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("looplm", "data_pipeline", "pretrain", "tools")
MAX_LINES = 400

# From top to bottom, as in docs/architecture.md. A module belongs to the row with the longest prefix of its name.
ROWS = (
    (
        "looplm.failures",
        "looplm.bounds",
        "looplm.parameters",
        "looplm.files",
        "looplm.json_file",
        "looplm.lock",
        "looplm.reference",
    ),
    (
        "looplm.yaml_text",
        "looplm.binding",
        "looplm.cli",
        "looplm.chat",
        "looplm.encoding",
        "looplm.imported_template",
        "looplm.plain_text",
    ),
    ("looplm.config",),
    ("looplm.accounting",),
    ("looplm.megatron",),
    ("looplm.model",),
    ("looplm.checkpoint",),
    ("looplm.inference",),
    ("looplm.huggingface", "looplm.evaluation", "looplm.generate"),
    ("data_pipeline",),
    ("pretrain",),
    ("tools",),
)
# These import no other module of ours: the reference is an independent oracle, and exports run without our packages.
INDEPENDENT = ("looplm.reference", "looplm.huggingface.export")
OWNER_OF_PROCESS_GROUPS = "looplm.megatron.process_groups"
OWNERS_OF_CUDA = ("looplm.megatron.device", "looplm.megatron.patches", "looplm.huggingface.export")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


PATHS = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}
SOURCES = {name: path.read_text(encoding="utf-8") for name, path in PATHS.items()}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}


def imported_names(module: str, tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield every absolute dotted name that ``tree`` imports, with its line.

    ``from a import b`` yields ``a.b``, and ``a`` too unless ``a.b`` is one of our modules.
    """
    package = module if PATHS[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
            yield from ((name, node.lineno) for name in names)
            if not all(name in PATHS for name in names):
                yield base, node.lineno


EDGES = {
    module: sorted({name for name, _ in imported_names(module, tree) if name in PATHS and name != module})
    for module, tree in TREES.items()
}


def row_of(module: str) -> int:
    """Return the index of the module's row. The package ``looplm`` itself is below its modules, to re-export them."""
    best = max(
        ((len(name), index) for index, row in enumerate(ROWS) for name in row if f"{module}.".startswith(f"{name}.")),
        default=None,
    )
    if best is None:
        assert module == "looplm", f"{module} has no row; add it to ROWS and docs/architecture.md, or move it"
        return max(index for index, row in enumerate(ROWS) if row[0].startswith("looplm"))
    return best[1]


@pytest.mark.parametrize("module", PATHS)
def test_imports_point_upward(module: str) -> None:
    wrong = [target for target in EDGES[module] if target != "looplm" and row_of(target) > row_of(module)]
    assert not wrong, f"{module} imports {wrong}, which are in rows below its own"


def test_there_are_no_import_cycles() -> None:
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"import cycle: {' -> '.join((*trail[trail.index(module) :], module))}"
        if module not in done:
            for target in EDGES[module]:
                visit(target, (*trail, module))
            done.add(module)

    for module in PATHS:
        visit(module, ())


@pytest.mark.parametrize("module", PATHS)
def test_imports_are_at_the_top_of_a_file(module: str) -> None:
    functions = [node for node in ast.walk(TREES[module]) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inner = [f"{name}, line {line}" for function in functions for name, line in imported_names(module, function)]
    assert not inner, f"{module} imports inside a function: {inner}"


@pytest.mark.parametrize("module", PATHS)
def test_process_groups_and_cuda_are_used_only_by_their_owners(module: str) -> None:
    names = [name for name, _ in imported_names(module, TREES[module])]
    state = [name for name in names if {"parallel_state", "mpu"} & set(name.split("."))]
    assert not state or module == OWNER_OF_PROCESS_GROUPS, (
        f"{module} imports {state}; only {OWNER_OF_PROCESS_GROUPS} may"
    )
    assert "torch.cuda." not in SOURCES[module] or module.startswith(OWNERS_OF_CUDA), (
        f"{module} uses torch.cuda; ask looplm.megatron.device"
    )


@pytest.mark.parametrize("module", [name for name in PATHS if name.startswith(INDEPENDENT)])
def test_the_reference_and_the_export_import_no_other_module_of_ours(module: str) -> None:
    names = [name for name, _ in imported_names(module, TREES[module]) if name.split(".")[0] in (*PACKAGES, "tests")]
    ours = [name for name in names if not name.startswith(tuple(f"{package}." for package in INDEPENDENT))]
    assert not ours, f"{module} imports {ours}"


@pytest.mark.parametrize("module", PATHS)
def test_no_product_module_imports_tests(module: str) -> None:
    names = [name for name, _ in imported_names(module, TREES[module]) if name.split(".")[0] == "tests"]
    assert not names, f"{module} imports {names}"


@pytest.mark.parametrize("module", PATHS)
def test_a_file_can_be_read_in_one_sitting(module: str) -> None:
    lines = SOURCES[module].count("\n")
    assert lines <= MAX_LINES, (
        f"{PATHS[module].relative_to(ROOT)} has {lines} lines, more than {MAX_LINES}; find the concept to move out"
    )
