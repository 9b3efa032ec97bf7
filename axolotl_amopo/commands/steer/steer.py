"""Ask models for ratings, rate what they answer, and measure how it follows.

Example:

    raters = load_raters(Path("raters.yml"))
    report = steer([("tuned", find_model("outputs/adapter"))], read_prompts(Path("held_out.jsonl")),
                   raters, Path("steered"))
    report.models[0].curves[0].rank_correlation
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from axolotl_amopo.commands.kit.answers import GREEDY
from axolotl_amopo.commands.kit.generator import Progress, Sampling
from axolotl_amopo.commands.kit.launch import own_folder
from axolotl_amopo.commands.kit.models import TrainedModel
from axolotl_amopo.commands.kit.questions import Prompt
from axolotl_amopo.commands.steer.collect import STATE, Asked, Said, check_same, collect
from axolotl_amopo.commands.steer.measure import Rated, Steered, SteerReport, measure, notes
from axolotl_amopo.errors import AMoPOError
from axolotl_amopo.raters.base import Item
from axolotl_amopo.raters.rating import Raters
from axolotl_amopo.steering.asks import Kind, asks_of
from axolotl_amopo.steering.steering import Steering

BASE = "base"
# Begins a bar, of a name and a total, and returns what advances it.
Bars = Callable[[str, int], Progress]


def no_bars(name: str, total: int) -> Progress:
    """Show nothing."""
    return lambda done: None


def plan_asks(
    named: Sequence[tuple[str, TrainedModel]],
    raters: Raters,
    points: int,
    *,
    with_base: bool,
    only: Kind | None = None,
) -> list[Asked]:
    """Return what each model is asked; the base, what the first one is.

    Args:
        points: at most so many numbers per sweep.
        only: leave the sweeps out, or the front.

    Raises:
        AMoPOError: for a model that knows none of the dimensions that are rated, or rates one the
            other way round, and for a name that is there twice or can't be a file's.
    """
    made = []
    taken = {BASE} if with_base else set()
    for name, trained in named:
        if name in taken or name != Path(name).name or name in ("", ".."):
            why = "is taken" if name in taken else "can't be the name of a file"
            raise AMoPOError(f"{trained.folder}: the name '{name}' {why}; name it otherwise.")
        taken.add(name)
        steering = trained.steering
        dimensions = covered(name, steering, raters)
        made.append(Asked(name, trained, asks_of(steering, dimensions, points, only)))
    if with_base:
        made.append(Asked(BASE, named[0][1], made[0].asks, base=True))
    return made


def covered(name: str, steering: Steering, raters: Raters) -> list[str]:
    """Return the dimensions that a model was trained on and raters rate.

    Raises:
        AMoPOError: where there is none, or a rater's better end is the model's worse one.
    """
    rated = {d.name: d for d in raters.dimensions}
    found = [d for d in steering.dimensions if d.name in rated]
    if not found:
        raise AMoPOError(
            f"{name}: was trained on {', '.join(d.name for d in steering.dimensions)}, and the "
            f"raters rate {', '.join(rated)}; name a rater's dimension as the model's."
        )
    for dimension in found:
        if rated[dimension.name].direction != dimension.direction:
            raise AMoPOError(
                f"{name}: {dimension.direction} ratings of {dimension.name} were better in "
                f"training; write direction: {dimension.direction} for it in the raters' file."
            )
    return [d.name for d in found]


def steer(
    named: Sequence[tuple[str, TrainedModel]],
    prompts: Sequence[Prompt],
    raters: Raters,
    folder: Path,
    *,
    sampling: Sampling = GREEDY,
    samples: int = 1,
    points: int = 5,
    only: Kind | None = None,
    limit: int | None = None,
    seed: int = 0,
    with_base: bool = True,
    backend: str = "auto",
    force: bool = False,
    bars: Bars = no_bars,
) -> SteerReport:
    """Return how models follow what they are asked for.

    `folder` keeps answers and ratings; the same call again goes on where it was stopped.

    Args:
        named: models and what they are called in the report.
        raters: what rates the answers; none that made the ratings of training, if it can be.
        sampling: of the answers.
        samples: answers per prompt and ask.
        points: at most so many numbers per sweep.
        only: leave the sweeps out (`front`), or the front (`sweep`).
        limit: draw so many of the prompts.
        seed: of that draw, and of the intervals.
        with_base: ask the untuned model of the first one too.
        force: replace a measurement of other models, prompts or settings in the folder.

    Raises:
        AMoPOError: see `plan_asks`, `own_folder`, `collect` and `Raters.rate`; and for several
            answers per prompt without a temperature, which would be equal.
    """
    if samples > 1 and not sampling.temperature:
        raise AMoPOError(
            f"--samples {samples} without --temperature are {samples} times the same answer; add "
            "--temperature 0.7, or leave --samples out."
        )
    prompts = drawn(prompts, limit, seed)
    asked = plan_asks(named, raters, points, with_base=with_base, only=only)
    common = {
        "prompts": [[prompt.messages, prompt.tools] for prompt in prompts],
        "samples": samples,
        "sampling": {k: v for k, v in vars(sampling).items() if k != "batch_size"},
    }
    with own_folder(folder, STATE, force=force):
        check_same(folder, common, asked, force)
        models = []
        for one in asked:
            progress = bars(f"{one.name}: answers", len(one.asks) * len(prompts) * samples)
            path = folder / "answers" / f"{one.name}.jsonl"
            said = collect(
                one, prompts, samples, sampling, path, backend=backend, progress=progress
            )
            progress = bars(f"{one.name}: ratings", len(said) * len(raters.dimensions))
            models.append(rated(one, said, prompts, raters, folder, seed, progress))
    return SteerReport(
        prompts=len(prompts),
        samples=samples,
        dimensions=[d.name for d in raters.dimensions],
        scales={d.name: (d.scale[0], d.scale[1]) for d in raters.dimensions},
        lower=[d.name for d in raters.dimensions if d.direction == "lower"],
        raters=raters.provenance,
        models=models,
        notes=notes(models, len(prompts)),
    )


def rated(
    asked: Asked,
    said: Sequence[Said],
    prompts: Sequence[Prompt],
    raters: Raters,
    folder: Path,
    seed: int,
    progress: Progress,
) -> Steered:
    """Rate a model's answers, and measure.

    Raises:
        AMoPOError: see `Raters.rate`.
    """
    items = [
        Item(
            f"{folder / 'answers' / asked.name}.jsonl, {asked.asks[one.ask].name}, "
            f"{prompts[one.prompt].where}",
            prompts[one.prompt].conversation([]),
            one.text,
            prompts[one.prompt].row,
        )
        for one in said
    ]
    ratings = raters.rate(items, journal=folder / "ratings.jsonl", progress=progress)
    dimensions = [Rated(d.name, d.scale, d.direction == "lower") for d in raters.dimensions]
    return measure(asked.name, asked.asks, said, ratings, dimensions, seed)


def drawn(prompts: Sequence[Prompt], limit: int | None, seed: int) -> list[Prompt]:
    """Return so many of the prompts, in their order; all of them without a limit.

    Raises:
        AMoPOError: for a prompt with several questions: which answer would be rated?
    """
    for prompt in prompts:
        if prompt.later:
            raise AMoPOError(f"{prompt.where}: has several questions; steer takes rows with one.")
    if limit is None or limit >= len(prompts):
        return list(prompts)
    places = sorted(random.Random(seed).sample(range(len(prompts)), limit))
    return [prompts[i] for i in places]
