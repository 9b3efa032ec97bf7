"""Everything a user can get wrong: the error's text names file, row and key, and says how to mend
it. To add a case, add a row to a table."""

import json

import pytest
import runs

from axolotl_amopo.errors import AMoPOError, ConfigError, DataError

GOOD = {
    "prompt": "How do I boil an egg?",
    "responses": [
        {"text": "Eight minutes in boiling water.", "scores": {"helpfulness": 5, "honesty": 4}},
        {"text": "Eggs are nice.", "scores": {"helpfulness": 2, "honesty": 5}},
    ],
}
PAIR = {
    "prompt": "Hi?",
    "chosen": {"response": "Hello there.", "helpfulness": "4", "honesty": "5"},
    "rejected": {"response": "No.", "helpfulness": "1", "honesty": "3"},
}
SINGLE = {"prompt": "Hi?", "response": "Hello there.", "helpfulness": "4", "honesty": 3}


def changed(row, *path, to=None, drop=False):
    """A copy of `row` with the value at `path` replaced or left out."""
    row = json.loads(json.dumps(row))
    holder = row
    for step in path[:-1]:
        holder = holder[step]
    if drop:
        del holder[path[-1]]
    else:
        holder[path[-1]] = to
    return row


# name: (type, the second row, parts of the error's text)
ROWS = {
    "missing prompt": ("rated", changed(GOOD, "prompt", drop=True), ["'prompt'", "missing"]),
    "prompt not text": ("pairs", changed(PAIR, "prompt", to=[]), ["'prompt'", "messages"]),
    "empty prompt": ("pairs", changed(PAIR, "prompt", to=" "), ["'prompt'", "empty"]),
    "missing responses": ("rated", changed(GOOD, "responses", drop=True), ["'responses'"]),
    "missing text": (
        "rated",
        changed(GOOD, "responses", 1, "text", drop=True),
        ["'responses[1].text'", "missing"],
    ),
    "empty response": (
        "rated",
        changed(GOOD, "responses", 0, "text", to=""),
        ["'responses[0].text'", "empty"],
    ),
    "missing scores": (
        "rated",
        changed(GOOD, "responses", 0, "scores", drop=True),
        ["'responses[0].scores'", "missing"],
    ),
    "missing rating": (
        "rated",
        changed(GOOD, "responses", 0, "scores", "honesty", drop=True),
        ["'responses[0].scores.honesty'", "missing", "missing_ratings"],
    ),
    "rating out of scale": (
        "rated",
        changed(GOOD, "responses", 0, "scores", "honesty", to=7),
        ["'responses[0].scores.honesty'", "7 is outside the scale 1 to 5", "[1, 7]"],
    ),
    "missing chosen": ("pairs", changed(PAIR, "chosen", drop=True), ["'chosen'", "missing"]),
    "missing response in a pair": (
        "pairs",
        changed(PAIR, "chosen", "response", drop=True),
        ["'chosen.response'", "missing"],
    ),
    "rating not a number": (
        "pairs",
        changed(PAIR, "chosen", "helpfulness", to="good"),
        ["'chosen.helpfulness'", "number", "'good'"],
    ),
    "rating not finite": (
        "pairs",
        changed(PAIR, "rejected", "honesty", to="nan"),
        ["'rejected.honesty'", "number"],
    ),
    "chosen equal to rejected": (
        "pairs",
        changed(PAIR, "rejected", "response", to="Hello there."),
        ["'rejected'", "same text"],
    ),
    "single response, empty": ("helpsteer", changed(SINGLE, "response", to=""), ["'response'"]),
    "single response, no rating": (
        "helpsteer",
        changed(SINGLE, "helpfulness", drop=True),
        ["'helpfulness'", "missing"],
    ),
    "end-of-sequence token in a response": (
        "rated",
        changed(GOOD, "responses", 0, "text", to="Boil it.<|im_end|> Or fry it."),
        ["end-of-sequence token <|im_end|>"],
    ),
}
FIRST = {"rated": GOOD, "pairs": PAIR, "helpsteer": SINGLE}


@pytest.mark.parametrize("name", ROWS)
def test_bad_row(name, tmp_path, tiny_model):
    kind, row, parts = ROWS[name]
    data = runs.write_jsonl(tmp_path / "data.jsonl", [FIRST[kind], row])
    entry = {"path": str(data), "type": f"amopo.{kind}", "scale": [1, 5]}
    path = runs.write_config(tmp_path, runs.config(tmp_path, tiny_model, data, datasets=[entry]))
    with pytest.raises(DataError) as error:
        runs.prepare(path)
    for part in [str(data), "row 2", *parts]:
        assert part in str(error.value)


@pytest.mark.parametrize("name", [name for name in ROWS if ROWS[name][0] != "helpsteer"])
def test_bad_row_dropped_and_counted(name, tmp_path, tiny_model, caplog):
    """`bad_rows: drop` goes on without the row, and says so."""
    kind, row, _ = ROWS[name]
    data = runs.write_jsonl(tmp_path / "data.jsonl", [FIRST[kind], row])
    values = runs.config(
        tmp_path,
        tiny_model,
        data,
        datasets=[{"path": str(data), "type": f"amopo.{kind}", "scale": [1, 5]}],
        amopo={"dimensions": ["helpfulness", "honesty"], "bad_rows": "drop"},
    )
    with caplog.at_level("INFO"):
        _, datasets = runs.prepare(runs.write_config(tmp_path, values))
    assert len(datasets.train_dataset) == 1
    assert "2 rows" in caplog.text
    assert "1 rows that can't be used" in caplog.text or "1 pairs that can't be" in caplog.text


# name: (the file's bytes, parts of the error's text)
FILES = {
    "empty file": (b"", ["is empty"]),
    "not UTF-8": (
        json.dumps(GOOD).encode() + b'\n{"prompt": "caf\xe9", "responses": []}\n',
        ["row 2", "not UTF-8", "0xe9"],
    ),
    "broken JSON": (json.dumps(GOOD).encode() + b'\n{"prompt": "x", "respo\n', ["row 2", "JSON"]),
    "not an object": (json.dumps(GOOD).encode() + b"\n[1, 2]\n", ["row 2", "object"]),
    "mixed kinds": (
        "\n".join(
            [json.dumps(GOOD), json.dumps(changed(GOOD, "responses", to="none, sorry"))]
        ).encode(),
        ["row 2", "'responses'", "list"],
    ),
    "one response everywhere": (
        json.dumps(GOOD | {"responses": GOOD["responses"][:1]}).encode(),
        ["no preference pair is left", "1 prompts with one response"],
    ),
    "all too long": (
        json.dumps(changed(GOOD, "responses", 0, "text", to="egg " * 2000)).encode(),
        ["no preference pair is left", "longer than sequence_len"],
    ),
    "all tie": (
        json.dumps(
            changed(GOOD, "responses", 1, "scores", to={"helpfulness": 4, "honesty": 5})
        ).encode(),
        ["no preference pair is left", "1 pairs whose responses tie"],
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_file(name, tmp_path, tiny_model):
    content, parts = FILES[name]
    data = tmp_path / "data.jsonl"
    data.write_bytes(content)
    path = runs.write_config(tmp_path, runs.config(tmp_path, tiny_model, data))
    with pytest.raises(AMoPOError) as error:
        runs.prepare(path)
    for part in [str(data), *parts]:
        assert part in str(error.value)


# name: (changes to the config, parts of the error's text)
CONFIGS = {
    "unknown key": ({"amopo": {"gama": 1}}, ["amopo.gama", "Did you mean 'gamma'?"]),
    "a field of the plugin's": ({"amopo": {"enabled": True}}, ["amopo.enabled", "remove it"]),
    "beta in the block": ({"amopo": {"beta": 1}}, ["amopo.beta", "rl_beta"]),
    "key outside the block": ({"weighting": "mean"}, ["weighting", "amopo: {weighting"]),
    "key with a prefix": ({"amopo_gamma": 1}, ["amopo_gamma", "amopo: {gamma"]),
    "not a block": ({"amopo": "yes"}, ["amopo", "block"]),
    "unknown choice": (
        {"amopo": {"weighting": "gausian"}},
        ["amopo.weighting", "'gausian'", "Did you mean 'gaussian'?"],
    ),
    "unknown last choice": (
        {"amopo": {"console": "of"}},
        ["amopo.console", "'of'", "Did you mean 'off'?"],
    ),
    "gamma out of bounds": ({"amopo": {"gamma": -1}}, ["amopo.gamma", "-1"]),
    "gamma not a number": ({"amopo": {"gamma": "two"}}, ["amopo.gamma", "'two'"]),
    "no dimensions": ({"amopo": {"dimensions": []}}, ["amopo.dimensions", "1 item"]),
    "dimension twice": ({"amopo": {"dimensions": ["a", "a"]}}, ["'a' is there twice"]),
    "dimension named overall": (
        {"amopo": {"dimensions": ["overall"]}},
        ["'overall' is there twice", "extra prompt"],
    ),
    "unknown key of a dimension": (
        {"amopo": {"dimensions": [{"name": "a", "scal": [1, 5]}]}},
        ["amopo.dimensions.0.scal", "Did you mean 'scale'?"],
    ),
    "scale upside down": (
        {"amopo": {"dimensions": [{"name": "a", "scale": [5, 1]}]}},
        ["amopo.dimensions.0.scale", "[lowest, highest]"],
    ),
    "unknown objective": (
        {"amopo": {"objective": "simp"}},
        ["amopo.objective", "'amopo', 'simpo'", "Did you mean 'simpo'?"],
    ),
    "key of another objective": (
        {"amopo": {"objective": "simpo", "weighting": "mean"}},
        ["amopo.weighting: belongs to objectives amopo, lambda_dpo; objective simpo has gamma"],
    ),
    "out of the bounds of another objective": (
        {"amopo": {"objective": "simpo", "gamma": -1}},
        ["amopo.gamma", "-1"],
    ),
    "static without weights": (
        {"amopo": {"weighting": "static"}},
        ["weights: are missing", "with weighting: static needs one per criterion: overall"],
    ),
    "weights without static": (
        {"amopo": {"weights": {"helpfulness": 1}}},
        ["weights: are not used", "with weighting: gaussian", "write weighting: static"],
    ),
    "weights for an objective that uses none": (
        {"amopo": {"objective": "simpo", "weights": {"helpfulness": 1}}},
        ["weights: are not used by objective simpo; remove them."],
    ),
    "a setting that the objective does not admit": (
        {"amopo": {"objective": "ric", "anchor": 0.1}},
        ["amopo.anchor: belongs to objectives amopo, simpo, dpo", "ric has no keys of its own"],
    ),
    "a value of another key": (
        {"amopo": {"weighting": "worst"}},
        ["amopo.weighting: 'worst' is not one of", "Did you mean scalarization: worst?"],
    ),
    "a setting's field without the setting": (
        {"amopo": {"objective": "simpo", "anchor_form": "sum"}},
        ["anchor_form: has no effect with anchor: 0"],
    ),
    "an anchor against a reference that is not there": (
        {"amopo": {"objective": "simpo", "anchor": 1, "anchor_form": "reference"}},
        ["anchor_form: reference is for objectives with a reference; write mean or sum"],
    ),
    "gradients with a term": (
        {"amopo": {"objective": "dpo", "gradients": "mgda", "anchor": 0.1}},
        ["anchor: does not go with gradients: mgda", "remove one of the two"],
    ),
    "weights of gradients that find their own": (
        {
            "amopo": {
                "objective": "dpo",
                "dimensions": ["a", "b"],
                "gradients": "mgda",
                "weights": {"a": 1, "b": 2},
            }
        },
        ["weights: have no effect with gradients: mgda"],
    ),
    "a field without effect": (
        {"amopo": {"objective": "mappo", "gamma": 2.0}},
        ["gamma: has no effect with form: dpo; remove it."],
    ),
    "static weights that are no choice with other fields": (
        {"amopo": {"objective": "lambda_dpo", "concentration": 2.0, "weights": {"a": 1}}},
        ["weights: are not used by objective lambda_dpo", "remove them."],
    ),
    "trained on what is no dimension": (
        {"amopo": {"objective": "modpo", "dimensions": ["honesty"], "train_on": "honest"}},
        ["train_on: 'honest' is not a dimension. Did you mean 'honesty'?"],
    ),
    "a weight that the loss divides by": (
        {
            "amopo": {
                "objective": "modpo",
                "dimensions": ["a", "b"],
                "weights": {"a": 0.01, "b": 0.99},
            }
        },
        ["weights: a, which train_on names, has a share of 0.01", "at least 0.05"],
    ),
    "what the trainer does not supply": (
        {"amopo": {"objective": "mrpo"}},
        ["amopo.reference: objective mrpo compares with two models; write [initial, PATH]"],
    ),
    "gradients per criterion under ZeRO": (
        {"amopo": {"objective": "raco"}, "deepspeed": {"zero_optimization": {"stage": 1}}},
        ["amopo.gradients: cagrad can't go with deepspeed", "take DDP or FSDP2"],
    ),
    "gradients per criterion with a router's loss": (
        {
            "amopo": {"objective": "raco"},
            "overrides_of_model_config": {"output_router_logits": True},
        },
        ["output_router_logits: true adds a loss", "amopo.gradients: cagrad would leave out"],
    ),
    "gradients per criterion of parts": (
        {"amopo": {"objective": "mgda", "one_prompt_at_a_time": True}},
        ["amopo.gradients: mgda can't go with amopo.one_prompt_at_a_time"],
    ),
    "a reference that nothing needs": (
        {"amopo": {"objective": "simpo", "reference": "initial"}},
        ["amopo.reference: initial can't go with objective simpo, which has no reference"],
    ),
    "no reference for an objective that needs one": (
        {"amopo": {"objective": "dpo", "reference": "none"}},
        ["amopo.reference: none can't go with objective dpo, which compares with a reference"],
    ),
    "a contrast of one prompt": (
        {"amopo": {"objective": "simpo", "contrast": 0.1}},
        ["contrast: needs two prompts that ask for different things", "write an instruction"],
    ),
    "a contrast of prompts that fit everything": (
        {"amopo": {"rating_in_prompt": "own", "contrast": 0.1}},
        ["contrast: has no effect with rating_in_prompt: own"],
    ),
    "a target that nobody is nearest to": (
        {"amopo": {"rating_in_prompt": "target"}},
        ["rating_in_prompt: target goes with winner: nearest alone"],
    ),
    "nearest to the chosen": (
        {"amopo": {"winner": "nearest", "rating_in_prompt": "chosen"}},
        ["winner: nearest does not go with rating_in_prompt: chosen; write target"],
    ),
    "nearest to what no prompt says": (
        {"amopo": {"objective": "simpo", "winner": "nearest"}},
        ["winner: nearest needs prompts that say which rating they ask for"],
    ),
    "nearest in an order": (
        {"amopo": {"winner": "nearest", "order_by": "mean"}},
        ["order_by: has no effect with winner: nearest"],
    ),
    "nearest where higher ratings are better": (
        {"amopo": {"winner": "nearest", "offset": 1.0}},
        ["winner: nearest does not go with objective amopo and its settings"],
    ),
    "weights per row that nothing reads": (
        {"amopo": {"weights_per_row": True}},
        ["weights_per_row: true is not used by objective amopo with weighting: gaussian"],
    ),
    "weights per row and for all": (
        {
            "amopo": {
                "weighting": "static",
                "weights_per_row": True,
                "weights": {"overall": 1, "helpfulness": 1, "honesty": 1},
            }
        },
        ["weights: have no effect with weights_per_row: true; remove one of the two"],
    ),
    "weights per row that the loss divides by": (
        {"amopo": {"objective": "modpo", "weights_per_row": True}},
        ["weights_per_row: true does not go with objective modpo", "the weight of train_on"],
    ),
    "weights per row of combined gradients": (
        {"amopo": {"objective": "raco", "weights_per_row": True}},
        ["weights_per_row: true does not go with gradients: cagrad"],
    ),
    "weights drawn for no prompt": (
        {"amopo": {"weight_draws": 3}},
        ["weight_draws: has no effect with objective amopo, which has no weights in its prompts"],
    ),
    "weights that the prompt does not show": (
        {"amopo": {"objective": "cos_dpo", "overall_instruction": "Be good."}},
        ["overall_instruction: does not show the weights", "{{ d.weight }}"],
    ),
    "weights in a prompt without any": (
        {"amopo": {"overall_instruction": "{% for d in dimensions %}{{ d.weight }}{% endfor %}"}},
        ["amopo.overall_instruction: is not a Jinja template that works"],
    ),
    "a criterion without a weight": (
        {"amopo": {"objective": "cos_dpo", "overall": True}},
        ["overall: true does not go with objective cos_dpo", "write false"],
    ),
    "a single response where responses are compared": (
        {"amopo": {"objective": "simpo", "single_responses": "keep"}},
        ["single_responses: keep does not go with objective simpo, which compares responses"],
    ),
    "pairs where whole groups are wanted": (
        {"amopo": {"objective": "ric", "pairs": 2}},
        ["pairs: 2 does not go with objective ric, which takes all responses of a prompt"],
    ),
    "a chosen response where none is": (
        {"amopo": {"objective": "ric", "rating_in_prompt": "chosen"}},
        ["rating_in_prompt: chosen does not go with objective ric", "write own or none"],
    ),
    "an instruction that no prompt has": (
        {"amopo": {"prompts": "one", "instruction": "Be good."}},
        ["instruction: has no effect with prompts: one; write overall_instruction"],
    ),
    "weights of other names": (
        {
            "amopo": {
                "dimensions": ["helpfulness"],
                "weighting": "static",
                "weights": {"overall": 1, "helpfullness": 1},
            }
        },
        ["weights must name every criterion", "overall, helpfulness", "helpfullness"],
    ),
    "instruction with an unknown variable": (
        {"amopo": {"instruction": "Be {{ dimensoin }}"}},
        ["amopo.instruction", "dimensoin", "dimension"],
    ),
    "instruction that is no template": (
        {"amopo": {"instruction": "{% if %}"}},
        ["amopo.instruction", "Jinja"],
    ),
    "rl_beta of 0": ({"rl_beta": 0}, ["rl_beta", "above 0"]),
    "rl_beta not a number": ({"rl_beta": "high"}, ["rl_beta", "'high'"]),
    "sample_packing": ({"sample_packing": True}, ["sample_packing", "set it to false"]),
    "train_on_inputs": ({"train_on_inputs": True}, ["train_on_inputs", "responses only"]),
    "reward_model": ({"reward_model": True}, ["reward_model", "without a reward model"]),
    "streaming": ({"streaming": True}, ["streaming"]),
    "trl block": ({"trl": {"beta": 0.1}}, ["trl", "other rl methods"]),
    "simpo_gamma": ({"simpo_gamma": 1.0}, ["simpo_gamma", "amopo.gamma"]),
    "context parallel": ({"context_parallel_size": 2}, ["context_parallel_size", "FSDP2"]),
    "context parallel, its old name": (
        {"sequence_parallel_degree": 2},
        ["sequence_parallel_degree: 2", "FSDP2"],
    ),
    "context parallel, its block": (
        {"context_parallel": {"size": 2}},
        ["context_parallel.size: 2", "FSDP2"],
    ),
    "batches dispatched by one process": (
        {"accelerator_config": {"dispatch_batches": True}},
        ["accelerator_config.dispatch_batches", "remove it"],
    ),
    "attention that takes no padding": (
        {"attn_implementation": "xformers"},
        ["attn_implementation: 'xformers'", "write sdpa"],
    ),
    "attention that takes no mask": (
        {"attn_implementation": "fp8"},
        ["attn_implementation: 'fp8'", "write sdpa"],
    ),
    "attention by its old flag": (
        {"xformers_attention": True},
        ["xformers_attention", "attn_implementation: sdpa"],
    ),
    "tiled MLP": ({"tiled_mlp": True}, ["tiled_mlp", "remove it", "gradients"]),
    "changed positions": ({"use_pose": True}, ["use_pose", "remove it"]),
    "distillation": ({"kd_trainer": True}, ["kd_trainer", "a trainer and a loss of its own"]),
    "an adapter with a trainer": ({"adapter": "mixlora"}, ["adapter: 'mixlora'", "write lora"]),
    "Liger's kernel for DPO": ({"dpo_use_liger_kernel": True}, ["dpo_use_liger_kernel", "rl: dpo"]),
    "a batch size to be found": (
        {"auto_find_batch_size": True},
        ["auto_find_batch_size", "set micro_batch_size; `axolotl amopo plan`"],
    ),
    "a default system message": (
        {"default_system_message": "Be kind."},
        ["default_system_message", "`system` field"],
    ),
    "the length of prompts alone": ({"max_prompt_len": 256}, ["max_prompt_len", "sequence_len"]),
    "metrics of completions": (
        {"eval_causal_lm_metrics": ["perplexity"]},
        ["eval_causal_lm_metrics", "per-dimension metrics"],
    ),
    "tokens of axolotl's table": (
        {"eval_max_new_tokens": 64},
        ["eval_max_new_tokens", "write amopo.generate_samples and generation_max_new_tokens"],
    ),
    "a number of samples alone": (
        {"num_generation_samples": 2},
        ["num_generation_samples: 2 has no effect", "write amopo.generate_samples: 2"],
    ),
    "two numbers of samples": (
        {"generate_samples": True, "amopo": {"generate_samples": 2}},
        ["amopo.generate_samples: 2", "true (3 samples)", "remove one of them"],
    ),
    "how samples are drawn, without any": (
        {"generation_top_p": 0.9},
        ["generation_top_p: has no effect without samples", "amopo.generate_samples: 3"],
    ),
    "settings of samples, without any": (
        {"amopo": {"sample_settings": ["none"]}},
        ["amopo.sample_settings: has no effect without samples"],
    ),
    "samples of nothing": (
        {"generate_samples": True, "num_generation_samples": 4},
        ["amopo.generate_samples: 4 needs prompts that are held out", "val_set_size"],
    ),
    "samples without evaluations": (
        {"amopo": {"generate_samples": 1}, "val_set_size": 0.5, "eval_strategy": "no"},
        ["amopo.generate_samples: 1 has no effect with eval_strategy: no"],
    ),
    "samples of parts of prompts": (
        {"amopo": {"generate_samples": 1}, "val_set_size": 0.5, "generation_prompt_ratio": 0.5},
        ["generation_prompt_ratio", "samples answer whole prompts"],
    ),
    "a draw that is forbidden": (
        {
            "amopo": {"generate_samples": 1},
            "val_set_size": 0.5,
            "generation_do_sample": False,
            "generation_temperature": 0.5,
        },
        ["generation_temperature: 0.5 has no effect with generation_do_sample: false"],
    ),
    "a draw without a temperature": (
        {
            "amopo": {"generate_samples": 1},
            "val_set_size": 0.5,
            "generation_top_k": 5,
            "generation_temperature": 0,
        },
        ["generation_temperature: 0 draws nothing"],
    ),
    "no tokens of samples": (
        {"amopo": {"generate_samples": 1}, "val_set_size": 1, "generation_max_new_tokens": 0},
        ["generation_max_new_tokens: must be a whole number above 0, got 0"],
    ),
    "misspelt key of axolotl's": (
        {"learning_rates": 1e-4},
        ["learning_rates", "Did you mean 'learning_rate'?"],
    ),
    "no datasets": ({"datasets": []}, ["datasets", "missing or empty"]),
    "datasets not a list": ({"datasets": {"path": "x"}}, ["datasets", "list"]),
}
# name: (changes to the dataset entry, parts of the error's text)
ENTRIES = {
    "unknown type": ({"type": "amopo.helpster"}, ["type", "Did you mean 'amopo.helpsteer'?"]),
    "a type of another method": ({"type": "chat_template"}, ["type", "amopo.pairs"]),
    "no type": ({"type": None}, ["type", "amopo.rated"]),
    "unknown key": ({"scales": [1, 5]}, ["datasets[0].scales", "Did you mean 'scale'?"]),
    "scale not numbers": ({"scale": "1 to 5"}, ["datasets[0].scale"]),
    "a key of another type": ({"field_human": "q"}, ["datasets[0].field_human", "`fields:`"]),
    "other roles": (
        {"roles_to_train": ["assistant", "user"]},
        ["datasets[0].roles_to_train: ['assistant', 'user']", "over the responses"],
    ),
    "turns that are left out": ({"message_field_training": "train"}, ["message_field_training"]),
    "parts that are left out": (
        {"message_field_training_detail": "train"},
        ["message_field_training_detail", "over all of each"],
    ),
    "without EOS": ({"train_on_eos": "none"}, ["train_on_eos: 'none'", "at its end included"]),
    "every end of a turn": ({"train_on_eot": "all"}, ["train_on_eot: 'all'"]),
    "no path": ({"path": None}, ["datasets[0].path", "missing"]),
    "no such file": ({"path": "nowhere/data.jsonl"}, ["datasets[0].path", "nowhere/data.jsonl"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_bad_config(name, tmp_path, tiny_model):
    changes, parts = CONFIGS[name]
    data = runs.write_jsonl(tmp_path / "data.jsonl", [GOOD])
    values = runs.config(tmp_path, tiny_model, data) | changes
    _refused(tmp_path, values, parts)


@pytest.mark.parametrize("name", ENTRIES)
def test_bad_entry(name, tmp_path, tiny_model):
    changes, parts = ENTRIES[name]
    data = runs.write_jsonl(tmp_path / "data.jsonl", [GOOD])
    values = runs.config(tmp_path, tiny_model, data)
    entry = values["datasets"][0] | changes
    values["datasets"] = [{k: v for k, v in entry.items() if v is not None}]
    _refused(tmp_path, values, parts)


def test_keys_of_an_entry_that_ask_for_what_is_done(tmp_path, tiny_model):
    data = runs.write_jsonl(tmp_path / "data.jsonl", [GOOD])
    values = runs.config(tmp_path, tiny_model, data)
    values["datasets"][0] |= {
        "roles_to_train": ["assistant"], "train_on_eos": "turn", "train_on_eot": "last",
    }  # fmt: skip
    assert runs.load(runs.write_config(tmp_path, values)).datasets


def _refused(folder, values, parts):
    """Refused while the config is loaded: before any data is read or model loaded."""
    with pytest.raises(ConfigError) as error:
        runs.load(runs.write_config(folder, values))
    for part in parts:
        assert part in str(error.value)


def test_key_twice_in_the_yaml(tmp_path, tiny_model):
    data = runs.write_jsonl(tmp_path / "data.jsonl", [GOOD])
    path = runs.write_config(tmp_path, runs.config(tmp_path, tiny_model, data))
    path.write_text(path.read_text() + "learning_rate: 1e-6\n")
    with pytest.raises(ConfigError, match=rf"{path}, line \d+: the key 'learning_rate' is there"):
        runs.load(path)


@pytest.mark.parametrize("dimension", ["helpfullness", "safety"])
def test_dimension_the_data_does_not_have(dimension, tmp_path, tiny_model):
    data = runs.write_jsonl(tmp_path / "data.jsonl", [GOOD])
    values = runs.config(tmp_path, tiny_model, data, amopo={"dimensions": [dimension]})
    with pytest.raises(DataError, match="there are helpfulness, honesty") as error:
        runs.prepare(runs.write_config(tmp_path, values))
    if dimension == "helpfullness":
        assert "Did you mean 'helpfulness'?" in str(error.value)

    values["amopo"]["missing_ratings"] = "mask"
    unrated = f"no row has a rating on the dimension '{dimension}'"
    with pytest.raises(DataError, match=unrated):
        runs.prepare(runs.write_config(tmp_path, values))
    values["datasets"] = [entry | {"scale": None} for entry in values["datasets"] * 2]
    with pytest.raises(DataError, match=f"{unrated} .*write {{name: {dimension}, scale: "):
        runs.prepare(runs.write_config(tmp_path, values))


def test_too_long_raises_with_the_row(tmp_path, tiny_model):
    long = changed(GOOD, "prompt", to="word " * 1000)
    data = runs.write_jsonl(tmp_path / "data.jsonl", [GOOD, long])
    values = runs.config(tmp_path, tiny_model, data, excess_length_strategy="raise")
    with pytest.raises(DataError, match=r"data.jsonl, row 2: a prompt of \d+ .* sequence_len, 512"):
        runs.prepare(runs.write_config(tmp_path, values))


def test_single_responses_error(tmp_path, tiny_model):
    rows = [GOOD, GOOD | {"responses": GOOD["responses"][:1]}]
    data = runs.write_jsonl(tmp_path / "data.jsonl", rows)
    block = {"dimensions": ["helpfulness"], "single_responses": "error"}
    values = runs.config(tmp_path, tiny_model, data, amopo=block)
    with pytest.raises(DataError, match="row 2: only one response"):
        runs.prepare(runs.write_config(tmp_path, values))


def test_no_chat_template(tmp_path, tiny_model, tokenizer):
    from transformers import AutoTokenizer

    bare = AutoTokenizer.from_pretrained(tiny_model)
    bare.chat_template = None
    bare.save_pretrained(tmp_path / "bare")
    data = runs.write_jsonl(tmp_path / "data.jsonl", [GOOD])
    values = runs.config(tmp_path, tiny_model, data, tokenizer_config=str(tmp_path / "bare"))
    with pytest.raises(AMoPOError, match=r"no chat template.*chat_template: chatml"):
        runs.prepare(runs.write_config(tmp_path, values))
    _, datasets = runs.prepare(runs.write_config(tmp_path, values | {"chat_template": "chatml"}))
    assert len(datasets.train_dataset) == 1


def test_template_that_refuses_a_conversation(tmp_path, tiny_model):
    row = {"system": "Be kind.", **GOOD}
    data = runs.write_jsonl(tmp_path / "data.jsonl", [row])
    strict = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    values = runs.config(tmp_path, tiny_model, data, chat_template="jinja")
    path = runs.write_config(tmp_path, values | {"chat_template_jinja": strict})
    with pytest.raises(DataError, match=r"row 1: the chat template refuses.*no system"):
        runs.prepare(path)


def test_whole_command_ends_with_the_sentence_and_a_code(tmp_path, tiny_model):
    data = runs.write_jsonl(tmp_path / "data.jsonl", [GOOD, ROWS["rating out of scale"][1]])
    path = runs.write_config(tmp_path, runs.config(tmp_path, tiny_model, data))
    done = runs.command("axolotl", "train", str(path), cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert f"{data}, row 2, key 'responses[0].scores.honesty': 7 is outside" in done.stderr
    assert not (tmp_path / "out" / "adapter_config.json").exists()
