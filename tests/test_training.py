"""Real training of a tiny model through axolotl's builder, loader and trainer, in this process."""

import json
import math
import statistics

import axolotl.cli  # noqa: F401, sets logging up when imported, which would undo caplog's
import pytest
import runs
import torch
from axolotl.cli.merge_lora import do_merge_lora
from axolotl.evaluate import evaluate
from datasets import Dataset
from safetensors.torch import load_file
from test_data import data_format
from transformers import JambaConfig, JambaForCausalLM, MixtralConfig, MixtralForCausalLM

from axolotl_amopo.commands.report.findings import findings
from axolotl_amopo.config.references import FILE as FILE_OF_REFERENCE
from axolotl_amopo.errors import AMoPOError
from axolotl_amopo.example import Example
from axolotl_amopo.objectives import OBJECTIVES, Draw, gradients
from axolotl_amopo.steering.steering import FILE
from axolotl_amopo.training import reference
from axolotl_amopo.training import trainer as training_trainer
from axolotl_amopo.training.collator import AMoPOCollator
from axolotl_amopo.training.gradients import directions
from axolotl_amopo.training.reference import AdapterOff, Precomputed
from axolotl_amopo.training.runs import read_run

ROWS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight pairs of different lengths, with dimensions that disagree on some."""
    source = (runs.QUICKSTART / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in source[:ROWS]]
    for i, row in enumerate(rows):
        row["responses"] = row["responses"][:2]
        row["responses"][0]["text"] *= 1 + i % 3
    return runs.write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", rows)


def full(folder, model, data, *, amopo=None, **changes):
    """Full fine-tuning with plain SGD: a parameter's change is its gradient."""
    block = {"dimensions": ["helpfulness", "honesty", "safety"], "winner": "per_dimension"}
    return runs.config(
        folder,
        model,
        data,
        amopo=block | (amopo or {}),
        **({"optimizer": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0} | changes),
    )


def one_step(folder, model, data, **changes):
    """(logged metrics, change of every parameter) of one optimizer step."""
    folder.mkdir()
    path = runs.write_config(folder, full(folder, model, data, max_steps=1, **changes))
    trainer = runs.train(path)
    before = load_file(model / "model.safetensors")
    after = load_file(folder / "out" / "model.safetensors")
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    return logged, {name: after[name] - before[name] for name in before}


def same_step(one, other, tolerance=1e-5):
    for name in one[1]:
        torch.testing.assert_close(one[1][name], other[1][name], rtol=tolerance, atol=tolerance)
    compared = [name for name in one[0] if name.startswith(("amopo/", "rewards/", "logps/"))]
    assert compared
    for name in ["loss", *compared]:
        assert one[0][name] == pytest.approx(other[0][name], abs=2e-5), name


@pytest.fixture(scope="module")
def whole_step(tmp_path_factory, tiny_model, data):
    """One micro batch of four, deterministic weights."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return one_step(folder, tiny_model, data, micro_batch_size=4, amopo={"weighting": "mean"})


def test_a_step_moves_the_model(whole_step):
    assert max(change.abs().max() for change in whole_step[1].values()) > 1e-3


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("sequences", {"amopo": {"share_prompt": False}}),
        ("tree", {"attn_implementation": "eager"}),
        ("packed", {"amopo": {"share_prompt": True}, "gradient_checkpointing": True}),
    ],
    ids=["unshared", "eager", "checkpointing"],
)
def test_every_layout_makes_the_same_step(
    tmp_path, tiny_model, data, whole_step, layout, changes, caplog
):
    block = {"weighting": "mean"} | changes.pop("amopo", {})
    step = one_step(tmp_path / "run", tiny_model, data, micro_batch_size=4, amopo=block, **changes)
    same_step(whole_step, step)
    assert (f"({layout} layout)" in caplog.text) == (layout != "sequences")


def test_a_recurrent_model_trains_unshared(tmp_path, tokenizer, data, caplog):
    """By itself, with one loud line; `share_prompt: true` stops before the model loads."""
    config = JambaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=1,
        num_experts_per_tok=1,
    )
    model = tmp_path / "model"
    JambaForCausalLM(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    one_step(tmp_path / "auto", model, data, sequence_len=2048)
    loud = [r for r in caplog.records if "PROMPTS ARE NOT SHARED" in r.message]
    assert len(loud) == 1
    assert "JambaForCausalLM carries a state" in loud[0].message
    notes = {one.code: one.text for one in findings(read_run(tmp_path / "auto" / "out"))}
    assert "JambaForCausalLM carries a state" in notes["prompts-not-shared"]
    assert "own-logits" not in notes
    for file in model.glob("*.safetensors"):
        file.unlink()  # the config alone suffices to refuse
    with pytest.raises(AMoPOError, match="share_prompt: true can't work"):
        one_step(tmp_path / "true", model, data, amopo={"share_prompt": True})


def test_training_that_fails_gives_the_terminal_back(tmp_path, tiny_model, data, monkeypatch):
    def broken(*_):
        raise RuntimeError("broken in the first step")

    given_back = []
    monkeypatch.setattr(training_trainer, "close_table", given_back.append)
    monkeypatch.setattr(training_trainer.AMoPOTrainer, "training_step", broken)
    with pytest.raises(RuntimeError, match="broken in the first step"):
        one_step(tmp_path / "run", tiny_model, data)
    assert len(given_back) == 1


def test_the_loss_of_a_router_is_trained(tmp_path, tokenizer, data):
    """A mixture of experts' auxiliary loss, where its config asks for it."""
    config = MixtralConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = tmp_path / "model"
    MixtralForCausalLM(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    steps = {}
    for name, asked in [("plain", {}), ("routed", {"output_router_logits": True})]:
        changes = {"overrides_of_model_config": asked | {"router_aux_loss_coef": 5.0}}
        steps[name] = one_step(tmp_path / name, model, data, **changes)
    plain, routed = (logged for logged, _ in steps.values())
    assert "terms/router" not in plain and routed["terms/router"] > 5.0  # 1 per layer is balance
    assert routed["loss"] == pytest.approx(plain["loss"] + routed["terms/router"], rel=1e-4)
    assert routed["grad_norm"] > 1.1 * plain["grad_norm"]


def against_reference(folder, model, data, **changes):
    """The trainer, and the logs of three steps, of DPO."""
    block = {"objective": "dpo", "dimensions": ["helpfulness", "honesty", "safety"]}
    values = runs.config(folder, model, data, amopo=block, **changes)
    trainer = runs.train(runs.write_config(folder, values))
    return trainer, [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "mrpo"])
def test_every_objective_trains(objective, tmp_path, tiny_model, groups):
    """By its name alone, with an adapter, on prompts with several responses; what was saved is
    evaluated, and merged."""
    values = runs.config(
        tmp_path,
        tiny_model,
        groups,
        amopo={"objective": objective, "dimensions": ["helpfulness", "honesty"]},
        test_datasets=[{"path": str(groups), "type": "amopo.rated", "scale": [1, 5]}],
        num_epochs=9,
        max_steps=4,
        eval_steps=4,
        learning_rate=1e-2,
        micro_batch_size=16,  # the same rows in every step
        **runs.LORA,
    )
    path, out = runs.write_config(tmp_path, values), tmp_path / "out"
    trainer = runs.train(path)
    history = trainer.state.log_history
    first = next(entry for entry in history if "loss" in entry)
    before, *_, after = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert after < before - 1e-4
    paper = trainer.objective.paper
    if "reference" in trainer.objective.needs:
        assert abs(first["rewards/margins"]) < 1e-5
        assert first["reference/difference"] < 1e-3
    found = {finding.code for finding in findings(read_run(out))}
    assert not found & {"another-start", "nothing-moved", "loss-rose", "length-grows"}
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"[{paper.name}]({paper.url})" in card and paper.citation in card

    cfg, datasets = runs.prepare(path, lora_model_dir=str(out))
    again = evaluate(cfg=cfg, dataset_meta=datasets)
    assert again["eval_loss"] == pytest.approx(after, abs=1e-5)
    do_merge_lora(cfg=runs.load(path, lora_model_dir=str(out), merge_lora=True))
    merged = load_file(out / "merged" / "model.safetensors")
    before = load_file(tiny_model / "model.safetensors")
    assert any(not torch.equal(merged[name], weight) for name, weight in before.items())
    assert (out / "merged" / FILE).is_file()


REFERENCES = {
    "full": {},
    "lora": runs.LORA | {"lora_dropout": 0.3},
    "dora": runs.LORA | {"peft_use_dora": True},
    "saved head": runs.LORA | {"lora_modules_to_save": ["lm_head"]},
    # Of the largest singular values, which it takes out of the base.
    "pissa": runs.LORA | {"peft_init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("method", REFERENCES)
def test_the_policy_begins_as_its_reference(method, tmp_path, tiny_model, data):
    """At step 0 every margin is 0, and the loss is log 2 of each dimension that tells the pair's
    responses apart."""
    trainer, (first, *_, last) = against_reference(
        tmp_path, tiny_model, data, micro_batch_size=ROWS, num_epochs=3, **REFERENCES[method]
    )
    signs = torch.tensor([Example.from_row(row).signs for row in trainer.train_dataset])
    share = (signs != 0).float().mean().item()
    assert first["loss"] == pytest.approx(share * math.log(2), abs=1e-6)
    assert abs(first["rewards/margins"]) < 1e-6
    assert abs(last["rewards/margins"]) > 1e-4
    kind = Precomputed if method in ("full", "pissa") else AdapterOff
    assert [type(one) for one in trainer.references.each] == [kind]


@pytest.mark.parametrize("fault", ["dropout", "adapter"])
def test_another_beginning_is_found(fault, tmp_path, tiny_model, data, monkeypatch):
    """A policy with dropout, or an adapter that does not begin at zero taken for one that does."""
    if fault == "dropout":
        monkeypatch.setattr(training_trainer, "turn_dropout_off", lambda model: None)
    else:
        monkeypatch.setattr(reference, "STARTS_AT_ZERO", ("pissa",))
    changes = REFERENCES["pissa"] | {"lora_dropout": 0.3 * (fault == "dropout")}
    _, (first, *_) = against_reference(
        tmp_path, tiny_model, data, micro_batch_size=ROWS, num_epochs=3, **changes
    )
    assert abs(first["rewards/margins"]) > 1e-5


def test_a_reference_taken_once_is_that_of_every_step(tmp_path, tiny_model, data, monkeypatch):
    """With an adapter both ways are possible."""
    logs = []
    for name, ways in (("off", reference.STARTS_AT_ZERO), ("once", ())):
        monkeypatch.setattr(reference, "STARTS_AT_ZERO", ways)
        folder = tmp_path / name
        folder.mkdir()
        logs.append(against_reference(folder, tiny_model, data, **runs.LORA)[1])
    for one, other in zip(*logs, strict=True):
        for name in ("loss", "rewards/margins", "rewards/chosen"):
            # Of sums over hundreds of tokens.
            assert one[name] == pytest.approx(other[name], abs=1e-5)


def test_a_resumed_run_keeps_its_reference(tmp_path, tiny_model, data):
    """Full fine-tuning: what is compared with is the model as training found it."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for folder in (whole, resumed):
        folder.mkdir()
    steps = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    _, logs = against_reference(whole, tiny_model, data, **steps)
    checkpoint = whole / "out" / "checkpoint-1"
    assert (checkpoint / FILE_OF_REFERENCE).is_file()
    changes = {"resume_from_checkpoint": str(checkpoint)}
    _, again = against_reference(resumed, tiny_model, data, **changes)
    assert [entry["loss"] for entry in again[1:]] == [entry["loss"] for entry in logs[1:]]
    (checkpoint / FILE_OF_REFERENCE).write_bytes(b"damaged")
    with pytest.raises(AMoPOError, match=r"amopo_reference\.npz"):
        against_reference(resumed, tiny_model, data, **changes)


def test_a_step_of_several_gradients(tmp_path, tiny_model, data):
    """RACO's step is made of those of its dimensions alone, however the batch is cut."""
    names = ["helpfulness", "honesty", "safety"]

    def step(name, micro_batch=4, **block):
        changes = {"micro_batch_size": micro_batch, "gradient_accumulation_steps": 4 // micro_batch}
        changes["rl_beta"] = 0.2
        return one_step(tmp_path / name, tiny_model, data, amopo=block, **changes)

    def flat(change):
        return torch.cat([change[name].flatten() for name in sorted(change)]).double()

    alone = torch.stack(
        [
            flat(step(name, objective="dpo", weights={n: float(n == name) for n in names})[1])
            for name in names
        ]
    )  # [3, D] of minus the gradients
    gram, weights = gradients.gram(alone), torch.full((3,), 1 / 3, dtype=torch.float64)
    shares = gradients.cagrad(gram, weights, c=0.4, clip=True)
    assert (shares - weights).abs().max() > 1e-2  # not the plain sum
    for micro_batch in (4, 2, 1):  # one pass per dimension, two, one per example
        logged, change = step(f"raco-{micro_batch}", micro_batch, objective="raco")
        torch.testing.assert_close(flat(change), shares @ alone, rtol=1e-4, atol=1e-6)
        for name, share in zip(names, shares.tolist(), strict=True):
            assert logged[f"gradients/{name}/share"] == pytest.approx(share, rel=1e-4)
        cosine = gram[0, 1] / (gram[0, 0] * gram[1, 1]).sqrt()
        found = logged["gradients/helpfulness-honesty/cosine"]
        assert found == pytest.approx(cosine.item(), abs=1e-4)


@pytest.mark.parametrize("micro_batch", [4, 1])
def test_cosines_are_measured_beside_a_step(tmp_path, tiny_model, data, micro_batch, whole_step):
    """They change nothing, and are those of the criteria's shares of the loss."""
    block = {"weighting": "mean", "gradient_cosines": 2, "anchor": 0.5}
    changes = {"micro_batch_size": micro_batch, "gradient_accumulation_steps": 4 // micro_batch}
    measured = one_step(tmp_path / "measured", tiny_model, data, amopo=block, **changes)
    del block["gradient_cosines"]
    same_step(measured, one_step(tmp_path / "plain", tiny_model, data, amopo=block, **changes))

    cosine = "gradients/overall-honesty/cosine"
    assert cosine not in whole_step[0]
    changes = {"rl_beta": 0.2, "max_steps": 3, "micro_batch_size": 2, "learning_rate": 0.1}
    logs = []
    for name, rule in [("dpo", {"gradient_cosines": 2}), ("mgda", {"gradients": "mgda"})]:
        values = full(
            tmp_path, tiny_model, data, amopo={"objective": "dpo"} | rule,
            **(changes | {"output_dir": str(tmp_path / name)}),
        )  # fmt: skip
        trainer = runs.train(runs.write_config(tmp_path, values, f"{name}.yml"))
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    key = "gradients/helpfulness-honesty/cosine"
    # Before the first step, both are of the same model.
    assert logs[0][0][key] == pytest.approx(logs[1][0][key], abs=1e-4)
    assert [key in entry for entry in logs[0]] == [True, False, True]


def test_gradients_that_are_multiples_need_one_pass():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(2, 1, 2, 5, generator=generator)  # [B, K, N, T]
    shares = torch.tensor([[1.0, -2.0], [0.5, 0.0], [-3.0, 1.0]])  # [C, B]
    wanted = shares[:, :, None, None, None] * base
    for rows, count in ((wanted, 2), (wanted[:, :1], 1), (torch.randn(3, 2, 1, 2, 5), 3)):
        found = directions(rows)
        assert len(found) == count
        made = sum(share[:, None, None, None, None] * vector for vector, share in found)
        torch.testing.assert_close(made, rows)
    assert len(directions(torch.zeros(3, 1, 1, 2, 5))) == 1


def test_instruction_after_the_question(tokenizer, data):
    """The question is run once a pair, not once a prompt."""
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["prompt"] *= 10
    tokens = {}
    for place in ("before", "after"):
        block = {"dimensions": ["helpfulness", "honesty", "safety"], "instruction_place": place}
        made = data_format("rated", tokenizer, options={"scale": (1, 5)}, **block)
        prepared = made.wrap_dataset(Dataset.from_list(rows))
        tokens[place] = AMoPOCollator(tokenizer)(list(prepared))["input_ids"].numel()
    assert tokens["after"] < 0.7 * tokens["before"]


def test_accumulation_equals_one_batch(tmp_path, tiny_model, data, whole_step):
    halves = one_step(
        tmp_path / "halves",
        tiny_model,
        data,
        micro_batch_size=2,
        gradient_accumulation_steps=2,
        amopo={"weighting": "mean"},
    )
    same_step(whole_step, halves)


def test_uneven_accumulation_weighs_every_example_the_same(tmp_path, tiny_model, data):
    """Three micro batches of 3, 3 and 2 examples: the mean over eight, not of three means.

    With draws, which are the same for an example however it is batched.
    """
    sizes = {"micro_batch_size": 3, "gradient_accumulation_steps": 3}
    uneven = one_step(tmp_path / "uneven", tiny_model, data, **sizes)
    whole = one_step(tmp_path / "whole", tiny_model, data, micro_batch_size=8)
    same_step(whole, uneven)


def test_two_processes_equal_one(tmp_path, tiny_model, data, forks):
    """The second step has three rows, the evaluation five: each process's last batch is padded, and
    what pads it counts for nothing."""
    lines = data.read_text(encoding="utf-8").splitlines(keepends=True)
    for count in (7, 5):
        (tmp_path / f"{count}.jsonl").write_text("".join(lines[:count]), encoding="utf-8")
    held_out = {"path": str(tmp_path / "5.jsonl"), "type": "amopo.rated", "scale": [1, 5]}

    def settings(name, micro_batch_size):
        folder = tmp_path / name
        folder.mkdir()
        values = full(
            folder,
            tiny_model,
            tmp_path / "7.jsonl",
            max_steps=2,
            micro_batch_size=micro_batch_size,
            test_datasets=[held_out],
            val_set_size=None,
            eval_batch_size=2,
            eval_steps=2,
            dataloader_pin_memory=False,
            plugins=["parallel_worker.Recorder"],
        )
        return runs.write_config(folder, values)

    def outcome(name, history):
        entries = {
            f"{entry['step']} {key}": value
            for entry in history
            for key, value in entry.items()
            if key.removeprefix("eval_").startswith(("amopo/", "rewards/", "logps/", "loss"))
        }
        return entries, load_file(tmp_path / name / "out" / "model.safetensors")

    trainer = runs.train(settings("one", 4))
    config, folder = settings("two", 2), tmp_path / "two"
    forks(2, folder, "parallel_worker", "train", "ddp", str(config), str(folder))
    history = json.loads((folder / "0.json").read_text(encoding="utf-8"))["log"]
    one, weights = outcome("one", trainer.state.log_history)
    two, others = outcome("two", history)
    assert {"1 loss", "2 loss", "2 eval_loss", "2 eval_amopo/safety/margin"} <= set(one)
    assert two == pytest.approx(one, abs=2e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=1e-5, atol=1e-5)


def test_draws_depend_on_seed_step_and_example_alone():
    def normal(ids, seed=7, step=3, counts=None):
        counts = torch.ones_like(ids) if counts is None else counts
        return Draw(seed, step).normal(ids, counts, 4, 2)

    ids = torch.tensor([11, 22, 33])
    draws = normal(ids)
    assert draws.shape == (3, 4, 2)
    assert torch.equal(draws, normal(ids.flip(0)).flip(0))
    assert torch.equal(draws[1:2], normal(ids[1:2]))
    assert not any(torch.isclose(draws, o).any() for o in (normal(ids, 8), normal(ids, step=4)))
    assert not torch.isclose(draws[0], draws[1]).any()
    # Of examples with several comparisons, as many as they have, whatever stands beside them.
    several = normal(ids, counts=torch.tensor([1, 3, 2]))
    assert several.shape == (6, 4, 2)
    assert torch.equal(several[1:4], normal(ids[1:2], counts=torch.tensor([3])))
    assert not torch.isclose(several[1], several[2]).any()
    many = normal(torch.arange(2000))
    assert abs(many.mean()) < 0.05  # five times the deviation of the mean of 16,000
    assert abs(many.std() - 1) < 0.05


def test_same_seed_same_run(tmp_path, tiny_model, data):
    """Bit for bit; another seed draws other weights, though each step has all rows."""
    histories = []
    for name, seed in [("a", 7), ("b", 7), ("c", 8)]:
        folder = tmp_path / name
        folder.mkdir()
        values = full(folder, tiny_model, data, seed=seed, micro_batch_size=ROWS, num_epochs=3)
        trainer = runs.train(runs.write_config(folder, values))
        histories.append(
            [
                {k: v for k, v in entry.items() if k == "loss" or k.startswith("amopo/")}
                for entry in trainer.state.log_history
                if "loss" in entry
            ]
        )
    assert histories[0] == histories[1]
    weights = [[entry["amopo/helpfulness/weight"] for entry in one] for one in histories]
    # The tokens of an untrained model are improbable, so what is drawn moves little; rounding less.
    assert abs(weights[0][0] - weights[2][0]) > 1e-6
    # Gaussian weights differ from step to step and from the deterministic ones.
    assert len(set(weights[0])) == len(weights[0]) == 3


def evaluations(trainer, *batch_sizes):
    """What evaluations with these batch sizes say of each metric of the objective.

    Each at another step, which draws other weights in training.
    """
    found = []
    for size in batch_sizes:
        trainer.state.global_step += 1
        trainer.args.per_device_eval_batch_size = size
        assert trainer.get_eval_dataloader().total_batch_size == size
        found.append(trainer.evaluate())
    names = [name for name in found[0] if name.startswith(("eval_loss", "eval_amopo"))]
    return [{name: one[name] for name in names} for one in found], found[0]


def test_evaluation_is_deterministic_and_exact(tmp_path, tiny_model, data):
    """Evaluation takes the means, and averages over examples though the last batch is smaller."""
    values = full(
        tmp_path,
        tiny_model,
        data,
        test_datasets=[{"path": str(data), "type": "amopo.rated", "scale": [1, 5]}],
        eval_strategy="no",
        val_set_size=None,
        max_steps=1,
        learning_rate=0.0,
    )
    trainer = runs.train(runs.write_config(tmp_path, values))
    (first, again, whole), all_names = evaluations(trainer, 3, 3, 8)
    assert len(first) == 1 + 4 * 8
    assert first == again
    assert whole == pytest.approx(first, abs=1e-5)
    assert not any("ppl" in name for name in all_names)


def test_metrics_are_what_they_say(tmp_path, tiny_model, data):
    """The logged numbers, recomputed from plain forward passes of the untrained model."""
    from transformers import AutoModelForCausalLM

    values = full(
        tmp_path,
        tiny_model,
        data,
        max_steps=1,
        micro_batch_size=8,
        learning_rate=0.0,
        amopo={"weighting": "mean", "gamma": 0.5},
        rl_beta=1.5,
    )
    trainer = runs.train(runs.write_config(tmp_path, values))
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)

    def token_logps(prompt, response):
        with torch.no_grad():
            logps = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        return logps[len(prompt) - 1 : -1].gather(-1, torch.tensor(response)[:, None])[:, 0]

    losses, sums, longer = [], {}, []
    for example in map(Example.from_row, trainer.train_dataset):
        scores, pair_losses, wins = [], [], []
        (signs,) = example.signs
        for k, name in enumerate(trainer.amopo.criteria):
            sides = [
                token_logps(example.prompts[text], example.responses[response])
                for text, response in example.winner_first(0, k)
            ]
            margin = 1.5 * (sides[0].mean() - sides[1].mean())
            pair_losses.append(torch.log1p(torch.exp(0.5 - margin)))
            scores.append(sides[0].exp().mean() + sides[1].exp().mean())
            if signs[k]:
                if len(sides[0]) != len(sides[1]):
                    wins.append(float(margin * (len(sides[0]) - len(sides[1])) > 0))
                for metric, value in [
                    ("margin", margin),
                    ("accuracy", float(margin > 0)),
                    ("loss", pair_losses[-1]),
                    ("prob", scores[-1] / 2),
                ]:
                    sums.setdefault(f"amopo/{name}/{metric}", []).append(float(value))
        keep = torch.tensor(signs) != 0
        weights = torch.stack(scores).masked_fill(~keep, -torch.inf).softmax(-1)
        losses.append(float((weights * torch.stack(pair_losses)).sum()))
        if wins:
            longer.append(sum(wins) / len(wins))
        for k, name in enumerate(trainer.amopo.criteria):
            if keep[k]:
                sums.setdefault(f"amopo/{name}/weight", []).append(float(weights[k]))
    assert logged["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    assert any(len(values) < len(losses) for values in sums.values()), "no masked dimension here"
    for name, values in sums.items():
        assert logged[name] == pytest.approx(sum(values) / len(values), abs=1e-4), name
        if name.endswith("/weight"):
            spread = logged[f"{name}_std"]
            assert spread == pytest.approx(statistics.pstdev(values), abs=1e-4)
            assert spread > 1e-3
    assert 0 < sum(longer) < len(longer)
    assert logged["rewards/longer_wins"] == pytest.approx(sum(longer) / len(longer), abs=1e-4)


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """Four prompts, with two to four responses that are never equally good."""
    rows = [
        {
            "prompt": f"What is {i} and {i}?",
            "responses": [
                {
                    "text": f"It {'really ' * j}is {i + j}.",
                    "scores": {"helpfulness": 5 - j, "honesty": 1 + (i + j) % 3},
                }
                for j in range(count)
            ],
        }
        for i, count in enumerate((3, 2, 4, 3))
    ]
    return runs.write_jsonl(tmp_path_factory.mktemp("groups") / "groups.jsonl", rows)


def grouped(**block):
    block = {"dimensions": ["helpfulness", "honesty"], "winner": "per_dimension"} | block
    return block | {"group_by_prompt": True}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Prompts with a response alone, with two that tie, and with four: seven tokens or forty."""
    scores = {"helpfulness": 4, "honesty": 2}
    rows = [
        {
            "prompt": f"What is {i} and {i}?",
            "responses": [
                {"text": f"It {'really ' * (i * j)}is {i + j}.", "scores": scores | changes}
                for j, changes in enumerate(listed)
            ],
        }
        for i, listed in enumerate(
            [[{}], [{}, {}], [{"honesty": n} for n in (1, 2, 5, 3)], [{}, {"helpfulness": 1}]]
        )
    ]
    return runs.write_jsonl(tmp_path_factory.mktemp("answers") / "answers.jsonl", rows)


def test_ric_trains_on_every_response_by_its_tokens(tmp_path, tiny_model, answers):
    """The loss of supervised fine-tuning: a mean over the tokens of the optimizer step, however it
    is cut into micro batches."""
    from transformers import AutoModelForCausalLM

    block = {"objective": "ric", "dimensions": ["helpfulness", "honesty"], "winner": "overall"}
    values = full(tmp_path, tiny_model, answers, amopo=block, max_steps=1, learning_rate=0.1)
    values |= {"micro_batch_size": 1, "gradient_accumulation_steps": 4}
    trainer = runs.train(runs.write_config(tmp_path, values))
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)

    model, texts = AutoModelForCausalLM.from_pretrained(tiny_model), []
    total = tokens = 0
    for example in map(Example.from_row, trainer.train_dataset):
        (follows,) = example.follows
        for text, response in zip(follows, example.responses, strict=True):
            prompt = example.prompts[text]
            labels = torch.tensor([[-100] * len(prompt) + response])
            loss = model(torch.tensor([prompt + response]), labels=labels).loss
            total, tokens = total + loss * len(response), tokens + len(response)
            texts.append(trainer.processing_class.decode(prompt))
    assert len(texts) == 9
    assert sum("helpfulness, from 1 to 5: aim for 4" in text for text in texts) == 8
    (total / tokens).backward()
    assert logged["loss"] == pytest.approx(float(total / tokens), abs=1e-4)
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name, parameter in model.named_parameters():
        moved = parameter.detach() - 0.1 * parameter.grad
        torch.testing.assert_close(after[name], moved, rtol=1e-5, atol=1e-6)
    assert trainer.steering.one_prompt


def first_step(folder, model, data, micro_batch_size, **changes):
    """The trainer, the log of a step over all rows, and the rows as examples."""
    rows = len(data.read_text(encoding="utf-8").splitlines())
    sizes = {"micro_batch_size": micro_batch_size}
    sizes |= {"gradient_accumulation_steps": rows // micro_batch_size}
    values = runs.config(folder, model, data, max_steps=1, **sizes, **changes)
    trainer = runs.train(runs.write_config(folder, values))
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    return trainer, first, list(map(Example.from_row, trainer.train_dataset))


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_lists_begin_as_their_reference(micro_batch_size, tmp_path, tiny_model, groups):
    """log N for a list of N responses; the reference was taken in batches of other sizes."""
    block = {"objective": "lambda_dpo", "dimensions": ["helpfulness", "honesty"]}
    changes = {"amopo": block, "eval_batch_size": 2}
    _, first, examples = first_step(tmp_path, tiny_model, groups, micro_batch_size, **changes)
    counts = sorted(len(example.responses) for example in examples)
    assert counts == [2, 3, 3, 4]
    assert first["loss"] == pytest.approx(statistics.mean(map(math.log, counts)), abs=1e-6)


def test_weights_in_the_prompt_begin_as_their_reference(tmp_path, tiny_model, data):
    """log 2 of each dimension that tells the responses apart, by the weights in the prompts."""
    block = {"objective": "cos_dpo", "dimensions": ["helpfulness", "honesty"], "weight_draws": 3}
    changes = {"amopo": block, "eval_batch_size": 2} | runs.LORA
    trainer, first, examples = first_step(tmp_path, tiny_model, data, ROWS, **changes)
    shares = {
        one.id: sum(w for w, s in zip(one.weights, one.signs[0], strict=True) if s) / 3
        for one in examples
    }
    assert {len(one.follows) for one in examples} == {3} and 0 < min(shares.values()) < 1
    assert first["loss"] == pytest.approx(math.log(2) * statistics.mean(shares.values()), abs=1e-6)
    assert set(trainer.steering.weights({"honesty": 0.3}).values()) == {0.7, 0.3}
    assert "rewards/margins" in first and "amopo/honesty/margin" in first


def test_weights_of_rows_are_those_of_their_losses(tmp_path, tiny_model, data):
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    for i, row in enumerate(rows):
        row["importance"] = {"overall": 0, "helpfulness": i, "honesty": 8 - i, "safety": 0}
    values = full(
        tmp_path,
        tiny_model,
        runs.write_jsonl(tmp_path / "weighted.jsonl", rows),
        max_steps=1,
        micro_batch_size=8,
        amopo={"weighting": "static", "weights_per_row": True, "winner": "overall"},
    )
    values["datasets"][0]["fields"] = {"weights": "importance"}
    trainer = runs.train(runs.write_config(tmp_path, values))
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    kept = [row["weights"][1] for row in trainer.train_dataset]
    assert set(kept) <= {i / 8 for i in range(8)} and len(set(kept)) > 4
    assert logged["amopo/helpfulness/weight"] == pytest.approx(statistics.mean(kept), abs=1e-6)
    assert logged["amopo/helpfulness/weight_std"] == pytest.approx(
        statistics.pstdev(kept), abs=1e-6
    )
    assert logged["amopo/safety/weight"] == 0


def test_a_contrast_rewards_the_prompt_that_fits(tmp_path, tiny_model, data):
    """The logged term, from plain forward passes of the untrained model."""
    from transformers import AutoModelForCausalLM

    block = {"contrast": 2.0, "contrast_beta": 0.5, "weighting": "mean", "winner": "overall"}
    values = full(
        tmp_path, tiny_model, data, max_steps=1, micro_batch_size=8, learning_rate=0.0, amopo=block
    )
    trainer = runs.train(runs.write_config(tmp_path, values))
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    model, terms = AutoModelForCausalLM.from_pretrained(tiny_model), []
    for example in map(Example.from_row, trainer.train_dataset):
        losses = []
        for n, response in enumerate(example.responses):
            by_fit = sorted(
                (fits[n], -k) for k, fits in enumerate(example.fit) if not math.isnan(fits[n])
            )
            if by_fit[0][0] == by_fit[-1][0]:
                continue
            sums = []
            for _, k in (by_fit[-1], min(by_fit, key=lambda one: (one[0], -one[1]))):
                prompt = example.prompts[example.follows[-k][n]]
                labels = torch.tensor([[-100] * len(prompt) + response])
                with torch.no_grad():
                    loss = model(torch.tensor([prompt + response]), labels=labels).loss
                sums.append(-float(loss) * len(response))
            losses.append(math.log1p(math.exp(-0.5 * (sums[0] - sums[1]))))
        terms.append(2.0 * statistics.mean(losses) if losses else 0.0)
    assert any(terms)
    assert logged["terms/contrast"] == pytest.approx(statistics.mean(terms), abs=1e-4)


@pytest.fixture(scope="module")
def trainer_of_groups(tmp_path_factory, tiny_model, groups):
    """A trainer whose model is the untouched one."""
    folder = tmp_path_factory.mktemp("untouched")
    values = full(
        folder,
        tiny_model,
        groups,
        amopo=grouped(rating_in_prompt="none", weighting="mean"),
        test_datasets=[{"path": str(groups), "type": "amopo.rated", "scale": [1, 5]}],
        eval_strategy="no",
        val_set_size=None,
        max_steps=1,
        learning_rate=0.0,
    )
    return runs.train(runs.write_config(folder, values))


@pytest.mark.parametrize("asked", ["none", "own", "chosen"])
def test_a_group_is_the_mean_of_its_pairs(trainer_of_groups, tokenizer, groups, asked):
    """Loss, gradient and metrics; every prompt weighs the same, however many pairs it has."""
    trainer = trainer_of_groups
    model = trainer.accelerator.unwrap_model(trainer.model)
    lines = map(json.loads, groups.read_text(encoding="utf-8").splitlines())

    def rows_of(lines, **block):
        dimensions = [{"name": name, "scale": (1, 5)} for name in ("helpfulness", "honesty")]
        block = grouped(rating_in_prompt=asked, weighting="mean") | block
        made = data_format("rated", tokenizer, **block | {"dimensions": dimensions})
        return list(made.wrap_dataset(Dataset.from_list(lines)))

    def gradient_of(rows):
        model.zero_grad()
        batch = trainer._prepare_inputs(trainer.data_collator(rows))
        loss, values = trainer.compute_loss(model, batch, return_outputs=True)
        loss.backward()
        means = {name: float(value.nanmean()) for name, value in values.items()}
        return means, {name: p.grad.clone() for name, p in model.named_parameters()}

    lines = list(lines)
    logged, gradient = gradient_of(rows_of(lines))
    apart = [gradient_of(rows_of([line], group_by_prompt=False)) for line in lines]
    model.zero_grad()
    assert max(change.abs().max() for change in gradient.values()) > 1e-3
    for name, change in gradient.items():
        mean = sum(other[1][name] for other in apart) / len(apart)
        torch.testing.assert_close(change, mean, rtol=1e-4, atol=1e-5)
    for name in ("loss", "amopo/helpfulness/margin", "amopo/helpfulness/weight", "rewards/chosen"):
        mean = sum(other[0][name] for other in apart) / len(apart)
        assert logged[name] == pytest.approx(mean, abs=2e-5), name


def test_groups_and_accumulation(tmp_path, tiny_model, groups):
    """With draws, which depend on the example alone, and a different number of responses."""
    steps = [
        one_step(
            tmp_path / str(size),
            tiny_model,
            groups,
            micro_batch_size=size,
            gradient_accumulation_steps=4 // size,
            amopo=grouped(rating_in_prompt="none", **more),
        )
        for size, more in [(4, {}), (1, {"share_prompt": False})]
    ]
    same_step(*steps)


def test_evaluation_of_groups(trainer_of_groups):
    """Over examples, whatever the batches."""
    (one, three), _ = evaluations(trainer_of_groups, 1, 3)
    assert len(one) == 1 + 3 * 8
    assert three == pytest.approx(one, abs=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        runs.LORA | {"gradient_checkpointing": True},
        runs.LORA | {"bf16": True},
        {"bf16": True},
        runs.LORA | {"adapter": "qlora", "load_in_4bit": True, "bf16": True},
        runs.LORA | {"peft_use_dora": True},
        runs.LORA | {"lora_modules_to_save": ["lm_head", "embed_tokens"]},
    ],
    ids=lambda changes: (
        "-".join(
            str(v) if isinstance(v, str) else k
            for k, v in changes.items()
            if not k.startswith("lora_")
        )
        or "modules_to_save"
    ),
)
def test_every_way_learns(changes, tmp_path, tiny_model, data):
    """The loss falls within a few steps on eight pairs."""
    values = runs.config(
        tmp_path,
        tiny_model,
        data,
        amopo={"dimensions": ["helpfulness", "honesty"], "weighting": "mean"},
        max_steps=6,
        num_epochs=6,
        micro_batch_size=8,
        learning_rate=2e-2 if "adapter" in changes else 5e-3,
        **changes,
    )
    trainer = runs.train(runs.write_config(tmp_path, values))
    losses = runs.losses(trainer)
    assert losses[-1] < losses[0] - 0.02, losses


@pytest.mark.parametrize(
    ("block", "prompts"),
    [
        (
            {
                "rating_in_prompt": "own",
                "weighting": "static",
                "weights": {"overall": 2, "helpfulness": 1, "honesty": 1},
            },
            3,
        ),
        (
            {"rating_in_prompt": "none", "overall": False, "winner": "per_dimension"}
            | {"pairs": "best_worst", "gamma": 0.0},
            2,
        ),
        ({"weighting": "uniform", "instruction": "", "overall_instruction": ""}, 3),
    ],
    ids=["own ratings, static", "no overall, per dimension", "no instructions"],
)
def test_every_setting_trains(block, prompts, tmp_path, tiny_model, data):
    values = runs.config(tmp_path, tiny_model, data, max_steps=2)
    values["amopo"] |= block
    trainer = runs.train(runs.write_config(tmp_path, values))
    entry = trainer.state.log_history[0]
    weights = [entry[f"amopo/{name}/weight"] for name in trainer.amopo.criteria]
    assert len(weights) == prompts
    if block.get("weighting") == "static":
        assert weights == pytest.approx([0.5, 0.25, 0.25])
    if block.get("weighting") == "uniform":
        assert weights == pytest.approx([1 / 3] * 3, abs=1e-4)
        # Without instructions the prompts are one and the same, and so are their losses.
        losses = {entry[f"amopo/{name}/loss"] for name in trainer.amopo.criteria}
        assert len(losses) == 1


def test_settings_change_the_loss_and_are_logged_apart(tmp_path, tiny_model):
    """MaPPO in its form without a reference, whose gaps are known: 1 and a quarter."""
    row = {
        "prompt": "Why is the sky blue?",
        "responses": [
            {"text": "Air scatters blue light best.", "scores": {"help": 5, "truth": 4}},
            {"text": "No idea.", "scores": {"help": 1, "truth": 3}},
        ],
    }
    data = runs.write_jsonl(tmp_path / "data.jsonl", [row])
    dimensions = [{"name": name, "scale": [1, 5]} for name in ("help", "truth")]
    block = {"objective": "mappo", "form": "simpo", "gamma": 0.3, "dimensions": dimensions}
    block |= {"weights": {"help": 3, "truth": 1}, "anchor": 0.5, "scalarization": "worst"}
    values = runs.config(tmp_path, tiny_model, data, amopo=block, rl_beta=0.5, max_steps=2)
    trainer = runs.train(runs.write_config(tmp_path, values))
    entry = trainer.state.log_history[0]
    losses, weights = [], []
    for name, gap in (("help", 1.0), ("truth", 0.25)):
        chosen, rejected = (entry[f"amopo/{name}/reward_{side}"] for side in ("chosen", "rejected"))
        losses.append(math.log1p(math.exp(0.3 - chosen + gap * rejected)))
        weights.append(entry[f"amopo/{name}/weight"])
        assert entry[f"amopo/{name}/loss"] == pytest.approx(losses[-1], abs=1e-5)
    grown = [share * math.exp(loss) for share, loss in zip((0.75, 0.25), losses, strict=True)]
    assert weights == pytest.approx([part / sum(grown) for part in grown], abs=1e-5)
    assert entry["terms/anchor"] == pytest.approx(-0.5 * entry["logps/chosen"], abs=1e-5)
    expected = math.log(sum(grown)) + entry["terms/anchor"]
    assert entry["loss"] == pytest.approx(expected, abs=1e-4)
    assert runs.losses(trainer)[-1] < entry["loss"]
