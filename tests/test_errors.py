import inspect

import pytest

from attnrobust import errors
from attnrobust.errors import AttnRobustError, InputError, UnknownNameError
from tests.assertions import refused


def test_every_error_has_one_root() -> None:
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__]
    assert len(classes) >= 7
    assert [c.__name__ for c in classes if not issubclass(c, AttnRobustError)] == []


def test_what_the_user_can_cure_is_a_value_error() -> None:
    assert issubclass(InputError, ValueError)
    for name in ("UnsupportedModelError", "UnsupportedThreatError", "UnknownNameError", "AlreadyViolatedError"):
        assert issubclass(getattr(errors, name), InputError), name


def test_an_unsound_result_is_not_the_users_fault() -> None:
    assert not issubclass(errors.SoundnessError, InputError)


def test_unknown_name_lists_the_nearest_first() -> None:
    layers = ["encoder.layer.0.attention", "encoder.layer.1.attention", "pooler"]
    error = UnknownNameError("layer", "encoder.layer.1.atention", layers)
    assert error.nearest[0] == "encoder.layer.1.attention"
    assert (error.kind, error.name) == ("layer", "encoder.layer.1.atention")
    with refused(UnknownNameError, "unknown layer", "encoder.layer.1.atention", "encoder.layer.1.attention"):
        raise error


def test_unknown_name_shows_some_names_where_none_is_near() -> None:
    error = UnknownNameError("threat", "zzz", [f"name{i:02d}" for i in range(30)])
    assert error.nearest == tuple(f"name{i:02d}" for i in range(10))


def test_unknown_name_among_nothing() -> None:
    with refused(UnknownNameError, "none exist"):
        raise UnknownNameError("layer", "x", [])


def test_unknown_name_takes_any_iterable_once() -> None:
    assert UnknownNameError("layer", "ab", iter(["abc", "xyz"])).nearest == ("abc",)


def test_input_errors_are_caught_as_value_errors() -> None:
    with pytest.raises(ValueError, match="tolerance"):
        raise InputError("tolerance must be a positive number; got 0")
