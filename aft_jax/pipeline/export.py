"""Exports purified models in the format of the given model, each with a model card."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from flax.traverse_util import flatten_dict

from aft_jax import interchange
from aft_jax.errors import UserError
from aft_jax.interchange import state_file
from aft_jax.interchange.architecture import Architecture
from aft_jax.interchange.card import write_card
from aft_jax.interchange.program import Program
from aft_jax.pipeline import given_program
from aft_jax.pipeline.given_model import FromCustomModule, FromFile, FromRun, GivenModel
from aft_jax.pipeline.given_program import FromProgram
from aft_jax.results import search_text
from aft_jax.results.record import SHOWN_EPS, Results

UNKNOWN = (
    'Whether the model had a backdoor, and whether it is gone: without the trigger neither can be measured. The '
    'infection score comes from perturbations that were found, not from the trigger.'
)


def write(
    directory: Path,
    given: GivenModel,
    purified: dict[str, dict],
    config: ml_collections.ConfigDict,
    results: Results,
) -> None:
    """Writes every purified model that is not withheld, and its card.

    A network from a file keeps its key names and dtypes. It is written as DEFENSE with the suffix of that file, and as
    DEFENSE.safetensors. A network from a saved run gets the key names of torchvision or of the authors' releases (see
    `interchange.with_usual_names`). It is written as DEFENSE.safetensors, with suspect.safetensors for comparison.
    A PyTorch program keeps the key names of its state dict, and one from a .pt2 file is written as DEFENSE.pt2 too.
    A network without such names is not exported, and a message says so.

    Args:
        directory: Folder; created if it does not exist.
        given: Given model that was purified.
        purified: Variables by defense.
        config: Resolved config.
        results: Results of the experiment.

    Raises:
        UserError: A file cannot be written.
    """
    if isinstance(given.origin, FromRun) and given.origin.architecture is None and given.origin.program is None:
        print('aft_jax: this network has no standard key names, so it is not exported; use its checkpoints instead.')
        return
    try:
        directory.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(
            f'{directory} cannot be created ({error.strerror}); delete what stands there, or name another --workdir.'
        ) from error
    match given.origin:
        case FromFile(imported):
            before = imported.source.path
        case FromCustomModule(source) | FromProgram(source):
            before = source.path
        case FromRun():
            before = directory / 'suspect.safetensors'
            _write(before, given, given.variables)
    suffix = '.pth.tar' if before.name.endswith('.pth.tar') else before.suffix
    for name, variables in purified.items():
        if name in results.withheld and not config.safety.export_anyway:
            continue
        after = directory / f'{name}{suffix}'
        written = [after] if suffix == '.safetensors' else [after, directory / f'{name}.safetensors']
        for path in written:
            _write(path, given, variables)
        copies = {path.name: state_file.checksum(path) for path in written[1:]}
        write_card(directory / f'{name}.json', facts(name, config, results, copies), before, after)


def facts(name: str, config: ml_collections.ConfigDict, results: Results, copies: dict[str, str]) -> dict[str, Any]:
    """Collects the facts for the card of one purified model, without its files.

    Args:
        name: Name of the defense.
        config: Resolved config.
        results: Results of the experiment on a given model.
        copies: sha256 of further files with the same weights, by name.
    """
    before, after = results.initial, results.purified[name]
    assert results.given is not None
    class_names = results.given.class_names
    figures: dict[str, Any] = {'clean accuracy': {'before': before.acc, 'after': after.acc}}
    if before.scan and after.scan:
        scans = {'before': before.scan, 'after': after.scan}
        place = before.scan['landing_eps'].index(SHOWN_EPS)
        figures['infection score'] = {when: scan['score'] for when, scan in scans.items()}
        figures[f'adversarial examples of size {round(255 * SHOWN_EPS)}/255 that change the prediction'] = {
            when: scan['fooled'][place] for when, scan in scans.items()
        }
        figures['suspected label'] = {when: _label(scan, class_names) for when, scan in scans.items()}
    searches = search_text.searches(results)
    verdict = {}
    if results.first_model in searches and name in searches:
        verdict = {'verdict of the search for triggers': search_text.verdict(results, name)}
        found = {'before': searches[results.first_model], 'after': searches[name]}
        best = {when: search['changes'][0] for when, search in found.items()}
        figures['search for triggers'] = {when: search['verdict'] for when, search in found.items()}
        figures['largest excess of a change'] = {when: change['excess'] for when, change in best.items()}
        figures['change with the largest excess'] = {
            when: search_text.describe(change, class_names) for when, change in best.items()
        }
    return {
        'title': f'{config.init_from}, purified by {name}',
        'defense': name,
        'data': config.dataset,
        'clean share of the training images': config.clean_share,
        'seed': config.seed,
        'model': results.setting.model,
        'normalisation': f'mean {list(config.model.mean)}, std {list(config.model.std)}, of pixels in [0, 1]',
        'seconds': after.seconds,
        **verdict,
        'not known': UNKNOWN,
        'figures': figures,
        'options of the defense': config[name].to_dict(),
        **({'copies': copies} if copies else {}),
    }


def _label(scan: dict[str, Any], class_names: Sequence[str]) -> str:
    return 'one a class' if scan['suspected_label'] is None else str(class_names[scan['suspected_label']])


def _write(path: Path, given: GivenModel, variables: dict) -> None:
    match given.origin:
        case FromFile(imported):
            interchange.save(path, variables, imported)
        case FromCustomModule(source):
            leaves = flatten_dict(variables, sep='/')
            tensors = {key: np.asarray(leaves[key]).astype(old.dtype) for key, old in source.tensors.items()}
            state_file.write(path, source._replace(tensors=tensors))
        case FromProgram() as origin:
            given_program.save(path, variables, origin)
        case FromRun(program=Program() as program):
            source = state_file.StateFile(Path(), program.file.tensors)
            given_program.save(path, variables, FromProgram(source, program))
        case FromRun(architecture=Architecture() as architecture):
            interchange.save(path, variables, interchange.with_usual_names(architecture, variables))
