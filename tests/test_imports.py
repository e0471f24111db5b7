"""Who may import whom, proved from the source: the directions of the house are followed by no one's good will."""

import ast
from pathlib import Path

import pytest

import aft_jax

ROOT = Path(aft_jax.__file__).parent
# What lies below everything: modules that import nothing of the house but each other.
GROUND = {'aft_jax', 'aft_jax.errors', 'aft_jax.randomness', 'aft_jax.ops.resampling'}
# Each part, and what it may reach beside itself.
BELOW = {
    'aft_jax.adversarial.pgd': set(),
    'aft_jax.models': set(),
    'aft_jax.data': set(),
    'aft_jax.errors': set(),
    'aft_jax.randomness': set(),
    'aft_jax.ops.resampling': set(),
}
ONLY_IMPORTER = {
    'orbax': 'aft_jax.training.checkpoint',
    'tensorflow_datasets': 'aft_jax.data',
    'matplotlib': 'aft_jax.report',
    'jinja2': 'aft_jax.report',
    'sklearn': 'aft_jax.report',
    'torch': 'aft_jax.interchange.torch_file',
    'safetensors': 'aft_jax.interchange.safetensors_file',
}
IMPORT_FUNCTIONS = ('import_module', '__import__')


def import_graph(root: Path) -> dict[str, set[str]]:
    """Returns what each module of the package in `root` imports, anywhere in its source, the house's and others'.

    A module's own parents count too: Python runs them first.
    """
    files = {}
    for path in root.rglob('*.py'):
        parts = [root.name, *path.relative_to(root).with_suffix('').parts]
        files['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
    return {name: imports_of(name, path, set(files)) for name, path in files.items()}


def imports_of(name: str, path: Path, house: set[str]) -> set[str]:
    """Returns the modules that the module `name` in `path` imports; `house` are the modules there are."""
    package = name if path.name == '__init__.py' else name.rpartition('.')[0]
    found = {name.rpartition('.')[0]} - {''}
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import():
                found |= {alias.name for alias in node.names}
            case ast.ImportFrom():
                base = node.module or ''
                if node.level:
                    above = package.split('.')[: len(package.split('.')) - node.level + 1]
                    base = '.'.join([*above, *([node.module] if node.module else [])])
                found.add(base)
                # `from a import b` imports the module a.b where there is one.
                found |= {f'{base}.{alias.name}' for alias in node.names} & house
            case ast.Call(
                func=ast.Name(id=function) | ast.Attribute(attr=function), args=[ast.Constant(str(text)), *_]
            ):
                if function in IMPORT_FUNCTIONS:
                    found.add(text)
    # Importing a.b.c runs a and a.b.
    return {'.'.join(m.split('.')[: i + 1]) for m in found for i in range(m.count('.') + 1)} - {name}


def inside(module: str, part: str) -> bool:
    return module == part or module.startswith(part + '.')


def path_between(graph: dict[str, set[str]], start: str, forbidden) -> list[str] | None:
    """Returns the modules on a way from those in `start` to one that is `forbidden`, or None where there is no way."""
    ways = [[module] for module in sorted(graph) if inside(module, start)]
    seen = {way[0] for way in ways}
    while ways:
        way = ways.pop(0)
        for module in sorted(graph.get(way[-1], ())):
            if forbidden(module):
                return [*way, module]
            if module not in seen:
                seen.add(module)
                ways.append([*way, module])
    return None


def importers(graph: dict[str, set[str]], library: str) -> set[str]:
    return {module for module, imported in graph.items() if any(inside(name, library) for name in imported)}


@pytest.fixture(scope='module')
def graph() -> dict[str, set[str]]:
    return import_graph(ROOT)


def test_defenses_never_reach_attacks(graph):
    assert any(inside(module, 'aft_jax.defenses') for module in graph)
    assert any(inside(module, 'aft_jax.attacks') for module in graph)
    assert path_between(graph, 'aft_jax.defenses', lambda module: inside(module, 'aft_jax.attacks')) is None


def test_defenses_never_reach_the_judge(graph):
    """The scores know the trigger's success: a defense that saw them would have an oracle."""
    judges = (
        'aft_jax.evaluation.scores',
        'aft_jax.evaluation.evaluator',
        'aft_jax.experiment',
        'aft_jax.results.record',
    )
    assert path_between(graph, 'aft_jax.defenses', lambda module: module in judges) is None


def test_the_infection_score_has_no_oracle(graph):
    start = 'aft_jax.analysis.infection_score'
    assert start in graph
    above = (
        'aft_jax.attacks',
        'aft_jax.evaluation.scores',
        'aft_jax.evaluation.evaluator',
        'aft_jax.experiment',
        'aft_jax.results.record',
    )
    assert path_between(graph, start, lambda module: any(inside(module, part) for part in above)) is None


@pytest.mark.parametrize('part', BELOW)
def test_what_lies_below_knows_nothing_above(graph, part):
    assert any(inside(module, part) for module in graph)
    allowed = GROUND | BELOW[part]

    def above(module):
        return inside(module, 'aft_jax') and not inside(module, part) and module not in allowed

    assert path_between(graph, part, above) is None


@pytest.mark.parametrize('library', ONLY_IMPORTER)
def test_one_importer_of_each_heavy_library(graph, library):
    found = importers(graph, library)
    assert found
    assert not [module for module in found if not inside(module, ONLY_IMPORTER[library])]


@pytest.mark.parametrize(
    'statement',
    [
        'import aft_jax.attacks',
        'import aft_jax.attacks.badnets as b',
        'from aft_jax import attacks',
        'from aft_jax import errors, attacks as a',
        'from aft_jax.attacks import badnets',
        'from aft_jax.attacks.badnets import stamp',
        'from aft_jax.attacks import *',
        'from .. import attacks',
        'from ..attacks import badnets',
        'from ..attacks.badnets import stamp',
        'def late():\n    from aft_jax import attacks',
        'import importlib\nimportlib.import_module("aft_jax.attacks")',
        '__import__("aft_jax.attacks.badnets")',
        'from aft_jax import helper',  # which imports it
        'from aft_jax.side import door',  # whose package does
        'from .. import between',  # which imports helper
    ],
)
def test_the_checker_finds_a_violation(tmp_path, statement):
    clean = {
        '__init__': '',
        'errors': '',
        'attacks/__init__': '',
        'attacks/badnets': 'stamp = 1',
        'helper': 'from .attacks import badnets',
        'between': 'from . import helper',
        'side/__init__': 'import aft_jax.attacks',
        'side/door': '',
        'defenses/__init__': '',
        'defenses/mine': 'import numpy\nfrom aft_jax import errors\nfrom . import peer\nfrom .peer import attacks',
        'defenses/peer': 'attacks = "a mere name, and a text: import aft_jax.attacks"  # import aft_jax.attacks',
    }
    graph = import_graph(write(tmp_path / 'clean' / 'aft_jax', clean))
    assert path_between(graph, 'aft_jax.defenses', lambda module: inside(module, 'aft_jax.attacks')) is None
    violating = clean | {'defenses/mine': statement}
    graph = import_graph(write(tmp_path / 'violating' / 'aft_jax', violating))
    way = path_between(graph, 'aft_jax.defenses', lambda module: inside(module, 'aft_jax.attacks'))
    assert way is not None and way[0] == 'aft_jax.defenses.mine'


def test_the_checker_finds_importers(tmp_path):
    sources = {
        '__init__': '',
        'one': 'import orbax.checkpoint as ocp',
        'two': 'def late():\n    from orbax import checkpoint',
        'three': 'import orbaxter\nfrom aft_jax import orbax',
        'orbax': '',
    }
    assert importers(import_graph(write(tmp_path / 'aft_jax', sources)), 'orbax') == {'aft_jax.one', 'aft_jax.two'}


def write(root: Path, sources: dict[str, str]) -> Path:
    for name, source in sources.items():
        path = root / f'{name}.py'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return root
