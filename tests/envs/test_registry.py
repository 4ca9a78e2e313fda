"""Families by name, and what their options change."""

from __future__ import annotations

import pytest

from untwine.envs.pool import EnvPool
from untwine.envs.protocol import EnvInfo
from untwine.envs.registry import get_catalogue, get_family, make_env
from untwine.errors import EnvError

TITLES = {
    "alfworld": "ALFWorld (synthetic games)",
    "babyai": "BabyAI",
    "rooms": "rooms",
    "scienceworld": "ScienceWorld",
    "textworld": "TextWorld",
}


def test_every_family_has_a_title() -> None:
    assert {name: get_catalogue(name).info.title for name in TITLES} == TITLES
    info = EnvInfo("mine", deterministic=True, snapshots=True, lists_commands=True, has_expert=True)
    assert info.title == "mine"


@pytest.mark.parametrize("name", TITLES)
def test_the_default_catalogue_is_that_of_no_options(name: str) -> None:
    family, catalogue = get_family(name), get_catalogue(name, {"list_commands": True})
    assert catalogue.info == family.catalogue.info
    assert catalogue.tasks() == family.catalogue.tasks()
    assert (catalogue is family.catalogue) == (family.catalogue_for is None)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("romms", {}, "unknown environment 'romms'.*Did you mean 'rooms'"),
        ("rooms", {"roms": 3}, "environment 'rooms' has no option 'roms'.*Did you mean 'rooms'"),
        ("alfworld", {"engin": "x"}, "has no option 'engin'.*Did you mean 'engine'"),
        ("alfworld", {"engine": "thor"}, "alfworld: option engine"),
    ],
)
def test_wrong_options_are_one_sentence(
    name: str, options: dict[str, object], message: str
) -> None:
    for call in (get_catalogue, make_env):
        with pytest.raises(EnvError, match=message):
            call(name, options)


def test_a_pool_knows_what_its_options_offer() -> None:
    options = {"engine": "textworld", "list_commands": True}
    with EnvPool("alfworld", options, workers=0, sessions=1, timeout_s=1.0) as pool:
        assert pool.info.remote
        assert pool.info.title.endswith(", real engine")
