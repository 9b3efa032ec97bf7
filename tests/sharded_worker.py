"""One of two processes whose loss and gradients are compared with a single process's.

Every case builds the same tiny model, wraps it as its kind says (ddp, fsdp2, zero3), gives each
process an example of its own, and compares with both examples as plain sequences through the
unwrapped model's own forward, in float64, see `test_layouts`; DeepSpeed makes a model float32. All
cases share one process group: making one takes longer than any of them.

Each process writes FOLDER/RANK.json, {case: what is wrong with it}; before a case too, so that one
that hangs or dies is named.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fork_server import PATIENCE
from test_layouts import (
    EXACT,
    OBJECTIVE,
    VOCABULARY,
    Apart,
    Doubles,
    apart,
    batch_of,
    build,
    gradient_difference,
    pairs,
    relative,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from axolotl_amopo.example import Example
from axolotl_amopo.model import choose
from axolotl_amopo.model import head as logprobs
from axolotl_amopo.model.batch import responses
from axolotl_amopo.model.choose import choose_layout
from axolotl_amopo.model.forward import causal_model, response_logps, teach, unwrap
from axolotl_amopo.objectives import example_losses

LAYOUTS = ("packed", "tree", "sequences")
MODELS = {"untied": "llama", "tied": "qwen2"}
LORA = {"full": None, "lora": "trunk", "lora on the head": "head", "head saved": "saved head"}
# What float32 rounds is 1e-6 of the largest number; a wrong share of a gradient is tenths.
FLOAT32 = 1e-3
# Ten rows of logits a chunk: the two examples have different numbers of chunks.
CHUNK_BYTES = 4 * VOCABULARY * 10
UNFINISHED = "did not end"


@dataclass(frozen=True)
class Case:
    head: str  # of MODELS
    train: str  # of LORA
    checkpointing: bool = False
    how: str = ""  # what else is special about the wrapping
    masked: bool = False  # whether the second process's example has no dimension that counts
    disagree: bool = False  # whether the second process alone finds fault with the packed layout

    def __str__(self) -> str:
        flags = ("checkpointing", "masked", "disagree")
        parts = [self.head, self.train, self.how, *(f for f in flags if getattr(self, f))]
        return ", ".join(filter(None, parts))


def cases(kind: str) -> Iterator[Case]:
    trained = [(head, train) for head in MODELS for train in LORA]
    if kind == "ddp":
        for checkpointing in (False, True):
            yield from (Case(*names, checkpointing) for names in trained)
        yield Case("untied", "full", how="finding unused")
        yield Case("untied", "full", disagree=True)
    if kind == "fsdp2":
        for checkpointing in (False, True):
            yield from (Case(*names, checkpointing, "root") for names in trained)
        for how in ("root kept", "tail", "head"):
            # torch refuses to put a shared parameter into two units.
            yield from (
                Case(*names, how=how) for names in trained if how != "head" or names[0] == "untied"
            )
        yield Case("untied", "full", how="head, prepared last")
    if kind == "zero3":  # the slowest
        yield from (Case("untied", train) for train in LORA)
        yield from (Case(head, train, True) for head in MODELS for train in ("full", "lora"))
        yield Case("tied", "full", how="loaded in shards")
    yield Case("untied", "full", how="root" * (kind == "fsdp2"), masked=True)


def two_examples(masked: bool) -> list[Example]:
    first, second, _ = pairs()
    return [first, replace(second, signs=[[0, 0, 0]]) if masked else second]


@cache
def reference(head: str, train: str, masked: bool) -> Apart:
    """Loss and gradients of both examples in one process."""
    model = build(MODELS[head], "sdpa", LORA[train])
    with Doubles():
        return apart(model, two_examples(masked))


def loss_of(batch: dict, logps: Tensor, mask: Tensor) -> Tensor:
    given = responses(batch, logps, mask)
    return example_losses(OBJECTIVE(given, None), given).mean()


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of every trained parameter; empty where there is none."""
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            grad = torch.empty(0) if parameter.grad is None else parameter.grad
            gradients[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return gradients


@dataclass
class Wrapped:
    """What a training step needs of a wrapped model."""

    model: nn.Module
    backward: Callable[[Tensor], Any]
    gradients: Callable[[], dict[str, Tensor]]  # averaged over the processes, unsharded
    end_step: Callable[[], Any]


def ddp(model: nn.Module, case: Case) -> Wrapped:
    teach(model)
    # To find parameters without a gradient, DDP follows what its forward returns.
    wrapped = DistributedDataParallel(model, find_unused_parameters=case.how == "finding unused")
    return Wrapped(wrapped, Tensor.backward, lambda: whole_gradients(model), wrapped.zero_grad)


def fsdp2(model: nn.Module, case: Case) -> Wrapped:
    """Every layer is a unit, and

    root: the head, the embeddings and the last norm are in the root's, as axolotl has it;
    root kept: the same, and stay gathered until the backward pass;
    tail: the last norm, the head and embeddings tied to it are one unit, as accelerate has it;
    head: the head is a unit of its own, as size-based wrapping has it.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    causal = causal_model(model)
    head = causal.get_output_embeddings()
    last = "prepared last" in case.how
    if not last:
        teach(model)
    for layer in causal.model.layers:
        fully_shard(layer, mesh=mesh)
    if case.how == "tail":
        embeddings = [causal.get_input_embeddings()] if case.head == "tied" else []
        fully_shard([causal.model.norm, *embeddings, head], mesh=mesh, reshard_after_forward=False)
    if case.how.startswith("head"):
        fully_shard(head, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=case.how != "root kept")
    if last:
        teach(model)
    return Wrapped(model, Tensor.backward, lambda: whole_gradients(model), model.zero_grad)


def zero3(folder: Path, model: nn.Module, case: Case) -> Wrapped:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad
    from transformers.integrations import HfDeepSpeedConfig

    # Communication through shared memory, which takes minutes to compile; without it, gloo.
    deepspeed.ops.__compatible_ops__ = {}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 3,
            # Nothing stays gathered because it is small or needed again soon.
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
        },
    }
    if case.how == "loaded in shards":
        path = folder / "model"
        if dist.get_rank() == 0:
            model.save_pretrained(path)
        dist.barrier()
        sharded = HfDeepSpeedConfig(config)  # from_pretrained looks for it as long as it lives
        model = type(model).from_pretrained(path, attn_implementation="sdpa").train()
        del sharded
    teach(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def gradients() -> dict[str, Tensor]:
        named = engine.module.named_parameters()
        return {n: safe_get_full_grad(p) for n, p in named if p.requires_grad}

    return Wrapped(engine, engine.backward, gradients, engine.step)


def run(
    case: Case, wrap: Callable[[nn.Module, Case], Wrapped], dtype: torch.dtype, fault: str
) -> list[str]:
    """What is wrong with a case on this process, with a planted fault or none."""
    wanted = reference(case.head, case.train, case.masked)
    batch = batch_of([two_examples(case.masked)[dist.get_rank()]])
    if fault == "positions" and dist.get_rank() == 1:
        batch["position_ids"][0, -batch["forest"].lengths[-1] :] += 1
    model = build(MODELS[case.head], "sdpa", LORA[case.train], case.checkpointing, dtype)
    wrapped = wrap(model, case)
    exact = dtype == torch.float64
    wrong = []
    if case.how != "loaded in shards" and unwrap(wrapped.model) is not model:
        wrong.append(f"unwrapped to {type(unwrap(wrapped.model)).__name__}")

    # What is checkpointed runs again with it on, see `build`.
    doubles = Doubles() if exact else nullcontext()
    with doubles, finding_fault(case.disagree and dist.get_rank() == 1):
        choice = choose_layout(wrapped.model, batch, "auto", agree=highest)
    if choice[:2] != ("tree" if case.disagree else "packed", False):
        wrong.append(f"chose {choice}")

    # The packed layout needs the attention that its choice has set.
    for layout in LAYOUTS if choice.layout == "packed" else LAYOUTS[1:]:
        # The head's softmax is kept for the backward pass, or made again, which takes its weight.
        again = layout != "tree"
        logprobs.KEPT_BYTES = 0 if again else 2**30
        with head_rows() as forward_rows, Doubles() if exact else nullcontext():
            logps, mask, *_ = response_logps(wrapped.model, batch, layout)
        loss = loss_of(batch, logps, mask)
        if fault == "loss":
            loss = loss * (1 + 0.01 * dist.get_rank())
        with head_rows() as backward_rows:
            wrapped.backward(loss)
        if case.train in ("full", "lora"):  # no adapter on the head: no logits in autograd
            if set(forward_rows) != {VOCABULARY}:
                wrong.append(f"{layout}: the forward saw {forward_rows} of the head's rows")
            if sum(backward_rows) != VOCABULARY * (case.train == "full" and again):
                wrong.append(f"{layout}: the backward saw {backward_rows} of the head's rows")
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        gradients = wrapped.gradients()
        allowed = EXACT if exact else FLOAT32
        if (off := relative(mean, wanted.loss)) > allowed:
            wrong.append(f"{layout}: loss off by {off:.1e}")
        if gradients.keys() != wanted.gradients.keys():
            wrong.append(f"{layout}: gradients of {gradients.keys() ^ wanted.gradients.keys()}")
        elif (off := gradient_difference(gradients, wanted.gradients)) > allowed:
            wrong.append(f"{layout}: gradients off by {off:.1e}")
        wrapped.end_step()
    return wrong


def highest(worst: Tensor) -> Tensor:
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst


@contextmanager
def head_rows() -> Iterator[list[int]]:
    """How many rows the head's weight had, each time that logits were made of it."""
    seen: list[int] = []
    plain = logprobs._logits

    def watched(hidden: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Any:
        seen.append(len(weight))
        return plain(hidden, weight, *rest, **options)

    logprobs._logits = watched
    yield seen
    logprobs._logits = plain


@contextmanager
def finding_fault(here: bool) -> Iterator[None]:
    """Let the proof of the packed layout fail, if only `here`."""
    plain = choose._Proof._logps

    def shifted(self: Any, layout: str, *rest: Any, **options: Any) -> Tensor:
        return plain(self, layout, *rest, **options) + float(here and layout == "packed")

    choose._Proof._logps = shifted
    yield
    choose._Proof._logps = plain


def main(kind: str, folder: str, fault: str = "") -> None:
    """Run all cases of a kind, or the first one with a planted fault."""
    logprobs.CHUNK_BYTES = CHUNK_BYTES
    dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE))
    wrap = {"ddp": ddp, "fsdp2": fsdp2, "zero3": partial(zero3, Path(folder))}[kind]
    path = Path(folder, f"{dist.get_rank()}.json")
    report: dict[str, str] = {}
    dtype = torch.float32 if kind == "zero3" else torch.float64
    for case in islice(cases(kind), 1 if fault else None):
        report[str(case)] = UNFINISHED
        path.write_text(json.dumps(report), encoding="utf-8")
        report[str(case)] = "; ".join(run(case, wrap, dtype, fault))
    path.write_text(json.dumps(report), encoding="utf-8")
    dist.destroy_process_group()
