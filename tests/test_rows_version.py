"""Prepared rows, kept literally: whoever changes them has to raise ROWS_VERSION.

Rows that another command prepared are used again where their fingerprint is the same, and of this
package that holds `ROWS_VERSION` alone. `golden_rows.json` has the rows of some configs under that
version, token ids as text. To write it anew, after the version was raised:

    python tests/test_rows_version.py
"""

import json
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from test_data import data_format
from test_formats import PUBLISHED
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import axolotl_amopo
from axolotl_amopo.config import fingerprint
from axolotl_amopo.config.block import AMoPOConfig
from axolotl_amopo.config.datasets import prepare_entries
from axolotl_amopo.config.fingerprint import ROWS_VERSION

GOLDEN = Path(__file__).parent / "golden_rows.json"
SPECIAL = ["<s>", "</s>", "<system>", "<user>", "<assistant>", "<tool>"]
TEMPLATE = (
    "{{ bos_token }}{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{% if m.reasoning_content %}({{ m.reasoning_content }})"
    "{% endif %}{{ m.content }}{% for call in m.tool_calls or [] %}"
    "[{{ call.function.name }} {{ call.function.arguments.zone }}]{% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
OTHER_END = TEMPLATE.replace("</s>", "<tool>").replace("{{ bos_token }}", "")
NAMES = {"help": (0, 100), "truth": (1, 5)}


def byte_tokenizer():
    """A token per byte, and the marks of the template: the same ids whatever a library trains."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


def rated(question, *ratings, texts=("Yes, it is.", "No.", "Perhaps so?", "Ça dépend.")):
    listed = [
        {"text": text, "scores": dict(zip(NAMES, values, strict=True))}
        for text, values in zip(texts, ratings, strict=False)
    ]
    return {"prompt": question, "responses": listed}


def said(role, text, **more):
    return {"role": role, "content": text} | more


TWO, THREE = ((90, 2), (20, 4)), ((90, 2), (20, 4), (50, 2))
PAIR, TRIPLE = [rated("Is it?", *TWO)], [rated("Is it?", *THREE)]
ONE = rated("Eh?", (9, 1))
TALK = [said("system", "Be kind."), said("user", "Hi."), said("assistant", "Hello.")]
TOLD = [rated("", *TWO) | {"prompt": None, "messages": [*TALK, said("user", "Is it?")]}]
LONG = [said("user", "What now? " * 9), said("assistant", "This. " * 9)]
LONG = [rated("", *TWO) | {"prompt": None, "messages": [*LONG, said("user", "Well, is it? " * 8)]}]
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
THOUGHT = said("assistant", "Yes.", reasoning_content="Is it? It is.", tool_calls=[CALL])
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}]
TOOLS = [rated("Is it?", *TWO, texts=(THOUGHT, said("assistant", "No."))) | {"tools": TOOLS}]
SHOW = {"instruction": "{{ dimension }} {{ rating }} of {{ max }}:"}
SHOW["overall_instruction"] = "{{ dimensions | map(attribute='rating') | join(' and ') }}:"
ASK = {"overall_instruction": SHOW["overall_instruction"]}
NONE = {"instruction": "", "overall_instruction": ""}
PER, GROUP = {"winner": "per_dimension"}, {"group_by_prompt": True}
OWN, NO_RATING = {"rating_in_prompt": "own"}, {"rating_in_prompt": "none"}

# name: (rows, the `amopo:` block, other keys of the config)
CASES = {
    "the default instructions": (PAIR, {}, {}),
    "the default instructions, no rating": (PAIR, NO_RATING, {}),
    "pair": (PAIR, SHOW, {}),
    "per dimension": (PAIR, SHOW | PER, {}),
    "no overall prompt": (PAIR, SHOW | {"overall": False}, {}),
    "a missing rating": (
        [rated("Is it?", (60, None), (80, 4))], SHOW | {"missing_ratings": "mask"}, {},
    ),
    "own": (PAIR, SHOW | OWN, {}),
    "own, per dimension": (PAIR, SHOW | OWN | PER, {}),
    "own, a missing rating": (
        [rated("Is it?", (60, None), (80, 4))],
        SHOW | OWN | PER | {"missing_ratings": "mask"},
        {},
    ),
    "all pairs": (TRIPLE, SHOW, {}),
    "best and worst": (TRIPLE, SHOW | {"pairs": "best_worst"}, {}),
    "pairs that are drawn": ([rated("Is it?", *THREE, (0, 1))], SHOW | {"pairs": 2}, {"seed": 5}),
    "lower is better": (
        PAIR, SHOW | {"dimensions": [{"name": "help", "scale": [0, 99], "direction": "lower"}]}, {},
    ),
    "by one dimension": (PAIR, SHOW | {"order_by": "truth", "min_gap": 0.1}, {}),
    "after": (TOLD, SHOW | {"instruction_place": "after"}, {}),
    "system": (TOLD, SHOW | {"instruction_place": "system"}, {}),
    "system, without a message": (PAIR, SHOW | {"instruction_place": "system"}, {}),
    "conversation": (TOLD, SHOW, {}),
    "no instruction": (PAIR, NONE, {}),
    "no instruction, own": (PAIR, NONE | OWN, {}),
    "group": (TRIPLE + PAIR, SHOW | GROUP, {}),
    "group, own": (TRIPLE, SHOW | GROUP | OWN | PER, {}),
    "group, no rating": (TRIPLE, SHOW | GROUP | NO_RATING, {}),
    "weights in the prompts": (
        PAIR, {"objective": "cos_dpo", "weight_draws": 2, "weight_concentration": 0.5}, {"seed": 5},
    ),
    "weights in the prompts, held out": (
        PAIR, {"objective": "cos_dpo", "datasets": {"id": {"eval_split": True}}}, {},
    ),
    "nearest": (TRIPLE, SHOW | {"winner": "nearest"}, {"seed": 5}),
    "nearest, group": (TRIPLE, SHOW | GROUP | {"winner": "nearest"}, {"seed": 5}),
    "weights of a row": (
        [PAIR[0] | {"weights": {"help": 1, "truth": 3}}],
        NONE | {"weighting": "static", "weights_per_row": True, "overall": False},
        {},
    ),
    "all responses": (
        [*TRIPLE, rated("Why?", (50, 3), (50, 3), texts=("So.", "So it is.")), ONE],
        ASK | {"objective": "ric"},
        {},
    ),
    "all responses, per criterion": (
        TRIPLE, SHOW | OWN | {"objective": "lambda_dpo"}, {},
    ),
    "all responses, one too long": (
        [rated("Is it?", *THREE, texts=("Yes.", "No. " * 20, "Perhaps so?")), ONE],
        ASK | {"objective": "ric"},
        {"sequence_len": 60},
    ),
    "group, no instruction": (TRIPLE, NONE | GROUP, {}),
    "truncated": (LONG, SHOW, {"sequence_len": 90, "excess_length_strategy": "truncate"}),
    "truncated to the responses": (
        LONG, SHOW, {"sequence_len": 58, "excess_length_strategy": "truncate"},
    ),
    "tools and thinking": (TOOLS, SHOW, {}),
    "an end of turn that is not EOS": (PAIR, SHOW, {"chat_template_jinja": OTHER_END}),
    "no end of turn": (PAIR, SHOW, {"chat_template_jinja": TEMPLATE.replace("</s>\n", "")}),
}  # fmt: skip
FORMATS = {f"format: {name}": name for name in PUBLISHED}


def prepared(name):
    """The rows of a case, token ids as text."""
    tokenizer = byte_tokenizer()
    if kind := FORMATS.get(name):
        kind, rows, ratings, changes = PUBLISHED[kind]
        made = data_format(kind, tokenizer, **{"dimensions": list(ratings[0])} | PER | changes)
    else:
        rows, block, keys = CASES[name]
        dimensions = [{"name": key, "scale": scale} for key, scale in NAMES.items()]
        made = data_format("rated", tokenizer, **{"dimensions": dimensions} | block)
        for key, value in keys.items():
            made.cfg[key] = value
        made.sequence_len = keys.get("sequence_len", made.sequence_len)
        tokenizer.chat_template = keys.get("chat_template_jinja", TEMPLATE)
    return [readable(tokenizer, row) for row in made.wrap_dataset(Dataset.from_list(rows))]


def readable(tokenizer, row):
    row = dict(row)
    ids, labels = row.pop("input_ids"), row.pop("labels")
    assert row.pop("attention_mask") == [1] * len(ids)
    masked = labels.count(-100)
    assert labels == [-100] * masked + ids[masked:]
    return (
        row
        | {
            "prompt_ids": tokenizer.batch_decode(row["prompt_ids"]),
            "response_ids": tokenizer.batch_decode(row["response_ids"]),
            "longest": [tokenizer.decode(ids[:masked]), tokenizer.decode(ids[masked:])],
        }
        | {
            name: [None if value != value else round(value, 6) for value in row[name]]
            for name in ("ratings", "weights", "fit")
        }
    )


WRITE = "write the golden rows anew with `python tests/test_rows_version.py`"
RAISE = "raise ROWS_VERSION in axolotl_amopo/config/fingerprint.py"


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", [*CASES, *FORMATS])
def test_rows_change_with_their_version_alone(name, golden):
    rows = prepared(name)
    if golden["version"] == ROWS_VERSION and rows != golden["rows"].get(name):
        print(f"Now: {json.dumps(rows, indent=1)}")
        pytest.fail(f"the prepared rows changed: {RAISE} and {WRITE} ({name})")
    assert golden["version"] == ROWS_VERSION, f"ROWS_VERSION was raised: {WRITE}"


def test_no_golden_rows_are_left_over(golden):
    assert golden["rows"].keys() == {*CASES, *FORMATS}, WRITE


# Computed by version 0.1: what seeds the draws of a run that it began.
VERSION_0_1 = {
    "the default instructions": [918968999957584758],
    "per dimension": [1105466420934946674],
    "a missing rating": [3800642425153171775],
    "own, per dimension": [6718660736352198690],
    "all pairs": [4862577311016932673, 643050377889486800, 1727593248287879442],
    "after": [853986278717015729],
    "no instruction": [5342342225878362014],
    "truncated to the responses": [3774442112368492210],
    "tools and thinking": [8264502399636577752],
}


@pytest.mark.parametrize("name", VERSION_0_1)
def test_ids_of_pairs_are_those_of_version_0_1(name, golden):
    assert [row["example_id"] for row in golden["rows"][name]] == VERSION_0_1[name]


def test_the_fingerprint_reads_no_source_of_ours(tmp_path):
    """Editing a comment must not prepare everybody's data anew."""
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(PAIR[0]) + "\n")
    package, opened, watching = str(Path(axolotl_amopo.__file__).parent), [], False

    def watch(event, arguments):
        if watching and event == "open":
            opened.append(str(arguments[0]))

    sys.addaudithook(watch)  # there to stay, so it is told when

    def found():
        cfg = {"base_model": "x", "datasets": [{"path": str(data), "type": "amopo.rated"}]}
        return list(prepare_entries(cfg, AMoPOConfig()))

    before = found()  # what is imported on the way is now
    watching = True
    try:
        assert found() == before
    finally:
        watching = False
    assert str(data) in opened
    assert not [path for path in opened if path.startswith(package)]
    assert fingerprint.entry_facts({"path": "x"}, "amopo.rated", True)["code"] is None


def write() -> None:
    """Write the golden rows of this version."""
    rows = {name: prepared(name) for name in [*CASES, *FORMATS]}
    if GOLDEN.exists():
        old = json.loads(GOLDEN.read_text(encoding="utf-8"))
        changed = [name for name, kept in old["rows"].items() if rows.get(name, kept) != kept]
        if changed and old["version"] == ROWS_VERSION:
            raise SystemExit(f"The rows changed ({', '.join(changed)}): {RAISE} first.")
    text = json.dumps({"version": ROWS_VERSION, "rows": rows}, indent=1, ensure_ascii=False)
    GOLDEN.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
