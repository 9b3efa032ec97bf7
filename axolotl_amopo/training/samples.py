"""`amopo.generate_samples`: held-out prompts that the model answers at each evaluation of training.

A preference loss can fall while the model's own answers fall apart, into repetition, into silence,
or into text that never ends. An evaluation's entry in the log, and so every tracker, gets for each
of `amopo.sample_settings`

    samples/<settings>/tokens       mean length of the answers
    samples/<settings>/repetition   share of 4-grams of tokens that stood in the answer before
    samples/<settings>/unfinished   share of answers that were cut off at generation_max_new_tokens
    samples/time                    share of the training's time so far that samples took

and `_amopo_samples.jsonl` in the output folder, and a table in the trackers, the texts:

    {"step": 10, "epoch": 0.2, "sample": 0, "settings": "overall", "prompt": "...",
     "answer": "...", "tokens": 31, "repetition": 0.0, "finished": true,
     "tokens_first": 44.5, "repetition_first": 0.0}

`..._first` are the settings' means at the run's first evaluation, which axolotl does before the
first step, when the model is its base. A run that begins at a step replaces what stands before it
about later steps.

Every process answers its share of the prompts, and nothing of it reaches the training: no step, no
draw of a random number, no weight is another with samples than without.
"""

import json
import time
from collections.abc import Hashable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate.utils import gather_object
from axolotl.utils.logging import get_logger
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig, TrainerCallback

from axolotl_amopo.config.block import AMoPOConfig
from axolotl_amopo.data.tokenizer import ChatTokenizer, generation_stops
from axolotl_amopo.errors import AMoPOError, visible
from axolotl_amopo.model.forward import causal_model, unwrap
from axolotl_amopo.model.generate import continue_prompts, generation_config, stop_tokens
from axolotl_amopo.steering.steering import Settings, Steering, read_settings, written
from axolotl_amopo.training.eval_table import shortened
from axolotl_amopo.training.run_log import append
from axolotl_amopo.training.trackers import Trackers, markdown_table

LOG = get_logger(__name__)

FILE = "_amopo_samples.jsonl"  # not uploaded, see `runs.LOG`
NAME = "amopo_samples"  # of the table, in trackers
N_GRAM = 4
LINE = 300  # characters of an answer in the log
# Wider than any scale, where the data's own is not known yet.
ANY_SCALE = (-1e9, 1e9)


def repetition(tokens: Sequence[Hashable]) -> float:
    """Return the share of 4-grams that stood there before: seq-rep-4 of Welleck et al. (2020).

    https://arxiv.org/abs/1908.04319, section 6. 0 for a text without two 4-grams.

    >>> repetition("so it is so it is so it is".split())
    0.5
    """
    grams = [tuple(tokens[i : i + N_GRAM]) for i in range(len(tokens) - N_GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def check_settings(config: AMoPOConfig) -> None:
    """Refuse settings that the model can't be asked for, but for a rating outside of its scale.

    Raises:
        AMoPOError: saying what is wrong.
    """
    if config.sample_settings:
        scales = {d.name: d.scale or ANY_SCALE for d in config.dimensions}
        settings_of(config, Steering.from_config(config, scales))


def settings_of(config: AMoPOConfig, steering: Steering | None) -> list[Settings]:
    """Return what samples are asked for, without those whose instruction another has already.

    Args:
        steering: None where the data does not say what to ask for, and nothing is asked for.

    Raises:
        AMoPOError: saying what is wrong.
    """
    if steering is None:
        return [{}]
    if config.sample_settings is None:
        each: list[Settings] = [steering.everything(), {}]
    else:
        each = []
        for line in config.sample_settings:
            try:
                each.append(read_settings(line))
                steering.instruction(each[-1])
            except AMoPOError as error:
                raise AMoPOError(f"amopo.sample_settings: {error}") from None
    by_text = {steering.instruction(one): one for one in reversed(each)}
    return [one if text else {} for text, one in reversed(by_text.items())]


#: By settings, the first and the last evaluation's entry in the trainer's log.
Ends = dict[str, tuple[dict[str, float], dict[str, float]]]


class Samples(TrainerCallback):
    """Takes samples, on every process, and shows them on the main one.

    Raises:
        AMoPOError: for settings that the model can't be asked for.
    """

    def __init__(self, trainer: Any, trackers: Trackers):
        self.trainer = trainer
        self.trackers = trackers
        self.settings = settings_of(trainer.amopo, trainer.steering)
        self.questions: list[str] = []  # [N] the last turns of the prompts
        self.prompts: list[list[int]] = []  # [N * S] token ids, all settings of the first one first
        self.answers: list[list[int]] = []  # [N * S] token ids, of the last evaluation
        self.began = self.spent = 0.0  # seconds

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.eval_dataset is None:
            LOG.warning("amopo.generate_samples: nothing to answer; hold more prompts out.")
            return
        cfg, tokenizer = self.trainer.axolotl_cfg, self.trainer.processing_class
        chat = ChatTokenizer(
            tokenizer,
            _template(tokenizer),
            dict(cfg.chat_template_kwargs or {}),
            tuple(cfg.eot_tokens or ()),
            generation_stops(cfg.base_model, cfg.revision_of_model),
        )
        self.known_stops = (tokenizer.eos_token_id, chat.end_id())
        self.questions, self.prompts = self._prompts(chat)
        self.began, self.spent = time.monotonic(), 0.0

    def _prompts(self, chat: ChatTokenizer) -> tuple[list[str], list[list[int]]]:
        """Return the first different held-out prompts that leave room for an answer."""
        cfg, steering, wanted = self.trainer.axolotl_cfg, self.trainer.steering, self._wanted
        model = causal_model(unwrap(self.trainer.model))
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        longest = min(cfg.sequence_len, longest or cfg.sequence_len)
        found: dict[str, list[list[int]]] = {}
        questions: list[str] = []
        for row in self.trainer.eval_dataset.select_columns(["messages", "tools"]):
            if len(found) == wanted:
                break
            if row["messages"] in found:
                continue
            messages, tools = json.loads(row["messages"]), json.loads(row["tools"])
            ids = [
                chat.prompt_ids(steering.messages(messages, one) if one else messages, tools)
                for one in self.settings
            ]
            if max(map(len, ids)) < longest:
                found[row["messages"]] = ids
                questions.append(str(messages[-1]["content"]))
        if len(found) < wanted:
            LOG.warning(
                "amopo.generate_samples: %s held-out prompts are answered, for there are no more "
                "that are different and leave room for an answer.", len(found),
            )  # fmt: skip
        return questions, [ids for each in found.values() for ids in each]

    @property
    def _wanted(self) -> int:
        return self.trainer.amopo.generate_samples

    def take(self) -> dict[str, float]:
        """Answer the prompts, and return the metrics; called on every process at an evaluation.

        The model is in evaluation mode, as the evaluation has left it.
        """
        if not self.prompts:
            return {}
        started, args = time.monotonic(), self.trainer.args
        # All processes answer as many, for weights that are gathered in each pass.
        places = list(range(len(self.prompts)))
        places += places[:1] * (-len(places) % args.world_size)
        share = places[args.process_index :: args.world_size]
        made = self._generate([self.prompts[i] for i in share])
        answers = dict(gather_object(list(zip(share, made, strict=True))))
        self.answers = [answers[i] for i in range(len(self.prompts))]
        metrics: dict[str, float] = {}
        for s, settings in enumerate(self.settings):
            own = self.answers[s :: len(self.settings)]
            metrics |= {
                f"eval_samples/{written(settings)}/tokens": fmean(map(len, own)),
                f"eval_samples/{written(settings)}/repetition": fmean(map(repetition, own)),
                f"eval_samples/{written(settings)}/unfinished": fmean(
                    not self._finished(ids) for ids in own
                ),
            }
        self.spent += time.monotonic() - started
        # Processes have clocks of their own, and the best checkpoint may be chosen by a metric.
        times = torch.tensor([self.spent, time.monotonic() - self.began], device=args.device)
        spent, passed = self.trainer.accelerator.reduce(times, reduction="sum").tolist()
        return metrics | {"eval_samples/time": spent / passed}

    def _generate(self, prompts: list[list[int]]) -> list[list[int]]:
        trainer, cfg = self.trainer, self.trainer.axolotl_cfg
        wrapped = trainer.model_wrapped
        model = causal_model(unwrap(wrapped))
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        own = model.generation_config
        self.stops = stop_tokens(model, *self.known_stops)
        config = generation_config(
            self.stops,
            cfg.generation_max_new_tokens,
            cfg.generation_temperature if cfg.generation_do_sample else 0.0,
            cfg.generation_top_p or 1.0,
            cfg.generation_top_k or 0,
        )
        root = wrapped if isinstance(wrapped, FSDPModule) else None
        devices = [] if model.device.type == "cpu" else [model.device.index or 0]
        with torch.random.fork_rng(devices):  # and the CPU's
            torch.manual_seed(trainer.args.seed + trainer.args.process_index)
            # What the embeddings and the head belong to is gathered by the outermost module's
            # forward alone, and below an adapter `generate` calls an inner one.
            if root is not None:
                root.unshard()
            # A folder's own sampling settings must not mix with those of the YAML.
            model.generation_config = GenerationConfig()
            try:
                with trainer.accelerator.autocast():
                    return continue_prompts(
                        model,
                        prompts,
                        config,
                        trainer.args.eval_batch_size,
                        synced=sharded and trainer.args.world_size > 1,
                    )
            finally:
                model.generation_config = own
                if root is not None:
                    root.reshard()

    def _finished(self, ids: list[int]) -> bool:
        return bool(ids) and ids[-1] in self.stops

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not (state.is_world_process_zero and self.prompts and self.trainer.is_in_train):
            return
        # The first entry of each setting, which a resumed run may have had from the start or not.
        ends: Ends = {}
        for name in map(written, self.settings):
            entries = [e for e in state.log_history if f"eval_samples/{name}/tokens" in e]
            ends[name] = entries[0], entries[-1]
        rows = self._rows({"step": state.global_step, "epoch": state.epoch}, ends)
        for row in rows:
            append(Path(args.output_dir) / FILE, row)
        LOG.info("%s", visible(self._text(rows, ends)))
        texts = [
            row | {name: shortened(row[name]) for name in ("prompt", "answer")} for row in rows
        ]
        self.trackers.table(NAME, texts, state.global_step, markdown_table(texts))

    def _rows(self, when: dict[str, Any], ends: Ends) -> list[dict[str, Any]]:
        decode, count = self.trainer.processing_class.decode, len(self.settings)
        rows = []
        for i, ids in enumerate(self.answers):
            name = written(self.settings[i % count])
            rows.append(
                when
                | {
                    "sample": i // count,
                    "settings": name,
                    "prompt": self.questions[i // count],
                    "answer": decode(ids, skip_special_tokens=True).strip(),
                    "tokens": len(ids),
                    "repetition": repetition(ids),
                    "finished": self._finished(ids),
                    "tokens_first": ends[name][0][f"eval_samples/{name}/tokens"],
                    "repetition_first": ends[name][0][f"eval_samples/{name}/repetition"],
                }
            )
        return rows

    def _text(self, rows: list[dict[str, Any]], ends: Ends) -> str:
        """Return what the log says: means beside the first ones, and the beginning of each text."""
        lines = [f"Samples at step {rows[0]['step']}:"]
        for settings, (first, last) in ends.items():
            name = f"eval_samples/{settings}/"
            then = ("", "")
            if first is not last:
                length, again = first[name + "tokens"], first[name + "repetition"]
                then = f" (at step {first['step']}: {length:.1f})", f" ({again:.1%})"
            lines.append(
                f"  {settings}: {last[name + 'tokens']:.1f} tokens{then[0]}, "
                f"{last[name + 'repetition']:.1%} of 4-grams repeated{then[1]}, "
                f"{last[name + 'unfinished']:.0%} of the answers cut off"
            )
        for row in rows:
            question, answer = (
                " ".join(shortened(row[name], LINE).split()) for name in ("prompt", "answer")
            )
            lines.append(f"  {question} | {row['settings']} | {answer or '(nothing)'}")
        return "\n".join(lines)


def _template(tokenizer: Any) -> str:
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template
