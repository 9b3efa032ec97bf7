"""Other models as references: `axolotl amopo reference`, and the runs that read what it wrote."""

import json
import math
import shutil

import pytest
import runs
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from axolotl_amopo.commands import amopo
from axolotl_amopo.commands.reference.take import take_references
from axolotl_amopo.config.references import FILE, file_of
from axolotl_amopo.errors import AMoPOError
from axolotl_amopo.training.reference import Sums

# One token per byte, and another template than the tiny model's.
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
ROWS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    source = (runs.QUICKSTART / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in source[:ROWS]]
    return runs.write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", rows)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A model with a tokenizer and a template of its own."""
    folder = tmp_path_factory.mktemp("other") / "model"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=letters, eos_token="<end>", chat_template=TEMPLATE
    ).save_pretrained(folder)
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "max_position_embeddings": 4096}
    LlamaForCausalLM(LlamaConfig(vocab_size=272, **sizes, **heads)).save_pretrained(folder)
    return folder


def config(folder, model, data, amopo, **changes):
    block = {"dimensions": ["helpfulness"], "overall": False, "winner": "per_dimension"}
    folder.mkdir(exist_ok=True)
    values = runs.config(
        folder, model, data, amopo=block | amopo, sequence_len=1024, **(runs.LORA | changes)
    )
    return runs.write_config(folder, values)


def logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_two_equal_references_are_dpo(tmp_path, tiny_model, data):
    """MRPO with a copy of its own start as the second model; and it starts at log 2."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    block = {"objective": "mrpo", "reference": ["initial", str(copy)]}
    path = config(tmp_path / "mrpo", tiny_model, data, block)
    (taken,) = take_references(str(path))
    assert (taken.examples, taken.new) == (len(Sums.read(taken.path).known), taken.examples)
    mrpo = logs(runs.train(path))
    dpo = logs(runs.train(config(tmp_path / "dpo", tiny_model, data, {"objective": "dpo"})))
    assert mrpo[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert mrpo[0]["reference/difference"] < 1e-3
    assert abs(mrpo[-1]["rewards/margins"]) > 1e-4
    for one, same in zip(mrpo, dpo, strict=True):
        assert one["loss"] == pytest.approx(same["loss"], abs=2e-5)


def test_a_model_with_another_tokenizer(tmp_path, tiny_model, other, data):
    """Its numbers are those of its own tokens, and training compares with them."""
    block = {"objective": "dpo", "reference": str(other), "rating_in_prompt": "chosen"}
    path = config(tmp_path / "run", tiny_model, data, block | {"instruction": "Rate {{ rating }}."})
    (taken,) = take_references(str(path))
    sums = Sums.read(taken.path).known

    trainer = runs.train(path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(other)
    model = AutoModelForCausalLM.from_pretrained(other)
    ours = PreTrainedTokenizerFast.from_pretrained(tiny_model)
    for row in trainer.train_dataset:
        texts = ours.batch_decode(row["prompt_ids"])
        assert len(texts) == 1
        question = texts[0].split("user\n")[1].split("<|im_end|>")[0]
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for place, response in enumerate(row["response_ids"]):
            text = ours.decode(response, skip_special_tokens=True) + "<end>"
            ids = [tokenizer(part).input_ids for part in (prompt, text)]
            with torch.no_grad():
                logps = model(torch.tensor([ids[0] + ids[1]])).logits.log_softmax(-1)[0]
            wanted = sum(logps[len(ids[0]) + t - 1, token].item() for t, token in enumerate(ids[1]))
            assert sums[row["example_id"]][0, place] == pytest.approx(wanted, rel=1e-5)
    # Neither is the other one, so nothing begins at log 2.
    assert abs(logs(trainer)[0]["loss"] - math.log(2)) > 1e-2
    assert "reference/difference" not in logs(trainer)[0]


def test_a_run_knows_what_it_compares_with(tmp_path, tiny_model, data):
    """What is missing, of other rows, or of a model that has changed is refused; what was taken is
    kept in the checkpoint, and not taken again."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    block = {"objective": "dpo", "reference": str(copy)}
    changes = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    path = config(tmp_path / "run", tiny_model, data, block, **changes)
    with pytest.raises(AMoPOError, match=r"is not there; run `axolotl amopo reference .*config"):
        runs.train(path)

    done = CliRunner().invoke(amopo, ["reference", str(path), "--json"])
    (taken,) = json.loads(done.stdout.splitlines()[-1])
    whole = logs(runs.train(path))
    (again,) = take_references(str(path))
    assert (again.examples, again.new) == (taken["examples"], 0)

    fewer = runs.write_jsonl(tmp_path / "fewer.jsonl", [
        json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()[1:]
    ])  # fmt: skip
    prepared = str(tmp_path / "run" / "prepared")
    more = config(tmp_path / "more", tiny_model, data, block, dataset_prepared_path=prepared)
    few = config(tmp_path / "few", tiny_model, fewer, block)
    take_references(str(few))
    shutil.copy(tmp_path / "few" / "prepared" / file_of(str(copy)), taken["path"])
    with pytest.raises(AMoPOError, match=r"lacks \d+ of this config's \d+ examples"):
        runs.train(more)
    (filled,) = take_references(str(path))
    assert 0 < filled.new < filled.examples

    (copy / "config.json").touch()
    with pytest.raises(AMoPOError, match="the model has changed since"):
        runs.train(more)
    with pytest.raises(AMoPOError, match="add --force"):
        take_references(str(path))
    assert take_references(str(path), anew=True)[0].new == filled.examples

    checkpoint = tmp_path / "run" / "out" / "checkpoint-1"
    kept = checkpoint / file_of(str(copy))
    assert kept.is_file() and not (checkpoint / FILE).exists()
    resumed = config(
        tmp_path / "resumed", tiny_model, data, block, resume_from_checkpoint=str(checkpoint),
        dataset_prepared_path=prepared, **changes,
    )  # fmt: skip
    assert [entry["loss"] for entry in logs(runs.train(resumed))[1:]] == [
        entry["loss"] for entry in whole[1:]
    ]


@pytest.mark.parametrize(
    ("block", "changes", "said"),
    [
        ({"objective": "mrpo"}, {}, r"compares with two models; write \[initial, PATH\]"),
        ({"objective": "mrpo", "reference": ["initial", "initial"]}, {}, "compares with two"),
        ({"objective": "dpo", "reference": ["initial", "a/b"]}, {}, "one reference; name one"),
        ({"objective": "dpo", "reference": "intial"}, {}, "Did you mean 'initial'"),
        ({"objective": "simpo", "reference": "a/b"}, {}, "which has no reference"),
        (
            {"objective": "dpo", "reference": "a/b"},
            {"excess_length_strategy": "truncate"},
            "truncate does not go with amopo.reference: a/b",
        ),
    ],
)
def test_wrong_references(tmp_path, tiny_model, data, block, changes, said):
    path = config(tmp_path / "run", tiny_model, data, block, **changes)
    with pytest.raises(AMoPOError, match=said):
        runs.load(path)


def test_nothing_to_take(tmp_path, tiny_model, data):
    path = config(tmp_path / "run", tiny_model, data, {"objective": "dpo"})
    with pytest.raises(AMoPOError, match="for which this command is not needed"):
        take_references(str(path))
    block = {"objective": "dpo", "reference": "some/model"}
    path = config(tmp_path / "run", tiny_model, data, block)
    with pytest.raises(AMoPOError, match="--model some/modl: is not in"):
        take_references(str(path), ("some/modl",))
