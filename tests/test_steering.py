"""Steering: settings become what training rendered, in tokens, in a chat template, on a page."""

import copy
import importlib.util
import itertools
import json
import re
import shutil
import sys
import urllib.request
from pathlib import Path

import pytest
from chat_server import ChatServer
from click.testing import CliRunner
from jinja2 import TemplateError, nodes
from runs import config, prepare, steering, write_config, write_jsonl
from test_tokens import adds_bos, applied

from axolotl_amopo.commands import amopo
from axolotl_amopo.commands.generate.candidates import (
    Counts,
    Drawn,
    draw_candidates,
    spread_of,
)
from axolotl_amopo.commands.generate.export import export_answers
from axolotl_amopo.commands.kit.answers import answer_prompts, generate_answers
from axolotl_amopo.commands.kit.generator import Generator, Sampling, stop_ids, vllm_lora_rank
from axolotl_amopo.commands.kit.models import (
    chat_template,
    chat_tokenizer,
    find_model,
    load_tokenizer,
)
from axolotl_amopo.commands.kit.questions import read_prompts, text_prompt
from axolotl_amopo.commands.template.steered import steered_template
from axolotl_amopo.config.block import AMoPOConfig
from axolotl_amopo.config.instructions import (
    DEFAULT_INSTRUCTION,
    DEFAULT_OVERALL_INSTRUCTION,
    DEFAULT_WEIGHTS_INSTRUCTION,
    ENVIRONMENT,
)
from axolotl_amopo.data.tokenizer import ChatTokenizer
from axolotl_amopo.errors import AMoPOError
from axolotl_amopo.model.generate import Seeded, SeededDraws
from axolotl_amopo.steering.steering import (
    FILE,
    SteeredDimension,
    Steering,
    Weights,
    parse_settings,
    read_settings,
    written,
)
from axolotl_amopo.steering.template import check, steered, unsteered

# Whitespace that Jinja treats otherwise in transformers' environment, comments, raw text, quotes.
ODD = (
    '  \n{% if rating %}\n  It\'s a "{{ dimension }}"\n  {%- endif %}\n{# no #}\n'
    "{% raw %}{{ x }}{% endraw %} \\n ü😀 {{ rating }}\n"
    " {% for i in [1] %}\n  {{ i }}\n{% endfor %}"
)
ODD_OVERALL = "{% for d in dimensions %}\n  {{ d.dimension }}: {{ d.rating }}\n{% endfor %}\n now"


# The file


def test_the_file_comes_back_as_it_was(tmp_path):
    made = steering(
        instruction_place="system",
        chat_template_kwargs={"enable_thinking": False},
        eot_tokens=["<end_of_turn>"],
    )
    made.save(tmp_path)
    assert Steering.load(tmp_path) == made
    said = json.loads((tmp_path / FILE).read_text(encoding="utf-8"))
    assert said["prompts"][0] == "overall" and said["instruction"] == DEFAULT_INSTRUCTION
    assert said["dimensions"][2] == {
        "name": "toxicity", "description": None, "scale": [-2, 2], "direction": "lower",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "is of version 2, and this package reads 1"),
        ({"dimensions": []}, "broken at 'dimensions'"),
        ({"instruction": "{{ nothing }}"}, "not a Jinja template that works: 'nothing' is undef"),
        ({"prompts": ["helpfulness"]}, "prompts must be the dimensions' names"),
    ],
)
def test_a_broken_file_is_named(tmp_path, change, message):
    said = json.loads(steering().save(tmp_path).read_text(encoding="utf-8"))
    (tmp_path / FILE).write_text(json.dumps(said | change), encoding="utf-8")
    with pytest.raises(AMoPOError, match=re.escape(message)) as error:
        Steering.load(tmp_path)
    assert FILE in str(error.value) and "name the YAML" in str(error.value)


def test_a_missing_or_cut_file_is_named(tmp_path):
    with pytest.raises(AMoPOError, match=r"has no amopo_steering\.json.*YAML"):
        Steering.load(tmp_path)
    (tmp_path / FILE).write_text('{"version": 1, "prom', encoding="utf-8")
    with pytest.raises(AMoPOError, match="is broken"):
        Steering.load(tmp_path)


# Settings


def test_a_model_can_be_asked_for_by_weights():
    names = ["helpfulness", "is_safe", "toxicity"]
    made = steering(
        prompts=names, one_prompt=True, weighted=True, rating_in_prompt="none",
        overall_template="{% for d in dimensions %}{{ d.weight }} {% endfor %}",
    )  # fmt: skip
    for settings, expected in [
        ({}, ""),
        ({"is_safe": None}, "0.0 1.0 0.0"),
        ({"is_safe": 0.6}, "0.2 0.6 0.2"),
        ({"is_safe": 0}, "0.5 0.0 0.5"),
        ({"is_safe": None, "toxicity": None}, "0.0 0.5 0.5"),
        (dict.fromkeys(names, 0.7), "0.3 0.3 0.3"),
        ({"helpfulness": 0.2, "is_safe": 0.1, "toxicity": 0.1}, "0.5 0.2 0.2"),
    ]:
        assert made.instruction(settings) == expected, settings
    for settings, message in [
        ({"is_safe": 2}, "2 is no weight; write a number from 0 to 1"),
        (dict.fromkeys(names, 0), "the weights are all 0"),
        ({"overall": None}, "no dimension 'overall'"),
    ]:
        with pytest.raises(AMoPOError, match=message):
            made.instruction(settings)
    assert made.tries(made.dimension("is_safe"))[:2] == [0, 0.1]


def test_a_model_of_one_prompt_is_asked_for_all_dimensions():
    made = steering(one_prompt=True)
    assert made.instruction({}) == ""
    one = made.instruction({"helpfulness": 2})
    assert "aim for 2. is safe, from 0 to 1: aim for 1. toxicity, from -2 to 2: aim for -2." in one
    assert one == made.instruction({"helpfulness": 2, "toxicity": None})
    assert one == steering().instruction({"overall": None, "helpfulness": 2})
    apart = steering(one_prompt=True, prompts=["helpfulness", "is_safe", "toxicity"])
    assert apart.instruction({"helpfulness": 2, "is_safe": 1}) == one


def asked_ratings(made, weights):
    return list(map(float, re.findall(r"aim for (\S+)\.", made.instruction(Weights(weights)))))


def test_weights_become_ratings_as_in_ric(shared):
    """By the published function, on the scale that the golden case's rewards span."""
    text = (shared / "golden" / "methods" / "ric.json").read_text(encoding="utf-8")
    cases = [c for c in json.loads(text)["cases"] if c["kind"] == "target_from_preference"]
    for case in cases:
        dimensions = [
            SteeredDimension(name=f"d{i}", scale=(min(rewards), max(rewards)))
            for i, rewards in enumerate(case["rewards"])
        ]
        names = [d.name for d in dimensions]
        made = steering(prompts=["overall", *names], dimensions=dimensions)
        ratings = made.ratings(Weights(zip(names, case["preference"], strict=True)))
        assert ratings.pop("overall", 0) is None
        assert list(ratings.values()) == pytest.approx(case["expected"]["l2"], abs=0.0501)
    assert cases


@pytest.mark.parametrize("one_prompt", [False, True])
def test_weights_ask_for_all_dimensions(one_prompt):
    """Scales 1 to 5, 0 to 1, and -2 to 2 where lower is better."""
    prompts = ["helpfulness", "is_safe", "toxicity"]
    made = steering(one_prompt=one_prompt, prompts=["overall"] * (not one_prompt) + prompts)
    assert asked_ratings(made, {"toxicity": None}) == [1, 0, -2]
    assert asked_ratings(made, {"helpfulness": 0.6, "toxicity": 0.4}) == pytest.approx(
        [1 + 4 * 0.6 / 0.52**0.5, 0, 2 - 4 * 0.4 / 0.52**0.5], abs=0.005
    )
    equal = [1 + 4 / 3**0.5, 1 / 3**0.5, 2 - 4 / 3**0.5]
    for weights in (dict.fromkeys(prompts, 0.2), {"is_safe": 1 / 3}):
        assert asked_ratings(made, weights) == pytest.approx(equal, abs=0.005)
    rounded = made.model_copy(update={"rating_levels": 5})
    assert asked_ratings(rounded, dict.fromkeys(prompts, 1)) == [3, 0.5, 0]
    assert made.instruction(Weights()) == ""
    assert written(Weights(helpfulness=0.6, is_safe=None)) == "weights helpfulness=0.6, is_safe"


def test_a_weight_is_a_weight_whatever_the_prompts_have():
    """Of a model with weights in its prompts, `Weights` are what its settings are."""
    made = by_weight(steering())
    for weights in ({"is_safe": 0.6}, {"is_safe": None, "toxicity": 0.5}):
        assert made.instruction(Weights(weights)) == made.instruction(weights) != ""
    for one in (made, steering()):
        with pytest.raises(AMoPOError, match="is_safe: 2 is no weight; write a number from 0 to 1"):
            one.instruction(Weights(is_safe=2))
        with pytest.raises(AMoPOError, match=r"no dimension 'is_saf'\. Did you mean 'is_safe'"):
            one.instruction(Weights(is_saf=1))
        with pytest.raises(AMoPOError, match="the weights are all 0"):
            one.instruction(Weights.fromkeys(made.prompts, 0.0))


def by_weight(made):
    """The steering of a model with weights in its prompts."""
    text = made.overall_template and DEFAULT_WEIGHTS_INSTRUCTION
    return made.model_copy(
        update={
            "one_prompt": True, "weighted": True, "rating_in_prompt": "none",
            "prompts": [d.name for d in made.dimensions], "overall_template": text,
        }
    )  # fmt: skip


def test_settings_become_instructions():
    made = steering()
    assert made.instruction({}) == ""
    assert made.instruction({"is_safe": 1}) == (
        "Your answer will be rated on is safe, from 0 to 1. "
        "Write an answer whose is safe is 1 of 1."
    )
    assert made.instruction({"toxicity": None}).endswith("toxicity is -2 of 2.")  # lower is better
    two = made.instruction({"toxicity": 1.5, "helpfulness": 4})
    assert "from 1 to 5: aim for 4. toxicity, from -2 to 2: aim for 1.5." in two
    assert "is safe" not in two
    every = made.instruction({"overall": None, "helpfulness": 2})
    assert re.findall(r"aim for (\S+)\.", every) == ["2", "1", "-2"]


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({}, {"helpfulnes": 3}, "no dimension 'helpfulnes'. Did you mean 'helpfulness'?"),
        ({}, {"helpfulness": 6}, "6 is outside the scale that the model was trained with, 1 to 5"),
        ({}, {"overall": 3}, "overall takes no rating"),
        ({"rating_in_prompt": "none"}, {"is_safe": 1}, "trained without ratings"),
        (
            {"prompts": ["helpfulness", "is_safe", "toxicity"]},
            {"helpfulness": 1, "is_safe": 1},
            "one dimension at a time",
        ),
        ({"prompts": ["helpfulness", "is_safe", "toxicity"]}, {"overall": None}, "no dimension"),
        (
            {"prompts": ["helpfulness", "is_safe", "toxicity"]},
            Weights(helpfulness=0.5),
            "weights: the model was trained without a prompt that asks for all",
        ),
        (
            {"rating_in_prompt": "none"},
            Weights(helpfulness=0.5),
            "weights: the model was trained without ratings in its prompts",
        ),
    ],
)
def test_what_training_never_had_is_refused(changes, settings, message):
    with pytest.raises(AMoPOError, match=re.escape(message)):
        steering(**changes).instruction(settings)


def test_parsing():
    assert parse_settings(["a = 4", "b", "c=-1.5"]) == {"a": 4, "b": None, "c": -1.5}
    for wrong in (["a=x"], ["=3"], ["a=nan"], ["a=1", "a=2"]):
        with pytest.raises(AMoPOError):
            parse_settings(wrong)


def test_a_sweep_takes_whole_steps_or_ten():
    assert SteeredDimension(name="a", scale=(1, 5)).ratings() == [1, 2, 3, 4, 5]
    assert SteeredDimension(name="a", scale=(-0.5, 1.5)).ratings() == [-0.5, 0.5, 1.5]
    assert SteeredDimension(name="a", scale=(0, 100)).ratings() == list(range(0, 101, 10))
    assert SteeredDimension(name="a", scale=(0, 0.5)).ratings()[:2] == [0, 0.05]


def test_ratings_are_rounded_as_in_training(tokenizer):
    made = steering(rating_levels=3)
    every = made.instruction({"overall": None, "helpfulness": 3.9})
    assert re.findall(r"aim for (\S+)\.", every) == ["3", "1", "-2"]
    assert made.instruction({"toxicity": 1.5}) == made.instruction({"toxicity": 2})
    assert made.instruction({"is_safe": 0.25}).endswith("is safe is 0.5 of 1.")
    assert made.dimensions[0].ratings(3) == [1, 3, 5]
    scales = {d.name: d.scale for d in made.dimensions}
    config = AMoPOConfig(dimensions=list(scales), rating_levels=3)
    assert Steering.from_config(config, scales).rating_levels == 3
    for levels in (2, 3, 4):
        made = steering(rating_levels=levels)
        template = steered(SMOLLM, made)
        check(tokenizer, template, made)
        with pytest.raises(AMoPOError, match="where training rendered"):
            check(tokenizer, template, steering())  # that training did not round


# Against training


ROWS = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "First?"},
        ],
        "responses": [
            {"text": "Yes.", "scores": {"helpfulness": 4, "honesty": 2.5}},
            {"text": "No.", "scores": {"helpfulness": 1, "honesty": 2}},
        ],
    }
]


@pytest.mark.parametrize("place", ["before", "after", "system"])
def test_the_tokens_are_those_of_training(tmp_path, tiny_model, place):
    """From the YAML, and the folder that training would have written."""
    block = {
        "dimensions": [{"name": "helpfulness", "description": "it helps"}, "honesty"],
        "instruction_place": place,
    }
    data = write_jsonl(tmp_path / "data.jsonl", ROWS)
    path = write_config(tmp_path, config(tmp_path, tiny_model, data, amopo=block))
    _, datasets = prepare(path)
    overall, helpfulness, honesty = datasets.train_dataset[0]["prompt_ids"]
    shutil.copytree(tiny_model, tmp_path / "out", dirs_exist_ok=True)
    trained = find_model(str(path))
    assert trained.base == str(tiny_model) and not trained.is_adapter
    generator = Generator(trained, "transformers")
    messages = ROWS[0]["messages"]
    assert generator.ids(messages, {"helpfulness": 4}) == helpfulness
    assert generator.ids(messages, {"honesty": 2.5}) == honesty
    assert generator.ids(messages, {"helpfulness": 4, "honesty": 2.5}) == overall
    assert generator.ids(messages, {}) not in (overall, helpfulness, honesty)


# The chat template


TEMPLATES = Path(importlib.util.find_spec("axolotl").origin).parent.joinpath(
    "utils", "chat_templates", "templates"
)
SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Starts with what the environment's whitespace control would touch.
BARE = "\n  {% for m in messages %}\n{{ m.role }}: {{ m.content | trim }}\n{% endfor %}\n"
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant/user') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
OWN = {"smollm": SMOLLM, "bare": BARE, "no_system": NO_SYSTEM} | {
    name: (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    for name in ("chatml", "llama3", "mistral_v1", "gemma3", "qwen3", "command_a")
}
QUESTION = [{"role": "user", "content": "Why? "}]
TALK = [*QUESTION, {"role": "assistant", "content": "So."}, {"role": "user", "content": "Really?"}]
TOLD = [{"role": "system", "content": "Be brief."}, *TALK]


def rendered(tokenizer, messages, template, **variables):
    return tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, tokenize=False, **variables
    )


def with_line(line, messages):
    if messages[0]["role"] == "system":
        first = f"{line}\n\n{messages[0]['content']}"
        return [{"role": "system", "content": first}, *messages[1:]]
    return [{"role": "system", "content": line}, *messages]


@pytest.mark.parametrize("place", ["before", "after", "system"])
@pytest.mark.parametrize("name", OWN)
def test_the_template_renders_what_training_did(tokenizer, name, place):
    """In tokens, too: of a tokenizer that writes a BOS token where the template writes none."""
    own = OWN[name]
    tokenizer = copy.deepcopy(tokenizer)
    adds_bos(tokenizer)
    compared = 0
    for texts in ((DEFAULT_INSTRUCTION, DEFAULT_OVERALL_INSTRUCTION), (ODD, ODD_OVERALL)):
        made = steering(instruction_place=place, template=texts[0], overall_template=texts[1])
        template = steered(own, made)
        check(tokenizer, template, made)
        one = made.model_copy(update={"one_prompt": True})
        check(tokenizer, steered(own, one), one)
        single = made.model_copy(update={"dimensions": made.dimensions[:1]})
        check(tokenizer, steered(own, single), single)
        weighted = by_weight(made)
        check(tokenizer, steered(own, weighted), weighted)
        chat = ChatTokenizer(tokenizer, own, {}, ("<|END_OF_TURN_TOKEN|>",))  # command_a's
        for line in (
            "helpfulness=3",
            "is_safe",
            "toxicity=-1.5 , helpfulness= 2",
            "weights toxicity=0.3 , helpfulness= 0.2",
            "overall",
            "none",
        ):
            settings = parse_settings(line.removeprefix("weights ").split(","))
            if line.startswith("weights "):
                settings = Weights(settings)
            if line == "none":
                settings = {}
            for messages in (QUESTION, TALK, TOLD):
                try:
                    asked = made.messages(messages, settings)
                    expected = chat.render(asked, None, generation_prompt=True)
                except TemplateError:
                    continue
                compared += 1
                steered_messages = with_line(f"amopo: {line}", messages)
                assert rendered(tokenizer, steered_messages, template) == expected
                ids = applied(tokenizer, steered_messages, template, add_generation_prompt=True)
                assert ids == chat.prompt_ids(asked)
                assert rendered(tokenizer, messages, template, amopo=line) == expected
    assert compared >= (4 if (name, place) == ("no_system", "system") else 20)


@pytest.mark.parametrize("name", OWN)
def test_without_steering_nothing_changes(tokenizer, name):
    template = steered(OWN[name], steering())
    assert unsteered(template) == OWN[name]
    for messages in (QUESTION, TALK, TOLD):
        try:
            expected = rendered(tokenizer, messages, OWN[name])
        except TemplateError as error:
            with pytest.raises(TemplateError, match=re.escape(str(error))):
                rendered(tokenizer, messages, template)
        else:
            assert rendered(tokenizer, messages, template) == expected


def test_settings_in_the_template_hold_until_a_line_says_otherwise(tokenizer):
    made = steering()
    template = steered(steered(SMOLLM, made), made, {"helpfulness": 2})
    assert template.count(SMOLLM) == 1
    plain = rendered(tokenizer, QUESTION, SMOLLM)
    asked = rendered(tokenizer, made.messages(QUESTION, {"helpfulness": 2}), SMOLLM)
    assert rendered(tokenizer, QUESTION, template) == asked != plain
    assert rendered(tokenizer, with_line("amopo: none", QUESTION), template) == plain


def test_parts_of_text_are_steered_too(tokenizer):
    """What vLLM makes of a message for templates that loop over its parts."""
    made = steering()
    template = steered(OWN["gemma3"], made)
    expected = rendered(tokenizer, made.messages(TOLD, {"is_safe": 1}), OWN["gemma3"])
    parts = [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        for message in with_line("amopo: is_safe=1", TOLD)
    ]
    assert rendered(tokenizer, parts, template) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("helpfull=3", "'helpfull' can't be asked for; there are overall, helpfulness"),
        ("helpfulness=7", "helpfulness=7: the scale is 1 to 5"),
        ("helpfulness=much", "the scale is 1 to 5"),
        ("", "'' can't be asked for"),
        ("weights helpfulness=3", "helpfulness=3: the scale is 0 to 1"),
        ("weights overall", "'overall' can't be asked for"),
        ("weights helpfulness=0, is_safe=0, toxicity=0", "the weights are all 0"),
    ],
)
def test_a_wrong_line_is_an_error_of_the_template(tokenizer, line, message):
    with pytest.raises(TemplateError, match=re.escape(message)):
        rendered(tokenizer, with_line(f"amopo: {line}", QUESTION), steered(SMOLLM, steering()))


def test_a_template_knows_whether_weights_can_be_asked_for(tokenizer):
    for changes in ({"rating_in_prompt": "none"}, {"prompts": steering().prompts[1:]}):
        template = steered(SMOLLM, steering(**changes))
        with pytest.raises(TemplateError, match="weights can't be asked for"):
            rendered(tokenizer, with_line("amopo: weights is_safe=1", QUESTION), template)


# What llama.cpp's engine was seen to do as Jinja2 does (docs/export.md): no test runs it.
LLAMA_CPP = {
    "nodes": "Add And Assign Call Compare Concat CondExpr Const Dict Div Filter For Getattr "
    "Getitem If Keyword List Macro Mod Mul NSRef Name Neg Not Operand Or Output Pair Slice Sub "
    "Template TemplateData Test Tuple",
    "filters": "abs default float int join length list map rejectattr trim",
    "tests": "none string",
    "methods": "get items lstrip split startswith strip",
    "functions": "dict namespace raise_exception range",
}


def test_the_template_has_nothing_that_llama_cpp_lacks():
    # The last one has a character for which Python would write an escape.
    for made in (steering(), by_weight(steering()), steering(template="{{ rating }}\xa0!")):
        source = steered("", made)
        tree = ENVIRONMENT.parse(source)
        calls = list(tree.find_all(nodes.Call))
        called = [call.node for call in calls]
        macros = {macro.name for macro in tree.find_all(nodes.Macro)}
        used = {
            "nodes": {type(node).__name__ for node in tree.find_all(nodes.Node)},
            "filters": {node.name for node in tree.find_all(nodes.Filter)},
            "tests": {node.name for node in tree.find_all(nodes.Test)},
            "methods": {one.attr for one in called if isinstance(one, nodes.Getattr)},
            "functions": {one.name for one in called if isinstance(one, nodes.Name)} - macros,
        }
        for kind, names in used.items():
            assert names <= set(LLAMA_CPP[kind].split()), kind
        assert not any(call.dyn_args or call.dyn_kwargs for call in calls)
        assert all(len(one.ops) == 1 for one in tree.find_all(nodes.Compare))
        assert all(one.expr2 for one in tree.find_all(nodes.CondExpr))
        assert not any(isinstance(one.left, nodes.Const) for one in tree.find_all(nodes.Mod))
        assert set(re.findall(r"\\(.)", source)) <= set("nt\"\\'")
        assert not re.search(r"\d[eE][-+\d]", source)


def test_the_check_sees_a_template_that_differs(tokenizer):
    made = steering()
    wrong = steered(SMOLLM, made).replace("Write an answer", "Write the answer")
    with pytest.raises(AMoPOError, match="where training rendered"):
        check(tokenizer, wrong, made)


# Prompts


def test_reading_prompts(tmp_path):
    rows = [
        {"prompt": "One?", "id": 7},
        {"instruction": "Two?", "output": None, "dataset": "koala"},
        {"messages": TALK, "system": "Be brief."},
        {"question_id": 81, "turns": ["Three?", "And?"]},
    ]
    one, two, talk, turns = read_prompts(write_jsonl(tmp_path / "a.jsonl", rows))
    assert one.messages == [{"role": "user", "content": "One?"}] and one.row == rows[0]
    assert two.messages[0]["content"] == "Two?"
    assert talk.messages == TOLD
    assert turns.conversation(["So."])[1:] == [
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": "And?"},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    assert len(read_prompts(tmp_path / "a.json")) == 4
    (tmp_path / "a.txt").write_text("One?\n\nTwo?\n", encoding="utf-8")
    assert [prompt.where[-5:] for prompt in read_prompts(tmp_path / "a.txt")] == ["row 1", "row 3"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "p.jsonl: is empty"),
        (
            '{"prompt": "a"}\n{"promt": "b"}\n',
            "row 2, key 'prompt': is missing.*Did you mean|has pr",
        ),
        ('{"prompt": "a"}\n{"prompt": " "}\n', "row 2, key 'prompt': is empty"),
        ('{"prompt": "a"}\nx\n', "row 2: is not JSON"),
        ('["a"]\n', "row 1: must be an object"),
        ('{"turns": [{"content": "a"}]}\n', r"row 1, key 'turns': must be a list of texts"),
    ],
)
def test_a_bad_prompt_is_named(tmp_path, text, message):
    (tmp_path / "p.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(AMoPOError, match=message):
        read_prompts(tmp_path / "p.jsonl")


# Answers


@pytest.fixture(scope="module")
def folder(tmp_path_factory, base):
    """A whole model that can be steered."""
    path = tmp_path_factory.mktemp("steered") / "tiny"
    shutil.copytree(base, path)
    steering().save(path)
    return path


TEXTS = ["Why?", "A much longer question, which is to be padded beside the short ones.", "Who?"]
SHORT = Sampling(max_new_tokens=12, batch_size=2)


@pytest.fixture(scope="module")
def generator(folder):
    return Generator(find_model(str(folder)), "transformers")


def turns(answers):
    return [answer.turns[0] for answer in answers]


def test_a_batch_answers_as_one_by_one_would(generator):
    prompts = [text_prompt(text) for text in TEXTS]
    together = turns(answer_prompts(generator, prompts, [{"helpfulness": 4}], SHORT))
    alone = [
        turns(answer_prompts(generator, [one], [{"helpfulness": 4}], SHORT))[0] for one in prompts
    ]
    assert together == alone
    assert len(set(alone)) == len(alone)


def test_settings_of_a_sweep_stand_beside_each_other(generator):
    each = [{"is_safe": 0}, {"is_safe": 1}, {}]
    answers = answer_prompts(generator, [text_prompt(text) for text in TEXTS], each, SHORT)
    assert [answer.settings for answer in answers[:3]] == each
    assert [answer.prompt.row["prompt"] for answer in answers[::3]] == TEXTS
    assert [bool(answer.instruction) for answer in answers[:3]] == [True, True, False]


def test_a_seed_decides_the_draws(generator):
    def drawn(seed):
        sampling = Sampling(max_new_tokens=12, temperature=1.5, top_p=0.9, seed=seed)
        return turns(answer_prompts(generator, [text_prompt("Why?")], [{}], sampling))

    assert drawn(1) == drawn(1) != drawn(2)


def test_an_answer_ends_with_its_turn(generator, monkeypatch):
    """A token of the first answer is made the end of a turn; the second goes on without it."""
    prompts = [text_prompt(text) for text in TEXTS[:2]]
    ids = [generator.ids(prompt.messages, {}) for prompt in prompts]
    first, second = generator.engine.generate(ids, SHORT)
    end = next(token for token in first if token not in second)
    monkeypatch.setattr(generator.engine, "stops", [end])
    ended, cut = answer_prompts(generator, prompts, [{}], SHORT)
    assert ended.finished and ended.tokens == first.index(end) + 1
    assert not cut.finished and cut.tokens == SHORT.max_new_tokens


def test_what_closes_a_turn_stops_an_answer(tokenizer):
    closed = ChatTokenizer(tokenizer, "{% for m in messages %}{{ m.content }}<s>{% endfor %}", {})
    assert stop_ids(closed) == {tokenizer.bos_token_id, tokenizer.eos_token_id}
    thinking = copy.deepcopy(tokenizer)  # as Qwen's own template: an answer begins with thinking
    thinking.add_tokens(["<think>", "</think>"])
    begun = OWN["qwen3"].replace("{{- '<think>\\n\\n' }}", "")
    for text in (tokenizer.chat_template, OWN["qwen3"], begun):
        assert stop_ids(ChatTokenizer(thinking, text, {})) == {tokenizer.eos_token_id}


def test_a_folder_says_where_its_answers_end(tmp_path, base, adapter):
    """By its own generation config or its base's, and by the `eot_tokens` of training."""
    whole, tuned = (shutil.copytree(one, tmp_path / one.name) for one in (base, adapter))
    (whole / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 7]}))
    for folder in (whole, tuned):
        steering(eot_tokens=["<s>"]).save(folder)
        trained = find_model(str(folder), str(whole))
        chat = chat_tokenizer(trained, load_tokenizer(trained))
        assert (chat.eot_tokens, chat.stops) == (("<s>",), (3, 7))


def test_the_second_question_follows_the_first_answer(generator, tmp_path, monkeypatch):
    seen = []
    real = generator.engine.generate

    def spy(prompts, sampling, progress):
        seen.append([generator.tokenizer.decode(ids) for ids in prompts])
        return real(prompts, sampling, progress)

    monkeypatch.setattr(generator.engine, "generate", spy)
    rows = [{"question_id": 81, "turns": ["First?", "Second?"]}, {"prompt": "Only?"}]
    prompts = read_prompts(write_jsonl(tmp_path / "q.jsonl", rows))
    two, one = answer_prompts(generator, prompts, [{"is_safe": 1}], SHORT)
    assert len(two.turns) == 2 and len(one.turns) == 1
    assert [len(batch) for batch in seen] == [2, 1]
    before, after = seen[1][0].split("Second?")[0].split("First?")
    assert "is safe" not in before and "is safe is 1 of 1" in after  # in the last turn alone


def test_export_layouts(generator, tmp_path):
    rows = [
        {"question_id": 81, "uid": "u", "dataset": "koala", "turns": ["First?", "Second?"]},
    ]
    answers = answer_prompts(
        generator, read_prompts(write_jsonl(tmp_path / "q.jsonl", rows)), [{}], SHORT
    )
    both = answers[0].turns

    (line,) = map(json.loads, export_answers(answers, "jsonl", "m").splitlines())
    assert line["response"] == both and line["amopo"]["model"] == "m" and line["uid"] == "u"
    (alpaca,) = json.loads(export_answers(answers, "alpaca_eval", "m"))
    assert alpaca == {
        "instruction": "First?", "output": both[0], "generator": "m", "dataset": "koala",
    }  # fmt: skip
    (arena,) = map(json.loads, export_answers(answers, "arena_hard", "m").splitlines())
    assert set(arena) == {"uid", "ans_id", "model", "messages", "tstamp"}
    assert arena["messages"][-1] == {"role": "assistant", "content": {"answer": both[0]}}
    (bench,) = map(json.loads, export_answers(answers, "mt_bench", "m").splitlines())
    assert set(bench) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert bench["choices"] == [{"index": 0, "turns": both}] and bench["question_id"] == 81


# The commands


def run(command, *arguments):
    return CliRunner().invoke(amopo, [command, *map(str, arguments)])


def test_generate(folder, tmp_path):
    source = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "Why?", "id": 3}, {"prompt": "Who?"}])
    out = tmp_path / "a.jsonl"
    options = ["--sweep", "is_safe", "-d", "helpfulness=2", "--max-new-tokens", 4, "--quiet"]
    done = run("generate", folder, "--input", source, *options, "--output", out, "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout.splitlines()[-1])
    assert (facts["answers"], facts["output"]) == (4, str(out))
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["amopo"]["settings"]["is_safe"] for row in rows] == [0, 1, 0, 1]
    assert rows[1]["id"] == 3 and "helpfulness" in rows[1]["amopo"]["instruction"]
    again = run("generate", folder, "--input", source, "--output", out)
    assert again.exit_code == 1 and "--force" in again.output
    weights = ["--weights", "helpfulness=0.6", "--sweep-weight", "is_safe", "--json"]
    done = run("generate", folder, "--prompt", "Why?", "--max-new-tokens", 1, *weights)
    swept = [row["amopo"] for row in json.loads(done.stdout.splitlines()[-1])["rows"]]
    assert [one["weights"]["is_safe"] for one in swept] == [i / 10 for i in range(11)]
    assert all("settings" not in one for one in swept)
    assert swept[6]["instruction"] == steering().instruction(Weights(helpfulness=0.6, is_safe=0.6))
    told = run("generate", folder, "--prompt", "Why?", "--overall", "--max-new-tokens", 4)
    assert told.exit_code == 0 and "aim for -2" in told.stdout
    assert max(map(len, told.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-d", "helpfulnes=3"], "Did you mean 'helpfulness'?"),
        (["-d", "helpfulness=9"], "outside the scale"),
        (["--sweep", "helpfull"], "no dimension 'helpfull'"),
        (["--sweep", "is_safe", "-d", "is_safe=1"], "leave --dimension is_safe out"),
        (["--sweep-weight", "is_safe", "--weights", "is_safe=1"], "leave --weights is_safe out"),
        (["--weights", "helpfulness=4"], "4 is no weight"),
        (["--weights", "helpfulness=much"], "write a dimension and a"),
        (["--base"], "name its base with --base-model"),
        (["--backend", "vllm"], "vLLM is not installed"),
        (["--format", "mt_bench", "--output", "x"], "key 'question_id': is missing"),
    ],
)
def test_generate_refuses_before_it_answers(folder, arguments, message):
    if "vllm" in arguments and importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed here")
    done = run("generate", folder, "--prompt", "Why?", *arguments)
    assert done.exit_code == 1 and message in done.output, done.output
    assert "Traceback" not in done.output and len(done.output.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "is_safe=1", "--overall"], "leave --dimension and --overall out"),
        (["--top-p", "0.9"], "with --temperature above 0 alone"),
        (["--weights", "is_safe=1", "--sweep", "toxicity"], "write --sweep-weight"),
        (["--sweep-weight", "is_safe", "-d", "toxicity"], "not with --dimension or --overall"),
    ],
)
def test_ratings_and_weights_do_not_mix(arguments, message):
    done = run("generate", "a", "--prompt", "Why?", *arguments)
    assert done.exit_code == 2 and message in " ".join(done.output.split())


def test_what_is_no_model_is_named(tmp_path, base, adapter):
    assert "neither a model's folder nor a YAML" in run("generate", "no", "--prompt", "a").output
    assert "holds no model" in run("generate", tmp_path, "--prompt", "a").output
    plain = run("generate", base, "--prompt", "a", "--overall").output
    assert FILE in plain and "YAML" in plain
    bare = tmp_path / "bare"
    shutil.copytree(base, bare)
    (bare / "chat_template.jinja").unlink()
    assert "has no chat template" in run("generate", bare, "--prompt", "a").output
    lost = tmp_path / "lost"
    shutil.copytree(adapter, lost)
    said = json.loads((lost / "adapter_config.json").read_text(encoding="utf-8"))
    (lost / "adapter_config.json").write_text(
        json.dumps(said | {"base_model_name_or_path": "runs/base"}), encoding="utf-8"
    )
    done = run("generate", lost, "--prompt", "a")
    assert done.exit_code == 1 and "'runs/base' is no model folder as seen from" in done.output
    options = ["--base-model", base, "--max-new-tokens", 2]
    assert run("generate", lost, "--prompt", "a", *options).exit_code == 0


def test_an_adapter_and_its_base(adapter, base):
    def answer(folder, *options):
        done = run(
            "generate", folder, "--prompt", "Why?", "--max-new-tokens", 12, "--json", *options
        )
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout.splitlines()[-1])["rows"][0]["response"]

    assert answer(adapter, "--base") == answer(base) != answer(adapter)


def test_answers_from_python(folder):
    """The function loads the model; unlike the command, it knows nothing of options and files."""
    each = [{"is_safe": 1}, {}]
    asked, plain = generate_answers(find_model(str(folder)), [text_prompt("Why?")], each, SHORT)
    assert asked.instruction and not plain.instruction
    assert asked.turns != plain.turns and len(asked.turns) == 1
    with pytest.raises(AMoPOError, match="outside the scale"):
        generate_answers(find_model(str(folder)), [text_prompt("Why?")], [{"is_safe": 9}])


def test_the_template_command(folder, tmp_path):
    from transformers import AutoTokenizer

    out = tmp_path / "chat_template.jinja"
    done = run("template", folder, "--output", out, "-d", "is_safe=1")
    assert done.exit_code == 0, done.output
    assert out.read_text(encoding="utf-8") == steered_template(
        find_model(str(folder)), {"is_safe": 1}
    )
    assert "--force" in run("template", folder, "--output", out).output
    weights = ["--weights", "is_safe=0.3,toxicity=0.7"]
    done = run("template", folder, "--output", tmp_path / "weights.jinja", *weights, "--quiet")
    assert done.exit_code == 0, done.output
    asked = steering().messages(QUESTION, Weights(is_safe=0.3, toxicity=0.7))
    own = chat_template(AutoTokenizer.from_pretrained(folder), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    made = (tmp_path / "weights.jinja").read_text(encoding="utf-8")
    assert rendered(tokenizer, QUESTION, made) == rendered(tokenizer, asked, own)
    steers = tmp_path / "steers"
    shutil.copytree(folder, steers)
    shutil.copy(out, steers)
    tokenizer = AutoTokenizer.from_pretrained(steers)
    assert "is safe is 1 of 1" in tokenizer.apply_chat_template(QUESTION, tokenize=False)
    # Our own commands steer such a folder once, not twice.
    messages = QUESTION
    assert Generator(find_model(str(steers))).ids(messages, {}) == Generator(
        find_model(str(folder))
    ).ids(messages, {})


# The page


@pytest.fixture(scope="module")
def served(adapter):
    from axolotl_amopo.commands.chat.app import ComparedModels, chat_page, free_port, serve

    models = ComparedModels(find_model(str(adapter)), with_base=True)
    blocks = chat_page(models)
    blocks.block_thread = lambda: None  # so that `serve` returns
    serve(blocks, host="127.0.0.1", port=free_port("127.0.0.1", 0), share=False)
    yield models, blocks.local_url
    blocks.close()


def test_the_page_answers_with_both_sides(served, adapter, base):
    from gradio_client import Client

    _, url = served
    client = Client(url, verbose=False)
    # overall, whether by weights, three boxes, three ratings, three weights
    controls = [False, False, True, False, False, 4, 1, -2, 0.5, 0.5, 0.2]
    assert client.predict(*controls, api_name="/instruction") == steering().instruction(
        {"helpfulness": 4}
    )
    assert "Nothing is asked for" in client.predict(
        *[False] * 5, *controls[5:], api_name="/instruction"
    )
    for boxes, weights in [
        ([False, True, False, True], {"helpfulness": 0.5, "toxicity": 0.2}),
        ([True, False, False, False], dict.fromkeys(["helpfulness", "is_safe", "toxicity"], 0.3)),
    ]:
        shown = client.predict(boxes[0], True, *boxes[1:], *controls[5:], api_name="/instruction")
        assert shown == steering().instruction(Weights(weights))
    _, left, right = client.predict("Why?", 16, 0, 1, 0, True, *controls, api_name="/ask")

    def text(message):
        return message["content"] if isinstance(message["content"], str) else "".join(
            part["text"] for part in message["content"]
        )  # fmt: skip

    for side, shown, folder in (("base", left, base), ("tuned", right, adapter)):
        assert [message["role"] for message in shown] == ["user", "assistant"]
        generator = Generator(find_model(str(folder)), "transformers")
        asked = steering().messages([{"role": "user", "content": "Why?"}], {"helpfulness": 4})
        sampling = Sampling(max_new_tokens=16)
        (ids,) = generator.engine.generate([generator.ids(asked, {})], sampling)
        assert text(shown[1]).strip() == generator.text(ids), side
    with pytest.raises(Exception, match="Write a question first"):
        client.predict(" ", 16, 0, 1, 0, True, *controls, api_name="/ask")
    with pytest.raises(Exception, match="tokens"):
        client.predict("Why? " * 5000, 16, 0, 1, 0, True, *controls, api_name="/ask")
    for shown in client.predict("Who?", 16, 0, 1, 0, True, *controls, api_name="/ask")[1:]:
        assert [m["role"] for m in shown] == ["user", "assistant"] * 2
        assert [text(m) for m in shown[::2]] == ["Why?", "Who?"]


def test_a_taken_port_is_named():
    import socket

    import gradio

    from axolotl_amopo.commands.chat.app import serve

    with gradio.Blocks() as blocks:
        gradio.Markdown("Nothing")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(AMoPOError, match=f"can't be served on 127.0.0.1:{port}"):
            serve(blocks, host="127.0.0.1", port=port, share=False)


def test_the_page_in_a_browser(served):
    webdriver = pytest.importorskip(
        "selenium.webdriver",
        reason="needs selenium: CI has no browser",
    )
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (browser and driver):
        pytest.skip("needs chromium and chromedriver")
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_experimental_option(
        "mobileEmulation", {"deviceMetrics": {"width": 390, "height": 844, "pixelRatio": 1}}
    )
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as chrome:
        chrome.get(served[1])
        wait = WebDriverWait(chrome, 30)

        def boxes():
            return chrome.find_elements(By.CSS_SELECTOR, "textarea")

        wait.until(lambda _: len(boxes()) == 2)
        sliders = chrome.find_elements(By.CSS_SELECTOR, "input[type=range]")
        assert [slider.is_enabled() for slider in sliders] == [False] * 3
        chrome.find_element(By.XPATH, "//label[contains(., 'Ask for is_safe')]").click()
        wait.until(lambda _: "is safe is 1 of 1" in boxes()[1].get_attribute("value"))
        wait.until(lambda _: sliders[1].is_enabled())
        boxes()[0].send_keys("Why?\n")
        wait.until(lambda _: len(chrome.find_elements(By.CSS_SELECTOR, ".message.bot")) == 2)
        assert chrome.execute_script("return document.documentElement.scrollWidth") <= 390
        fetched = chrome.execute_script(
            "return performance.getEntriesByType('resource').map(entry => entry.name)"
        )
        assert all(name.startswith((served[1], "data:", "blob:")) for name in fetched)


def test_the_page_fetches_nothing_from_elsewhere(served):
    """An answer's Markdown could send the conversation away in the address of an image."""
    with urllib.request.urlopen(f"{served[1]}config") as answer:
        head = json.load(answer)["head"]
    (policy,) = re.findall('<meta http-equiv="Content-Security-Policy" content="(.*?)">', head)
    allowed = {name: sources for name, *sources in map(str.split, policy.split(";"))}
    for kind in ("img-src", "media-src", "style-src", "font-src"):
        assert set(allowed[kind]) <= {"'self'", "'unsafe-inline'", "data:", "blob:"}


@pytest.mark.parametrize(("rank", "allowed"), [(1, 8), (8, 8), (12, 16), (16, 16), (33, 64)])
def test_vllm_is_given_a_rank_that_it_takes(rank, allowed):
    assert vllm_lora_rank(rank) == allowed


def test_help_needs_no_model():
    """`--help` of all three, without what takes half a minute to import."""
    for name in ("generate", "template", "chat"):
        done = run(name, "--help")
        assert done.exit_code == 0 and f"axolotl amopo {name}" in done.stdout
    assert sys.modules.get("vllm") is None


def test_a_port_that_is_taken():
    import socket

    from axolotl_amopo.commands.chat.app import free_port

    assert free_port("127.0.0.1", 0) > 0
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(AMoPOError, match=f"127.0.0.1:{port} .* --port"):
            free_port("127.0.0.1", port)


# Candidates


QUESTIONS = [
    {"prompt": "Why?", "id": 3},
    {"instruction": "Who?"},
    {"prompt": "A longer one, is it?"},
]


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("questions") / "q.jsonl", QUESTIONS)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def draw(*arguments):
    done = run("generate", *arguments, "--max-new-tokens", 6, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.splitlines()[-1])


def test_candidates(folder, questions, tmp_path, generator):
    """Different ones, under settings and temperatures by turns, in what `rate` takes."""
    out = tmp_path / "c.jsonl"
    spread = ["--spread", "none", "--spread", "weights is_safe=1", "--spread", "is_safe=0, overall"]
    options = ["--input", questions, "--candidates", 4, *spread, "--temperatures", "0.8,1.5"]
    facts = draw(folder, *options, "--output", out, "--quiet")
    assert (facts["prompts"], facts["responses"], facts["short"]) == (3, 12, 0)
    rows = read(out)
    assert rows[0]["prompt"] == "Why?" and rows[0]["id"] == 3
    assert rows[1]["messages"] == [{"role": "user", "content": "Who?"}]
    responses = [one for row in rows for one in row["responses"]]
    assert all(len({one["text"] for one in row["responses"]}) == 4 for row in rows)
    lines = ["none", "weights is_safe=1", "is_safe=0, overall"]
    ways = [(temperature, line) for temperature in (0.8, 1.5) for line in lines]
    turns = [(one["temperature"], one["settings"]) for one in responses]
    assert turns == [*ways, *ways]
    # Each can be drawn again, alone.
    for row, one in ((rows[0], rows[0]["responses"][1]), (rows[2], rows[2]["responses"][3])):
        messages = [{"role": "user", "content": row["prompt"]}]
        ids = generator.ids(messages, read_settings(one["settings"]))
        seeded = [Seeded(one["temperature"], one["seed"])]
        (again,) = generator.engine.generate([ids], Sampling(max_new_tokens=6), draws=seeded)
        assert generator.text(again) == one["text"] and one["model"] == folder.name
        assert one["finished"] == generator.finished(again)


def test_candidates_go_on(folder, questions, tmp_path):
    """Whole rows stay, half a line is cut, and the rest is drawn as in one uninterrupted run."""
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    options = [folder, "--input", questions, "--candidates", 2]
    draw(*options, "--output", whole)
    lines = whole.read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(lines) == 3
    cut.write_text(lines[1] + lines[2][:50], encoding="utf-8")
    facts = draw(*options, "--output", cut, "--resume")
    assert facts["prompts"] == 2
    assert cut.read_text(encoding="utf-8") == lines[1] + lines[0] + lines[2]
    assert draw(*options, "--output", cut, "--resume")["prompts"] == 0
    done = run("generate", *options, "--output", cut)
    assert done.exit_code == 1 and "--force" in done.output
    cut.write_text('{"prompt": "Another?", "responses": []}\n', encoding="utf-8")
    done = run("generate", *options, "--output", cut, "--resume")
    assert done.exit_code == 1 and "has rows of 1 prompts that the input lacks" in done.output


def test_candidates_of_a_model_that_nobody_steered(base, tmp_path):
    row = {"prompt": "Why?", "responses": [{"text": "Mine.", "scores": {"a": 1}}]}
    source = write_jsonl(tmp_path / "q.jsonl", [row])
    (made,) = draw(base, "--input", source, "--candidates", 3, "--name", "plain")["rows"]
    assert made["responses"][0] == row["responses"][0]
    assert [(one["settings"], one["model"]) for one in made["responses"][1:]] == [
        ("none", "plain")
    ] * 3
    assert [one["temperature"] for one in made["responses"][1:]] == [0.7, 1.0, 0.7]
    with pytest.raises(AMoPOError, match="neither a model's folder nor a YAML"):
        find_model("some/model", from_hub=True)  # the hub is offline in tests


def test_equal_candidates_are_drawn_again():
    """And where the model has no other answer, there are fewer."""
    prompts, seen = [text_prompt("Why?"), text_prompt("Who?"), text_prompt("No?")], []

    def source(draws):
        for place, one in enumerate(draws):
            seen.append(one)
            asked = one.prompt.row["prompt"]
            said = {"Why?": f"{len(seen) // 5}", "Who?": "Same.", "No?": ""}[asked]
            yield place, Drawn(said, True)

    counts = Counts()
    rows = list(draw_candidates(prompts, 2, [{}], [1.0], source, model="m", counts=counts))
    assert [len(row["responses"]) for row in rows] == [2, 1]
    assert len({(one.prompt.row["prompt"], one.seed) for one in seen}) == len(seen)
    assert (counts.prompts, counts.responses, counts.short) == (2, 3, 2)
    assert counts.equal == len(seen) - 3


def test_the_spread_by_default():
    assert [written(one) for one in spread_of(steering())] == [
        "none", "overall", "helpfulness=1", "helpfulness=5", "is_safe=0", "is_safe=1",
        "toxicity=-2", "toxicity=2",
    ]  # fmt: skip
    assert [written(one) for one in spread_of(steering(rating_in_prompt="none"))] == [
        "none", "overall", "helpfulness", "is_safe", "toxicity",
    ]  # fmt: skip
    assert spread_of(None) == [{}]


def test_draws_follow_the_models_probabilities():
    """And top-p leaves the unlikely ones out."""
    import torch

    logits = torch.tensor([1.0, 0.0, -1.0, -30.0])
    rows = [Seeded(2.0, seed) for seed in range(4000)]
    for top_p, expected in (
        (1.0, (logits / 2).softmax(-1)),
        (0.8, torch.tensor([0.62, 0.38, 0, 0])),
    ):
        chosen = SeededDraws(rows, top_p, logits.device)(None, logits.expand(4000, 4)).argmax(-1)
        shares = chosen.bincount(minlength=4) / 4000
        assert shares.tolist() == pytest.approx(expected.tolist(), abs=0.03)


def test_candidates_of_a_server(folder, questions, tmp_path, monkeypatch):
    """The instruction stands in the messages; the key comes from the environment."""
    said = itertools.count()

    def reply(body):
        text = f"Answer {next(said)}"
        return (400, {"error": {"message": "too long"}}) if "longer" in str(body) else text

    monkeypatch.setenv("MY_KEY", "5ecret")
    with ChatServer(reply) as server:
        options = ["--server", server.url, "--server-model", "served"]
        options += ["--server-key-env", "MY_KEY", "--input", questions, "--candidates", 2]
        spread = ["--spread", "is_safe=1", "--spread", "none"]
        facts = draw(folder, *options, *spread, "--temperatures", "0.9")
        asked = list(server.bodies)
        plain = draw(*options)
    made = facts["rows"]
    assert [len(row["responses"]) for row in made] == [2, 2]
    assert facts["refused"] == 8 and facts["short"] == 1 and facts["tokens"]["completion"] == 8
    assert "5ecret" not in json.dumps(facts) and server.keys == {"Bearer 5ecret"}
    by_seed = {body["seed"]: body for body in asked}
    instruction = steering().instruction({"is_safe": 1})
    for row in made:
        for one in row["responses"]:
            body = by_seed[one["seed"]]
            assert (body["model"], body["temperature"], body["max_tokens"]) == ("served", 0.9, 6)
            told = instruction in body["messages"][-1]["content"]
            assert told == (one["settings"] == "is_safe=1") and one["model"] == "served"
    assert all(one["settings"] == "none" for row in plain["rows"] for one in row["responses"])


def test_a_server_that_stops_midway(questions, tmp_path, monkeypatch):
    """Rows that are complete are written, and the next call goes on behind them."""
    broken, out = True, tmp_path / "c.jsonl"

    def reply(body):
        return 401 if broken and "longer" in str(body) else f"{body['seed']}"

    with ChatServer(reply) as server:
        options = ["--server", server.url, "--server-model", "m", "--input", questions]
        options += ["--candidates", 2, "--concurrency", 1, "--output", out]
        done = run("generate", *options)
        *bars, said = done.output.strip().splitlines()
        assert done.exit_code == 1 and "wants another key" in said and len(bars) < 2
        assert [row["responses"][0]["settings"] for row in read(out)] == ["none"] * 2
        broken = False
        assert draw(*options, "--resume")["prompts"] == 1
    assert len(read(out)) == 3 and len(server.bodies) == 4 + 1 + 2
    done = run("generate", *options[:2], *options[2:6], "--candidates", 2)
    assert done.exit_code == 1 and "does not answer" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--spread", "none"], "--spread goes with --candidates"),
        (["--server", "http://x"], "--server goes with --candidates"),
        (["--candidates", 2, "--overall"], "asked for by --spread"),
        (["--candidates", 2, "--temperature", 1], "drawn by --temperatures"),
        (["--candidates", 2, "--temperatures", "0.5,0"], "write numbers above 0"),
        (["--candidates", 2, "--temperatures", "hot"], "write numbers above 0"),
        (["--candidates", 2, "--server", "http://x"], "--server-model NAME go together"),
        (["--candidates", 2, "--resume"], "--resume goes on with an --output"),
        (["--candidates", 2, "--server-key-env", "X"], "--server-key-env goes with --server"),
        (["--candidates", 2, "--format", "mt_bench", "--output", "x"], "leave --format mt_bench"),
    ],
)
def test_options_of_candidates(arguments, message):
    done = run("generate", "a", "--prompt", "Why?", *arguments)
    assert done.exit_code == 2 and message in " ".join(done.output.split()), done.output


def test_candidates_refuse_before_the_model_is_loaded(folder, tmp_path):
    turns = write_jsonl(tmp_path / "q.jsonl", [{"turns": ["Why?", "Really?"]}])
    for arguments, message in [
        (["--prompt", "a", "--spread", "is_saf=1"], "Did you mean 'is_safe'?"),
        (["--prompt", "a", "--spread", "is_safe=9"], "outside the scale"),
        (["--input", turns], "row 1, key 'turns': has 2 questions"),
    ]:
        done = run("generate", folder, "--candidates", 2, *arguments)
        assert done.exit_code == 1 and message in done.output, done.output
        assert len(done.output.strip().splitlines()) == 1
