"""A batch's layouts: what stands where, and that all of them give the numbers of plain sequences.

The reference is as slow and obvious as can be: every sequence by itself, without padding, through
the model's own forward, the log-softmax of its whole logits, and AMoPO's formula for one pair after
the other. Both sides compute in float64, so that rounding is a thousand times smaller than what is
allowed, on any machine, and what is allowed a million times smaller than any fault.
"""

import copy
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_mask
from torch.overrides import TorchFunctionMode
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    JambaConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
)

from axolotl_amopo.errors import AMoPOError
from axolotl_amopo.example import Example, pair
from axolotl_amopo.model import attention, choose, forward
from axolotl_amopo.model.attention import attention_inputs, packed_name
from axolotl_amopo.model.batch import make_batch, responses
from axolotl_amopo.model.choose import Choice, candidates, cannot_share, choose_layout
from axolotl_amopo.model.forest import MIN_SHARED_BEGINNING, Forest
from axolotl_amopo.model.forward import causal_model, response_logps, teach, unwrap
from axolotl_amopo.model.head import LinearLogps
from axolotl_amopo.model.layout import lay_out
from axolotl_amopo.model.parts import replayed_loss, split_batch
from axolotl_amopo.objectives import AMoPO, example_losses

VOCABULARY = 300
SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,  # far from uniform, so that a wrong token or position shows
    "pad_token_id": 0,
}
WINDOW = 14  # shorter than most sequences below
CONFIGS = {
    "llama": LlamaConfig(**SIZE),
    "qwen2": Qwen2Config(**SIZE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZE, head_dim=8),
    "mistral": MistralConfig(**SIZE, head_dim=8, sliding_window=WINDOW),
    "gemma3": Gemma3TextConfig(
        **SIZE,
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        final_logit_softcapping=4.0,
    ),
    "granite": GraniteConfig(**SIZE, logits_scaling=3.0),
}
RECURRENT = {
    "jamba": JambaConfig(
        **SIZE,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=1,
        num_experts_per_tok=1,
    ),
    "mamba": MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0
    ),
}
LAYOUTS = ("packed", "tree", "sequences")
MASKED_KERNELS = ("flex_attention", "sdpa")
# The largest difference that may be, relative to the largest number of its kind.
EXACT = 1e-9
BETA, GAMMA = 2.0, 0.5
OBJECTIVE = AMoPO(beta=BETA, gamma=GAMMA, weighting="mean")


class Doubles(TorchFunctionMode):
    """Reads float32 as float64 where a model's code names it: in norms, softmax and rotations.

    It is off in a backward pass; what checkpoints run again there enters it by itself, see `build`.
    """

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        def wider(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if function is Tensor.float:
            function = Tensor.double
        named = {name: wider(value) for name, value in (kwargs or {}).items()}
        return function(*map(wider, args), **named)


# Examples.


def ids(seed: int, *lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def judged(prompts: list, answers: list, signs: list[int]) -> Example:
    """A pair that each prompt's criterion judges as its sign says."""
    return replace(pair(prompts, answers), signs=[signs])


def pairs() -> list[Example]:
    """Odd lengths; prompts with a common beginning, with a question in common, with nothing."""
    beginning, question = ids(1, 21, 40)
    a, b, c = ids(2, 7, 12, 3)
    return [
        judged([beginning + a, beginning + b, c], ids(3, 9, 14), [1, -1, 0]),
        judged([question + a, question + b, question + c], ids(4, 11, 1), [1, 1, -1]),
        judged(ids(5, 27, 22, 15), ids(6, 3, 31), [-1, 1, 1]),
    ]


def own_ratings() -> list[Example]:
    """Each response under a text with its own rating."""
    beginning, *ends = ids(7, 18, 4, 5, 6, 7)
    example = judged([beginning + ends[0], beginning + ends[2]], ids(8, 6, 10), [1, -1])
    texts = [beginning + end for end in ends]
    return [replace(example, prompts=texts, follows=[[0, 1], [2, 3]])]


def groups() -> list[Example]:
    """Three responses in three pairs, two in one, and three under texts with their own ratings."""
    (question,) = ids(9, 23)
    a, b, *ends = ids(10, 5, 8, 3, 4, 6)
    group = replace(
        pair([question + a, question + b], ids(11, 7, 12, 9)),
        follows=[[0, 0, 0], [1, 1, 1]],
        comparisons=[(0, 1), (0, 2), (2, 1)],
        reads=[[0, 1]] * 3,
        signs=[[1, -1], [1, 0], [-1, 1]],
    )
    rated = replace(
        group,
        prompts=[question + end for end in ends],
        follows=[[0, 1, 2]] * 2,
        comparisons=[(0, 1), (0, 2), (2, 1)],
        signs=[[1, 1], [0, 0], [1, 1]],
    )
    two = judged([question + a, question + b], ids(12, 4, 9), [1, -1])
    return [group, two, rated]


def equal_prompts() -> list[Example]:
    """Criteria that read the same text: as prompts of their own, and as one; some of them alone."""
    (question,) = ids(13, 24)
    a, b = ids(14, 6, 9)
    four = replace(
        judged([question] * 4, ids(15, 8, 5), [1, -1, 1, 0]),
        prompts=[question],
        follows=[[0, 0]] * 4,
    )
    one = replace(four, follows=[[0, 0]], reads=[[0, 0, 0, 0]])
    some = replace(
        judged([a] * 4, ids(16, 7, 10), [-1, 1, 1, -1]),
        prompts=[question + a, question + b],
        follows=[[1, 1], [0, 0], [1, 1], [0, 1]],
    )
    return [four, one, some]


EXAMPLES = {
    "pairs": pairs,
    "own ratings": own_ratings,
    "groups": groups,
    "equal prompts": equal_prompts,
}


def batch_of(examples: list[Example]) -> dict[str, Any]:
    return make_batch(examples, pad_to_multiple_of=8)


# The reference.


class Apart(NamedTuple):
    """What plain sequences give."""

    logps: dict[tuple[int, int, int], Tensor]  # by example, prompt, response; one per token
    loss: Tensor
    gradients: dict[str, Tensor]


def apart(model: nn.Module, examples: list[Example]) -> Apart:
    """Every response under every prompt that a criterion reads it under, one at a time."""
    logps: dict[tuple[int, int, int], Tensor] = {}

    def logps_of(*place: int) -> Tensor:
        b, prompt, n = place
        if place not in logps:
            example = examples[b]
            before = example.prompts[example.follows[prompt][n]]
            ids = torch.tensor([before + example.responses[n]])
            logits = model(input_ids=ids, use_cache=False).logits[0, len(before) - 1 : -1]
            every = logits.log_softmax(-1)
            logps[place] = torch.stack(
                [every[t, token] for t, token in enumerate(example.responses[n])]
            )
        return logps[place]

    losses = []
    for b, example in enumerate(examples):
        of_pairs = []
        for (first, second), prompts, signs in zip(
            example.comparisons, example.reads, example.signs, strict=True
        ):
            pair_losses, scores = [torch.zeros(())], [torch.tensor(-torch.inf)]
            for prompt, sign in zip(prompts, signs, strict=True):
                if sign:
                    won, lost = (first, second) if sign > 0 else (second, first)
                    chosen, rejected = logps_of(b, prompt, won), logps_of(b, prompt, lost)
                    margin = BETA * (chosen.mean() - rejected.mean())
                    pair_losses.append(-F.logsigmoid(margin - GAMMA))
                    scores.append((chosen.exp().mean() + rejected.exp().mean()).detach())
            weights = torch.stack(scores).softmax(0).nan_to_num()
            of_pairs.append((weights * torch.stack(pair_losses)).sum())
        losses.append(torch.stack(of_pairs).mean())
    loss = torch.stack(losses).mean()
    model.zero_grad()
    loss.backward()
    return Apart(logps, loss.detach(), gradients_of(model))


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@cache
def expected(name: str, lora: str | None, which: str) -> Apart:
    model = build(name, "eager" if name == "mamba" else "sdpa", lora)
    with Doubles():
        return apart(model, EXAMPLES[which]())


def build(
    name: str,
    attention: str,
    lora: str | None = None,
    checkpointing: bool = False,
    dtype: torch.dtype = torch.float64,
):
    torch.manual_seed(0)
    config = copy.deepcopy((CONFIGS | RECURRENT)[name])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).float()
    if lora:
        options = {
            "trunk": {"target_modules": "all-linear"},
            "head": {"target_modules": ["q_proj", "lm_head"]},
            "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        }[lora]
        model = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **options))
    if checkpointing:
        contexts = {"context_fn": lambda: (nullcontext(), Doubles())} if dtype.itemsize > 4 else {}
        causal_model(model).gradient_checkpointing_enable({"use_reentrant": False} | contexts)
        causal_model(model).enable_input_require_grads()
    return model.to(dtype).train()


def differences(
    name: str,
    layout: str,
    which: str = "pairs",
    *,
    attention: str = "sdpa",
    lora: str | None = None,
    checkpointing: bool = False,
    own_logits: bool = False,
) -> dict[str, float]:
    """How far a layout's log-probabilities, loss and gradients are from those of sequences."""
    wanted, examples = expected(name, lora, which), EXAMPLES[which]()
    model = build(name, attention, lora, checkpointing)
    teach(model)
    batch = batch_of(examples)
    with Doubles(), choose._Attention(causal_model(model), layout):
        logps, mask, *_ = response_logps(model, batch, layout, own_logits=own_logits)
        given = responses(batch, logps, mask)
        loss = example_losses(OBJECTIVE(given, None), given).mean()
        loss.backward()
    assert logps.dtype == loss.dtype == torch.float64
    gradients = gradients_of(model)
    assert gradients.keys() == wanted.gradients.keys()
    assert gradients.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    logps = logps.detach()
    assert_places(logps, mask, examples, wanted)
    return {
        "logps": max(
            relative(logps[place][: len(of_tokens)], of_tokens.detach())
            for place, of_tokens in wanted.logps.items()
        ),
        "loss": relative(loss.detach(), wanted.loss),
        "gradients": gradient_difference(gradients, wanted.gradients),
    }


def assert_places(logps: Tensor, mask: Tensor, examples: list[Example], wanted: Apart) -> None:
    """What is read is there, and the rest is empty; prompts of one text are filled together."""

    def text(b: int, prompt: int, n: int) -> tuple[int, int, int]:
        return b, examples[b].follows[prompt][n], n

    assert mask.shape == (
        len(examples),
        max(len(example.follows) for example in examples),
        max(len(example.responses) for example in examples),
        max(map(len, wanted.logps.values())),
    )
    assert logps[~mask].eq(0).all()
    read = {text(*place) for place in wanted.logps}
    for b, example in enumerate(examples):
        for prompt, follows in enumerate(example.follows):
            for n, _ in enumerate(follows):
                tokens = len(example.responses[n]) if text(b, prompt, n) in read else 0
                assert mask[b, prompt, n].tolist() == [t < tokens for t in range(mask.shape[-1])]
            assert not mask[b, prompt, len(follows) :].any()
        assert not mask[b, len(example.follows) :].any()


def relative(got: Tensor, wanted: Tensor, least: float = 0.0) -> float:
    return ((got - wanted).abs().max() / wanted.abs().max().clamp(min=least)).item()


def gradient_difference(gradients: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The worst parameter's. One whose gradient is 0 but for rounding, such as the bias of keys,
    is measured by the others."""
    least = 1e-3 * max(gradient.abs().max().item() for gradient in wanted.values())
    return max(relative(gradients[name], wanted[name], least) for name in wanted)


def check(*args: Any, **options: Any) -> None:
    found = differences(*args, **options)
    assert max(found.values()) < EXACT, found


# What stands where.


def test_a_forest_by_hand():
    shared = list(range(100, 100 + MIN_SHARED_BEGINNING))
    example = judged([[*shared, 1, 2], [*shared, 3]], [[20, 21], [30, 31, 32]], [1, -1])
    forest, tokens = Forest.of([example])
    assert forest.parents == [-1, 0, 1, 1, 0, 4, 4]
    assert forest.lengths == [len(shared), 2, 2, 3, 1, 3, 2]
    assert tokens == [*shared, 1, 2, 20, 21, 30, 31, 32, 3, 30, 31, 32, 20, 21]
    assert [tuple(leaf) for leaf in forest.leaves] == [
        (2, 0, 0, (0,)), (3, 0, 1, (0,)), (5, 0, 1, (1,)), (6, 0, 0, (1,)),
    ]  # fmt: skip
    batch = make_batch([example])
    n = len(shared)
    assert batch["position_ids"].tolist() == [
        [
            *range(n),
            n,
            n + 1,
            n + 2,
            n + 3,
            n + 2,
            n + 3,
            n + 4,
            n,
            *range(n + 1, n + 4),
            n + 1,
            n + 2,
        ]
    ]
    assert batch["labels"].tolist() == [
        [-100] * (n + 2) + [20, 21, 30, 31, 32, -100, 30, 31, 32, 20, 21]
    ]


def test_what_objectives_read_of_a_batch():
    group, two, _ = groups()
    group = replace(group, ratings=[[1.0, 0.5]] * 3, points=[4.0, 2.0], id=7)
    two = replace(two, ratings=[[0.25, math.nan], [0.0, 0.75]], points=[1.0, 1.0], id=8)
    batch = make_batch([group, two])
    # transformers takes the number of examples from the first one.
    assert next(iter(batch.values())).tolist() == [7, 8]
    assert batch["comparisons"].tolist() == [[0, 0, 1], [0, 0, 2], [0, 2, 1], [1, 0, 1]]
    assert batch["reads"].tolist() == [[0, 1]] * 4
    assert batch["signs"].tolist() == [[1, -1], [1, 0], [-1, 1], [1, -1]]
    nan = math.nan
    assert batch["ratings"].numpy() == pytest.approx(
        torch.tensor([[[1, 0.5]] * 3, [[0.25, nan], [0, 0.75], [nan, nan]]]).numpy(), nan_ok=True
    )
    assert batch["points"].tolist() == [[4, 2], [1, 1]]
    assert batch["counts"].tolist() == [1, 1]

    # Numbers that name their place: 1000 * example + 100 * prompt + 10 * response + token.
    sizes = (2, 2, 3, 5)
    places = torch.stack(torch.meshgrid(*map(torch.arange, sizes), indexing="ij"), dim=-1)
    logps = (places * torch.tensor([1000, 100, 10, 1])).sum(-1).float()
    given = responses(batch, logps, torch.ones(sizes, dtype=torch.bool))
    won_and_lost = given.winner_first(logps)  # [P, C, 2, T]
    assert won_and_lost.shape == (4, 2, 2, 5)
    assert (won_and_lost - torch.arange(5)).eq(won_and_lost[..., :1]).all()
    assert won_and_lost[..., 0].tolist() == [
        [[0, 10], [110, 100]],
        [[0, 20], [100, 120]],
        [[10, 20], [120, 110]],
        [[1000, 1010], [1110, 1100]],
    ]
    assert given.ids.tolist() == [7, 8]


@pytest.mark.parametrize(("layout", "shape"), [("tree", (2, 32)), ("sequences", (4, 24))])
def test_padding_is_to_a_multiple(layout, shape):
    forest, _ = Forest.of([pair(ids(1, 12, 11), ids(2, 9, 4))])
    laid = lay_out(forest, layout, 8)
    assert laid.index_RL.shape == shape
    sees = laid.sees_RSS[0]
    if layout == "tree":  # prompt, chosen, rejected, padding
        assert sees.tolist() == [
            [True, False, False, False],
            [True, True, False, False],
            [True, False, True, False],
            [False, False, False, True],
        ]


def tokens_run(example: Example, layout: str) -> int:
    forest, _ = Forest.of([example])
    return int((lay_out(forest, layout).index_RL >= 0).sum())


def test_token_counts():
    """What a layout runs, for K prompts of P tokens and two responses of R."""
    question, *instructions = ids(1, 200, 20, 20, 20)
    answers = ids(2, 30, 30)
    before = pair([instruction + question for instruction in instructions], answers)
    after = pair([question + instruction for instruction in instructions], answers)
    for example in (before, after):
        assert tokens_run(example, "sequences") == 2 * 3 * (220 + 30)
    for layout in ("tree", "packed"):
        assert tokens_run(before, layout) == 3 * (220 + 2 * 30)
        assert tokens_run(after, layout) == 200 + 3 * (20 + 2 * 30)


@pytest.mark.parametrize(("prompt", "response", "count"), [(480, 115, 710), (250, 350, 950)])
@pytest.mark.parametrize("layout", ["tree", "packed"])
def test_equal_prompts_run_once(prompt, response, count, layout):
    """Whether four criteria read one prompt, or four prompts that are one text."""
    (text,), answers = ids(1, prompt), ids(2, response, response)
    of_their_own = replace(
        pair([text] * 4, answers), prompts=[text], follows=[[0] * len(answers)] * 4
    )
    one = replace(of_their_own, follows=[[0, 0]], reads=[[0, 0, 0, 0]])
    for example in (of_their_own, one):
        assert tokens_run(example, layout) == count
        (first, second) = Forest.of([example])[0].leaves
        assert first.prompts == second.prompts == tuple(range(len(example.follows)))
        assert tokens_run(example, "sequences") == 2 * (prompt + response)


def test_what_no_criterion_reads_is_not_run():
    example = pair(ids(1, 10, 11), ids(2, 3, 4))
    some, none = replace(example, signs=[[0, 1]]), replace(example, signs=[[0, 0]])
    forest, _ = Forest.of([some, none])
    # An example in which none says anything keeps a prompt, so that every process has work to do.
    assert [(leaf.example, leaf.prompts) for leaf in forest.leaves] == [
        (0, (1,)), (0, (1,)), (1, (0,)), (1, (0,)),
    ]  # fmt: skip


def test_tokens_count_under_every_prompt_that_they_run_under():
    """Those of RiC's loss: its mask, summed over prompts."""
    model = build("llama", "sdpa", dtype=torch.float32)
    teach(model)
    for which in ("groups", "equal prompts"):
        batch = make_batch(EXAMPLES[which](), token_counts=True)
        mask = response_logps(model, batch, "sequences").mask
        assert batch["counts"].tolist() == mask.sum((1, 2, 3)).tolist()
        assert batch_of(EXAMPLES[which]())["counts"].tolist() == [1.0] * len(mask)


def test_a_prompt_that_begins_another_keeps_a_token_of_its_own():
    prompt, more = ids(1, 40, 3)
    forest, _ = Forest.of([pair([prompt, prompt + more], ids(2, 3, 4))])
    assert [forest.lengths[i] for i in (0, 1, 4)] == [39, 1, 4]
    assert [forest.parents[i] for i in (0, 1, 4)] == [-1, 0, 0]


def test_a_group_has_each_response_once_under_a_text():
    group, two, rated = (Forest.of([example])[0] for example in groups())
    assert len(group.leaves) == 3 * 2 and group.responses == 3
    assert sorted(group.lengths[leaf.segment] for leaf in group.leaves) == [7, 7, 9, 9, 12, 12]
    assert len(two.leaves) == 2 * 2
    # Both of its prompts have the same text for a response.
    assert [leaf.prompts for leaf in rated.leaves] == [(0, 1)] * 3


# Equality.


@pytest.mark.parametrize("lora", [None, "trunk"], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed(name, checkpointing, lora):
    check(name, "packed", lora=lora, checkpointing=checkpointing)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("lora", "checkpointing"), [(None, False), ("trunk", True)])
@pytest.mark.parametrize("name", CONFIGS)
def test_tree(name, lora, checkpointing, attention):
    check(name, "tree", attention=attention, lora=lora, checkpointing=checkpointing)


@pytest.mark.parametrize(("lora", "checkpointing"), [(None, False), ("trunk", True)])
@pytest.mark.parametrize("name", CONFIGS)
def test_sequences(name, lora, checkpointing):
    check(name, "sequences", lora=lora, checkpointing=checkpointing)


@pytest.mark.parametrize("name", RECURRENT)
def test_sequences_of_recurrent_models(name):
    check(name, "sequences", attention="eager" if name == "mamba" else "sdpa")


@pytest.mark.parametrize("which", ["own ratings", "groups", "equal prompts"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_examples(layout, name, which):
    check(name, layout, which)


@pytest.mark.parametrize("name", ["llama", "gemma3", "granite"])
def test_the_models_own_logits(name):
    check(name, "sequences", own_logits=True)


@pytest.mark.parametrize("lora", ["head", "saved head"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "granite"])
def test_an_adapted_head(name, lora):
    check(name, "packed", lora=lora)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loss_of_a_router_is_the_models_own(layout):
    """A mixture of experts' auxiliary loss, where its config asks for it, without padding."""
    torch.manual_seed(0)
    options = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 3.0}
    config = MixtralConfig(**SIZE, **options, output_router_logits=True)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    teach(model)
    example = pair(ids(1, 12, 12), ids(2, 9, 9))

    def router_loss(layout: str, multiple: int, own_logits: bool = False) -> Tensor | None:
        batch = make_batch([example], pad_to_multiple_of=multiple)
        with choose._Attention(model, layout):
            return response_logps(model, batch, layout, own_logits=own_logits).router_loss

    rows = [example.prompts[text] + example.responses[n] for text, n in example.places()]
    wanted = 3.0 * model(input_ids=torch.tensor(rows)).aux_loss
    if layout == "sequences":  # the same tokens
        assert router_loss(layout, 1).item() == pytest.approx(wanted.item(), rel=1e-5)
        assert router_loss(layout, 1, True).item() == pytest.approx(wanted.item(), rel=1e-5)
    loss = router_loss(layout, 1)
    padded = router_loss(layout, 64)
    assert padded.item() == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    assert model.model.layers[0].mlp.gate.weight.grad.abs().max() > 1e-3
    assert choose_layout(model, batch_of([example]), "auto").layout == "packed"
    for quiet in ({"output_router_logits": False}, {"router_aux_loss_coef": 0.0}):
        silent = AutoModelForCausalLM.from_config(MixtralConfig(**SIZE, **(options | quiet)))
        teach(silent)
        assert response_logps(silent, batch_of([example])).router_loss is None


def test_a_group_is_its_pairs_one_by_one():
    """The same batch but for what it shares: a row per comparison, then their mean."""
    model = build("llama", "sdpa")
    teach(model)
    (group, *_), losses = groups(), []
    singles = [
        replace(group, comparisons=[places], reads=[reads], signs=[signs])
        for places, reads, signs in zip(group.comparisons, group.reads, group.signs, strict=True)
    ]
    for examples in ([group], singles):
        batch = batch_of(examples)
        with Doubles():
            given = responses(batch, *response_logps(model, batch, "tree")[:2])
            losses.append(example_losses(OBJECTIVE(given, None), given).mean())
    together, one_by_one = losses
    assert together.item() == pytest.approx(one_by_one.item(), rel=EXACT)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "kernels-community/flash-attn2"])
def test_variable_length_kernel(implementation, monkeypatch):
    """transformers' FlashAttention path, with a kernel that does what the real one documents
    (https://github.com/Dao-AILab/flash-attention, flash_attn_varlen_func), as no GPU is here."""
    from transformers import modeling_flash_attention_utils as flash

    def kernel(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
        softmax_scale=None, causal=False, window_size=(-1, -1),
    ):  # fmt: skip
        assert causal
        outputs = []
        for i in range(len(cu_seqlens_q) - 1):
            query = q[cu_seqlens_q[i] : cu_seqlens_q[i + 1]].transpose(0, 1)
            keys, values = (
                x[cu_seqlens_k[i] : cu_seqlens_k[i + 1]].transpose(0, 1).repeat_interleave(2, 0)
                for x in (k, v)
            )
            nq, nk = query.shape[1], keys.shape[1]
            assert nq <= max_seqlen_q
            assert nk <= max_seqlen_k
            scores = query @ keys.transpose(1, 2) * softmax_scale
            distance = torch.arange(nq)[:, None] + nk - nq - torch.arange(nk)
            seen = distance >= 0
            if window_size[0] >= 0:
                seen &= distance <= window_size[0]
            outputs.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values)
        return torch.cat(outputs, 1).transpose(0, 1)

    functions = (None, kernel, None, None, None)
    process = flash._lazy_define_process_function(kernel)
    monkeypatch.setattr(
        flash, "lazy_import_flash_attention", lambda _: (functions, (process, dict))
    )
    varlen = packed_name(implementation)
    monkeypatch.setattr(choose, "packed_name", lambda _: varlen)
    for name in ("llama", "mistral", "gemma3"):
        check(name, "packed")


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_torchs_variable_length_kernel(name, monkeypatch):
    """What a GPU runs for SDPA, with a kernel that does what torch documents of its own."""

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert enable_gqa and window_size[1] == 0  # causal
        assert [t.dtype for t in (cu_q, cu_k)] == [torch.int32] * 2
        left = window_size[0] if window_size[0] >= 0 else VOCABULARY
        outputs = []
        for i, (query, keys) in enumerate(torch.stack([cu_q, cu_k]).diff().t().tolist()):
            assert query <= max_q and keys <= max_k
            part = q[cu_q[i] : cu_q[i + 1]].transpose(0, 1)
            of_keys = slice(cu_k[i], cu_k[i + 1])
            distance = torch.arange(query)[:, None] + keys - query - torch.arange(keys)
            outputs.append(
                F.scaled_dot_product_attention(
                    part,
                    k[of_keys].transpose(0, 1),
                    v[of_keys].transpose(0, 1),
                    attn_mask=(distance >= 0) & (distance <= left),
                    scale=scale,
                    enable_gqa=True,
                )
            )
        return torch.cat(outputs, dim=1).transpose(0, 1)

    monkeypatch.setattr(attention, "varlen_attn", kernel)

    def packed(module, query, key, value, mask, amopo_forest=None, **kwargs):
        window, scaling = kwargs.get("sliding_window"), kwargs["scaling"]
        made = attention.packed_varlen(module, query, key, value, amopo_forest, window, scaling)
        return made, None

    AttentionInterface.register("amopo_packed_on_a_gpu", packed)
    monkeypatch.setattr(choose, "packed_name", lambda _: "amopo_packed_on_a_gpu")
    check(name, "packed")


def test_values_narrower_than_queries_are_padded(monkeypatch):
    """Multi-head latent attention has such; kernels want one size.

    The kernel takes what torch 2.11's takes, which has no `enable_gqa`."""

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size):
        return v[: len(q)]

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    query, value = torch.randn(1, 4, 6, 8).half(), torch.randn(1, 4, 6, 5).half()
    forest = attention.PackedForest(Forest.of([pair([[1, 2]], [[3], [4, 5]])])[0], padding=1)
    places, _ = forest.varlen(query.device)
    assert forest.lengths == [2, 1, 2, 1] and forest.paths[-1] == [3]
    made = attention.packed_varlen(nn.Linear(1, 1), query, query, value, forest, None, 1.0)
    assert made.equal(value[:, :, places[:6]].transpose(1, 2))


def test_a_mask_of_one_row_per_example_is_not_too_large():
    """Eleven prompts that share a question: a fifth of the tokens more, a fifth of the mask."""
    (question,), answers = ids(1, 1000), ids(2, 1000, 1000)
    prompts = [question + instruction for instruction in ids(3, *[20] * 11)]
    assert len(lay_out(Forest.of([pair(prompts, answers)])[0], "tree").index_RL) == 11
    short = pair([p[600:] for p in prompts[:4]], ids(4, 60, 50))
    assert len(lay_out(Forest.of([short])[0], "tree").index_RL) == 1


def test_flex_attention_gets_the_same_mask():
    model = build("gemma3", "flex_attention")
    batch = batch_of(pairs())
    laid = lay_out(batch["forest"], "tree", 8)
    positions = batch["position_ids"][0][laid.index_RL.clamp(min=0)]
    masks = {}
    for implementation in ("flex_attention", "sdpa"):
        model.config._attn_implementation = implementation
        inputs = attention_inputs(laid, positions, model.config, torch.float32)
        masks[implementation] = inputs["attention_mask"]
    assert set(masks["sdpa"]) == {"full_attention", "sliding_attention"}
    for kind, dense in masks["sdpa"].items():
        block_mask = masks["flex_attention"][kind]
        rows_R, _, length, _ = dense.shape
        made = create_mask(block_mask.mask_mod, rows_R, None, length, length, device="cpu")
        assert made.equal(dense)
    assert not masks["sdpa"]["full_attention"].equal(masks["sdpa"]["sliding_attention"])


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_flex_attention():
    """Same numbers; batches of one size are not compiled anew, whatever their forests are.

    Forward alone, and sizes stay: on a CPU, torch 2.14 has no backward pass for it, and can't
    compile it for a size that changes (its code for that is not C++).
    """
    flex, sdpa = (build("gemma3", name, dtype=torch.float32).eval() for name in MASKED_KERNELS)
    teach(flex)
    teach(sdpa)
    graphs = []
    for seed, lengths in enumerate([(20, 12, 9, 4), (23, 9, 7, 6), (17, 15, 5, 8)]):
        prompt, other, *answers = lengths
        example = pair(ids(seed, prompt, other), ids(seed + 9, *answers))
        batch = make_batch([example], pad_to_multiple_of=64)
        with torch.no_grad():
            made, wanted = (response_logps(m, batch, "tree").logps for m in (flex, sdpa))
        assert (made - wanted).abs().max() < 1e-4
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [graphs[0]] * 3


# Planted faults: each must be far outside of what the comparison allows.


def in_layouts(change: Callable[[Any], dict[str, Any]], patch: pytest.MonkeyPatch) -> None:
    """Change fields of each layout."""
    plain = forward.lay_out

    def lay_out(*args: Any) -> Any:
        laid = plain(*args)
        return replace(laid, **change(laid))

    patch.setattr(forward, "lay_out", lay_out)


def transposed(laid: Any) -> dict[str, Any]:
    return {"sees_RSS": laid.sees_RSS.transpose(1, 2)}


def all_before(laid: Any) -> dict[str, Any]:
    return {"sees_RSS": torch.ones_like(laid.sees_RSS)}


def one_too_early(laid: Any) -> dict[str, Any]:
    return {"predict_M": laid.predict_M - 1}


def next_target(laid: Any) -> dict[str, Any]:
    return {"targets_M": laid.targets_M.roll(1)}


def backwards(laid: Any) -> dict[str, Any]:
    """Every response's numbers are there, in one another's places."""
    return {"sources_S": laid.sources_S.flip(0)}


def positions(patch: pytest.MonkeyPatch) -> None:
    """The last segment's are one too high."""
    plain = forward.response_logps

    def shifted(model: nn.Module, batch: dict, *rest: Any, **options: Any) -> Any:
        last = torch.arange(batch["position_ids"].shape[1]) >= (
            batch["position_ids"].shape[1] - batch["forest"].lengths[-1]
        )
        return plain(
            model, batch | {"position_ids": batch["position_ids"] + last}, *rest, **options
        )

    patch.setitem(globals(), "response_logps", shifted)


def later_responses(patch: pytest.MonkeyPatch) -> None:
    """All but the first begin one position too late, where prompts are shared."""
    plain = forward.response_logps

    def shifted(model: nn.Module, batch: dict, layout: str, **options: Any) -> Any:
        forest, positions = batch["forest"], batch["position_ids"].clone()
        segments = positions[0].split(forest.lengths)  # views
        for leaf in forest.leaves:
            segments[leaf.segment].add_(int(leaf.response > 0 and layout != "sequences"))
        return plain(model, batch | {"position_ids": positions}, layout, **options)

    patch.setattr(choose, "response_logps", shifted)


def neighbour(patch: pytest.MonkeyPatch) -> None:
    """The last response of a packed batch sees the one before it."""
    plain = attention.PackedForest.__init__

    def made(self: Any, forest: Forest, padding: int) -> None:
        plain(self, forest, padding)
        last = len(forest.parents) - 1
        self.paths[last] = [*self.paths[last][:-1], last - 1, last]

    patch.setattr(attention.PackedForest, "__init__", made)


def packed_mask(change: Callable[..., tuple], patch: pytest.MonkeyPatch) -> None:
    """Ask for a mask of other sizes."""
    plain = attention.PackedForest.mask

    def mask(self: Any, queries: int, keys: int, window: int | None, like: Tensor) -> Any:
        made = plain(self, *change(queries, keys, window), like)
        return made[:queries, :keys] if made is not None else made

    patch.setattr(attention.PackedForest, "mask", mask)


def wider_window(patch: pytest.MonkeyPatch) -> None:
    """By one position, in a mask of rows."""
    plain = attention.visible

    def visible(*args: Any) -> Callable:
        sees = plain(*args)
        return lambda b, h, q, k, window=None: sees(b, h, q, k, window and window + 1)

    patch.setattr(attention, "visible", visible)


def no_factor(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("axolotl_amopo.model.head.logit_options", lambda config: (1.0, None))


def gradient_off(patch: pytest.MonkeyPatch) -> None:
    """The head's alone, by a millionth."""
    plain = LinearLogps.backward

    def backward(ctx: Any, grad: Tensor) -> tuple:
        hidden, weight, *rest = plain(ctx, grad)
        return hidden, weight * (1 + 1e-6), *rest

    patch.setattr(LinearLogps, "backward", staticmethod(backward))


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str, str]] = {
    "a position, packed": (positions, "llama", "packed"),
    "a position, tree": (positions, "llama", "tree"),
    "a visible neighbour, packed": (neighbour, "llama", "packed"),
    "visible neighbours, tree": (partial(in_layouts, all_before), "llama", "tree"),
    "a transposed mask": (partial(in_layouts, transposed), "llama", "tree"),
    "a mask aligned to the first key": (
        partial(packed_mask, lambda q, k, window: (max(q, k), k, window)),
        "llama",
        "packed",
    ),
    "a window off by one, packed": (
        partial(packed_mask, lambda q, k, window: (q, k, window and window + 1)),
        "mistral",
        "packed",
    ),
    "a window off by one, tree": (wider_window, "gemma3", "tree"),
    "a hidden state too early": (partial(in_layouts, one_too_early), "llama", "sequences"),
    "the next token": (partial(in_layouts, next_target), "llama", "sequences"),
    "swapped responses": (partial(in_layouts, backwards), "llama", "packed"),
    "logits not scaled": (no_factor, "granite", "packed"),
    "logits not capped": (no_factor, "gemma3", "packed"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, monkeypatch):
    plant, name, layout = FAULTS[fault]
    plant(monkeypatch)
    found = differences(name, layout)
    assert all(difference > 1e5 * EXACT for difference in found.values()), found


def test_a_gradient_off_by_a_millionth_is_found(monkeypatch):
    gradient_off(monkeypatch)
    found = differences("llama", "packed")
    assert max(found["logps"], found["loss"]) < EXACT < 100 * EXACT < found["gradients"], found


# Which layout a model gets.


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("attention", "layout"), [("sdpa", "packed"), ("eager", "tree")])
def test_attention_models_share(name, attention, layout):
    model = build(name, attention, dtype=torch.float32)
    teach(model)
    assert choose_layout(model, batch_of(pairs()), "auto") == Choice(layout, own_logits=False)
    assert choose_layout(model, batch_of(pairs()), False) == Choice("sequences", own_logits=False)
    assert model.training


def test_torch_compile_gets_static_rows():
    assert candidates("sdpa", torch.device("cpu"), compiled=True) == ["tree"]


def test_wrappers_are_looked_through_and_kept():
    """DDP and DeepSpeed keep the model in `module`, torch.compile in `_orig_mod`; accelerate's
    function for it leaves a compiled DDP model without its DDP."""
    model = build("llama", "sdpa")

    class Engine(nn.Module):
        def __init__(self, module: nn.Module):
            super().__init__()
            self.module = module

    engine = Engine(model)
    compiled = torch.compile(engine)
    for wrapped in (model, engine, compiled, torch.compile(model), Engine(torch.compile(model))):
        assert unwrap(wrapped) is model
    assert compiled._orig_mod is engine and engine.module is model
    adapted = build("llama", "sdpa", "trunk")
    assert unwrap(Engine(adapted)) is adapted  # PEFT's adapters are no wrapper


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_models_do_not(name):
    model = build(name, "eager", dtype=torch.float32)
    teach(model)
    choice = choose_layout(model, batch_of(pairs()), "auto")
    assert choice[:3] == ("sequences", False, "")
    assert "carries a state" in choice.why_unshared
    assert choose_layout(model, batch_of(pairs()), False).why_unshared == ""
    with pytest.raises(AMoPOError, match=r"share_prompt: true.*carries a state"):
        choose_layout(model, batch_of(pairs()), True)


@pytest.mark.parametrize("name", RECURRENT)
def test_the_proof_alone_finds_them(name, monkeypatch):
    """Were the config silent."""
    model = build(name, "eager", dtype=torch.float32)
    teach(model)
    monkeypatch.setattr(choose, "cannot_share", lambda *_: "")
    choice = choose_layout(model, batch_of(pairs()), "auto")
    assert choice.layout == "sequences" and choice.why_unshared


def test_a_model_without_the_mask_is_found(monkeypatch):
    """One that drops a prepared mask and attends to all before: the second response sees the
    first, if only in one layer."""
    model = build("llama", "eager", dtype=torch.float32)
    teach(model)
    layer = model.model.layers[1]
    plain = layer.forward

    def drops(hidden, attention_mask=None, **kwargs):
        length = hidden.shape[1]
        causal = torch.full((length, length), -1e9).triu(1)[None, None]
        return plain(hidden, attention_mask=causal, **kwargs)

    batch = batch_of(pairs())
    monkeypatch.setattr(layer, "forward", drops)
    choice = choose_layout(model, batch, "auto")
    assert choice.layout == "sequences"
    assert "gives other log-probabilities" in choice.why_unshared
    proof = choose._Proof(model, batch, lambda worst: worst, None)
    assert "one response sees the other" in proof.leak("tree", False)
    assert not proof.leak("sequences", False)


class BatchWide(nn.Module):
    """A product in 8 bits whose inputs are scaled by the largest of the whole batch."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, hidden: Tensor) -> Tensor:
        scale = hidden.detach().abs().max() / 448
        rounded = (hidden.detach() / scale).to(torch.float8_e4m3fn).to(hidden) * scale
        return self.linear(hidden + (rounded - hidden).detach())


def eight_bits(name: str) -> nn.Module:
    model = build(name, "sdpa", dtype=torch.bfloat16)
    for layer in model.model.layers:
        layer.mlp.down_proj = BatchWide(layer.mlp.down_proj)
        layer.self_attn.o_proj = BatchWide(layer.self_attn.o_proj)
    teach(model)
    return model


def test_what_is_scaled_by_the_whole_batch_is_no_leak():
    """Other tokens change the scale, and so the rounding, of all others."""
    batch = batch_of(pairs())
    proof = choose._Proof(eight_bits("llama"), batch, lambda worst: worst, None)
    assert proof.leaks > choose.TOLERANCE / 10
    assert choose_layout(eight_bits("llama"), batch, "auto").layout == "packed"


def test_a_leak_in_8_bits_is_found(monkeypatch):
    neighbour(monkeypatch)
    choice = choose_layout(eight_bits("llama"), batch_of(pairs()), "auto")
    assert choice.layout != "packed"


def test_what_fails_in_the_backward_pass_alone_falls_back():
    """Gradients of products in 8 bits take multiples of 16; a kernel may have no backward pass."""

    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Tensor) -> Tensor:
            ctx.rows = len(hidden)
            return hidden.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            if ctx.rows == 1:
                raise RuntimeError("no such kernel")
            return grad

    model = build("llama", "sdpa", dtype=torch.float32)
    model.model.layers[0].mlp.register_forward_hook(lambda *args: NoBackward.apply(args[-1]))
    teach(model)
    model.lm_head.weight.grad = before = torch.ones_like(model.lm_head.weight)
    state = torch.get_rng_state()
    choice = choose_layout(model, batch_of(pairs()), "auto")
    assert choice.layout == "tree" and not choice.why_unshared
    assert "packed layout, in training, fails with RuntimeError" in choice.why_not_cheaper
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(AMoPOError, match=r"packed layout, in training, fails.*no such kernel"),
    ):
        patch.setattr(choose, "candidates", lambda *_: ["packed"])
        choose_layout(model, batch_of(pairs()), True)
    # Nothing is left of it.
    assert model.lm_head.weight.grad is before and before.eq(1).all()
    assert all(p.grad is None for n, p in model.named_parameters() if n != "lm_head.weight")
    assert torch.get_rng_state().equal(state)
    assert choose_layout(model.eval(), batch_of(pairs()), "auto").layout == "packed"


def test_a_model_that_fails_on_plain_sequences_is_one_sentence():
    model = build("llama", "sdpa", dtype=torch.float32)
    teach(model)
    model.model.layers[0].register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(AMoPOError, match="plain sequences, with ZeroDivisionError: division by"):
        choose_layout(model, batch_of(pairs()), "auto")


def test_wrong_positions_are_found(monkeypatch):
    """A model that counts positions itself."""
    model = build("llama", "sdpa", dtype=torch.float32)
    teach(model)
    plain = model.model.rotary_emb.forward

    def counts_itself(x, position_ids):
        return plain(x, torch.arange(x.shape[1]).expand(position_ids.shape))

    monkeypatch.setattr(model.model.rotary_emb, "forward", counts_itself)
    choice = choose_layout(model, batch_of(pairs()), "auto")
    assert choice.layout == "sequences"
    assert "gives other log-probabilities" in choice.why_unshared


def test_an_unknown_treatment_of_logits_is_found(monkeypatch):
    """A model that does more to its logits than its config says here."""
    model = build("granite", "sdpa", dtype=torch.float32)
    teach(model)
    no_factor(monkeypatch)
    choice = choose_layout(model, batch_of(pairs()), "auto")
    assert choice[:2] == ("packed", True) and not choice.why_unshared
    assert "differ from the model's own" in choice.why_own_logits


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("llama", {"layer_types": ["full_attention", "chunked_attention"]}, "layers of another"),
        ("llama", {"_attn_implementation_internal": "sage"}, "sage takes no mask"),
    ],
)
def test_configs_that_rule_sharing_out(name, change, reason):
    model = build(name, "sdpa")
    for key, value in change.items():
        setattr(model.config, key, value)
    implementation = model.config._attn_implementation
    assert reason in cannot_share(type(model), model.config, implementation)


def test_the_saved_model_knows_nothing_of_it(tmp_path):
    model = build("llama", "sdpa", dtype=torch.float32)
    before = set(model.state_dict())
    teach(model)
    choose_layout(model, batch_of(pairs()), "auto")
    assert set(model.state_dict()) == before
    model.save_pretrained(tmp_path)
    assert "amopo" not in (tmp_path / "config.json").read_text()
    # Called as before, it does what it did.
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    logits, expected = model.eval()(**inputs).logits, again.eval()(**inputs).logits
    assert relative(logits.detach(), expected.detach()) < 1e-4
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape == (1, 5)


# Parts.


def in_parts(**options: Any) -> list[dict[str, Any]]:
    return split_batch(batch_of([*groups(), *own_ratings()]), **options)


def test_parts_hold_each_response_once_and_fit():
    (whole,) = in_parts()
    assert len(in_parts(max_tokens=10_000)) == 1
    wanted = [
        (leaf.example, leaf.response, leaf.prompts, whole["forest"].lengths[leaf.segment])
        for leaf in whole["forest"].leaves
    ]
    for options in (
        {"max_tokens": 70},
        {"one_prompt": True},
        {"one_prompt": True, "max_tokens": 60},
    ):
        parts = in_parts(**options)
        held = [
            (leaf.example, leaf.response, leaf.prompts, part["forest"].lengths[leaf.segment])
            for part in parts
            for leaf in part["forest"].leaves
        ]
        assert sorted(held) == sorted(wanted)
        for part in parts:
            forest = part["forest"]
            assert part["input_ids"].shape[1] == sum(forest.lengths)
            assert sum(forest.lengths) <= options.get("max_tokens", 1000)
            if options.get("one_prompt"):
                assert len({forest.parents[leaf.segment] for leaf in forest.leaves}) == 1
    assert len(in_parts(max_tokens=70)) < len(in_parts(one_prompt=True))
    # Less than a prompt and a response has is no reason to cut either.
    assert len(in_parts(max_tokens=1)) == len(wanted)


@pytest.mark.parametrize("layout", ["packed", "tree", "sequences"])
def test_a_part_has_no_more_tokens_in_its_layout(layout):
    """What each row of a layout runs again counts again."""
    counts = {}
    for most in (70, 100, 10_000):
        parts = in_parts(max_tokens=most, layout=layout)
        rows = [lay_out(part["forest"], layout).index_RL for part in parts]
        counts[most] = [int((index >= 0).sum()) for index in rows]
    assert max(counts[70]) <= 70 and max(counts[100]) <= 100
    assert len(counts[70]) > len(counts[100]) > len(counts[10_000]) == 1


@pytest.mark.parametrize("which", EXAMPLES)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_give_the_numbers_of_the_whole(layout, name, which):
    wanted, examples = expected(name, None, which), EXAMPLES[which]()
    model = build(name, "sdpa")
    teach(model)
    batch = batch_of(examples)
    for options in ({"one_prompt": True}, {"max_tokens": 80}, {"max_tokens": 1}):
        parts = split_batch(batch, **options)
        model.zero_grad()

        def judge(found: forward.TokenLogps) -> Tensor:
            assert_places(found.logps, found.mask, examples, wanted)
            given = responses(batch, found.logps, found.mask)
            return example_losses(OBJECTIVE(given, None), given).mean()

        def run(part: dict[str, Any]) -> forward.TokenLogps:
            return response_logps(model, part, layout)

        with Doubles(), choose._Attention(model, layout):
            loss = replayed_loss(parts, run, judge, lambda loss: loss().backward(), idle=2)
            loss.backward()
        assert relative(loss.detach(), wanted.loss) < EXACT
        assert gradient_difference(gradients_of(model), wanted.gradients) < EXACT


def test_parts_drop_the_same_again():
    """With dropout, the log-probabilities of both passes are the same, and randomness goes on as
    it would have."""
    model = build("llama", "sdpa", lora="trunk")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    causal = causal_model(model)
    causal.model.layers[0].mlp.register_forward_hook(lambda m, a, out: F.dropout(out, 0.5))
    teach(model)
    parts = split_batch(batch_of(pairs()), one_prompt=True)
    seen: list[Tensor] = []

    def run(part: dict[str, Any]) -> forward.TokenLogps:
        found = response_logps(model, part)
        seen.append(found.logps.detach())
        return found

    torch.manual_seed(3)
    replayed_loss(parts, run, lambda f: f.logps.square().sum(), lambda loss: loss().backward())
    after = torch.rand(1)
    first, again = seen[: len(parts)], seen[len(parts) :]
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    torch.manual_seed(3)
    with torch.no_grad():
        other = [run(part).logps for part in parts]
    assert torch.rand(1).equal(after)
    assert all(a.equal(b) for a, b in zip(first, other, strict=True))
    assert not run(parts[0]).logps.equal(first[0])  # something was dropped
