"""Every certificate for perturbed token measures by name."""

from attnrobust.certify.measures.ball import MeasureBall
from attnrobust.certify.measures.cluster import MeasureCluster
from attnrobust.certify.measures.copies import MeasureCopies
from attnrobust.certify.measures.curvature import MeasureCurvature
from attnrobust.certify.measures.local import MeasureLocal
from attnrobust.certify.measures.method import MeasureMethod
from attnrobust.errors import UnknownNameError

ALL_MEASURE_METHODS: tuple[MeasureMethod, ...] = (
    MeasureBall(),
    MeasureLocal(),
    MeasureCurvature(),
    MeasureCluster(),
    MeasureCopies(),
)
"""``certify`` with a threat on measures runs all that apply unless names are given."""


def measure_method_named(name: str) -> MeasureMethod:
    """Look a certificate up by its name; UnknownNameError lists the nearest ones."""
    known = {method.name: method for method in ALL_MEASURE_METHODS}
    if name not in known:
        raise UnknownNameError("certificate for measures", name, known)
    return known[name]
