import pytest

from tiered import policies
from tiered.cache.floors import check_budget
from tiered.policies import Space


def check(capacity, policy):
    space = Space(capacity, (0, 100, 120, 100))
    return check_budget(space, 2, policies.create(policy, space))


def test_below_one_layer_is_refused_with_the_number_that_works():
    with pytest.raises(MemoryError, match="at least 240 bytes"):
        check(239, "keep_last")
    assert check(240, "keep_last")


def test_below_one_token_cycle_is_warned_about():
    (warning,) = check(639, "lru")
    assert "layer_lru" in warning
    (warning,) = check(639, "layer_lru")
    assert "layer_lru" not in warning
    assert check(640, "lru") == []
