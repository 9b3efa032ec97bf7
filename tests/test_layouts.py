"""A batch's layouts: what stands where, and that all of them give the numbers of plain sequences.

The reference is as slow and obvious as can be: every sequence by itself, without padding, through
the model's own forward, and the log-softmax of its whole logits.
"""

import copy
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.attention.flex_attention import create_mask
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    JambaConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from axolotl_amopo.data.tokenizer import PairTokens
from axolotl_amopo.errors import AMoPOError
from axolotl_amopo.loss import amopo_loss
from axolotl_amopo.model import choose as sharing
from axolotl_amopo.model.attention import PACKED, attention_inputs
from axolotl_amopo.model.choose import candidates, cannot_share, choose_layout
from axolotl_amopo.model.forward import causal_model, prepare_model, response_logps
from axolotl_amopo.model.layout import MIN_SHARED_BEGINNING, lay_out, plant
from axolotl_amopo.training.collator import AMoPOCollator

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


def ids(seed: int, *lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def row(prompts, responses, winners, mask=None, example=0) -> dict:
    return {
        "prompt_ids": prompts,
        "response_ids": responses,
        "winners": winners,
        "dimension_mask": mask or [1] * len(winners),
        "example_id": example,
    }


def rows() -> list[dict]:
    """Odd lengths; prompts with a common beginning, with a question in common, with nothing."""
    beginning, question = ids(1, 21, 40)
    a, b, c = ids(2, 7, 12, 3)
    return [
        row([beginning + a, beginning + b, c], ids(3, 9, 14), [0, 1, 0], [1, 1, 0]),
        row([question + a, question + b, question + c], ids(4, 11, 1), [0, 0, 1]),
        row(ids(5, 27, 22, 15), ids(6, 3, 31), [1, 0, 0]),
    ]


def own_rating_rows() -> list[dict]:
    """Each response under a prompt with its own rating."""
    beginning, *ends = ids(7, 18, 4, 5, 6, 7)
    return [row([beginning + end for end in ends], ids(8, 6, 10), [0, 1])]


def group_rows() -> list[dict]:
    """Three responses, each in two pairs; prompts alike, or with a rating of each response."""
    (question,) = ids(9, 23)
    a, b, *ends = ids(10, 5, 8, 3, 4, 6)
    first, second, third = ids(11, 7, 12, 9)
    in_pairs = [first, second, first, third, third, second]
    alike = row([question + a, question + b] * 3, in_pairs, [0, 1, 0, 0, 1, 0], [1, 1, 1, 0, 1, 1])
    own = [[question + ends[i] for i in pair] for pair in [(0, 1), (0, 2), (2, 1)]]
    rated = row([p for pair in own for p in pair * 2], in_pairs, [0] * 6, [1, 1, 0, 0, 1, 1])
    return [alike, rows()[1] | row([question + a, question + b], ids(12, 4, 9), [0, 1]), rated]


def batch_of(rows: list[dict]) -> dict:
    return AMoPOCollator(None, pad_to_multiple_of=8)(rows)


def pairs_of(rows):
    return [
        pair
        for r in rows
        for pair in PairTokens(r["prompt_ids"], r["response_ids"], r["winners"]).pairs()
    ]


def slow_logps(model, rows):
    """[P, K, 2, T], one sequence at a time."""
    pairs = pairs_of(rows)
    longest = max(len(ids) for pair in pairs for ids in pair.responses)
    logps = []
    for pair in pairs:
        for prompt, response in pair.sequences():
            logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits
            every = logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            chosen = torch.stack([every[t, token] for t, token in enumerate(response)])
            logps.append(torch.nn.functional.pad(chosen, (0, longest - len(response))))
    return torch.stack(logps).view(len(pairs), -1, 2, longest)


def loss_and_gradients(model, batch, logps, mask):
    keep = batch["dimension_mask"]
    result = amopo_loss(logps, mask, beta=2.0, gamma=0.5, weighting="mean", dimension_mask=keep)
    model.zero_grad()
    result.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return result.loss.item(), gradients


def build(name: str, attention: str, lora: str | None = None, checkpointing: bool = False):
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
        causal_model(model).gradient_checkpointing_enable({"use_reentrant": False})
        causal_model(model).enable_input_require_grads()
    return model.train()


def check(
    model, layout: str, rows: list[dict], *, own_logits: bool = False, tolerance: float = 1e-5
) -> None:
    """Log-probabilities, loss and every gradient equal the slow ones."""
    batch = batch_of(rows)
    slow = slow_logps(model, rows)
    prepare_model(model)
    with sharing._Attention(causal_model(model), layout):
        logps, mask = response_logps(model, batch, layout, own_logits=own_logits)
        kept = batch["dimension_mask"].view(*batch["dimension_mask"].shape, 1, 1)
        assert mask.any((2, 3)).equal(batch["dimension_mask"])
        torch.testing.assert_close(logps[mask], slow[mask], atol=2e-5, rtol=1e-5)
        loss, gradients = loss_and_gradients(model, batch, logps, mask)
    everywhere = torch.zeros_like(mask)
    for b, pair in enumerate(pairs_of(rows)):
        for i, (_, response) in enumerate(pair.sequences()):
            everywhere[b, i // 2, i % 2, : len(response)] = True
    assert mask.equal(everywhere & kept)
    slow_loss, slow_gradients = loss_and_gradients(model, batch, slow, everywhere)
    assert loss == pytest.approx(slow_loss, rel=1e-5)
    assert (
        set(gradients)
        == set(slow_gradients)
        == {n for n, p in model.named_parameters() if p.requires_grad}
    )
    for name, gradient in slow_gradients.items():
        worst = (gradients[name] - gradient).abs().max()
        assert worst <= tolerance * gradient.abs().max() + 1e-8, name


# What stands where.


def test_a_forest_by_hand():
    shared = list(range(100, 100 + MIN_SHARED_BEGINNING))
    pair = PairTokens([[*shared, 1, 2], [*shared, 3]], [[20, 21], [30, 31, 32]], [0, 1])
    forest, tokens = plant([pair], [[True, True]])
    assert forest.parents == [-1, 0, 1, 1, 0, 4, 4]
    assert forest.lengths == [len(shared), 2, 2, 3, 1, 3, 2]
    assert tokens == [*shared, 1, 2, 20, 21, 30, 31, 32, 3, 30, 31, 32, 20, 21]
    assert [tuple(leaf) for leaf in forest.leaves] == [
        (2, 0, 0, 0), (3, 0, 0, 1), (5, 0, 1, 0), (6, 0, 1, 1),
    ]  # fmt: skip
    batch = AMoPOCollator(None)([row(pair.prompts, pair.responses, pair.winners)])
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


@pytest.mark.parametrize(("layout", "shape"), [("tree", (2, 32)), ("sequences", (4, 24))])
def test_padding_is_to_a_multiple(layout, shape):
    prompts, responses = ids(1, 12, 11), ids(2, 9, 4)
    pair = PairTokens(prompts, responses, [0, 0])
    forest, _ = plant([pair], [[True, True]])
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


def test_token_counts():
    """What a layout runs, for K prompts of P tokens and two responses of R."""
    question, *instructions = ids(1, 200, 20, 20, 20)
    responses = ids(2, 30, 30)

    def tokens(prompts, layout):
        forest, _ = plant([PairTokens(prompts, responses, [0, 0, 0])], [[True] * 3])
        return int((lay_out(forest, layout).index_RL >= 0).sum())

    before = [instruction + question for instruction in instructions]
    after = [question + instruction for instruction in instructions]
    assert tokens(before, "sequences") == tokens(after, "sequences") == 2 * 3 * (220 + 30)
    assert tokens(before, "tree") == tokens(before, "packed") == 3 * (220 + 2 * 30)
    assert tokens(after, "tree") == tokens(after, "packed") == 200 + 3 * (20 + 2 * 30)


def test_masked_prompts_are_not_run():
    pair = PairTokens(ids(1, 10, 11), ids(2, 3, 4), [0, 0])
    forest, _ = plant([pair, pair], [[False, True], [False, False]])
    # An example without any prompt keeps its first, so that every process has work to do.
    assert [(leaf.example, leaf.prompt) for leaf in forest.leaves] == [(0, 1)] * 2 + [(1, 0)] * 2


def test_identical_prompts_keep_a_token_of_their_own():
    (prompt,) = ids(1, 40)
    forest, _ = plant([PairTokens([prompt, prompt], ids(2, 3, 4), [0, 0])], [[True, True]])
    assert forest.lengths[:2] == [39, 1]


# Equality.


@pytest.mark.parametrize("lora", [None, "trunk"], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed(name, checkpointing, lora):
    check(build(name, "sdpa", lora, checkpointing), "packed", rows())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("lora", "checkpointing"), [(None, False), ("trunk", True)])
@pytest.mark.parametrize("name", CONFIGS)
def test_tree(name, lora, checkpointing, attention):
    check(build(name, attention, lora, checkpointing), "tree", rows())


@pytest.mark.parametrize(("lora", "checkpointing"), [(None, False), ("trunk", True)])
@pytest.mark.parametrize("name", CONFIGS | RECURRENT)
def test_sequences(name, lora, checkpointing):
    if name in RECURRENT and checkpointing:
        pytest.skip("transformers' slow path of these has no checkpointing to test")
    attention = "eager" if name == "mamba" else "sdpa"
    lora = None if name in RECURRENT else lora
    # A scan's float32 sums go another way where rows are padded.
    tolerance = 1e-4 if name in RECURRENT else 1e-5
    check(build(name, attention, lora, checkpointing), "sequences", rows(), tolerance=tolerance)


@pytest.mark.parametrize("layout", ["packed", "tree", "sequences"])
def test_prompts_with_each_responses_own_rating(layout):
    check(build("llama", "sdpa"), layout, own_rating_rows())


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("layout", ["packed", "tree", "sequences"])
def test_groups(layout, name):
    check(build(name, "sdpa"), layout, group_rows())


def test_a_group_has_each_response_once_under_a_prompt():
    alike, pair, rated = (
        batch_of([one])["forest"] for one in (group_rows()[0], group_rows()[1], group_rows()[2])
    )
    assert len(alike.leaves) == 3 * 2 and alike.responses == 3
    assert sorted(alike.lengths[leaf.segment] for leaf in alike.leaves) == [7, 7, 9, 9, 12, 12]
    assert alike.pairs == [[[0, 1], [0, 1]], [[0, 2], [0, 1]], [[1, 2], [2, 0]]]
    assert pair.pairs is None and len(pair.leaves) == 2 * 2
    # Its second prompt is not kept in the middle pair, whose responses the others have.
    assert len(rated.leaves) == 3 + 3


@pytest.mark.parametrize("name", ["llama", "gemma3", "granite"])
def test_the_models_own_logits(name):
    check(build(name, "sdpa"), "sequences", rows(), own_logits=True)


@pytest.mark.parametrize("lora", ["head", "saved head"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "granite"])
def test_an_adapted_head(name, lora):
    check(build(name, "sdpa", lora), "packed", rows())


def test_variable_length_kernel(monkeypatch):
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
    for name in ("llama", "mistral", "gemma3"):
        model = build(name, "sdpa")
        slow = slow_logps(model, rows())
        prepare_model(model)
        model.set_attn_implementation(PACKED["flash_attention_2"])
        logps, mask = response_logps(model, batch_of(rows()), "packed")
        torch.testing.assert_close(logps[mask], slow[mask], atol=2e-5, rtol=1e-5)


def test_flex_attention_gets_the_same_mask():
    model = build("gemma3", "flex_attention")
    batch = batch_of(rows())
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


# Which layout a model gets.


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("attention", "layout"), [("sdpa", "packed"), ("eager", "tree")])
def test_attention_models_share(name, attention, layout):
    model = build(name, attention)
    prepare_model(model)
    assert choose_layout(model, batch_of(rows()), "auto") == (layout, False)
    assert choose_layout(model, batch_of(rows()), False) == ("sequences", False)
    assert model.training


def test_torch_compile_gets_static_rows():
    assert candidates("sdpa", torch.device("cpu"), compiled=True) == ["tree"]


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_models_do_not(name, caplog):
    model = build(name, "eager")
    prepare_model(model)
    with caplog.at_level(logging.WARNING):
        assert choose_layout(model, batch_of(rows()), "auto") == ("sequences", False)
    assert "PROMPTS ARE NOT SHARED" in caplog.text
    with pytest.raises(AMoPOError, match=r"share_prompt: true.*carries a state"):
        choose_layout(model, batch_of(rows()), True)


@pytest.mark.parametrize("name", RECURRENT)
def test_the_proof_alone_finds_them(name, monkeypatch, caplog):
    """Were the config silent."""
    model = build(name, "eager")
    prepare_model(model)
    monkeypatch.setattr(sharing, "cannot_share", lambda *_: "")
    assert choose_layout(model, batch_of(rows()), "auto") == ("sequences", False)
    assert "PROMPTS ARE NOT SHARED" in caplog.text


def test_a_model_without_the_mask_is_found(monkeypatch, caplog):
    """One that drops a prepared mask and attends to all before: the second response sees the
    first, if only in one layer."""
    model = build("llama", "eager")
    prepare_model(model)
    layer = model.model.layers[1]
    plain = layer.forward

    def drops(hidden, attention_mask=None, **kwargs):
        length = hidden.shape[1]
        causal = torch.full((length, length), -1e9).triu(1)[None, None]
        return plain(hidden, attention_mask=causal, **kwargs)

    batch = batch_of(rows())
    monkeypatch.setattr(layer, "forward", drops)
    assert choose_layout(model, batch, "auto") == ("sequences", False)
    assert "gives other log-probabilities" in caplog.text
    proof = sharing._Proof(model, batch, lambda worst: worst, half_precision=True)
    assert "one response sees the other" in proof.leak("tree", False)
    assert not proof.leak("sequences", False)


def test_wrong_positions_are_found(monkeypatch, caplog):
    """A model that counts positions itself."""
    model = build("llama", "sdpa")
    prepare_model(model)
    plain = model.model.rotary_emb.forward

    def counts_itself(x, position_ids):
        return plain(x, torch.arange(x.shape[1]).expand(position_ids.shape))

    monkeypatch.setattr(model.model.rotary_emb, "forward", counts_itself)
    assert choose_layout(model, batch_of(rows()), "auto") == ("sequences", False)
    assert "gives other log-probabilities" in caplog.text


def test_an_unknown_treatment_of_logits_is_found(monkeypatch, caplog):
    """A model that does more to its logits than its config says here."""
    model = build("granite", "sdpa")
    prepare_model(model)
    monkeypatch.setattr("axolotl_amopo.model.forward.logit_options", lambda config: (1.0, None))
    assert choose_layout(model, batch_of(rows()), "auto") == ("packed", True)
    assert "using the logits of the model's own forward" in caplog.text


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
    model = build("llama", "sdpa")
    before = set(model.state_dict())
    prepare_model(model)
    choose_layout(model, batch_of(rows()), "auto")
    assert set(model.state_dict()) == before
    model.save_pretrained(tmp_path)
    assert "amopo" not in (tmp_path / "config.json").read_text()
    # Called as before, it does what it did.
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    torch.testing.assert_close(model.eval()(**inputs).logits, again.eval()(**inputs).logits)
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape == (1, 5)
