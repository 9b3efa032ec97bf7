"""`plan_worker.py FOLDER`: what training takes and what `plan` says of it, for `test_plan`.

Every config file of FOLDER is trained by axolotl for three steps, one after the other in this
process of their own, where nothing else takes memory. NAME.json is written for NAME.yml.
"""

import ctypes
import gc
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import conftest  # noqa: F401  (sets environment variables)
from runs import train
from torch.utils.flop_counter import FlopCounterMode

from axolotl_amopo.commands.plan.estimate import memory, sharding
from axolotl_amopo.commands.plan.load import load
from axolotl_amopo.commands.plan.models import model_config
from axolotl_amopo.commands.plan.step import FLOPS_ON_CPU, run_step
from axolotl_amopo.training.gradients import CombinedGradients
from axolotl_amopo.training.trainer import AMoPOTrainer


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def measure(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What training takes above what there was before the model was loaded; the last batch."""
    seen: dict[str, Any] = {}
    batch: dict[str, Any] = {}
    plain_train, plain_step = AMoPOTrainer.train, AMoPOTrainer.training_step
    collect = mock.patch.object(
        CombinedGradients, "collect", autospec=True, side_effect=CombinedGradients.collect
    )

    def watched_train(self, *args, **kwargs):
        parameters = list(self.model.parameters())
        trained = [p for p in parameters if p.requires_grad]
        seen["parameters"] = sum(p.numel() for p in parameters)
        seen["trainable"] = sum(p.numel() for p in trained)
        seen["trained"] = sum(p.nbytes for p in trained)
        seen["weights"] = sum(p.nbytes for p in parameters) - seen["trained"]
        if not self.axolotl_cfg.adapter:
            seen["weights"] = seen["trained"]
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        return plain_train(self, *args, **kwargs)

    def watched_step(self, model, inputs, *args, **kwargs):
        if self.state.global_step < 2:
            return plain_step(self, model, inputs, *args, **kwargs)
        # The third step counts, which takes memory of its own; the first proves the layout.
        seen.setdefault("memory", status("VmHWM") - before)
        batch.update(inputs)
        with (
            FlopCounterMode(display=False, custom_mapping=FLOPS_ON_CPU) as counter,
            collect as collected,
        ):
            loss = plain_step(self, model, inputs, *args, **kwargs)
        seen["flops"] = counter.get_total_flops()
        seen["passes"] = max(1, collected.call_count)
        seen["layout"] = self._choice.layout
        seen["parts"] = len(self._parts(batch)[0])
        return loss

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier ones left, back to the system
    before = status("VmRSS")
    with (
        mock.patch.object(AMoPOTrainer, "train", watched_train),
        mock.patch.object(AMoPOTrainer, "training_step", watched_step),
    ):
        train(path)
    return seen, batch


def planned(path: Path, batch: dict[str, Any]) -> dict[str, Any]:
    cfg, amopo = load(str(path), "cpu", 1)
    step = run_step(cfg, model_config(cfg), amopo, batch, batch, "cpu")
    lines = memory(step, cfg, sharding(cfg, 1), None)
    return asdict(step) | {"memory": sum(lines.values()), "lines": lines}


def main(folder: Path) -> None:
    paths = sorted(folder.glob("*.yml"))
    measure(paths[0])  # what the first training imports and starts is nobody's
    gc.collect()
    gc.freeze()  # a training collects garbage eight times, among all that was imported
    for path in paths:
        seen, batch = measure(path)
        plan = planned(path, batch)
        # Pages of files that come back after other processes took their room only ever add.
        for _ in range(3):
            if seen["memory"] < 1.1 * plan["memory"]:
                break
            again, _ = measure(path)
            before, seen = seen, min(seen, again, key=lambda one: one["memory"])
            if seen["memory"] > 0.97 * before["memory"]:
                break  # what is there again is the step's own
        result = {"measured": seen, "planned": plan}
        path.with_suffix(".json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
