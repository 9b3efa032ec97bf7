"""Every dataset format: rows in the published layout, and rows that hypothesis breaks."""

import copy
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import runs
import torch
import yaml
from axolotl.cli.config import prepare_plugins
from axolotl.integrations.base import PluginManager
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_data import data_format, read_all

from axolotl_amopo.commands.inspect.gather import describe
from axolotl_amopo.config.datasets import formats
from axolotl_amopo.data.pairing import PairRule
from axolotl_amopo.data.pipeline import Survey, scales_of, watch_preparations
from axolotl_amopo.data.prompts import prompted
from axolotl_amopo.data.rows import RatedPrompt, Row
from axolotl_amopo.errors import AMoPOError, ConfigError, DataError
from axolotl_amopo.example import Example
from axolotl_amopo.steering.steering import FILE, Steering
from axolotl_amopo.training.steering_file import SteeringFile

# More for a nightly run, e.g. 10000.
EXAMPLES = int(os.environ.get("AMOPO_FUZZ_EXAMPLES", "150"))

TEXTS, ASKED = ["Yes.", "No."], [{"role": "user", "content": "Is it?"}]


def turns(text):
    return [*ASKED, {"role": "assistant", "content": text}]


def annotated(helpfulness, honesty):
    rating = {"Rating": str(helpfulness), "Rationale": "because"}
    return {"helpfulness": rating, "honesty": {"Rating": honesty, "Type": ["1"]}}


SAFE = {
    "prompt": "Is it?",
    "response_0": "Yes.",
    "response_1": "No.",
    "better_response_id": 0,
    "safer_response_id": 1,
    "is_response_0_safe": False,
    "is_response_1_safe": True,
    "response_0_severity_level": 2,
    "response_1_severity_level": 0,
}
BEAVER = {"violence,aiding_and_abetting,incitement": False}
# name: (type, rows, ratings of "Yes." and of "No.", our keys of the entry and the block)
PUBLISHED = {
    "helpsteer3": (
        "helpsteer3",
        [{"context": ASKED, "response1": "Yes.", "response2": "No.", "overall_preference": -2}],
        [{"preference": 2}, {"preference": -2}],
        {},
    ),
    "ultrafeedback": (
        "ultrafeedback",
        [
            {
                "instruction": "Is it?",
                "completions": [
                    {"response": "Yes.", "annotations": annotated(4, "5"), "overall_score": 7.5},
                    {"response": "No.", "annotations": annotated(2, "N/A"), "overall_score": 1},
                ],
            }
        ],
        [{"helpfulness": 4, "honesty": 5}, {"helpfulness": 2, "honesty": None}],
        {"missing_ratings": "mask"},
    ),
    "ultrafeedback_binarized": (
        "ultrafeedback_binarized",
        [
            {
                "prompt": "Is it?",
                "chosen": turns("Yes."),
                "rejected": turns("No."),
                "score_chosen": 8.5,
                "score_rejected": 6,
            }
        ],
        [{"score": 8.5}, {"score": 6}],
        {},
    ),
    "ultrafeedback_binarized, other names": (
        "ultrafeedback_binarized",
        [{"chosen": turns("Yes."), "rejected": turns("No.")} | {"chosen-rating": 5, "r": 4}],
        [{"score": 5}, {"score": 4}],
        {"options": {"fields": {"score_chosen": "chosen-rating", "score_rejected": "r"}}},
    ),
    "safe_rlhf": (
        "safe_rlhf",
        [SAFE],
        [
            {"helpfulness": 1, "safety": 0, "is_safe": 0, "severity": 2},
            {"helpfulness": 0, "safety": 1, "is_safe": 1, "severity": 0},
        ],
        {},
    ),
    "beavertails": (
        "beavertails",
        [
            {"prompt": "Is it?", "response": "Yes.", "is_safe": True, "category": BEAVER},
            {"prompt": "Is it?", "response": "No.", "is_safe": False}
            | {"category": dict.fromkeys(BEAVER, True)},
        ],
        [{"is_safe": 1} | dict.fromkeys(BEAVER, 0), {"is_safe": 0} | dict.fromkeys(BEAVER, 1)],
        {},
    ),
    "summeval": (
        "summeval",
        [{"text": "Is it?", "machine_summaries": TEXTS, "coherence": [4, 1.5], "fluency": [3, 5]}],
        [{"coherence": 4, "fluency": 3}, {"coherence": 1.5, "fluency": 5}],
        {"options": {"template": "{{ text }}"}},
    ),
    "ranked": (
        "ranked",
        [
            {
                "prompt": "Is it?",
                "responses": TEXTS,
                "rankings": {"helpfulness": [[0], [1]], "honesty": [[1, 0]]},
            }
        ],
        [{"helpfulness": 1, "honesty": 1}, {"helpfulness": 0, "honesty": 1}],
        {},
    ),
    "user_defined, columns": (
        "user_defined",
        [{"q": {"text": "Is"}, "a": ["Yes.", "No."], "judges": [{"x": 4}, {"x": 2}]}],
        [{"helpfulness": 4}, {"helpfulness": 2}],
        {
            "options": {
                "template": "{{ q.text }} it?",
                "responses": [{"text": f"a.{i}", "helpfulness": f"judges.{i}.x"} for i in range(2)],
            }
        },
    ),
    "user_defined, a list": (
        "user_defined",
        [
            {
                "meta": {"ask": "Is it?"},
                "out": [
                    {"t": {"s": text}, "s.h": n} for text, n in zip(TEXTS, (4, 2), strict=True)
                ],
            }
        ],
        [{"helpfulness": 4}, {"helpfulness": 2}],
        {
            "options": {
                "fields": {
                    "prompt": "meta.ask",
                    "responses": "out",
                    "text": "t.s",
                    "helpfulness": "s.h",
                }
            }
        },
    ),
    "rated": (
        "rated",
        [
            {
                "prompt": "Is it?",
                "responses": [
                    {"text": text, "scores": {"helpfulness": n}}
                    for text, n in zip(TEXTS, (4, 2), strict=True)
                ],
            }
        ],
        [{"helpfulness": 4}, {"helpfulness": 2}],
        {},
    ),
    "pairs": (
        "pairs",
        [
            {
                "prompt": "Is it?",
                "chosen": {"response": "Yes.", "helpfulness": "4"},
                "rejected": {"response": "No.", "helpfulness": "2"},
            }
        ],
        [{"helpfulness": 4}, {"helpfulness": 2}],
        {},
    ),
    "helpsteer": (
        "helpsteer",
        [
            {"prompt": "Is it?", "response": text, "helpfulness": n}
            for text, n in zip(TEXTS, (4, 2), strict=True)
        ],
        [{"helpfulness": 4}, {"helpfulness": 2}],
        {},
    ),
}


def test_none_is_forgotten():
    assert {f"amopo.{kind}" for kind, *_ in PUBLISHED.values()} == set(formats())


def reader(name):
    """The format for the dimensions of its row here."""
    kind, _, ratings, changes = PUBLISHED[name]
    return data_format(kind, dimensions=list(ratings[0]), **changes)


def read(name, rows):
    """The rows one by one, as they come from JSON; see `read_all` for whole datasets."""
    wanted = reader(name)
    return [wanted.read(Row(row, i, wanted.source)) for i, row in enumerate(rows, start=1)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layout(name):
    _, rows, ratings, _ = PUBLISHED[name]
    (prompt,) = read_all(reader(name), rows)
    assert prompt.messages == ASKED
    assert [response.text for response in prompt.responses] == TEXTS
    assert [response.ratings for response in prompt.responses] == ratings


def pairs_of(name, **block):
    kind, rows, ratings, changes = PUBLISHED[name]
    made = data_format(kind, **{"dimensions": list(ratings[0])} | changes | block)
    (prompt,) = read_all(made, rows)
    rule = PairRule(made.config, scales_of(made, Survey()), made.lower())
    return list(rule.pairs(prompt, Counter())), rule


def test_the_formats_know_what_is_better():
    (pair,), rule = pairs_of("safe_rlhf", dimensions=["severity"])
    assert pair.responses == (1, 0)  # "No." has the lower severity
    assert rule.ratings(pair.prompt, 0) == pytest.approx([1 / 3, 1 / 3])
    assert rule.ratings(pair.prompt, 1) == [1, 1]
    (pair,), *_ = pairs_of("safe_rlhf", winner="per_dimension")
    assert pair.signs[1:] == [-1, 1, 1, 1] and pair.responses == (1, 0)
    (pair,), *_ = pairs_of("beavertails", dimensions=list(BEAVER))
    assert pair.responses == (0, 1)
    own = [{"name": "severity", "direction": "higher"}]
    (pair,), *_ = pairs_of("safe_rlhf", dimensions=own)
    assert pair.responses == (0, 1)
    (pair,), *_ = pairs_of("ultrafeedback", order_by="dataset")
    assert pair.responses == (0, 1)
    pairs, *_ = pairs_of("ranked", dimensions=["honesty"])
    assert not pairs  # a tie


def test_a_score_that_orders_nothing_is_not_read():
    kind, rows, ratings, changes = PUBLISHED["ultrafeedback"]
    rows = copy.deepcopy(rows)
    rows[0]["completions"][0]["overall_score"] = 85
    made = data_format(kind, dimensions=list(ratings[0]), **changes)
    (prompt,) = read_all(made, rows)
    assert [response.ratings for response in prompt.responses] == ratings
    made = data_format(kind, dimensions=list(ratings[0]), order_by="dataset", **changes)
    with pytest.raises(DataError, match="overall_score"):
        read_all(made, rows)


def test_scales_are_shown_as_people_read_them():
    pairs, rule = pairs_of("helpsteer3")
    texts = prompted(pairs, rule.config, rule.scales).instructions
    assert texts[1].endswith("Write an answer whose preference is 2 of 3.")


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("rated", {"template": "{{ x }}"}, "template: is not for this type"),
        ("summeval", {"responses": [{"text": "a"}, {"text": "b"}]}, "responses: is not for"),
        ("user_defined", {"template": "{{ x"}, "is not a Jinja template"),
        ("user_defined", {"responses": [{"text": "a"}, {"help": "b"}]}, "a path for its text"),
    ],
)
def test_keys_that_are_not_for_a_type(kind, options, said):
    with pytest.raises((ConfigError, ValueError), match=said):
        data_format(kind, options=options)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("helpsteer3", {"overall_preference": -4}, "row 1, key 'overall_preference'"),
        ("safe_rlhf", {"better_response_id": 2}, "must be a number from 0 to 1, got 2"),
        ("safe_rlhf", {"response_0_severity_level": 5}, "'response_0.severity': 5 is outside"),
        ("summeval", {"coherence": [1]}, "must be a list of 2 ratings, as machine_summaries"),
        ("ranked", {"rankings": {"helpfulness": [0, 2], "honesty": [0, 1]}}, "from 0 to 1 once"),
        ("ranked", {"rankings": {"helpfulness": [0, 1, 0], "honesty": [0, 1]}}, "from 0 to 1 once"),
        ("rated", {"tools": "[{"}, "key 'tools': is not JSON"),
        ("rated", {"tools": [1]}, "must be a list of tools"),
        ("user_defined, columns", {"q": None}, "template': can't be filled from this row"),
        ("user_defined, columns", {"judges": [{"x": 4}]}, "the rating is missing"),
    ],
)
def test_a_bad_row_says_what_is_wrong_with_it(name, change, said):
    rows = copy.deepcopy(PUBLISHED[name][1])
    with pytest.raises(AMoPOError) as caught:
        read(name, [rows[0] | change, *rows[1:]])
    assert said in str(caught.value)
    assert "row 1" in str(caught.value)


def test_axolotl_loads_what_the_yaml_describes(tmp_path, tiny_model):
    """axolotl has a format of its own by that name."""
    _, rows, _, changes = PUBLISHED["user_defined, columns"]
    data = runs.write_jsonl(tmp_path / "data.jsonl", rows)
    entry = {"path": str(data), "type": "amopo.user_defined"} | changes["options"]
    block = {"dimensions": ["helpfulness"]}
    values = runs.config(tmp_path, tiny_model, data, datasets=[entry], amopo=block)
    _, datasets = runs.prepare(runs.write_config(tmp_path, values))
    assert len(datasets.train_dataset) == 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_is_shown_and_prepared(name, tmp_path, tiny_model):
    """Through axolotl, from a file: what `inspect` shows of what a run is given."""
    kind, rows, ratings, changes = PUBLISHED[name]
    data = runs.write_jsonl(tmp_path / "data.jsonl", rows)
    entry = {"path": str(data), "type": f"amopo.{kind}"} | changes.get("options", {})
    values = runs.config(
        tmp_path,
        tiny_model,
        data,
        datasets=[entry],
        amopo={"dimensions": list(ratings[0]), "winner": "per_dimension"}
        | {key: value for key, value in changes.items() if key != "options"},
    )
    path = runs.write_config(tmp_path, values)
    with watch_preparations() as preparations:
        _, datasets = runs.prepare(path)
    shown, _ = describe(*preparations, rows=1)
    assert (shown.rows, shown.prompts, shown.responses, shown.pairs_kept) == (len(rows), 1, 2, 1)
    (row,) = datasets.train_dataset
    (example,) = shown.examples
    assert len(row["response_ids"]) == len(example.responses) == 2
    signs = dict(zip(["overall", *ratings[0]], row["signs"], strict=True))
    yes, no = ratings
    differ = {key for key in yes if None not in (yes[key], no[key]) and yes[key] != no[key]}
    assert {name for name, sign in signs.items() if sign} - {"overall"} == differ
    assert [seen.weighs for seen in example.seen] == [sign != 0 for sign in row["signs"]]


# Broken rows: a value somewhere in a good row is taken out or replaced by anything.

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)


def places(value, path=()):
    """The paths of all values inside one."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def texts_in(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts_in(inner)


@pytest.mark.parametrize("name", PUBLISHED)
def test_broken_rows_raise_our_error_or_keep_their_text(name):
    _, rows, *_ = PUBLISHED[name]
    where = [(i, path) for i, row in enumerate(rows) for path in places(row)]

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(data=st.data(), damaged=st.lists(st.sampled_from(where), min_size=1, max_size=3))
    def check(data, damaged):
        broken = copy.deepcopy(rows)
        for i, path in damaged:
            holder = broken[i]
            try:
                for key in path[:-1]:
                    holder = holder[key]
                if data.draw(st.booleans()):
                    del holder[path[-1]]
                else:
                    holder[path[-1]] = data.draw(JSON)
            except (KeyError, IndexError, TypeError):  # what it was in is broken already
                continue
        try:
            prompts = read(name, broken)
        except AMoPOError as error:
            assert "row " in str(error)
            return
        known = list(texts_in(broken))
        for prompt in prompts:
            assert isinstance(prompt, RatedPrompt)
            for response in prompt.responses:
                assert response.text in known
            assert all(isinstance(message["content"], str) for message in prompt.messages)
            assert prompt.messages[-1]["content"].strip()

    check()


SENTENCE = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(
    lambda text: text.strip()
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_whatever_the_texts_are_they_arrive(name):
    if "helpsteer" in name or name == "pairs":
        pytest.skip("earlier turns are written into the text there")

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(question=SENTENCE, yes=SENTENCE, no=SENTENCE)
    def check(question, yes, no):
        if yes == no:
            return
        named = {"Is it?": question, "Yes.": yes, "No.": no, "Is": question}
        rows = [filled(row, named) for row in PUBLISHED[name][1]]
        prompt, *others = read(name, rows)
        responses = [*prompt.responses, *(r for other in others for r in other.responses)]
        assert [response.text for response in responses] == [yes, no]
        asked = prompt.messages[-1]["content"]
        # A template's text is stripped.
        assert asked == question or asked in (question.strip(), f"{question} it?".strip())

    check()


def filled(value, named):
    if isinstance(value, str):
        return named.get(value, value)
    if isinstance(value, dict):
        return {key: filled(inner, named) for key, inner in value.items()}
    return [filled(inner, named) for inner in value] if isinstance(value, list) else value


# For axolotl's supervised fine-tuning


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Four prompts of the quickstart's data; one response alone, and one without honesty."""
    rows = (runs.QUICKSTART / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(row) for row in rows[:4]]
    rows[1]["responses"] = rows[1]["responses"][:1]
    del rows[2]["responses"][0]["scores"]["honesty"]
    return runs.write_jsonl(tmp_path_factory.mktemp("answers") / "answers.jsonl", rows)


RATED = {"dimensions": ["helpfulness", "honesty"], "missing_ratings": "mask"}


def ric(folder, model, data, **changes):
    """A run with `rl: amopo`, in whose step are all rows."""
    values = {
        "amopo": RATED | {"objective": "ric"}, "micro_batch_size": 4, "sequence_len": 2048,
        "num_epochs": 3, "max_steps": None, "optimizer": "sgd", "learning_rate": 0.5,
    }  # fmt: skip
    return runs.config(folder, model, data, **values | changes)


def supervised(folder, model, data, **changes):
    """The same without it."""
    entry = {"path": str(data), "type": "amopo.ric", "rows": "amopo.rated", "scale": [1, 5]}
    values = {"rl": None, "amopo": dict(RATED), "datasets": [entry], "micro_batch_size": 10}
    return ric(folder, model, data, **values | changes)


def written_rows(folder, values):
    """The config and the training rows, as axolotl prepares them."""
    folder.mkdir()
    cfg, datasets = runs.prepare(runs.write_config(folder, values(folder)))
    return cfg, datasets.train_dataset


@pytest.mark.parametrize(
    ("block", "count"),
    [
        ({}, 10),
        ({"prompts": "per_criterion", "rating_levels": 2}, 30),
        ({"instruction_place": "after", "overall_instruction": "{{ dimensions[0].rating }}"}, 10),
        (
            {"rating_in_prompt": "none", "missing_ratings": "drop", "single_responses": "drop"},
            8,
        ),
    ],
    ids=["defaults", "prompts", "instruction", "dropped"],
)
def test_supervised_rows_are_the_sequences_of_ric(block, count, tmp_path, tiny_model, answers):
    def values(make, objective):
        return lambda folder: make(folder, tiny_model, answers, amopo=RATED | objective | block)

    _, examples = written_rows(tmp_path / "ric", values(ric, {"objective": "ric"}))
    cfg, rows = written_rows(tmp_path / "sft", values(supervised, {}))
    expected = []
    for example in map(Example.from_row, examples):
        for text, response in example.places():
            prompt, answer = example.prompts[text], example.responses[response]
            expected.append((prompt + answer, [-100] * len(prompt) + answer))
    assert len(expected) == count
    assert sorted((row["input_ids"], row["labels"]) for row in rows) == sorted(expected)
    assert all(set(row["attention_mask"]) == {1} for row in rows)
    assert set(rows.column_names) == {"input_ids", "labels", "attention_mask"}
    assert not cfg.amopo.enabled and cfg.rl is None


def test_supervised_training_is_that_of_ric(tmp_path, tiny_model, answers, forks):
    """With the same losses and weights, also of rows that are packed, by the whole command."""
    whole, single, packed = (tmp_path / name for name in ("ric", "single", "packed"))
    for folder in (whole, single, packed):
        folder.mkdir()
    expected = runs.train(runs.write_config(whole, ric(whole, tiny_model, answers)))
    values = {"micro_batch_size": 2, "gradient_accumulation_steps": 5}
    path = runs.write_config(single, supervised(single, tiny_model, answers, **values))
    trainer = runs.train(path)
    values = {"micro_batch_size": 1, "sample_packing": True, "save_strategy": "steps"}
    values |= {"save_steps": 3, "attn_implementation": "sdpa", "pad_to_sequence_len": False}
    path = runs.write_config(packed, supervised(packed, tiny_model, answers, **values))
    command = Path(sys.executable).with_name("axolotl")
    forks(1, packed, "runs", "script", str(command), "train", str(path), "--launcher", "python")
    checkpoint = packed / "out" / "checkpoint-3"
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))

    assert "AMoPO" not in type(trainer).__name__
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(losses) == 3 and losses[0] - losses[-1] > 0.01
    assert runs.losses(expected) == pytest.approx(losses, abs=1e-4)
    assert runs.losses(trainer) == pytest.approx(losses, abs=1e-4)
    weights = load_file(whole / "out" / "model.safetensors")
    for folder in (single, packed):
        for name, weight in load_file(folder / "out" / "model.safetensors").items():
            torch.testing.assert_close(weight, weights[name], rtol=0, atol=2e-5)
    # Whoever has the model can ask it for ratings.
    steering = Steering.load(single / "out")
    assert steering == Steering.load(checkpoint) == Steering.load(whole / "out")
    assert steering.one_prompt and steering.takes_weights


def test_supervised_rows_go_with_those_of_other_types(tmp_path, tiny_model, answers):
    """And with several processes, as on a Ray worker, which registers a validated config again."""
    talk = [{"role": role, "content": role} for role in ("user", "assistant")]
    other = runs.write_jsonl(tmp_path / "other.jsonl", [{"messages": talk}] * 3)
    entries = supervised(tmp_path, tiny_model, answers)["datasets"]
    entries.append({"path": str(other), "type": "chat_template"})
    cfg, rows = written_rows(
        tmp_path / "run", lambda folder: supervised(folder, tiny_model, answers, datasets=entries)
    )
    assert len(rows) == 10 + 3
    worker = DictDefault(cfg.to_dict())
    for derived in ("batch_size", "capabilities", "env_capabilities"):
        worker.pop(derived, None)
    prepare_plugins(worker)
    again = validate_config(worker)
    assert again.amopo.to_dict() == cfg.amopo.to_dict()
    assert [d.to_dict() for d in again.datasets] == [d.to_dict() for d in cfg.datasets]


def test_supervised_evaluation_rows_alone(tmp_path, tiny_model, answers):
    entries = supervised(tmp_path, tiny_model, answers)["datasets"]
    talk = [{"role": role, "content": role} for role in ("user", "assistant")]
    other = runs.write_jsonl(tmp_path / "other.jsonl", [{"messages": talk}] * 3)
    values = supervised(
        tmp_path, tiny_model, answers, datasets=[{"path": str(other), "type": "chat_template"}],
        test_datasets=[entry | {"split": "train"} for entry in entries], val_set_size=None,
    )  # fmt: skip
    cfg, datasets = runs.prepare(runs.write_config(tmp_path, values))
    assert len(datasets.eval_dataset) == 10
    assert SteeringFile(cfg, datasets.train_dataset).steering is None
    assert SteeringFile(cfg, datasets.eval_dataset).steering.one_prompt


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rl": "amopo"}, r"datasets\[0\].type: amopo.ric is for supervised .* remove rl, or"),
        ({"rl": "dpo"}, "rl: 'dpo' can't work with type: amopo.ric"),
        ({"streaming": True}, "streaming: True can't work with type: amopo.ric"),
        ({"amopo": {"objective": "simpo"}}, "amopo.objective: simpo can't go with type: amopo.ric"),
        ({"amopo": {"share_prompt": True}}, "amopo.share_prompt: has no effect .*; remove it"),
        ({"amopo": {"dimension": ["a"]}}, "amopo.dimension: unknown key. Did you mean"),
        ({"amopo": {"dimensions": ["kindness"]}}, "row 1, .*kindness': the rating is missing"),
        (
            {"amopo": {"dimensions": ["kindness"], "missing_ratings": "mask"}},
            "no row has a rating on the dimension 'kindness'",
        ),
        ({"rows": None}, r"datasets\[0\].rows: None is not .*Known: amopo.beavertails"),
        ({"rows": "amopo.rate"}, "Did you mean 'amopo.rated'"),
        ({"rows": "amopo.ric"}, r"datasets\[0\].rows: 'amopo.ric' is not a dataset format"),
        ({"rows": "amopo.pairs"}, "row 1, key 'chosen': is missing"),
        ({"feilds": {}}, r"datasets\[0\].feilds: unknown key. Did you mean 'fields'"),
        ({"type": "axolotl_amopo.data.supervised"}, "write type: amopo.ric, and rows:"),
    ],
)
def test_supervised_rows_that_can_not_be(changes, message, tmp_path, tiny_model, answers):
    values = supervised(tmp_path, tiny_model, answers)
    of_config = {
        key: value for key, value in changes.items() if key in ("rl", "streaming", "amopo")
    }
    values["datasets"][0] |= {k: v for k, v in changes.items() if k not in of_config}
    with pytest.raises(AMoPOError, match=message) as error:
        runs.prepare(runs.write_config(tmp_path, values | of_config))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("command", ["merge_lora", "inference"])
def test_supervised_models_are_used_without_their_data(command, tmp_path, tiny_model):
    """And a merged one keeps its steering file."""
    path = runs.write_config(tmp_path, supervised(tmp_path, tiny_model, tmp_path / "gone.jsonl"))
    cfg = runs.load(path, **{command: True})
    plugins = [p for p in PluginManager.get_instance().plugins.values() if hasattr(p, "_is_ours")]
    for folder in ("adapter", "merged"):
        (tmp_path / folder).mkdir()
    (tmp_path / "adapter" / FILE).write_text("{}", encoding="utf-8")
    for plugin in plugins:
        plugin.post_lora_merge(cfg, str(tmp_path / "adapter"), str(tmp_path / "merged"))
    assert (tmp_path / "merged" / FILE).is_file()
    with pytest.raises(ConfigError, match=r"gone\.jsonl"):
        runs.load(path)


def test_what_has_no_effect_on_supervised_rows_is_said(tmp_path, tiny_model, answers, caplog):
    values = supervised(tmp_path, tiny_model, answers, train_on_inputs=True)
    with caplog.at_level("WARNING"):
        runs.load(runs.write_config(tmp_path, values))
    assert "train_on_inputs has no effect with type: amopo.ric" in caplog.text


def test_the_config_for_supervised_fine_tuning_on_the_page(tmp_path, tiny_model, answers):
    page = (runs.ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n([^`]*type: amopo.ric\n.*?)```", page, re.DOTALL)
    values = yaml.safe_load(text)
    assert values["datasets"][0]["rows"] == "amopo.helpsteer"
    values["datasets"][0] |= {"path": str(answers), "split": "train"}
    cfg = runs.load(
        runs.write_config(tmp_path, ric(tmp_path, tiny_model, answers, rl=None) | values)
    )
    assert cfg.sample_packing and not cfg.amopo.enabled
