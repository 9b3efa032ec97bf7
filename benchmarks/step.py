"""What a training step costs: forward and backward of the loss for one pair, no optimizer.

    python benchmarks/step.py --model PATH [--shapes 480/115 ...] [--prompts 2 4 6]
        [--train full lora] [--dtype float32] [--repeats 3] [--variants ...] [--output FOLDER]
    python benchmarks/step.py --model PATH --groups 4 8 14 --shapes 100/60 --prompts 4
        [--sample-pairs 6] [--max-tokens 4096]      # groups of rated responses instead of a pair
    python benchmarks/step.py --head        # the head alone

A pair is two responses under K prompts: 2K sequences of P + R made-up tokens, all of one length, so
that nobody pays for padding. The variants run in one process on the same ids, in another order
every round, after a round that warms up and compares numbers.

    published    the published computation, written here from its description: all sequences under
                 a 2D mask, their full float32 logits, log_softmax and softmax of those, and a copy
                 for a metric. Its loss is scaled to the sum over the prompts, as ours is.
    unshared     ours with a prompt for every response (`sequences` layout)
    tree         ours with shared prompts under a 4D mask
    default      ours in the layout that `choose_layout` picks
    one-prompt   the same, one prompt after the other (`one_prompt_at_a_time`): all of them forward
                 without gradients, then each forward and backward
    after        `default` with the instruction after the question, so that all prompts share the
                 question: the same lengths, other prompts, so another loss
    dpo          for scale: TRL's DPOTrainer.compute_loss on the same sequences as K pairs. Policy
                 only: the reference's log-probabilities are computed before, and not measured.
    floor        the bare trunk, causal, over K rows of P + 2R tokens. It leaves out the head and
                 the preference loss.
    floor-head   the same trunk, and of the head the products that no loss over log-probabilities
                 gets round: logits of M = 2KR response tokens, the gradient of their hidden states
                 and, where the head is trained, that of its weight. Three products of M x V x H,
                 two where it is frozen, in chunks of the vocabulary. It leaves out the softmax, the
                 second making of logits that a chunked softmax needs where nothing is kept, and the
                 preference loss.
    dpo-chunked  (only if asked) `dpo` with TRL's chunked head, its use_liger_kernel
    plain        (only if asked) what the differences are taken from: one sequence at a time, run
                 again in the backward pass to save memory. It always runs in the first round. Its
                 log_softmax is in float64: torch's in float32, which `published` has, sums a
                 large vocabulary less exactly on a CPU.

`speed-up` is the time of `published` (of the full logits, for heads) divided by the row's, both
medians over the rounds. `floor/it` is the time of `floor` divided by the row's, `floor+head/it`
that of `floor-head`: 1 leaves nothing to gain; `after` can pass 1, running fewer tokens. `real
tok/s` counts the pair's 2K(P + R) tokens, `run tok/s` those that go through the model (in
`one-prompt` once, though they go forward twice). `peak` is the most memory during the step: on a
CPU the whole process's, with model and gradients, and `before` is what it had when the step began;
on a GPU what torch allocated. `extra` (heads) is peak minus before minus the gradients. `value
diff` is of the loss (of the log-probabilities, for heads), `grad max` the largest over all trained
entries, each divided by the reference's largest; `grad L2` is the same of norms. In 16 bits they
hold the rounding of both computations.

With `--groups`, N responses to one question are rated, by K - 1 dimensions that are drawn
independently, each the mean of three whole ratings from 1 to 5, and all N(N - 1)/2 pairs of them
are trained on. Which prompts they share is what the plugin's own code makes of `rating_in_prompt`:

    none               the same K prompts for all pairs
    chosen             a prompt per criterion and rating of a winner; the overall prompt asks for
                       a winner's ratings by all dimensions
    chosen, 5 levels   the same with the ratings in the prompt rounded to whole ones
                       (`rating_levels: 5`)
    own                a prompt per criterion and rating of a response, the loser's as well

    group           ours, all pairs in one forward pass, each response once behind each prompt
    group in parts  the same in forward passes of at most --max-tokens (`max_tokens`)
    pairs           ours in the layout of `default`, one pair after the other
    published, dpo  likewise; `dpo` has no prompt per response, and takes the winner's for both

The last three run on --sample-pairs of the pairs, evenly spread, where there are more, and seconds
are extrapolated from those; a table says so. Seconds, tokens through the model and `speed-up` are
by pair, peaks are of what runs at once: a group, a part, or a pair. `value diff` is that of a
group's loss from the mean of the losses of all its pairs one by one; gradients are compared where
no pair is left out.

Dropout is off. With --dtype bfloat16 or float16 the weights have that type and autocast is on, as
axolotl trains. LoRA is of rank 16 on all linear layers of the trunk, its B matrices random, so that
no gradient is zero. A folder that holds no weights runs with random ones.
"""

import argparse
import gc
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from functools import cached_property, partial
from itertools import product
from math import nan
from pathlib import Path
from typing import Any

os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
import transformers
import trl
from computations import (
    Case,
    Entrant,
    Rig,
    Step,
    Text,
    Variants,
    made_up,
    markdown,
    race,
    ratio,
    resident,
)
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import _ChunkedLogProbFunction

from axolotl_amopo.config.block import AMoPOConfig
from axolotl_amopo.data.pairing import PairRule
from axolotl_amopo.data.prompts import prompted
from axolotl_amopo.data.rows import RatedPrompt, Response
from axolotl_amopo.example import Example
from axolotl_amopo.model.choose import MASKED
from axolotl_amopo.model.head import LinearLogps
from axolotl_amopo.model.layout import LayoutName
from axolotl_amopo.model.parts import Batch, split_batch

OUTPUT = Path(__file__).parents[1] / "build" / "benchmarks"  # git ignores build/
VARIANTS = [
    "published",
    "unshared",
    "tree",
    "default",
    "one-prompt",
    "after",
    "dpo",
    "floor",
    "floor-head",
]
MODES = ["none", "chosen", "chosen, 5 levels", "own"]  # of `rating_in_prompt`
COLUMNS = {
    "pairs/s": ("pairs_per_second", "{:.2f}"),
    "floor/it": ("floor_share", "{:.2f}"),
    "floor+head/it": ("floor_head_share", "{:.2f}"),
    "speed-up": ("speedup", "{:.2f}"),
    "seconds": ("seconds", "{:.3f}"),
    "tokens": ("tokens_per_pair", "{:.0f}"),
    "real tok/s": ("real_tokens_per_second", "{:.0f}"),
    "run tok/s": ("run_tokens_per_second", "{:.0f}"),
    "peak GiB": ("peak_gib", "{:.2f}"),
    "before GiB": ("before_gib", "{:.2f}"),
    "extra GiB": ("extra_gib", "{:.3f}"),
    "value diff": ("value_difference", "{:.1e}"),
    "grad max": ("gradient_max_difference", "{:.1e}"),
    "grad L2": ("gradient_l2_difference", "{:.1e}"),
}


def limit_memory() -> None:
    """Turn an allocation beyond the free memory into an error, which is caught and reported; the
    system would end the process."""
    free = resident("MemAvailable", "/proc/meminfo")
    most = resident("VmData") + int(0.95 * free)
    resource.setrlimit(resource.RLIMIT_DATA, (most, resource.RLIM_INFINITY))


class ReadyDPOTrainer(trl.DPOTrainer):
    """For rows that are token ids already; the references are computed case by case."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
        return dataset


def dpo_trainer(rig: Rig) -> trl.DPOTrainer:
    words = Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>"))
    with tempfile.TemporaryDirectory() as folder:
        trainer = ReadyDPOTrainer(
            model=rig.model,
            args=trl.DPOConfig(
                output_dir=folder,
                precompute_ref_log_probs=True,
                gradient_checkpointing=False,
                bf16=False,  # autocast is the rig's
                max_length=None,
                use_cpu=rig.device.type == "cpu",
                report_to="none",
            ),
            train_dataset=Dataset.from_list([{"prompt_ids": [0]}]),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>"),
        )
    if rig.model is not rig.causal:
        rig.model.delete_adapter("ref")  # made for adapters that are trained on
    return trainer


class Bench(Rig):
    """A model and the tables that it is measured for."""

    def __init__(self, args: argparse.Namespace, train: str):
        torch.manual_seed(0)
        super().__init__(load(args), train, torch.device(args.device))
        self.args = args
        case = made_up(60, 20, 2, 30, self.vocabulary)
        choice = self.choose(self.batch([case.before]), self.attention)
        self.layout, self.own_logits = choice.layout, choice.own_logits

    @cached_property
    def trainer(self) -> trl.DPOTrainer:
        return dpo_trainer(self)

    def entrant(self, step: Step, **options: Any) -> Entrant:
        context = partial(self.attending, step.layout)
        return Entrant(step.loss, self.trained, context=context, **options)

    def run(self, case: Case) -> dict[str, dict[str, Any]]:
        """Return figures of the variants on a pair."""
        names = self.args.variants
        orders = Variants(self, case.before), Variants(self, case.after)
        free = [name for name in names if name.startswith(("dpo", "floor"))]
        compared = [name for name in names if name not in (*free, "plain", "after")]
        if self.attention not in MASKED and "tree" in compared:
            compared.remove("tree")
        after = ["plain after", "after"] if "after" in names else []
        steps, entrants = {}, {}
        for name in ["plain", *compared, *after, *free]:
            steps[name] = self.step(name, orders[name in after])
            reference = "plain after" if name in after else None if name in free else "plain"
            entrants[name] = self.entrant(steps[name], reference=reference, timed=name in names)
        results = race(entrants, self.args.repeats, self.device)
        real = orders[0].ids.numel()
        for name, result in results.items():
            result["layout"] = steps[name].layout
            if seconds := result.get("seconds"):
                result["run_tokens"] = steps[name].tokens
                result["run_tokens_per_second"] = steps[name].tokens / seconds
                result["real_tokens_per_second"] = None if "floor" in name else real / seconds
                result["floor_share"] = ratio(results, "floor", seconds)
                result["floor_head_share"] = ratio(results, "floor-head", seconds)
                result["speedup"] = ratio(results, "published", seconds)
        missing = {"failed": f"not under {self.attention}"}
        return {name: results.get(name, missing) for name in names}

    def step(self, name: str, variants: Variants) -> Step:
        if name.startswith("dpo"):
            loss = partial(self.dpo, self.dpo_batch(variants), name == "dpo-chunked")
            return Step(partial(self.cast, loss), variants.ids.numel())
        ours: dict[str, LayoutName] = {"unshared": "sequences", "tree": "tree"}
        ours |= dict.fromkeys(["default", "after"], self.layout)
        if name in ours:
            return variants.make("ours", ours[name])
        return variants.make(name.removesuffix(" after"), self.layout)

    def dpo(self, batch: Batch, chunked: bool) -> Tensor:
        self.trainer.use_liger_kernel = chunked
        return self.trainer.compute_loss(self.model, batch)

    def dpo_batch(self, variants: Variants) -> Batch:
        example, rows = variants.example, []
        for c in range(example.criteria):
            (text, winner), (_, loser) = example.winner_first(0, c)
            sides = {"chosen_ids": winner, "rejected_ids": loser}
            sides = {name: example.responses[place] for name, place in sides.items()}
            rows.append({"prompt_ids": example.prompts[text]} | sides)
        batch = self.moved(DataCollatorForPreference(pad_token_id=0)(rows))
        chosen, rejected = self.cast(self.trainer.compute_ref_log_probs, self.model, batch)
        return batch | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def run_group(self, example: Example) -> dict[str, dict[str, Any]]:
        """Return figures of a group's pairs, together and one by one."""
        count = len(example.comparisons)
        noise = torch.randn(count, example.criteria, 2, generator=torch.Generator().manual_seed(0))
        whole = Variants(self, example, noise)
        alone = [Variants(self, one_pair(example, p), noise[[p]]) for p in range(count)]
        sample = min(count, self.args.sample_pairs)
        sampled = [alone[i * count // sample] for i in range(sample)]
        steps = {
            "pairs": in_turn([self.step("default", variants) for variants in sampled]),
            "group": self.step("default", whole),
        }
        parts = split_batch(whole.batch, self.args.max_tokens)
        if len(parts) > 1:
            steps["group in parts"] = whole.parted(parts, self.layout)
        for name in ("published", "dpo"):
            if name in self.args.variants:
                steps[name] = in_turn([self.step(name, variants) for variants in sampled])
        compared = [name for name in steps if name != "dpo"] if sample == count else []
        results = race(
            {
                name: self.entrant(step, reference="pairs" if name in compared else None)
                for name, step in steps.items()
            },
            self.args.repeats,
            self.device,
        )
        with torch.no_grad(), self.attending(self.layout):
            losses = [variants.make("ours", self.layout).loss().item() for variants in alone]
        mean = statistics.mean(losses)
        for name, result in results.items():
            together = name.startswith("group")
            result["layout"] = steps[name].layout
            if together and "value" in result:
                result["value_difference"] = abs(result["value"] - mean) / abs(mean)
            if seconds := result.get("seconds"):
                pairs = count if together else sample
                result["pairs_run"] = pairs
                result["seconds"] = seconds / pairs
                result["pairs_per_second"] = pairs / seconds
                result["tokens_per_pair"] = steps[name].tokens / pairs
        for result in results.values():
            if seconds := result.get("seconds"):
                result["speedup"] = ratio(results, "published", seconds)
        return results


def load(args: argparse.Namespace) -> PreTrainedModel:
    options = {"dtype": getattr(torch, args.dtype), "attn_implementation": args.attention}
    if has_weights(args.model):
        return AutoModelForCausalLM.from_pretrained(args.model, **options)
    config = AutoConfig.from_pretrained(args.model)
    with torch.device(args.device):
        return AutoModelForCausalLM.from_config(config, **options)


def in_turn(steps: list[Step]) -> Step:
    """Return the mean of several losses, each with its backward pass before the next."""

    def run() -> Tensor:
        total: Tensor | float = 0.0
        for step in steps[:-1]:
            loss = step.loss() / len(steps)
            loss.backward()
            total = total + loss.detach()
        return steps[-1].loss() / len(steps) + total

    return Step(run, sum(step.tokens for step in steps), steps[0].layout)


def made_up_group(size: int, mode: str, *shape: int) -> Example:
    """Return the example that a question with so many rated responses becomes.

    Args:
        size: N.
        mode: of `MODES`.
        shape: as `made_up` takes it.
    """
    prompt, response, prompts, instruction, vocabulary = shape
    text = Text(vocabulary)
    scale, names = (1.0, 5.0), [f"dimension {d}" for d in range(prompts - 1)]
    rated: dict[float, Response] = {}  # no two of them tie
    while len(rated) < size:
        thirds = [sum(text.rng.choices(range(1, 6), k=3)) for _ in names]
        ratings = dict(zip(names, [each / 3 for each in thirds], strict=True))
        rated.setdefault(sum(thirds), Response(str(len(rated)), ratings))
    question = RatedPrompt([{"role": "user", "content": ""}], [*rated.values()], rows=[1])
    config = AMoPOConfig(dimensions=names, rating_in_prompt=mode.split(",")[0])
    rule = PairRule(config, dict.fromkeys(names, scale))
    pairs = list(rule.pairs(question, Counter()))
    if mode.endswith("levels"):
        for one in question.responses:
            one.ratings = {name: float(round(rating)) for name, rating in one.ratings.items()}
    made = prompted(pairs, config, rule.scales)
    rest = text.tokens(prompt - instruction)
    return Example(
        prompts=[each + rest for each in text.instructions(len(made.instructions), instruction)],
        responses=[text.response(response) for _ in made.used],
        follows=made.follows,
        comparisons=made.comparisons,
        reads=made.reads,
        signs=made.signs,
        ratings=[[nan] * prompts for _ in made.used],
        points=[nan] * prompts,
    )


def one_pair(example: Example, comparison: int) -> Example:
    """Return one pair of a group, with the prompts that its criteria read it under."""
    places, reads = example.comparisons[comparison], example.reads[comparison]
    return replace(
        example,
        responses=[example.responses[place] for place in places],
        follows=[[example.follows[prompt][place] for place in places] for prompt in reads],
        comparisons=[(0, 1)],
        reads=[[*range(len(reads))]],
        signs=[example.signs[comparison]],
        ratings=[example.ratings[place] for place in places],
    )


def has_weights(model: str) -> bool:
    folder = Path(model)
    return not folder.is_dir() or any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def run_head(args: argparse.Namespace, trained: bool) -> dict[str, dict[str, Any]]:
    """Return figures of log-probabilities from hidden states, and their gradients."""
    tokens, size, vocabulary = args.head
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.manual_seed(0)
    hidden = torch.randn(tokens, size, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, size, device=device, dtype=dtype) / size**0.5
    weight.requires_grad_(trained)
    targets = torch.randint(vocabulary, (tokens,), device=device)

    def full() -> Tensor:
        logps = F.linear(hidden, weight).float().log_softmax(-1)
        return logps.gather(-1, targets.unsqueeze(-1)).squeeze(-1)

    def trl_chunked() -> Tensor:
        return _ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 8192)[0]

    def ours() -> Tensor:
        return LinearLogps.apply(hidden, weight, None, targets, 1.0, None)

    inputs = [hidden, weight] if trained else [hidden]
    upstream = torch.randn(tokens, device=device)
    heads = {"full logits": full, "TRL chunked": trl_chunked, "ours": ours}
    entrants = {
        name: Entrant(head, inputs, upstream, "full logits") for name, head in heads.items()
    }
    results = race(entrants, args.repeats, device)
    gradients = sum(tensor.nbytes for tensor in inputs) / 2**30
    for result in results.values():
        if "failed" not in result:
            result["extra_gib"] = result["peak_gib"] - result["before_gib"] - gradients
            result["speedup"] = ratio(results, "full logits", result["seconds"])
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    def label(name: str) -> str:
        layout = results[name].get("layout")
        return f"{name} ({layout})" if layout in ("packed", "tree") and name != "tree" else name

    return markdown(COLUMNS, {label(name): result for name, result in results.items()})


def header(args: argparse.Namespace) -> dict[str, Any]:
    cpus = Path("/proc/cpuinfo").read_text().splitlines()
    random_weights = args.model and not has_weights(args.model)
    return {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "command": " ".join(["python", *sys.argv]),
        "model": f"{args.model} (random weights)" if random_weights else args.model,
        "cpu": next((line.split(": ")[1] for line in cpus if line.startswith("model name")), "?"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if args.device.startswith("cuda") else None,
        "dtype": args.dtype,
        "repeats": args.repeats,
        "instruction tokens": args.instruction,
        "versions": ", ".join(f"{m.__name__} {m.__version__}" for m in (torch, transformers, trl)),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="folder (or cached name) of a causal model")
    add("--shapes", nargs="+", default=["100/50", "250/350", "480/115", "1000/300"])
    add("--prompts", nargs="+", type=int, default=[2, 4, 6], help="K")
    add("--train", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    every = [*VARIANTS, "dpo-chunked", "plain"]
    add("--variants", nargs="+", choices=every, default=VARIANTS)
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--attention", help="attn_implementation, if not the model's default")
    add("--instruction", type=int, default=40, help="tokens of a prompt that are its own")
    add("--repeats", type=int, default=3)
    add("--groups", nargs="+", type=int, default=[], help="N; instead of a pair")
    add("--sample-pairs", type=int, default=6, help="most pairs that run one by one")
    add("--max-tokens", type=int, default=4096, help="of a forward pass of a group in parts")
    add("--threads", type=int)
    shape = "tokens, hidden size, vocabulary: 4096 896 152000 if not given"
    add("--head", nargs="*", type=int, help=f"measure the head alone ({shape})")
    add("--output", type=Path, default=OUTPUT)
    add("--force", action="store_true", help="overwrite the results in --output")
    args = parser.parse_args()
    if args.head == []:
        args.head = [8 * 512, 896, 152_000]
    args.shapes = [tuple(map(int, shape.split("/"))) for shape in args.shapes]
    if not (args.model or args.head):
        parser.error("name a --model, or ask for the --head")
    if min(prompt for prompt, _ in args.shapes) <= args.instruction:
        parser.error("prompts must be longer than --instruction")
    if args.groups and min(args.groups + args.prompts) < 2:
        parser.error("a group has two responses and two prompts at least")
    if min(args.repeats, args.sample_pairs, args.max_tokens) < 1:
        parser.error("--repeats, --sample-pairs and --max-tokens are 1 at least")
    if not args.force and any((args.output / f"step.{end}").exists() for end in ("json", "md")):
        parser.error(f"{args.output} holds results; name another --output, or --force")
    return args


def main() -> None:
    args = parse()
    transformers.utils.logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cpu":
        limit_memory()
    gc.freeze()  # so that collecting before each step looks at little
    args.output.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"header": header(args), "tables": []}
    page = ["# The cost of a training step\n"]
    page += [f"\n- {name}: {value}" for name, value in report["header"].items()]
    page.append("\n\nRows and columns are explained at the top of `benchmarks/step.py`.\n")
    print("".join(page))

    def add(title: str, results: dict[str, dict[str, Any]], **facts: Any) -> None:
        report["tables"].append({"title": title, **facts, "results": results})
        page.append(f"\n## {title}\n\n{table(results)}")
        print(page[-1], flush=True)
        # After every table, so that a run that is cut short leaves what it has.
        (args.output / "step.json").write_text(json.dumps(report, indent=1) + "\n")
        (args.output / "step.md").write_text("".join(page))

    for trained in (False, True) if args.head else ():
        title = "{} head: {} tokens, hidden size {}, vocabulary {}"
        title = title.format("trained" if trained else "frozen", *args.head)
        add(title, run_head(args, trained), trained=trained)
    for train in args.train if args.model else ():
        bench = Bench(args, train)
        for (prompt, response), prompts in product(args.shapes, args.prompts):
            shape = prompt, response, prompts, args.instruction, bench.vocabulary
            facts = {"train": train, "prompt": prompt, "response": response, "prompts": prompts}
            title = f"{train}: prompt {prompt}, response {response}, {prompts} prompts"
            if not args.groups:
                add(title, bench.run(made_up(*shape)), **facts)
            for size, mode in product(args.groups, MODES):
                group = made_up_group(size, mode, *shape)
                pairs = len(group.comparisons)
                of = f"{title}, {size} responses, rating in prompt: {mode}, {pairs} pairs"
                if pairs > args.sample_pairs:
                    of += f" ({args.sample_pairs} of them one by one, extrapolated)"
                facts |= {"group": size, "mode": mode, "pairs": pairs}
                add(of, bench.run_group(group), **facts)
        del bench
        gc.collect()  # models and trainers are cycles
    print(f"\nWritten: {args.output}/step.json, {args.output}/step.md")


if __name__ == "__main__":
    main()
