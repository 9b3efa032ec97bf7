"""Rows -> rated prompts -> pairs -> instructions: every format, the pair rule, what is counted."""

import importlib
import itertools
import json
import math
import re
from collections import Counter
from fractions import Fraction

import pytest
import yaml
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from axolotl_amopo.config.block import AMoPOConfig
from axolotl_amopo.config.datasets import prepare_entries
from axolotl_amopo.config.dimensions import Dimension
from axolotl_amopo.config.instructions import nearest_level, number
from axolotl_amopo.data.examples import as_text
from axolotl_amopo.data.pairing import (
    CLOSE,
    IDENTICAL,
    MISSING,
    NO_ORDER,
    NOT_DRAWN,
    SINGLE,
    TIE,
    UNRATED,
    Asks,
    Pair,
    PairRule,
)
from axolotl_amopo.data.pipeline import (
    Survey,
    make_examples,
    read_prompts,
    scales_of,
    survey_rows,
)
from axolotl_amopo.data.prompts import prompted
from axolotl_amopo.data.rows import RatedPrompt, Response
from axolotl_amopo.errors import DataError

SCALES = {"help": (0, 100), "truth": (1, 5)}
SCALED = [{"name": name, "scale": scale} for name, scale in SCALES.items()]


def data_format(kind, tokenizer=None, entry=None, options=None, sequence_len=2048, **block):
    """A format as axolotl loads it; `options` are our own keys of the entry."""
    block = {"dimensions": list(SCALES), "datasets": {"id": {"options": options or {}}}} | block
    module = f"axolotl_amopo.formats.{kind}" + "_" * (kind == "user_defined")
    return importlib.import_module(module).load(
        tokenizer,
        DictDefault(amopo=block, sequence_len=sequence_len, base_model="nowhere"),
        DictDefault({"path": "data.jsonl", "conversation": "id"} | (entry or {})),
    )


def read_all(wanted, rows):
    """The prompts that a format makes of rows."""
    dataset = Dataset.from_list(rows)
    return list(read_prompts(wanted, dataset, survey_rows(wanted, dataset, Counter())))


def read(kind, rows, changes=()):
    return read_all(data_format(kind, **dict(changes)), rows)


def rated_prompt(ratings, texts=None, names=SCALES, ordered=False):
    texts = texts or [f"answer {i}" for i in range(len(ratings))]
    rated = [dict(zip(names, values, strict=True)) for values in ratings]
    return RatedPrompt([user("Why?")], list(map(Response, texts, rated)), [1], ordered)


def made(prompt, scales=SCALES, lower=(), seed=0, **block):
    """The pairs that are made of a prompt, as plain values, and what is counted as dropped."""
    dropped = Counter()
    config = AMoPOConfig(dimensions=list(scales), **block)
    pairs = PairRule(config, scales, frozenset(lower), seed).pairs(prompt, dropped)
    return [(pair.responses, pair.signs) for pair in pairs], dict(dropped)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


YES, NO = {"help": 3, "truth": 4}, {"help": 1, "truth": 0}
SYSTEM, ASKED = {"role": "system", "content": "Be kind."}, [user("Is it?")]
TALK = [SYSTEM, user("Hi."), assistant("Hello."), user("Is it?")]
HELPSTEER2 = {"prompt": "Hi.\n<extra_id_1>Assistant\nHello.\n<extra_id_1>User\nIs it?"}
Q, Y, N = {"prompt": "Is it?"}, {"response": "Yes."}, {"response": "No."}
BESIDE, KIND = {"chosen_ratings": YES, "rejected_ratings": NO}, {"system": "Be kind."}
LISTED = {"responses": [{"text": "Yes.", "scores": YES}, {"text": "No.", "scores": NO}]}
SHORT = [{"t": "Yes.", "s": {"h": 3, "truth": 4}}, {"t": "No.", "s": {"h": 1, "truth": 0}}]
MAPPED = {"message_property_mappings": {"role": "from", "content": "value"}}
MAPPED |= {"roles": {"user": ["human"], "assistant": ["gpt"]}}


def sides(yes, no, prompt=()):
    return {
        "chosen": [*prompt, yes] if prompt else yes,
        "rejected": [*prompt, no] if prompt else no,
    }


def said(role, text):
    return {"from": role, "value": text}


def fields(**names):
    return {"options": {"fields": names}}


TEXTS, TURNS = ("Yes.", "No."), (assistant("Yes."), assistant("No."))
# fmt: off
# name: (type, rows, the prompt's messages, changes to the entry or to our options)
# In every case the answer "Yes." is rated 3 and 4, the answer "No." 1 and 0.
FORMATS = {
    "helpsteer, numbers": ("helpsteer", [Q | Y | YES | {"verbosity": 1}, Q | N | NO], ASKED),
    "helpsteer, strings": ("helpsteer", [Q | Y | {"help": "3", "truth": "4.0"},
                                         Q | N | {"help": " 1 ", "truth": "0"}], ASKED),
    "helpsteer2, turns": ("helpsteer", [HELPSTEER2 | Y | YES, HELPSTEER2 | N | NO], TALK[1:]),
    "helpsteer, fields": (
        "helpsteer", [{"q": "Is it?", "a": "Yes.", "h": 3, "truth": 4},
                      {"q": "Is it?", "a": "No.", "h": 1, "truth": 0}],
        ASKED, fields(prompt="q", response="a", help="h")),
    "pairs, the published file": (
        "pairs", [Q | {"chosen": Y | {"help": "3", "complexity": "2", "truth": "4"},
                       "rejected": N | {"help": "1", "verbosity": "2", "truth": "0"}}], ASKED),
    "pairs, ratings beside text": ("pairs", [Q | sides(*TEXTS) | BESIDE], ASKED),
    "pairs, messages": ("pairs", [{"messages": TALK} | sides(*TEXTS) | BESIDE], TALK),
    "pairs, lists and the prompt": ("pairs", [Q | sides(*TURNS, ASKED) | BESIDE], ASKED),
    "pairs, lists": ("pairs", [sides(*TURNS, TALK) | BESIDE], TALK),
    "pairs, lists, system": ("pairs", [KIND | sides(*TURNS, ASKED) | BESIDE], [SYSTEM, *ASKED]),
    "pairs, one message each": ("pairs", [Q | sides(*TURNS) | BESIDE], ASKED),
    "pairs, fields": (
        "pairs", [{"q": "Is it?", "good": "Yes.", "bad": "No.",
                   "s": {"h": 3, "truth": 4}, "rejected_ratings": {"h": 1, "truth": 0}}],
        ASKED, fields(prompt="q", chosen="good", rejected="bad", chosen_ratings="s", help="h")),
    "pairs, fields inside the responses": (
        "pairs", [Q | sides({"text": "Yes."} | YES, {"text": "No."} | NO)],
        ASKED, fields(response="text")),
    "pairs, from and value": (
        "pairs", [BESIDE | sides(*(said("gpt", t) for t in TEXTS), [said("human", "Is it?")])],
        ASKED, {"entry": MAPPED}),
    "rated": ("rated", [Q | LISTED], ASKED),
    "rated, system": ("rated", [Q | KIND | LISTED], [SYSTEM, *ASKED]),
    "rated, messages": ("rated", [{"messages": TALK} | LISTED], TALK),
    "rated, fields": (
        "rated", [{"q": "Is it?", "sys": "Be kind.", "r": SHORT}], [SYSTEM, *ASKED],
        fields(prompt="q", system="sys", responses="r", text="t", scores="s", help="h")),
    "rated, axolotl's mappings": (
        "rated", [{"talk": [said("system", "Be kind."), said("human", "Is it?")]} | LISTED],
        [SYSTEM, *ASKED], {"entry": MAPPED | {"field_messages": "talk"}}),
}
# fmt: on


@pytest.mark.parametrize("name", FORMATS)
def test_format(name):
    kind, rows, messages, *changes = FORMATS[name]
    (prompt,) = read(kind, rows, *changes)
    assert prompt.messages == messages
    assert prompt.responses == [Response("Yes.", YES), Response("No.", NO)]
    assert prompt.rows == list(range(1, len(rows) + 1))
    assert prompt.ordered == (kind == "pairs")


def test_rows_of_a_prompt_need_not_stand_together():
    order = [("Is it?", "Yes."), ("And this?", "A."), ("Is it?", "No."), ("And this?", "B.")]
    first, second = read("helpsteer", [{"prompt": q, "response": a} | YES for q, a in order])
    assert (first.messages, first.rows) == ([user("Is it?")], [1, 3])
    assert [response.text for response in first.responses] == ["Yes.", "No."]
    assert (second.messages, second.rows) == ([user("And this?")], [2, 4])
    assert [response.text for response in second.responses] == ["A.", "B."]


# The pair rule. Ratings are (help of 0..100, truth of 1..5), so that the scales matter.

ALL, NO_TRUTH, NO_HELP = [1, 1, 1], [1, 1, 0], [1, 0, 1]
PER, BEST = {"winner": "per_dimension"}, {"pairs": "best_worst"}
MASK, DROP = {"missing_ratings": "mask"}, {"missing_ratings": "drop"}
ALONE = {"overall": False}  # no overall prompt
LOWER = {"lower": ["help"]}

# fmt: off
# name: (ratings, settings, pairs as (responses, signs by overall, help and truth), dropped)
RULE = {
    "mean of normalised ratings": ([(60, 1), (40, 4)], {}, [((1, 0), ALL)], {}),
    "no overall prompt": ([(60, 1), (40, 4)], ALONE, [((1, 0), [1, 1])], {}),
    "conflict, one winner": ([(90, 2), (20, 4)], {}, [((0, 1), ALL)], {}),
    "tie": ([(100, 1), (0, 5)], {}, [], {TIE: 1}),
    "missing, drop": ([(60, None), (40, 4)], DROP, [], {MISSING: 1}),
    "missing, mask": ([(60, None), (40, 4)], MASK, [((0, 1), NO_TRUTH)], {}),
    "mask, per dimension": ([(60, None), (80, 4)], MASK | PER, [((1, 0), NO_TRUTH)], {}),
    "mask, nothing in common": ([(60, None), (None, 4)], MASK, [], {TIE: 1}),
    "one response": ([(60, 1)], {}, [], {SINGLE: 1}),
    "all pairs": ([(50, 3), (0, 1), (100, 5)], {},
                  [((0, 1), ALL), ((2, 0), ALL), ((2, 1), ALL)], {}),
    "best and worst": ([(50, 3), (0, 1), (100, 5)], BEST, [((2, 1), ALL)], {}),
    "best and worst, all tie": ([(50, 3), (100, 1), (0, 5)], BEST, [], {TIE: 1}),
    "one unrated": ([(90, 5), (50, 3), (None, None)], BEST | MASK, [((0, 1), ALL)], {}),
    "per dimension, conflict": ([(90, 2), (20, 4)], PER, [((0, 1), [1, 1, -1])], {}),
    "per dimension, second wins": ([(20, 4), (90, 2)], PER, [((1, 0), [1, 1, -1])], {}),
    "per dimension, one is equal": ([(20, 4), (20, 5)], PER, [((1, 0), NO_HELP)], {}),
    "equal overall": ([(0, 5), (100, 1)], PER, [((0, 1), [0, -1, 1])], {}),
    "per dimension, all equal": ([(20, 4), (20, 4)], PER, [], {TIE: 1}),
    "lower is better": ([(60, 1), (40, 1)], LOWER, [((1, 0), ALL)], {}),
    "lower, per dimension": ([(60, 5), (40, 2)], LOWER | PER, [((0, 1), [1, -1, 1])], {}),
    "by one dimension": ([(90, 2), (20, 4)], {"order_by": "truth"}, [((1, 0), ALL)], {}),
    "by a dimension without rating": ([(90, None), (20, 4)], MASK | {"order_by": "truth"}, [],
                                      {NO_ORDER: 1}),
    "by the dataset, which has none": ([(90, 2), (20, 4)], {"order_by": "dataset"}, [],
                                       {NO_ORDER: 1}),
    "gap": ([(50, 3), (60, 3)], {"min_gap": 0.05}, [((1, 0), ALL)], {}),
    "gap too small": ([(50, 3), (60, 3)], {"min_gap": 0.06}, [], {CLOSE: 1}),
    "gap, per dimension": ([(50, 3), (60, 4)], PER | {"min_gap": 0.2},
                           [((0, 1), [0, 0, -1])], {}),
}
# Where the data itself names the winner, the first response.
ORDERED = {
    "ratings say otherwise": ([(0, 1), (100, 5)], {}, [((0, 1), ALL)], {}),
    "equal ratings": ([(50, 3), (50, 3)], {}, [((0, 1), ALL)], {}),
    "per dimension": ([(0, 4), (100, 3)], PER, [((0, 1), [1, -1, 1])], {}),
    "equal ratings, per dimension": ([(50, 3), (50, 3)], PER, [((0, 1), [1, 0, 0])], {}),
    "nothing left": ([(50, 3), (50, 3)], PER | ALONE, [], {TIE: 1}),
    "the mean is asked for": ([(0, 1), (100, 5)], {"order_by": "mean"}, [((1, 0), ALL)], {}),
}
# fmt: on


@pytest.mark.parametrize("name", [*RULE, *ORDERED])
def test_pair_rule(name):
    ratings, block, pairs, dropped = (RULE | ORDERED)[name]
    assert made(rated_prompt(ratings, ordered=name in ORDERED), **block) == (pairs, dropped)


# The responses of objectives that take all of them. By name: ratings, settings, the pairs, who is
# there alone, what is dropped.
RIC, LISTS = {"objective": "ric"}, {"objective": "lambda_dpo", "overall": True}
# fmt: off
ALL_RESPONSES = {
    "a pair": ([(60, 1), (40, 4)], LISTS, [(1, 0)], [0, 1], {}),
    "ties": ([(60, 1), (60, 1), (60, 1)], LISTS, [], [0, 1, 2], {TIE: 3}),
    "one": ([(60, 1)], LISTS, [], [], {SINGLE: 1}),
    "one, supervised": ([(60, 1)], RIC, [], [0], {}),
    "one, supervised but not wanted": (
        [(60, 1)], RIC | {"single_responses": "drop"}, [], [], {SINGLE: 1}),
    "one unrated": (
        [(60, 1), (None, None), (40, 4)], LISTS | MASK, [(2, 0)], [0, 2],
        {UNRATED: 1, TIE: 2}),
    "one half rated": (
        [(60, 1), (None, 4)], LISTS | MASK, [(1, 0)], [0, 1], {}),
    "half rated ones are dropped": ([(60, 1), (None, 4)], LISTS | DROP, [], [],
                                    {UNRATED: 1, SINGLE: 1}),
    "none is left": ([(None, None)], RIC | MASK, [], [], {UNRATED: 1, SINGLE: 1}),
}
# fmt: on


@pytest.mark.parametrize("name", ALL_RESPONSES)
def test_all_responses_of_a_prompt(name):
    ratings, block, pairs, alone, dropped = ALL_RESPONSES[name]
    everything, counted = made(rated_prompt(ratings), **block)
    assert counted == dropped
    places = [places for places, _ in everything]
    assert places == pairs + [(i, i) for i in alone]
    assert all(signs == [0, 0, 0] for (a, b), signs in everything if a == b)


def test_one_prompt_states_each_responses_own_ratings():
    """Of a prompt with a single response and one of a tie, under the overall prompt alone."""
    show = {"overall_instruction": SHOW["overall_instruction"]}
    single, _ = prompted_of([(90, 2)], **RIC | show)
    assert (single.instructions, single.follows) == ([A], [[0]])
    assert (single.comparisons, single.reads, single.signs) == ([(0, 0)], [[0] * 3], [[0] * 3])
    tied, config = prompted_of([(90, 2), (90, 2), (20, 4)], **RIC | show)
    assert (tied.used, tied.instructions, tied.follows) == ([0, 2, 1], [A, B], [[0, 1, 0]])
    assert config.prompt_count == 1


def test_one_prompt_names_the_dimensions_that_are_rated():
    show = {"overall_instruction": SHOW["overall_instruction"]}
    half, _ = prompted_of([(90, None)], **RIC | show | MASK)
    assert half.instructions == ["help=90"]
    none, _ = prompted_of([(90, None)], **RIC | show | MASK | NO_RATING)
    assert none.instructions == ["help=None truth=None"]


STATIC = {"weighting": "static", "weights_per_row": True}


def test_a_row_may_have_weights_of_its_own():
    row = Q | LISTED | {"w": {"overall": 1, "help": "2", "truth": 5}}
    ((prompt,)) = read("rated", [row], STATIC | fields(weights="w"))
    assert prompt.weights == [0.125, 0.25, 0.625]
    assert read("rated", [row])[0].weights is None


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (None, "key 'weights': is missing"),
        ({"help": 1, "truth": 1}, "must have a weight per criterion, overall, help, truth"),
        ({"overall": 1, "help": -1, "truth": 1}, r"key 'weights.help': must be a number from 0"),
        ({"overall": 0, "help": 0, "truth": 0}, "must not all be 0"),
        ([1, 2, 3], "must have a weight per criterion"),
    ],
)
def test_weights_of_a_row_that_can_not_be_used(weights, message):
    with pytest.raises(DataError, match=f"data.jsonl, row 1, .*{message}"):
        read("rated", [Q | LISTED | {"weights": weights}], STATIC)


def test_rows_of_a_prompt_have_the_same_weights():
    weights = {"overall": 1, "help": 1, "truth": 1}
    rows = [Q | Y | YES | {"weights": weights}, Q | N | NO | {"weights": weights | {"help": 2}}]
    with pytest.raises(DataError, match="row 2: its weights are not those of row 1"):
        read("helpsteer", rows, STATIC)


COS = {"objective": "cos_dpo"}


def vectors_of(prompt=None, seed=0, grid=False, names="ab", **block):
    """The weights that stand in the prompts of a prompt's first pair."""
    prompt = prompt or rated_prompt([(4, 0), (0, 4)], names="ab")
    config = AMoPOConfig(dimensions=list(names), **COS | block)
    rule = PairRule(config, dict.fromkeys(names, (0, 4)), seed=seed, grid=grid)
    return rule.weight_vectors([Pair(prompt, (0, 1), [1] * len(names))])


def test_weights_are_drawn_by_the_seed_and_the_texts():
    drawn = vectors_of(weight_draws=50)
    assert len(drawn) == 50 and drawn == vectors_of(weight_draws=50)
    assert drawn[:3] == vectors_of(weight_draws=3)
    for weights in drawn:
        assert sum(weights) == pytest.approx(1) and min(weights) >= 0
        assert weights == [pytest.approx(round(weight, 1)) for weight in weights]
    other = rated_prompt([(4, 0), (0, 4)], texts=["another", "answer"], names="ab")
    assert len({str(one) for one in (drawn[:4], vectors_of(seed=1), vectors_of(other))}) == 3
    assert len(vectors_of()) == 4  # the default


def test_the_concentration_of_weights():
    """The mean of a weight's square under Dirichlet(alpha) is (alpha + 1) / (2 (2 alpha + 1))."""
    for alpha in (0.2, 1.0, 5.0):
        drawn = vectors_of(weight_draws=4000, weight_concentration=alpha)
        squares = [first**2 for first, _ in drawn]
        assert sum(squares) / 4000 == pytest.approx((alpha + 1) / (4 * alpha + 2), abs=0.02)


def test_evaluation_reads_corners_and_centre():
    assert vectors_of(grid=True) == [[1, 0], [0, 1], [0.5, 0.5]]
    assert vectors_of(grid=True, names="a") == [[1], [1]]


def test_each_drawn_vector_has_a_prompt():
    """Also two of equal weights: the loss is a mean over M prompts."""
    config = AMoPOConfig(dimensions=["a", "b"], **COS)
    pair = Pair(rated_prompt([(4, 0), (0, 4)], names="ab"), (0, 1), [1, -1])
    scales = dict.fromkeys("ab", (0, 4))
    made = prompted([pair], config, scales, [[0.3, 0.7], [1, 0], [0.3, 0.7]])
    assert made.follows == [[0, 0], [1, 1], [0, 0]]
    assert made.reads == [[0, 0, 1, 1, 2, 2]]
    assert made.signs == [[1, -1] * 3]
    assert made.instructions == [
        "Your answer will be rated on several dimensions, which count by these weights: "
        f"a {a}, b {b}."
        for a, b in (("0.3", "0.7"), ("1.0", "0.0"))
    ]


# How near ratings of (help, truth) = (75, 2), so (0.75, 0.25) on 0 to 1, are to what is asked for.
@pytest.mark.parametrize(
    ("asks", "lower", "expected"),
    [
        (Asks(["help"], {"help": 100}, ()), (), 0.75),
        (Asks(["help"], {"help": 50}, ()), (), 0.75),
        (Asks(["help"], {"help": 50}, ()), ["help"], 0.75),
        (Asks(["help", "truth"], {"help": 75, "truth": 5}, ()), (), 0.625),
        (Asks(["help"], None, ()), (), 0.75),
        (Asks(["help"], None, ()), ["help"], 0.25),
        (Asks(["help", "truth"], None, (0.4, 0.6)), (), 0.45),
        (Asks(["help"], {"help": None}, ()), (), math.nan),
        (Asks([], None, ()), (), math.nan),
    ],
)
def test_fit_by_hand(asks, lower, expected):
    fit = rule_of(lower).fit(rated_prompt([(75, 2)]), 0, asks)
    assert fit == pytest.approx(expected, nan_ok=True)


def test_what_is_not_rated_fits_nothing():
    asks = Asks(["help"], {"help": 50}, ())
    assert math.isnan(rule_of(**MASK).fit(rated_prompt([(None, 2)]), 0, asks))


NEAR = {"winner": "nearest", "group_by_prompt": True}


def nearest(ratings, target, lower=()):
    """The pairs of a prompt's responses, with a rule that draws the ratings of one as target."""
    prompt, config = rated_prompt(ratings), AMoPOConfig(dimensions=SCALED, **SHOW | NEAR)
    for seed in range(50):
        rule = PairRule(config, SCALES, frozenset(lower), seed)
        pairs = list(rule.pairs(prompt, dropped := Counter()))
        if all(pair.target == prompt.responses[target].ratings for pair in pairs):
            return pairs, dropped, rule
    raise AssertionError("never drawn")


def signs_of(pairs):
    return [(pair.responses, pair.signs) for pair in pairs]


def test_a_target_at_the_best_ratings_is_as_per_dimension():
    ratings = [(90, 2), (20, 1), (90, 5), (20, 5)]
    pairs, dropped, _ = nearest(ratings, 2)
    assert (signs_of(pairs), dropped) == made(rated_prompt(ratings), **PER)


@pytest.mark.parametrize("lower", [(), ("help",)])
def test_who_has_the_ratings_that_are_asked_for_wins(lower):
    for target in (0, 1):
        pairs, dropped, _ = nearest([(90, 2), (20, 4)], target, lower)
        assert (signs_of(pairs), dropped) == ([((target, 1 - target), ALL)], {})


def test_equally_near_ratings_say_nothing():
    pairs, _, rule = nearest([(70, 2), (30, 3), (50, 3)], 2)
    assert signs_of(pairs) == [((1, 0), [1, 0, 1]), ((2, 0), ALL), ((2, 1), NO_TRUTH)]
    assert [rule.gap(pair, "help") for pair in pairs] == [0, 0.2, 0.2]
    pairs, dropped, _ = nearest([(70, 2), (30, 4), (50, 3)], 2)
    assert [pair.responses for pair in pairs] == [(2, 0), (2, 1)] and dropped == {TIE: 1}


def test_targets_are_drawn_from_the_prompts_own_ratings():
    prompt = rated_prompt([(i, 3) for i in range(0, 100, 10)])
    config = AMoPOConfig(dimensions=list(SCALES), winner="nearest")
    drawn = [
        [pair.target["help"] for pair in PairRule(config, SCALES, seed=s).pairs(prompt, Counter())]
        for s in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert set(drawn[0]) == set(range(0, 100, 10))  # each of 45 pairs its own draw


def test_a_target_is_as_the_prompt_shows_it():
    """Of the scale's ends, (90, 2) is the upper one on help and the lower one on truth."""
    config = AMoPOConfig(dimensions=SCALED, rating_levels=2, **SHOW | NEAR)
    for seed in range(20):
        rule = PairRule(config, SCALES, seed=seed)
        (pair,) = rule.pairs(rated_prompt([(90, 2), (20, 4)]), Counter())
        assert pair.target in ({"help": 100, "truth": 1}, {"help": 0, "truth": 5})
        made = prompted([pair], config, SCALES)
        assert made.asks[1].ratings == pair.target
        assert made.instructions[1] == f"help={pair.target['help']:g}"


def test_one_prompt_may_ask_for_rounded_ratings():
    block = {"objective": "dpo", "prompts": "one", "overall_instruction": "{{ dimensions }}"}
    assert AMoPOConfig(rating_levels=3, **block).has_instructions


def test_prompts_ask_for_the_target():
    for target, expected in ((0, [A, "help=90", "truth=2"]), (1, [B, "help=20", "truth=4"])):
        (pair,), _, rule = nearest([(90, 2), (20, 4)], target)
        made = prompted([pair], rule.config, SCALES)
        assert made.instructions == expected
        fits = [[rule.fit(pair.prompt, i, asks) for i in made.used] for asks in made.asks]
        assert fits == [[1, 0.4], [1, 0.3], [1, 0.5]]


def test_the_datasets_own_rating_decides_where_that_is_asked_for():
    prompt = rated_prompt([(90, 5), (10, 1), (50, 3)])
    for response, overall in zip(prompt.responses, (0.2, 0.9, None), strict=True):
        response.overall = overall
    assert made(prompt, order_by="dataset") == ([((1, 0), ALL)], {NO_ORDER: 2})
    best = made(prompt, order_by="dataset", pairs="best_worst")
    assert best == ([((1, 0), ALL)], {})


def test_a_number_of_pairs_is_drawn_by_the_seed():
    prompt = rated_prompt([(i, 3) for i in range(0, 100, 10)])
    every, _ = made(prompt)
    draws = []
    for seed in range(4):
        pairs, dropped = made(prompt, pairs=3, seed=seed)
        assert made(prompt, pairs=3, seed=seed) == (pairs, dropped) == (pairs, {NOT_DRAWN: 42})
        assert len(set(map(str, pairs))) == 3
        assert all(pair in every for pair in pairs)
        draws.append(str(pairs))
    assert len(set(draws)) > 1
    assert sorted(made(prompt, pairs=99)[0]) == sorted(every)


def test_identical_responses_make_no_pair():
    prompt = rated_prompt([(10, 1), (90, 5), (50, 3)], texts=["same", "same", "other"])
    assert made(prompt) == ([((2, 0), ALL), ((1, 2), ALL)], {IDENTICAL: 1})


def test_equal_means_tie_whatever_floats_make_of_them():
    """Means of three raters: thirds, whose sums differ in the last digit."""
    prompt = rated_prompt([(1, 1, 5 / 3), (1, 4 / 3, 4 / 3)], names="abc")
    assert made(prompt, scales=dict.fromkeys("abc", (1, 5))) == ([], {TIE: 1})


NAN, DATASET, BY_MEAN = math.nan, {"order_by": "dataset"}, {"order_by": "mean"}
# fmt: off
# name: (help and truth, the data's own overall rating, settings, ordered,
#        the ratings on 0 to 1 by overall, help and truth)
NORMALISED = {
    "mean": ((90, 2), None, {}, False, [0.575, 0.9, 0.25]),
    "the ends": ((100, 1), None, {}, False, [0.5, 1, 0]),
    "no overall": ((90, 2), None, ALONE, False, [0.9, 0.25]),
    "lower is better": ((90, 2), None, LOWER, False, [0.175, 0.1, 0.25]),
    "one is missing": ((90, None), None, MASK, False, [0.9, 0.9, NAN]),
    "none is there": ((None, None), None, MASK, False, [NAN] * 3),
    "by one dimension": ((90, 2), None, {"order_by": "truth"}, False, [0.25, 0.9, 0.25]),
    "by one that is missing": ((90, None), 0.3, MASK | {"order_by": "truth"}, False,
                               [NAN, 0.9, NAN]),
    "the data's own": ((90, 2), 0.3, DATASET, False, [0.3, 0.9, 0.25]),
    "the data has none": ((90, 2), None, DATASET, False, [NAN, 0.9, 0.25]),
    "the data's own is not asked for": ((90, 2), 0.3, {}, False, [0.575, 0.9, 0.25]),
    "an order alone": ((90, 2), None, {}, True, [NAN, 0.9, 0.25]),
    "an order of the dataset": ((90, 2), None, DATASET, True, [NAN, 0.9, 0.25]),
    "an order, by the mean": ((90, 2), None, BY_MEAN, True, [0.575, 0.9, 0.25]),
}
# fmt: on


def rule_of(lower=(), **block):
    return PairRule(AMoPOConfig(dimensions=list(SCALES), **block), SCALES, frozenset(lower))


@pytest.mark.parametrize("name", NORMALISED)
def test_ratings_of_a_response(name):
    """On 0 to 1, with 1 the better end, and nothing where the data has nothing."""
    ratings, own, block, ordered, expected = NORMALISED[name]
    prompt = rated_prompt([(0, 5), ratings], ordered=ordered)
    prompt.responses[1].overall = own
    assert rule_of(**block).ratings(prompt, 1) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ({}, [52, 100, 4]),  # overall, the mean of the two
        (ALONE, [100, 4]),
        ({"order_by": "truth"}, [4, 100, 4]),
        (DATASET, [1, 100, 4]),
    ],
)
def test_points_are_the_widths_of_the_scales(block, expected):
    assert rule_of(**block).points() == expected


RATING = st.none() | st.integers(0, 4)


@settings(max_examples=300, deadline=None)
@given(
    ratings=st.lists(st.tuples(RATING, RATING, RATING), min_size=2, max_size=5),
    texts=st.lists(st.sampled_from("abcdef"), min_size=5, max_size=5),
    winner=st.sampled_from(["overall", "per_dimension"]),
    missing=st.sampled_from(["drop", "mask"]),
    overall=st.booleans(),
)
def test_winners_really_are_rated_higher(ratings, texts, winner, missing, overall):
    scales = {"a": (0, 4), "b": (0, 8), "c": (-1, 4)}
    prompt = rated_prompt(ratings, texts[: len(ratings)], "abc")
    pairs, dropped = made(prompt, scales, winner=winner, missing_ratings=missing, overall=overall)
    assert len(pairs) + sum(dropped.values()) == len(ratings) * (len(ratings) - 1) // 2
    for responses, signs in pairs:
        better, worse = (ratings[i] for i in responses)
        both = zip(better, worse, strict=True)
        gaps = [None if None in ratings else ratings[0] - ratings[1] for ratings in both]
        lead = sum(Fraction(gap or 0, width) for gap, width in zip(gaps, (4, 8, 5), strict=True))
        assert lead >= 0
        if winner == "overall":
            assert lead > 0
            assert signs == [1] * overall + [int(gap is not None) for gap in gaps]
        else:
            expected = [((gap or 0) > 0) - ((gap or 0) < 0) for gap in gaps]
            assert signs == [int(lead > 0)] * overall + expected


SHOW = {
    "instruction": "{{ dimension }}={{ rating }}",
    "overall_instruction": "{% for d in dimensions %}{{ d.dimension }}={{ d.rating }} {% endfor %}",
}
A, B = "help=90 truth=2", "help=20 truth=4"
OWN, NO_RATING = {"rating_in_prompt": "own"}, {"rating_in_prompt": "none"}
SILENT = {"instruction": "", "overall_instruction": ""}
# fmt: off
# name: (settings, how many prompts there are, and what a pair of A and B is asked: by criterion
# the texts that winner and loser follow. A wins overall, B on truth.)
SHOWN = {
    "chosen": ({}, 3, [(A, A), ("help=90", "help=90"), ("truth=2", "truth=2")]),
    "chosen, per dimension": (PER, 3, [(A, A), ("help=90", "help=90"), ("truth=4", "truth=4")]),
    "own": (OWN, 3, [(A, B), ("help=90", "help=20"), ("truth=2", "truth=4")]),
    "own, per dimension": (OWN | PER, 3, [(A, B), ("help=90", "help=20"), ("truth=4", "truth=2")]),
    "none": (NO_RATING, 3,
             [("help=None truth=None",) * 2, ("help=None",) * 2, ("truth=None",) * 2]),
    "no overall prompt": (ALONE | PER, 2, [("help=90",) * 2, ("truth=4",) * 2]),
    "empty": (SILENT, 1, [("", "")] * 3),
    "empty, own": (SILENT | OWN, 1, [("", "")] * 3),
    "empty but overall": ({"instruction": ""}, 2, [(A, A), ("", ""), ("", "")]),
    "all alike": ({"instruction": "Please.", "overall_instruction": "Please."}, 1,
                  [("Please.", "Please.")] * 3),
    "own, all alike": (OWN | {"instruction": "Please.", "overall_instruction": "Please."}, 1,
                       [("Please.", "Please.")] * 3),
}
# fmt: on


def texts_of(made):
    """What the responses follow: by comparison and criterion the texts of winner and loser."""
    asked = []
    for (first, second), reads, signs in zip(made.comparisons, made.reads, made.signs, strict=True):
        order = [(second, first) if sign < 0 else (first, second) for sign in signs]
        asked.append(
            [
                tuple(made.instructions[made.follows[k][n]] for n in places)
                for k, places in zip(reads, order, strict=True)
            ]
        )
    return asked


def prompted_of(ratings=((90, 2), (20, 4)), dimensions=SCALED, **block):
    """The prompts of all pairs of one question, with what made them."""
    wanted = data_format("rated", dimensions=dimensions, **block)
    scales = {dimension["name"]: dimension["scale"] for dimension in dimensions}
    rule = PairRule(wanted.config, scales)
    pairs = list(rule.pairs(rated_prompt(ratings, names=scales), Counter()))
    return prompted(pairs, wanted.config, scales), wanted.config


def instructions(*args, **block):
    return prompted_of(*args, **block)[0].instructions


@pytest.mark.parametrize("name", SHOWN)
def test_rating_in_the_instruction(name):
    block, prompts, expected = SHOWN[name]
    made, config = prompted_of(**SHOW | block)
    assert texts_of(made) == [expected]
    assert len(made.follows) == prompts
    assert set(made.instructions) == {text for both in expected for text in both}
    assert len(set(made.instructions)) == len(made.instructions)
    if "alike" not in name:  # what it can tell without rendering
        assert config.prompt_count == prompts


def same_twice(*texts):
    return [(text, text) for text in texts]


# Three responses: (help, truth) of (90, 2), (20, 4), (50, 3); the first two win against the last,
# and each against another in one dimension.
GROUP = [(90, 2), (20, 4), (50, 2)]
# name: (settings, prompts, by pair and criterion the texts of winner and loser)
GROUPED = {
    "chosen": (
        {}, 6,
        [same_twice("90, 2", "help=90", "truth=2"), same_twice("90, 2", "help=90", "truth=2"),
         same_twice("20, 4", "help=20", "truth=4")],
    ),
    "chosen, per dimension": (
        PER, 6,
        [same_twice("90, 2", "help=90", "truth=4"), same_twice("90, 2", "help=90", "truth=2"),
         same_twice("20, 4", "help=50", "truth=4")],
    ),
    "own": (
        OWN, 3,
        [[("90, 2", "20, 4"), ("help=90", "help=20"), ("truth=2", "truth=4")],
         [("90, 2", "50, 2"), ("help=90", "help=50"), ("truth=2", "truth=2")],
         [("20, 4", "50, 2"), ("help=20", "help=50"), ("truth=4", "truth=2")]],
    ),
    "own, per dimension": (
        OWN | PER, 3,
        [[("90, 2", "20, 4"), ("help=90", "help=20"), ("truth=4", "truth=2")],
         [("90, 2", "50, 2"), ("help=90", "help=50"), ("truth=2", "truth=2")],
         [("20, 4", "50, 2"), ("help=50", "help=20"), ("truth=4", "truth=2")]],
    ),
    "none": (NO_RATING, 3, [same_twice("None, None", "help=None", "truth=None")] * 3),
    "empty": (SILENT, 1, [same_twice("", "", "")] * 3),
    "empty, own": (SILENT | OWN, 1, [same_twice("", "", "")] * 3),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPED)
def test_what_responses_of_a_group_follow(name):
    """Whatever pairs a response is in, it stands once, and each prompt is run once."""
    block, prompts, expected = GROUPED[name]
    ask = {"overall_instruction": "{{ dimensions | map(attribute='rating') | join(', ') }}"}
    made, _ = prompted_of(GROUP, **SHOW | ask | block)
    assert made.comparisons == [(0, 1), (0, 2), (1, 2)]
    assert made.used == [0, 1, 2]
    assert texts_of(made) == expected
    assert len(made.follows) == prompts == len(set(map(tuple, made.follows)))
    assert len(set(made.instructions)) == len(made.instructions)


# Winners rated 90 and 100 of 100, and 3.6 and 4 of 5.
NEARLY = [(100, 4), (90, 3.6), (10, 1)]


@pytest.mark.parametrize("mode", [{}, OWN])
def test_ratings_that_round_alike_share_a_prompt(mode):
    exact, _ = prompted_of(NEARLY, **SHOW | mode)
    made, config = prompted_of(NEARLY, **SHOW | mode, rating_levels=5)
    assert {"help=100", "help=90", "truth=4", "truth=3.6"} < set(exact.instructions)
    low = {"help=0", "truth=1", "help=0 truth=1"} if mode else set()
    assert set(made.instructions) == {"help=100", "truth=4", "help=100 truth=4"} | low
    assert len(made.follows) == 3  # one per criterion
    # What an objective reads of a row stays exact.
    rule = PairRule(config, SCALES)
    pairs = list(rule.pairs(rated_prompt(NEARLY), Counter()))
    ratings = as_text(pairs, rule, "here")["ratings"]
    assert ratings == pytest.approx([0.875, 1, 0.75, 0.775, 0.9, 0.65, 0.05, 0.1, 0])


@pytest.mark.parametrize(
    ("scale", "levels", "ratings", "said"),
    [
        ((1, 5), 5, [1, 2, 3, 4, 5], ["1", "2", "3", "4", "5"]),
        ((1, 5), 9, [1.5, 4], ["1.5", "4"]),
        ((0, 100), 21, [85, 100], ["85", "100"]),
        ((1, 5), 3, [2, 2.99, 4], ["3", "3", "5"]),  # what is halfway goes up
        ((0, 1), 11, [0.15, 0.25, 0.349], ["0.2", "0.3", "0.3"]),
        ((-2, 2), 2, [-2, -0.01, 0], ["-2", "-2", "2"]),
        ((0, 4), 4, [1, 3], ["1.33", "2.67"]),
    ],
)
def test_levels_of_a_scale(scale, levels, ratings, said):
    assert [number(nearest_level(rating, scale, levels)) for rating in ratings] == said
    text = instructions(
        [(ratings[-1], scale[1]), (ratings[-1], scale[0])],
        [{"name": name, "scale": scale} for name in SCALES],
        rating_levels=levels,
    )[1]
    assert f"help is {said[-1]} of {scale[1]}." in text


@given(st.data())
def test_a_level_is_the_nearest(data):
    low, high = sorted(data.draw(st.sets(st.integers(-10, 10), min_size=2, max_size=2)))
    levels = data.draw(st.integers(2, 12))
    rating = data.draw(st.floats(low, high))
    every = [low + i * (high - low) / (levels - 1) for i in range(levels)]
    found = nearest_level(rating, (low, high), levels)
    assert found in every
    assert abs(found - rating) <= min(abs(level - rating) for level in every) + 1e-6


@pytest.mark.parametrize(
    "block", [{"rating_in_prompt": "none"}, SILENT, {"objective": "simpo"}, ALONE | SILENT]
)
def test_levels_that_no_prompt_asks_for(block):
    with pytest.raises(ValidationError, match=r"rating_levels: has no effect with .*; remove it"):
        AMoPOConfig(dimensions=list(SCALES), rating_levels=5, **block)
    AMoPOConfig(dimensions=list(SCALES), **block)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"rating_levels": 5}, False),
        ({"instruction_place": "after"}, False),
        ({"instruction_place": "before"}, True),  # the default
        ({"instruction": "Be good."}, False),
        ({"gamma": 1.0, "weighting": "mean", "share_prompt": False}, True),
    ],
)
def test_fingerprint_holds_what_shapes_the_rows(change, same, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(Q | LISTED))

    def fingerprint(**block):
        cfg = {"base_model": "x", "datasets": [{"path": str(data), "type": "amopo.rated"}]}
        (stored,) = prepare_entries(cfg, AMoPOConfig(**block))
        return stored

    assert (fingerprint(**change) == fingerprint()) == same


@pytest.mark.parametrize("rating", ["chosen", "none"])
def test_default_instructions_name_everything(rating):
    accuracy = {"name": "factual_accuracy", "description": "no false claims", "scale": (0, 5)}
    dimensions = [accuracy, {"name": "tone", "scale": (2, 8)}]
    overall, *others = instructions([(11 / 3, 7), (1, 6)], dimensions, rating_in_prompt=rating)
    facts = [("factual accuracy", "no false claims", "0 to 5", "3.67"), ("tone", "2 to 8", "7")]
    for text, (*named, aim) in zip([*others, overall, overall], facts * 2, strict=True):
        assert all(part in text for part in named)
        assert (aim in re.findall(r"[\d.]*\d", text)) == (rating == "chosen")
        assert ("Aim for the best rating" in text) == (rating == "none")
    assert "tone" not in others[0] and "factual" not in others[1] and "_" not in overall


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ '{0.__class__}'.format(dimension) }}",
        "{{ cycler.__init__.__globals__.os.system('touch FILE') }}",
    ],
)
def test_hostile_template_runs_nothing(template, tmp_path):
    """It is refused while the config is read, by the sandbox."""
    with pytest.raises(ValidationError, match="unsafe"):
        instructions(instruction=template.replace("FILE", str(tmp_path / "file")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "dimension", "dataset", "expected"),
    [
        ("helpsteer", [0, 9], [0, 8], (0, 9)),
        ("helpsteer", None, [0, 8], (0, 8)),
        ("helpsteer", None, None, (0, 4)),
    ],
)
def test_whose_scale_counts(kind, dimension, dataset, expected, caplog):
    dimensions, options = [{"name": "help", "scale": dimension}], {"scale": dataset}
    wanted = data_format(kind, options=options if dataset else {}, dimensions=dimensions)
    assert scales_of(wanted, Survey()) == {"help": expected}
    assert not caplog.text


def test_scale_that_the_data_spans_comes_with_the_yaml_to_write(caplog):
    survey = Survey()
    for ratings in ({"help": 1.33, "truth": 3}, {"help": 4.67, "truth": None}):
        survey.add(ratings)
    scales = scales_of(data_format("rated"), survey)
    assert scales == {"help": (1, 5), "truth": (3, 4)}
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    written = map(yaml.safe_load, re.findall(r"write (\{.*\})", caplog.text))
    assert {d.name: d.scale for d in (Dimension(**block) for block in written)} == scales


# Real data, counted here in another way.

HELPSTEER = ["helpfulness", "correctness", "coherence", "complexity", "verbosity"]
SUMMEVAL = ["coherence", "consistency", "fluency", "relevance"]


def jsonl(path):
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def counted(rows, names, parts):
    """Pairs by kind; ratings are brought to whole numbers of `parts` of a point."""
    count = Counter()
    for one in rows:
        count["single"] += len(one["responses"]) == 1
        for a, b in itertools.combinations(one["responses"], 2):
            gaps = [round(parts * a["scores"][n]) - round(parts * b["scores"][n]) for n in names]
            different = a["text"] != b["text"]
            count["identical"] += not different
            count["overall"] += different and sum(gaps) != 0
            count["per_dimension"] += different and any(gaps)
            count["conflict"] += different and min(gaps) < 0 < max(gaps)
    return count


def all_pairs(kind, rows, names, scale, winner):
    wanted = data_format(kind, options={"scale": scale}, dimensions=names, winner=winner)
    dropped, prompts = Counter(), read_all(wanted, rows)
    rule = PairRule(wanted.config, dict.fromkeys(names, tuple(scale)))
    pairs = [pair for (pair,) in make_examples(wanted, prompts, rule, dropped)]
    return pairs, dropped, prompts


@pytest.mark.parametrize("winner", ["overall", "per_dimension"])
@pytest.mark.parametrize(
    ("folder", "names", "scale", "parts", "candidates"),
    [("helpsteer_sample", HELPSTEER, [0, 4], 1, 697), ("summeval", SUMMEVAL, [1, 5], 3, 12000)],
    ids=["helpsteer", "summeval"],
)
def test_real_pairs(folder, names, scale, parts, candidates, winner, shared):
    rows = jsonl(shared / "data" / folder / "rated.jsonl")
    count = counted(rows, names, parts)
    pairs, dropped, prompts = all_pairs("rated", rows, names, scale, winner)
    assert (len(prompts), len(pairs)) == (len(rows), count[winner])
    ties = candidates - count["identical"] - count[winner]
    assert dropped == Counter({IDENTICAL: count["identical"], TIE: ties, SINGLE: count["single"]})
    won = [set(pair.signs) - {0} for pair in pairs]
    assert won.count({1, -1}) == (count["conflict"] if winner == "per_dimension" else 0)


def test_published_rows_and_grouped_rows_give_the_same_pairs(shared):
    folder = shared / "data" / "helpsteer_sample"
    published, grouped = map(jsonl, sorted(folder.glob("*.jsonl")))
    as_text = [{key: str(value) for key, value in one.items()} for one in published]
    results = []
    for kind, rows in [("helpsteer", published), ("helpsteer", as_text), ("rated", grouped)]:
        pairs, dropped, prompts = all_pairs(kind, rows, HELPSTEER, [0, 4], "per_dimension")
        plain = [(p.prompt.messages, p.prompt.responses, p.signs) for p in pairs]
        results.append((plain, [pair.responses for pair in pairs], dropped, len(prompts)))
    assert results[0] == results[1] == results[2]
    assert results[0][-1] == 139
