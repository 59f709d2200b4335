"""The trace predicts the last pass of the same kind, and no prediction ever fails."""

from hypothesis import given
from hypothesis import strategies as st

from offload.swap.trace import Trace

KEYS = st.sampled_from("abcdef")
ORDERS = st.lists(KEYS, unique=True)
ACTIONS = st.lists(
    st.tuples(st.just("use"), KEYS)
    | st.tuples(st.just("begin"), st.sampled_from([True, False]))
    | st.tuples(st.just("end"), st.none())
    | st.tuples(st.just("use"), st.just("stranger"))
)
USES = st.lists(KEYS, min_size=1)


def apply(trace, action, value):
    if action == "use":
        trace.use(value)
    elif action == "begin":
        trace.begin(value)
    else:
        trace.end()


def collapsed(keys):
    """Repeated uses of one key in a row are one use."""
    return [key for index, key in enumerate(keys) if index == 0 or keys[index - 1] != key]


@given(order=ORDERS, actions=ACTIONS)
def test_distances_agree_with_what_is_upcoming(order, actions):
    trace = Trace(order)
    for action, value in actions:
        apply(trace, action, value)
        upcoming = list(trace.upcoming())
        for key in [*"abcdef", "stranger"]:
            if key in upcoming:
                assert trace.distance(key) == upcoming.index(key)
            else:
                assert trace.distance(key) > len(upcoming)


@given(order=ORDERS)
def test_the_first_pass_is_predicted_as_the_order_and_back(order):
    trace = Trace(order)
    for key in order:
        assert trace.distance(key) == order.index(key)
    assert list(trace.upcoming()) == order + order[::-1]
    trace.begin("training")
    assert list(trace.upcoming()) == order + order[::-1]


@given(order=ORDERS, first=USES, other=USES)
def test_a_pass_is_predicted_to_repeat_the_last_of_its_kind(order, first, other):
    trace = Trace(order)
    trace.begin("training")
    for key in first:
        trace.use(key)
    trace.begin("evaluation")
    for key in other:
        trace.use(key)
    trace.begin("training")
    expected = collapsed(first)
    assert list(trace.upcoming()) == expected
    for index, key in enumerate(expected):
        assert trace.distance(key) == 0
        trace.use(key)
        assert list(trace.upcoming()) == expected[index + 1 :]
    trace.begin("evaluation")
    assert list(trace.upcoming()) == collapsed(other)


@given(order=ORDERS, uses=USES)
def test_nothing_is_predicted_between_passes(order, uses):
    trace = Trace(order)
    trace.begin("training")
    for key in uses:
        trace.use(key)
    trace.end()
    assert list(trace.upcoming()) == []
    trace.use("a")
    assert list(trace.upcoming()) == []


@given(uses=USES)
def test_an_empty_pass_teaches_nothing(uses):
    trace = Trace("abc")
    trace.begin("training")
    for key in uses:
        trace.use(key)
    trace.begin("training")
    trace.end()
    trace.begin("training")
    assert list(trace.upcoming()) == collapsed(uses)


@given(st.lists(KEYS, min_size=3), st.data())
def test_a_stranger_leaves_the_prediction_where_it_is(uses, data):
    trace = Trace(())
    trace.begin(1)
    for key in uses:
        trace.use(key)
    trace.begin(1)
    for key in collapsed(uses)[: data.draw(st.integers(0, 2))]:
        trace.use(key)
    before = list(trace.upcoming())
    trace.use("stranger")
    assert list(trace.upcoming()) == before


def test_a_skipped_use_is_skipped_in_the_prediction_too():
    trace = Trace("abcd")
    trace.use("a")
    trace.use("c")
    assert list(trace.upcoming()) == ["d", "d", "c", "b", "a"]
    assert trace.distance("b") == 3


@given(order=ORDERS, uses=USES, other=USES)
def test_the_first_pass_of_a_kind_may_be_told(order, uses, other):
    trace = Trace(order)
    trace.begin("in turns", uses)
    assert list(trace.upcoming()) == uses
    for key in other:
        trace.use(key)
    trace.begin("in turns", uses)  # what was seen counts more than what was told
    assert list(trace.upcoming()) == collapsed(other)
