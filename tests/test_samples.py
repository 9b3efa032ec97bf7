"""Samples while it trains, from real training runs."""

import json
import re

import pytest
import runs
import torch
import yaml
from axolotl.integrations.base import PluginManager
from transformers import AutoModelForCausalLM

from axolotl_amopo.commands.kit.generator import Generator, Sampling
from axolotl_amopo.commands.kit.models import find_model
from axolotl_amopo.config.before_launch import check_before_launch
from axolotl_amopo.config.block import AMoPOConfig
from axolotl_amopo.errors import AMoPOError, visible
from axolotl_amopo.steering.steering import Steering, Weights, read_settings, written
from axolotl_amopo.training import samples
from axolotl_amopo.training.samples import FILE, repetition, settings_of

TOKENS = 12
BLOCK = {"dimensions": ["helpfulness", "honesty"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pairs of two prompts, each twice, of which the second is a conversation."""
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why, then?"}]
    rated = [
        {"text": text, "scores": {"helpfulness": score, "honesty": score}}
        for text, score in (("It is so.", 5), ("Who knows?", 2), ("No.", 1))
    ]
    asked = ({"prompt": "Is it?"}, {"messages": talk})
    rows = [one | {"responses": rated[n : n + 2]} for one in asked for n in (0, 1)]
    return runs.write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", rows)


def settings(folder, model, data, block, **changes):
    folder.mkdir(exist_ok=True)
    changes = {
        "amopo": BLOCK | block,
        "val_set_size": None,
        "test_datasets": [{"path": str(data), "type": "amopo.rated", "scale": [1, 5]}],
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_batch_size": 3,
        "max_steps": 2,
        "generation_max_new_tokens": TOKENS if block else None,
    } | changes
    return runs.write_config(folder, runs.config(folder, model, data, **changes))


def table(folder):
    return [json.loads(line) for line in (folder / "out" / FILE).read_text().splitlines()]


def evaluations(trainer):
    return [entry for entry in trainer.state.log_history if "eval_loss" in entry]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model, data):
    """A run of full fine-tuning that saves its model."""
    folder = tmp_path_factory.mktemp("run")
    block = {"generate_samples": 2}
    path, said = settings(folder, tiny_model, data, block, learning_rate=0.05), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples.LOG, "info", lambda line, *values: said.append(line % values))
        trainer = runs.train(path)
    trainer.said = said
    return folder, trainer


def test_answers_are_those_of_generate(run, tiny_model):
    """Before the first step and after the last one, under the same settings."""
    folder, _ = run
    rows = table(folder)
    assert [(row["step"], row["sample"], row["settings"]) for row in rows] == [
        (step, sample, name) for step in (0, 2) for sample in (0, 1) for name in ("overall", "none")
    ]
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why, then?"}]
    asked = [[{"role": "user", "content": "Is it?"}], talk]
    trained = find_model(str(folder / "out"), str(tiny_model))
    for base in (True, False):
        generator = Generator(trained, "transformers", base=base)
        for row in rows[: 4 if base else None][-4:]:
            one = {"overall": None} if row["settings"] == "overall" else {}
            ids = generator.ids(asked[row["sample"]], one)
            (made,) = generator.engine.generate([ids], Sampling(max_new_tokens=TOKENS))
            assert row["answer"] == generator.text(made)
            assert row["prompt"] == asked[row["sample"]][-1]["content"]
            assert row["tokens"] == len(made) and row["finished"] == generator.finished(made)
            assert row["repetition"] == repetition(made)
    assert [row["answer"] for row in rows[:4]] != [row["answer"] for row in rows[4:]]


def test_the_log_says_it(run):
    folder, trainer = run
    rows, (first, last) = table(folder), evaluations(trainer)
    key, (begun, ended) = "eval_samples/overall/tokens", trainer.said
    assert begun.startswith("Samples at step 0:") and "(at step" not in begun
    assert f"overall: {last[key]:.1f} tokens (at step 0: {first[key]:.1f})" in ended
    assert f"  Is it? | none | {' '.join(visible(rows[-3]['answer']).split())}\n" in ended


def test_metrics_are_means_beside_the_first(run):
    folder, trainer = run
    rows, (first, last) = table(folder), evaluations(trainer)
    for entry, part in ((first, rows[:4]), (last, rows[4:])):
        for name in ("overall", "none"):
            own = [row for row in part if row["settings"] == name]
            for metric in ("tokens", "repetition"):
                mean = sum(row[metric] for row in own) / 2
                assert entry[f"eval_samples/{name}/{metric}"] == pytest.approx(mean)
            unfinished = sum(not row["finished"] for row in own) / 2
            assert entry[f"eval_samples/{name}/unfinished"] == unfinished
            for row in own:
                assert row["tokens_first"] == first[f"eval_samples/{name}/tokens"]
    assert 0 < last["eval_samples/time"] < 1


def test_training_is_bit_for_bit_the_same(tmp_path, tiny_model, data):
    """With dropout, and with samples that are drawn."""
    weights, losses = [], []
    for number in (0, 2):
        block = {"generate_samples": number} if number else {}
        draws = {"generation_temperature": 0.9, "generation_top_k": 20} if number else {}
        changes = draws | runs.LORA | {"lora_dropout": 0.3, "eval_steps": 1, "max_steps": 2}
        changes["output_dir"] = str(tmp_path / f"out-{number}")
        trainer = runs.train(settings(tmp_path, tiny_model, data, block, **changes))
        losses.append([*runs.losses(trainer), *(e["eval_loss"] for e in evaluations(trainer))])
        weights.append({n: p.detach() for n, p in trainer.model.named_parameters()})
    assert losses[0] == losses[1]
    for name, one in weights[0].items():
        assert torch.equal(one, weights[1][name]), name
    assert len(evaluations(trainer)) == 3


def test_the_models_own_generation_config_stays(run, tiny_model):
    saved = AutoModelForCausalLM.from_pretrained(run[0] / "out").generation_config
    was = AutoModelForCausalLM.from_pretrained(tiny_model).generation_config
    assert saved.eos_token_id == was.eos_token_id and saved.max_new_tokens == was.max_new_tokens


def test_axolotls_own_keys(tmp_path, tiny_model, data):
    """They take samples as ours do; what is not set is ours, not axolotl's."""
    own = {"generate_samples": True, "num_generation_samples": 2}
    drawn = {"generation_top_p": 0.5, "generation_top_k": 7}
    for keys, expected in [
        (own, (2, 128, False)),
        (own | {"generation_max_new_tokens": 9} | drawn, (2, 9, True)),
        ({"generate_samples": True, "generation_temperature": 0.3}, (3, 128, True)),
        ({"generate_samples": True, "generation_temperature": 0}, (3, 128, False)),
        ({"generate_samples": False}, (0, 50, True)),  # off: axolotl's defaults, which nobody reads
    ]:
        path = settings(tmp_path, tiny_model, data, {}, **keys)
        check_before_launch(yaml.safe_load(path.read_text(encoding="utf-8")))
        cfg = runs.load(path)
        found = cfg.amopo.generate_samples, cfg.generation_max_new_tokens, cfg.generation_do_sample
        assert found == expected
        assert not cfg.generate_samples  # or axolotl would take samples of its own
        for key in ("generation_temperature", *drawn):
            assert key not in keys or cfg[key] == keys[key]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("honestly=4", "the model knows no dimension 'honestly'. Did you mean"),
        ("honesty=four", "'honesty=four': write a dimension and a rating"),
        ("honesty=9", "honesty: 9 is outside the scale"),
    ],
)
def test_settings_that_nobody_can_ask_for(line, message, tmp_path, tiny_model, data):
    """Before the model is loaded; a rating outside of the scale where the config has the scale."""
    dimensions = [{"name": name, "scale": [1, 5]} for name in ("helpfulness", "honesty")]
    block = {"generate_samples": 1, "sample_settings": [line], "dimensions": dimensions}
    cfg = runs.load(settings(tmp_path, tiny_model, data, block))
    with pytest.raises(AMoPOError, match=re.escape(f"amopo.sample_settings: {message}")):
        PluginManager.get_instance().pre_model_load(cfg)


def test_settings(tmp_path):
    """Lines are read as they are written; what has the same instruction is asked for once."""
    for settings in ({}, {"overall": None}, {"a": 4.5, "b": None}, Weights({"a": 0.7, "b": 0.3})):
        assert read_settings(written(settings)) == settings
        assert type(read_settings(written(settings))) is type(settings)

    def found(**block):
        config = AMoPOConfig(**BLOCK | {"generate_samples": 1} | block)
        scales = dict.fromkeys(config.dimension_names, (1, 5))
        return [written(one) for one in settings_of(config, Steering.from_config(config, scales))]

    assert found() == ["overall", "none"]
    assert found(overall=False) == ["helpfulness", "none"]
    assert found(objective="cos_dpo") == found(prompts="one", overall=False)
    assert found(prompts="one", overall=False) == ["helpfulness, honesty", "none"]
    assert found(objective="dpo") == ["none"]  # has no instruction
    same = ["none", "honesty=5", "honesty", "overall"]
    assert found(sample_settings=same) == ["none", "honesty=5", "overall"]


def test_repetition():
    assert repetition([1, 2, 3]) == 0
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repetition([7] * 100) == pytest.approx(96 / 97)
