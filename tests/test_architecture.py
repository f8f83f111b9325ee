"""The layers of the packages: a module may import only from its own row and the rows above it."""

import ast
from collections.abc import Iterator
from pathlib import Path

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
        "looplm.template_process",
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


IMPORTED = {module: sorted({name for name, _ in imported_names(module, tree)}) for module, tree in TREES.items()}
EDGES = {module: [name for name in names if name in PATHS and name != module] for module, names in IMPORTED.items()}


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


def test_imports_point_upward() -> None:
    wrong = [
        f"{module} imports {target}"
        for module, targets in EDGES.items()
        for target in targets
        if target != "looplm" and row_of(target) > row_of(module)
    ]
    assert not wrong, f"imports from rows below: {wrong}"


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


def test_imports_are_at_the_top_of_a_file() -> None:
    inner = [
        f"{module}, line {line}: {name}"
        for module, tree in TREES.items()
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for name, line in imported_names(module, function)
    ]
    assert not inner, f"imports inside functions: {inner}"


def test_process_groups_and_cuda_are_used_only_by_their_owners() -> None:
    state = [
        module
        for module, names in IMPORTED.items()
        if any({"parallel_state", "mpu"} & set(name.split(".")) for name in names)
    ]
    assert state == [OWNER_OF_PROCESS_GROUPS], f"they import Megatron's process groups: {state}"
    cuda = [name for name, source in SOURCES.items() if "torch.cuda." in source and not name.startswith(OWNERS_OF_CUDA)]
    assert not cuda, f"they use torch.cuda, and should ask looplm.megatron.device: {cuda}"


def test_the_reference_and_the_export_import_no_other_module_of_ours() -> None:
    own = tuple(f"{package}." for package in INDEPENDENT)
    ours = [
        f"{module} imports {name}"
        for module, names in IMPORTED.items()
        if module.startswith(INDEPENDENT)
        for name in names
        if name.split(".")[0] in PACKAGES and not name.startswith(own)
    ]
    assert not ours, ours


def test_no_product_module_imports_tests() -> None:
    wrong = [module for module, names in IMPORTED.items() if any(name.split(".")[0] == "tests" for name in names)]
    assert not wrong, f"they import tests: {wrong}"


def test_a_file_can_be_read_in_one_sitting() -> None:
    lines = {name: source.count("\n") for name, source in SOURCES.items()}
    long = {name: count for name, count in lines.items() if count > MAX_LINES}
    assert not long, f"longer than {MAX_LINES} lines; find the concept to move out: {long}"
