"""The config: its files are valid for every attack, its presets fill what is left open, and its help is complete."""

import importlib
from pathlib import Path

import pytest
from command import ROOT
from flax.traverse_util import flatten_dict

from aft_jax import attacks, main, validation
from aft_jax.config import AFT_PRESETS, AFT_SECTIONS, default_config, resolve, split_names
from aft_jax.config.fields import Field, names_of
from aft_jax.data import BUILTIN
from aft_jax.defenses import DEFENSES
from aft_jax.errors import UserError
from aft_jax.training.optimiser import SCHEDULES
from aft_jax.validation.fields import ALL_FIELDS

# purify.py is for a model without an attack (test_purify.py).
NAMES = sorted(path.stem for path in Path(ROOT / 'configs').glob('*.py') if path.stem not in ('__init__', 'purify'))


@pytest.mark.parametrize('name', NAMES)
def test_validate_accepts_every_config_file(name):
    module = importlib.import_module(f'configs.{name}')
    validation.validate(module.get_config())
    assert f'--config=configs/{name}.py' in module.__doc__
    for attack in attacks.NAMES:
        config = module.get_config(attack)
        validation.validate(config)
        assert config.attack.name == attack
        assert resolve(config).aft_released.to_dict() == {'preset': 'released'} | AFT_PRESETS['released']


def test_resolve_fills_empty_fields_from_the_preset():
    config = default_config()
    config.aft_universal.update({'preset': 'released', 'eps': 0.5})
    options = resolve(config).aft_universal
    assert options.to_dict() == {'preset': 'released'} | AFT_PRESETS['released'] | {'eps': 0.5}
    assert config.aft_universal.clip is None and default_config().aft_universal.eps is None
    assert all(value is not None for value in options.to_dict().values())
    assert all(preset.keys() == AFT_PRESETS['default'].keys() for preset in AFT_PRESETS.values())
    assert set(default_config().aft_universal.keys()) == {'preset', *AFT_PRESETS['default']}


def test_validate_accepts_the_defaults_and_every_preset():
    """The defaults, and the values of every preset, pass the checks that stand beside them."""
    validation.validate(default_config())
    for preset in AFT_PRESETS:
        config = default_config()
        for section in AFT_SECTIONS:
            config[section].preset = preset
        config = resolve(config)
        validation.validate(config)
        assert {name: type(value) for name, value in config.aft_universal.items()} == {
            'preset': str,
            **{name: ALL_FIELDS[f'aft_universal.{name}'].default for name in AFT_PRESETS[preset]},
        }


def test_help_config_prints_every_field(capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '80')
    assert main.main(['aft_jax.main', '--config=configs/quickstart.py', '--help-config']) == 0
    text = capsys.readouterr().out
    assert main.main(['aft_jax.main', '--help-config']) == 0
    assert capsys.readouterr().out == text
    assert sorted(ALL_FIELDS) == sorted(flatten_dict(default_config().to_dict(), sep='.'))
    words = ' '.join(text.split())
    for name, field in ALL_FIELDS.items():
        assert f'\n{name} = ' in text, name
        rule = f' It {field.check.rule}.' if field.check else ''
        assert len(field.doc) > 5 and ' '.join(f'{field.doc}{rule}'.split()) in words, name
    for choice in (*BUILTIN, *DEFENSES, *attacks.NAMES, *SCHEDULES, *AFT_PRESETS):
        assert choice in words
    assert 'data.size = 0\n    Side in pixels' in text
    assert 'aft_universal.pgd_steps = 7 (released), 4 (default), 4 (small)\n' in text


def test_split_names_gives_each_name_once():
    assert split_names(' aft, ft,aft,,') == ['aft', 'ft'] and split_names('') == []


def test_names_of_explains_the_first_wrong_name():
    check = names_of('linf', 'l2', 'warp')
    check.verify('aft.universal', 'linf, linf,warp')
    check.verify('aft.universal', '')
    with pytest.raises(UserError, match=r"^aft.universal='wrap' does not exist; .* Did you mean 'warp'\?$"):
        check.verify('aft.universal', 'linf,wrap,worp')


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        *[('mcr.candidates', value) for value in ((), (0.0, 0.5), (0.5, 1.0))],
        *[('ft.learning_rates', value) for value in ((), (0.1, 0.1), (0.2, 0.1), (0.0, 0.1))],
        *[('nad.betas', value) for value in ((), (1.0, -1.0))],
        *[('clean_share', value) for value in (0.0, 1.01)],
        *[('model.dropout', value) for value in (-0.1, 1.0)],
        *[('seed', value) for value in (-1, 2**32)],
        *[('data.size', value) for value in (-1, 4097)],
        *[('attack.sig.delta', value) for value in (0.0, 1.01)],
        ('fst.alpha', -1e-9),
        ('d3.weight', 0.0),
        ('rnp.stop_accuracy', 1.01),
        ('attack.wanet.grid', 1),
        ('batch_size', 0),
        ('train.momentum', 1.0),
        ('train.weight_decay', -1e-9),
        ('stages', ('infect', 'hope')),
        ('run.placement', 'moon'),
    ],
)
def test_field_checks_refuse_what_is_just_outside(name, value):
    field: Field = ALL_FIELDS[name]
    assert field.check is not None
    field.check.verify(name, field.default)
    with pytest.raises(UserError, match=f'^{name}='):
        field.check.verify(name, value)
