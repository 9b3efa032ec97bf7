"""A config -> the log-probabilities of other models on its examples, in files."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import batched
from typing import Any

import torch
from axolotl.cli.config import load_cfg
from axolotl.loaders import load_tokenizer
from transformers import AutoTokenizer

from axolotl_amopo.commands.kit.policy import is_adapter, load_policy
from axolotl_amopo.commands.kit.prepare import prepared_anew
from axolotl_amopo.config.block import read_block
from axolotl_amopo.config.references import path_of
from axolotl_amopo.data.examples import as_text, tokenize_example
from axolotl_amopo.data.pipeline import Preparation
from axolotl_amopo.data.tokenizer import ChatTokenizer, generation_stops
from axolotl_amopo.errors import AMoPOError, ConfigError, did_you_mean
from axolotl_amopo.example import Example
from axolotl_amopo.model.batch import make_batch
from axolotl_amopo.model.choose import choose_layout
from axolotl_amopo.model.forward import response_logps
from axolotl_amopo.training.reference import Sums, facts_of_model, sums_by_example

#: Told of a model's name and its examples; what it returns is told of examples done.
Progress = Callable[[str, int], Callable[[int], None]]

# Batches after which what was taken is written, for a command that is interrupted.
WRITE_AFTER = 200


@dataclass(frozen=True)
class TakenReference:
    """Say what is known of a model now, and where."""

    model: str
    path: str
    examples: int
    new: int  # those of them that this call has taken


def take_references(
    path: str,
    models: tuple[str, ...] = (),
    *,
    batch_examples: int = 2,
    anew: bool = False,
    progress: Progress = lambda name, total: lambda done: None,
) -> list[TakenReference]:
    """Take and write the log-probabilities of the models that a config's `amopo.reference` names.

    One model is in memory at a time. Examples that a file has already are not taken again.

    Args:
        path: of the config.
        models: some of those it names; by default all.
        batch_examples: examples per forward pass.
        anew: take what is there again, as after a change of the model.
        progress: called with a model's name and the number of examples; what it returns is called
            with the number of examples that were just done.

    Raises:
        AMoPOError: for a config that names no other model, or a model that can't be used.
    """
    cfg = load_cfg(path, is_preprocess=True)
    if not (cfg.amopo and cfg.amopo.enabled):
        raise ConfigError(f"{path}: has no `rl: amopo`, so nothing in it has a reference.")
    named = read_block(cfg).other_references
    if not named:
        raise ConfigError(
            f"{path}: its amopo.reference names no model but the one that is trained, for which "
            "this command is not needed; write the folder or hub name of another one there."
        )
    for model in models:
        if model not in named:
            raise ConfigError(
                f"--model {model}: is not in amopo.reference ({', '.join(named)})."
                f"{did_you_mean(model, named)}"
            )
    preparations = _prepare(cfg)
    return [
        _take(cfg, model, preparations, batch_examples, anew, progress)
        for model in models or tuple(named)
    ]


def _prepare(cfg: Any) -> list[Preparation]:
    """Return how each entry's rows are prepared for training; what is prepared already lacks the
    texts, which another tokenizer needs."""
    with prepared_anew(cfg, load_tokenizer(cfg)) as prepared:
        return prepared.preparations


def _take(
    cfg: Any,
    model: str,
    preparations: list[Preparation],
    batch_examples: int,
    anew: bool,
    progress: Progress,
) -> TakenReference:
    path, made_by = path_of(cfg, model), facts_of_model(model)
    sums = Sums.read(path) if path.exists() and not anew else Sums(made_by)
    if sums.made_by != made_by:
        raise AMoPOError(
            f"{path}: the model has changed since its log-probabilities were taken; add --force to "
            "take them anew."
        )
    ids = {example for one in preparations for example in one.prepared["example_id"]}
    before, advance = ids & set(sums.known), progress(model, len(ids))
    advance(len(before))
    if before != ids:
        path.parent.mkdir(parents=True, exist_ok=True)
        tokenizer = _tokenizer_of(cfg, model)
        policy = load_policy(cfg, tokenizer, model)
        wanted = (
            one for one in _examples(cfg, model, tokenizer, preparations) if one.id not in before
        )
        choice = None
        for number, examples in enumerate(batched(wanted, batch_examples), 1):
            batch = make_batch(examples, pad_to_multiple_of=8)
            batch = {k: v.to(policy.device) if torch.is_tensor(v) else v for k, v in batch.items()}
            choice = choice or choose_layout(policy, batch, cfg.amopo.share_prompt)
            with torch.no_grad():
                found = response_logps(policy, batch, choice.layout, own_logits=choice.own_logits)
            sums.known |= sums_by_example(batch, found)
            advance(len(examples))
            if number % WRITE_AFTER == 0:
                sums.write(path)
        sums.write(path)
    return TakenReference(model, str(path), len(ids), len(ids - before))


def _tokenizer_of(cfg: Any, model: str) -> Any:
    """Return the tokenizer that a model was trained with: an adapter's is the base model's.

    Raises:
        AMoPOError: where it has none, or no chat template.
    """
    if is_adapter(model):
        return load_tokenizer(cfg)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model, trust_remote_code=cfg.trust_remote_code or False
        )
    except (OSError, ValueError, KeyError) as error:
        line = str(error).strip().partition("\n")[0]
        raise AMoPOError(f"amopo.reference: {model}: has no tokenizer: {line}") from None
    if not tokenizer.chat_template:
        raise AMoPOError(
            f"amopo.reference: {model}: its tokenizer has no chat template, so what it makes of a "
            "conversation is not known; put the one it was trained with into "
            f"{model}/chat_template.jinja."
        )
    return tokenizer


def _examples(
    cfg: Any, model: str, tokenizer: Any, preparations: list[Preparation]
) -> Iterator[Example]:
    """Yield all prepared examples in a model's own tokens, with the ids that training knows."""
    for one in preparations:
        own = one.format.chat_tokenizer()
        chat = own
        if not is_adapter(model):
            template = tokenizer.chat_template
            template = template["default"] if isinstance(template, dict) else template
            stops = generation_stops(model)
            chat = ChatTokenizer(tokenizer, template, own.template_kwargs, (), stops)
        place, ids = one.format.config.instruction_place, one.prepared["example_id"]
        for row, pairs in one.examples():
            text = as_text(pairs, one.rule, one.format.where(pairs))
            messages = json.loads(text["messages"])
            example = tokenize_example(chat, text, messages, place)
            trained = one.prepared[row]["response_ids"]
            if len(example.responses) != len(trained):  # some were left out, being too long
                full = tokenize_example(own, text, messages, place).responses
                example = example.only([n for n, tokens in enumerate(full) if tokens in trained])
            yield replace(example, id=ids[row])
