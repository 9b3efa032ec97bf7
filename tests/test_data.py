"""Rows -> rated prompts -> pairs -> instructions: every format, the pair rule, what is counted."""

import importlib
import itertools
import json
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

from axolotl_amopo.config.block import AMoPOConfig, Dimension
from axolotl_amopo.config.datasets import prepare_entries
from axolotl_amopo.data.format import Survey
from axolotl_amopo.data.pairing import (
    CLOSE,
    IDENTICAL,
    MISSING,
    NO_ORDER,
    NOT_DRAWN,
    SINGLE,
    TIE,
    PairRule,
)
from axolotl_amopo.data.rows import RatedPrompt, Response

SCALES = {"help": (0, 100), "truth": (1, 5)}
SCALED = [{"name": name, "scale": scale} for name, scale in SCALES.items()]


def strategy(kind, tokenizer=None, entry=None, options=None, sequence_len=2048, **block):
    """A format's strategy as axolotl loads it; `options` are our own keys of the entry."""
    block = {"dimensions": list(SCALES), "datasets": {"id": {"options": options or {}}}} | block
    module = f"axolotl_amopo.formats.{kind}" + "_" * (kind == "user_defined")
    return importlib.import_module(module).load(
        tokenizer,
        DictDefault(amopo=block, sequence_len=sequence_len),
        DictDefault({"path": "data.jsonl", "conversation": "id"} | (entry or {})),
    )


def read_all(wanted, rows):
    """The prompts that a strategy makes of rows."""
    dataset = Dataset.from_list(rows)
    return list(wanted.prompts(dataset, wanted.survey(dataset, Counter())))


def read(kind, rows, changes=()):
    return read_all(strategy(kind, **dict(changes)), rows)


def rated_prompt(ratings, texts=None, names=SCALES, ordered=False):
    texts = texts or [f"answer {i}" for i in range(len(ratings))]
    rated = [dict(zip(names, values, strict=True)) for values in ratings]
    return RatedPrompt([user("Why?")], list(map(Response, texts, rated)), [1], ordered)


def made(prompt, scales=SCALES, lower=(), seed=0, **block):
    """The pairs that are made of a prompt, as plain values, and what is counted as dropped."""
    dropped = Counter()
    config = AMoPOConfig(dimensions=list(scales), **block)
    pairs = PairRule(config, scales, frozenset(lower), seed).pairs(prompt, dropped)
    return [(pair.responses, pair.winners, pair.mask) for pair in pairs], dict(dropped)


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

ALL, NO_TRUTH, NO_HELP = [True] * 3, [True, True, False], [True, False, True]
NO_OVERALL, OVERALL = [False, True, True], [True, False, False]
PER, BEST = {"winner": "per_dimension"}, {"pairs": "best_worst"}
MASK, DROP = {"missing_ratings": "mask"}, {"missing_ratings": "drop"}
ALONE = {"overall": False}  # no overall prompt
LOWER = {"lower": ["help"]}
ONE = [0, 0, 0]  # the overall winner wins under every prompt

# fmt: off
# name: (ratings, settings, pairs as (responses, winners, mask), dropped)
RULE = {
    "mean of normalised ratings": ([(60, 1), (40, 4)], {}, [((1, 0), ONE, ALL)], {}),
    "no overall prompt": ([(60, 1), (40, 4)], ALONE, [((1, 0), [0, 0], [True, True])], {}),
    "conflict, one winner": ([(90, 2), (20, 4)], {}, [((0, 1), ONE, ALL)], {}),
    "tie": ([(100, 1), (0, 5)], {}, [], {TIE: 1}),
    "missing, drop": ([(60, None), (40, 4)], DROP, [], {MISSING: 1}),
    "missing, mask": ([(60, None), (40, 4)], MASK, [((0, 1), ONE, NO_TRUTH)], {}),
    "mask, per dimension": ([(60, None), (80, 4)], MASK | PER, [((1, 0), ONE, NO_TRUTH)], {}),
    "mask, nothing in common": ([(60, None), (None, 4)], MASK, [], {TIE: 1}),
    "one response": ([(60, 1)], {}, [], {SINGLE: 1}),
    "all pairs": ([(50, 3), (0, 1), (100, 5)], {},
                  [((0, 1), ONE, ALL), ((2, 0), ONE, ALL), ((2, 1), ONE, ALL)], {}),
    "best and worst": ([(50, 3), (0, 1), (100, 5)], BEST, [((2, 1), ONE, ALL)], {}),
    "best and worst, all tie": ([(50, 3), (100, 1), (0, 5)], BEST, [], {TIE: 1}),
    "one unrated": ([(90, 5), (50, 3), (None, None)], BEST | MASK, [((0, 1), ONE, ALL)], {}),
    "per dimension, conflict": ([(90, 2), (20, 4)], PER, [((0, 1), [0, 0, 1], ALL)], {}),
    "per dimension, second wins": ([(20, 4), (90, 2)], PER, [((1, 0), [0, 0, 1], ALL)], {}),
    "per dimension, one is equal": ([(20, 4), (20, 5)], PER, [((1, 0), ONE, NO_HELP)], {}),
    "equal overall": ([(0, 5), (100, 1)], PER, [((0, 1), [0, 1, 0], NO_OVERALL)], {}),
    "per dimension, all equal": ([(20, 4), (20, 4)], PER, [], {TIE: 1}),
    "lower is better": ([(60, 1), (40, 1)], LOWER, [((1, 0), ONE, ALL)], {}),
    "lower, per dimension": ([(60, 5), (40, 2)], LOWER | PER, [((0, 1), [0, 1, 0], ALL)], {}),
    "by one dimension": ([(90, 2), (20, 4)], {"order_by": "truth"}, [((1, 0), ONE, ALL)], {}),
    "by a dimension without rating": ([(90, None), (20, 4)], MASK | {"order_by": "truth"}, [],
                                      {NO_ORDER: 1}),
    "by the dataset, which has none": ([(90, 2), (20, 4)], {"order_by": "dataset"}, [],
                                       {NO_ORDER: 1}),
    "gap": ([(50, 3), (60, 3)], {"min_gap": 0.05}, [((1, 0), ONE, ALL)], {}),
    "gap too small": ([(50, 3), (60, 3)], {"min_gap": 0.06}, [], {CLOSE: 1}),
    "gap, per dimension": ([(50, 3), (60, 4)], PER | {"min_gap": 0.2},
                           [((0, 1), [0, 0, 1], [False, False, True])], {}),
}
# Where the data itself names the winner, the first response.
ORDERED = {
    "ratings say otherwise": ([(0, 1), (100, 5)], {}, [((0, 1), ONE, ALL)], {}),
    "equal ratings": ([(50, 3), (50, 3)], {}, [((0, 1), ONE, ALL)], {}),
    "per dimension": ([(0, 4), (100, 3)], PER, [((0, 1), [0, 1, 0], ALL)], {}),
    "equal ratings, per dimension": ([(50, 3), (50, 3)], PER, [((0, 1), ONE, OVERALL)], {}),
    "nothing left": ([(50, 3), (50, 3)], PER | ALONE, [], {TIE: 1}),
    "the mean is asked for": ([(0, 1), (100, 5)], {"order_by": "mean"}, [((1, 0), ONE, ALL)], {}),
}
# fmt: on


@pytest.mark.parametrize("name", [*RULE, *ORDERED])
def test_pair_rule(name):
    ratings, block, pairs, dropped = (RULE | ORDERED)[name]
    assert made(rated_prompt(ratings, ordered=name in ORDERED), **block) == (pairs, dropped)


def test_the_datasets_own_rating_decides_where_that_is_asked_for():
    prompt = rated_prompt([(90, 5), (10, 1), (50, 3)])
    for response, overall in zip(prompt.responses, (0.2, 0.9, None), strict=True):
        response.overall = overall
    assert made(prompt, order_by="dataset") == ([((1, 0), ONE, ALL)], {NO_ORDER: 2})
    best = made(prompt, order_by="dataset", pairs="best_worst")
    assert best == ([((1, 0), ONE, ALL)], {})


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
    assert made(prompt) == ([((2, 0), ONE, ALL), ((1, 2), ONE, ALL)], {IDENTICAL: 1})


def test_equal_means_tie_whatever_floats_make_of_them():
    """Means of three raters: thirds, whose sums differ in the last digit."""
    prompt = rated_prompt([(1, 1, 5 / 3), (1, 4 / 3, 4 / 3)], names="abc")
    assert made(prompt, scales=dict.fromkeys("abc", (1, 5))) == ([], {TIE: 1})


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
    for responses, winners, mask in pairs:
        better, worse = (ratings[i] for i in responses)
        both = zip(better, worse, strict=True)
        gaps = [None if None in ratings else ratings[0] - ratings[1] for ratings in both]
        lead = sum(Fraction(gap or 0, width) for gap, width in zip(gaps, (4, 8, 5), strict=True))
        assert lead >= 0
        if winner == "overall":
            assert lead > 0 and not any(winners)
            assert mask == [True] * overall + [gap is not None for gap in gaps]
        else:
            assert mask == [lead > 0] * overall + [gap not in (None, 0) for gap in gaps]
            for gap, side in zip(gaps, winners[overall:], strict=True):
                assert not gap or (gap > 0) == (side == 0)


SHOW = {
    "instruction": "{{ dimension }}={{ rating }}",
    "overall_instruction": "{% for d in dimensions %}{{ d.dimension }}={{ d.rating }} {% endfor %}",
}
A, B, OWN = "help=90 truth=2", "help=20 truth=4", {"rating_in_prompt": "own"}
# fmt: off
# name: (settings, the instructions of a pair of A and B: A wins overall, B on truth)
SHOWN = {
    "chosen": ({}, [A, "help=90", "truth=2"]),
    "chosen, per dimension": (PER, [A, "help=90", "truth=4"]),
    "own": (OWN, [A, B, "help=90", "help=20", "truth=2", "truth=4"]),
    "own, per dimension": (OWN | PER, [A, B, "help=90", "help=20", "truth=4", "truth=2"]),
    "none": ({"rating_in_prompt": "none"}, ["help=None truth=None", "help=None", "truth=None"]),
    "no overall prompt": (ALONE | PER, ["help=90", "truth=4"]),
    "empty": ({"instruction": "", "overall_instruction": ""}, ["", "", ""]),
}
# fmt: on


def instructions(ratings=((90, 2), (20, 4)), dimensions=SCALED, **block):
    wanted = strategy("rated", dimensions=dimensions, **block)
    scales = {dimension["name"]: dimension["scale"] for dimension in dimensions}
    rule = PairRule(wanted.config, scales)
    (pair,) = rule.pairs(rated_prompt(ratings, names=scales), Counter())
    return wanted.instructions(pair, scales)


@pytest.mark.parametrize("name", SHOWN)
def test_rating_in_the_instruction(name):
    block, expected = SHOWN[name]
    assert instructions(**SHOW | block) == expected


@pytest.mark.parametrize(
    ("change", "same"),
    [
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
    wanted = strategy(kind, options=options if dataset else {}, dimensions=dimensions)
    assert wanted.scales_of(Survey()) == {"help": expected}
    assert not caplog.text


def test_scale_that_the_data_spans_comes_with_the_yaml_to_write(caplog):
    survey = Survey()
    for ratings in ({"help": 1.33, "truth": 3}, {"help": 4.67, "truth": None}):
        survey.add(ratings)
    scales = strategy("rated").scales_of(survey)
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
    wanted = strategy(kind, options={"scale": scale}, dimensions=names, winner=winner)
    dropped, prompts = Counter(), read_all(wanted, rows)
    rule = PairRule(wanted.config, dict.fromkeys(names, tuple(scale)))
    return [p for one in prompts for p in wanted._pairs(one, rule, dropped)], dropped, prompts


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
    won = [{w for w, keep in zip(p.winners, p.mask, strict=True) if keep} for p in pairs]
    assert won.count({0, 1}) == (count["conflict"] if winner == "per_dimension" else 0)


def test_published_rows_and_grouped_rows_give_the_same_pairs(shared):
    folder = shared / "data" / "helpsteer_sample"
    published, grouped = map(jsonl, sorted(folder.glob("*.jsonl")))
    as_text = [{key: str(value) for key, value in one.items()} for one in published]
    results = []
    for kind, rows in [("helpsteer", published), ("helpsteer", as_text), ("rated", grouped)]:
        pairs, dropped, prompts = all_pairs(kind, rows, HELPSTEER, [0, 4], "per_dimension")
        plain = [(p.prompt.messages, p.prompt.responses, p.winners, p.mask) for p in pairs]
        results.append((plain, [pair.responses for pair in pairs], dropped, len(prompts)))
    assert results[0] == results[1] == results[2]
    assert results[0][-1] == 139
