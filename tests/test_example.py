"""An example and its row: nothing is lost on the way, and who reads what is found again."""

import math

import pytest
from datasets import Dataset, concatenate_datasets, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl_amopo.data.examples import FEATURES
from axolotl_amopo.example import Example, flat, pair

IDS = st.lists(st.integers(0, 99_999), min_size=1, max_size=6)
# Numbers that float32 holds, so that what comes back is what went in.
RATING = st.just(math.nan) | st.integers(0, 64).map(lambda n: n / 64)


@st.composite
def examples(draw):
    """Examples of any number of prompts, responses, comparisons and criteria."""
    texts = draw(st.lists(IDS, min_size=1, max_size=4))
    responses = draw(st.lists(IDS, min_size=2, max_size=4))
    criteria = draw(st.integers(1, 4))
    places = st.permutations(range(len(responses))).map(lambda order: tuple(order[:2]))
    alone = st.integers(0, len(responses) - 1).map(lambda n: (n, n))
    comparisons = draw(st.lists(places | alone, min_size=1, max_size=4))

    def rows(count, width, values):
        return [draw(st.lists(values, min_size=width, max_size=width)) for _ in range(count)]

    follows = rows(draw(st.integers(1, 4)), len(responses), st.integers(0, len(texts) - 1))
    return Example(
        prompts=texts,
        responses=responses,
        follows=follows,
        comparisons=comparisons,
        reads=rows(len(comparisons), criteria, st.integers(0, len(follows) - 1)),
        signs=rows(len(comparisons), criteria, st.sampled_from([-1, 0, 1])),
        ratings=rows(len(responses), criteria, RATING),
        points=draw(st.lists(st.integers(1, 100).map(float), min_size=criteria, max_size=criteria)),
        weights=draw(st.sampled_from([[], [0.25] * criteria])),
        fit=draw(st.just([]) | st.just(rows(len(follows), len(responses), RATING))),
        id=draw(st.integers(0, 2**63 - 1)),
    )


@settings(max_examples=200, deadline=None)
@given(example=examples())
def test_an_example_comes_back_from_its_row(example):
    assert same(Example.from_row(example.to_row()), example)


@settings(max_examples=15, deadline=None)
@given(made=st.lists(examples(), min_size=1, max_size=5))
def test_an_example_comes_back_from_the_disk(made, tmp_path_factory):
    """Of other widths, side by side in a dataset of the columns that rows are prepared with."""
    folder = tmp_path_factory.mktemp("rows")
    others = ("outcome", "messages", "tools")
    columns = {name: kind for name, kind in FEATURES.items() if name not in others}
    rows = Dataset.from_list([one.to_row() for one in made], features=type(FEATURES)(columns))
    concatenate_datasets([rows, rows]).save_to_disk(folder)
    for row, example in zip(load_from_disk(folder), made * 2, strict=True):
        assert same(Example.from_row(row), example)


def same(one, other):
    """Whether two examples are equal, NaN to NaN."""
    values = [
        vars(example) | {name: repr(getattr(example, name)) for name in ("ratings", "fit")}
        for example in (one, other)
    ]
    return values[0] == values[1]


@settings(max_examples=200, deadline=None)
@given(example=examples())
def test_what_criteria_read(example):
    """Against the definitions, one comparison and criterion after the other."""
    read, said = set(), set()
    for p, (first, second) in enumerate(example.comparisons):
        for c in range(example.criteria):
            follows = example.follows[example.reads[p][c]]
            sides = [(follows[first], first), (follows[second], second)]
            sign = example.signs[p][c]
            assert example.winner_first(p, c) == (sides[::-1] if sign < 0 else sides)
            read.update(sides)
            if sign or first == second:
                said.update(sides)
    every, some = example.places(silent=True), example.places()
    assert len(every) == len(set(every)) and set(every) == read
    assert len(some) == len(set(some))
    assert set(some) == (said or set(example.winner_first(0, 0)))
    lengths = [len(example.prompts[text]) + len(example.responses[n]) for text, n in read]
    prompt, response = example.longest()
    assert len(prompt) + len(response) == max(lengths)
    assert any((example.prompts[t], example.responses[n]) == (prompt, response) for t, n in read)
    row = example.to_row()
    assert row["input_ids"] == prompt + response
    assert row["labels"] == [-100] * len(prompt) + response
    assert row["attention_mask"] == [1] * len(row["input_ids"])


def test_some_of_the_responses():
    """What is left stands for itself under the same prompts."""
    group = Example(
        prompts=[[1], [2]],
        responses=[[3], [4], [5]],
        follows=[[0, 1, 0]],
        comparisons=[(0, 1), (2, 0), (0, 0), (1, 1), (2, 2)],
        reads=[[0]] * 5,
        signs=[[1], [-1], [0], [0], [0]],
        ratings=[[0.1], [0.2], [0.3]],
        points=[1.0],
    )
    assert group.places() == [(0, 0), (1, 1), (0, 2)]
    some = group.only([0, 2])
    assert (some.responses, some.follows) == ([[3], [5]], [[0, 0]])
    assert (some.comparisons, some.signs) == ([(1, 0), (0, 0), (1, 1)], [[-1], [0], [0]])
    assert (some.ratings, some.reads) == ([[0.1], [0.3]], [[0]] * 3)
    assert some.only([1]).places() == [(0, 0)]


def test_a_pair_under_its_prompts():
    made = pair([[1, 2], [3]], [[4], [5, 6]], id=7)
    assert made.places() == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert (made.criteria, made.comparisons, made.signs, made.id) == (2, [(0, 1)], [[1, 1]], 7)
    assert made.reads == [[0, 1]] and made.follows == [[0, 0], [1, 1]]
    assert all(map(math.isnan, [*flat(made.ratings), *made.points]))


@pytest.mark.parametrize("rows", [[], [[]], [[1], [], [2, 3]]])
def test_flat(rows):
    assert flat(rows) == sum(rows, [])  # noqa: RUF017
