import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiered.text.stop_strings import StopStrings


def run(stop, pieces):
    stops = StopStrings(stop)
    shown = "".join(stops.push(piece) for piece in pieces)
    return shown + stops.finish(), stops.stopped


def naive(stop, text):
    """The first stop string to be complete ends the text before its start."""
    for end in range(len(text) + 1):
        for start in range(end):
            if text[start:end] in stop:
                return text[:start], True
    return text, False


@pytest.mark.parametrize(
    ("stop", "pieces", "text", "stopped"),
    [
        ([], ["a", "b"], "ab", False),
        (["END"], ["one E", "N", "D two"], "one ", True),
        (["END"], ["one E", "N", "X"], "one ENX", False),
        (["END"], ["EN", "EN", "D"], "EN", True),
        (["\n\n"], ["a\n", "b\n", "\nc"], "a\nb", True),
        (["abc", "b"], ["xab"], "xa", True),
        ("stop", ["full stop here"], "full ", True),  # one text is one stop string
    ],
)
def test_stop_strings(stop, pieces, text, stopped):
    assert run(stop, pieces) == (text, stopped)


def test_text_is_shown_as_soon_as_it_can_be():
    stops = StopStrings(["User:"])
    assert [stops.push(p) for p in ("Hello ", "Us", "eful", " Us", "er", ": x", "y")] == [
        "Hello ", "", "Useful", " ", "", "", "",
    ]  # fmt: skip
    assert stops.stopped and stops.finish() == ""


@given(
    stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    pieces=st.lists(st.text("abc", max_size=4), max_size=8),
)
def test_cuts_do_not_matter(stop, pieces):
    assert run(stop, pieces) == naive(stop, "".join(pieces))


@pytest.mark.parametrize("stop", [[""], [b"x"], [3]])
def test_bad_stop_strings(stop):
    with pytest.raises(ValueError, match="stop strings must be"):
        StopStrings(stop)
