"""Who may import whom, proved from the source: the directions of the house are followed by no one's good will."""

import ast
from pathlib import Path

import pytest

import aft_jax

ROOT = Path(aft_jax.__file__).parent
# The layers of README.md, highest first. A module imports from its own folder and from lower layers only.
LAYERS = (
    ('main', 'sweep'),
    ('experiment', 'relapse', 'scan_runs'),
    ('report',),
    ('analysis',),
    ('pipeline',),
    ('results',),
    ('evaluation', 'validation'),
    ('attacks', 'defenses', 'interchange'),
    ('training', 'config'),
    ('adversarial', 'models', 'data', 'runtime', 'cli'),
    ('ops', 'files', 'errors', 'output', 'randomness'),
)
# A defense that reached one of these could see the trigger, or the test scores.
ORACLES = ('attacks', 'evaluation', 'pipeline', 'results', 'experiment')
ONLY_IMPORTER = {
    'orbax': 'aft_jax.training.checkpoint',
    'tensorflow_datasets': 'aft_jax.data',
    'matplotlib': 'aft_jax.report',
    'jinja2': 'aft_jax.report',
    'sklearn': 'aft_jax.report',
    'torch': 'aft_jax.interchange',
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


def path_between(graph: dict[str, set[str]], start: str, forbidden, alone: bool = False) -> list[str] | None:
    """Returns the modules on a way from those in `start` to one that is `forbidden`, or None where there is no way.

    With `alone`, the way begins at the module `start` itself and not at those below it.
    """
    ways = [[module] for module in sorted(graph) if (module == start if alone else inside(module, start))]
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


def room(module: str) -> str:
    """Returns the folder or top-level file of the package that a module belongs to; '' for the package itself."""
    return module.split('.')[1] if '.' in module else ''


def upward_imports(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Returns the imports that do not go to a lower layer, within a folder excepted."""
    height = {name: -i for i, layer in enumerate(LAYERS) for name in layer}
    pairs = ((module, imported) for module in graph for imported in graph[module] if imported in graph)
    return sorted(
        (module, imported)
        for module, imported in pairs
        if room(module) and room(imported) and room(module) != room(imported)
        if height[room(module)] <= height[room(imported)]
    )


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Returns the modules that import themselves by way of others. A package counts only where it is named."""
    named = {
        module: {other for other in imported & set(graph) if not inside(module, other)}
        for module, imported in graph.items()
    }
    return sorted(module for module in named if path_between(named, module, module.__eq__, alone=True))


@pytest.fixture(scope='module')
def graph() -> dict[str, set[str]]:
    return import_graph(ROOT)


def test_layers_name_every_folder_and_file(graph):
    names = [name for layer in LAYERS for name in layer]
    assert sorted(names) == sorted({room(module) for module in graph} - {''})


def test_imports_go_to_lower_layers(graph):
    assert upward_imports(graph) == []


def test_imports_have_no_circle(graph):
    assert circles(graph) == []


def test_readme_lists_the_layers():
    text = (ROOT.parent / 'README.md').read_text().partition('## Layout')[2]
    places = [text.find(f'\n    {", ".join(layer)}') for layer in LAYERS]
    assert -1 not in places and places == sorted(places)


@pytest.mark.parametrize('oracle', ORACLES)
def test_defenses_never_reach_an_oracle(graph, oracle):
    forbidden = f'aft_jax.{oracle}'
    assert any(inside(module, forbidden) for module in graph)
    assert path_between(graph, 'aft_jax.defenses', lambda module: inside(module, forbidden)) is None


@pytest.mark.parametrize('module', ['aft_jax.analysis.infection_score', 'aft_jax.analysis.backdoor_scan'])
def test_scores_without_a_trigger_never_reach_an_attack(graph, module):
    assert module in graph
    assert path_between(graph, module, lambda found: inside(found, 'aft_jax.attacks')) is None


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


LAYERED = {
    '__init__': '',
    'errors': '',
    'ops/__init__': '',
    'ops/tiling': 'import numpy',
    'training/__init__': '',
    'training/loop': 'from aft_jax.ops import tiling\nfrom aft_jax.training import state',
    'training/state': '',
    'attacks/__init__': 'from aft_jax.attacks import sig',
    'attacks/sig': 'from aft_jax.training.loop import fit',
}


@pytest.mark.parametrize(
    ('module', 'statement', 'imported'),
    [
        ('errors', 'from aft_jax.ops import tiling', 'aft_jax.ops.tiling'),  # of the same layer
        ('ops/tiling', 'import aft_jax.training.state', 'aft_jax.training.state'),
        ('training/state', 'def late():\n    from aft_jax import attacks', 'aft_jax.attacks'),
        ('training/state', 'from ..attacks.sig import build', 'aft_jax.attacks.sig'),
    ],
)
def test_upward_imports_finds_one(tmp_path, module, statement, imported):
    clean = import_graph(write(tmp_path / 'clean' / 'aft_jax', LAYERED))
    assert upward_imports(clean) == [] and circles(clean) == []
    graph = import_graph(write(tmp_path / 'wrong' / 'aft_jax', LAYERED | {module: statement}))
    assert (f'aft_jax.{module.replace("/", ".")}', imported) in upward_imports(graph)


@pytest.mark.parametrize(
    'sources',
    [
        {'training/state': 'from aft_jax.training import loop'},
        {'training/state': 'def late():\n    from aft_jax.training.loop import fit'},
        {'ops/tiling': 'from aft_jax.attacks import sig'},
    ],
)
def test_circles_finds_one(tmp_path, sources):
    found = circles(import_graph(write(tmp_path / 'aft_jax', LAYERED | sources)))
    assert 'aft_jax.training.loop' in found or 'aft_jax.attacks.sig' in found


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
