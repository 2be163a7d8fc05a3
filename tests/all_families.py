"""A whole run with an LM of every family (make test-all); tests/test_families.py has six."""

import pytest
from test_families import FAMILIES, check_whole_run


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_run_measures_what_whole_passes_measure(family, tmp_path):
    check_whole_run(family, tmp_path)
