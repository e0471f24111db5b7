"""Every config file is a valid one, for every attack."""

import importlib
from pathlib import Path

import pytest
from command import ROOT

from aft_jax import attacks, validation
from aft_jax.config import AFT_PRESETS, default_config, resolve

# purify.py is for a model without an attack (test_purify.py).
NAMES = sorted(path.stem for path in Path(ROOT / 'configs').glob('*.py') if path.stem not in ('__init__', 'purify'))


@pytest.mark.parametrize('name', NAMES)
def test_every_config_is_valid(name):
    module = importlib.import_module(f'configs.{name}')
    validation.validate(module.get_config())
    assert f'--config=configs/{name}.py' in module.__doc__
    for attack in attacks.NAMES:
        config = module.get_config(attack)
        validation.validate(config)
        assert config.attack.name == attack
        config.aft.preset = 'released'
        assert resolve(config).aft.to_dict() == {'preset': 'released'} | AFT_PRESETS['released']


def test_a_preset_fills_what_the_config_leaves_open():
    config = default_config()
    config.aft.preset = 'released'
    config.aft.eps = 0.5
    resolved = resolve(config)
    assert resolved.aft.eps == 0.5 and resolved.aft.adversarial_epochs == 3.0 and resolved.aft.clip is False
    assert config.aft.clip is None
    assert all(value is not None for value in resolved.aft.to_dict().values())
    assert all(preset.keys() == AFT_PRESETS['default'].keys() for preset in AFT_PRESETS.values())
    assert set(default_config().aft.keys()) == {'preset', *AFT_PRESETS['default']}
    assert resolve(default_config()).aft_released.to_dict() == {'preset': 'released'} | AFT_PRESETS['released']
