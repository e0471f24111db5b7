"""PyTorch networks on the command line: by a function of the user, and as a .pt2 file."""

import sys

import jax
import numpy as np
import pytest
from command import ROOT, run_here
from test_bad_input import assert_one_sentence

from aft_jax.config import default_config
from aft_jax.experiment import run_experiment
from aft_jax.pipeline import normalisation, saved_run
from aft_jax.runtime.sharding import make_mesh

torch = pytest.importorskip('torch')

NETWORK = """
import torch

def make_model(num_classes, width=6):
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, width, 3, 2), torch.nn.BatchNorm2d(width), torch.nn.ReLU(inplace=True),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(width, num_classes),
    )

def make_unknown(num_classes):
    return torch.nn.Sequential(make_model(num_classes), Unknown())

class Unknown(torch.nn.Module):
    def forward(self, x):
        return torch.cummax(x, 1)[0]
"""
SHORT = [
    *('--config.stages=("purify",)', '--config.defenses=ft', '--config.ft.epochs=1'),
    *('--config.ft.learning_rates=(0.01,)', '--config.batch_size=16', '--config.run.eval_batch_size=40'),
    # A network that nobody has trained fits no images.
    *('--config.safety.export_anyway=True', '--config.safety.find_tainted=False'),
]


@pytest.fixture
def folder(tmp_path, dataset, monkeypatch):
    """A folder with data and the user's module, which can be imported; any accuracy counts as above chance."""
    monkeypatch.setattr(normalisation, 'near_chance', lambda classes: 0.0)
    arrays = {name: getattr(dataset, name) for name in ('train_images', 'train_labels', 'test_images', 'test_labels')}
    np.savez(tmp_path / 'data.npz', **arrays)
    (tmp_path / 'their_network.py').write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'their_network', raising=False)
    return tmp_path


def flags(folder, init_from, workdir='out', *more):
    paths = [f'--workdir={folder / workdir}', f'--config.init_from={folder / init_from}']
    return [f'--config={ROOT}/configs/purify.py', *paths, f'--config.dataset=npz:{folder}/data.npz', *SHORT, *more]


def their_model():
    import their_network

    torch.manual_seed(0)
    return their_network.make_model(4)


def forget_their_module(folder):
    (folder / 'their_network.py').unlink()
    del sys.modules['their_network']


def test_purify_keeps_the_form_of_a_state_dict(folder, capsys):
    model = their_model()
    state = {f'module.{key}': value.clone() for key, value in model.state_dict().items()}
    state['module.5.bias'] = state['module.5.bias'].double()
    torch.save({'arch': 'mine', 'state_dict': state}, folder / 'theirs.pt')
    arguments = flags(folder, 'theirs.pt', 'out', '--config.model.torch=their_network:make_model')
    status, text = run_here(arguments, capsys)
    assert status == 0, text
    written = torch.load(folder / 'out/export/ft.pt', weights_only=True)
    assert list(written) == ['arch', 'state_dict'] and list(written['state_dict']) == list(state)
    assert {key: value.dtype for key, value in written['state_dict'].items()} == {k: v.dtype for k, v in state.items()}
    model.load_state_dict({key.removeprefix('module.'): value for key, value in written['state_dict'].items()})
    assert not torch.equal(written['state_dict']['module.0.weight'], state['module.0.weight'])
    # 80 clean images: five batches of 16.
    assert int(written['state_dict']['module.1.num_batches_tracked']) == 5
    # Another start needs neither torch's network nor its module.
    forget_their_module(folder)
    status, text = run_here(arguments, capsys)
    assert status == 0, text
    assert_one_sentence(*run_here(flags(folder, 'theirs.pt', 'new', arguments[-1]), capsys), 'cannot be imported')


def test_purify_keeps_a_program(folder, capsys):
    model = their_model().eval()
    batch = torch.export.Dim('batch', min=2)
    program = torch.export.export(model, (torch.zeros(2, 1, 8, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(program, folder / 'theirs.pt2')
    forget_their_module(folder)
    status, text = run_here(flags(folder, 'theirs.pt2'), capsys)
    assert status == 0, text
    written = torch.export.load(folder / 'out/export/ft.pt2')
    assert list(written.state_dict) == list(program.state_dict)
    assert not torch.equal(written.state_dict['0.weight'], program.state_dict['0.weight'])
    assert written.module()(torch.zeros(3, 1, 8, 8)).shape == (3, 4)
    assert (folder / 'out/export/ft.safetensors').exists()
    assert_one_sentence(
        *run_here(flags(folder, 'theirs.pt2', 'new', '--config.data.size=9'), capsys),
        'takes images of 8x8x1, but those',
    )


def test_purify_refuses_what_does_not_fit(folder, capsys):
    state = their_model().state_dict()
    torch.save({key.replace('5.', 'head.'): value for key, value in state.items()}, folder / 'renamed.pt')
    torch.save(state, folder / 'theirs.pt')
    theirs = '--config.model.torch=their_network:make_model'
    for arguments, message in (
        (flags(folder, 'renamed.pt', 'out', theirs), r'lacks 2 keys \(5.weight .*too many'),
        (flags(folder, 'theirs.pt', 'out', f'{theirs}(width=7)'), r'not its shapes: 0.weight \(6, 1, 3, 3\) instead'),
        (flags(folder, 'theirs.pt', 'out', theirs.replace('make_model', 'make_unknown')), 'uses the operator cummax'),
        (flags(folder, 'theirs.pt', 'out', theirs, '--config.model.factory=a:b'), 'are both set'),
        (flags(folder, 'theirs.pt', 'out', theirs, '--config.init_mapping=names.json'), 'not for a PyTorch program'),
    ):
        assert_one_sentence(*run_here(arguments, capsys), message)
        assert not (folder / 'out').exists()


def test_saved_run_keeps_the_program(folder):
    config = default_config()
    config.dataset = f'npz:{folder / "data.npz"}'
    config.model.torch = 'their_network:make_model'
    config.batch_size, config.clean_share, config.train.epochs = 16, 0.5, 1
    config.defenses, config.anp.iterations, config.stages = 'anp', 2, ('infect', 'purify')
    results = run_experiment(config, folder / 'run')
    assert results.setting.model == 'their_network:make_model'
    forget_their_module(folder)
    run = saved_run.load(folder / 'run', make_mesh(), saved_run.Datasets())
    assert set(run.purified) == {'anp'}
    initial = run.scenario.module.initial_variables()
    trained = jax.tree.map(np.asarray, run.infected.variables)
    assert jax.tree.structure(initial) == jax.tree.structure(trained)
    assert not np.array_equal(initial['params']['0']['kernel'], trained['params']['0']['kernel'])
