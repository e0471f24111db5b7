"""Defenses: one file each.

Threat model: the defender holds the infected model and a few clean, labelled images, or the untrusted training set
without knowing which of its images are poisoned. It never sees a trigger, a target label or the test set. Nothing in
this folder imports aft_jax.attacks.

To add a defense, write its file, add its line to DEFENSES, and add the defaults of its options to
`config/defenses.py`, in a section with the name of the entry.
"""

from aft_jax.defenses import aft, aft_universal, anp, clp, d3, fp, fst, ft, ft_sam, i_bau, mcr, nad, pbe, rnp, sau
from aft_jax.defenses.defender import DefenderData, Defense, DefenseSettings, PoisonScores, Purified

__all__ = ['DEFENSES', 'DefenderData', 'Defense', 'DefenseSettings', 'PoisonScores', 'Purified']

DEFENSES: dict[str, Defense] = {
    'ft': Defense(ft.purify, ft.FtOptions),
    'ft_sam': Defense(ft_sam.purify, ft_sam.FtSamOptions),
    'fst': Defense(fst.purify, fst.FstOptions, needs_head=True),
    'd3': Defense(d3.purify, d3.D3Options, needs_head=True),
    'aft': Defense(aft.purify, aft.AftOptions),
    'aft_universal': Defense(aft_universal.purify, aft_universal.UniversalAftOptions),
    'aft_released': Defense(aft_universal.purify, aft_universal.UniversalAftOptions),
    'nad': Defense(nad.purify, nad.NadOptions, needs_feature_maps=True),
    'mcr': Defense(mcr.purify, mcr.McrOptions),
    'fp': Defense(fp.purify, ft.FtOptions, needs_feature_maps=True),
    'anp': Defense(anp.purify, anp.AnpOptions),
    'sau': Defense(sau.purify, sau.SauOptions),
    'i_bau': Defense(i_bau.purify, i_bau.IbauOptions),
    'rnp': Defense(rnp.purify, rnp.RnpOptions),
    'clp': Defense(clp.purify, clp.ClpOptions),
    'pbe': Defense(pbe.purify, pbe.PbeOptions, trains_on='untrusted_training_set'),
}
