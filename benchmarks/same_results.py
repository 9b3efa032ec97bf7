"""What the code computes, recorded and compared: for changes that must change no result.

    python benchmarks/same_results.py record OUT [--model FOLDER] [--only NAME ...]
    python benchmarks/same_results.py compare OLD_OUT NEW_OUT [--only NAME ...]

`record` prepares and trains small configs on real rows with the axolotl-amopo that Python finds
(`pip install --no-deps --target FOLDER CHECKOUT`, then PYTHONPATH=FOLDER, chooses one), and writes
to OUT/NAME for each: the prepared rows in a form that does not depend on their columns, what was
logged, what output_dir holds, the trained weights, and for some what whole commands print with
--json. It imports nothing of the plugin. `compare` tells item by item whether two
recordings are equal bit for bit, else by how much they differ, and exits with 1 where that is more
than TOLERANCE. Ids of groups and of rows with equal prompts may change; keys may be added, not go.
Both recordings must be from one machine, with the same --model.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import batched, combinations
from pathlib import Path
from typing import Any

os.environ |= {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # two threads may add numbers up in another order
    "CUDA_VISIBLE_DEVICES": "",
}

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"
TOLERANCE = 1e-6  # relative to max(1, |value|)
STEPS = 3

# --- configs

HELPSTEER = ["helpfulness", "correctness", "coherence"]
SUMMEVAL = ["coherence", "consistency", "fluency", "relevance"]
WEBNLG = ["correctness", "coverage", "fluency"]
LORA = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_linear": True,
    "learning_rate": 1.0,
}
EVALUATED = {"eval_steps": 2, "eval_batch_size": 2}
SCALES = {"helpsteer_sample": [0, 4], "summeval": [1, 5], "webnlg2020": [0, 100]}
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Facts about a thing.",
        "parameters": {"type": "object", "properties": {"thing": {"type": "string"}}},
    },
}

Json = dict[str, Any]
Entry = tuple[str, list[Json], Json]  # of `datasets:`: type, rows, further keys


@dataclass
class Config:
    """A config to record."""

    amopo: Json
    entries: list[Entry]
    tests: list[Entry] = field(default_factory=list)
    changes: Json = field(default_factory=dict)  # of what `settings` says
    commands: tuple[str, ...] = ()  # whose JSON is recorded too


def configs() -> dict[str, Config]:
    """All that is recorded. Groups have no draws, which follow ids that may change."""
    facts, talks = rated("webnlg2020", 30, responses=4), conversations(24)
    webnlg = [entry("webnlg2020", facts)]
    mean = {"dimensions": WEBNLG, "weighting": "mean"}
    group = {"group_by_prompt": True, "weighting": "mean"}
    summaries = rated("summeval", 24, longest=2400, responses=5)
    train, test = ([entry("summeval", part)] for part in (summaries[:18], summaries[18:]))
    return {
        "single_pairs": Config(
            {"dimensions": HELPSTEER},
            [("amopo.helpsteer", published_helpsteer(40), {})],
            changes={"optimizer": "adamw_torch", "learning_rate": 1e-3},
        ),
        "group_chosen": Config(mean | group, webnlg, changes=LORA),
        "group_none": Config(
            {"dimensions": SUMMEVAL, "rating_in_prompt": "none"} | group,
            train,
            tests=test,
            changes=EVALUATED,
            commands=("inspect", "score", "report"),
        ),
        "group_own": Config(
            mean | group | {"rating_in_prompt": "own", "winner": "per_dimension"},
            [entry("webnlg2020", rated("webnlg2020", 30, responses=6))],
        ),
        "per_dimension": Config({"dimensions": WEBNLG, "winner": "per_dimension"}, webnlg),
        "missing": Config(
            {"dimensions": WEBNLG, "missing_ratings": "mask"},
            [entry("webnlg2020", with_gaps(facts, WEBNLG))],
            changes=LORA,
        ),
        "group_missing": Config(
            mean | group | {"missing_ratings": "mask", "winner": "per_dimension"},
            [entry("webnlg2020", with_gaps(facts, WEBNLG))],
        ),
        "static": Config(
            {
                "dimensions": WEBNLG,
                "weighting": "static",
                "weights": {"overall": 1, "correctness": 0.5, "coverage": 2, "fluency": 0},
            },
            webnlg,
            changes=LORA | {"rl_beta": 0.3},
        ),
        "own": Config(
            {"dimensions": WEBNLG, "rating_in_prompt": "own"},
            webnlg,
            changes=LORA,
            commands=("plan",),
        ),
        "before": Config({"dimensions": WEBNLG}, [entry("webnlg2020", talks)]),
        "after": Config(
            {"dimensions": WEBNLG, "instruction_place": "after"}, [entry("webnlg2020", talks)]
        ),
        "system": Config(
            {"dimensions": WEBNLG, "instruction_place": "system"},
            [entry("webnlg2020", talks)],
            changes={"gradient_checkpointing": True},
        ),
        "tools_and_thinking": Config(
            {"dimensions": WEBNLG},
            [
                entry("webnlg2020", with_tools(facts)),
                entry("webnlg2020", with_thinking(facts), split_thinking=True),
            ],
        ),
        "truncated": Config(
            {"dimensions": HELPSTEER},
            [
                entry("helpsteer_sample", rated("helpsteer_sample", 24)),
                entry("helpsteer_sample", conversations(12, "helpsteer_sample")),
            ],
            changes={"sequence_len": 224, "excess_length_strategy": "truncate"},
        ),
        "two_formats": Config(
            {"dimensions": HELPSTEER},
            [
                ("amopo.helpsteer", published_helpsteer(20), {}),
                ("amopo.pairs", published_pairs(), {"scale": [0, 4]}),
                (
                    "amopo.summeval",
                    published_summeval(8),
                    {"fields": {"helpfulness": "relevance", "correctness": "consistency"}},
                ),
            ],
            changes=LORA,
        ),
        "evaluated": Config(
            mean | {"eval_table": 3},
            webnlg,
            changes=LORA | EVALUATED | {"val_set_size": 0.2},
            commands=("inspect", "score", "report", "plan"),
        ),
        "no_instruction": Config(mean | {"instruction": "", "overall_instruction": ""}, webnlg),
        "drawn_unshared": Config(
            {
                "dimensions": [
                    {"name": "coverage", "description": "all facts are there"},
                    {"name": "fluency", "direction": "lower"},
                ],
                "overall": False,
                "weighting": "uniform",
                "pairs": 3,
                "min_gap": 0.05,
                "order_by": "coverage",
                "share_prompt": False,
                "gamma": 0.5,
            },
            webnlg,
        ),
        "best_worst_tree": Config(
            {"dimensions": WEBNLG, "pairs": "best_worst", "share_prompt": True},
            webnlg,
            changes={"attn_implementation": "eager"},
        ),
    }


def settings(folder: Path, model: Path, config: Config) -> Json:
    """The YAML of a config; writes its data beside it."""

    def datasets(section: str, entries: list[Entry]) -> list[Json]:
        made = []
        for i, (kind, rows, keys) in enumerate(entries):
            path = folder / f"{section}-{i}.jsonl"
            write_lines(path, rows)
            made.append({"path": str(path), "type": kind} | keys)
        return made

    return {
        "base_model": str(model),
        "rl": "amopo",
        "amopo": config.amopo,
        "datasets": datasets("train", config.entries),
        **({"test_datasets": datasets("test", config.tests)} if config.tests else {}),
        "dataset_prepared_path": str(folder / "prepared"),
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "output_dir": str(folder / "out"),
        "sequence_len": 1024,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "num_epochs": 1,
        # Its steps are the gradients; Adam's of a tiny gradient follow the last bit's sign.
        "optimizer": "sgd",
        "lr_scheduler": "constant",
        "learning_rate": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 7,
        "bf16": False,
    } | config.changes


# --- data, all of it texts and ratings of the real sets


def entry(source: str, rows: list[Json], **keys: Any) -> Entry:
    return "amopo.rated", rows, {"scale": SCALES[source]} | keys


def rated(
    source: str, count: int, *, longest: int = 2000, responses: int | None = None
) -> list[Json]:
    """The first prompts that are no longer than so many characters and have several responses."""
    rows = [
        {
            "prompt": row["prompt"],
            "responses": [
                {"text": response["text"], "scores": response["scores"]}
                for response in row["responses"][:responses]
            ],
        }
        for row in read_lines(DATA / source / "rated.jsonl")
        if len(row["prompt"]) <= longest and len(row["responses"]) > 1
    ]
    return rows[:count]


def published_helpsteer(prompts: int) -> list[Json]:
    rows = read_lines(DATA / "helpsteer_sample" / "nvidia_HelpSteer_sample.jsonl")
    rows = [row for row in rows if len(row["prompt"]) <= 2000]
    chosen = list(dict.fromkeys(row["prompt"] for row in rows))[:prompts]
    return [row for row in rows if row["prompt"] in chosen]


def published_pairs() -> list[Json]:
    return [
        {"prompt": row["prompt"]}
        | {
            side: {"response": response["text"]}
            | {name: f"{score:g}" for name, score in response["scores"].items()}
            for side, response in zip(("chosen", "rejected"), responses, strict=True)
        }
        for row in rated("helpsteer_sample", 40)[20:]
        for responses in list(combinations(row["responses"], 2))[:2]
        if responses[0]["text"] != responses[1]["text"]
    ]


def published_summeval(prompts: int) -> list[Json]:
    return [
        {"text": row["prompt"].partition("\n\n")[2]}
        | {"machine_summaries": [response["text"] for response in row["responses"]]}
        | {name: [response["scores"][name] for response in row["responses"]] for name in SUMMEVAL}
        for row in rated("summeval", prompts, longest=2400, responses=3)
    ]


def with_gaps(rows: list[Json], names: list[str]) -> list[Json]:
    """The same with a fifth of the ratings missing; every tenth response has none."""
    made = []
    for i, row in enumerate(rows):
        responses = []
        for j, response in enumerate(row["responses"]):
            place = 4 * i + j
            scores = {
                name: None if place % 10 == 3 or (3 * place + d) % 7 == 0 else score
                for d, (name, score) in enumerate(response["scores"].items())
                if name in names
            }
            responses.append(response | {"scores": scores})
        made.append(row | {"responses": responses})
    return made


def conversations(count: int, source: str = "webnlg2020") -> list[Json]:
    """Prompts behind an earlier turn; half of them behind a system message too."""
    rows = rated(source, 2 * count, responses=3)
    return [
        {
            "messages": [{"role": "system", "content": "Write plainly."}] * (i % 2)
            + [
                {"role": "user", "content": before["prompt"]},
                {"role": "assistant", "content": before["responses"][0]["text"]},
                {"role": "user", "content": row["prompt"]},
            ],
            "responses": row["responses"],
        }
        for i, (before, row) in enumerate(batched(rows, 2))
    ]


def with_tools(rows: list[Json]) -> list[Json]:
    """Prompts that called a tool, and responses that think, or call it once more."""
    made = []
    for row in rows:
        request, facts = row["prompt"].split("\n\n", 1)
        arguments = json.dumps({"thing": facts.split(" | ")[0]})
        call = {"type": "function", "function": {"name": "look_up", "arguments": arguments}}
        messages = [
            {"role": "user", "content": request},
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": "I need facts.",
                "tool_calls": [call],
            },
            {"role": "tool", "content": facts},
            {"role": "user", "content": "Now write it."},
        ]
        responses = []
        for j, response in enumerate(row["responses"]):
            turn: Json = {"role": "assistant", "content": response["text"]}
            turn |= {"reasoning_content": f"These are facts: {facts}"} if j % 2 else {}
            turn |= {"tool_calls": [call]} if j % 3 == 2 else {}
            responses.append({"text": [turn], "scores": response["scores"]})
        made.append({"messages": messages, "responses": responses, "tools": json.dumps([TOOL])})
    return made


def with_thinking(rows: list[Json]) -> list[Json]:
    """Thinking inside the text, for `split_thinking`."""
    return [
        {"prompt": f"Think first. {row['prompt']}"}
        | {
            "responses": [
                response | {"text": f"<think>Draft {j}.</think>\n{response['text']}"}
                for j, response in enumerate(row["responses"])
            ]
        }
        for row in rows
    ]


# --- the model

TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>\n{% endif %}"
    "{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<call>{{ call.function | tojson }}</call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_model(folder: Path) -> None:
    """A Llama of two layers, and byte-level BPE with ChatML."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<unk>", "<s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [
        response["text"]
        for source in SCALES
        for row in rated(source, 60)
        for response in row["responses"][:4]
    ]
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<unk>",
        chat_template=TEMPLATE,
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=3,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    # A little of training, so that tokens are of very different probability, as a model's are.
    ids = torch.tensor(tokenizer(tokenizer.eos_token.join(texts)).input_ids)
    windows = ids[: len(ids) // 128 * 128].view(-1, 128)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for part in windows[torch.randperm(len(windows))].split(8):
        model(input_ids=part, labels=part).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


# --- prepared rows, whatever their columns are

Ids = tuple[int, ...]
# The winner's prompt and ids, the loser's prompt and ids, and whether the criterion says nothing.
Judged = tuple[Ids, Ids, Ids, Ids, bool]


def canonical(row: Json) -> list[list[Judged]]:
    """[P][C] what each criterion says of each comparison of a prepared row."""
    return list(_of_comparisons(row) if "comparisons" in row else _of_pairs(row))


def _of_pairs(row: Json) -> Iterator[list[Judged]]:
    """Columns that hold one pair after the other, [PK] and [2P]."""
    pairs = len(row["response_ids"]) // 2
    criteria = len(row["winners"]) // pairs
    sides = len(row["prompt_ids"]) // len(row["winners"])
    prompts, responses = ([tuple(ids) for ids in row[n]] for n in ("prompt_ids", "response_ids"))
    for p in range(pairs):
        judged = []
        for k in range(p * criteria, (p + 1) * criteria):
            winner = row["winners"][k]
            texts = prompts[k * sides], prompts[k * sides + sides - 1]
            both = responses[2 * p + winner], responses[2 * p + 1 - winner]
            masked = not row["dimension_mask"][k]
            judged.append((texts[0], both[0], texts[1], both[1], masked))
        yield judged


def _of_comparisons(row: Json) -> Iterator[list[Judged]]:
    """Columns that hold each text once, and comparisons as places: N responses, C criteria."""
    prompts, responses = ([tuple(ids) for ids in row[n]] for n in ("prompt_ids", "response_ids"))
    comparisons = list(batched(row["comparisons"], 2))
    criteria = len(row["signs"]) // len(comparisons)
    for p, places in enumerate(comparisons):
        judged = []
        for c in range(p * criteria, (p + 1) * criteria):
            k, sign = row["reads"][c], row["signs"][c]
            sequences = [
                (prompts[row["follows"][k * len(responses) + n]], responses[n]) for n in places
            ]
            winner = 1 if sign < 0 else 0
            judged.append((*sequences[winner], *sequences[1 - winner], sign == 0))
        yield judged


def as_json(rows: Any) -> Json:
    """Prepared rows with every list of ids once."""
    known: dict[Ids, int] = {}

    def place(ids: Any) -> int:
        return known.setdefault(tuple(ids), len(known))

    made = [
        {
            "comparisons": [
                [[*map(place, judged[:4]), int(judged[4])] for judged in comparison]
                for comparison in canonical(row)
            ],
            "longest": [place(row[n]) for n in ("input_ids", "labels", "attention_mask")],
            "example_id": row["example_id"],
        }
        for row in rows
    ]
    return {"rows": made, "ids": [list(ids) for ids in known]}


# --- recording


def record(out: Path, model: Path, only: list[str] | None) -> bool:
    """Whether all went well; a config that fails lacks what `compare` will look for."""
    out, model = out.resolve(), model.resolve()
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    cache = out / "cache"
    os.environ["HF_DATASETS_CACHE"] = str(cache)  # what is loaded from other files of these names
    if not (model / "config.json").is_file():
        make_model(model)
    installed = importlib.metadata.distribution("axolotl-amopo")
    facts = {
        "package": str(Path(importlib.util.find_spec("axolotl_amopo").origin).parent),
        "entry_points_of": str(installed.locate_file("")),
        "versions": {name: importlib.metadata.version(name) for name in ("axolotl", "torch")},
        "model": {path.name: digest(path) for path in sorted(model.iterdir())},
    }
    print(f"Recording {facts['package']} (entry points of {installed.locate_file('')})", flush=True)
    write_json(out / "facts.json", facts)

    places = {str(out): "OUT", str(model): "MODEL"}
    places |= {path[1:]: name for path, name in places.items()}  # so it stands in a model card

    def shown(text: str) -> str:
        for path, name in places.items():
            text = text.replace(path, name)
        return text

    failed = []
    for name, config in chosen(configs(), only).items():
        start = time.monotonic()
        try:
            record_config(out / name, model, config, shown)
        except Exception:  # of code under change, anything
            traceback.print_exc()
            failed.append(name)
        print(f"{name}: {time.monotonic() - start:.1f} s", flush=True)
    if not only:
        write_json(out / "configs.json", command(shown, out, "configs"))
    shutil.rmtree(cache, ignore_errors=True)
    print(f"Done in {time.monotonic() - began:.0f} s; failed: {', '.join(failed) or 'none'}")
    return not failed


def record_config(folder: Path, model: Path, config: Config, shown: Callable[[str], str]) -> None:
    import torch
    import yaml
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import train
    from transformers import set_seed

    torch.set_num_threads(1)
    shutil.rmtree(folder, ignore_errors=True)
    run = folder / "run"
    run.mkdir(parents=True)
    path = run / "config.yml"
    path.write_text(yaml.safe_dump(settings(run, model, config), sort_keys=False), encoding="utf-8")
    cfg = load_cfg(str(path))
    datasets = load_datasets(cfg=cfg)
    for split in ("train", "eval"):
        if rows := getattr(datasets, f"{split}_dataset"):
            write_json(folder / f"{split}_rows.json", as_json(rows.with_format(None)))
    set_seed(7)  # whatever was drawn before
    trainer = train(cfg=cfg, dataset_meta=datasets)[2]
    write_json(folder / "history.json", trainer.state.log_history)
    for written in sorted((run / "out").iterdir()):
        if written.name in ("model.safetensors", "adapter_model.safetensors"):
            shutil.copy(written, folder / "weights.safetensors")
        elif written.suffix == ".jsonl":
            write_json(folder / f"{written.stem}.json", lines(written, shown))
        elif written.match("amopo*.json"):
            write_json(folder / written.name, json.loads(shown(read_text(written))))
        elif written.name == "README.md":
            card = re.sub("^Versions: .*$", "", shown(read_text(written)), flags=re.MULTILINE)
            write_json(folder / "card.json", card.splitlines())
    pairs = folder / "pairs.jsonl"
    arguments = {
        "inspect": [path],
        "score": [path, "--pairs", pairs],
        "report": [run / "out"],
        "plan": [path, "--gpu", "h100-80gb"],
    }
    for name in config.commands:
        write_json(folder / f"{name}.json", command(shown, run, name, *map(str, arguments[name])))
    if pairs.is_file():
        write_json(folder / "score_pairs.json", lines(pairs, shown))


def command(shown: Callable[[str], str], folder: Path, *arguments: str) -> Any:
    """What `axolotl amopo ... --json` prints."""
    axolotl = Path(sys.executable).parent / "axolotl"
    done = subprocess.run(
        [axolotl, "amopo", *arguments, "--json"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"amopo {' '.join(arguments)} failed:\n{done.stderr[-4000:]}")
    return json.loads(shown(done.stdout.splitlines()[-1]))


# --- comparing

# Keys whose values tell of the machine, the moment, or where files are.
IGNORED = re.compile(
    r"^(time|.*seconds|.*_?runtime|.*_per_sec.*|memory/.*|versions|config|page"
    r"|folder|log|file|paths?)$"
)


@dataclass
class Found:
    """What the comparison of one item found."""

    compared: int = 0
    largest: float = 0.0
    relative: float = 0.0
    where: str = ""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def number(self, where: str, old: float, new: float) -> None:
        self.compared += 1
        if old == new or (math.isnan(old) and math.isnan(new)):
            return
        difference = abs(old - new)
        if math.isnan(difference):
            difference = math.inf
        relative = difference / max(1.0, abs(old))
        self.largest = max(self.largest, difference)
        if relative > self.relative:
            self.relative, self.where = relative, where
        if relative > TOLERANCE:
            self.problems.append(f"{where}: {old!r} became {new!r}")

    def values(self, where: str, old: Any, new: Any) -> None:
        """Compare nested values of JSON."""
        if isinstance(old, dict) and isinstance(new, dict):
            for key in sorted(old.keys() | new.keys()):
                if IGNORED.match(key):
                    continue
                at = f"{where}.{key}" if where else key
                if key not in new:
                    self.problems.append(f"{at}: is gone")
                elif key not in old:
                    self.notes.append(f"{at}: is new")
                else:
                    self.values(at, old[key], new[key])
        elif isinstance(old, list) and isinstance(new, list):
            if len(old) != len(new):
                self.problems.append(f"{where}: {len(old)} items became {len(new)}")
            for i, pair in enumerate(zip(old, new, strict=False)):
                self.values(f"{where}[{i}]", *pair)
        elif is_number(old) and is_number(new):
            self.number(where, old, new)
        else:
            self.compared += 1
            if old != new or type(old) is not type(new):
                self.problems.append(f"{where}: {brief(old)} became {brief(new)}")

    def show(self, name: str) -> None:
        state = "equal" if not self.largest else "equal within the tolerance"
        if self.problems:
            state = f"DIFFERS in {len(self.problems)} places"
        state += f" ({self.compared:,} values)"
        if self.largest:
            state += f"; by up to {self.largest:.2g}, relatively {self.relative:.2g} ({self.where})"
        print(f"  {name:24} {state}")
        for kind, texts in (("!", self.problems), ("-", self.notes)):
            for text in texts[:10]:
                print(f"    {kind} {text}")
            if len(texts) > 10:
                print(f"    {kind} ... {len(texts) - 10} more")


def compare(old: Path, new: Path, only: list[str] | None) -> bool:
    """Whether two recordings are the same; prints what isn't."""
    facts = [read_json(out / "facts.json") for out in (old, new)]
    for out, one in zip((old, new), facts, strict=True):
        print(f"{out}: {one['package']}")
    if facts[0]["model"] != facts[1]["model"] or facts[0]["versions"] != facts[1]["versions"]:
        raise SystemExit("Recorded with different models, or versions of axolotl or torch.")
    same = True
    folders = {path.name: path for path in sorted(old.iterdir()) if (path / "run").is_dir()}
    for name, folder in chosen(folders, only).items():
        print(name)
        items = sorted({p.name for f in (folder, new / name) for p in f.glob("*.json")})
        for item in [*items, "weights.safetensors"]:
            found = Found()
            paths = [folder / item, new / name / item]
            if missing := [str(path) for path in paths if not path.is_file()]:
                found.problems.append(f"there is no {' and no '.join(missing)}")
            elif item == "weights.safetensors":
                compare_weights(found, *paths)
            elif item.endswith("_rows.json"):
                compare_rows(found, *map(read_rows, paths))
            else:
                found.values("", *map(read_json, paths))
            found.show(item.rpartition(".")[0])
            same &= not found.problems
    if not only:
        print("commands")
        found = Found()
        found.values("", *(read_json(out / "configs.json") for out in (old, new)))
        found.show("configs")
        same &= not found.problems
    print("The same." if same else "NOT the same.")
    return same


@dataclass
class PreparedRow:
    comparisons: list[list[Judged]]
    longest: list[Ids]  # input_ids, labels, attention_mask
    example_id: int

    def draws_may_change(self) -> bool:
        """Whether another id is no fault: of several comparisons, or of prompts that are equal."""
        if len(self.comparisons) > 1:
            return True
        prompts = [text for judged in self.comparisons[0] for text in judged[0:4:2]]
        return len(self.comparisons[0]) > 1 and len(set(prompts)) == 1

    def sequences(self) -> Iterator[list[Ids]]:
        """What `longest` may be."""
        for prompt, response in {
            sequence
            for comparison in self.comparisons
            for judged in comparison
            for sequence in (judged[0:2], judged[2:4])
        }:
            ids = prompt + response
            yield [ids, (-100,) * len(prompt) + response, (1,) * len(ids)]


def read_rows(path: Path) -> list[PreparedRow]:
    stored = read_json(path)
    ids = [tuple(one) for one in stored["ids"]]
    return [
        PreparedRow(
            [
                [(*(ids[i] for i in judged[:4]), bool(judged[4])) for judged in comparison]
                for comparison in row["comparisons"]
            ],
            [ids[i] for i in row["longest"]],
            row["example_id"],
        )
        for row in stored["rows"]
    ]


def compare_rows(found: Found, old: list[PreparedRow], new: list[PreparedRow]) -> None:
    if len(old) != len(new):
        found.problems.append(f"{len(old)} rows became {len(new)}")
    other_longest, other_ids = 0, 0
    for i, (one, other) in enumerate(zip(old, new, strict=False)):
        found.compared += sum(map(len, one.comparisons)) + 2
        if one.comparisons != other.comparisons:
            found.problems.append(f"row {i}: {what_differs(one.comparisons, other.comparisons)}")
        if one.longest != other.longest:
            as_long = len(one.longest[0]) == len(other.longest[0])
            if as_long and other.longest in list(other.sequences()):
                other_longest += 1
            else:
                found.problems.append(f"row {i}: input_ids, labels or attention_mask differ")
        if one.example_id != other.example_id:
            if one.draws_may_change():
                other_ids += 1
            else:
                found.problems.append(f"row {i}: example_id {one.example_id}, {other.example_id}")
    if other_longest:
        found.notes.append(f"{other_longest} rows: another of the longest sequences in input_ids")
    if other_ids:
        found.notes.append(f"{other_ids} rows (groups, or equal prompts) have another example_id")


def what_differs(old: list[list[Judged]], new: list[list[Judged]]) -> str:
    if sorted(old) == sorted(new):
        return "the same comparisons in another order"
    if len(old) != len(new):
        return f"{len(old)} comparisons became {len(new)}"
    places = [
        (p, c, one, other)
        for p, both in enumerate(zip(old, new, strict=True))
        for c, (one, other) in enumerate(zip(*both, strict=False))
        if one != other
    ]
    if not places:
        return "another number of criteria"
    p, c, one, other = places[0]
    parts = ("winner's prompt", "winner", "loser's prompt", "loser", "mask")
    names = [name for name, *both in zip(parts, one, other, strict=True) if both[0] != both[1]]
    masked = all(one[4] and other[4] for *_, one, other in places) * " (all of them masked)"
    return f"{len(places)} differ{masked}; in comparison {p}, criterion {c}: {', '.join(names)}"


def compare_weights(found: Found, old: Path, new: Path) -> None:
    import numpy as np
    from safetensors.numpy import load_file

    weights = [load_file(path) for path in (old, new)]
    for name in sorted(weights[0].keys() ^ weights[1].keys()):
        found.problems.append(f"{name}: is only in one of the two")
    for name in sorted(weights[0].keys() & weights[1].keys()):
        one, other = (part[name] for part in weights)
        if one.dtype != other.dtype or one.shape != other.shape:
            found.problems.append(f"{name}: {one.dtype}{one.shape}, {other.dtype}{other.shape}")
            continue
        worst = np.argmax(np.abs(one - other) / np.maximum(1, np.abs(one)))
        found.number(name, float(one.flat[worst]), float(other.flat[worst]))
        found.compared += one.size - 1


# --- files


def chosen(known: dict[str, Any], only: list[str] | None) -> dict[str, Any]:
    if unknown := set(only or ()) - set(known):
        raise SystemExit(f"Unknown: {', '.join(sorted(unknown))}. Known: {', '.join(known)}.")
    return {name: known[name] for name in only or known}


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:100]} ... {text[-100:]}"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in read_text(path).split("\n") if line]


def lines(path: Path, shown: Callable[[str], str]) -> list[Any]:
    return [json.loads(shown(json.dumps(line))) for line in read_lines(path)]


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(read_text(path))


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="record what the installed code computes")
    recording.add_argument("out", type=Path)
    recording.add_argument(
        "--model", type=Path, help="made where there is none; default: a folder beside OUT"
    )
    comparing = commands.add_parser("compare", help="tell whether two recordings are the same")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    for command_parser in (recording, comparing):
        command_parser.add_argument("--only", nargs="+", metavar="NAME", help="some configs alone")
    given = parser.parse_args()
    if given.command == "record":
        model = given.model or given.out.resolve().parent / "model"
        done = record(given.out, model, given.only)
    else:
        done = compare(given.old, given.new, given.only)
    sys.exit(not done)


if __name__ == "__main__":
    main()
