"""Loading finished runs: the models are those that were measured, and nothing is trained or written."""

import json
import shutil

import jax
import numpy as np
import pytest

from aft_jax.config import default_config
from aft_jax.errors import UserError
from aft_jax.evaluation.evaluator import Evaluator
from aft_jax.experiment import run_experiment
from aft_jax.pipeline import saved_run
from aft_jax.runtime.sharding import make_mesh


@pytest.fixture(scope='module')
def finished(tmp_path_factory, dataset):
    """A run of ANP, which writes a record of its own after its training."""
    directory = tmp_path_factory.mktemp('saved')
    arrays = {name: getattr(dataset, name) for name in ('train_images', 'train_labels', 'test_images', 'test_labels')}
    np.savez(directory / 'data.npz', **arrays)
    config = default_config()
    config.dataset = f'npz:{directory / "data.npz"}'
    config.batch_size = 16
    config.clean_share = 0.5
    config.train.epochs = 1
    config.defenses = 'anp'
    config.anp.iterations = 2
    config.stages = ('infect', 'purify')
    run_experiment(config, directory / 'run')
    return directory / 'run'


def contents(directory):
    return {path: path.read_bytes() for path in sorted(directory.rglob('*')) if path.is_file()}


def test_load_finds_the_measured_models_and_writes_nothing(finished):
    before = contents(finished)
    run = saved_run.load(finished, make_mesh(), saved_run.Datasets())
    assert contents(finished) == before
    assert list(run.purified) == ['anp']
    evaluator = Evaluator(run.scenario.dataset, run.scenario.module, make_mesh(), 8, run.config.seed)
    results = json.loads((finished / 'results.json').read_text())
    models = {'infected': run.infected.variables, 'anp': run.purified['anp']}
    for scores, variables in ((results['infected'], models['infected']), (results['purified']['anp'], models['anp'])):
        assert evaluator.evaluate(variables, run.infected.attack).acc == pytest.approx(scores['acc'], abs=1e-9)
    scales = jax.tree.leaves(models['anp']['params'])
    assert all(np.isfinite(scale).all() for scale in scales)


def test_load_refuses_an_unfinished_defense(finished, tmp_path):
    shutil.copytree(finished, tmp_path / 'run')
    shutil.rmtree(tmp_path / 'run/checkpoints/purify/anp')
    with pytest.raises(UserError, match=r'the stage purify/anp of .* has not finished \(step 0\); start the run again'):
        saved_run.load(tmp_path / 'run', make_mesh(), saved_run.Datasets())
    assert not (tmp_path / 'run/checkpoints/purify/anp/0').exists()
