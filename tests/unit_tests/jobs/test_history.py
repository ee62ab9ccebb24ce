"""What a job relies on: a snapshot of its records is what they are at that moment, also after lines that were replaced."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from langchain_cogview.jobs.history import Finished, FinishedPrompts, PromptOutcome

outcomes = [PromptOutcome(made, None, None, (), (), 0) for made in range(3)]
record = st.tuples(
    st.integers(0, 20),  # the key
    st.integers(0, 30),  # the line
    st.integers(0, 2),  # the file of prompts
    st.sampled_from(outcomes),
)


@given(st.lists(st.lists(record, max_size=12), max_size=6))
def test_each_snapshot_has_all_records_in_the_order_of_the_prompts(batches):
    finished, start = FinishedPrompts(), 0
    for batch in batches:
        for key, line, source, outcome in batch:
            finished.add(str(key), Finished(start, 7, line, outcome, source))
            start += 7
        snapshot = finished.snapshot()
        assert list(snapshot.in_order()) == list(finished.by_line())
        assert snapshot.outcomes() == finished.outcomes()
    assert len(finished.snapshot()) == len(finished)


def test_what_is_added_later_is_not_in_a_snapshot():
    finished = FinishedPrompts()
    finished.add("a", Finished(0, 7, 2, outcomes[0]))
    snapshot = finished.snapshot()
    finished.add("b", Finished(7, 7, 1, outcomes[1]))
    finished.add("a", Finished(14, 7, 2, outcomes[1]))
    assert list(snapshot.in_order()) == [Finished(0, 7, 2, outcomes[0])]
    assert [item.start for item in finished.snapshot().in_order()] == [7, 14]
