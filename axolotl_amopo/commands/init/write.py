"""What was found in a dataset -> the text of its YAML, for the memory that is there."""

import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from axolotl_amopo.commands.init.look import Look
from axolotl_amopo.commands.plan.cards import GIB, find_card
from axolotl_amopo.data.detect import FILL_IN
from axolotl_amopo.errors import AMoPOError, is_line, visible

# The first that fits the GPU, with LoRA or else QLoRA; and one that trains on a CPU.
MODELS = ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct")
MODEL_ON_CPU = "HuggingFaceTB/SmolLM2-135M-Instruct"
LONGEST = 8192
# From this share of pairs on, two dimensions ask for opposite answers.
OPPOSED = 0.5
# TFLOP/s of a card that is not in the table; of a plan's memory it changes nothing.
ANY_SPEED = 100.0


@dataclass(frozen=True)
class Training:
    """How a model is trained, and why so."""

    model: str
    adapter: str  # lora or qlora
    gpu: bool
    why: str


def sequence_len(found: Look, objective: str) -> int:
    """Return a round number of tokens that 99 of 100 prompts with an answer stay below."""
    instruction = 25 * (2 + len(found.dimensions)) if objective == "amopo" else 0
    needed = found.tokens.get("99%", 1024) + instruction + 32  # for the chat template
    return next((n for n in (512, 1024, 2048, 4096) if n >= needed), LONGEST)


def objective(found: Look) -> tuple[str, str]:
    """Return the objective that goes with the data, and why in a sentence or two."""
    count = len(found.dimensions)
    if count == 1:
        return "simpo", (
            f"The only dimension is {found.dimensions[0].name}, so there is nothing to weigh: "
            "SimPO needs no reference model; dpo, with one, stays nearer to the model as it is."
        )
    why = (
        f"Each response has {count} ratings: AMoPO sees a pair under a prompt per dimension and "
        "one for all, and the trained model can be asked for any of them."
    )
    if found.conflicts and found.conflicts[0][2] >= OPPOSED:
        first, second, share = found.conflicts[0]
        why += (
            f" {first} and {second} want opposite answers ({share:.0%} of pairs), so no answer is "
            "best in both: cos_dpo trains one model for every compromise."
        )
    return "amopo", why


def choose_training(found: Look, model: str | None, gpu: str | None) -> Training:
    """Return the model, and LoRA or else QLoRA, by what `axolotl amopo plan` says fits.

    A model whose config can't be read is not planned, and `why` says so.

    Args:
        gpu: a card's name, or cpu; by default what this machine has.

    Raises:
        AMoPOError: for a card that is unknown.
    """
    import torch

    options: dict[str, Any] = {"gpu": gpu}
    if gpu not in (None, "cpu"):
        find_card(gpu)  # what is wrong with it is not the model's fault
    if gpu is None and torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        gpu, options = card.name, {"gpu_memory": card.total_memory / GIB, "gpu_tflops": ANY_SPEED}
    if gpu in (None, "cpu"):
        return Training(model or MODEL_ON_CPU, "lora", False, "no GPU: LoRA in float32")
    from axolotl_amopo.commands.plan.load import plan_config

    for name in (model,) if model else MODELS:
        for adapter in ("lora", "qlora"):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "config.yml"
                text = config_text(found, Training(name, adapter, True, ""))
                path.write_text(text, encoding="utf-8")
                try:
                    plan, _ = plan_config(str(path), with_advice=False, **options)
                except AMoPOError as error:
                    why = f"not planned, since {error}"
                    return Training(name, "qlora", True, " ".join(why.split()))
            memory = f"{plan.total / GIB:.1f} of {plan.card.bytes / GIB:.1f} GiB on {gpu}"
            if plan.fits:
                return Training(name, adapter, True, f"{memory}, by axolotl amopo plan")
    return Training(name, "qlora", True, f"does not fit: {memory}, by axolotl amopo plan")


def config_text(found: Look, training: Training) -> str:
    """Return the YAML, with comments that say why and what to look at."""
    kind, why = objective(found) if found.dimensions else ("amopo", "")
    length = sequence_len(found, kind)
    lines = [
        *_comment(f"Written by `axolotl amopo init {found.path}`."),
        *_comment(f"{found.fit}; {found.rows} rows in all, {found.prompts or '?'} prompts."),
        *(line for item in found.runners_up for line in _comment(f"Or: {item}.")),
        *(line for item in found.fit.fill_in for line in _comment(f"{FILL_IN} {item}.")),
    ]
    if found.fit.fill_in:
        lines += ["# Fields of the first row:"]
        lines += [line for item in found.sample for line in _comment(item)]
    lines += ["", f"base_model: {flow(training.model)}", "", "rl: amopo"]
    lines += [*_comment(why), "amopo:", f"  objective: {kind}"] if why else ["amopo:"]
    if found.winner == "per_dimension":
        text = f"In {found.disagree:.0%} of the pairs, dimensions name different winners:"
        lines += _comment(text, "  ")
        shown = [item for item in found.conflicts if item[2] > 0][:3]
        for a, b, share in shown:
            lines += _comment(f"{a} and {b} in {share:.0%}", "  ")
        lines += ["  winner: per_dimension  # or overall: by the mean of the ratings"]
    if found.scattered:
        lines += ["  group_by_prompt: true  # so that val_set_size splits prompts, not pairs"]
    if found.missing:
        lines += [f"  missing_ratings: mask  # {found.missing} ratings are missing"]
    if found.bad:
        lines += [*_comment(f"{found.bad} rows can't be used. {found.bad_row}", "  ")]
        lines += ["  bad_rows: drop"]
    guessed = any(not dimension.known for dimension in found.dimensions)
    note = "  # scales as far as the data goes; write those that raters had" if guessed else ""
    lines += [f"  dimensions:{note}", *_dimensions(found)]
    entry = {"path": found.path, "name": found.name, "split": found.split, "type": found.fit.type}
    lines += ["", *_entries("datasets", entry | found.fit.options)]
    lines += _held_out(found, entry)
    lines += [
        "dataset_prepared_path: last_run_prepared",
        f"output_dir: {flow(f'outputs/{Path(found.path).stem}')}",
        "",
        *_comment(
            f"A prompt with its longest response has {found.tokens['50%']} tokens at the median, "
            f"{found.tokens['99%']} at 99 %, {found.tokens['longest']} at most ({found.counted}), "
            "the instruction not counted. Longer pairs are dropped; inspect counts them."
            if found.tokens
            else "Unknown as long as there is something to fill in."
        ),
        f"sequence_len: {length}",
        "excess_length_strategy: drop",
        "",
        *_comment(f"{training.adapter}: {training.why}"),
        f"adapter: {training.adapter}",
        *(["load_in_4bit: true"] if training.adapter == "qlora" else []),
        "lora_r: 32",
        "lora_alpha: 64",
        "lora_dropout: 0.0",
        "lora_target_linear: true",
        "",
        "micro_batch_size: 1  # pairs, each under every prompt",
        # A CPU takes minutes for a step of 16.
        f"gradient_accumulation_steps: {16 if training.gpu else 4}",
        "num_epochs: 1",
        "learning_rate: 5.0e-6  # tune this first: too high a rate collapses the model",
        f"optimizer: {'paged_adamw_8bit' if training.adapter == 'qlora' else 'adamw_torch'}",
        "lr_scheduler: cosine",
        "warmup_ratio: 0.1",
        "bf16: auto  # fp16 on a GPU without bf16, such as a T4",
        # Short sequences need not save memory on a CPU, and would pay with time.
        f"gradient_checkpointing: {flow(training.gpu or length > 512)}",
        "attn_implementation: sdpa",
        "logging_steps: 1",
        *_evaluation(found),
        "seed: 42",
    ]
    return "\n".join(lines) + "\n"


def _dimensions(found: Look) -> list[str]:
    lines = [f"    - {FILL_IN}"] if not found.dimensions else []
    for dimension in found.dimensions:
        item: dict[str, Any] = {"name": dimension.name}
        notes = [f"{dimension.span[0]:g} to {dimension.span[1]:g} in the data"]
        if not dimension.known:
            item["scale"] = [_number(end) for end in dimension.scale]
        if dimension.lower:
            item["direction"] = "lower"
            notes.append("lower is better, by its name" if dimension.by_name else "lower is better")
        lines.append(f"    - {flow(item)}  # {'; '.join(notes)}")
    if found.constant:
        lines += _comment(f"All ratings are equal: {', '.join(found.constant)}.", "    ")
    return lines


def _held_out(found: Look, entry: dict[str, Any]) -> list[str]:
    if found.scattered:
        return ["val_set_size: 0.1"]
    if not found.held_out:
        return ["val_set_size: 0  # too few prompts to hold some out"]
    shared = found.shared_prompts
    note = _comment(
        f"{shared} of these prompts are trained on too: the rows of a prompt are not beside each "
        "other."
        if shared
        else "Other prompts than those that are trained on."
    )
    if "[" not in found.held_out:
        note = []
    test = entry | {"split": found.held_out} | found.fit.options
    return [*note, *_entries("test_datasets", test)]


def _evaluation(found: Look) -> list[str]:
    # Without it axolotl never evaluates, whatever is held out.
    held_out = found.scattered or found.held_out
    return ["eval_strategy: epoch  # and before the first step"] if held_out else []


def _entries(section: str, entry: dict[str, Any]) -> list[str]:
    given = {key: value for key, value in entry.items() if value is not None}
    first, *rest = [f"{key}: {flow(value)}" for key, value in given.items()]
    return [f"{section}:", f"  - {first}", *(f"    {line}" for line in rest)]


def flow(value: Any) -> str:
    """Return a value as YAML on one line."""

    def dump(style: str | None) -> str:
        text = yaml.safe_dump(
            value,
            default_style=style,
            default_flow_style=True,
            sort_keys=False,
            allow_unicode=True,
            width=10**6,
        )
        return text.removesuffix("...\n").strip()

    text = dump(None)
    return text if is_line(text) else dump('"')  # which escapes the ends of lines


def _number(value: float) -> float:
    return int(value) if value == int(value) else value


def _comment(text: str, indent: str = "") -> list[str]:
    # YAML has more ends of lines than textwrap knows: what follows one would be a key.
    text = visible(" ".join(text.split()))
    return textwrap.wrap(text, 100, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
