"""The standard protocol: what it fixes, and the runs that it makes."""

from pathlib import Path

import pytest

from attnrobust.attacks.registry import attack_named
from attnrobust.certify.registry import METHODS
from attnrobust.errors import InputError, UnknownNameError
from attnrobust.runs.protocol import STANDARD, protocol_configs, protocol_named, refuse_options
from attnrobust.runs.protocol_result import digest_of
from tests.runs.test_run import configured, write_files


def test_version_1_never_changes() -> None:
    assert STANDARD.version == 1
    assert digest_of(STANDARD.as_dict()) == "266a10bbe5d47898bfd6f00cb08ef3bac39ba4408e8f17dc6b0b5ea105466a01"


def test_every_name_exists() -> None:
    assert set(STANDARD.certificates) <= {method.name for method in METHODS}
    for attack in STANDARD.attacks:
        attack_named(attack.name)


def test_what_changes_numbers_is_replaced(tmp_path: Path) -> None:
    given = configured(write_files(tmp_path), seed=5, threats=["any-token"], attack={"seconds": 1.0})
    first, second = protocol_configs(STANDARD, given)
    assert first.certificates == STANDARD.certificates
    assert second.certificates == ()
    for config, attack in zip((first, second), STANDARD.attacks, strict=True):
        assert (config.seed, config.threats, config.attack.seconds) == (0, STANDARD.threats, None)
        assert (config.attack.method, config.attack.restarts, config.attack.steps) == (attack.name, 8, 60)
    assert first.output != second.output


def test_options_are_refused_by_name() -> None:
    refuse_options(STANDARD, {"--seed": None})
    with pytest.raises(InputError, match="--seed, --queries"):
        refuse_options(STANDARD, {"--seed": 3, "--row": None, "--queries": 9})
    with pytest.raises(UnknownNameError, match="standard"):
        protocol_named("standart")
