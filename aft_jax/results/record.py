"""The results of an experiment as a value, and results.json, the file that scripts and people read.

Shares are in 0..1 and times in seconds. A share that does not exist is None, such as the ASR without an attack.
"""

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import ml_collections

from aft_jax import files
from aft_jax.config import BENIGN
from aft_jax.evaluation.scores import PoisonDetection, Scores, defense_effectiveness
from aft_jax.results.drawn_trigger import DrawnTrigger

SCHEMA = 1
# The size of the adversarial examples of a scan that tables and model cards show.
SHOWN_EPS = 8 / 255
Kind = Literal['infected', 'benign', 'given']


class Setting(NamedTuple):
    """The fields that identify an experiment. A given model has the attack 'none'; its real attack is unknown."""

    dataset: str
    model: str
    attack: str
    label_mode: str
    seed: int
    clean_share: float

    @classmethod
    def of(cls, config: ml_collections.ConfigDict) -> Self:
        """Collects the fields from a resolved config."""
        names = config.dataset, config.model.name, config.attack.name, config.attack.label_mode
        return cls(*names, config.seed, config.clean_share)


class GivenFacts(NamedTuple):
    """Facts about a given model.

    Attributes:
        init_from: Path of the model.
        class_names: Names of the classes.
        warning: Problem that the user should look at, or ''.
        doubt: Reason for which the clean images may ruin the model, or ''.
        tainted: Indices of the images that look tainted and were left out, by part: 'training' and 'evaluation'.
    """

    init_from: str
    class_names: tuple[str, ...]
    warning: str
    doubt: str = ''
    tainted: dict[str, list[int]] = {}


@dataclasses.dataclass(frozen=True)
class ModelScores:
    """Scores of one model.

    Attributes:
        acc: Clean accuracy.
        asr: Attack success rate.
        ra: Robust accuracy.
        cross_acc: Accuracy in the attack's cross mode.
        per_class: ACC, ASR and RA by true class; K values each.
        seconds: Time of the training; None for a given model.
        scan: Result of the scan as plain values; None without a scan.
    """

    acc: float
    asr: float | None = None
    ra: float | None = None
    cross_acc: float | None = None
    per_class: dict[str, list[float | None]] = dataclasses.field(default_factory=dict)
    seconds: float | None = None
    scan: dict[str, Any] | None = None

    @classmethod
    def of(cls, scores: Scores, seconds: float | None = None, **more: Any) -> Self:
        """Converts measured scores.

        Args:
            scores: Scores of the model, with NaN for what does not exist.
            seconds: Time of the training; None for a given model.
            **more: Values of further fields.
        """
        arrays = {'acc': scores.acc_per_class, 'asr': scores.asr_per_class, 'ra': scores.ra_per_class}
        return cls(
            acc=float(scores.acc),
            asr=_without_nan(scores.asr),
            ra=_without_nan(scores.ra),
            cross_acc=_without_nan(scores.cross_acc),
            per_class={name: [_without_nan(x) for x in array] for name, array in arrays.items()},
            seconds=None if seconds is None else round(seconds, 3),
            **more,
        )

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """Reads the scores from their fields in results.json. Fields that an older version did not write are None."""
        names = {field.name for field in dataclasses.fields(cls)}
        for name in ('acc', 'asr', 'ra', 'cross_acc', 'seconds', 'der'):
            if not isinstance(fields.get(name), int | float | None):
                raise TypeError(f'{name} is no number')
        for name in ('per_class', 'scan'):
            if not isinstance(fields.get(name), dict | None):
                raise TypeError(f'{name} is no object')
        return cls(**{name: value for name, value in fields.items() if name in names})

    def to_json(self) -> dict[str, Any]:
        """Converts the scores to their fields in results.json."""
        shares = {'acc': self.acc, 'asr': self.asr, 'ra': self.ra, 'cross_acc': self.cross_acc}
        rest = {'seconds': self.seconds, 'per_class': self.per_class}
        return shares | rest | ({'scan': self.scan} if self.scan is not None else {})

    def share(self, name: str) -> float | None:
        """Returns the score with this name; None if the model does not have it."""
        return getattr(self, name, None)


@dataclasses.dataclass(frozen=True)
class PurifiedScores(ModelScores):
    """Scores of a purified model; `seconds` is the time of the defense.

    Attributes:
        der: Defense effectiveness rating.
        detection: Detection of the poisoned images, by a defense that has the untrusted training set instead of clean
            images; otherwise None.
    """

    der: float | None = None
    detection: PoisonDetection | None = None

    @classmethod
    def compared(
        cls,
        before: Scores,
        after: Scores,
        seconds: float,
        *,
        detection: PoisonDetection | None = None,
        scan: dict[str, Any] | None = None,
    ) -> Self:
        """Converts the scores of a purified model, and computes its DER.

        Args:
            before: Scores of the model before the purification.
            after: Scores of the purified model.
            seconds: Time of the defense.
            detection: Detection of the poisoned images, or None.
            scan: Result of the scan, or None.
        """
        rating = _without_nan(defense_effectiveness(before, after))
        return cls.of(after, seconds, der=rating, detection=detection, scan=scan)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """Reads the scores from their fields in results.json."""
        scores = super().from_json(fields)
        if 'aucs' not in fields:
            return scores
        aucs = tuple(math.nan if auc is None else auc for auc in fields['aucs'])
        return dataclasses.replace(scores, detection=PoisonDetection(tuple(fields['poisoned_shares']), aucs))

    def to_json(self) -> dict[str, Any]:
        """Converts the scores to their fields in results.json."""
        fields = super().to_json() | {'der': self.der}
        if self.detection is not None:
            fields |= {
                'clean_share': 0.0,
                'poisoned_shares': list(self.detection.poisoned_shares),
                'aucs': [_without_nan(auc) for auc in self.detection.aucs],
            }
        return fields


@dataclasses.dataclass
class Results:
    """Results of an experiment.

    Attributes:
        setting: Fields that identify the experiment.
        environment: Versions and devices of the last start, by name.
        initial: Scores of the first model: the infected, benign or given one.
        given: Facts about the given model; None if the experiment trained the first model itself.
        purified: Scores by defense, in the order in which the defenses were first measured.
        observation: Measurements on adversarial examples of the first model, and in 'purified' those of each defense.
            None without a report or a known trigger.
        trigger: Random trigger; None for other attacks, and in files of older versions.
        withheld: Reason for which a purified model is not exported, by defense.
    """

    setting: Setting
    environment: dict[str, Any]
    initial: ModelScores
    given: GivenFacts | None = None
    purified: dict[str, PurifiedScores] = dataclasses.field(default_factory=dict)
    observation: dict[str, Any] | None = None
    trigger: DrawnTrigger | None = None
    withheld: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        """Kind of the first model."""
        if self.given is not None:
            return 'given'
        return 'benign' if self.setting.attack == BENIGN else 'infected'

    @property
    def first_model(self) -> str:
        """Name of the first model in tables and figures: infected, benign or suspect."""
        return 'suspect' if self.kind == 'given' else self.kind

    @property
    def models(self) -> dict[str, ModelScores]:
        """Scores by model, the first model first."""
        return {self.first_model: self.initial, **self.purified}

    def withhold(self, largest_loss: float) -> None:
        """Finds the purified models of a given one that should not be exported, and the reasons.

        Args:
            largest_loss: Accuracy on held-out clean images that a model may lose.
        """
        assert self.given is not None
        self.withheld = {}
        for name, scores in self.purified.items():
            loss = self.initial.acc - scores.acc
            if self.given.doubt:
                self.withheld[name] = self.given.doubt
            elif loss > largest_loss:
                self.withheld[name] = (
                    f'it loses {100 * loss:.1f} points of accuracy on held-out clean images, and '
                    f'{100 * largest_loss:g} are allowed (safety.largest_loss)'
                )

    def keep_earlier(self, earlier: 'Results') -> None:
        """Takes over the purified models and the observation of an earlier start in the same work directory."""
        self.purified = dict(earlier.purified)
        self.observation = earlier.observation

    def add_purified(self, defense: str, scores: PurifiedScores) -> None:
        """Adds the scores of a purified model.

        The seconds that an earlier start recorded are kept. A finished defense is loaded from its checkpoint, so the
        time of this start would be misleading.
        """
        recorded = self.purified[defense].seconds if defense in self.purified else None
        self.purified[defense] = scores if recorded is None else dataclasses.replace(scores, seconds=recorded)

    def add_observation(self, measured: dict[str, Any]) -> None:
        """Adds the measurements of the first model and, in 'purified', of the defenses of this start.

        The measurements of other defenses, from earlier starts, are kept.
        """
        earlier = (self.observation or {}).get('purified', {})
        self.observation = measured | {'purified': earlier | measured['purified']}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """Reads the content of results.json.

        Raises:
            ValueError: It is damaged.
        """
        try:
            setting = Setting(*(fields[name] for name in Setting._fields))
            given, first = fields.get('suspect'), fields['infected']
            facts = None
            if given is not None:
                names, more = (
                    tuple(given['class_names']),
                    {name: given[name] for name in ('doubt', 'tainted') if name in given},
                )
                facts, first = GivenFacts(given['init_from'], names, given['warning'], **more), given
            trigger, observation = fields.get('trigger'), fields.get('connection')
            if not isinstance(fields['environment'], dict) or not isinstance(observation, dict | None):
                raise TypeError('environment or connection is no object')
            return cls(
                setting,
                fields['environment'],
                ModelScores.from_json(first),
                facts,
                {name: PurifiedScores.from_json(row) for name, row in fields['purified'].items()},
                observation,
                None if trigger is None else DrawnTrigger(**trigger),
                dict(fields.get('withheld', {})),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'no results of an experiment: {error!r}') from error

    def to_json(self) -> dict[str, Any]:
        """Converts the results to the content of results.json. 'infected' is empty for a given model."""
        fields: dict[str, Any] = {'schema': SCHEMA, **self.setting._asdict()}
        if self.trigger is not None:
            fields['trigger'] = self.trigger._asdict()
        fields['infected'] = self.initial.to_json() if self.given is None else {}
        fields['purified'] = {name: scores.to_json() for name, scores in self.purified.items()}
        if self.withheld:
            fields['withheld'] = self.withheld
        fields['environment'] = self.environment
        if self.observation is not None:
            fields['connection'] = self.observation
        if self.given is not None:
            scores = self.initial.to_json()
            del scores['seconds']
            fields['suspect'] = {**self.given._asdict(), **scores}
        return fields


def read(path: Path) -> Results:
    """Reads a results.json.

    Raises:
        OSError: It cannot be read.
        ValueError: It is damaged.
    """
    return Results.from_json(json.loads(path.read_text(encoding='utf-8')))


def read_or_set_aside(path: Path, writes: bool) -> Results | None:
    """Reads the results.json of an earlier start; None if there is none. A damaged one is set aside.

    Args:
        path: Path of the file.
        writes: Whether this process may rename a damaged file.
    """
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        if writes:
            files.set_aside(path, ' '.join(str(error).split()))
        return None


def featured(defenses: Iterable[str]) -> str:
    """Chooses the defense that the verdict is about, without using its scores: AFT, or else the last one."""
    names = list(defenses)
    return 'aft' if 'aft' in names else names[-1]


def percent(share: float | None) -> str:
    """Formats a share as '97.1 %' with a non-breaking space. A share that does not exist becomes a dash."""
    return '–' if share is None else f'{100 * share:.1f}\u00a0%'


def _without_nan(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
