"""AMoPOTrainer: axolotl's trainer with an objective, its metrics, a deterministic evaluation."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, override

import torch
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.utils.logging import get_logger
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import EvalPrediction
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput

from axolotl_amopo.config.block import AMoPOConfig, read_block
from axolotl_amopo.config.redact import redact
from axolotl_amopo.config.references import INITIAL
from axolotl_amopo.config.through_axolotl import stamped
from axolotl_amopo.config.together import check_needs
from axolotl_amopo.errors import AMoPOError
from axolotl_amopo.model.batch import responses
from axolotl_amopo.model.choose import Choice, choose_layout
from axolotl_amopo.model.forward import TokenLogps, response_logps, teach
from axolotl_amopo.model.parts import replayed_loss, split_batch, together
from axolotl_amopo.objectives import Draw, Objective, Outcome, Responses, example_losses
from axolotl_amopo.objectives.base import reference_sums, response_sums
from axolotl_amopo.objectives.gradients import Gradients
from axolotl_amopo.steering.steering import Steering
from axolotl_amopo.training.card import FILE as CARD
from axolotl_amopo.training.card import is_somebodys, write_card
from axolotl_amopo.training.checkpoints import Checkpoints, Run
from axolotl_amopo.training.console import close_table
from axolotl_amopo.training.gradients import CombinedGradients, Judged
from axolotl_amopo.training.metrics import Means, example_metrics
from axolotl_amopo.training.reference import (
    References,
    TakeReference,
    references_at_evaluation,
    references_in_training,
    turn_dropout_off,
)
from axolotl_amopo.training.sampler import GROUPED_PASSES, LengthGroupedSampler, row_lengths
from axolotl_amopo.training.samples import Samples
from axolotl_amopo.training.sharing import log_choice

LOG = get_logger(__name__)


class AMoPOTrainer(AxolotlTrainer):
    """Trains a model with an objective on compared responses.

    `configure` must be called before it is used; axolotl's builder does so through
    `post_set_axolotl_cfg`.
    """

    tag_names: ClassVar = ["axolotl", "amopo"]
    # exp(loss) of a preference loss is not a perplexity.
    reports_token_perplexity = False
    # compute_loss divides by the examples of the whole optimizer step. Left to itself, the base
    # class decides by the model's signature, and doubles the loss at two accumulation steps.
    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.can_return_loss = True
        self.label_names = ["labels"]
        # The evaluation loop gathers per-example metrics over ranks, drops the examples that
        # padded the last batch, and hands them here.
        self.compute_metrics = self._mean_metrics
        # Before accelerate wraps the forward in autocast and the model in DDP and the like.
        teach(self.accelerator.unwrap_model(self.model))
        self.references: References | None = None
        # How far the model is from its reference before the first step, until that is logged.
        self._from_reference: Tensor | None = None
        self._choice: Choice | None = None
        self._choice_is_trained = False
        self._means = Means()
        # Of the columns that an evaluation gathers.
        self._metric_names: tuple[str, ...] = ()
        # With `amopo.eval_table`, the last evaluation's metrics by example id.
        self.evaluated: dict[int, dict[str, float]] = {}
        # With `amopo.generate_samples`, what takes them.
        self.samples: Samples | None = None

    @classmethod
    @override
    def requires_all_columns(cls, cfg: Any) -> bool:
        return True

    @override
    def post_set_axolotl_cfg(self) -> None:
        cfg = self.axolotl_cfg
        # Before axolotl writes the checkpoint that it finds by itself into the same key.
        self._auto_resume = cfg.auto_resume_from_checkpoints and not cfg.resume_from_checkpoint
        self.configure(read_block(cfg), cfg.rl_beta)

    def configure(self, config: AMoPOConfig, beta: float) -> None:
        """Set what is trained: the `amopo:` block and `rl_beta`.

        Raises:
            ConfigError: for an objective that needs what nothing here supplies.
        """
        self.amopo = config
        self.beta = beta
        self.objective: Objective = config.make_objective(beta)
        self.settings = config.make_settings()
        check_needs(config)
        # The gradients of the criteria, where a step is made of each.
        self.combined: CombinedGradients | None = None
        self._cosines = CombinedGradients(self) if config.gradient_cosines else None
        for setting in self.settings:
            if isinstance(setting, Gradients) and "gradients" in setting.needs:
                equal = [1 / len(config.criteria)] * len(config.criteria)
                weights = torch.tensor(config.shares or equal, dtype=torch.float64)
                self.combined = CombinedGradients(self, setting, weights)
        if self._needs_reference:
            turn_dropout_off(self.model)
            self.add_callback(TakeReference(self))

    @property
    def steering(self) -> Steering | None:
        """Return what the saved model can be asked for; None where no data says its scales."""
        facts = stamped(self.train_dataset)
        if not facts:
            return None
        scales, lower = facts[0]["scales"], set(facts[0]["lower_is_better"])
        cfg = self.axolotl_cfg
        return Steering.from_config(
            self.amopo, scales, lower, cfg.chat_template_kwargs, cfg.eot_tokens
        )

    @property
    def _needs_reference(self) -> bool:
        return "reference" in self.objective.needs

    @property
    def choice(self) -> Choice | None:
        """Return how batches go through the model; None before the first batch."""
        return self._choice

    @property
    def data_seed(self) -> int:
        """Return the seed of the order of the rows and of an objective's draws."""
        return self.args.data_seed if self.args.data_seed is not None else self.args.seed

    @override
    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train as the base class does, from a checkpoint that is known to be complete.

        Raises:
            AMoPOError: where the checkpoint named in the config is damaged, or this run can't go
                on from the one to be resumed.
        """
        self._checkpoints = Checkpoints(self.args.output_dir, self._run())
        # Each machine loads what it finds on its disk.
        self.args.save_on_each_node |= self._checkpoints.each_saves()
        if self._auto_resume or resume_from_checkpoint is True:
            resume_from_checkpoint = self._checkpoints.newest()
        elif resume_from_checkpoint:
            resume_from_checkpoint = self._checkpoints.named(resume_from_checkpoint)
        if self._needs_reference:
            start = Path(resume_from_checkpoint) if resume_from_checkpoint else None
            self.references = references_in_training(self, start)
        # axolotl's callbacks read from there what they had saved.
        self.axolotl_cfg.resume_from_checkpoint = resume_from_checkpoint or None
        try:
            done = super().train(resume_from_checkpoint or None, **kwargs)
        finally:
            close_table(self)
        self._save_steering(self.args.output_dir)  # axolotl saves the trained model by itself
        return done

    @override
    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card, unless there is one of the user's own."""
        if not self.is_world_process_zero():
            return
        if is_somebodys(Path(self.args.output_dir)):
            LOG.warning(
                "%s in %s was not made by a program, so it stays; move it for a new model card.",
                CARD, self.args.output_dir,
            )  # fmt: skip
            return
        super().create_model_card(*args, **redact(kwargs))  # paths of datasets are among its tags
        try:
            write_card(self)
        except AMoPOError as error:
            LOG.warning("The model card says little of rl: amopo: %s", error)

    def _save_steering(self, folder: str) -> None:
        if self.steering and self.is_world_process_zero():
            self.steering.save(folder)

    def _run(self) -> Run:
        args, state, sharding, resizable = self.args, self.accelerator.state, "", True
        if self.is_fsdp_enabled:
            sharding = f"FSDP ({state.fsdp_plugin.state_dict_type.name})"
        elif self.is_deepspeed_enabled:
            plugin = state.deepspeed_plugin
            sharding = f"DeepSpeed ZeRO-{plugin.zero_stage}"
            resizable = plugin.deepspeed_config.get("checkpoint", {}).get("load_universal", False)
        return Run(
            processes=args.world_size,
            micro_batch_size=args.train_batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            seed=self.data_seed,
            rows=len(self.train_dataset),
            group_by_length=self.axolotl_cfg.group_by_length,
            sharding=sharding,
            resizable=resizable,
        )

    # Private, as the next two: transformers 5.20 deletes older checkpoints inside it (trainer.py,
    # line 3380, `rotate_checkpoints`), and no callback runs before that.
    @override
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        args, name = self.args, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder = Path(self._get_output_dir(trial)) / name
        self._checkpoints.begin(folder)
        # Nothing is deleted or uploaded before the checkpoint is complete.
        limit, push, args.save_total_limit, args.push_to_hub = (
            args.save_total_limit,
            args.push_to_hub,
            None,
            False,
        )
        try:
            super()._save_checkpoint(model, trial)
            if self.references is not None and self._checkpoints.first_of_disk:
                self.references.save(folder)
        finally:
            args.save_total_limit, args.push_to_hub = limit, push
        self._checkpoints.finish(folder, limit, self.state.best_model_checkpoint)
        if push:
            self._push_from_checkpoint(str(folder))

    @override
    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # axolotl 0.21 takes every caller for the main process (core/trainers/base.py, line 1360)
        # and hands `is_main_process` on to save_pretrained, which then writes nothing; where every
        # machine saves, transformers' own method is the one that does.
        parent = super() if self.is_world_process_zero() else super(AxolotlTrainer, self)
        parent._save(output_dir, state_dict=state_dict)
        self._save_steering(output_dir or self.args.output_dir)

    def _parts(self, inputs: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
        """Return what a batch runs in, and how many more passes other processes need."""
        config = self.amopo
        parts = split_batch(
            inputs,
            config.max_tokens,
            one_prompt=config.one_prompt_at_a_time,
            layout=self._choice.layout if self._choice else "packed",
        )
        if self.args.world_size == 1 or not (config.max_tokens or config.one_prompt_at_a_time):
            return parts, 0
        # FSDP2 and ZeRO-3 gather weights in each pass, and wait for each other there.
        count = torch.tensor([len(parts)], device=self.args.device)
        return parts, int(self.accelerator.gather(count).max()) - len(parts)

    def _logps(self, model: nn.Module, batch: dict[str, Any]) -> TokenLogps:
        choice = self._choose(model, batch)
        return response_logps(
            model, batch, choice.layout, own_logits=choice.own_logits, dtype=self._autocast
        )

    def run(self, model: nn.Module, inputs: dict[str, Any]) -> TokenLogps:
        """Return a batch's log-probabilities, from as many passes as `amopo.max_tokens` wants."""
        parts, idle = self._parts(inputs)
        found = [self._logps(model, part) for part in parts + parts[-1:] * idle]
        return together(found[: len(parts)])

    def _reference_sums(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor | None:
        if not self._needs_reference:
            return None
        if self.references is None:  # nobody trains
            self.references = references_at_evaluation(self)
        # Decides how batches run, with the adapter on; and before the policy's own pass, which
        # FSDP2 and ZeRO-3 expect to be followed by its backward pass.
        self._choose(model, self._parts(inputs)[0][0])
        return self.references.sums(model, inputs, partial(self.run, model))

    def _judge(
        self,
        inputs: dict[str, Any],
        found: TokenLogps,
        reference: Tensor | None,
        *,
        draws: bool,
    ) -> tuple[Responses, Outcome]:
        """Return what an objective is given, and what it makes of it; at evaluation nothing is
        drawn."""
        config, (logps, mask, router_loss) = self.amopo, found
        weights = None
        if config.shares is not None:
            weights = logps.new_tensor(config.shares).expand(len(logps), -1)  # [B, C]
        given = responses(inputs, logps, mask, weights=weights, reference=reference)
        draw = Draw(self.data_seed, self.state.global_step) if draws else None
        outcome = self.objective(given, draw)
        for setting in self.settings:
            outcome = setting(outcome, given)
        if router_loss is not None:
            terms = outcome.terms | {"router": router_loss.expand(len(logps))}
            outcome = outcome._replace(terms=terms)
        return given, outcome

    def _measure_reference(self, given: Responses) -> None:
        """Keep by how much the model and its reference differ, where they should be the same."""
        if INITIAL in self.amopo.references:
            sums = response_sums(given.logps.detach(), given.mask)
            place = self.amopo.references.index(INITIAL)
            worst = (sums - reference_sums(given, sums, place)).abs().max().reshape(1)
            seen = self._from_reference
            self._from_reference = worst if seen is None else torch.maximum(seen, worst)

    @property
    def _autocast(self) -> torch.dtype | None:
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)

    def _choose(self, model: nn.Module, inputs: dict[str, Any]) -> Choice:
        """Return how batches go through the model, decided at the first one, when the model is
        wrapped as it will be; again at the first one that is trained, if one was evaluated before.
        """
        trains = model.training and torch.is_grad_enabled()
        if self._choice is None or trains > self._choice_is_trained:
            choice = choose_layout(
                model,
                inputs,
                self.amopo.share_prompt,
                agree=lambda worst: self.accelerator.gather(worst).max(),
                autocast=self._autocast,
                compiled=self.args.torch_compile,
            )
            if choice != self._choice:
                log_choice(choice)
            self._choice, self._choice_is_trained = choice, trains
        return self._choice

    @override
    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        if self.args.include_tkps and model.training:
            self._accumulate_token_counts(inputs)
        values: dict[str, Tensor] = {}
        reference = self._reference_sums(model, inputs)

        def judge(found: TokenLogps) -> Judged:
            given, outcome = self._judge(inputs, found, reference, draws=model.training)
            if reference is not None and model.training and self.state.global_step == 0:
                self._measure_reference(given)
            values.update(example_metrics(outcome, given, self.amopo.criteria))
            factor = 1.0
            if model.training and num_items_in_batch is not None:
                # Data-parallel ranks average their gradients, so each scales its share up.
                factor = len(given.logps) * self.args.world_size / num_items_in_batch
            loss = (example_losses(outcome, given) * given.counts).mean() * factor
            return Judged(given, outcome, factor, loss)

        forward, add = partial(self._logps, model), partial(self._add_gradients, model)
        if not (model.training and torch.is_grad_enabled()):
            loss = judge(self.run(model, inputs)).loss
        elif combined := self._combined_now:
            # Without synchronising: what is summed up is reduced once per step.
            unsynced = partial(self._unsynced, model, partial(forward, inputs))
            loss = combined.loss(unsynced, judge, add, again=self.is_fsdp_enabled)
        else:
            parts, idle = self._parts(inputs)
            if len(parts) + idle > 1:
                loss = replayed_loss(parts, forward, lambda found: judge(found).loss, add, idle)
            else:
                loss = judge(forward(inputs)).loss
        if model.training:
            self._means.add(values)
        return (loss, values) if return_outputs else loss

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run a micro batch, and give a step's last one the gradient that was made of several."""
        loss = super().training_step(*args, **kwargs)
        if combined := self._combined_now:
            combined.collect()
            if self.accelerator.sync_gradients:
                combined.finish()
        return loss

    @property
    def _combined_now(self) -> CombinedGradients | None:
        """Return what makes this optimizer step of each criterion's gradient, if anything does."""
        due = self._cosines and self.state.global_step % self.amopo.gradient_cosines == 0
        return self._cosines if due else self.combined

    def _unsynced(self, model: nn.Module, run: Callable[[], Any]) -> Any:
        """Return what `run` returns, with nothing for DDP to wait for in its backward pass.

        FSDP2 would keep whole gradients, and adds up sharded ones by itself.
        """
        deepspeed = self.is_deepspeed_enabled
        no_sync: Any = nullcontext if deepspeed else getattr(model, "no_sync", nullcontext)
        with no_sync():
            return run()

    def _add_gradients(self, model: nn.Module, loss: Callable[[], Tensor], **options: Any) -> None:
        """Run a backward pass that nobody synchronises, steps behind or reports."""
        state = self.accelerator.gradient_state
        if self.is_deepspeed_enabled:
            options["scale_wrt_gas"] = False
        synchronises = state.sync_gradients
        # A DeepSpeed engine steps behind each backward pass of a step's last micro batch.
        # transformers 5.20 sets it in the same way (trainer.py, `_set_sync_gradients`).
        state._set_sync_gradients(False)

        def run() -> None:
            value = loss()
            # On for the forward pass; transformers runs its backward pass without it.
            with torch.autocast(value.device.type, enabled=False):
                self.accelerator.backward(value, **options)

        try:
            self._unsynced(model, run)
        finally:
            state._set_sync_gradients(synchronises)

    # The one place where transformers 5.20 asks for a sampler (trainer.py, line 1068); axolotl's
    # own trainer overrides it too.
    @override
    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        cfg = self.axolotl_cfg
        if cfg.group_by_length is False or cfg.curriculum_sampling:
            return super()._get_train_sampler(train_dataset)
        args = self.args
        return LengthGroupedSampler(
            row_lengths(train_dataset if train_dataset is not None else self.train_dataset),
            pass_size=args.train_batch_size * args.world_size,
            window=GROUPED_PASSES if cfg.group_by_length else args.gradient_accumulation_steps,
            seed=self.data_seed,
            epoch=lambda: int(self.state.epoch or 0),
        )

    @override
    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor]:
        """Return the micro batches of an optimizer step, and how much all ranks' examples count.

        Where an epoch's rows don't fill its last pass, accelerate pads the pass with rows from the
        epoch's beginning. They get a count of 0, so that they count for nothing.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        args, ended = self.args, self.accelerator.gradient_state.end_of_dataloader
        if batches and ended and args.world_size > 1 and not args.dataloader_drop_last:
            counts = batches[-1]["counts"]  # [B], and B of each rank make a pass
            left = (len(self.train_dataset) - 1) % (len(counts) * args.world_size) + 1
            own = min(max(left - args.process_index * len(counts), 0), len(counts))
            places = torch.arange(len(counts), device=counts.device)
            batches[-1]["counts"] = counts * (places < own)
        count = sum((batch["counts"].sum() for batch in batches), torch.zeros(()))
        return batches, self.accelerator.reduce(count.to(device), reduction="sum")

    @override
    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            _, values = self.compute_loss(model, inputs, return_outputs=True)
        # One tensor, for the loop gathers tensors over ranks one by one.
        self._metric_names = tuple(values)
        columns = torch.stack(list(values.values()), dim=-1)  # [B, M]
        # The loop would take a batch's loss for that of each of its examples, and so count in what
        # pads the last one. It only computes metrics where there are labels.
        return None, columns, inputs["example_ids"]

    @override
    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        output = super().evaluation_loop(*args, **kwargs)
        if self.samples and self.is_in_train:
            # Here, so that they stand in the evaluation's own line of the log.
            output.metrics.update(self.samples.take())
        return output

    def _mean_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        columns = torch.from_numpy(prediction.predictions).unbind(-1)  # M of [examples]
        values = dict(zip(self._metric_names, columns, strict=True))
        if self.amopo.eval_table:
            rows = zip(*(column.tolist() for column in columns), strict=True)
            self.evaluated = {
                example: dict(zip(values, row, strict=True))
                for example, row in zip(prediction.label_ids.tolist(), rows, strict=True)
            }
        means = Means()
        means.add(values)
        return means.take()

    @override
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            means = self._means.take(lambda sums: self.accelerator.reduce(sums, reduction="sum"))
            logs |= {name: mean for name, mean in means.items() if name != "loss"}
            for combined in filter(None, (self.combined, self._cosines)):
                logs |= combined.metrics
                combined.metrics = {}  # the cosines of a step are logged once
            if self._from_reference is not None:
                worst = self.accelerator.gather(self._from_reference).max().item()
                logs["reference/difference"], self._from_reference = worst, None
        super().log(logs, start_time)
