"""What a defender does: one file a defense.

Threat model: the defender holds the suspect model and a few clean, labelled images, or (PBE) the suspect training set,
not knowing which of its images are poisoned. It never sees a trigger, a target label or the test set. Nothing in this
folder imports aft_jax.attacks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from aft_jax.defenses import aft, anp, fp, ft, mcr, nad, pbe
from aft_jax.defenses.defender import DefenderData

__all__ = ['DEFENSES', 'FROM_SUSPECT_SET', 'NEED_FEATURES', 'DefenderData']

# (run, stage, data, config) -> what holds the purified state, and the seconds
DEFENSES: dict[str, Callable[..., Any]] = {
    'ft': ft.purify,
    'aft': aft.purify,
    'aft_released': partial(aft.purify, section='aft_released'),
    'nad': nad.purify,
    'mcr': mcr.purify,
    'fp': fp.purify,
    'anp': anp.purify,
    'pbe': pbe.purify,
}
# These hold the suspect training set, and no image that is known to be clean.
FROM_SUSPECT_SET = ('pbe',)
# These ask the classifier for its feature maps, which a module of the user's own need not give.
NEED_FEATURES = ('fp', 'nad')
