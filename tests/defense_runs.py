"""Runs a defense on tiny data, with a record of the stages that it trains."""

import json
import time
from typing import NamedTuple

import jax
import numpy as np
import pytest

from aft_jax.config import resolve
from aft_jax.defenses import (
    DEFENSES,
    DefenderData,
    Purified,
    aft,
    aft_universal,
    anp,
    defender,
    fp,
    ft,
    ft_sam,
    i_bau,
    mcr,
    nad,
    new_head,
    reference,
    rnp,
    sau,
)
from aft_jax.pipeline.stages import defense_settings
from aft_jax.training.loop import fit
from aft_jax.training.stage import Fitted, Run, TrainingStage


class Trained(NamedTuple):
    """A stage that a defense has trained, and what came out."""

    stage: TrainingStage
    fitted: Fitted


def as_numpy(tree):
    return jax.tree.map(np.array, tree)


def lines(run: Run) -> list[dict]:
    """Reads metrics.jsonl."""
    return [json.loads(line) for line in (run.workdir / 'metrics.jsonl').read_text().splitlines()]


def record_stages(monkeypatch: pytest.MonkeyPatch) -> dict[str, Trained]:
    """Records every stage that a defense trains or loads from now on, by name."""
    recorded: dict[str, Trained] = {}

    def recording_fit(run: Run, stage: TrainingStage) -> Fitted:
        recorded[stage.name] = Trained(stage, fit(run, stage))
        return recorded[stage.name].fitted

    for module in (aft, aft_universal, anp, fp, ft, ft_sam, i_bau, mcr, nad, new_head, reference, rnp, sau):
        monkeypatch.setattr(module, 'fit', recording_fit)
    return recorded


def run_defense(name: str, run: Run, data: DefenderData, config) -> Purified:
    return DEFENSES[name].purify(run, f'purify/{name}', data, defense_settings(name, resolve(config)))


def run_twice(name: str, run: Run, data: DefenderData, config, monkeypatch) -> tuple[Purified, dict[str, Trained]]:
    """Runs a defense twice in one directory, and checks what holds for every defense with held-out images.

    The infected model stays as it was. Held-out images train nothing. Seconds count all stages. The second start loads
    every stage, takes no step, and comes to the same model.

    Returns:
        The result of the first start, and its stages.
    """
    infected = as_numpy(data.variables)
    recorded = record_stages(monkeypatch)
    started = time.monotonic()
    purified = run_defense(name, run, data, config)
    took = time.monotonic() - started
    first = dict(recorded)
    jax.tree.map(np.testing.assert_array_equal, as_numpy(data.variables), infected)
    _, held = defender.hold_out(data, config.tuning.held_out_share, run.seed)
    held_images = {image.tobytes() for image in held.images}
    assert held_images
    for stage, _ in first.values():
        assert not held_images & {image.tobytes() for image in stage.arrays['images']}
    trained = sum(fitted.seconds for _, fitted in first.values())
    assert trained < purified.seconds < took

    again = run_defense(name, run._replace(must_be_finished=True), data, config)
    jax.tree.map(np.testing.assert_array_equal, as_numpy(again.variables), as_numpy(purified.variables))
    assert list(recorded) == list(first)
    assert trained < again.seconds
    return purified, first
