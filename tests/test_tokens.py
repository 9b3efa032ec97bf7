"""Pairs -> token ids -> prepared rows -> batches: BOS and EOS, what is cut and what never is."""

import copy
import json

import pytest
from conftest import CHATML, ROOT
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import ASKED, PER, SCALED, SCALES, SYSTEM, TALK, assistant, strategy, user
from tokenizers import AddedToken, Tokenizer, models, normalizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from axolotl_amopo.collator import AMoPOCollator
from axolotl_amopo.data.strategy import BAD_PAIR, SHORTENED, TOO_LONG, prepare_row
from axolotl_amopo.data.tokens import (
    MIN_QUESTION_TOKENS,
    ChatTokenizer,
    instructed,
    shorten,
    tokenize_pair,
    total,
)

EOS, EOT, START = "<|im_end|>", "<end_of_turn>", "<|im_start|>assistant\n"


def chat(tokenizer, template=CHATML, eot_tokens=()):
    return ChatTokenizer(tokenizer, template, {}, eot_tokens)


def chatml(messages):
    """What CHATML makes of messages, the next answer's beginning included."""
    turns = [f"<|im_start|>{m['role']}\n{m['content']}{EOS}\n" for m in messages]
    return "".join(turns) + START


# BOS and EOS.


@pytest.mark.parametrize(
    ("added", "written", "expected"),
    [(True, 0, 1), (False, 1, 1), (True, 1, 1), (True, 2, 1), (False, 0, 0)],
    ids=["tokenizer", "template", "both", "template twice", "neither"],
)
def test_one_bos_at_the_start(added, written, expected, tokenizer):
    other = copy.deepcopy(tokenizer)
    if added:
        other.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", other.bos_token_id)]
        )
    assert (other("a").input_ids[0] == other.bos_token_id) == added
    ours = chat(other, "{{ bos_token }}" * written + CHATML)
    assert other.decode(ours.prompt_ids(TALK)) == "<s>" * expected + chatml(TALK)
    assert other.decode(ours.response_ids(TALK, "Yes.")) == "Yes." + EOS


def template(body, start="assistant: "):
    turns = "{% for m in messages %}" + body + "{% endfor %}"
    return turns + "{% if add_generation_prompt %}" + start + "{% endif %}"


ROLE = "{{ m.role }}: {{ m.content }}"
GEMMA, BARE, LINES = template(ROLE + EOT + "\n"), template(ROLE), template(ROLE + "\n")
THINKING = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
TRIMMING = CHATML.replace("['content']", "['content'] | trim")
# fmt: off
# name: (template, eot_tokens, the response, what it becomes)
ENDS = {
    "chatml": (CHATML, (), "Yes.", "Yes.<|im_end|>"),
    "chatml, eot_tokens": (CHATML, (EOS,), "Yes.", "Yes.<|im_end|>"),
    "white space of its own": (CHATML, (), " \n Yes. \n\n", " \n Yes. \n\n<|im_end|>"),
    "not ASCII": (CHATML, (), "Ça va? 好的 🙂", "Ça va? 好的 🙂<|im_end|>"),
    "no EOS": (BARE, (), "Yes.", "Yes.<|im_end|>"),
    "no EOS, white space of its own": (BARE, (), "Yes.\n", "Yes.\n<|im_end|>"),
    "no EOS, newline": (LINES, (), "Yes.", "Yes.<|im_end|>"),
    "no EOS, the response has it": (LINES, (), "Yes.<|im_end|>", "Yes.<|im_end|>"),
    "EOS by name": (template(ROLE + "{{ eos_token }}\n"), (), "Yes.", "Yes.<|im_end|>"),
    "end of turn, named": (GEMMA, (), "Yes.", "Yes.<end_of_turn><|im_end|>"),
    "end of turn, in the vocabulary": (GEMMA, (), "Yes.", "Yes.<end_of_turn><|im_end|>"),
    "end of turn, eot_tokens": (GEMMA, (EOT,), "Yes.", "Yes.<end_of_turn>"),
    "template that trims": (TRIMMING, (), " Yes. ", "Yes.<|im_end|>"),
    "thinking": (THINKING, (), "Yes.", "Yes.<|im_end|>"),
    "thinking, a word of the end": (THINKING, (), "end", "end<|im_end|>"),
}
# fmt: on


@pytest.mark.parametrize("name", ENDS)
def test_response_ends_with_one_eos(name, tokenizer):
    text, eot_tokens, response, expected = ENDS[name]
    other = copy.deepcopy(tokenizer)
    if name == "end of turn, named":
        other.add_special_tokens({"extra_special_tokens": [EOT]})
    else:  # as in Gemma 3's and Phi-3's files
        other.add_tokens([AddedToken(EOT, special=True)])
    ids = chat(other, text, eot_tokens).response_ids(ASKED, response)
    assert other.decode(ids) == expected
    assert ids.count(other.eos_token_id) == expected.count(EOS)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None)
@given(question=TEXT, response=TEXT.filter(str.strip), instruction=TEXT)
def test_texts_come_back_from_the_ids(question, response, instruction, tokenizer):
    talk, told = ([*TALK[:-1], user(text)] for text in (question, f"{instruction}\n\n{question}"))
    pair = tokenize_pair(chat(tokenizer), talk, [response, "No."], ["", instruction], [0, 0], "")
    assert tokenizer.batch_decode(pair.prompts) == [chatml(talk), chatml(told)]
    assert tokenizer.batch_decode(pair.responses) == [response + EOS, "No." + EOS]


def test_prompt_and_response_are_the_whole_conversation(tokenizer):
    for one in map(json.loads, (ROOT / "quickstart" / "train.jsonl").open(encoding="utf-8")):
        for messages in ([user(one["prompt"])], [*TALK[:-1], user(one["prompt"])]):
            ours = tokenize_pair(
                chat(tokenizer), messages, [r["text"] for r in one["responses"]], [""], [0], ""
            )
            for response, ids in zip(one["responses"], ours.responses, strict=True):
                whole = chatml([*messages, assistant(response["text"])]).removesuffix("\n" + START)
                assert ours.prompts[0] + ids == chat(tokenizer).ids(whole)


def test_response_is_tokenised_as_it_stands_after_the_prompt():
    """A tokenizer like Llama 2's writes a space before whatever text it is given."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(special_tokens=["<s>", "</s>"], show_progress=False)
    bpe.train_from_iterator(["[INST]", "Is", "it?", "[/INST]", "Yes", "it", "is."] * 3, trainer)
    llama = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    body = "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>"
    ours = chat(llama, template(body + "{% endif %}", start=""))
    ids = ours.prompt_ids(ASKED) + ours.response_ids(ASKED, "Yes it is.")
    assert ids == ours.ids("[INST] Is it? [/INST] Yes it is.</s>")


def test_a_pair_tokenises_each_prompt_and_response_once(tokenizer, monkeypatch):
    done = []
    for name in ("prompt_ids", "response_ids"):
        method = getattr(ChatTokenizer, name)
        monkeypatch.setattr(
            ChatTokenizer, name, lambda *args, method=method: done.append(args[1:]) or method(*args)
        )
    tokenize_pair(chat(tokenizer), TALK, ["Yes.", "No."], ["a", "b", ""], [0, 1, 0], "")
    told = [*TALK[:-1], user("a\n\nIs it?")], [*TALK[:-1], user("b\n\nIs it?")], TALK
    assert done == [*((messages,) for messages in told), (TALK, "Yes."), (TALK, "No.")]


# Whole datasets.

BOTH = (90, 2), (20, 4)  # the first wins overall, the second on truth
NO_INSTRUCTION = {"instruction": "", "overall_instruction": ""}
SHOW = {"instruction": "{{ dimension }}={{ rating }}", "overall_instruction": "all"}


def rated(prompt, *ratings, texts=("Yes.", "No.", "Maybe.", "So.")):
    scores = [dict(zip(SCALES, values, strict=True)) for values in ratings]
    listed = [{"text": t, "scores": s} for t, s in zip(texts, scores, strict=False)]
    return {"prompt": prompt, "responses": listed}


def wrap(tokenizer, rows, **changes):
    wanted = strategy("rated", tokenizer, **{"dimensions": SCALED} | NO_INSTRUCTION | changes)
    return wanted.wrap_dataset(Dataset.from_list(rows))


@pytest.mark.parametrize(
    ("templates", "before"),
    [(SHOW, ["all\n\n", "help=90\n\n", "truth=4\n\n"]), (NO_INSTRUCTION, ["", "", ""])],
    ids=["instruction", "empty instruction"],
)
def test_prepared_row(templates, before, tokenizer):
    (row,) = wrap(tokenizer, [rated("Is it?", *reversed(BOTH))], **PER, **templates)
    prompts = [chatml([user(text + "Is it?")]) for text in before]
    assert tokenizer.batch_decode(row["prompt_ids"]) == prompts
    assert tokenizer.batch_decode(row["response_ids"]) == ["No." + EOS, "Yes." + EOS]
    assert (row["winners"], row["dimension_mask"]) == ([0, 0, 1], [1, 1, 1])
    for column in ("input_ids", "labels", "attention_mask"):
        assert len(row[column]) == longest(row)


def test_what_happened_is_counted_and_logged(tokenizer, caplog):
    rows = [
        rated("Kept?", *BOTH),
        rated("Kept too?", *BOTH, (50, 3)),  # 3 pairs
        rated("Ties?", (50, 3), (50, 3), (0, 5), (100, 1)),  # 6 pairs
        rated("Same?", *BOTH, texts=["Yes.", "Yes."]),
        rated("Unrated?", (90, 4), (None, 2), (None, None)),  # 3 pairs
        rated("Alone?", (90, 4)),
        rated("Long? " * 100, *BOTH),
        rated("Ends?", *BOTH, texts=["Yes.", "N<|im_end|>o."]),
        rated("", *BOTH),
        rated("Out of scale?", (90, 4), (20, 6)),
    ]
    left = wrap(tokenizer, rows, missing_ratings="drop", bad_rows="drop", sequence_len=100)
    assert len(left) == 4
    assert caplog.messages[-1] == (
        "data.jsonl: 10 rows, 8 prompts, 6 pairs made, 4 kept; 1 pairs longer than sequence_len; "
        "1 pairs of identical responses; 1 pairs that can't be tokenised (bad_rows: drop); "
        "6 pairs whose responses tie; 3 pairs with a missing rating (missing_ratings: drop); "
        "1 prompts with one response (single_responses: drop); "
        "2 rows that can't be used (bad_rows: drop)"
    )
    wrap(tokenizer, rows[:1])
    assert caplog.messages[-1].endswith("1 prompts, 1 pairs made, 1 kept; nothing left out")


def test_many_dropped_pairs_before_the_first_good_one(tokenizer):
    """`datasets` takes its columns' types from the first thousand rows."""
    rows = [rated("Long? " * 20, *BOTH)] * 1000 + [rated("?", *BOTH)] * 2
    assert len(wrap(tokenizer, rows, sequence_len=30)) == 2


# Excess length.

INSTRUCTIONS = ["Aim high.", "Be kind and clear.", "Be true."]


def prepared(tokenizer, sequence_len=2048, excess="drop", drop_bad=False, **changes):
    """A pair's prepared row."""
    row = {"messages": ASKED, "responses": ["Yes.", "No."], "instructions": INSTRUCTIONS} | changes
    row |= {"messages": json.dumps(row["messages"]), "where": "data.jsonl, row 1"}
    return prepare_row(
        row | {"winners": [0, 0, 1], "dimension_mask": [1, 1, 1]},
        chat=chat(tokenizer),
        sequence_len=sequence_len,
        excess_length=excess,
        drop_bad=drop_bad,
    )


def longest(row):
    return max(map(len, row["prompt_ids"])) + max(map(len, row["response_ids"]))


def test_drop_is_exact(tokenizer):
    length = longest(prepared(tokenizer))
    assert prepared(tokenizer, length)["outcome"] == ""
    dropped = prepared(tokenizer, length - 1)
    assert (dropped["outcome"], dropped["input_ids"]) == (TOO_LONG, [])


@pytest.mark.parametrize("excess", ["drop", "truncate", "raise"])
def test_pair_that_can_not_be_used_is_dropped(excess, tokenizer):
    bad = ["Yes.", f"N{EOS}o."]
    row = prepared(tokenizer, excess=excess, drop_bad=True, responses=bad)
    assert row["outcome"] == BAD_PAIR


def fit(tokenizer, messages, responses, sequence_len):
    """`shorten`: what is left before the question, of the question and of the responses."""
    calls = []

    def tokenize(conversation):
        calls.append(conversation)
        assert len(calls) < 200, "no end"
        return tokenize_pair(chat(tokenizer), conversation, responses, INSTRUCTIONS, [0, 0, 1], "")

    pair = shorten(tokenize, chat(tokenizer), messages, sequence_len)
    if pair is None:
        return None
    assert max(map(total, pair.sequences())) <= sequence_len
    left = set()
    for ids, instruction in zip(pair.prompts, INSTRUCTIONS, strict=True):
        before, question = tokenizer.decode(ids).split(f"{instruction}\n\n")
        assert question.endswith(f"{EOS}\n{START}")
        left.add((before, question.removesuffix(f"{EOS}\n{START}")))
    assert len(left) == 1, "the prompts are not cut alike"
    return *left.pop(), pair.responses


EARLIER = [
    user("First? " * 9),
    assistant("One. " * 9),
    user("Second? " * 9),
    assistant("Two. " * 9),
]
LONG = [SYSTEM, *EARLIER, user(" ".join(f"word{i}" for i in range(40)) + " Is it?")]
ANSWERS = ["Yes. " * 12, "No. " * 9]


def test_what_is_cut_first(tokenizer):
    """At every length: the oldest turns go, then the question's beginning, then responses' ends."""
    ours, question = chat(tokenizer), LONG[-1]["content"]
    whole = [ours.response_ids(LONG, text) for text in ANSWERS]
    kept_turns = [chatml(m).removesuffix(START) for m in (LONG[:5], [SYSTEM, *LONG[3:5]], [SYSTEM])]
    length = len(ours.prompt_ids(instructed(LONG, INSTRUCTIONS[1]))) + max(map(len, whole))
    stages = []
    while result := fit(tokenizer, LONG, ANSWERS, length):
        before, end, responses = result
        turns = kept_turns.index(before.removesuffix("<|im_start|>user\n"))
        assert question.endswith(end)
        assert all(ids == full[: len(ids)] for ids, full in zip(responses, whole, strict=True))
        stages.append((turns, end != question, responses != whole))
        assert end == question or turns == 2
        assert responses == whole or len(ours.ids(end)) in range(28, MIN_QUESTION_TOKENS + 1)
        length -= 1
    assert stages == sorted(stages) and len(set(stages)) == 5
    assert [len(ids) for ids in responses] == [1, 1]


WORD = st.sampled_from(["a", "Is", "question", "好", "🙂🙂", "x\n\ny", "1234"])
WORDS = st.lists(WORD, min_size=1, max_size=30).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(
    turns=st.lists(WORDS, max_size=3),
    question=st.lists(WORDS, min_size=1, max_size=8).map(" ".join),
    responses=st.tuples(WORDS.map("Yes {}".format), WORDS.map("No {}".format)),
    system=st.booleans(),
    sequence_len=st.integers(1, 300),
)
def test_shortened_pairs_always_fit(turns, question, responses, system, sequence_len, tokenizer):
    talk = [message for text in turns for message in (user(text), assistant("Hm."))]
    begin = [SYSTEM] * system
    result = fit(tokenizer, [*begin, *talk, user(question)], responses, sequence_len)
    if result:
        assert result[1] and question.endswith(result[1])
        assert result[0].startswith(chatml(begin).removesuffix(START))
    else:  # what has to stay is too long (2: cut at another place, text may merge into fewer ids)
        while len(chat(tokenizer).ids(question[1:])) > MIN_QUESTION_TOKENS:
            question = question[1:]
        least = [*begin, user(f"{INSTRUCTIONS[1]}\n\n{question}")]
        assert len(chat(tokenizer).prompt_ids(least)) + 2 >= sequence_len


def test_white_space_after_the_question_is_not_its_end(tokenizer):
    question = "Well. " * 50 + "Is it? " + "\n\t" * 60
    assert "Is it?" in fit(tokenizer, [user(question)], ["Yes.", "No."], 80)[1]


@pytest.mark.parametrize(
    ("change", "sequence_len", "outcome"),
    [
        ({"messages": LONG, "responses": ANSWERS}, 150, SHORTENED),
        ({"responses": ANSWERS}, 12, TOO_LONG),
        ({"responses": ["Same start. " * 30 + end for end in ANSWERS]}, 60, TOO_LONG),
    ],
    ids=["shortened", "no room", "cut to the same text"],
)
def test_outcome_of_truncation(change, sequence_len, outcome, tokenizer):
    assert prepared(tokenizer, 2000, "truncate", **change)["outcome"] == ""
    row = prepared(tokenizer, sequence_len, "truncate", **change)
    assert row["outcome"] == outcome
    assert len(row["input_ids"]) == longest(row) <= sequence_len


# Prepared rows -> batches.


def test_example_id_is_the_content(tokenizer):
    changes = [{}, {"messages": [user("Is it so?")]}, {"messages": TALK}]
    changes += [{"responses": texts} for texts in (["Yes!", "No."], ["No.", "Yes."])]
    changes += [{"instructions": texts} for texts in (INSTRUCTIONS[::-1], INSTRUCTIONS * 2)]
    ids, again = ([prepared(tokenizer, **c)["example_id"] for c in changes] for _ in range(2))
    assert ids == again
    assert len(set(ids)) == len(changes)
    assert all(0 <= number < 2**63 for number in ids)


# fmt: off
PAIRS = [
    {"prompt_ids": [[10], [11, 12]], "response_ids": [[20, 3], [30, 31, 3]], "winners": [0, 1],
     "dimension_mask": [1, 0], "example_id": 2**62 + 1},
    # `own`: two prompts a dimension, the winner's and the loser's
    {"prompt_ids": [[40], [41, 41], [42], [43] * 3], "response_ids": [[50, 3], [60, 3]],
     "winners": [0, 1], "dimension_mask": [1, 1], "example_id": 7},
]
# Prompt and response, example by example, prompt by prompt, winner before loser.
SEQUENCES = [
    ([10], [20, 3]), ([10], [30, 31, 3]), ([11, 12], [30, 31, 3]), ([11, 12], [20, 3]),
    ([40], [50, 3]), ([41, 41], [60, 3]), ([42], [60, 3]), ([43] * 3, [50, 3]),
]
# fmt: on


@pytest.mark.parametrize(("multiple", "length"), [(None, 5), (4, 8), (5, 5)])
def test_batch(multiple, length, tokenizer):
    batch = AMoPOCollator(tokenizer, pad_to_multiple_of=multiple)(PAIRS)
    assert next(iter(batch)) == "dimension_mask"
    assert batch["dimension_mask"].tolist() == [[True, False], [True, True]]
    assert batch["example_ids"].tolist() == [2**62 + 1, 7]
    assert batch["response_len"] == 3
    for name in ("input_ids", "attention_mask", "position_ids", "labels"):
        assert batch[name].shape == (len(SEQUENCES), length)
    for i, (prompt, response) in enumerate(SEQUENCES):
        used = len(prompt) + len(response)
        left = length - used
        assert batch["input_ids"][i].tolist() == [tokenizer.pad_token_id] * left + prompt + response
        assert batch["attention_mask"][i].tolist() == [0] * left + [1] * used
        assert batch["position_ids"][i].tolist() == [0] * left + list(range(used))
        assert batch["labels"][i].tolist() == [-100] * (length - len(response)) + response
