"""axolotl's whole path on several processes equals one process: losses, metrics, weights.

On the CPU, through gloo: DDP, FSDP2 and DeepSpeed ZeRO, with two and with three processes. Every
run makes three optimizer steps. Neither the rows of the last one nor those of the evaluation fill
the processes' batches, and one dimension is rated in few rows, so that it is missing on some
process at every step.
"""

import json
from importlib.util import find_spec
from math import inf
from math import log as ln

import pytest
import runs
from safetensors.torch import load_file

STEPS, ROWS, EVAL_ROWS = 3, 16, 7
DIMENSIONS = ["helpfulness", "honesty", "safety"]
# The largest difference of a metric or weight. Runs in float32 are 1e-6 apart, in bfloat16 5e-3.
ROUNDING, HALF = 2e-5, 5e-2
METHODS = {
    "full": {},
    "bf16": {"bf16": True},
    "groups": {},  # all pairs of a prompt are one row
    "parts": {},  # one prompt at a time; in one process all together
    "reference": {},  # taken once, before the first step
    "adapter off": runs.LORA,  # is the reference
    "gradients": runs.LORA,  # of each dimension, solved for one step
    "cos_dpo": runs.LORA,  # its weights in the prompts, with the adapter off as reference
    "lambda_dpo": {},  # lists against a reference that was taken once, by one draw per step
    # Single responses, by the tokens of a whole step; at a rate at which it does not diverge.
    "ric": {"learning_rate": 0.01},
    "lora": runs.LORA,
    "dora": runs.LORA | {"peft_use_dora": True},
    "saved head": runs.LORA
    | {"lora_modules_to_save": ["embed_tokens", "lm_head"], "peft_use_rslora": True},
    # No evaluation: on a CPU, bitsandbytes repacks the weights there, for good.
    "qlora": runs.LORA
    | {"adapter": "qlora", "load_in_4bit": True, "test_datasets": None, "eval_steps": None},
}
# Those that train by another objective than AMoPO.
OBJECTIVES = {
    "reference": "dpo",
    "adapter off": "dpo",
    "gradients": "raco",
    "cos_dpo": "cos_dpo",
    "lambda_dpo": "lambda_dpo",
    "ric": "ric",
}
# The loss of every criterion in the first step of those that train against a reference: all
# rewards are zero there, in pairs and in lists of three.
FIRST_LOSS = dict.fromkeys(("reference", "adapter off", "gradients", "cos_dpo"), ln(2))
FIRST_LOSS |= {"lambda_dpo": ln(3)}
# Those that answer held-out prompts at each evaluation, an odd number of them.
SAMPLED, SAMPLES = (
    ("full", "parts", "adapter off"),
    {"generate_samples": 5, "sample_settings": ["none"]},
)
# All responses of a prompt are one row.
GROUPED = ("groups", "lambda_dpo", "ric")
# Processes: rows of a forward pass, passes of an optimizer step, what else.
SHAPES = {
    1: (3, 2, {}),
    2: (3, 1, {}),
    3: (1, 2, {"gradient_checkpointing": True}),
}
# Left out: what takes the same paths as another, and what can't be, see `config.devices`.
CASES = {
    ("ddp", 2): ("full", "bf16", "reference", "dora", "saved head", "qlora"),
    ("ddp", 3): (
        "full",
        "groups",
        "lora",
        "parts",
        "adapter off",
        "gradients",
        "cos_dpo",
        "lambda_dpo",
        "ric",
    ),
    ("fsdp2", 2): (
        "full",
        "bf16",
        "groups",
        "parts",
        "reference",
        "adapter off",
        "gradients",
        "dora",
        "qlora",
        "cos_dpo",
        "lambda_dpo",
        "ric",
    ),
    ("fsdp2", 3): ("full", "lora"),
    ("zero1", 2): ("dora", "saved head"),
    ("zero1", 3): ("full", "lora"),
    ("zero2", 2): (
        "full",
        "bf16",
        "parts",
        "reference",
        "adapter off",
        "dora",
        "saved head",
        "qlora",
        "lambda_dpo",
    ),
    ("zero2", 3): ("lora",),
    ("zero3", 2): (
        "full",
        "bf16",
        "groups",
        "parts",
        "reference",
        "adapter off",
        "saved head",
        "qlora",
        "cos_dpo",
        "ric",
    ),
    ("zero3", 3): ("full", "lora"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pairs of very different lengths, and safety rated in every fourth row."""
    folder = tmp_path_factory.mktemp("data")
    source = (runs.QUICKSTART / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in source[: ROWS + EVAL_ROWS]]
    for i, row in enumerate(rows):
        row["responses"][0]["text"] *= 1 + i % 4
        if i % 4 != 2:
            for response in row["responses"]:
                del response["scores"]["safety"]
    runs.write_jsonl(folder / "groups.jsonl", rows[:ROWS])
    rows = [row | {"responses": row["responses"][:2]} for row in rows]
    runs.write_jsonl(folder / "train.jsonl", rows[:ROWS])
    runs.write_jsonl(folder / "eval.jsonl", rows[ROWS:])
    return folder


@pytest.fixture(scope="module")
def train(tmp_path_factory, tiny_model, data, forks):
    """Trains, and returns the log history, the weights and each process's count of collectives."""
    prepared = tmp_path_factory.mktemp("prepared")

    def run(kind, world, method, fault=""):
        folder = tmp_path_factory.mktemp(f"{kind}-{world}")
        micro, passes, others = SHAPES[world]
        entry = {"type": "amopo.rated", "scale": [1, 5]}
        settings = {
            "amopo": {
                "dimensions": DIMENSIONS,
                "winner": "per_dimension",
                "missing_ratings": "mask",
                "group_by_prompt": method in GROUPED,
                "one_prompt_at_a_time": method == "parts",
                **(SAMPLES if method in SAMPLED else {}),
            },
            "generation_max_new_tokens": 8 if method in SAMPLED else None,
            "plugins": ["parallel_worker.Recorder"],
            "dataset_prepared_path": str(prepared),
            "test_datasets": [entry | {"path": str(data / "eval.jsonl")}],
            "val_set_size": None,
            "sequence_len": 1024,
            "eval_batch_size": 2,
            "eval_steps": STEPS,
            "max_steps": STEPS,
            "micro_batch_size": micro,
            "gradient_accumulation_steps": passes,
            # Close to SGD: Adam would make a whole step of a gradient that is rounding alone.
            "adam_epsilon": 1e-3,
            "learning_rate": 0.1,
            "max_grad_norm": 0.1,
        }
        settings |= others | strategy(kind, world, method, folder) | METHODS[method]
        if method in OBJECTIVES:
            settings["amopo"]["objective"] = OBJECTIVES[method]
        if method in FIRST_LOSS:  # per token, for sums of hundreds are rounded otherwise
            settings["amopo"]["length_normalised"] = True
        path = data / ("groups.jsonl" if method in GROUPED else "train.jsonl")
        values = runs.config(folder, tiny_model, path, **settings)
        config = runs.write_config(folder, values)
        forks(world, folder, "parallel_worker", "train", kind, str(config), str(folder), fault)
        reports = [
            json.loads((folder / f"{rank}.json").read_text(encoding="utf-8"))
            for rank in range(world)
        ]
        (weights,) = (folder / "out").glob("*.safetensors")
        log = reports[0]["log"]
        if method in SAMPLED:
            lines = (folder / "out" / "_amopo_samples.jsonl").read_text(encoding="utf-8")
            log += [json.loads(line) for line in lines.splitlines()]
        return log, load_file(weights), [r["collectives"] for r in reports]

    return run


def strategy(kind, world, method, folder):
    """axolotl's keys for a way of running on several processes."""
    if kind == "fsdp2":
        wrapped = {
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
            "state_dict_type": "FULL_STATE_DICT",
            "reshard_after_forward": True,
            # One process loads the weights, as axolotl has it for QLoRA.
            "cpu_ram_efficient_loading": method == "qlora",
        }
        return {"fsdp_version": 2, "fsdp_config": wrapped, "dp_shard_size": world}
    if kind.startswith("zero"):
        sizes = (
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
        )
        zero = {"stage": int(kind[-1]), "stage3_gather_16bit_weights_on_model_save": True}
        settings = {"zero_optimization": zero, "gradient_clipping": "auto"}
        settings |= {"bf16": {"enabled": "auto"}} | dict.fromkeys(sizes, "auto")
        path = folder / "deepspeed.json"
        path.write_text(json.dumps(settings), encoding="utf-8")
        return {"deepspeed": str(path)}
    return {}


@pytest.fixture(scope="module")
def alone(train):
    """What a method gives in one process.

    axolotl quantises by another way for FSDP2 than for one process, with other rounding; there,
    three processes stand in for one.
    """
    known = {}

    def get(kind, method):
        method = method.replace("parts", "full")
        where = (kind, 3) if (kind, method) == ("fsdp2", "qlora") else ("one", 1)
        if (*where, method) not in known:
            known[*where, method] = train(*where, method)
        return known[*where, method]

    return get


def differences(log, expected, tolerance):
    """Losses, metrics and samples of two log histories that differ, training and evaluation."""
    names = ("amopo/", "rewards/", "logps/", "loss", "grad_norm", "samples/none", "answer")
    both = [
        {
            f"{key}, step {entry['step']}, sample {entry.get('sample')}": value
            for entry in history
            for key, value in entry.items()
            if key.removeprefix("eval_").startswith(names)
        }
        for history in (log, expected)
    ]
    return {
        key: (both[0].get(key), both[1].get(key))
        for key in both[0].keys() | both[1].keys()
        if both[0].get(key, inf) != pytest.approx(both[1].get(key, -inf), abs=tolerance)
    }


def farthest(weights, others):
    """The largest difference of a weight."""
    return max((weights[name] - others[name]).abs().max().item() for name in others)


def apart(weights, others):
    """The norm of the difference of all weights."""
    return sum((weights[name] - others[name]).square().sum().item() for name in others) ** 0.5


@pytest.mark.parametrize(
    ("kind", "world", "method"), [(*group, method) for group in CASES for method in CASES[group]]
)
def test_equals_one_process(kind, world, method, train, alone, tiny_model):
    if kind.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed: pip install 'deepspeed>=0.18.6,<0.20'")
    log, weights, collectives = train(kind, world, method)
    expected_log, expected, _ = alone(kind, method)

    assert weights.keys() == expected.keys()
    wrong = differences(log, expected_log, HALF if method == "bf16" else ROUNDING)
    if method == "bf16" or method in FIRST_LOSS:  # a margin near zero may have either sign
        signs = ("accurac", "longer_wins")
        wrong = {k: v for k, v in wrong.items() if not any(sign in k for sign in signs)}
    if method == "bf16":
        moved = apart(expected, load_file(tiny_model / "model.safetensors"))
        # A hundredth of it where nothing is wrong.
        assert apart(weights, expected) < 0.05 * moved
    else:
        assert farthest(weights, expected) < ROUNDING
    assert not wrong
    if method in FIRST_LOSS:
        first = next(entry for entry in log if "loss" in entry)
        losses = [first[f"amopo/{name}/loss"] for name in DIMENSIONS]
        assert losses == pytest.approx([FIRST_LOSS[method]] * 3, abs=1e-6)
    # Whatever a process's rows, it took part in as many operations as the others.
    assert len(collectives[0]) >= STEPS and collectives[0][-1]
    assert all(counts == collectives[0] for counts in collectives)


@pytest.mark.parametrize("fault", ["padding", "draws"])
def test_a_planted_fault_is_found(fault, train, alone):
    """Rows that pad the last pass count, or each process has draws of its own.

    Of this model's tokens none is likely, so that draws are of little consequence."""
    log, weights, _ = train("ddp", 3, "full", fault)
    expected_log, expected, _ = alone("ddp", "full")
    assert differences(log, expected_log, 2 * ROUNDING)
    assert farthest(weights, expected) > 5 * ROUNDING
