"""AMoPOTrainer: axolotl's trainer with the AMoPO loss, its metrics, a deterministic evaluation."""

import hashlib
from pathlib import Path
from typing import Any, ClassVar, override

import torch
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.utils.logging import get_logger
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import EvalPrediction
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from axolotl_amopo.config.block import AMoPOConfig
from axolotl_amopo.errors import AMoPOError
from axolotl_amopo.loss import AMoPOLoss, amopo_loss
from axolotl_amopo.model.choose import Choice, choose_layout
from axolotl_amopo.model.forward import of_pairs, prepare_model, response_logps
from axolotl_amopo.steering.steering import Steering
from axolotl_amopo.training.card import FILE as CARD
from axolotl_amopo.training.card import is_somebodys, write_card
from axolotl_amopo.training.checkpoints import Checkpoints, Run
from axolotl_amopo.training.metrics import Means, example_metrics, group_means, metric_names
from axolotl_amopo.training.run_log import stamped
from axolotl_amopo.training.sampler import GROUPED_PASSES, LengthGroupedSampler, row_lengths

LOG = get_logger(__name__)


class AMoPOTrainer(AxolotlTrainer):
    """Trains on pairs under K prompts. `configure` must be called before it is used; axolotl's
    builder does so through `post_set_axolotl_cfg`."""

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
        prepare_model(self.accelerator.unwrap_model(self.model))
        self._choice: Choice | None = None
        # With `amopo.eval_table`, the last evaluation's metrics [N, 1 + M] and example ids [N].
        self.evaluated: EvalPrediction | None = None

    @classmethod
    @override
    def requires_all_columns(cls, cfg: Any) -> bool:
        return True

    @override
    def post_set_axolotl_cfg(self) -> None:
        cfg = self.axolotl_cfg
        # Before axolotl writes the checkpoint that it finds by itself into the same key.
        self._auto_resume = cfg.auto_resume_from_checkpoints and not cfg.resume_from_checkpoint
        self.configure(AMoPOConfig.model_validate(cfg.amopo.to_dict()), cfg.rl_beta)

    def configure(self, config: AMoPOConfig, beta: float) -> None:
        """Set the method's parameters: the `amopo:` block and `rl_beta`."""
        self.amopo = config
        self.beta = beta
        self.metric_names = metric_names(config.prompt_names)
        self._means = Means(self.metric_names)

    @property
    def steering(self) -> Steering | None:
        """What the saved model can be asked for; None where the data don't say their scales."""
        facts = stamped(self.train_dataset)
        if not facts:
            return None
        scales, lower = facts[0]["scales"], set(facts[0]["lower_is_better"])
        kwargs = self.axolotl_cfg.chat_template_kwargs
        return Steering.from_config(self.amopo, scales, lower, kwargs and dict(kwargs))

    @property
    def data_seed(self) -> int:
        """Of the order of the rows and of the weights' draws."""
        return self.args.data_seed if self.args.data_seed is not None else self.args.seed

    @override
    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """As the base class, from a checkpoint that is known to be complete.

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
        # axolotl's callbacks read from there what they had saved.
        self.axolotl_cfg.resume_from_checkpoint = resume_from_checkpoint or None
        done = super().train(resume_from_checkpoint or None, **kwargs)
        self._save_steering(self.args.output_dir)  # axolotl saves the trained model by itself
        return done

    @override
    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As the base class, before which a card of the user's own is left alone; then ours."""
        if not self.is_world_process_zero():
            return
        if is_somebodys(Path(self.args.output_dir)):
            LOG.warning(
                "%s in %s was not made by a program, so it stays; move it for a new model card.",
                CARD, self.args.output_dir,
            )  # fmt: skip
            return
        super().create_model_card(*args, **kwargs)
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
        finally:
            args.save_total_limit, args.push_to_hub = limit, push
        self._checkpoints.finish(folder, limit, self.state.best_model_checkpoint)
        if push:
            self._push_from_checkpoint(str(folder))

    @override
    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # axolotl's writes the model on the main process alone, even where every machine saves.
        parent = super() if self.is_world_process_zero() else super(AxolotlTrainer, self)
        parent._save(output_dir, state_dict=state_dict)
        self._save_steering(output_dir or self.args.output_dir)

    def amopo_forward(self, model: nn.Module, inputs: dict[str, Any]) -> AMoPOLoss:
        """The loss of a batch; evaluation takes the means instead of draws."""
        config = self.amopo
        if self._choice is None:  # at the first batch, when the model is wrapped as it will be
            self._choice = choose_layout(
                model,
                inputs,
                config.share_prompt,
                agree=lambda worst: self.accelerator.gather(worst).max(),
                half_precision=self.accelerator.mixed_precision != "no",
                compiled=self.args.torch_compile,
            )
        layout, own_logits = self._choice
        token_logps, mask = response_logps(model, inputs, layout, own_logits=own_logits)
        noise = static = None
        weighting = config.weighting
        if weighting == "gaussian":
            if model.training:
                ids, forest = inputs["example_ids"], inputs["forest"]
                seed, step = self.data_seed, self.state.global_step
                noise = draw_noise(ids, forest.prompts, seed, step, forest.responses_by_example())
                if forest.pairs is not None:  # the same in all pairs of a response
                    noise = of_pairs(noise, inputs)
            else:
                weighting = "mean"
        if weighting == "static":
            static = token_logps.new_tensor([config.weights[name] for name in config.prompt_names])
        return amopo_loss(
            token_logps,
            mask,
            beta=self.beta,
            gamma=config.gamma,
            weighting=weighting,
            static_weights=static,
            noise=noise,
            dimension_mask=inputs["dimension_mask"],
            pair_weights=pair_weights(inputs),
        )

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
        result = self.amopo_forward(model, inputs)
        values = example_metrics(result, inputs["dimension_mask"])  # [P, 1 + M]
        if inputs["forest"].pairs is not None:
            values = group_means(values, inputs["groups"])  # [B, 1 + M]
        loss = result.loss
        if model.training:
            self._means.add(values)
            if num_items_in_batch is not None:
                # Data-parallel ranks average their gradients, so each scales its share up.
                share = len(values) * self.args.world_size / num_items_in_batch
                loss = loss * share
        return (loss, {"values": values}) if return_outputs else loss

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
    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Any]], device: torch.device
    ) -> Tensor:
        """Examples of an optimizer step, over its micro batches and all ranks.

        Where an epoch's rows don't fill its last pass, accelerate pads the pass with rows from the
        epoch's beginning. They are masked here, so that they count for nothing.
        """
        examples = sum(len(batch["example_ids"]) for batch in batch_samples)
        args, ended = self.args, self.accelerator.gradient_state.end_of_dataloader
        if ended and args.world_size > 1 and not args.dataloader_drop_last:
            last = batch_samples[-1]
            rows = len(last["example_ids"])  # B of each rank make a pass
            left = (len(self.train_dataset) - 1) % (rows * args.world_size) + 1
            own = min(max(left - args.process_index * rows, 0), rows)
            last["dimension_mask"][last["groups"] >= own] = False
            examples -= rows - own
        count = torch.tensor(examples, device=device, dtype=torch.float32)
        return self.accelerator.reduce(count, reduction="sum")

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
            _, outputs = self.compute_loss(model, inputs, return_outputs=True)
        # The loop would take a batch's loss for that of each of its examples, and so count in what
        # pads the last one. It only computes metrics where there are labels.
        return None, outputs["values"], inputs["example_ids"]

    def _mean_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        self.evaluated = prediction if self.amopo.eval_table else None
        means = Means(self.metric_names)
        means.add(torch.from_numpy(prediction.predictions))  # [N, 1 + M]
        return means.take()

    @override
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            means = self._means.take(lambda sums: self.accelerator.reduce(sums, reduction="sum"))
            logs |= {name: mean for name, mean in means.items() if name != "loss"}
        super().log(logs, start_time)


def draw_noise(
    example_ids: Tensor, prompts: int, seed: int, step: int, responses: list[int] | None = None
) -> Tensor:
    """Standard normal draws that depend on the run's seed, the step and the example alone.

    So a resumed run goes on with the same draws, and neither the micro batch size nor the number
    of processes changes them.

    Args:
        example_ids: [B].
        responses: [B] how many each example has, by default two.

    Returns:
        [B, prompts, N] float32 on the device of `example_ids`, N the most responses.
    """
    responses = responses or [2] * len(example_ids)
    draws = torch.zeros(len(responses), prompts, max(responses))
    for row, example, count in zip(draws, example_ids.tolist(), responses, strict=True):
        key = hashlib.blake2b(f"{seed} {step} {example}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "big") >> 1)
        row[:, :count] = torch.randn(prompts, count, generator=generator)
    return draws.to(example_ids.device)


def pair_weights(batch: dict[str, Any]) -> Tensor | None:
    """[P] that let the pairs of a group weigh as much as one pair; None where there are none."""
    if batch["forest"].pairs is None:
        return None
    counts_B = batch["groups"].bincount()
    return 1 / (counts_B[batch["groups"]] * len(counts_B))
