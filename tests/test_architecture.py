"""The layering of the packages, read from the imports: every row may import only itself and the rows above it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("looplm", "data_pipeline", "pretrain", "tools")
MAX_LINES = 400

# Top to bottom as in the design: a module belongs to the row whose longest name is its own name or an ancestor's.
ROWS = (
    (
        "looplm.cli",
        "looplm.layout",
        "looplm.model_config",
        "looplm.engine",
        "looplm.config",
        "looplm.files",
        "looplm.chat",
    ),
    ("looplm.accounting",),
    ("looplm.device",),
    ("looplm.parallel", "looplm.context"),
    ("looplm.norms", "looplm.attention"),
    ("looplm.local_layers", "looplm.transformer_engine_layers"),
    ("looplm.fp8_emulation",),
    ("looplm.layers",),
    ("looplm.exit_gate",),
    ("looplm.losses",),
    ("looplm.model",),
    ("looplm.pipeline",),
    ("looplm.optimizer_state", "looplm.sharded_weights"),
    ("looplm.step_folder",),
    ("looplm.checkpoint",),
    ("looplm.generate", "looplm.inference"),
    ("looplm.huggingface",),
    ("looplm.evaluation",),
    ("data_pipeline",),
    ("pretrain",),
    ("tools",),
)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


PATHS = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}
SOURCES = {name: path.read_text(encoding="utf-8") for name, path in PATHS.items()}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}


def imported_names(module: str, tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every absolute dotted name that ``tree`` imports, with its line; ``from a import b`` gives ``a`` and ``a.b``."""
    package = module if PATHS[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base, node.lineno
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


EDGES = {
    module: sorted({name for name, _ in imported_names(module, tree) if name in PATHS and name != module})
    for module, tree in TREES.items()
}


def row_of(module: str) -> int:
    """The index of the module's row; a bare package stands below its own modules, so that it may re-export them."""
    best = max(
        ((len(name), index) for index, row in enumerate(ROWS) for name in row if f"{module}.".startswith(f"{name}.")),
        default=None,
    )
    if best is None:
        assert module == "looplm", f"{module} has no row: give it one here and in the design, or move it"
        return max(index for index, row in enumerate(ROWS) if row[0].startswith("looplm"))
    return best[1]


@pytest.mark.parametrize("module", PATHS)
def test_imports_point_upward(module: str) -> None:
    wrong = [target for target in EDGES[module] if target != "looplm" and row_of(target) > row_of(module)]
    assert not wrong, f"{module} imports {wrong}, which stand below it"


def test_no_import_cycles() -> None:
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
def test_no_import_inside_a_function(module: str) -> None:
    functions = [node for node in ast.walk(TREES[module]) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inner = [f"{name}, line {line}" for function in functions for name, line in imported_names(module, function)]
    assert not inner, f"{module} imports inside a function: {inner}"


@pytest.mark.parametrize("module", PATHS)
def test_only_their_owners_know_process_groups_and_cuda(module: str) -> None:
    names = [name for name, _ in imported_names(module, TREES[module])]
    state = [name for name in names if {"parallel_state", "mpu"} & set(name.split("."))]
    assert not state or module == "looplm.parallel", f"{module} imports {state}: only looplm.parallel may"
    speaks_cuda = "torch.cuda." in SOURCES[module]
    assert not speaks_cuda or module.startswith(("looplm.device", "looplm.huggingface")), f"{module} names torch.cuda"


@pytest.mark.parametrize("module", PATHS)
def test_a_file_is_read_in_one_sitting(module: str) -> None:
    lines = SOURCES[module].count("\n")
    assert lines <= MAX_LINES, f"{PATHS[module].relative_to(ROOT)} has {lines} lines: a concept is missing"
