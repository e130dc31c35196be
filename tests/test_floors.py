"""The floors of the package: a module imports from its own floor or lower ones only, and no imports go in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "lightning_swiftmoe"
ROOT = Path(__file__).parents[1]
FOLDERS = {PACKAGE: ROOT / PACKAGE, f"{PACKAGE}.kernels": ROOT / "kernels"}

# Lowest first. Names on one line may import each other.
FLOORS = [
    ["arguments"],
    ["cluster", "placement", "trace_file"],
    ["kernels"],
    ["functional"],
    ["layers"],
    ["hf"],
    ["parallel"],
    ["optim"],
    ["checkpoint"],
    ["step"],
    ["engine"],
    ["whereabouts"],
    ["failures"],
    ["rescue"],
    [
        *("_compat", "callback", "checkpointing", "launcher", "metrics", "precision", "redundancy", "strategy"),
        *("trace", "virtual", "weight_ema", ""),
    ],
    ["models", "data"],
    ["report"],
    ["cli", "__main__"],
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
# The simulator shares the placement code with training, knows nothing else, and only what shows results knows it.
USERS_OF_SIMULATE = ("simulate", "report", "cli")
PLANNERS = ("arguments", "cluster", "placement", "simulate", "trace_file")
NOT_FOR_PLANNERS = ("torch.distributed", "lightning", "pytorch_lightning", "triton")


def modules():
    """Every module of the package by dotted name."""
    found = {}
    for prefix, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([prefix, *(part for part in parts if part != "__init__")])] = path
    return found


MODULES = modules()


def imports(module, *, lazy=True):
    """Dotted names that ``module`` imports; with ``lazy``, also those inside functions."""
    tree = ast.parse(MODULES[module].read_text())
    nodes = ast.walk(tree) if lazy else top_level(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide floors, write the whole name"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if not is_ours(name) or name in MODULES else node.module


def top_level(tree):
    todo = list(tree.body)
    while todo:
        node = todo.pop()
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            todo += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]


def is_ours(name):
    return name == PACKAGE or name.startswith(f"{PACKAGE}.")


def part(name):
    """What the table of floors calls a module: the first name below the package, "" for the package itself."""
    return name.split(".")[1] if "." in name else ""


def test_every_module_has_a_floor():
    assert {part(name) for name in MODULES} <= {*FLOOR, "simulate"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module):
    above = [name for name in imports(module) if is_ours(name) and not allowed(part(module), part(name))]
    assert not above, f"{module} imports from floors above its own: {above}"


def allowed(importer, imported):
    if importer == "simulate":
        return imported in PLANNERS
    if imported == "simulate":
        return importer in USERS_OF_SIMULATE
    return FLOOR[imported] <= FLOOR[importer]


@pytest.mark.parametrize("module", [name for name in sorted(MODULES) if part(name) in PLANNERS])
def test_planners_know_no_ranks_no_trainer_no_gpu(module):
    for name in imports(module):
        assert not any(name == banned or name.startswith(f"{banned}.") for banned in NOT_FOR_PLANNERS), name


def test_no_circles():
    graph = {
        name: {used for used in imports(name, lazy=False) if used in MODULES and used != name and used != PACKAGE}
        for name in MODULES
    }
    TopologicalSorter(graph).prepare()


def test_the_test_sees_violations():
    assert not allowed("placement", "parallel")
    assert not allowed("simulate", "layers")
    assert not allowed("layers", "simulate")
    assert allowed("optim", "parallel")
