"""The house rules of imports, read from the source by ``ast``: who may import whom, and who may name which library."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "cpt_lightning"
FILES = sorted(PACKAGE.rglob("*.py"))

# From bottom to top; a layer imports only from below (and from itself).
LAYERS = [
    ["types"],
    ["functional"],
    ["rewards"],
    ["tasks"],
    ["models"],
    ["rollouts"],
    ["checkpoint_files"],
    ["sharded_checkpoints"],
    ["checkpoint_io"],
    ["strategy"],
    ["records"],
    ["pictures"],
    ["data"],
    ["callbacks"],
    ["modules"],
    ["report", "export"],
    ["cli"],
    ["__main__"],
]
# They meet through the batch, logged metric names and the Trainer.
STRANGERS = {"modules": {"data", "callbacks"}, "data": {"modules", "callbacks"}, "callbacks": {"modules", "data"}}

# Who may name a library: files or folders, relative to the package.
OWNERS = {
    "transformers": ["models"],
    "peft": ["models/adapters.py", "models/adapted_layers.py", "models/adapter_folders.py"],
    "bitsandbytes": ["models/quantization.py"],
    "torch.distributed": [
        "strategy.py",
        "sharded_checkpoints.py",
        "models/sharding.py",
        "modules/ranks.py",
        "rollouts/vllm/group.py",
    ],
    "torchvision": [],
    "vllm": ["rollouts/vllm"],
}
DRAWERS = {"utils", "util", "helpers", "helper", "misc", "common", "tools"}


def module_of(path: Path) -> str:
    """``models/qwen_vl.py`` is ``cpt_lightning.models.qwen_vl``, a package's ``__init__.py`` the package itself."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def names_of(node: ast.AST, package: str) -> Iterator[str]:
    """The dotted names that an import statement or an attribute such as ``torch.distributed.barrier`` refers to."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = package.rsplit(".", node.level - 1)[0] if node.level else ""
        origin = ".".join(part for part in (base, node.module) if part)
        yield from (f"{origin}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Attribute):
        yield ast.unparse(node)


def imports_of(path: Path, *, at_import_time: bool = False) -> set[str]:
    """Dotted names that a file imports anywhere, or only those that importing the file itself imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(run_on_import(tree)) if at_import_time else list(ast.walk(tree))
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    return {n for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for n in names_of(node, package)}


def run_on_import(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those inside functions and behind ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from run_on_import(child)


def layer_of(module: str) -> str | None:
    """``tasks`` for ``cpt_lightning.tasks.toy``; ``None`` for the package itself, which stands outside."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def named_in(path: Path, library: str) -> bool:
    """Whether a file imports the library or part of it, or reaches into it by attributes."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {name for node in ast.walk(tree) for name in names_of(node, "cpt_lightning")}
    return any(name == library or name.startswith(f"{library}.") for name in names)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_file_imports_only_from_its_own_layer_and_those_below(path):
    height = {layer: index for index, layers in enumerate(LAYERS) for layer in layers}
    own = layer_of(module_of(path))
    if own is None:
        assert not {n for n in imports_of(path) if n.startswith("cpt_lightning.")}, "the package itself stays empty"
        return
    assert own in height, f"{own} is in no layer: give it its place in LAYERS"
    for name in imports_of(path):
        other = layer_of(name) if name.startswith("cpt_lightning.") else None
        if other in height and other != own:
            assert height[other] < height[own], f"{own} imports {name} from above"
            assert other not in STRANGERS.get(own, set()), f"{own} may not know {other}: {name}"


@pytest.mark.parametrize("library", OWNERS)
def test_a_library_is_named_only_by_its_owners(library):
    owners = [PACKAGE / owner for owner in OWNERS[library]]
    strangers = [path for path in FILES if not any(path.is_relative_to(owner) for owner in owners)]
    assert [str(path.relative_to(PACKAGE)) for path in strangers if named_in(path, library)] == []


def test_no_import_cycles():
    """A name that is a module of ours counts as that module, any other as the module that holds it."""

    def resolve(name: str) -> str:
        return name if name in MODULES else name.rpartition(".")[0]

    graph = {
        module: {resolve(name) for name in imports_of(path, at_import_time=True)} & set(MODULES) - {module}
        for module, path in MODULES.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_file_is_a_drawer_for_everything():
    assert [str(path) for path in FILES if path.stem in DRAWERS or path.parent.name in DRAWERS] == []


def test_the_package_and_its_lower_layers_import_without_transformers_or_lightning():
    """One fresh interpreter, from light to heavier; a name that appears too early is printed."""
    code = """
import sys
steps = {"cpt_lightning": ["torch", "transformers", "lightning", "datasets", "numpy"],
         "cpt_lightning.checkpoint_files": ["torch", "transformers", "lightning", "datasets", "numpy"],
         "cpt_lightning.rewards": ["transformers", "lightning", "datasets"],
         "cpt_lightning.tasks": ["transformers", "lightning", "datasets", "sklearn"],
         "cpt_lightning.functional": ["transformers", "lightning", "beartype"],
         "cpt_lightning.types": ["transformers", "lightning"]}
for module, heavy in steps.items():
    __import__(module)
    print(*[f"{module} imports {name}" for name in heavy if name in sys.modules], sep="\\n", end="")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def test_the_rules_would_catch_an_offence():
    """The readers above see what they should: every form in which a library can be named, and lazy imports as lazy."""
    file = PACKAGE / "modules" / "example.py"
    forms = {
        "import torch.distributed as dist": "torch.distributed",
        "from torch import distributed": "torch.distributed",
        "from torch.distributed.fsdp import fully_shard": "torch.distributed",
        "import torch\ntorch.distributed.barrier()": "torch.distributed",
        "def load():\n    from transformers import AutoModel": "transformers",
    }
    for source, library in forms.items():
        names = {n for node in ast.walk(ast.parse(source)) for n in names_of(node, "cpt_lightning")}
        assert any(name == library or name.startswith(f"{library}.") for name in names), source
    assert list(names_of(ast.parse("from ..data import x").body[0], "cpt_lightning.modules")) == [
        "cpt_lightning.data.x"
    ]
    assert layer_of(module_of(file)) == "modules"
    lazy = ast.parse("import a\ndef f():\n    import b\nif TYPE_CHECKING:\n    import c\nclass K:\n    import d")
    imported = [n for node in run_on_import(lazy) for n in names_of(node, "") if isinstance(node, ast.Import)]
    assert imported == ["a", "d"]
