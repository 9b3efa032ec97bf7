"""The plugin does nothing in a run without `rl: amopo`, and registers itself once."""

import importlib.metadata
import json
from itertools import product

import pytest
import runs
from axolotl.integrations import base
from pydantic import ValidationError

from axolotl_amopo.config.axolotl_keys import NO_EFFECT, check_axolotl_keys
from axolotl_amopo.config.block import (
    INTERNAL,
    AMoPOConfig,
    hyperparameter_model,
    known_keys,
    read_beta,
    read_block,
)
from axolotl_amopo.config.overrides import passed_on
from axolotl_amopo.errors import ConfigError
from axolotl_amopo.objectives import OBJECTIVES, SimPO
from axolotl_amopo.objectives.amopo import AMoPO
from axolotl_amopo.objectives.gradients import Gradients
from axolotl_amopo.objectives.settings import admitted
from axolotl_amopo.objectives.terms import Anchor, Contrast, Offset
from axolotl_amopo.objectives.weights import Scalarization

SFT = [
    {
        "messages": [
            {"role": "user", "content": f"Is {i} even?"},
            {"role": "assistant", "content": a},
        ]
    }
    for i, a in enumerate(["Yes.", "No."] * 4)
]
DPO = [
    {
        "messages": [{"role": "user", "content": f"Is {i} even?"}],
        "chosen": {"role": "assistant", "content": a},
        "rejected": {"role": "assistant", "content": "Perhaps."},
    }
    for i, a in enumerate(["Yes.", "No."] * 4)
]


@pytest.fixture
def installed(monkeypatch):
    """A switch that hides the plugin's entry point from axolotl, or shows it."""

    def switch(visible: bool) -> None:
        def entry_points(**query):
            found = importlib.metadata.entry_points(**query)
            return [p for p in found if visible or p.dist.name != "axolotl-amopo"]

        monkeypatch.setattr(base, "entry_points", entry_points)
        base.reset_plugin_entry_points_cache()
        base.PluginManager.get_instance().plugins.clear()

    yield switch
    monkeypatch.undo()
    base.reset_plugin_entry_points_cache()
    base.PluginManager.get_instance().plugins.clear()


def plugins() -> list[str]:
    return [type(p).__name__ for p in base.PluginManager.get_instance().plugins.values()]


@pytest.mark.parametrize(
    ("rl", "rows", "kind"),
    [(None, SFT, "chat_template"), ("dpo", DPO, "chat_template.default")],
    ids=["sft", "dpo"],
)
def test_other_runs_are_untouched(rl, rows, kind, tmp_path, tiny_model, installed):
    data = runs.write_jsonl(tmp_path / "data.jsonl", rows)
    entry = {"path": str(data), "type": kind}
    if rl:
        entry |= {"split": "train", "ds_type": "json", "data_files": [str(data)]}
    histories = []
    for visible in (True, False):
        folder = tmp_path / str(visible)
        folder.mkdir()
        values = runs.config(
            folder,
            tiny_model,
            data,
            rl=rl,
            amopo=None,
            datasets=[entry],
            max_steps=4,
            num_epochs=2,
            lora_mlp_kernel=False,
            **runs.LORA,
        )
        installed(visible)
        trainer = _train(runs.write_config(folder, values), rl)
        assert ("AMoPOPlugin" in plugins()) is visible
        assert "AMoPO" not in type(trainer).__name__
        histories.append(
            [
                {k: v for k, v in entry.items() if not k.endswith(("runtime", "second", "gpu"))}
                for entry in trainer.state.log_history
            ]
        )
    assert len(runs.losses(trainer)) == 4
    assert json.dumps(histories[0]) == json.dumps(histories[1])


def _train(path, rl):
    if not rl:
        return runs.train(path)
    from axolotl.common.datasets import load_preference_datasets
    from axolotl.train import train

    cfg = runs.load(path)
    return train(cfg=cfg, dataset_meta=load_preference_datasets(cfg=cfg))[2]


@pytest.mark.parametrize(
    "named",
    [None, "axolotl_amopo.AMoPOPlugin", "axolotl_amopo.plugin.AMoPOPlugin"],
    ids=["entry point", "named", "named by its module"],
)
def test_registers_once(named, tmp_path, tiny_model, installed):
    installed(True)
    data = runs.QUICKSTART / "train.jsonl"
    values = runs.config(tmp_path, tiny_model, data, plugins=[named] if named else None)
    cfg = runs.load(runs.write_config(tmp_path, values))
    assert cfg.amopo.enabled
    assert cfg.rl is None
    manager = base.PluginManager.get_instance()
    assert manager.get_input_args().count("axolotl_amopo.config.block.AMoPOArgs") == 1
    assert manager.get_trainer_cls(cfg).__name__ == "AMoPOTrainer"


def test_keys_of_other_plugins_are_not_misspelt(tmp_path, tiny_model, installed):
    """These two resemble axolotl's eval_batch_size and context_parallel_size."""
    installed(True)
    values = runs.config(
        tmp_path,
        tiny_model,
        runs.QUICKSTART / "train.jsonl",
        plugins=["axolotl.integrations.lm_eval.LMEvalPlugin"],
        lm_eval_batch_size=4,
        context_parallel={"size": 1},
    )
    assert runs.load(runs.write_config(tmp_path, values)).lm_eval_batch_size == 4


def test_what_has_no_effect_is_said(tmp_path, tiny_model, installed, caplog):
    """Cut cross-entropy is on by default where its plugin is named."""
    installed(True)
    data = runs.QUICKSTART / "train.jsonl"
    values = runs.config(
        tmp_path,
        tiny_model,
        data,
        plugins=["axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"],
        flash_attn_cross_entropy=True,
    )
    with caplog.at_level("WARNING"):
        runs.load(runs.write_config(tmp_path, values))
    for key in ("cut_cross_entropy", "flash_attn_cross_entropy"):
        assert f"{key} has no effect with rl: amopo" in caplog.text
    assert "chunked_cross_entropy" not in caplog.text


@pytest.mark.parametrize("key", NO_EFFECT)
def test_every_other_loss_is_named(key):
    assert check_axolotl_keys({"rl": "amopo", key: True}) == [key]
    assert check_axolotl_keys({"rl": "amopo", key: False}) == []


def test_block_alone_does_nothing(tmp_path, tiny_model, installed):
    installed(True)
    data = runs.write_jsonl(tmp_path / "data.jsonl", SFT)
    values = runs.config(
        tmp_path, tiny_model, data, rl=None, datasets=[{"path": str(data), "type": "chat_template"}]
    )
    cfg = runs.load(runs.write_config(tmp_path, values))
    assert cfg.amopo is None
    assert base.PluginManager.get_instance().get_trainer_cls(cfg) is None


def test_validated_config_registers_again_as_on_a_ray_worker(tmp_path, tiny_model, installed):
    from axolotl.cli.config import prepare_plugins
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    installed(True)
    data = runs.QUICKSTART / "train.jsonl"
    cfg = runs.load(runs.write_config(tmp_path, runs.config(tmp_path, tiny_model, data)))
    worker = DictDefault(cfg.to_dict())
    for derived in ("batch_size", "capabilities", "env_capabilities"):
        worker.pop(derived, None)
    prepare_plugins(worker)
    again = validate_config(worker)
    assert again.amopo.to_dict() == cfg.amopo.to_dict()
    assert again.datasets[0].conversation == cfg.datasets[0].conversation


@pytest.mark.parametrize("name", OBJECTIVES)
def test_block_of_an_objective(name):
    """It reads what it dumps, as every process of a run does, and leaves the engine its keys."""
    config = AMoPOConfig(objective=name)
    assert AMoPOConfig.model_validate(config.model_dump(exclude_none=True)) == config
    assert config.make_objective() == OBJECTIVES[name]()
    own = hyperparameter_model(OBJECTIVES[name]).model_fields
    of_settings = [hyperparameter_model(setting).model_fields for setting in admitted(name)]
    keys = [*own, *(key for fields in of_settings for key in fields)]
    assert len(set(keys)) == len(keys) and not set(keys) & set(AMoPOConfig.model_fields)
    assert set(known_keys(name)) - set(keys) == set(AMoPOConfig.model_fields) - INTERNAL
    defaults = OBJECTIVES[name].defaults
    assert set(defaults) <= set(known_keys(name)) - set(own)
    # Of settings, those that are set.
    assert set(config.hyperparameters()) == {*own, *(set(defaults) & set(keys))}
    switched_on = [setting for setting in config.make_settings() if setting != type(setting)()]
    assert len(switched_on) == len(set(defaults) & set(keys))
    assert all(field.description for field in own.values())


def test_settings_are_keys_of_the_block():
    block = {"objective": "simpo", "anchor": 0.1, "scalarization": "worst", "sharpness": 2.0}
    config = AMoPOConfig(**block)
    again = AMoPOConfig.model_validate(config.model_dump(exclude_none=True))
    assert again == config
    wanted = [Offset(), Scalarization("worst", 2.0), Anchor(0.1), Contrast()]
    assert config.make_settings() == wanted
    # YAML takes such a number for text.
    assert Anchor(0.01) in AMoPOConfig(anchor="1e-2").make_settings()
    # An objective's own, which the user may change.
    assert AMoPOConfig(objective="raco", c=0.2).make_settings() == [
        Offset(),
        Gradients("cagrad", 0.2),
    ]
    plain = AMoPOConfig(objective="raco", gradients="sum")
    assert AMoPOConfig.model_validate(plain.model_dump()).make_settings() == [Offset(), Gradients()]


def test_weights_are_scaled_and_may_be_equal():
    names = ["a", "b", "c"]
    config = AMoPOConfig(objective="dpo", dimensions=names, weights={"c": 1, "a": 2, "b": 1})
    assert config.shares == [0.5, 0.25, 0.25]
    assert AMoPOConfig(objective="dpo", dimensions=names).weights == dict.fromkeys(names, 1)
    amopo = AMoPOConfig(dimensions=names, weighting="static", weights="equal")
    assert amopo.weights == dict.fromkeys(["overall", *names], 1)
    assert AMoPOConfig().shares is None


def test_a_key_that_names_a_dimension_is_its_number():
    names = ["a", "b", "c"]
    config = AMoPOConfig(objective="modpo", dimensions=names)
    assert config.train_on == "a" and config.make_objective().train_on == 0
    config = AMoPOConfig(objective="modpo", dimensions=names, train_on="b", overall=True)
    assert config.make_objective().train_on == 2


def test_an_objective_brings_its_defaults(tmp_path, tiny_model, installed):
    installed(True)
    block = {"objective": "simpo", "dimensions": ["helpfulness"], "overall_instruction": "Hi."}
    values = runs.config(tmp_path, tiny_model, runs.QUICKSTART / "train.jsonl")
    cfg = runs.load(runs.write_config(tmp_path, values | {"amopo": block}))
    assert cfg.rl_beta == SimPO().beta
    config = read_block(cfg)
    assert (config.instruction, config.overall_instruction) == ("", "Hi.")
    assert config.gamma == SimPO().gamma
    assert config.make_objective(3.0) == SimPO(beta=3.0)


def test_overrides_of_a_sweep_and_of_the_command_line(tmp_path, tiny_model, installed):
    """The command line's win, as axolotl's own options do over a sweep's keys."""
    from axolotl.cli.utils.train import generate_config_files

    installed(True)
    values = runs.config(tmp_path, tiny_model, runs.QUICKSTART / "train.jsonl")
    values["amopo"] |= {"share_prompt": True, "instruction": "Be {{ dimension }}."}
    sweep = {"amopo.gamma": [0.5, 3.0], "amopo.rating-in-prompt": ["none"], "amopo.pairs": [2]}
    together = {"overall": 1e-3, "per_dimension": 1e-4}
    sweep["_"] = [{"amopo.winner": name, "learning_rate": rate} for name, rate in together.items()]
    base = runs.write_config(tmp_path, values)
    swept = generate_config_files(str(base), str(runs.write_config(tmp_path, sweep, "sweep.yml")))
    told = {
        "pairs": "best_worst",
        "share_prompt": "auto",
        "instruction": 'It\'s "{{ dimension }}".',
    }
    found = set()
    for path, _ in swept:
        cfg = runs.load(path, **passed_on(told))
        config = read_block(cfg)
        found.add((config.gamma, config.winner))
        assert cfg.learning_rate == together[config.winner]
        assert config.rating_in_prompt == "none"
        assert {key: getattr(config, key) for key in told} == told
        assert config.dimension_names == values["amopo"]["dimensions"]
    assert found == set(product((0.5, 3.0), together))

    swept = runs.write_config(tmp_path, values | {"amopo.gama": 1.0}, "swept.yml")
    with pytest.raises(ConfigError, match=r"amopo.gama: unknown key. Did you mean 'gamma'\?"):
        runs.load(swept)


def test_the_papers_settings_outlive_our_defaults(monkeypatch):
    own = {"preset"}
    paper = AMoPOConfig(preset="paper")
    assert paper.model_dump(exclude=own) == AMoPOConfig().model_dump(exclude=own)  # as of today
    monkeypatch.setattr(AMoPO, "defaults", {"winner": "per_dimension", "gamma": 0.5})
    assert (AMoPOConfig().winner, AMoPOConfig().gamma) == ("per_dimension", 0.5)
    paper = AMoPOConfig(preset="paper")
    assert (paper.winner, paper.gamma, paper.weighting) == ("overall", 2.0, "gaussian")
    assert AMoPOConfig(preset="paper", gamma=1.5).gamma == 1.5
    assert read_beta({}, paper) == 0.8 and read_beta({"rl_beta": 2.0}, paper) == 2.0
    with pytest.raises(ValidationError, match="preset: paper is of objective amopo, not of dpo"):
        AMoPOConfig(preset="paper", objective="dpo")
