"""What a defender does: one file a defense.

Threat model: the defender holds the suspect model and a few clean, labelled images, and never sees a trigger, a
target label, a poisoned image or the test set. Nothing in this folder imports aft_jax.attacks.
"""

from collections.abc import Callable

from aft_jax.defenses import aft, ft
from aft_jax.defenses.defender import Holdings
from aft_jax.training.loop import Fitted

__all__ = ['DEFENSES', 'Holdings']

# (run, stage, holdings, config) -> the purified state
DEFENSES: dict[str, Callable[..., Fitted]] = {'ft': ft.purify, 'aft': aft.purify}
