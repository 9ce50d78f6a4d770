"""The dependency rules of the design, read from the imports of every module with `ast`; nothing is imported.

One checker a rule, each run over the repository, over planted violations that it has to name, and over a
clean tree that it has to let pass. Imports under TYPE_CHECKING count: a type is a dependency too.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("envs", "agents", "tasks", "configs")  # folders at the top, in the package through links
PACKAGES = ("tokens", "model", "decoding", "decoders", "training", "envs", "agents", "tasks")
# Top-level modules with a rule of their own; every other emuworld/*.py is of the facade below world_model.
MODULES = {"story": "story", "story_schema": "story", "world_model": "world_model", "parallel": "parallel"}
MODULES |= {"cli": "cli", "__main__": "cli"}
MODULES |= {"questions": "story"}  # words that stories are told from
# Below everything: all may import them, and they import nothing of ours.
MODULES |= {"files": "files", "shares": "files", "staging": "files"}
# Modules and packages of envs that reach no model code.
SIMULATOR = ("rooms", "tabletop", "rendering", "render", "simulated", "sim_env", "vla_sim_env")
SIMULATOR += ("episodes", "edit_chains", "shards")
NO_MODEL_CODE = ("torch", "transformers", "tiktoken", "safetensors")
IMPORTING_CALLS = (
    "__import__",
    "importlib.import_module",
    "import_module",
    "pkgutil.resolve_name",
    "resolve_name",
)
# The imports inside functions that have to be, by module and function. `test_exemptions_are_needed` refuses
# one that nothing uses any more.
LAZY = {
    # `import emuworld` registers the environments and must not wait a second or two for torch.
    ("emuworld", "__getattr__"): "emuworld.world_model",
    # numba and what it has compiled take half a second, and machines that run on GPUs only do without.
    ("emuworld.model.exact_linear", "kernel"): "emuworld.model.exact_kernel",
    ("emuworld.decoding.sampling", "compiled_draw"): "emuworld.decoding.compiled_draw",
    # What reads published checkpoints brings rich, yaml and the hub along: a tenth of a second for nothing.
    ("emuworld.checkpoint_folder", "locate"): "emuworld.published",
    # Importing mujoco.egl or mujoco.osmesa loads system libraries that a machine may lack, and binds PyOpenGL
    # to one of them for the life of the process: only whoever has chosen a platform may.
    ("emuworld.envs.rendering.gl", "__init__"): "a computed module",
    # The bindings of the CUDA driver come with torch for CUDA, and only renderer=cuda needs them.
    ("emuworld.envs.rendering.cuda_program", "_bindings"): "a computed module",
}

# Layer -> layers that it may import from. `emuworld` is the package itself, which names what world_model has.
RULE_1 = {
    "tokens": {"tokens"},
    "model": {"tokens", "model"},
    "decoding": {"tokens", "model", "decoding"},
    "facade": {"tokens", "story", "model", "decoding", "decoders", "parallel", "facade"},
    "world_model": {"tokens", "story", "model", "decoding", "decoders", "parallel", "facade", "world_model"},
    "story": {"tokens", "story"},
    "decoders": {"tokens", "decoders"},
    "files": {"files"},
}
RULE_2 = {
    "parallel": {"model", "parallel"},
    "training": {"tokens", "story", "model", "decoding", "decoders", "parallel", "facade", "training"},
}
RULE_3 = {"envs": {"envs", "world_model", "story", "emuworld"}}
RULE_4 = {"agents": {"agents", "world_model", "emuworld"}}


@dataclass(frozen=True, kw_only=True)
class Import:
    """One import statement's target, absolute; `inside` names the function around it."""

    target: str
    line: int
    inside: str | None = None


@dataclass(frozen=True, kw_only=True)
class Module:
    name: str
    file: str  # as it is shown in messages
    imports: tuple[Import, ...]

    @property
    def layer(self) -> str:
        return layer_of(self.name)


Tree = dict[str, Module]
Rule = Callable[[Tree], list[str]]


# ---- reading the tree ----------------------------------------------------------------------------


def layer_of(name: str) -> str:
    """Layer of an absolute module name: its package, its role at the top, or "" outside emuworld."""
    parts = name.split(".")
    if parts[0] != "emuworld":
        return ""
    if len(parts) == 1:
        return "emuworld"
    return parts[1] if parts[1] in PACKAGES else MODULES.get(parts[1], "facade")


def read_tree(root: Path) -> Tree:
    """Every module of `root`/emuworld, links followed, by its import name."""
    files = {}
    for folder, _, names in os.walk(root / "emuworld", followlinks=True):
        for file in (Path(folder, name) for name in names if name.endswith(".py")):
            parts = file.relative_to(root).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    packages = {name[:at] for name in files for at, letter in enumerate(name) if letter == "."}
    known = set(files) | packages
    return {
        name: Module(
            name=name,
            file=str(file.relative_to(root)),
            imports=tuple(read_imports(name, file, known)),
        )
        for name, file in sorted(files.items())
    }


def read_imports(name: str, file: Path, known: set[str]) -> Iterator[Import]:
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node, inside in walk(ast.parse(file.read_text(encoding="utf-8"), filename=str(file))):
        for target in targets(node, package=package, known=known):
            yield Import(target=target, line=node.lineno, inside=inside)


def walk(node: ast.AST, inside: str | None = None) -> Iterator[tuple[ast.stmt | ast.expr, str | None]]:
    """Every statement and expression with the name of the function that it stands in."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.expr):
            yield child, inside
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from walk(child, getattr(child, "name", "lambda") if is_function else inside)


def targets(node: ast.AST, *, package: str, known: set[str]) -> list[str]:
    """Absolute names of the modules that a node imports; `from a import b` is a.b where that is one."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        base = ".".join([*parents, *([node.module] if node.module else [])])
        return [f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func) in IMPORTING_CALLS:
        argument = node.args[0] if node.args else None
        return [str(argument.value) if isinstance(argument, ast.Constant) else "a computed module"]
    return []


# ---- the rules -----------------------------------------------------------------------------------


def describe(module: Module, found: Import, why: str) -> str:
    return f"{module.file}:{found.line} imports {found.target}: {why}"


def only_from(tree: Tree, allowed: dict[str, set[str]]) -> list[str]:
    return [
        describe(module, found, f"{module.layer} may import {', '.join(sorted(allowed[module.layer]))} only")
        for module in tree.values()
        if module.layer in allowed
        for found in module.imports
        if layer_of(found.target) not in {"", "files"} | allowed[module.layer]
    ]


def only_by(tree: Tree, layer: str, importers: set[str]) -> list[str]:
    return [
        describe(module, found, f"only {', '.join(sorted(importers))} may import {layer}")
        for module in tree.values()
        if module.layer not in importers
        for found in module.imports
        if layer_of(found.target) == layer
    ]


def rule_1_the_ladder(tree: Tree) -> list[str]:
    """tokens <- model <- decoding <- world_model; story and decoders import only tokens."""
    return only_from(tree, RULE_1)


def rule_2_parallel_and_training(tree: Tree) -> list[str]:
    """parallel imports model; training what is below world_model; only the CLI imports training."""
    return only_from(tree, RULE_2) + only_by(tree, "training", {"training", "cli"})


def rule_3_environments(tree: Tree) -> list[str]:
    """envs imports world_model and story; the simulator reaches no model code, even through others."""
    found = only_from(tree, RULE_3)
    for name in SIMULATOR:
        package = f"emuworld.envs.{name}"
        for module in tree:
            if module == package or module.startswith(f"{package}."):
                found += model_code_below(tree, module)
    return found


def model_code_below(tree: Tree, start: str) -> list[str]:
    """Chains of imports inside envs that lead from `start` to model code."""
    found, seen, waiting = [], {start}, [(start, start)]
    while waiting:
        name, chain = waiting.pop()
        for imported in tree[name].imports if name in tree else ():
            layer = layer_of(imported.target)
            if layer not in ("", "envs", "story", "files") or imported.target.split(".")[0] in NO_MODEL_CODE:
                found.append(describe(tree[name], imported, f"{chain} must do without model code"))
            elif layer == "envs" and imported.target not in seen:
                seen.add(imported.target)
                waiting.append((imported.target, f"{chain} -> {imported.target}"))
    return found


def rule_4_agents(tree: Tree) -> list[str]:
    """agents import world_model and no environment; search imports nothing of ours."""
    search = tree.get("emuworld.agents.search")
    ours = [i for i in search.imports if layer_of(i.target)] if search else []
    return only_from(tree, RULE_4) + [
        describe(search, i, "search imports nothing of ours") for i in ours if search
    ]


def rule_5_tasks_on_top(tree: Tree) -> list[str]:
    """Nothing but the CLI imports tasks."""
    return only_by(tree, "tasks", {"tasks", "cli"})


def rule_6_one_composition_root(tree: Tree) -> list[str]:
    """cli.py is the only file with imports inside functions (but for LAZY), and nothing imports it."""
    inside = [
        describe(module, found, f"inside {found.inside}(); move it to the top of the file")
        for module, found in imports_inside_functions(tree)
        if LAZY.get((module.name, found.inside or "")) != found.target
    ]
    return inside + only_by(tree, "cli", {"cli"})


def imports_inside_functions(tree: Tree) -> Iterator[tuple[Module, Import]]:
    for module in tree.values():
        if module.name != "emuworld.cli":
            yield from ((module, found) for found in module.imports if found.inside is not None)


def no_bare_folders(tree: Tree) -> list[str]:
    """`import envs` would be another package's; it is `emuworld.envs`."""
    return [
        describe(module, found, f"write emuworld.{found.target}")
        for module in tree.values()
        for found in module.imports
        if found.target.split(".")[0] in LINKED
    ]


RULES: list[Rule] = [
    rule_1_the_ladder,
    rule_2_parallel_and_training,
    rule_3_environments,
    rule_4_agents,
    rule_5_tasks_on_top,
    rule_6_one_composition_root,
    no_bare_folders,
]


# ---- the repository ------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_repository_holds(rule: Rule) -> None:
    found = list(dict.fromkeys(rule(read_tree(ROOT))))  # `from a import b, c` breaks a rule once
    assert not found, "\n".join([f"{rule.__doc__}", *found])


def test_exemptions_are_needed() -> None:
    found = {
        (module.name, one.inside): one.target for module, one in imports_inside_functions(read_tree(ROOT))
    }
    assert found == LAZY


def test_tree_is_read() -> None:
    """The rules above would hold over an empty tree too: make sure that it was not empty."""
    tree = read_tree(ROOT)
    assert {"emuworld", "emuworld.tokens.text", "emuworld.envs.rooms.scenes", "emuworld.cli"} <= set(tree)
    assert "emuworld.tokens.vocabulary" in {found.target for found in tree["emuworld.tokens.text"].imports}


@pytest.mark.parametrize("folder", ["tests", "scripts"])
def test_no_bare_folders_outside_the_package(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    tree = {
        str(file): Module(name=file.stem, file=str(file), imports=tuple(read_imports(file.stem, file, set())))
        for file in files
    }
    assert not no_bare_folders(tree)


@pytest.mark.parametrize("name", LINKED)
def test_links_are_relative_and_right(name: str) -> None:
    link = ROOT / "emuworld" / name
    assert link.is_symlink(), f"{link} is no link: make it with ln -s ../{name} emuworld/{name}"
    assert link.readlink() == Path("..", name), f"{link} points to {link.readlink()}, not ../{name}"
    assert (ROOT / name).is_dir() and not (ROOT / name).is_symlink()


# ---- the rules themselves ------------------------------------------------------------------------

PLANTED = [
    (rule_1_the_ladder, "tokens/text.py", "from emuworld.model import transformer"),
    (rule_1_the_ladder, "model/transformer.py", "import emuworld.decoding.grammar"),
    (rule_1_the_ladder, "decoding/grammar.py", "from ..world_model import WorldModel"),
    (rule_1_the_ladder, "decoding/grammar.py", "from emuworld.state import pack"),
    (rule_1_the_ladder, "story.py", "from emuworld.envs import scenes"),
    (rule_1_the_ladder, "files.py", "from emuworld.story import Story"),
    (rule_1_the_ladder, "decoders/image.py", "from emuworld.model.transformer import Transformer"),
    (rule_1_the_ladder, "state.py", "from emuworld.world_model import WorldModel"),
    (
        rule_1_the_ladder,
        "world_model.py",
        "if TYPE_CHECKING:\n    from emuworld.envs.spaces import frame_space",
    ),
    (rule_2_parallel_and_training, "parallel.py", "from emuworld.decoding import grammar"),
    (rule_2_parallel_and_training, "training/loop.py", "from emuworld.envs import scenes"),
    (rule_2_parallel_and_training, "training/loop.py", "from emuworld.world_model import load"),
    (rule_2_parallel_and_training, "training/loop.py", "import emuworld"),
    (rule_2_parallel_and_training, "tasks/evaluate.py", "from emuworld.training import loop"),
    (rule_2_parallel_and_training, "__init__.py", "from .training import loop"),
    (rule_3_environments, "envs/spaces.py", "from emuworld.tokens import text"),
    (rule_3_environments, "envs/world_env.py", "from emuworld.state import pack"),
    (rule_3_environments, "envs/rooms/scenes.py", "from emuworld.world_model import load"),
    (rule_3_environments, "envs/rooms/captions.py", "import torch"),
    (rule_4_agents, "agents/agent.py", "from emuworld.envs import world_env"),
    (rule_4_agents, "agents/agent.py", "from emuworld.tokens import text"),
    (rule_4_agents, "agents/search.py", "from emuworld.agents import agent"),
    (rule_5_tasks_on_top, "envs/world_env.py", "from emuworld.tasks import suites"),
    (rule_5_tasks_on_top, "agents/agent.py", "from emuworld import tasks"),
    (rule_6_one_composition_root, "tokens/text.py", "def f():\n    import numpy"),
    (
        rule_6_one_composition_root,
        "tokens/text.py",
        "class A:\n    async def f(self):\n        from os import path",
    ),
    (rule_6_one_composition_root, "tokens/text.py", "def f():\n    return importlib.import_module('numpy')"),
    (rule_6_one_composition_root, "tokens/text.py", "f = lambda: __import__('numpy')"),
    (rule_6_one_composition_root, "tokens/text.py", "f = lambda: pkgutil.resolve_name('numpy:array')"),
    (rule_6_one_composition_root, "__init__.py", "def __getattr__(name):\n    import torch"),
    (rule_6_one_composition_root, "tasks/evaluate.py", "from emuworld import cli"),
    (no_bare_folders, "tasks/evaluate.py", "import envs.scenes"),
    (no_bare_folders, "tasks/evaluate.py", "from agents import search"),
]
# The clean tree: everything here is allowed, and world_env does reach model code.
CLEAN = {
    "__init__.py": "from emuworld.envs import spaces\nif TYPE_CHECKING:\n    import emuworld.world_model",
    "cli.py": "def main():\n    from emuworld.training import loop\n    from emuworld.tasks import evaluate",
    "tokens/__init__.py": "",
    "tokens/text.py": "import os\ntry:\n    import tiktoken\nexcept ImportError:\n    tiktoken = None",
    "model/transformer.py": "import torch\nfrom ..tokens import text",
    "decoding/grammar.py": "from emuworld.model import transformer",
    "decoders/image.py": "from emuworld.tokens import text",
    "state.py": "from emuworld.decoding import grammar",
    "world_model.py": "from emuworld import state\nfrom emuworld.decoders import image",
    "files.py": "import os",
    "story.py": "from emuworld.tokens import text",
    "parallel.py": "from emuworld.model import transformer",
    "training/loop.py": "from emuworld import story\nfrom emuworld.decoding import grammar",
    "envs/spaces.py": "import gymnasium",
    "envs/world_env.py": "import emuworld\nfrom emuworld.world_model import load",
    "envs/rooms/scenes.py": "from emuworld.envs.spaces import frame_space\nfrom emuworld.story import Story",
    "envs/rooms/captions.py": "",
    "envs/render.py": "import mujoco",
    "agents/agent.py": "from emuworld.world_model import load\nfrom emuworld.agents import search",
    "agents/search.py": "import numpy",
    "tasks/evaluate.py": "from emuworld.envs import world_env\nfrom emuworld.agents import agent",
}


def plant(root: Path, files: dict[str, str]) -> Tree:
    for name, source in files.items():
        (root / "emuworld" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "emuworld" / name).write_text(source)
    return read_tree(root)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_clean_tree_passes(rule: Rule, tmp_path: Path) -> None:
    assert rule(plant(tmp_path, CLEAN)) == []


@pytest.mark.parametrize("rule, file, source", PLANTED, ids=lambda value: getattr(value, "__name__", None))
def test_planted_violation_is_named(rule: Rule, file: str, source: str, tmp_path: Path) -> None:
    lines = CLEAN[file].count("\n") + 2
    found = rule(plant(tmp_path, {**CLEAN, file: f"{CLEAN[file]}\n{source}"}))
    assert found, "the rule let it pass"
    assert any(
        line.startswith(f"emuworld/{file}:") and int(line.split(":")[1].split()[0]) >= lines for line in found
    )


def test_model_code_is_found_through_others(tmp_path: Path) -> None:
    found = rule_3_environments(plant(tmp_path, {**CLEAN, "envs/render.py": "from . import world_env"}))
    assert [line.split(" must")[0] for line in found] == [
        f"emuworld/envs/world_env.py:{line} imports {name}: emuworld.envs.render -> emuworld.envs.world_env"
        for line, name in [(1, "emuworld"), (2, "emuworld.world_model")]
    ]


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "emuworld").mkdir()
    (tmp_path / "envs" / "rooms").mkdir(parents=True)
    (tmp_path / "envs" / "rooms" / "scenes.py").write_text("import torch")
    (tmp_path / "emuworld" / "envs").symlink_to("../envs")
    assert rule_3_environments(read_tree(tmp_path)) == [
        "emuworld/envs/rooms/scenes.py:1 imports torch: emuworld.envs.rooms.scenes must do without model code"
    ]
