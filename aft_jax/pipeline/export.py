"""Purified models, back in the form in which the suspect came, with a card that says what was done."""

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
from aft_jax.pipeline.given_model import FromCustomModule, FromFile, FromRun, GivenModel
from aft_jax.results.record import SHOWN_EPS

UNKNOWN = (
    'Whether the model had a backdoor, and whether it is gone: without the trigger neither can be measured. The score '
    'is of changes that were found, not of the trigger.'
)


def write(
    directory: Path,
    given: GivenModel,
    purified: dict[str, dict],
    config: ml_collections.ConfigDict,
    outcome: dict[str, Any],
) -> None:
    """Writes every purified model and its card, and into `outcome` where they are.

    A file's network keeps its key names and dtypes: DEFENSE with the suspect's suffix, and DEFENSE.safetensors beside
    it. A finished run's goes out under torchvision's or the releases' names (see `interchange.with_usual_names`), as
    .safetensors alone, with suspect.safetensors to compare it with. What cannot be exported is said on a line.

    Args:
        directory: Made when it is not there.
        given: Model that was purified.
        purified: Variables by defense.
        config: The resolved config.
        outcome: What results.json holds.

    Raises:
        UserError: A file cannot be written.
    """
    if isinstance(given.origin, FromRun) and given.origin.architecture is None:
        print('aft_jax: no export, because this network has no usual names; the checkpoints hold the purified model.')
        return
    try:
        directory.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f'{directory} cannot be made ({error.strerror}).') from error
    match given.origin:
        case FromFile(imported):
            before = imported.source.path
        case FromCustomModule(source):
            before = source.path
        case FromRun():
            before = directory / 'suspect.safetensors'
            _write(before, given, given.variables)
    suffix = '.pth.tar' if before.name.endswith('.pth.tar') else before.suffix
    for name, variables in purified.items():
        after = directory / f'{name}{suffix}'
        written = [after] if suffix == '.safetensors' else [after, directory / f'{name}.safetensors']
        for path in written:
            _write(path, given, variables)
        copies = {path.name: state_file.checksum(path) for path in written[1:]}
        write_card(directory / f'{name}.json', facts(name, config, outcome, copies), before, after)


def facts(
    name: str, config: ml_collections.ConfigDict, outcome: dict[str, Any], copies: dict[str, str]
) -> dict[str, Any]:
    """Returns what the card of one purified model says beside the files.

    Args:
        name: The defense.
        config: The resolved config.
        outcome: What results.json holds.
        copies: sha256 of further files with the same weights, by name.
    """
    before, after = outcome['suspect'], outcome['purified'][name]
    figures = {'clean accuracy': {'before': before['acc'], 'after': after['acc']}}
    if 'scan' in before and 'scan' in after:
        scans = {'before': before['scan'], 'after': after['scan']}
        place = before['scan']['landing_eps'].index(SHOWN_EPS)
        figures['infection score'] = {when: scan['score'] for when, scan in scans.items()}
        figures[f'fooled by changes of {round(255 * SHOWN_EPS)}/255 a pixel'] = {
            when: scan['fooled'][place] for when, scan in scans.items()
        }
        figures['suspected label'] = {when: _label(scan, before['class_names']) for when, scan in scans.items()}
    return {
        'title': f'{config.init_from}, purified by {name}',
        'defense': name,
        'data': config.dataset,
        'clean share of the training images': config.clean_share,
        'seed': config.seed,
        'model': outcome['model'],
        'normalisation': f'mean {list(config.model.mean)}, std {list(config.model.std)}, of pixels in [0, 1]',
        'seconds': after['seconds'],
        'not known': UNKNOWN,
        'figures': figures,
        'options of the defense': config[name].to_dict(),
        **({'copies': copies} if copies else {}),
    }


def _label(scan: dict[str, Any], class_names: list[str]) -> str:
    return 'one a class' if scan['suspected_label'] is None else str(class_names[scan['suspected_label']])


def _write(path: Path, given: GivenModel, variables: dict) -> None:
    match given.origin:
        case FromFile(imported):
            interchange.save(path, variables, imported)
        case FromCustomModule(source):
            leaves = flatten_dict(variables, sep='/')
            tensors = {key: np.asarray(leaves[key]).astype(old.dtype) for key, old in source.tensors.items()}
            state_file.write(path, source._replace(tensors=tensors))
        case FromRun(architecture=Architecture() as architecture):
            interchange.save(path, variables, interchange.with_usual_names(architecture, variables))
