"""The base model: a Llama of about a million parameters that has learned the language.

It is trained on questions with answers that `language.draw_answer` makes, and on instructions
beside most questions that say nothing about the answer. So it knows the words of instructions, and
only preference training gives them a meaning. A folder of it is one of transformers', with a
tokenizer and a chat template, and `axolotl train` can take it.

    <q> detail 4 ann blue vast shy river smith <a> ann is vast smith <end>
"""

import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import language
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from axolotl_amopo.data.tokenizer import ChatTokenizer

CACHE = Path(__file__).parent / "cache"

PAD, UNKNOWN, END, QUESTION, ANSWER = SPECIAL = "<pad>", "<unk>", "<end>", "<q>", "<a>"
IDS = {word: i for i, word in enumerate((*SPECIAL, *language.WORDS))}
TEXTS = list(IDS)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ '<a> ' + message.content + ' <end>' }}"
    "{% else %}{{ '<q> ' + message.content + ' ' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<a> ' }}{% endif %}"
)
RIGHT_AT_FIRST = 0.5  # share of the steps
LONGEST_ANSWER = 20  # words, where generation is cut off; an answer of the grammar has at most 12


@dataclass(frozen=True)
class BaseSettings:
    """How the base model is made; a different one is another folder of the cache."""

    hidden_size: int = 128
    intermediate_size: int = 352
    layers: int = 4
    heads: int = 4
    steps: int = 1000
    batch: int = 32
    learning_rate: float = 3e-3
    seed: int = 0


def tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of the language: a token per word."""
    words = Tokenizer(WordLevel(IDS, unk_token=UNKNOWN))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        extra_special_tokens=[QUESTION, ANSWER],
        chat_template=CHAT_TEMPLATE,
    )


def chat() -> ChatTokenizer:
    """Return what makes the token ids of prompts and responses."""
    return ChatTokenizer(tokenizer(), CHAT_TEMPLATE, {})


def draw_instruction(numbers: random.Random) -> list[str]:
    """Return the words of an instruction, at random: nothing, a dimension, several with numbers."""
    kind = numbers.random()
    if kind < 0.25:
        return []
    if kind < 0.6:
        return [numbers.choice(language.ATTRIBUTES), *numbers.choice(["", *"12345"]).split()]
    named = numbers.sample(language.ATTRIBUTES, numbers.randint(1, len(language.ATTRIBUTES)))
    named.sort(key=language.ATTRIBUTES.index)
    sort = numbers.choice(["none", "rating", "weight"])
    words = [language.EVERYTHING]
    for name in named:
        words.append(name)
        if sort == "rating":
            words.append(str(numbers.randint(1, 5)))
        elif sort == "weight":
            words.append(f"{numbers.randint(0, 10) / 10:.1f}")
    return words


def draw_text(numbers: random.Random, right: float = language.RIGHT) -> tuple[list[int], list[int]]:
    """Return the token ids of a prompt and of an answer to it.

    Args:
        numbers: what is drawn from.
        right: share of right facts.
    """
    question = language.draw_question(numbers)
    instruction = draw_instruction(numbers)
    words = [instruction, question.split()]
    if numbers.random() < 0.5:
        words.reverse()
    prompt = [QUESTION, *words[0], *words[1], ANSWER]
    answer = [*language.draw_answer(question, numbers, right).split(), END]
    return [IDS[word] for word in prompt], [IDS[word] for word in answer]


def folder_of(settings: BaseSettings) -> Path:
    """Return where a base model is kept: its name has the settings and the texts in it."""
    numbers = random.Random("what the texts are like")
    texts = [draw_text(numbers) for _ in range(200)]
    content = json.dumps([asdict(settings), texts, CHAT_TEMPLATE])
    return CACHE / f"base-{hashlib.blake2b(content.encode(), digest_size=8).hexdigest()}"


def load_base(settings: BaseSettings) -> LlamaForCausalLM:
    """Return the base model, trained now if it is not in the cache."""
    folder = folder_of(settings)
    if not (folder / "model.safetensors").is_file():
        CACHE.mkdir(exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=CACHE))
        pretrain(settings).save_pretrained(made)
        tokenizer().save_pretrained(made)
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(made)
    # Of texts as short as these a row per prompt under a mask is fastest.
    return LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )


def new_model(settings: BaseSettings) -> LlamaForCausalLM:
    """Return a model of the size, with random weights."""
    torch.manual_seed(settings.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(IDS),
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads,
            max_position_embeddings=128,
            bos_token_id=None,
            eos_token_id=IDS[END],
            pad_token_id=IDS[PAD],
            tie_word_embeddings=True,
        )
    )


def pretrain(settings: BaseSettings) -> LlamaForCausalLM:
    """Return a model that was trained on texts of the language, on the answers alone.

    It begins with right answers, from which it learns faster where facts come from.
    """
    model, numbers = new_model(settings), random.Random(f"texts {settings.seed}")
    steps = settings.steps
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, steps + 1, pct_start=0.1, cycle_momentum=False
    )
    for step in range(steps):
        right = language.RIGHT if step >= RIGHT_AT_FIRST * steps else 1.0
        texts = [draw_text(numbers, right) for _ in range(settings.batch)]
        longest = max(len(prompt) + len(answer) for prompt, answer in texts)
        ids = torch.full((len(texts), longest), IDS[PAD])
        labels = torch.full_like(ids, -100)
        for row, (prompt, answer) in enumerate(texts):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : end] = torch.tensor(answer)
        # Padding stands behind all that is read, so causal attention never sees it.
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


class Generated(NamedTuple):
    """An answer that a model wrote."""

    text: str
    ids: list[int]  # with the token that ends it, if it did
    logp: float  # of all its tokens, in nats


@torch.no_grad()
def generate(model: Any, prompts: Sequence[list[int]], seed: int) -> list[Generated]:
    """Return an answer per prompt, drawn from the model's own distribution (temperature 1).

    Prompts of one length run together, so nothing is padded. What is drawn depends on the seed and
    on the prompts' order.
    """
    model.eval()
    numbers = torch.Generator().manual_seed(seed)
    lengths: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        lengths.setdefault(len(prompt), []).append(place)
    made: dict[int, Generated] = {}
    for places in lengths.values():
        drawn = _generate(model, torch.tensor([prompts[place] for place in places]), numbers)
        made |= zip(places, drawn, strict=True)
    return [made[place] for place in range(len(prompts))]


def _generate(model: Any, ids: Tensor, numbers: torch.Generator) -> list[Generated]:
    answers: list[list[int]] = [[] for _ in ids]
    logps = [0.0] * len(ids)
    cache, left = None, list(range(len(ids)))  # which rows still run
    for _ in range(LONGEST_ANSWER + 1):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = output.past_key_values, output.logits[:, -1].float()
        ids = torch.multinomial(logits.softmax(-1), 1, generator=numbers)
        found = logits.log_softmax(-1).gather(-1, ids)[:, 0].tolist()
        for row, token, logp in zip(left, ids[:, 0].tolist(), found, strict=True):
            answers[row].append(token)
            logps[row] += logp
        stay = [i for i, row in enumerate(left) if answers[row][-1] != IDS[END]]
        if not stay:
            break
        if len(stay) < len(left):
            left, ids = [left[i] for i in stay], ids[stay]
            cache.batch_select_indices(torch.tensor(stay))
    return [
        Generated(text_of(answer), answer, logp)
        for answer, logp in zip(answers, logps, strict=True)
    ]


def text_of(ids: Sequence[int]) -> str:
    """Return the words of an answer, without the token that ends it.

    An answer that does not end keeps no end either, but is longer than the grammar allows.
    """
    return " ".join(TEXTS[i] for i in ids if i != IDS[END])
