import pytest

from ballast.errors import GuardError
from ballast.rewards.outage import stop_above_limit


def test_a_share_at_the_limit_passes_and_one_above_it_stops():
    stop_above_limit(2, 8, 0.25, "rules", None, "at step 3")  # 2/8 = 0.25
    stop_above_limit(29, 100, 0.29, "rules", None, "at step 3")  # though 0.29 * 100 = 28.999... in floats
    with pytest.raises(
        GuardError, match=r"'rules' left 3 of 8 completions \(38%\) unscored at step 3.*first reason: OOM"
    ):
        stop_above_limit(3, 8, 0.25, "rules", "OOM", "at step 3")


def test_nothing_asked_and_nothing_left_out_never_stop():
    # Passing is returning: it raises where it stops.
    assert stop_above_limit(0, 0, 0.0, "rules", None, "at step 0") is None
    assert stop_above_limit(0, 8, 0.0, "rules", None, "at step 0") is None


def test_one_unscored_completion_stops_where_none_is_allowed():
    with pytest.raises(GuardError, match="not known here"):
        stop_above_limit(1, 100, 0.0, "rules", None, "in the test set")
