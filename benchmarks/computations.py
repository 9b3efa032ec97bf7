"""The computations that `step.py` and `gpu_model.py` compare, and how a step of one is measured.

It needs torch, transformers, peft and the package's `objectives` and `model` alone, so that it runs
where axolotl isn't installed. The heads of both scripts say what the variants are.
"""

import ctypes
import gc
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from axolotl_amopo.example import Example, pair
from axolotl_amopo.model.batch import make_batch, responses
from axolotl_amopo.model.choose import Choice, _Attention, choose_layout
from axolotl_amopo.model.forward import TokenLogps, response_logps, teach
from axolotl_amopo.model.head import CHUNK_BYTES
from axolotl_amopo.model.layout import LayoutName, lay_out
from axolotl_amopo.model.parts import Batch, replayed_loss, split_batch
from axolotl_amopo.objectives.amopo import amopo_loss

BETA, GAMMA = 0.8, 2.0


class Entrant(NamedTuple):
    forward: Callable[[], Tensor]
    trained: list[Tensor]
    upstream: Tensor | None = None  # gradient that comes to the forward's value
    reference: str | None = None  # whose value and gradients it must have
    context: Callable[[], AbstractContextManager] = nullcontext  # entered around every step
    timed: bool = True


def race(
    entrants: dict[str, Entrant], repeats: int, device: torch.device, *, tolerant: bool = False
) -> dict[str, dict[str, Any]]:
    """Return figures of all timed entrants.

    Args:
        entrants: a reference stands right before those it is compared with.
        repeats: rounds behind the one that warms up and compares; 0 for numbers alone.
        device: where they run.
        tolerant: whether any error is a result; else being out of memory alone is.
    """
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
            with entrant.context():
                runs[name].append(measure(run, device))
        except Exception as error:  # a case that fails is a result; the others still run
            out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
            if out_of_memory or "can't allocate memory" in str(error):
                results[name]["failed"] = "out of memory"
            elif tolerant:
                results[name]["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            else:
                raise
            return None
        return value[0].detach()

    expected: tuple[str, Tensor, list[Tensor | None]] | None = None
    for name, entrant in entrants.items():  # warms up
        value = step(name)
        if value is not None and value.ndim == 0:
            results[name]["value"] = value.item()
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
        if repeats and "failed" not in results[name]:
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
        "value_difference": ((value - expected).abs().max() / expected.abs().max()).item(),
        "gradient_max_difference": worst / largest,
        "gradient_l2_difference": (norm_of_difference / norm) ** 0.5,
    }


def measure(run: Callable[[], None], device: torch.device) -> tuple[float, float, float]:
    """Return seconds, and bytes in use at the peak and before."""
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


class Text:
    """Made-up tokens."""

    def __init__(self, vocabulary: int, seed: int | str = 0):
        self.rng = random.Random(seed)
        # Special ones stand at the ends.
        self.ids = range(min(100, vocabulary // 10), vocabulary * 9 // 10)

    def tokens(self, count: int) -> list[int]:
        return self.rng.choices(self.ids, k=count)

    def response(self, count: int) -> list[int]:
        """Return a response in which a phrase comes again and again, which makes tokens likely."""
        phrase = self.tokens(12)
        tokens = [phrase + self.tokens(8) for _ in range(count // 20 + 1)]
        return [*chain(*tokens)][:count]

    def instructions(self, count: int, length: int) -> list[list[int]]:
        """Return instructions of which no two begin alike."""
        first = self.rng.sample(self.ids, count)
        return [[token, *self.tokens(length - 1)] for token in first]


class Case(NamedTuple):
    """A pair, for both orders of instruction and question."""

    before: Example
    after: Example


def made_up(prompt: int, response: int, prompts: int, instruction: int, vocabulary: int) -> Case:
    text = Text(vocabulary)
    instructions = text.instructions(prompts, instruction)
    question = text.tokens(prompt - instruction)
    both = [text.response(response), text.response(response)]
    return Case(
        pair([each + question for each in instructions], both),
        pair([question + each for each in instructions], both),
    )


class HeadProducts(torch.autograd.Function):
    """A head's products for M hidden states and their gradients, and nothing else of it.

    Logits, the gradient of the hidden states, and that of a weight that is trained: a product of
    M x V x H each. They are over slices of the vocabulary, so that each slice of the weight's
    gradient is written once. The gradient is not that of anything.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, len(weight), columns := slice_of(hidden)):
            part = weight[start : start + columns]
            logits = torch.mm(hidden, part.t())
            grad_hidden.addmm_(logits, part)
            if grad_weight is not None:
                torch.mm(logits.t(), hidden, out=grad_weight[start : start + columns])
            del logits  # before the next slice's are made
        ctx.save_for_backward(grad_hidden, grad_weight)
        return hidden.new_ones(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return ctx.saved_tensors


def slice_of(hidden: Tensor) -> int:
    """Return for how many words of the vocabulary logits of all hidden states fit a chunk."""
    return max(1, CHUNK_BYTES // (len(hidden) * hidden.element_size()))


class Step(NamedTuple):
    """One way to compute a loss."""

    loss: Callable[[], Tensor]
    tokens: int  # that go through the model, forward and backward
    layout: LayoutName = "sequences"  # whose attention it needs


class Variants:
    """The losses of one model on one example, whose prompts all have one length, as have its
    responses. Autocast is on within them, and off in the backward passes."""

    def __init__(self, rig: "Rig", example: Example, noise: Tensor | None = None):
        self.rig, self.example, self.model = rig, example, rig.model
        self.shape = len(example.comparisons), example.criteria, 2
        if noise is None:  # the draws of the weights
            noise = torch.randn(self.shape, generator=torch.Generator().manual_seed(0))
        self.noise = noise.to(rig.device)  # [P, C, 2]
        self.responses = len(example.responses[0])
        comparisons, criteria, _ = map(range, self.shape)
        sequences = [
            example.prompts[text] + example.responses[response]
            for p in comparisons
            for c in criteria
            for text, response in example.winner_first(p, c)
        ]
        self.ids = torch.tensor(sequences, device=rig.device)  # [P * C * 2, prompt + response]
        self.kept = torch.zeros_like(self.ids[:, 1:], dtype=torch.bool)
        self.kept[:, -self.responses :] = True
        self.batch = rig.batch([example])

    def published(self) -> Tensor:
        """Return the loss of a pair."""
        # What isn't known of it is taken in its favour: softmax and copy without a graph.
        ids, kept = self.ids, self.kept
        mask = torch.ones_like(ids)
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        index = ids[:, 1:].masked_fill(~kept, 0).unsqueeze(-1)
        logps = logits[:, :-1].log_softmax(-1).gather(-1, index).squeeze(-1)
        with torch.no_grad():
            copy = logits.detach().clone()
            self.metrics = copy[0::2].mean().item(), copy[1::2].mean().item()
            probs = logits[:, :-1].softmax(-1).gather(-1, index).squeeze(-1)
            probs = probs[kept].view(len(ids), -1)  # [2K, R]
            scores = probs.mean(-1) + probs.std(-1) * self.noise.flatten()
            weights = (scores[0::2] + scores[1::2]).softmax(0)  # [K]
        rewards = BETA * (logps * kept).sum(-1) / kept.sum(-1)  # [2K]
        losses = -F.logsigmoid(rewards[0::2] - rewards[1::2] - GAMMA)
        return (weights * losses).mean() * len(weights)  # published: the mean

    def plain(self) -> Tensor:
        def logps_of(ids: Tensor) -> Tensor:
            logits = self.model(input_ids=ids[None], use_cache=False).logits[0, :-1].double()
            logps = logits.log_softmax(-1).gather(-1, ids[1:, None])[-self.responses :, 0]
            return logps.float()

        logps = [checkpoint(logps_of, ids, use_reentrant=False) for ids in self.ids]
        logps = torch.stack(logps).view(*self.shape, self.responses)
        return self.loss(logps, torch.ones_like(logps))

    def loss(self, logps: Tensor, mask: Tensor) -> Tensor:
        """Return the loss of log-probabilities [P, C, 2, T], the winner's first."""
        return amopo_loss(logps, mask, beta=BETA, gamma=GAMMA, noise=self.noise).loss

    def judge(self, found: TokenLogps) -> Tensor:
        given = responses(self.batch, found.logps, found.mask)
        return self.loss(given.winner_first(given.logps), given.winner_first(given.mask))

    def ours(self, layout: LayoutName) -> Tensor:
        return self.judge(self.rig.logps(self.batch, layout))

    def in_parts(self, parts: Sequence[Batch], layout: LayoutName) -> Tensor:
        return replayed_loss(
            parts,
            lambda part: self.rig.cast(self.rig.logps, part, layout),
            lambda found: self.rig.cast(self.judge, found),
            lambda share: share().backward(),
        )

    def floor(self, rows: Tensor, head: bool) -> Tensor:
        hidden = self.rig.causal.base_model(input_ids=rows, use_cache=False)[0]
        if not head:
            return hidden.float().square().mean()
        weight = self.rig.causal.get_output_embeddings().weight
        # The places that predict a response's tokens.
        hidden = hidden[:, -2 * self.responses - 1 : -1].flatten(0, 1)  # [2KR, H]
        return HeadProducts.apply(hidden.to(weight.dtype), weight)

    def make(self, name: str, layout: LayoutName) -> Step:
        """Return a variant.

        Args:
            name: `ours`, or one that the scripts' heads explain.
            layout: of `ours` and `one-prompt`.
        """
        if name == "one-prompt":
            return self.parted(split_batch(self.batch, one_prompt=True), layout)
        run: Callable[[], Tensor]
        if name == "ours":
            tokens = self._laid_out(self.batch, layout)
            run = partial(self.ours, layout)
        elif name in ("floor", "floor-head"):
            both = [*chain(*self.example.responses)]
            rows = torch.tensor([[*prompt, *both] for prompt in self.example.prompts])
            tokens, layout = rows.numel(), "sequences"
            run = partial(self.floor, rows.to(self.rig.device), name == "floor-head")
        else:
            tokens, layout = self.ids.numel(), "sequences"
            run = {"published": self.published, "plain": self.plain}[name]
        return Step(partial(self.rig.cast, run), tokens, layout)

    def parted(self, parts: Sequence[Batch], layout: LayoutName) -> Step:
        tokens = sum(self._laid_out(part, layout) for part in parts)
        return Step(partial(self.in_parts, parts, layout), tokens, layout)

    def _laid_out(self, batch: Batch, layout: LayoutName) -> int:
        return lay_out(batch["forest"], layout, batch["pad_to_multiple_of"]).index_RL.numel()


class Rig:
    """A model, trained in full or by an adapter."""

    def __init__(
        self, causal: PreTrainedModel, train: str, device: torch.device, pad_to_multiple_of: int = 1
    ):
        self.causal = self.model = causal
        self.device, self.dtype, self.multiple = device, causal.dtype, pad_to_multiple_of
        if train == "lora":
            adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
            self.model = get_peft_model(causal, adapter)
            for name, parameter in self.model.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(parameter, std=0.01)
        self.model.to(device).eval()  # for dropout's sake; gradients don't care
        teach(self.model)
        config = causal.config.get_text_config()
        self.vocabulary, self.attention = config.vocab_size, str(config._attn_implementation)
        self.own_logits = False

    @property
    def trained(self) -> list[Tensor]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype.itemsize < 4)

    def cast(self, function: Callable, *args: Any) -> Any:
        with self.autocast():
            return function(*args)

    def moved(self, batch: Batch) -> Batch:
        return {k: v.to(self.device) if torch.is_tensor(v) else v for k, v in batch.items()}

    def batch(self, examples: Sequence[Example]) -> Batch:
        return self.moved(make_batch(examples, self.multiple))

    def logps(self, batch: Batch, layout: LayoutName) -> TokenLogps:
        return response_logps(self.model, batch, layout, own_logits=self.own_logits)

    def choose(self, batch: Batch, implementation: str) -> Choice:
        """Return what the proof says of an attention; the model keeps the one that it has."""
        self.causal.set_attn_implementation(implementation)
        try:
            choice = self.cast(choose_layout, self.model, batch, "auto")
        finally:
            self.causal.set_attn_implementation(self.attention)
        return choice

    @contextmanager
    def attending(
        self, layout: LayoutName, implementation: str | None = None, cudnn: bool | None = None
    ) -> Iterator[None]:
        """Give the model the attention that a layout needs, for a while.

        cuDNN's is off for `tree` unless it is asked for, as the trainer has it.
        """
        before = torch.backends.cuda.cudnn_sdp_enabled()
        if cudnn is None:
            cudnn = before and layout != "tree"
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        try:
            self.causal.set_attn_implementation(implementation or self.attention)
            with _Attention(self.causal, layout):
                yield
        finally:
            torch.backends.cuda.enable_cudnn_sdp(before)
            self.causal.set_attn_implementation(self.attention)


def ratio(results: dict[str, dict[str, Any]], name: str, seconds: float) -> float | None:
    above = results.get(name, {}).get("seconds")
    return above / seconds if above else None


def markdown(columns: dict[str, tuple[str, str]], results: dict[str, dict[str, Any]]) -> str:
    """Return a table of Markdown with a row per result; columns that nobody fills are left out.

    Args:
        columns: heading -> key and format.
        results: by the name of the row; a `failed` one says so in its first cell.
    """
    used = {
        heading: column
        for heading, column in columns.items()
        if any(result.get(column[0]) is not None for result in results.values())
    } or dict([*columns.items()][:1])
    rows = [["", *used], *(_cells(name, result, used) for name, result in results.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * (width - 1) + (":" if i else "-") for i, width in enumerate(widths)])
    lines = []
    for row in rows:
        cells = [f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(row)]
        lines.append(f"| {' | '.join(cells)} |\n")
    return "".join(lines)


def _cells(name: str, result: dict[str, Any], used: dict[str, tuple[str, str]]) -> list[str]:
    cells = [
        form.format(result[key]) if result.get(key) is not None else "-"
        for key, form in used.values()
    ]
    cells[0] = result.get("failed", cells[0]).replace("|", "/")
    return [name, *cells]
