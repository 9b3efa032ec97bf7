"""What a training step costs: forward and backward of the loss for one pair, no optimizer.

    python benchmarks/step.py --model PATH [--shapes 480/115 ...] [--prompts 2 4 6]
        [--train full lora] [--dtype float32] [--repeats 3] [--variants ...] [--output FOLDER]
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
    after        the same with the instruction after the question, so that all prompts share the
                 question: the same lengths, other prompts, so another loss
    dpo          for scale: TRL's DPOTrainer.compute_loss on the same sequences as K pairs. Policy
                 only: the reference's log-probabilities are computed before, and not measured.
    floor        the bare trunk, causal, over K rows of P + 2R tokens; no head, no preference loss
    dpo-chunked  (only if asked) `dpo` with TRL's chunked head, its use_liger_kernel
    plain        (only if asked) what the differences are taken from: one sequence at a time, run
                 again in the backward pass to save memory. It always runs in the first round. Its
                 log_softmax is in float64: torch's in float32, which `published` has, sums a
                 large vocabulary less exactly on a CPU.

`speed-up` is the time of `published` (of the full logits, for heads) divided by the row's, both
medians over the rounds. `floor/it` is the floor's time divided by the row's: 1 leaves nothing to
gain; `after` can pass 1, running fewer tokens. `real tok/s` counts the pair's 2K(P + R) tokens,
`run tok/s` those that go through the model. `peak` is the most memory during the step: on a CPU the
whole process's, with model and gradients, and `before` is what it had when the step began; on a GPU
what torch allocated. `extra` (heads) is peak minus before minus the gradients. `value diff` is of
the loss (of the log-probabilities, for heads), `grad max` the largest over all trained entries,
each divided by the reference's largest; `grad L2` is the same of norms. In 16 bits they hold the
rounding of both computations.

Dropout is off. With --dtype bfloat16 or float16 the weights have that type and autocast is on, as
axolotl trains. LoRA is of rank 16 on all linear layers of the trunk, its B matrices random, so that
no gradient is zero. A folder that holds no weights runs with random ones.
"""

import argparse
import ctypes
import gc
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rich import box
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import _ChunkedLogProbFunction

from axolotl_amopo.example import pair
from axolotl_amopo.loss import amopo_loss
from axolotl_amopo.model.batch import make_batch
from axolotl_amopo.model.choose import MASKED, _Attention, choose_layout
from axolotl_amopo.model.forward import response_logps, teach
from axolotl_amopo.model.head import LinearLogps
from axolotl_amopo.model.layout import LayoutName, lay_out

OUTPUT = Path(__file__).parents[1] / "build" / "benchmarks"  # git ignores build/
VARIANTS = ["published", "unshared", "tree", "default", "after", "dpo", "floor"]
BETA, GAMMA = 0.8, 2.0
COLUMNS = {
    "speed-up": ("speedup", "{:.2f}"),
    "seconds": ("seconds", "{:.3f}"),
    "floor/it": ("floor_share", "{:.2f}"),
    "real tok/s": ("real_tokens_per_second", "{:.0f}"),
    "run tok/s": ("run_tokens_per_second", "{:.0f}"),
    "peak GiB": ("peak_gib", "{:.2f}"),
    "before GiB": ("before_gib", "{:.2f}"),
    "extra GiB": ("extra_gib", "{:.3f}"),
    "value diff": ("value_difference", "{:.1e}"),
    "grad max": ("gradient_max_difference", "{:.1e}"),
    "grad L2": ("gradient_l2_difference", "{:.1e}"),
}


class Entrant(NamedTuple):
    forward: Callable[[], Tensor]
    trained: list[Tensor]
    upstream: Tensor | None = None  # gradient that comes to the forward's value
    reference: str | None = None  # whose value and gradients it must have
    context: AbstractContextManager = nullcontext()  # entered around every step
    timed: bool = True


def race(entrants: dict[str, Entrant], repeats: int, device: torch.device) -> dict[str, dict]:
    """Figures of all timed entrants. A reference stands right before those it is compared with."""
    results: dict[str, dict[str, Any]] = {name: {} for name in entrants}
    runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in entrants}

    def step(name: str) -> Tensor | None:
        entrant = entrants[name]
        for tensor in entrant.trained:
            tensor.grad = None
        value: list[Tensor] = []

        def run() -> None:
            value.append(entrant.forward())
            value[0].backward(entrant.upstream)

        if "failed" in results[name]:
            return None
        try:
            with entrant.context:
                runs[name].append(measure(run, device))
        except (MemoryError, RuntimeError) as error:
            out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
            if not (out_of_memory or "can't allocate memory" in str(error)):
                raise
            results[name]["failed"] = "out of memory"
            return None
        return value[0].detach()

    expected: tuple[str, Tensor, list[Tensor | None]] | None = None
    for name, entrant in entrants.items():  # warms up
        value = step(name)
        if value is not None and expected and entrant.reference == expected[0]:
            results[name] |= differences(entrant.trained, value, *expected[1:])
        elif value is not None and entrant.reference == name:
            expected = name, value, [tensor.grad for tensor in entrant.trained]
    expected = None
    timed = [name for name, entrant in entrants.items() if entrant.timed]
    for r in range(repeats):
        turned = timed[r % len(timed) :] + timed[: r % len(timed)]
        for name in turned[::-1] if r % 2 else turned:
            step(name)
    for name in timed:
        if "failed" not in results[name]:
            seconds, peaks, befores = zip(*runs[name][1:], strict=True)
            results[name] |= {
                "seconds": statistics.median(seconds),
                "all_seconds": seconds,
                "peak_gib": statistics.median(peaks) / 2**30,
                "before_gib": statistics.median(befores) / 2**30,
            }
    return {name: results[name] for name in timed}


def differences(
    trained: list[Tensor], value: Tensor, expected: Tensor, gradients: list[Tensor | None]
) -> dict[str, float]:
    largest = worst = norm = norm_of_difference = 0.0
    for tensor, gradient in zip(trained, gradients, strict=True):
        if gradient is not None and tensor.grad is not None:  # experts without tokens have none
            difference = tensor.grad.float() - gradient.float()
            largest = max(largest, gradient.abs().max().item())
            worst = max(worst, difference.abs().max().item())
            norm += gradient.float().norm().item() ** 2
            norm_of_difference += difference.norm().item() ** 2
    return {
        "value": value.item() if value.ndim == 0 else None,
        "value_difference": ((value - expected).abs().max() / expected.abs().max()).item(),
        "gradient_max_difference": worst / largest,
        "gradient_l2_difference": (norm_of_difference / norm) ** 0.5,
    }


def measure(run: Callable[[], None], device: torch.device) -> tuple[float, float, float]:
    """Seconds, and bytes in use at the peak and before."""
    gc.collect()
    on_gpu = device.type == "cuda"
    samples: list[int] = []
    done = threading.Event()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier steps left, back to the system
        before = resident()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        except OSError:
            threading.Thread(target=sample, args=(samples, done), daemon=True).start()
    start = time.perf_counter()
    try:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    finally:
        seconds = time.perf_counter() - start
        done.set()
    peak = (
        torch.cuda.max_memory_allocated()
        if on_gpu
        else max(samples, default=0) or resident("VmHWM")
    )
    return seconds, peak, before


def sample(samples: list[int], done: threading.Event) -> None:
    while not done.wait(0.005):
        samples.append(resident())


def resident(name: str = "VmRSS", file: str = "/proc/self/status") -> int:
    lines = Path(file).read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def limit_memory() -> None:
    """Turns an allocation beyond the free memory into an error, which is caught and reported; the
    system would end the process."""
    free = resident("MemAvailable", "/proc/meminfo")
    most = resident("VmData") + int(0.95 * free)
    resource.setrlimit(resource.RLIMIT_DATA, (most, resource.RLIM_INFINITY))


class Case(NamedTuple):
    """A pair's ids, for both orders of instruction and question."""

    before: list[list[int]]  # [K][P]
    after: list[list[int]]  # [K][P]
    responses: list[list[int]]  # [2][R]

    def sequences(self, prompts: list[list[int]]) -> list[list[int]]:
        """[2K][P + R] prompt by prompt, chosen then rejected."""
        return [prompt + response for prompt in prompts for response in self.responses]


def made_up(prompt: int, response: int, prompts: int, instruction: int, vocabulary: int) -> Case:
    rng = random.Random(0)
    ids = range(min(100, vocabulary // 10), vocabulary * 9 // 10)  # special ones stand at the ends

    def respond() -> list[int]:
        phrase = rng.choices(ids, k=12)  # comes again and again, which makes some tokens likely
        tokens = [phrase + rng.choices(ids, k=8) for _ in range(response // 20 + 1)]
        return [*chain(*tokens)][:response]

    first = rng.sample(ids, prompts)  # no two instructions begin alike
    instructions = [[token, *rng.choices(ids, k=instruction - 1)] for token in first]
    question = rng.choices(ids, k=prompt - instruction)
    before = [text + question for text in instructions]
    return Case(before, [question + text for text in instructions], [respond(), respond()])


class Variants:
    """The steps of one model on one case; each gives its loss."""

    def __init__(self, rig: "Rig", case: Case):
        self.rig, self.case, self.model = rig, case, rig.model
        self.prompts, self.responses = len(case.before), len(case.responses[0])
        noise = torch.randn(1, self.prompts, 2, generator=torch.Generator().manual_seed(0))
        self.noise = noise.to(rig.device)  # the draws of the weights
        self.ids = torch.tensor(case.sequences(case.before), device=rig.device)
        self.kept = torch.zeros_like(self.ids[:, 1:], dtype=torch.bool)
        self.kept[:, -self.responses :] = True

    def published(self) -> Tensor:
        # What isn't known of it is taken in its favour: softmax and copy without a graph.
        mask = torch.ones_like(self.ids)
        logits = self.model(input_ids=self.ids, attention_mask=mask, use_cache=False).logits.float()
        index = self.ids[:, 1:].masked_fill(~self.kept, 0).unsqueeze(-1)
        logps = logits[:, :-1].log_softmax(-1).gather(-1, index).squeeze(-1)
        with torch.no_grad():
            copy = logits.detach().clone()
            self.metrics = copy[0::2].mean().item(), copy[1::2].mean().item()
            probs = logits[:, :-1].softmax(-1).gather(-1, index).squeeze(-1)
            probs = probs[self.kept].view(len(self.ids), -1)  # [2K, R]
            scores = probs.mean(-1) + probs.std(-1) * self.noise.flatten()
            weights = (scores[0::2] + scores[1::2]).softmax(0)  # [K]
        rewards = BETA * (logps * self.kept).sum(-1) / self.kept.sum(-1)  # [2K]
        losses = -F.logsigmoid(rewards[0::2] - rewards[1::2] - GAMMA)
        return (weights * losses).mean() * self.prompts  # published: the mean

    def plain(self, prompts: list[list[int]]) -> Tensor:
        def logps_of(sequence: list[int]) -> Tensor:
            ids = torch.tensor([sequence], device=self.rig.device)
            logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1].double()
            logps = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[-self.responses :, 0]
            return logps.float()

        sequences = self.case.sequences(prompts)
        logps = [checkpoint(logps_of, sequence, use_reentrant=False) for sequence in sequences]
        logps = torch.stack(logps).view(1, self.prompts, 2, self.responses)
        return self.loss(logps, torch.ones_like(logps))

    def loss(self, logps: Tensor, mask: Tensor) -> Tensor:
        return amopo_loss(logps, mask, beta=BETA, gamma=GAMMA, noise=self.noise).loss

    def ours(self, batch: dict[str, Any], layout: LayoutName) -> Tensor:
        own_logits = self.rig.choice.own_logits
        made = response_logps(self.model, batch, layout, own_logits=own_logits)
        return self.loss(made.logps, made.mask)

    def dpo(self, batch: dict[str, Tensor], chunked: bool) -> Tensor:
        self.rig.trainer.use_liger_kernel = chunked
        return self.rig.trainer.compute_loss(self.model, batch)

    def dpo_batch(self) -> dict[str, Tensor]:
        chosen, rejected = self.case.responses
        rows = [
            {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
            for prompt in self.case.before
        ]
        batch = self.rig.moved(DataCollatorForPreference(pad_token_id=0)(rows))
        with self.rig.autocast():
            chosen_logps, rejected_logps = self.rig.trainer.compute_ref_log_probs(self.model, batch)
        return batch | {"ref_chosen_logps": chosen_logps, "ref_rejected_logps": rejected_logps}

    def floor(self, rows: Tensor) -> Tensor:
        hidden = self.rig.causal.base_model(input_ids=rows, use_cache=False)[0]
        return hidden.float().square().mean()

    def make(self, name: str) -> tuple[Callable[[], Tensor], int, LayoutName]:
        """Its loss, the tokens it runs, and the layout whose attention it needs."""
        rig, case, every = self.rig, self.case, self.ids.numel()
        if name in ("unshared", "tree", "default", "after"):
            layout = {"unshared": "sequences", "tree": "tree"}.get(name, rig.choice.layout)
            batch = rig.batch(case.after if name == "after" else case.before, case.responses)
            tokens = lay_out(batch["forest"], layout).index_RL.numel()
            return partial(self.ours, batch, layout), tokens, layout
        if name == "floor":
            rows = [[*prompt, *chain(*case.responses)] for prompt in case.before]
            rows = torch.tensor(rows, device=rig.device)
            return partial(self.floor, rows), rows.numel(), "sequences"
        losses = {
            "published": self.published,
            "plain": partial(self.plain, case.before),
            "plain after": partial(self.plain, case.after),
        }
        if name.startswith("dpo"):
            rig.trainer = rig.trainer or dpo_trainer(rig)
            losses[name] = partial(self.dpo, self.dpo_batch(), name == "dpo-chunked")
        return losses[name], every, "sequences"


class ReadyDPOTrainer(trl.DPOTrainer):
    """For rows that are token ids already; the references are computed case by case."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
        return dataset


def dpo_trainer(rig: "Rig") -> trl.DPOTrainer:
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


class Rig:
    """A model, trained in full or by an adapter."""

    def __init__(self, args: argparse.Namespace, train: str):
        self.device, self.dtype = torch.device(args.device), getattr(torch, args.dtype)
        self.trainer: trl.DPOTrainer | None = None
        torch.manual_seed(0)
        options = {"dtype": self.dtype, "attn_implementation": args.attention}
        if has_weights(args.model):
            model = AutoModelForCausalLM.from_pretrained(args.model, **options)
        else:
            config = AutoConfig.from_pretrained(args.model)
            with self.device:
                model = AutoModelForCausalLM.from_config(config, **options)
        self.causal = self.model = model
        if train == "lora":
            adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
            self.model = get_peft_model(model, adapter)
            for name, parameter in self.model.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(parameter, std=0.01)
        self.model.to(self.device).eval()  # for dropout's sake; gradients don't care
        teach(self.model)
        self.vocabulary = self.causal.config.get_text_config().vocab_size
        self.attention = self.causal.config.get_text_config()._attn_implementation
        case = made_up(60, 20, 2, 30, self.vocabulary)
        with self.autocast():
            batch = self.batch(case.before, case.responses)
            self.choice = choose_layout(self.model, batch, "auto")
        self.causal.set_attn_implementation(self.attention)  # it keeps what it chose

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype.itemsize < 4)

    def moved(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {k: v.to(self.device) if torch.is_tensor(v) else v for k, v in batch.items()}

    def batch(self, prompts: list[list[int]], responses: list[list[int]]) -> dict[str, Any]:
        return self.moved(make_batch([pair(prompts, responses)]))

    def run(self, case: Case, names: list[str], repeats: int) -> dict[str, dict[str, Any]]:
        """Figures of the named variants."""
        variants, entrants, made = Variants(self, case), {}, {}
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        free = [name for name in names if name.startswith(("dpo", "floor"))]
        compared = [name for name in names if name not in (*free, "plain", "after")]
        if self.attention not in MASKED and "tree" in compared:
            compared.remove("tree")
        after = ["plain after", "after"] if "after" in names else []
        for name in ["plain", *compared, *after, *free]:
            loss, tokens, layout = made[name] = variants.make(name)
            reference = "plain after" if name in after else None if name in free else "plain"
            entrants[name] = Entrant(
                partial(self._forward, loss),
                trained,
                reference=reference,
                context=_Attention(self.causal, layout),
                timed=name in names,
            )
        results = race(entrants, repeats, self.device)
        real = variants.ids.numel()
        for name, result in results.items():
            _, tokens, result["layout"] = made[name]
            if seconds := result.get("seconds"):
                result["run_tokens"] = tokens
                result["run_tokens_per_second"] = tokens / seconds
                result["real_tokens_per_second"] = real / seconds if name != "floor" else None
                result["floor_share"] = ratio(results, "floor", seconds)
                result["speedup"] = ratio(results, "published", seconds)
        missing = {"failed": f"not under {self.attention}"}
        return {name: results.get(name, missing) for name in names}

    def _forward(self, loss: Callable[[], Tensor]) -> Tensor:
        with self.autocast():
            return loss()


def has_weights(model: str) -> bool:
    folder = Path(model)
    return not folder.is_dir() or any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def ratio(results: dict[str, dict[str, Any]], name: str, seconds: float) -> float | None:
    above = results.get(name, {}).get("seconds")
    return above / seconds if above else None


def run_head(args: argparse.Namespace, trained: bool) -> dict[str, dict[str, Any]]:
    """Log-probabilities from hidden states, and their gradients."""
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


def table(results: dict[str, dict[str, Any]]) -> Table:
    """One of Markdown; columns that nobody fills are left out."""
    columns = {
        heading: (key, form)
        for heading, (key, form) in COLUMNS.items()
        if any(result.get(key) is not None for result in results.values())
    }
    made = Table("", box=box.MARKDOWN)
    for heading in columns:
        made.add_column(heading, justify="right", no_wrap=True)
    for name, result in results.items():
        shared = result.get("layout") in ("packed", "tree") and name != "tree"
        cells = [
            form.format(result[key]) if result.get(key) is not None else "-"
            for key, form in columns.values()
        ]
        cells[0] = result.get("failed", cells[0])
        made.add_row(f"{name} ({result['layout']})" if shared else name, *cells)
    return made


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
    args.output.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"header": header(args), "tables": []}
    console = Console(record=True, width=150)
    console.print("# The cost of a training step\n", highlight=False)
    for name, value in report["header"].items():
        console.print(f"- {name}: {value}", highlight=False, soft_wrap=True)
    console.print("\nRows and columns are explained at the top of `benchmarks/step.py`.")

    def add(title: str, results: dict[str, dict[str, Any]], **facts: Any) -> None:
        report["tables"].append({"title": title, **facts, "results": results})
        console.print(f"\n## {title}", table(results), highlight=False)
        # After every table, so that a run that is cut short leaves what it has.
        (args.output / "step.json").write_text(json.dumps(report, indent=1) + "\n")
        lines = console.export_text(clear=False).splitlines()
        (args.output / "step.md").write_text("".join(f"{line.rstrip()}\n" for line in lines))

    for trained in (False, True) if args.head else ():
        title = "{} head: {} tokens, hidden size {}, vocabulary {}"
        title = title.format("trained" if trained else "frozen", *args.head)
        add(title, run_head(args, trained), trained=trained)
    for train in args.train if args.model else ():
        rig = Rig(args, train)
        for prompt, response in args.shapes:
            for prompts in args.prompts:
                case = made_up(prompt, response, prompts, args.instruction, rig.vocabulary)
                facts = {"train": train, "prompt": prompt, "response": response, "prompts": prompts}
                title = f"{train}: prompt {prompt}, response {response}, {prompts} prompts"
                add(title, rig.run(case, args.variants, args.repeats), **facts)
        del rig
        gc.collect()  # models and trainers are cycles
    print(f"\nWritten: {args.output}/step.json, {args.output}/step.md")


if __name__ == "__main__":
    main()
