"""The registry of experiments."""

from attnrobust.errors import UnknownNameError
from attnrobust.reproduce.experiment import Experiment
from attnrobust.reproduce.experiments import (
    castin2023_splitting,
    castin2024_growth,
    castin2024_masked,
    castin2024_meanfield,
    kim2021_invertible,
    kim2021_language,
    kim2021_lipschitz,
    trained_radii,
    vuckovic2020,
)

EXPERIMENTS: tuple[Experiment, ...] = (
    castin2024_growth.EXPERIMENT,
    castin2024_masked.EXPERIMENT,
    castin2024_meanfield.EXPERIMENT,
    castin2023_splitting.EXPERIMENT,
    kim2021_lipschitz.EXPERIMENT,
    kim2021_invertible.EXPERIMENT,
    kim2021_language.EXPERIMENT,
    vuckovic2020.EXPERIMENT,
    trained_radii.EXPERIMENT,
)


def experiment_named(name: str) -> Experiment:
    """The experiment of a name.

    Raises:
        UnknownNameError: There is none; names the nearest.
    """
    for experiment in EXPERIMENTS:
        if experiment.name == name:
            return experiment
    raise UnknownNameError("experiment", name, [experiment.name for experiment in EXPERIMENTS])
