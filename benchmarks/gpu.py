"""`axolotl train` on one GPU, each way in turn: losses, speed, and memory against the plan's.

    python benchmarks/gpu.py [--model NAME] [--cases ...] [--sequence-len 1024] [--steps 6]
        [--output FOLDER]
    python benchmarks/gpu.py --dry-run      # anywhere: a tiny model of the same family

It is the second part of what a GPU is asked; `gpu_model.py` is the first, which needs no axolotl.

The model has the shape of a public one (their names are in `axolotl_amopo/commands/plan/models.py`)
and random weights, so nothing is downloaded: memory and speed don't depend on what the weights say.
Its pairs are made up, all as long as `sequence_len` lets through, for that is what a plan's memory
is of.

    lora        bf16, every linear layer adapted, none of axolotl's fused kernels
    kernels     the same with the fused LoRA kernels and Liger's norms
    unchecked   `lora` without gradient checkpointing
    qlora       4-bit weights (bitsandbytes)
    full        every weight is trained, in bf16
    fsdp2       `full` through FSDP2's code, on one process
    zero3       `full` through DeepSpeed ZeRO-3's code, on one process (needs deepspeed)

Each case is one `axolotl train` command that ends with a saved model. `allocated` is the most that
torch's allocator gave out in a step from the second on, as axolotl logs it; `plan` is what
`axolotl amopo plan` says without its reserve for CUDA's context and fragmentation. `loss diff` is
the largest relative difference of a step's loss from the case that it should equal. A case is
`good` if it trained and saved, its losses are within 2 percent of that case's, and its plan within
10 percent of the allocator; the plan doesn't know the savings of kernels, and may say more there.
The command ends with 1 if a case is not.

In a dry run the tables have plans for an H100; the cases that need no GPU are trained on the CPU.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import axolotl
import torch
import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from axolotl_amopo.commands.plan.cards import GIB
from axolotl_amopo.commands.plan.estimate import SHORTEST_PROMPT, Plan
from axolotl_amopo.commands.plan.load import plan_config
from axolotl_amopo.commands.plan.models import KNOWN

OUTPUT = Path(__file__).parents[1] / "build" / "benchmarks"  # git ignores build/
DIMENSIONS = ["helpfulness", "correctness", "safety"]
WORDS = ["the", "a", "so", "is", "it", "we", "you", "red", "old", "can", "may", "on", "of", "to"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

BASE = {
    "rl": "amopo",
    # Short ones, so that prompts are as short as in the pairs that the plan has in mind.
    "amopo": {
        "dimensions": DIMENSIONS,
        "instruction": "{{ dimension }} {{ rating }}",
        "overall_instruction": "best of all",
    },
    "dataset_num_proc": 1,
    "excess_length_strategy": "raise",
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_epochs": 1,
    "optimizer": "adamw_torch_fused",
    "lr_scheduler": "constant",
    "learning_rate": 1.0e-5,
    "bf16": True,
    "attn_implementation": "sdpa",
    "gradient_checkpointing": True,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_only_model": True,
    "seed": 7,
}
PLAIN = dict.fromkeys(["lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"], False)
LORA = {
    "adapter": "lora",
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "lora_target_linear": True,
}
FUSED = dict.fromkeys(PLAIN, True) | {
    "plugins": ["axolotl.integrations.liger.LigerPlugin"],
    "liger_rms_norm": True,
}
ZERO3 = {
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    "bf16": {"enabled": True},
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
}
CASES: dict[str, dict[str, Any]] = {
    "lora": LORA | PLAIN,
    "kernels": LORA | FUSED,
    "unchecked": LORA | PLAIN | {"gradient_checkpointing": False},
    "qlora": LORA | PLAIN | {"adapter": "qlora", "load_in_4bit": True},
    "full": {},
    "fsdp2": {
        "fsdp_version": 2,
        "fsdp_config": {"reshard_after_forward": True, "state_dict_type": "FULL_STATE_DICT"},
    },
    "zero3": {"deepspeed": ZERO3},
}
EQUAL = {"kernels": "lora", "unchecked": "lora", "fsdp2": "full", "zero3": "full"}
SHARDED = {"fsdp2", "zero3"}
ON_CPU = {"lora", "unchecked", "full"}
SAVED = ("*.safetensors", "checkpoint-*/*.safetensors")


def make_model(folder: Path, name: str, tiny: bool) -> None:
    """A model of a public one's shape, with random weights and a tokenizer of our own."""
    shape = KNOWN[name]
    if tiny:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        sizes["vocab_size"] = 2000  # of the tokenizer below
        shape = shape | sizes | {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        config = AutoConfig.for_model(**shape)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    frame = ["user\n", "assistant\n", BASE["amopo"]["overall_instruction"]]
    bpe.train_from_iterator([*frame, *[" ".join(["so", *WORDS, *DIMENSIONS])] * 9], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
    )
    tokenizer.save_pretrained(folder)


def make_rows(path: Path, tokenizer: PreTrainedTokenizerFast, length: int, rows: int) -> None:
    """Pairs of which each prompt has about `SHORTEST_PROMPT` tokens, and each response the rest."""
    rng = random.Random(0)
    scores = [dict.fromkeys(DIMENSIONS, score) for score in (4, 1)]

    def words(count: int) -> str:
        return " ".join(["so", *rng.choices(WORDS, k=count - 1)])  # of one token each

    def around(instruction: str) -> int:
        turn = [{"role": "user", "content": f"{instruction}\n\n"}]
        ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        return len(ids)

    frame = max(map(around, [BASE["amopo"]["overall_instruction"], *DIMENSIONS])) + 1  # the rating
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            texts = [words(length - SHORTEST_PROMPT - 2) for _ in scores]  # and what ends them
            responses = [
                {"text": text, "scores": score} for text, score in zip(texts, scores, strict=True)
            ]
            row = {"prompt": words(SHORTEST_PROMPT - frame), "responses": responses}
            file.write(json.dumps(row) + "\n")


class Runner:
    """Writes, plans and trains the cases of one model."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder = args, folder
        model, data = folder / "model", folder / "rows.jsonl"
        make_model(model, args.model, args.dry_run)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
        make_rows(data, tokenizer, args.sequence_len, args.steps)
        self.base = BASE | {
            "base_model": str(model),
            "datasets": [{"path": str(data), "type": "amopo.rated", "scale": [0, 4]}],
            "dataset_prepared_path": str(folder / "prepared"),
            "sequence_len": args.sequence_len,
            "max_steps": args.steps,
            "save_steps": args.steps,
        }

    def run(self, name: str) -> dict[str, Any]:
        """Figures of a case."""
        path, output = self.folder / f"{name}.yml", self.folder / f"{name}-out"
        values = self.base | CASES[name] | {"output_dir": str(output)}
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        plan = self.plan(path)
        result: dict[str, Any] = {
            "plan_gib": (plan.total - plan.memory["reserve"]) / GIB,
            "plan": plan.to_json(),
        }
        if self.args.dry_run and name not in ON_CPU:
            return result | {"skipped": "needs a GPU"}
        if name == "zero3" and not find_spec("deepspeed"):
            return result | {"skipped": "deepspeed is not installed"}
        command = ["axolotl", "train", str(path)]
        if name in SHARDED:
            command += ["--launcher", "torchrun", "--", "--nproc_per_node", "1"]
        log = self.args.output / f"gpu-{name}.log"
        with log.open("w", encoding="utf-8") as file:
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            return result | {"failed": f"exit {done.returncode}, see {log}"}
        if not any(found for pattern in SAVED for found in output.glob(pattern)):
            return result | {"failed": "saved no weights"}
        (state,) = output.glob("checkpoint-*/trainer_state.json")
        history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
        shutil.rmtree(output)
        return result | self.figures(history, plan)

    def plan(self, path: Path) -> Plan:
        card: dict[str, Any] = {"gpu": "h100-80gb"}
        if not self.args.dry_run:
            card = {
                "gpu": torch.cuda.get_device_name(),
                "gpu_memory": torch.cuda.get_device_properties(0).total_memory / GIB,
                "gpu_tflops": 1.0,  # no time is asked for
            }
        responses = self.args.sequence_len - SHORTEST_PROMPT
        shape = {"prompt_tokens": SHORTEST_PROMPT, "response_tokens": responses}
        return plan_config(str(path), **card, **shape)[0]

    def figures(self, history: list[dict[str, Any]], plan: Plan) -> dict[str, Any]:
        steps = [entry for entry in history if "loss" in entry]
        if len(steps) != self.args.steps or any(s["loss"] != s["loss"] for s in steps):
            return {"failed": f"losses {[entry['loss'] for entry in steps]}"}
        # The first step's peak is that of loading, and its time that of compiling.
        peak = max(entry.get("memory/max_allocated (GiB)", 0.0) for entry in steps[1:])
        return {
            "losses": [entry["loss"] for entry in steps],
            "allocated_gib": peak or None,
            "plan_ratio": (plan.total - plan.memory["reserve"]) / GIB / peak if peak else None,
        }


def judge(results: dict[str, dict[str, Any]]) -> None:
    """Adds each case's difference from the one that it should equal, and whether it is good."""
    for name, result in results.items():
        other = results.get(EQUAL.get(name, ""), {})
        if "losses" in result and "losses" in other:
            both = zip(result["losses"], other["losses"], strict=True)
            result["loss_difference"] = max(abs(a - b) / abs(b) for a, b in both)
        if "skipped" not in result:
            ratio = result.get("plan_ratio") or 1.0
            result["good"] = (
                "losses" in result
                and result.get("loss_difference", 0.0) < 0.02
                and (0.9 < ratio < 1.1 or (name == "kernels" and ratio > 0.9))
            )


def table(results: dict[str, dict[str, Any]]) -> Table:
    made = Table("", box=box.MARKDOWN)
    for heading in ("plan GiB", "allocated GiB", "plan / allocated", "first and last loss"):
        made.add_column(heading, justify="right", no_wrap=True)
    made.add_column("loss diff", justify="right")
    made.add_column("good")

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    for name, result in results.items():
        losses = result.get("losses")
        made.add_row(
            name,
            number(result["plan_gib"], ".2f"),
            number(result.get("allocated_gib"), ".2f"),
            number(result.get("plan_ratio"), ".2f"),
            f"{losses[0]:.4f}, {losses[-1]:.4f}" if losses else "-",
            number(result.get("loss_difference"), ".1e"),
            result.get("failed") or result.get("skipped") or ("yes" if result["good"] else "NO"),
        )
    return made


def header(args: argparse.Namespace) -> dict[str, Any]:
    versions = {module.__name__: module.__version__ for module in (axolotl, torch)}
    return {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "command": " ".join(["python", *sys.argv]),
        "gpu": "none: a dry run" if args.dry_run else torch.cuda.get_device_name(),
        "model": f"{args.model}'s family, tiny" if args.dry_run else f"{args.model}, random",
        "tokens": f"{args.sequence_len} a sequence, one pair under 4 prompts a step",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=KNOWN, default="Qwen/Qwen2.5-1.5B-Instruct", metavar="NAME")
    add("--cases", nargs="+", choices=CASES, default=[*CASES])
    add("--sequence-len", type=int, default=1024)
    add("--steps", type=int, default=6)
    add("--dry-run", action="store_true")
    add("--output", type=Path, default=OUTPUT)
    add("--force", action="store_true", help="overwrite the results in --output")
    args = parser.parse_args()
    if not (args.dry_run or torch.cuda.is_available()):
        parser.error("there is no GPU here; --dry-run shows what would run")
    if args.sequence_len < 2 * SHORTEST_PROMPT or args.steps < 2:
        parser.error(f"--sequence-len {2 * SHORTEST_PROMPT} and --steps 2 are the least")
    if not args.force and any((args.output / f"gpu.{end}").exists() for end in ("json", "md")):
        parser.error(f"{args.output} holds results; name another --output, or --force")
    return args


def main() -> None:
    args = parse()
    args.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    # Not a random name: axolotl takes a model with "mpt" in its path for one of MPT's.
    folder = args.output / "gpu-work"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        runner = Runner(args, folder)
        for name in args.cases:
            print(f"{name} ...", file=sys.stderr, flush=True)
            results[name] = runner.run(name)
            judge(results)
            # After every case, so that a run that is cut short leaves what it has.
            write(args, results)
    finally:
        shutil.rmtree(folder)
    if not all(result.get("good", True) for result in results.values()):
        sys.exit(1)


def write(args: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    facts = header(args)
    report = json.dumps({"header": facts, "cases": results}, indent=1)
    (args.output / "gpu.json").write_text(report + "\n", encoding="utf-8")
    last = len(results) == len(args.cases)
    console = Console(record=True, width=150, quiet=not last)
    console.print("# Training on a GPU\n", highlight=False)
    for name, value in facts.items():
        console.print(f"- {name}: {value}", highlight=False, soft_wrap=True)
    console.print("\nRows and columns are explained at the top of `benchmarks/gpu.py`.")
    console.print(table(results), highlight=False)
    lines = console.export_text().splitlines()
    (args.output / "gpu.md").write_text("".join(f"{line.rstrip()}\n" for line in lines))


if __name__ == "__main__":
    main()
