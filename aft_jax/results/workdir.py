"""The work directory of a run: the names of its files, and the check that it belongs to one config."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
from flax.traverse_util import flatten_dict

from aft_jax.config import default_config
from aft_jax.errors import UserError
from aft_jax.files import set_aside, write_json
from aft_jax.results import lock
from aft_jax.runtime import numerics

# Fields that a later start may change in the same directory. They say how, and how much of, the work is done.
FREE_FIELDS = ('run', 'safety', 'stages', 'defenses', 'data.dir', 'data.idx_dir', 'init_logits')
# Fields that all defenses share. A later start may change them until the first defense has a checkpoint.
SHARED_BY_DEFENSES = ('clean_share', 'tuning')
# What config.json has beside the config.
EXTRA_FIELDS = ('data_checksum', 'numerics')
# Fields with a path. It may be written in another way as long as the content, which has a checksum, is the same.
PATH_FIELDS = ('dataset', 'data.classes', 'init_from', 'init_mapping')


class RunFiles(NamedTuple):
    """Paths of the files and folders of a run.

    Attributes:
        workdir: Work directory.
    """

    workdir: Path

    @property
    def config(self) -> Path:
        """Resolved config, with a checksum of the data and the settings of the numbers."""
        return self.workdir / 'config.json'

    @property
    def program(self) -> Path:
        """Program of a PyTorch network with its initial weights, a file of `torch.export.save`."""
        return self.workdir / 'model.pt2'

    @property
    def results(self) -> Path:
        """Results, see `aft_jax.results.record`."""
        return self.workdir / 'results.json'

    @property
    def metrics(self) -> Path:
        """Metrics of every stage, a JSON object a line. `aft_jax.training.metrics` writes them."""
        return self.workdir / 'metrics.jsonl'

    @property
    def poison_manifest(self) -> Path:
        """Indices of the poisoned training images, and the arrays of the trigger."""
        return self.workdir / 'poison.npz'

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's files."""
        return self.workdir / 'tensorboard'

    @property
    def report(self) -> Path:
        """Folder of the page and its figures."""
        return self.workdir / 'report'

    @property
    def export(self) -> Path:
        """Folder of purified models in the format of the given model."""
        return self.workdir / 'export'

    def checkpoints(self, stage: str) -> Path:
        """Returns the folder of the checkpoints of a stage, such as 'purify/aft'."""
        return self.workdir / 'checkpoints' / stage


def claim(
    workdir: Path,
    config: ml_collections.ConfigDict,
    data_checksum: int,
    writes: bool = True,
    defenses: Iterable[str] = (),
) -> lock.Lock:
    """Makes the work directory this experiment's, or checks that it belongs to this experiment already.

    Args:
        workdir: Work directory; created if it does not exist.
        config: Resolved config, which is kept as config.json.
        data_checksum: Checksum of the data set's arrays and of the given model. It is kept in config.json, so that
            changed contents under the same name are noticed.
        writes: Whether this process writes. The other processes only check.
        defenses: Defenses whose config section may still change as long as they have no checkpoint here.

    Returns:
        The lock of the directory. While it is held no other run can claim the directory.

    Raises:
        UserError: The directory cannot be written, holds another experiment, is in use by another run, or holds other
            files.
    """
    path = RunFiles(workdir).config
    extra = {'data_checksum': data_checksum, 'numerics': numerics.recorded()}
    content = json.loads(json.dumps(config.to_dict() | extra))
    try:
        if writes:
            workdir.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _check_same(path, content, _not_begun(workdir, defenses))
        elif writes and not all(map(_of_a_first_moment, workdir.iterdir())):
            raise UserError(
                f'--workdir={workdir} holds other files but no config.json; name an empty or a new directory.'
            )
        if not writes:
            return lock.Lock()
        held = lock.lock(workdir, '--workdir')
        write_json(path, content)
        _set_misplaced_aside(RunFiles(workdir))
        return held
    except OSError as error:
        raise UserError(f'--workdir={workdir} cannot be written ({error.strerror}); name another directory.') from error


def _of_a_first_moment(file: Path) -> bool:
    """Whether a process leaves this file if it ends before config.json is written. A sweep leaves error.txt."""
    return file.name in (lock.NAME, 'error.txt') or file.name.startswith('.config.json.')


def _set_misplaced_aside(run_files: RunFiles) -> None:
    """Sets files aside that have the name of a folder, and folders that have the name of a file."""
    for path in (run_files.results, run_files.metrics, run_files.poison_manifest):
        if path.is_dir():
            set_aside(path, 'it is a folder')
    for path in (run_files.tensorboard, run_files.report, run_files.export):
        if path.exists() and not path.is_dir():
            set_aside(path, 'it is no folder')


def differences(workdir: Path, config: ml_collections.ConfigDict, defenses: Iterable[str] = ()) -> list[str]:
    """Compares the config of a work directory with `config`.

    Args:
        workdir: Work directory.
        config: Resolved config.
        defenses: Defenses whose config section may differ as long as they have no checkpoint there.

    Returns:
        Names of the fields that differ, as 'a.b'. Fields that a later start may change are left out.

    Raises:
        OSError, ValueError: There is no config.json, or a damaged one.
    """
    kept = flat(json.loads(RunFiles(workdir).config.read_text(encoding='utf-8')))
    return _differing(kept, flat(json.loads(json.dumps(config.to_dict()))), _not_begun(workdir, defenses))


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """Flattens {'a': {'b': value}} to {'a.b': value}.

    Raises:
        ValueError: It is not a dict.
    """
    if not isinstance(config, dict):
        raise ValueError('not a config')
    return flatten_dict(config, sep='.')


def _not_begun(workdir: Path, defenses: Iterable[str]) -> set[str]:
    """Returns the names of the config sections that no checkpoint depends on yet."""
    run_files = RunFiles(workdir)
    shared = set() if run_files.checkpoints('purify').exists() else set(SHARED_BY_DEFENSES)
    return shared | {name for name in defenses if not run_files.checkpoints(f'purify/{name}').exists()}


def _differing(kept: dict[str, Any], current: dict[str, Any], open_sections: Iterable[str]) -> list[str]:
    free = {*FREE_FIELDS, *EXTRA_FIELDS, *open_sections}
    if kept.get('data_checksum', 0) == current.get('data_checksum'):
        free |= {name for name in PATH_FIELDS if kept.get(name) and current.get(name)}
    # A directory may be older than a field, which then has its default there.
    defaults = flat(default_config().to_dict())
    return [
        name
        for name in sorted(kept.keys() | current.keys(), key=lambda n: (n not in current or n not in kept, n))
        if not {name, name.split('.')[0]} & free and kept.get(name, defaults.get(name)) != current.get(name)
    ]


def _check_same(path: Path, content: dict, open_sections: Iterable[str]) -> None:
    try:
        kept = flat(json.loads(path.read_text(encoding='utf-8')))
    except ValueError:
        raise UserError(
            f'{path} is damaged, so the owner of the directory is unknown; name another --workdir.'
        ) from None
    current = flat(content)
    if kept.get('data_checksum') != current['data_checksum'] and kept.get('dataset') == current['dataset']:
        model = ', or the model of init_from,' if current['init_from'] else ''
        raise UserError(
            f'the data set {current["dataset"]}{model} has changed since the run in --workdir={path.parent}; restore '
            'the old one, or name another directory.'
        )
    for name, value in numerics.recorded().items():
        # Older versions did not record the settings.
        before = kept.get(f'numerics.{name}', numerics.DEFAULTS[name])
        if before != value:
            raise UserError(
                f'the run in --workdir={path.parent} was made with {numerics.VARIABLES[name]}={before!r}, and here it '
                f'is {value!r}, which changes the numbers; set it as it was, or name another directory.'
            )
    if differing := _differing(kept, current, open_sections):
        shown = ', '.join(
            f'{name} is {kept.get(name)!r} there and {current.get(name)!r} here' for name in differing[:3]
        )
        more = f' and {len(differing) - 3} more fields differ' if len(differing) > 3 else ''
        raise UserError(
            f'--workdir={path.parent} belongs to another config ({shown}{more}); name another directory, '
            'or repeat the config it was made with.'
        )
