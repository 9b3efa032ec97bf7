"""A training step's forward and backward pass on one GPU: pairs per second, memory, numbers.

    PYTHONPATH=. python benchmarks/gpu_model.py [--models 7b-lora 1.5b-full] [--variants ...]
        [--shapes 480/115 250/350 1000/300] [--seconds 500] [--output FOLDER]
    PYTHONPATH=. python benchmarks/gpu_model.py --dry-run      # anywhere: tiny models

It needs torch (2.11 or newer), transformers (5.17 or newer), accelerate and peft alone: a checkout,
no axolotl, no download. `gpu.py` is its second part, which trains through axolotl.

The models have the shapes of Qwen2.5-7B (LoRA) and Qwen2.5-1.5B (full), bf16, random weights, no
gradient checkpointing. A step is one pair under four prompts of P tokens, both responses of R: its
loss and gradients, no optimizer. Results are written after every case, so that a run that is cut
short leaves what it has; no case begins after --seconds. An error of a case is its result, running
out of memory above all.

    published   the published computation: all sequences, their full float32 logits
    unshared    ours with a prompt for every response (`sequences` layout)
    tree        ours with shared prompts under a 4D mask, through `sdpa` without cuDNN, as the
                trainer runs it
    packed      ours in one row without a mask, through torch's variable-length kernel
    flex        ours under a block mask, through `flex_attention`
    flash       `packed` through a flash-attn package, where there is one
    after       ours with the instruction after the question, in the layout that the proof chose
    one-prompt  ours one prompt after the other, in that layout
    floor       the bare trunk, causal, over rows of P + 2R tokens
    floor-head  the same with the head's products (`step.py` says which)

Tables:

    proof     what `choose_layout` decided for each attention, and why not something cheaper
    numbers   loss and gradients of a model of few layers, each against the plain computation (a
              sequence at a time, log_softmax in float64) of the same weights in float32. `plain` is
              that computation in bf16: what rounding alone does. `value diff` is of the loss,
              `grad max` the largest of all entries divided by the reference's largest, `grad L2`
              the same of norms.
    cudnn     milliseconds of a step in the `tree` layout of the model of few layers, the first and
              a later one of each of five lengths of the prompt, with cuDNN's attention off and
              on. It plans anew for every shape if only its first steps are slow.
    speed     medians of --repeats steps behind one that warms up. `speed-up` is published time
              over the row's; `floor/it` and `floor+head/it` are the floors' times over the row's.
              Peak memory is torch's allocator's, model and gradients included.

MFU is the FLOPs that the numbers need / (seconds * the card's peak); HFU is that with the FLOPs of
the tokens that the variant runs: prompts again for each response, all tokens through the head,
forward twice. Both count 2 FLOPs per weight and token forward, 2 backward, and 2 more where the
weight is trained; the head's for response tokens, the embedding's not at all; and 12 * layers *
heads * head size for each query and key that it sees, 4 of them forward. The peak is the vendor's,
dense bf16, and stands at the top of the results.
"""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import accelerate
import peft
import torch
import transformers
from computations import Entrant, Rig, Step, Variants, made_up, markdown, race, ratio
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from axolotl_amopo.model.layout import LayoutName

OUTPUT = Path(__file__).parents[1] / "build" / "benchmarks"  # git ignores build/
PROMPTS, INSTRUCTION = 4, 40
VARIANTS = [
    "published",
    "floor",
    "floor-head",
    "packed",
    "tree",
    "unshared",
    "after",
    "one-prompt",
    "flash",
    "flex",
]
ATTENTION = {
    "flex": "flex_attention",
    "flash": "flash_attention_3" if is_flash_attn_3_available() else "flash_attention_2",
}
# Dense bf16 with float32 accumulation, TFLOP/s, from the vendor's data sheets.
PEAKS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "B200": 2250}


def sizes(vocabulary: int, hidden: int, mlp: int, layers: int, heads: int, key_heads: int) -> dict:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
    }


# How a model is trained, and the shape of Qwen's.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "7b-lora": ("lora", sizes(152064, 3584, 18944, 28, 28, 4)),
    "1.5b-full": ("full", sizes(151936, 1536, 8960, 28, 12, 2) | {"tie_word_embeddings": True}),
}
TINY = sizes(512, 64, 128, 2, 4, 2) | {"initializer_range": 0.15}

DIFFERENCES = {
    "value diff": ("value_difference", "{:.1e}"),
    "grad max": ("gradient_max_difference", "{:.1e}"),
    "grad L2": ("gradient_l2_difference", "{:.1e}"),
}
PROOF = {
    "layout": ("layout", "{}"),
    "not cheaper because": ("why_not_cheaper", "{}"),
    "not shared because": ("why_unshared", "{}"),
    "own logits because": ("why_own_logits", "{}"),
}
CUDNN = {
    "off, first": ("first False", "{:.1f}"),
    "off, later": ("False", "{:.1f}"),
    "on, first": ("first True", "{:.1f}"),
    "on, later": ("True", "{:.1f}"),
}
SPEED = {
    "pairs/s": ("pairs_per_second", "{:.2f}"),
    "speed-up": ("speedup", "{:.2f}"),
    "floor/it": ("floor_share", "{:.2f}"),
    "floor+head/it": ("floor_head_share", "{:.2f}"),
    "MFU": ("mfu", "{:.2f}"),
    "HFU": ("hfu", "{:.2f}"),
    "seconds": ("seconds", "{:.4f}"),
    "tokens": ("run_tokens", "{}"),
    "peak GiB": ("peak_gib", "{:.2f}"),
    "before GiB": ("before_gib", "{:.2f}"),
}


class Report:
    """Tables, in files after every row."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.header = args, header(args)
        self.columns: dict[str, dict[str, tuple[str, str]]] = {}
        self.tables: dict[str, dict[str, dict[str, Any]]] = {}
        self.ends = time.monotonic() + args.seconds

    def add(
        self,
        title: str,
        columns: dict[str, tuple[str, str]],
        names: list[str],
        run: Callable[[], dict[str, dict[str, Any]]],
    ) -> dict[str, dict[str, Any]]:
        """Run what makes rows of a table, and return the table; an error is a result."""
        print(f"{title}: {', '.join(names)} ...", file=sys.stderr, flush=True)
        self.columns[title] = columns
        rows = self.tables.setdefault(title, {})
        try:
            if time.monotonic() > self.ends:
                raise TimeoutError(f"not begun within {self.args.seconds} s")
            rows |= run()
        except Exception as error:  # of a card, a kernel, a compiler
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            rows |= {name: {"failed": text[:200]} for name in names}
        for row in rows.values():
            if columns is SPEED and (seconds := row.get("seconds")):
                row["speedup"] = ratio(rows, "published", seconds)
                row["floor_share"] = ratio(rows, "floor", seconds)
                row["floor_head_share"] = ratio(rows, "floor-head", seconds)
        self.write()
        return rows

    def write(self) -> None:
        report = json.dumps({"header": self.header, "tables": self.tables}, indent=1)
        (self.args.output / "gpu_model.json").write_text(report + "\n", encoding="utf-8")
        page = ["# A training step on a GPU, below axolotl\n"]
        page += [f"\n- {name}: {value}" for name, value in self.header.items()]
        page.append("\n\nRows and columns are explained at the top of `benchmarks/gpu_model.py`.\n")
        for title, rows in self.tables.items():
            page.append(f"\n## {title}\n\n{markdown(self.columns[title], rows)}")
        (self.args.output / "gpu_model.md").write_text("".join(page), encoding="utf-8")


class Model:
    """One of `MODELS`, and the tables that it is measured for."""

    def __init__(self, report: Report, name: str):
        self.report, self.name, self.args = report, name, report.args
        self.train, self.shape = MODELS[name]
        if self.args.dry_run:
            self.shape = self.shape | TINY
        self.layout: LayoutName = "tree"  # until the proof has spoken

    def build(self, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Rig:
        torch.manual_seed(0)
        config = AutoConfig.for_model("qwen2", **(self.shape | changes))
        with self.args.device:
            causal = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="sdpa"
            )
        rig = Rig(causal, self.train, self.args.device, pad_to_multiple_of=8)
        rig.model.train()  # as a trainer has it; there is no dropout
        return rig

    def variants(self, rig: Rig, shape: tuple[int, int]) -> tuple[Variants, Variants]:
        """Return them with the instruction before the question, and after it."""
        case = made_up(*shape, PROMPTS, min(INSTRUCTION, shape[0] // 2), rig.vocabulary)
        return Variants(rig, case.before), Variants(rig, case.after)

    def run(self) -> None:
        rig = self.build(num_hidden_layers=self.args.layers)
        self.numbers(rig)
        self.cudnn(rig)
        del rig
        gc.collect()
        rig = self.build()
        self.proof(rig)
        for shape in self.args.shapes:
            self.speed(rig, shape)

    def proof(self, rig: Rig) -> None:
        batch = self.variants(rig, self.args.shapes[0])[0].batch

        def decide(implementation: str) -> dict[str, dict[str, Any]]:
            facts = rig.choose(batch, implementation)._asdict()
            return {implementation: {key: fact for key, fact in facts.items() if fact != ""}}

        others = [ATTENTION[name] for name in self.args.variants if name in ATTENTION]
        for name in ("sdpa", "eager", *others):
            title = f"{self.name}: proof"
            row = self.report.add(title, PROOF, [name], partial(decide, name))[name]
            if name == "sdpa" and "failed" not in row:
                self.layout, rig.own_logits = row["layout"], row["own_logits"]

    def step(self, case: tuple[Variants, Variants], name: str) -> Step:
        layouts: dict[str, LayoutName] = {"unshared": "sequences", "tree": "tree", "flex": "tree"}
        layouts |= {"packed": "packed", "flash": "packed", "after": self.layout}
        variants = case[name == "after"]
        if name in layouts:
            return variants.make("ours", layouts[name])
        return variants.make(name, self.layout)

    def entrant(self, rig: Rig, name: str, step: Step, reference: str | None = None) -> Entrant:
        context = partial(rig.attending, step.layout, ATTENTION.get(name))
        return Entrant(step.loss, rig.trained, reference=reference, context=context)

    def numbers(self, rig: Rig) -> None:
        exact = self.build(torch.float32, num_hidden_layers=self.args.layers)
        exact.model.load_state_dict(rig.model.state_dict())
        names = [name for name in self.args.variants if not name.startswith("floor")]
        names = ["plain", *sorted(names, key="after".__eq__)]

        def compare(shape: tuple[int, int]) -> dict[str, dict[str, Any]]:
            case, wanted = self.variants(rig, shape), self.variants(exact, shape)
            entrants = {}
            for name in names:
                if name in ("plain", "after"):  # the first of those with these prompts
                    reference = f"{name} in float32"
                    plain = wanted[name == "after"].make("plain", "sequences")
                    entrants[reference] = self.entrant(exact, "", plain, reference)
                entrants[name] = self.entrant(rig, name, self.step(case, name), reference)
            results = race(entrants, 0, rig.device, tolerant=True)
            return {name: results[name] for name in names}

        for shape in self.args.shapes:
            title = f"{self.name}: numbers, {self.args.layers} layers, {shape[0]}/{shape[1]}"
            self.report.add(title, DIFFERENCES, names, partial(compare, shape))

    def cudnn(self, rig: Rig) -> None:
        """Time the tree at lengths that were not seen before, with cuDNN off and on."""
        prompt, response = self.args.shapes[0]
        prompts = [prompt + 8 * i for i in range(1, 6)]

        def milliseconds(step: Step) -> float:
            begin = time.perf_counter()
            step.loss().backward()
            if rig.device.type == "cuda":
                torch.cuda.synchronize()
            return 1000 * (time.perf_counter() - begin)

        def run() -> dict[str, dict[str, Any]]:
            rows: dict[str, dict[str, Any]] = {f"prompt {length}": {} for length in prompts}
            for on in (False, True):
                with rig.attending("tree", cudnn=on):
                    for length in (prompt, *prompts):  # the first one loads kernels
                        step = self.step(self.variants(rig, (length, response)), "tree")
                        first, *later = (milliseconds(step) for _ in range(4))
                        if length != prompt:
                            rows[f"prompt {length}"] |= {f"first {on}": first, str(on): min(later)}
            return rows

        names = [f"prompt {length}" for length in prompts]
        self.report.add(f"{self.name}: cudnn", CUDNN, names, run)

    def speed(self, rig: Rig, shape: tuple[int, int]) -> None:
        case = self.variants(rig, shape)

        def run(name: str) -> dict[str, dict[str, Any]]:
            step = self.step(case, name)
            entrants = {name: self.entrant(rig, name, step)}
            row = race(entrants, self.args.repeats, rig.device, tolerant=True)[name]
            if seconds := row.get("seconds"):
                row["pairs_per_second"] = 1 / seconds
                row["run_tokens"] = step.tokens
                if self.args.tflops:
                    peak = seconds * self.args.tflops * 1e12
                    row["mfu"] = flops_of(rig, work_of(case, name, needed=True)) / peak
                    row["hfu"] = flops_of(rig, work_of(case, name, needed=False)) / peak
            return {name: row}

        for name in self.args.variants:
            title = f"{self.name}: speed, {shape[0]}/{shape[1]}"
            self.report.add(title, SPEED, [name], partial(run, name))


class Work(NamedTuple):
    """What goes through a model."""

    tokens: int  # through the trunk
    seen: int  # keys, summed over the queries
    head_tokens: int
    forwards: int = 1  # for one backward pass


def work_of(case: tuple[Variants, Variants], name: str, *, needed: bool) -> Work:
    """Return the work of a variant, or the least that its numbers need."""
    variants = case[name == "after"]
    forest = variants.batch["forest"]
    scored = sum(forest.lengths[leaf.segment] for leaf in forest.leaves)
    if name in ("published", "unshared") and not needed:
        sequences = [forest.count(forest.path(leaf.segment)) for leaf in forest.leaves]
        seen = sum(n * (n + 1) // 2 for n in sequences)
        return Work(sum(sequences), seen, sum(sequences) if name == "published" else scored)
    seen = 0
    for segment, own in enumerate(forest.lengths):
        above = forest.count(forest.path(segment)) - own
        seen += own * above + own * (own + 1) // 2
    if name.startswith("floor") and not needed:  # the second response sees the first
        seen += PROMPTS * variants.responses**2
    forwards = 2 if name == "one-prompt" and not needed else 1
    return Work(sum(forest.lengths), seen, 0 if name == "floor" else scored, forwards)


def flops_of(rig: Rig, work: Work) -> int:
    """Return floating-point operations; see the head of this file."""
    config, head = rig.causal.config, rig.causal.get_output_embeddings().weight
    ends = {id(head), id(rig.causal.get_input_embeddings().weight)}
    passes = 2 * work.forwards + 2
    trunk = [p for p in rig.model.parameters() if p.ndim == 2 and id(p) not in ends]
    linear = sum(p.numel() * (passes + 2 * p.requires_grad) for p in trunk)
    width = config.num_hidden_layers * config.hidden_size  # of all heads
    attention = width * work.seen * (4 * work.forwards + 8)
    products = head.numel() * (passes + 2 * head.requires_grad)
    return work.tokens * linear + attention + work.head_tokens * products


def header(args: argparse.Namespace) -> dict[str, Any]:
    modules = torch, transformers, peft, accelerate
    on_gpu = args.device.type == "cuda"
    return {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "command": " ".join(["python", *sys.argv]),
        "gpu": torch.cuda.get_device_name() if on_gpu else "none: a dry run with tiny models",
        "peak": f"{args.tflops} TFLOP/s, dense bf16" if args.tflops else "not known: --tflops",
        "versions": ", ".join(f"{module.__name__} {module.__version__}" for module in modules),
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "repeats": args.repeats,
    } | {f"without {name}": why for name, why in args.left_out.items()}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=[*MODELS])
    add("--shapes", nargs="+", default=["480/115", "250/350", "1000/300"])
    add("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    add("--layers", type=int, default=4, help="of the model whose numbers are compared")
    add("--repeats", type=int, default=3)
    add("--seconds", type=float, default=500, help="after which no case begins")
    add("--tflops", type=float, help="the card's peak, where this file doesn't know it")
    add("--dry-run", action="store_true", help="tiny models, on the CPU where there is no GPU")
    add("--output", type=Path, default=OUTPUT)
    add("--force", action="store_true", help="overwrite the results in --output")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if not (args.dry_run or on_gpu):
        parser.error("there is no GPU here; --dry-run shows what would run")
    args.device = torch.device("cuda" if on_gpu else "cpu")
    if on_gpu and args.tflops is None:
        card = torch.cuda.get_device_name()
        args.tflops = next((peak for name, peak in PEAKS.items() if name in card), None)
    args.left_out = {}
    if not (is_flash_attn_2_available() or is_flash_attn_3_available()):
        args.left_out["flash"] = "there is no flash-attn package"
    if not on_gpu:
        args.left_out["flex"] = "it has no backward pass on a CPU"
    args.variants = [name for name in args.variants if name not in args.left_out]
    args.shapes = [tuple(map(int, shape.split("/"))) for shape in args.shapes]
    if min(args.repeats, args.layers) < 1:
        parser.error("--repeats and --layers are 1 at least")
    found = [args.output / f"gpu_model.{end}" for end in ("json", "md")]
    if not args.force and any(path.exists() for path in found):
        parser.error(f"{args.output} holds results; name another --output, or --force")
    return args


def main() -> None:
    args = parse()
    args.output.mkdir(parents=True, exist_ok=True)
    gc.freeze()  # so that collecting before each step looks at little
    report = Report(args)
    for name in args.models:
        Model(report, name).run()
        gc.collect()  # models are cycles
    print((args.output / "gpu_model.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
