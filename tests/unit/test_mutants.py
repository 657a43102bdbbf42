"""The edits of `make mutants` still find what they break."""

import pytest

from tests.faults.mutants import MUTANTS, ROOT


@pytest.mark.parametrize("name", MUTANTS)
def test_each_edit_finds_its_place_once(name: str) -> None:
    for edit in MUTANTS[name]:
        assert (ROOT / edit.path).read_text().count(edit.found) == 1, edit.path
