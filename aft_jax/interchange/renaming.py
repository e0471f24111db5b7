"""What to do about keys of a file that are nearly those of a known network."""

import json
from collections.abc import Iterable

from aft_jax.interchange.torch_names import Naming

# Part of a key -> the call in PyTorch that makes plain weights of it.
REPARAMETRISED = {
    '.weight_mask': "torch.nn.utils.prune.remove(layer, 'weight')",
    '.weight_g': 'torch.nn.utils.remove_weight_norm(layer)',
    '.parametrizations.': "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')",
}
# Longest mapping that a sentence shows.
SHOWN = 6


def plain_weights_advice(names: Iterable[str]) -> str:
    """Says how to make plain weights of pruned or reparametrised ones; '' if there are none."""
    for name in names:
        for part, call in REPARAMETRISED.items():
            if part in name:
                return f'{name} is pruned or reparametrised: call {call} for every such layer, and save the state dict'
    return ''


def mapping_advice(naming: Naming, missing: list[str], extra: list[str]) -> str:
    """Builds the mapping file for keys that differ in the name of a layer alone; '' if they differ in more.

    Args:
        naming: Names of the nearest network.
        missing: Usual keys that the file lacks.
        extra: Keys in the file that the network does not have.
    """
    rest, mapping = list(extra), {}
    for key in missing:
        end = key.rpartition('.')[2]
        theirs = next((name for name in rest if name.rpartition('.')[2] == end), None)
        if theirs is None:
            return ''
        rest.remove(theirs)
        mapping[theirs] = naming.paths[key]
    if rest or not mapping or len(mapping) > SHOWN:
        return ''
    return f' If they are the same layers, this is the file: {json.dumps(mapping)}'
