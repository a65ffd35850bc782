"""The order of training prompts."""

from hypothesis import given
from hypothesis import strategies as st

from ballast.pipeline.data import Row, interleave
from ballast.pipeline.evaluation.suites import Kind


def rows(**counts: int) -> list[Row]:
    kinds: list[Kind] = ["harmful", "scary", "ordinary"]
    return [Row(f"{kind}-{i}", f"{kind} {i}", kind) for kind in kinds for i in range(counts.get(kind, 0))]


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40), st.integers(0, 5))
def test_no_row_is_lost_or_doubled(harmful: int, scary: int, ordinary: int, seed: int) -> None:
    given_rows = rows(harmful=harmful, scary=scary, ordinary=ordinary)
    assert sorted(r.id for r in interleave(given_rows, seed)) == sorted(r.id for r in given_rows)


@given(st.integers(0, 20))
def test_every_stretch_of_the_order_holds_the_kinds_in_proportion(seed: int) -> None:
    # 20 + 20 rows: any 8 in a row hold 4 of each, give or take one.
    order = interleave(rows(harmful=20, ordinary=20), seed)
    for start in range(0, 40, 8):
        harmful = sum(row.kind == "harmful" for row in order[start : start + 8])
        assert 3 <= harmful <= 5


def test_the_order_depends_on_the_seed() -> None:
    given_rows = rows(harmful=20, ordinary=20)
    assert interleave(given_rows, 0) == interleave(given_rows, 0)
    assert interleave(given_rows, 0) != interleave(given_rows, 1)
