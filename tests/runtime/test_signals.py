"""Stop signals reach the open block and the blocks around it, and none before or after it."""

import signal

import pytest

from dinokit.runtime.log import watch
from dinokit.runtime.signals import STOP_SIGNALS, Stopped, stop_signals

pytestmark = pytest.mark.usefixtures("signals_given_back")


def items(number=None, at=0):
    """The items of three that are seen, when the signal comes with item `at`."""
    seen = []
    try:
        for each in watch(range(3), 3, "items"):
            seen.append(each)
            if number and each == at:
                signal.raise_signal(number)
    except Stopped:
        seen.append("stopped")
    return seen


@pytest.mark.parametrize("number", [signal.SIGINT, *STOP_SIGNALS])
def test_items_stop_where_that_is_listened_to_and_go_on_where_a_command_asks_for_itself(number):
    with stop_signals() as stop:
        assert items(number) == [0, 1, 2]
    assert stop.on_any_process()
    with stop_signals(between_items=True):
        assert items(number, at=1) == [0, 1, "stopped"]
    assert items() == [0, 1, 2]


@pytest.mark.parametrize("number", [signal.SIGINT, *STOP_SIGNALS])
def test_a_block_within_another_hears_alone_and_hands_on_what_it_heard_when_it_is_left(number):
    before = {signal.getsignal(each) for each in STOP_SIGNALS}
    with stop_signals(between_items=True) as outer:
        with stop_signals():
            assert items(number) == [0, 1, 2]
            assert not outer.on_this_process()
        assert items() == [0, "stopped"]
    assert {signal.getsignal(each) for each in STOP_SIGNALS} == (
        {signal.SIG_IGN} if number in STOP_SIGNALS else before
    )


def test_a_block_within_another_begins_with_what_that_one_heard():
    with stop_signals():
        signal.raise_signal(signal.SIGINT)
        with stop_signals() as inner:
            assert inner.on_this_process()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)


def test_an_outer_block_receives_signals_after_an_inner_one_without_signals():
    with stop_signals(between_items=True):
        with stop_signals():
            pass
        assert items() == [0, 1, 2]
        assert items(signal.SIGINT) == [0, "stopped"]


def test_a_second_ctrl_c_ends_at_once():
    with stop_signals(between_items=True):
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt) as caught:
            signal.raise_signal(signal.SIGINT)
    assert not isinstance(caught.value, Stopped)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_scheduler_that_repeats_itself_changes_nothing_when_the_block_is_left(number):
    ctrl_c = signal.getsignal(signal.SIGINT)
    with stop_signals():
        signal.raise_signal(number)
    assert {signal.getsignal(each) for each in STOP_SIGNALS} == {signal.SIG_IGN}
    assert signal.getsignal(signal.SIGINT) == ctrl_c


def test_a_block_without_signals_restores_the_handlers():
    before = [signal.getsignal(each) for each in (signal.SIGINT, *STOP_SIGNALS)]
    with stop_signals():
        pass
    assert [signal.getsignal(each) for each in (signal.SIGINT, *STOP_SIGNALS)] == before
