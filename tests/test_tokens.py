"""Pairs -> token ids -> prepared rows -> batches: BOS and EOS, what is cut and what never is."""

import copy
import json
import os.path
import re

import pytest
import runs
from axolotl.utils.chat_templates import get_chat_template
from axolotl.utils.chat_templates.base import _CHAT_TEMPLATES
from conftest import CHATML
from datasets import Dataset, concatenate_datasets, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import ASKED, PER, SCALED, SCALES, SYSTEM, TALK, assistant, data_format, user
from test_rows_version import byte_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from axolotl_amopo.config.through_axolotl import stamped
from axolotl_amopo.data import pipeline
from axolotl_amopo.data import tokenizer as tokens
from axolotl_amopo.data.examples import (
    ALIKE,
    BAD_PAIR,
    MIN_QUESTION_TOKENS,
    SHORTENED,
    TOO_LONG,
    prepare_row,
    shorten,
    tokenize_example,
)
from axolotl_amopo.data.pairing import SINGLE
from axolotl_amopo.data.prompts import instructed
from axolotl_amopo.data.tokenizer import SPANNING, WHOLE, ChatTokenizer
from axolotl_amopo.errors import AMoPOError, DataError
from axolotl_amopo.example import Example
from axolotl_amopo.model.batch import make_batch

EOS, EOT, START = "<|im_end|>", "<end_of_turn>", "<|im_start|>assistant\n"


def chat(tokenizer, template=CHATML, eot_tokens=()):
    return ChatTokenizer(tokenizer, template, {}, eot_tokens)


@pytest.fixture(scope="session")
def ours(tokenizer):
    return chat(tokenizer)


def as_text(messages, responses, instructions, signs=None):
    """An example as text: its first two responses, under a prompt for each instruction."""
    prompts = range(len(instructions))
    return {
        "messages": json.dumps(messages),
        "tools": "null",
        "responses": [json.dumps(turn) for turn in responses],
        "instructions": instructions,
        "where": "data.jsonl, row 1",
        "follows": [k for k in prompts for _ in responses],
        "comparisons": [0, 1],
        "reads": [*prompts],
        "signs": signs or [1 for _ in prompts],
        "ratings": [0.5 for _ in prompts for _ in responses],
        "points": [1.0 for _ in prompts],
        "weights": [],
        "fit": [0.0 for _ in prompts for _ in responses],
    }


def tokenized(ours, messages, responses, instructions):
    row = as_text(messages, responses, instructions)
    return tokenize_example(ours, row, messages, "before")


def chatml(messages):
    """What CHATML makes of messages, the next answer's beginning included."""
    turns = [f"<|im_start|>{m['role']}\n{m['content']}{EOS}\n" for m in messages]
    return "".join(turns) + START


# BOS and EOS.


def adds_bos(tokenizer):
    """Let a tokenizer write BOS before every text, as Llama's and Gemma's do."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )


def applied(tokenizer, messages, template, **options):
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=True, return_dict=False, **options
    )


@pytest.mark.parametrize(
    ("added", "written"),
    [(True, 0), (False, 1), (True, 1), (True, 2), (False, 0)],
    ids=["tokenizer", "template", "both", "template twice", "neither"],
)
def test_bos_is_that_of_the_template(added, written, tokenizer):
    """At inference, prompts come from `apply_chat_template(tokenize=True)`."""
    other = copy.deepcopy(tokenizer)
    if added:
        adds_bos(other)
    assert (other("a").input_ids[0] == other.bos_token_id) == added
    ours = chat(other, "{{ bos_token }}" * written + CHATML)
    ids = ours.prompt_ids(TALK)
    assert ids == applied(other, TALK, ours.template, add_generation_prompt=True)
    assert other.decode(ids) == "<s>" * written + chatml(TALK)
    assert other.decode(ours.response_ids(TALK, "Yes.")) == "Yes." + EOS


def template(body, start="assistant: "):
    turns = "{% for m in messages %}" + body + "{% endfor %}"
    return turns + "{% if add_generation_prompt %}" + start + "{% endif %}"


ROLE = "{{ m.role }}: {{ m.content }}"
GEMMA, BARE, LINES = template(ROLE + EOT + "\n"), template(ROLE), template(ROLE + "\n")
# As Phi-3's own: EOS at the conversation's end. As GLM's: nothing but the next turn's beginning.
PHI = GEMMA.removesuffix("{% endif %}") + "{% else %}" + EOS + "{% endif %}"
GLM = template("{% if m.role == 'user' %}" + EOT + "{% endif %}\n{{ m.content }}", start="\n")
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
    "end of turn, named": (GEMMA, (), "Yes.", "Yes.<end_of_turn>"),
    "end of turn, in the vocabulary": (GEMMA, (), "Yes.", "Yes.<end_of_turn>"),
    "end of turn, added by tokens:": (GEMMA, (), "Yes.", "Yes.<end_of_turn>"),
    "end of turn, eot_tokens": (GEMMA, (EOT,), "Yes.", "Yes.<end_of_turn>"),
    "end of turn, plain text": (template(ROLE + "[end]\n"), (), "Yes.", "Yes.[end]<|im_end|>"),
    "end of turn, plain text, eot_tokens": (
        template(ROLE + "[end]\n"), ("[end]",), "Yes.", "Yes.[end]",
    ),
    "the response's own end of turn": (
        BARE, (), "Yes.<end_of_turn>", "Yes.<end_of_turn><|im_end|>",
    ),
    "EOS behind an end of turn": (PHI, (), "Yes.", "Yes.<end_of_turn>\n<|im_end|>"),
    "EOS behind an end of turn, eot_tokens": (PHI, (EOT,), "Yes.", "Yes.<end_of_turn>"),
    "EOS behind an end of turn, generation config": (PHI, "stops", "Yes.", "Yes.<end_of_turn>"),
    "EOS, and another turn begun": (template(ROLE + EOS) + "assistant", (), ">", "><|im_end|>"),
    "what opens the next turn": (GLM, "stops", "Yes.\n", "Yes.\n<end_of_turn>"),
    "what opens the next turn, no generation config": (GLM, (), "Yes.", "Yes.<|im_end|>"),
    "template that trims": (TRIMMING, (), " Yes. ", "Yes.<|im_end|>"),
    "thinking": (THINKING, (), "Yes.", "Yes.<|im_end|>"),
    "thinking, a word of the end": (THINKING, (), "end", "end<|im_end|>"),
}
# fmt: on


@pytest.mark.parametrize("name", ENDS)
def test_response_ends_where_generation_stops(name, tokenizer):
    text, eot_tokens, response, expected = ENDS[name]
    other = copy.deepcopy(tokenizer)
    if name == "end of turn, named":
        other.add_special_tokens({"extra_special_tokens": [EOT]})
    else:  # as in Gemma 3's and Phi-3's files; not special as axolotl adds `tokens:`
        other.add_tokens([AddedToken(EOT, special=name != "end of turn, added by tokens:")])
    stops = (other.eos_token_id, other.convert_tokens_to_ids(EOT)) if eot_tokens == "stops" else ()
    ours = ChatTokenizer(other, text, {}, () if stops else eot_tokens, stops)
    ids = ours.response_ids(ASKED, response)
    assert other.decode(ids) == expected
    assert ours.end_id() == ids[-1]
    assert ids.count(other.eos_token_id) == expected.count(EOS)


def test_a_call_ends_where_generation_stops(tokenizer):
    """A call's own closing mark is no end of the turn; as GLM's, one opens the tool's turn."""
    called = "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}</call>{% endfor %}"
    body = "{% if m.role == 'tool' %}<tool>{% elif m.role == 'user' %}<user>{% endif %}"
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<call>", "</call>"])
    other.add_tokens([AddedToken("<tool>", special=True), AddedToken("<user>", special=True)])
    stops = tuple(other.convert_tokens_to_ids(["<tool>", "<user>"]))
    for known, end, call_end in (((), EOS, EOS), (stops, "<user>", "<tool>")):
        ours = ChatTokenizer(other, template(body + "{{ m.content }}" + called, ""), {}, (), known)
        assert other.decode(ours.response_ids(ASKED, "Yes.")) == "Yes." + end
        ids = ours.response_ids(ASKED, CALLED | {"content": ""})
        assert other.decode(ids) == "<call>clock</call>" + call_end
    ours = chat(tokenizer, template("{{ m.content }}{{ m.tool_calls }}" + EOS + "\n<s>", ""))
    assert tokenizer.decode(ours.response_ids(ASKED, CALLED | {"content": ""})).endswith("]" + EOS)
    with pytest.raises(ValueError, match="contains the end-of-sequence token"):
        ours.response_ids(
            ASKED,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "clock", "arguments": {"zone": f"U{EOS}TC"}}}],
            },
        )


def test_the_models_generation_config_says_where_a_response_ends(tokenizer, tmp_path, caplog):
    other = with_template(tokenizer, PHI)
    other.add_tokens([AddedToken(EOT, special=True)])
    eot, eos = other.convert_tokens_to_ids(EOT), other.eos_token_id
    wanted = data_format("rated", other, **{"dimensions": SCALED} | NO_INSTRUCTION)
    wanted.cfg.base_model = str(tmp_path)
    found = []
    for stops in (None, eos, [eos, eot]):
        if stops:
            config = json.dumps({"eos_token_id": stops})
            (tmp_path / "generation_config.json").write_text(config, encoding="utf-8")
        (row,) = wanted.wrap_dataset(Dataset.from_list([rated("Is it?", *BOTH)]))
        found.append(other.decode(row["response_ids"][0]))
    assert found == [f"Yes.{EOT}\n{EOS}"] * 2 + [f"Yes.{EOT}"]
    assert not [message for message in caplog.messages if "does not stop there" in message]
    other.chat_template = GEMMA
    with pytest.raises(DataError, match=f"its text contains the end-of-sequence token {EOT}"):
        wanted.wrap_dataset(Dataset.from_list([rated("?", *BOTH, texts=("Yes.", f"N{EOT}o."))]))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    wanted.wrap_dataset(Dataset.from_list([rated("Is it?", *BOTH)]))
    warned = [message for message in caplog.messages if "does not stop there" in message]
    assert len(warned) == 1 and f"write special_tokens: {{eos_token: {EOT}}}" in warned[0]


# Every chat template that comes with axolotl.

# How a model of the template ends a turn, by a part of the template's name; with EOS elsewhere.
TURN_ENDS = {
    "aya": "<|END_OF_TURN_TOKEN|>",
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "command_a": "<|END_OF_TURN_TOKEN|>",
    "deepseek_v3": "<｜end▁of▁sentence｜>",  # noqa: RUF001
    "exaone": "[|endofturn|]",
    "gemma": "<end_of_turn>",
    "gemma4": "<turn|>",
    "jamba": "<|eom|>",
    "llama3": "<|eot_id|>",
    "llama4": "<|eot|>",
    "phi_3": "<|end|>",
} | dict.fromkeys(("chatml", "falcon_h1", "nemotron", "phi_4", "qwen"), EOS)
SPECIAL = re.compile(r"<[^<>{}\s']+>|\[[|/]?[A-Za-z_]+\|?\]")
# These end with the beginning of another turn, so only a model that stops before it can take them.
GO_ON = {"command_a", "command_a_rag", "command_a_tool_use"}
# These write a system message into the last turn where that is a question: not into a whole
# conversation, which so differs from every prompt.
SYSTEM_IN_LAST_TURN = {"mistral_v2v3", "mistral_v3_tekken", "pixtral"}
NO_SYSTEM = {"gemma"}
# Their generation prompt closes an empty thinking channel; a conversation has none.
THINKS_IN_PROMPT = dict.fromkeys(("gemma4", "gemma4_unified"), "<|channel>thought\n<channel|>")


def of_template(name, chat_model):
    """A template, a tokenizer that has its marks and adds BOS, and what ends a turn.

    Args:
        chat_model: whether the tokenizer's EOS ends a turn, or is a base model's.
    """
    text = _CHAT_TEMPLATES[name]
    tokenizer = byte_tokenizer()
    ends = {part: end for part, end in TURN_ENDS.items() if name.startswith(part)}
    end = ends[max(ends, key=len)] if ends else tokenizer.eos_token
    marks = dict.fromkeys([*SPECIAL.findall(text), end])
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in marks])
    if chat_model:
        tokenizer.eos_token = end
    adds_bos(tokenizer)
    return text, tokenizer, end


@pytest.mark.parametrize("chat_model", [True, False], ids=["chat", "base"])
@pytest.mark.parametrize("name", sorted(_CHAT_TEMPLATES))
def test_every_template_of_axolotl(name, chat_model):
    """Prompt and response are what the template makes of the whole conversation."""
    text, tokenizer, end = of_template(name, chat_model)
    if name in GO_ON and not chat_model:
        with pytest.raises(AMoPOError, match=r"The chat template writes .* behind an answer"):
            chat(tokenizer, text)
        return
    ours = chat(tokenizer, text)
    for messages in (ASKED, TALK[1:], TALK):
        system = messages[0]["role"] == "system"
        if system and name in NO_SYSTEM:
            with pytest.raises(DataError, match="the chat template refuses this conversation"):
                tokenized(ours, messages, ["Yes.", "No."], [""])
            continue
        prompt, response = ours.prompt_ids(messages), ours.response_ids(messages, "Yes.")
        assert prompt == applied(tokenizer, messages, text, add_generation_prompt=True)
        if name in THINKS_IN_PROMPT:
            thought = ours.ids(THINKS_IN_PROMPT[name])
            assert prompt[-len(thought) :] == thought
            prompt = prompt[: -len(thought)]
        whole = applied(tokenizer, [*messages, assistant("Yes.")], text)
        if system and name in SYSTEM_IN_LAST_TURN:
            assert "Be kind." not in tokenizer.decode(whole)
            whole = prompt + whole[-len(response) :]
        assert response.index(tokenizer.convert_tokens_to_ids(end)) == len(response) - 1
        assert tokenizer.decode(response).count("Yes.") == 1
        if name == "llava":  # ends a turn with a space, behind which the model need not stop
            assert tokenizer.decode(response) == " Yes." + end
            response = response[:-1]
        assert prompt + response == whole[: len(prompt) + len(response)]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None)
@given(question=TEXT, response=TEXT.filter(str.strip), instruction=TEXT)
def test_texts_come_back_from_the_ids(question, response, instruction, ours, tokenizer):
    talk, told = ([*TALK[:-1], user(text)] for text in (question, f"{instruction}\n\n{question}"))
    made = tokenized(ours, talk, [response, "No."], ["", instruction])
    assert tokenizer.batch_decode(made.prompts) == [chatml(talk), chatml(told)]
    assert tokenizer.batch_decode(made.responses) == [response + EOS, "No." + EOS]


def test_prompt_and_response_are_the_whole_conversation(ours):
    for one in map(json.loads, (runs.QUICKSTART / "train.jsonl").open(encoding="utf-8")):
        for messages in ([user(one["prompt"])], [*TALK[:-1], user(one["prompt"])]):
            texts = [response["text"] for response in one["responses"]]
            made = tokenized(ours, messages, texts, [""])
            for text, ids in zip(texts, made.responses, strict=True):
                whole = chatml([*messages, assistant(text)]).removesuffix("\n" + START)
                assert made.prompts[0] + ids == ours.ids(whole)


def metaspace(kind):
    """BPE on words that begin with "▁", and where a text gets one at its beginning."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "prepend":  # Llama 2's: before every piece of text between two special tokens
        replace = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        bpe.normalizer = normalizers.Sequence(replace)
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", EOS]
    trainer = trainers.BpeTrainer(special_tokens=special, show_progress=False)
    words = ["[INST]", "Is", "it?", "[/INST]", "Yes", "it", "is.", "user\n", "assistant\n"]
    bpe.train_from_iterator(words * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


KINDS = ["byte level", "prepend", "always", "first", "never"]


@pytest.fixture(params=KINDS)
def any_kind(request, tokenizer):
    return copy.deepcopy(tokenizer) if request.param == KINDS[0] else metaspace(request.param)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_response_is_tokenised_as_it_stands_after_the_prompt(kind):
    body = "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>"
    ours = chat(llama := metaspace(kind), template(body + "{% endif %}", start=""))
    ids = ours.prompt_ids(ASKED) + ours.response_ids(ASKED, "Yes it is.")
    assert ids == llama.encode("[INST] Is it? [/INST] Yes it is.</s>", add_special_tokens=False)


# name: special tokens beside ChatML's, and how they are found
BESIDE = {
    "none": {},
    "takes white space": {"<a>": ["lstrip"]},
    "longer one takes it": {"<a>": [], "<a>is.": ["lstrip"]},
    "begins with white space": {"<a>": ["rstrip"], " <b>": []},
    "whole word": {"it": ["single_word"], "a<b>": []},
    "normalised": {"<a>": ["normalized"]},
    "longer": {f"{EOS}\n": []},
    "overlap": {"a<|im": [], "is.<|im_start|>": []},
}
PARTS = ["<s>", EOS, "<|im_start|>", "<a>", "<b>", "a<b>", "it", "is.", "a", " ", "\n", "Yes"]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("beside", BESIDE)
def test_ids_of_the_pieces_are_those_of_the_text(beside, split, any_kind):
    for content, flags in BESIDE[beside].items():
        any_kind.add_tokens([AddedToken(content, special=True, **dict.fromkeys(flags, True))])
    any_kind.split_special_tokens = split
    mentioned = "".join(f"{{# {text} #}}" for text in BESIDE[beside])
    both = chat(any_kind), chat(any_kind, CHATML + mentioned)

    def whole(text):
        return any_kind(text, add_special_tokens=False).input_ids

    @settings(max_examples=100, deadline=None)
    @given(parts=st.lists(st.sampled_from(PARTS)), at=st.integers(0, 9), written=st.booleans())
    def alike(parts, at, written):
        ours = both[written]
        prompt, response = "".join(parts[:at]), "".join(parts[at:])
        assert ours.ids(prompt + response) == whole(prompt + response)
        head, ids = whole(prompt), whole(prompt + response)
        expected = ids[len(head) :] if ids[: len(head)] == head else whole(response)
        assert ours.ids_behind(prompt, response) == expected

    alike()


# fmt: off
SPLITS = {  # how tokenizers cut a text before their vocabulary comes in; the second as Llama 3's
    "GPT-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "words and what hangs on them": r"(?i:'s|'t|'ll)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                                    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "looks back": r"(?<=t) \p{L}+|\p{L}+| |[^\p{L} ]+",
    "spans words": r"[a-z]+ [a-z]+|\s+|\S+",
}
# fmt: on
PROSE = (
    "it is a test, isn't it? Yes. It is\n\nso it goes to 10 or 2000  of them\t it's çà est 好 it "
)


def byte_level(split):
    """BPE on bytes behind a regular expression; with none, its tokens may span words."""
    bpe = Tokenizer(models.BPE())
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    cut = [pre_tokenizers.Split(Regex(split), "isolated")] if split else []
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*cut, bytes_alone])
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "<|im_start|>", EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([PROSE] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token=EOS)


WORDED = {
    name: (split, name not in ("looks back", "spans words")) for name, split in SPLITS.items()
}
PIECE = st.sampled_from(
    [*PROSE.split(" "), "It", "test", "'s", "10", "\n", "\n\n", "\t", "好", "", "."]
)


@pytest.mark.parametrize("name", WORDED)
def test_words_are_remembered_where_that_changes_nothing(name):
    split, worded = WORDED[name]
    other = byte_level(split)
    ours = chat(other)
    assert (ours._words is not WHOLE) == worded

    @settings(max_examples=300, deadline=None)
    @given(text=st.lists(PIECE).map(" ".join) | st.text(alphabet="ab .,'1\n\t é好", max_size=30))
    def alike(text):
        assert ours.ids(text) == other(text, add_special_tokens=False).input_ids

    alike()
    if worded:
        assert " goes" in (ours.ids(PROSE), ours._known)[1]


def test_words_that_a_token_spans_are_not_cut():
    """Of a tokenizer that cuts nothing, and of one with a token for two words."""
    ours = chat(byte_level(None))
    assert any(SPANNING.search(token) for token in ours.tokenizer.get_vocab())
    assert ours._words is WHOLE
    other = byte_level(SPLITS["GPT-2"])
    other.add_tokens(["of them"])
    assert chat(other)._words is WHOLE


def test_memory_of_pieces_is_bounded(monkeypatch):
    monkeypatch.setattr(tokens, "KNOWN_PIECES", 20)
    ours = chat(other := byte_level(SPLITS["GPT-2"]))
    for i in range(30):
        text = f"{i} it is {i} so"
        assert ours.ids(text) == other(text, add_special_tokens=False).input_ids
        assert len(ours._known) <= 20
    monkeypatch.setattr(tokens, "KNOWN_PIECES", 1000)
    monkeypatch.setattr(tokens, "KNOWN_CHARACTERS", 50)
    for i in range(30):
        ours.ids(f"a{i}" * 10)
        assert sum(map(len, ours._known)) <= 60


def test_turns_and_words_are_not_tokenised_again(any_kind, monkeypatch):
    ours = chat(any_kind)
    done = []
    encode = ours._encode
    monkeypatch.setattr(ours, "_encode", lambda texts: done.extend(texts) or encode(texts))
    tokenized(ours, TALK, ["Yes.", "No."], ["a", "b"])
    pieces = "".join(done)
    for text in ("Be kind.", "Hi.", "Hello.", "Yes.", "No."):
        assert pieces.count(text) == 1
    before = len(done)
    tokenized(ours, TALK, ["Yes.", "No."], ["b", "a"])
    assert len(done) == before


def test_truncation_of_the_tokenizers_own_is_ended(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.enable_truncation(4)
    other.backend_tokenizer.enable_padding(length=64)
    other.bos_token = None
    assert chat(other).ids("Is it so? " * 9) == chat(tokenizer).ids("Is it so? " * 9)


def test_each_prompt_and_response_is_tokenised_once(tokenizer, monkeypatch):
    done = []
    for name in ("prompt_ids", "response_ids"):
        method = getattr(ChatTokenizer, name)
        monkeypatch.setattr(
            ChatTokenizer, name, lambda *args, method=method: done.append(args[1:]) or method(*args)
        )
    tokenized(chat(tokenizer), TALK, ["Yes.", "No.", "Yes."], ["a", "b", ""])
    told = [*TALK[:-1], user("a\n\nIs it?")], [*TALK[:-1], user("b\n\nIs it?")], TALK
    assert done == [
        *((messages, None) for messages in told),
        *((TALK, text, None, chatml(TALK)) for text in ("Yes.", "No.")),
    ]


# Whole datasets.

BOTH = (90, 2), (20, 4)  # the first wins overall, the second on truth
NO_INSTRUCTION = {"instruction": "", "overall_instruction": ""}
SHOW = {"instruction": "{{ dimension }}={{ rating }}", "overall_instruction": "all"}


def rated(prompt, *ratings, texts=("Yes.", "No.", "Maybe.", "So.")):
    scores = [dict(zip(SCALES, values, strict=True)) for values in ratings]
    listed = [{"text": t, "scores": s} for t, s in zip(texts, scores, strict=False)]
    return {"prompt": prompt, "responses": listed}


def wrap(tokenizer, rows, kind="rated", **changes):
    wanted = data_format(kind, tokenizer, **{"dimensions": SCALED} | NO_INSTRUCTION | changes)
    return wanted.wrap_dataset(Dataset.from_list(rows))


SHOWN = ["all", "help=90", "truth=4"]
AFTER = {"instruction_place": "after"}


@pytest.mark.parametrize(
    ("block", "asked"),
    [
        (SHOW, [f"{text}\n\nIs it?" for text in SHOWN]),
        (SHOW | AFTER, [f"Is it?\n\n{text}" for text in SHOWN]),
        (NO_INSTRUCTION, ["Is it?"]),
        (NO_INSTRUCTION | AFTER, ["Is it?"]),
    ],
    ids=["instruction", "after the question", "empty instruction", "empty, after"],
)
def test_prepared_row(block, asked, tokenizer):
    (row,) = wrap(tokenizer, [rated("Is it?", *reversed(BOTH))], **PER, **block)
    prompts = [chatml([user(text)]) for text in asked]
    assert tokenizer.batch_decode(row["prompt_ids"]) == prompts
    assert tokenizer.batch_decode(row["response_ids"]) == ["No." + EOS, "Yes." + EOS]
    assert row["follows"] == [k for k in range(len(asked)) for _ in "NY"]
    assert row["reads"] == [0, 1, 2] if len(asked) == 3 else [0, 0, 0]
    assert (row["comparisons"], row["signs"]) == ([0, 1], [1, 1, -1])
    assert row["ratings"] == pytest.approx([0.575, 0.9, 0.25, 0.475, 0.2, 0.75])
    assert row["points"] == [52, 100, 4]
    for column in ("input_ids", "labels", "attention_mask"):
        assert len(row[column]) == longest(row)


def test_instruction_in_the_system_message(tokenizer):
    block = SHOW | PER | {"instruction_place": "system"}
    (row,) = wrap(tokenizer, [rated("Is it?", *BOTH)], **block)
    asked = [chatml([{"role": "system", "content": text}, user("Is it?")]) for text in SHOWN]
    assert tokenizer.batch_decode(row["prompt_ids"]) == asked
    (row,) = wrap(tokenizer, [rated("Is it?", *BOTH) | {"system": "Be kind."}], **block)
    kind = [
        chatml([{"role": "system", "content": f"Be kind.\n\n{text}"}, user("Is it?")])
        for text in SHOWN
    ]
    assert tokenizer.batch_decode(row["prompt_ids"]) == kind


def test_tools_and_their_calls_reach_the_template(tokenizer):
    told = "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    called = "{% for call in m.tool_calls or [] %}<{{ call.function.name }}>{% endfor %}"
    other = copy.deepcopy(tokenizer)
    other.chat_template = told + template("{{ m.role }}: {{ m.content }}" + called + EOS)
    call = {"type": "function", "function": {"name": "clock", "arguments": "{}"}}
    talk = [
        user("What time is it?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "Noon."},
        user("Is it?"),
    ]
    tools = [{"type": "function", "function": {"name": "clock", "parameters": None}}]
    row = rated("", *BOTH) | {"prompt": None, "messages": talk}
    for written in (tools, json.dumps(tools)):
        (made,) = wrap(other, [row | {"tools": written}])
        for text in other.batch_decode(made["prompt_ids"]):
            assert text.startswith("[clock]user: What time is it?")
            assert "assistant: <clock>" in text and "tool: Noon." in text
    (made,) = wrap(other, [row])
    assert "[clock]" not in other.decode(made["prompt_ids"][0])


def test_tools_under_another_name(tokenizer):
    other = with_template(
        tokenizer, "{% for tool in tools or [] %}[{{ tool.name }}]{% endfor %}" + CHATML
    )
    row = rated("Is it?", *BOTH) | {"tools": [{"name": "wrong"}], "functions": [{"name": "clock"}]}
    (made,) = wrap(other, [row], entry={"field_tools": "functions"})
    assert other.decode(made["prompt_ids"][0]).startswith("[clock]<|im_start|>user")


@pytest.mark.parametrize("place", ["before", "system"])
def test_the_system_message_is_dropped(place, tokenizer):
    """Where the instruction goes there, it stands alone."""
    block = SHOW | PER | {"instruction_place": place, "entry": {"drop_system_message": True}}
    rows = [
        rated("Is it?", *BOTH) | {"system": "Be kind.", "messages": None},
        rated("", *BOTH) | {"prompt": None, "messages": [SYSTEM, *ASKED], "system": None},
    ]
    first, second = wrap(tokenizer, rows, **block)
    assert first["prompt_ids"] == second["prompt_ids"]
    asked = [[user(f"{text}\n\nIs it?")] for text in SHOWN]
    if place == "system":
        asked = [[{"role": "system", "content": text}, *ASKED] for text in SHOWN]
    assert tokenizer.batch_decode(first["prompt_ids"]) == list(map(chatml, asked))


THOUGHT = {"role": "assistant", "reasoning_content": "Is it?  So.", "content": "Yes."}
CALL = {"function": {"name": "clock", "arguments": {"zone": "UTC"}}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
THOUGHT_IDS = "<think>\nIs it?  So.\n</think>\n\nYes." + EOS
CALLED_IDS = (
    '<think>\n\n</think>\n\n<tool_call>\n{"name": "clock", "arguments": {"zone": "UTC"}}\n'
    "</tool_call>" + EOS
)


def as_json(call):
    return {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}


# fmt: off
# name: (the response, keys of the dataset's entry, what Qwen3's template makes of it)
TURNS = {
    "thinking": (THOUGHT, {}, THOUGHT_IDS),
    "thinking under another name": (
        {"role": "assistant", "thoughts": "Is it?  So.", "content": "Yes."},
        {"field_thinking": "thoughts"}, THOUGHT_IDS,
    ),
    "thinking by axolotl's mapping": (
        {"from": "gpt", "why": "Is it?  So.", "value": "Yes."},
        {"message_property_mappings":
            {"role": "from", "content": "value", "reasoning_content": "why"}}, THOUGHT_IDS,
    ),
    "thinking in the text": (
        " <reasoning> Is it?  So. </reasoning>\n Yes.", {"split_thinking": True}, THOUGHT_IDS,
    ),
    "thinking in a message's text": (
        assistant("<|begin_of_thought|>Is it?  So.<|end_of_thought|> <|begin_of_solution|>Yes."
                  "<|end_of_solution|>"), {"split_thinking": True}, THOUGHT_IDS,
    ),
    "a mark within the text": (
        "So <think>Is it?</think> is XML.".replace("think", "reasoning"), {"split_thinking": True},
        "<think>\n\n</think>\n\nSo <reasoning>Is it?</reasoning> is XML." + EOS,
    ),
    "a call": (CALLED, {}, CALLED_IDS),
    "a call with its arguments as JSON": (CALLED | {"tool_calls": [as_json(CALL)]}, {}, CALLED_IDS),
    "content in parts": (
        assistant([{"type": "text", "text": "Ye"}, {"type": "text", "text": "s."}]), {},
        "<think>\n\n</think>\n\nYes." + EOS,
    ),
    "a whole conversation": ([*ASKED, THOUGHT], {}, THOUGHT_IDS),
}
# fmt: on


QWEN3 = get_chat_template("qwen3")  # axolotl's: its generation prompt opens the thinking
UNOPENED = QWEN3.replace("{{- '<think>\\n\\n' }}", "")  # Qwen's own


def with_template(tokenizer, text):
    other = copy.deepcopy(tokenizer)
    other.chat_template = text
    return other


def like(turn, text):
    """A response in the shape of another one: Arrow takes but one in a column."""
    if isinstance(turn, str):
        return text
    if isinstance(turn, list):
        return [*ASKED, assistant(text)]
    if "from" in turn:
        return {"from": "gpt", "value": text}
    content = turn["content"]
    return assistant([{"type": "text", "text": text}] if isinstance(content, list) else text)


@pytest.mark.parametrize("text", [QWEN3, UNOPENED], ids=["opened", "unopened"])
@pytest.mark.parametrize("name", TURNS)
def test_thinking_and_calls_are_part_of_the_response(name, text, tokenizer):
    turn, entry, expected = TURNS[name]
    rows = [rated("Is it?", *BOTH, texts=(turn, like(turn, "No.")))]
    (row,) = wrap(with_template(tokenizer, text), rows, entry=entry)
    begun = "<think>\n\n" if text == QWEN3 else ""
    assert tokenizer.decode(row["prompt_ids"][0]).endswith(START + begun)
    if begun:
        expected = expected.removeprefix("<think>\n").removeprefix("\n")
    assert tokenizer.decode(row["response_ids"][0]) == expected


def test_responses_may_differ_in_their_thinking_alone(tokenizer):
    good, bad = (dict(zip(SCALES, ratings, strict=True)) for ratings in BOTH)
    pair = {"prompt": "Is it?", "chosen": [THOUGHT], "rejected": [assistant("Yes.")]}
    pair |= {"chosen_ratings": good, "rejected_ratings": bad}
    other = with_template(tokenizer, UNOPENED)
    for kind, row in (
        ("rated", rated("Is it?", *BOTH, texts=(THOUGHT, assistant("Yes.")))),
        ("pairs", pair),
    ):
        (made,) = wrap(other, [row], kind=kind)
        texts = tokenizer.batch_decode(made["response_ids"])
        assert texts == [THOUGHT_IDS, "<think>\n\n</think>\n\nYes." + EOS]


def test_thinking_behind_ended_thinking(tokenizer):
    ours = ChatTokenizer(tokenizer, QWEN3, {"enable_thinking": False})
    assert tokenizer.decode(ours.response_ids(ASKED, "Yes.")) == "Yes." + EOS
    with pytest.raises(DataError, match="it thinks, but the generation prompt ends with"):
        tokenized(ours, ASKED, [THOUGHT, "Yes."], [""])


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        (THOUGHT, "its reasoning_content is not rendered"),
        (CALLED, "its tool calls are not rendered"),
        ([THOUGHT, {"role": "tool", "content": "Noon."}, assistant("Yes.")], "has 3 turns"),
        (CALLED | {"tool_calls": "clock"}, "'responses[0].text.tool_calls': must be a list"),
        (
            CALLED | {"tool_calls": [{"function": {"name": "clock", "arguments": "{"}}]},
            "'responses[0].text.tool_calls[0].function.arguments': is not JSON",
        ),
        (assistant([{"type": "image", "url": "x"}]), "must be text, got [{'type': 'image'"),
    ],
)
def test_a_turn_that_can_not_be_learned_stops_the_run(turn, said, tokenizer):
    with pytest.raises(DataError, match=re.escape(said)) as error:
        wrap(tokenizer, [rated("Is it?", *BOTH, texts=(turn, like(turn, "No.")))])
    assert "row 1" in str(error.value)


def test_what_the_template_writes_alike_is_no_pair(tokenizer, caplog):
    rows = [rated("Is it?", *BOTH, texts=texts) for texts in (("Yes.", "Yes. "), ("Yes.", "No."))]
    with caplog.at_level("INFO"):
        assert len(wrap(with_template(tokenizer, TRIMMING), rows)) == 1
    assert f"1 {ALIKE}" in caplog.text


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


def test_prompts_with_the_instruction_after_the_question_begin_alike(tokenizer):
    rows = [{"messages": TALK} | rated("", *BOTH) | {"prompt": None}]
    (row,) = wrap(tokenizer, rows, **SHOW, **AFTER)
    shared = os.path.commonprefix(row["prompt_ids"])  # noqa: RUF071, of lists too
    assert tokenizer.decode(shared).startswith(chatml(TALK).removesuffix(f"{EOS}\n{START}"))


@pytest.mark.parametrize("block", [{}, {"rating_in_prompt": "own"}, {"group_by_prompt": True}])
def test_equal_prompts_run_once(block, tokenizer):
    """Without instructions the model sees each text once, however many criteria read it."""
    rows = wrap(tokenizer, [rated("Is it?", *BOTH), rated("Why?", *BOTH)], **block)
    batch = make_batch(list(map(Example.from_row, rows)))
    texts = [chatml([user("Is it?")]), "Yes." + EOS, "No." + EOS]
    texts += [chatml([user("Why?")]), *texts[1:]]
    assert tokenizer.decode(batch["input_ids"][0]) == "".join(texts)
    assert batch["reads"].tolist() == [[0, 0, 0]] * 2


GROUP = [rated("Is it?", (90, 2), (20, 4), (50, 2)), rated("And so?", *BOTH)]
TEXTS = ["Yes." + EOS, "No." + EOS, "Maybe." + EOS]


def test_a_group_is_one_row(tokenizer, caplog):
    """Of one question; each of its responses stands there once, in however many pairs it is."""
    dataset = wrap(tokenizer, GROUP, group_by_prompt=True, **SHOW)
    row, other = dataset
    assert tokenizer.batch_decode(row["response_ids"]) == TEXTS
    assert tokenizer.batch_decode(other["response_ids"]) == TEXTS[:2]
    assert (row["comparisons"], other["comparisons"]) == ([0, 1, 0, 2, 1, 2], [0, 1])
    asked = ["all", "help=90", "truth=2", "help=20", "truth=4"]
    prompts = [chatml([user(f"{text}\n\nIs it?")]) for text in asked]
    assert tokenizer.batch_decode(row["prompt_ids"]) == prompts
    assert row["reads"] == [0, 1, 2, 0, 1, 2, 0, 3, 4]
    assert row["follows"] == [k for k in range(5) for _ in range(3)]
    assert row["signs"] == [1] * 9
    by_response = [0.575, 0.9, 0.25, 0.475, 0.2, 0.75, 0.375, 0.5, 0.25]
    assert row["ratings"] == pytest.approx(by_response)
    (facts,) = stamped(dataset)
    assert (facts["examples"], facts["pairs"], facts["prompts"]) == (2, 4, 2)
    assert "2 prompts, 4 pairs made, 4 kept in 2 groups; nothing left out" in caplog.messages[-1]


def test_dropped_pairs_of_groups_are_counted_one_by_one(tokenizer):
    """And as what they were dropped for: here, all three of the long question."""
    long, short = rated("Is it? " * 50, (90, 2), (20, 4), (50, 2)), GROUP[1]
    dataset = wrap(tokenizer, [long, short], group_by_prompt=True, sequence_len=60)
    (facts,) = stamped(dataset)
    assert (facts["examples"], facts["pairs"], facts["dropped"]) == (1, 1, {TOO_LONG: 3})


def test_the_facts_outlive_all_that_axolotl_does_with_a_dataset(tokenizer, tmp_path):
    """Merging, shuffling, splitting, saving and loading."""
    one = wrap(tokenizer, GROUP, group_by_prompt=True)
    other = wrap(tokenizer, [rated("And?", *BOTH), rated("Alone?", (90, 4))])
    merged = concatenate_datasets([one, other]).shuffle(seed=1)
    merged.save_to_disk(tmp_path / "merged")
    parts = load_from_disk(tmp_path / "merged").train_test_split(0.34, seed=1)
    for part in (merged, parts["train"], parts["test"].select([0])):
        first, second = stamped(part)
        assert (first["examples"], first["pairs"], first["dropped"]) == (2, 4, {})
        assert (second["examples"], second["pairs"]) == (1, 1)
        assert second["dropped"] == {SINGLE: 1}
        assert first["scales"] == {name: [*scale] for name, scale in SCALES.items()}
        assert (first["split"], first["lower_is_better"], first["rows"]) == ("train", [], 2)


def test_several_processes_prepare_the_same_rows(tokenizer, monkeypatch, caplog):
    rows = [rated(f"Is it {i}?" * (1 + i % 9), *BOTH, (50, 3)) for i in range(300)]
    rows[7] = rated("Ends?", *BOTH, texts=["Yes.", "N<|im_end|>o."])
    monkeypatch.setattr(pipeline, "ROWS_PER_PROCESS", 1)
    results = []
    for processes in (1, 2):
        wanted = data_format(
            "rated", tokenizer, sequence_len=120, dimensions=SCALED, bad_rows="drop"
        )
        prepared = wanted.wrap_dataset(Dataset.from_list(rows), process_count=processes)
        results.append((prepared.to_list(), caplog.messages[-1]))
    assert results[0] == results[1]
    assert "can't be tokenised" in results[0][1] and "longer than" in results[0][1]

    wanted = data_format("rated", tokenizer, dimensions=SCALED)
    with pytest.raises(DataError, match=r"^data.jsonl, row 8: the response can't be used"):
        wanted.wrap_dataset(Dataset.from_list(rows), process_count=2)


def test_many_dropped_pairs_before_the_first_good_one(tokenizer):
    """`datasets` takes its columns' types from the first thousand rows."""
    rows = [rated("Long? " * 20, *BOTH)] * 1000 + [rated("?", *BOTH)] * 2
    assert len(wrap(tokenizer, rows, sequence_len=30)) == 2


# Excess length.

INSTRUCTIONS = ["Aim high.", "Be kind and clear.", "Be true."]


def prepared(tokenizer, sequence_len=2048, excess="drop", drop_bad=False, **changes):
    """A pair's prepared row."""
    texts = {"messages": ASKED, "responses": ["Yes.", "No."], "instructions": INSTRUCTIONS}
    texts |= {"signs": [1, 1, -1]} | changes
    return prepare_row(
        as_text(**texts),
        chat=chat(tokenizer),
        sequence_len=sequence_len,
        excess_length=excess,
        drop_bad=drop_bad,
    )


def longest(row):
    """The tokens of the longest prompt with the longest response; 0 of a row that is dropped."""
    return sum(max(map(len, row[column]), default=0) for column in ("prompt_ids", "response_ids"))


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


def fit(ours, messages, responses, sequence_len, place="before"):
    """`shorten`: what is left before the question, of the question and of the responses."""
    calls = []

    def tokenize(conversation):
        calls.append(conversation)
        assert len(calls) < 200, "no end"
        row = as_text(messages, responses, INSTRUCTIONS)
        return tokenize_example(ours, row, conversation, place)

    made = shorten(tokenize, ours, messages, sequence_len)
    if made is None:
        return None
    assert longest({"prompt_ids": made.prompts, "response_ids": made.responses}) <= sequence_len
    left = set()
    for ids, instruction in zip(made.prompts, INSTRUCTIONS, strict=True):
        before, turn, asked = ours.tokenizer.decode(ids).rpartition("<|im_start|>user\n")
        begin, end = f"{instruction}\n\n", f"{EOS}\n{START}"
        if place == "after":
            begin, end = "", f"\n\n{instruction}{end}"
        assert asked.startswith(begin) and asked.endswith(end)
        left.add((before + turn, asked.removeprefix(begin).removesuffix(end)))
    assert len(left) == 1, "the prompts are not cut alike"
    return *left.pop(), made.responses


EARLIER = [
    user("First? " * 9),
    assistant("One. " * 9),
    user("Second? " * 9),
    assistant("Two. " * 9),
]
LONG = [SYSTEM, *EARLIER, user(" ".join(f"word{i}" for i in range(40)) + " Is it?")]
ANSWERS = ["Yes. " * 12, "No. " * 9]


@pytest.mark.parametrize("place", ["before", "after"])
def test_what_is_cut_first(place, ours):
    """At every length: the oldest turns go, then the question's beginning, then responses' ends."""
    question = LONG[-1]["content"]
    whole = [ours.response_ids(LONG, text) for text in ANSWERS]
    kept_turns = [chatml(m).removesuffix(START) for m in (LONG[:5], [SYSTEM, *LONG[3:5]], [SYSTEM])]
    length = len(ours.prompt_ids(instructed(LONG, INSTRUCTIONS[1], place)))
    length += max(map(len, whole))
    stages = []
    while result := fit(ours, LONG, ANSWERS, length, place):
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
    place=st.sampled_from(["before", "after"]),
)
def test_shortened_pairs_always_fit(turns, question, responses, system, sequence_len, place, ours):
    talk = [message for text in turns for message in (user(text), assistant("Hm."))]
    begin = [SYSTEM] * system
    talk = [*begin, *talk, user(question)]
    result = fit(ours, talk, responses, sequence_len, place)
    if result:
        assert result[1] and question.endswith(result[1])
        assert result[0].startswith(chatml(begin).removesuffix(START))
    else:  # what has to stay is too long (2: cut at another place, text may merge into fewer ids)
        while len(ours.ids(question[1:])) > MIN_QUESTION_TOKENS:
            question = question[1:]
        least = instructed([*begin, user(question)], INSTRUCTIONS[1], place)
        assert len(ours.prompt_ids(least)) + 2 >= sequence_len


def test_white_space_after_the_question_is_not_its_end(ours):
    question = "Well. " * 50 + "Is it? " + "\n\t" * 60
    assert "Is it?" in fit(ours, [user(question)], ["Yes.", "No."], 80)[1]


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
    changes += [{"instructions": texts} for texts in (INSTRUCTIONS[::-1], INSTRUCTIONS[:2])]
    changes[-1]["signs"] = [1, 1]
    changes += [{"signs": signs} for signs in ([1, 1, 1], [1, 1, 0], [-1, 1, -1])]
    ids, again = ([prepared(tokenizer, **c)["example_id"] for c in changes] for _ in range(2))
    assert ids == again
    assert len(set(ids)) == len(changes)
    assert all(0 <= number < 2**63 for number in ids)
