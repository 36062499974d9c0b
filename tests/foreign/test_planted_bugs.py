"""Bugs planted in libraries are caught and named rightly, where the libraries are installed."""

from __future__ import annotations

import re

import pytest

from foreign_bugs import PLANTED, SCENARIOS, judged, names_of

# The adapter gives a causal mask of its own; of two methods that reorder, the right one is used.
MISSED = ("curated-mask", "hf-select")
# Nothing of Keras can be watched, and what its tokens see takes longer to find than there is time.
UNNAMED = ("keras-window",)
# A scenario takes seconds: one in which the bug shows and is named will do.
SHOWN_IN = {
    "hf-softcap": "rows",
    "hf-window": "rows",
    "hf-position": "rows",
    "hf-crop": "crop",
}


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.filterwarnings("ignore")
def test_a_bug_planted_in_a_library_is_caught_and_named(name: str) -> None:
    bug = PLANTED[name]
    if not bug.installed:
        pytest.skip(f"{bug.package} is not installed")
    found = judged(bug, [SHOWN_IN[name]] if name in SHOWN_IN else SCENARIOS)
    assert bool(found.wrong) is (name not in MISSED), str(found)
    names = names_of(found)
    assert all(re.search(bug.named, said) for said in names), str(found)
    assert bool(names) is (name not in MISSED + UNNAMED), str(found)
