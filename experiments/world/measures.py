"""What a trained model writes, measured exactly on questions that it has not seen.

A model is asked in several ways (`asks`), as it was asked in training, and answers freely at
temperature 1:

    plain       no instruction
    best        all dimensions at their best; for a model without instructions as plain
    detail=4    one dimension at a rating, or at a weight where training had weights in its prompts
    front 3     the ratings, or the weights, of a point of the sweep

A run's measures are flat: names to numbers.

    score                   mean over the trained dimensions of what is obtained, asked for the best
    worst                   that of the dimension with the least
    best/DIM, plain/DIM     mean attribute on 1 to 5; of every attribute, trained or not
    ungrammatical           share of the answers (asked for the best) that are none of the language,
                            each of which is worth 1 in everything
    words, repetition, entropy   of the same answers: their number, the share that stood before, and
                            -log pi(answer) in nats
    kl                      mean log(pi / base) of the same answers in nats
    ordering, ordering/DIM  share of pairs of held-out answers of the base model whose implicit
                            rewards are in the order of the exact attribute, under the prompt that
                            asks for DIM at its best; equal attributes left out,
                            equal rewards count half
    steer/DIM/rank, /monotone, /span, /error    see `effect.py` in axolotl_amopo/steering;
                            `steer` is the mean rank correlation
    pull/DIM                mean attribute when DIM alone is asked for, minus when another one is
    front                   hypervolume of the means of `best` and the sweep, as a share of all
    *_ideal                 what the best possible answers of the language have: the volume below
                            all, the highest mean over the dimensions, the highest minimum

`means` has the mean attributes of every ask.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import base_model
import language
import numpy as np
import torch
from preference import Engine, RunSettings, stacked
from rated import SCALE, Answered, drawn_seed, messages

from axolotl_amopo.config.block import AMoPOConfig
from axolotl_amopo.example import Example, flat
from axolotl_amopo.model import make_batch, responses
from axolotl_amopo.objectives.ric import targets
from axolotl_amopo.steering.effect import steered
from axolotl_amopo.steering.front import hypervolume, simplex
from axolotl_amopo.steering.steering import OVERALL, Settings, Steering

ANSWERS = {"plain": 2, "best": 4}  # per question; of every other ask one
WEIGHTS = (0.0, 0.2, 0.5, 0.8, 1.0)


def steering_of(config: AMoPOConfig) -> Steering:
    """Return what a model that the block trains can be asked for."""
    return Steering.from_config(config, dict.fromkeys(config.dimension_names, SCALE))


def best(config: AMoPOConfig, steering: Steering) -> Settings:
    """Return the settings that ask for all dimensions at their best.

    Empty for a model that knows no instruction that names all of them.
    """
    names = config.dimension_names
    if not (config.has_instructions and (steering.overall or steering.one_prompt)):
        return {}
    if steering.weighted:
        return dict.fromkeys(names, 1 / len(names))
    return {OVERALL: None} if steering.overall else dict.fromkeys(names)


def asks(config: AMoPOConfig) -> dict[str, Settings]:
    """Return by name what the model is asked for."""
    steering, names = steering_of(config), config.dimension_names
    made: dict[str, Settings] = {"plain": {}, "best": best(config, steering)}
    if not config.has_instructions:
        return made
    for dimension in steering.dimensions:
        for number in levels(steering, dimension.name):
            made[asked_for(dimension.name, number)] = {dimension.name: number}
    if not (steering.takes_numbers and (steering.overall or steering.one_prompt)):
        return made
    count = len(names)
    for i, weights in enumerate(simplex(count)):
        numbers: Sequence[float] = weights
        if not steering.weighted:
            ratings = targets(weights, [SCALE[0]] * count, [SCALE[1]] * count)
            numbers = [float(round(rating)) for rating in ratings]
        made[f"front {i}"] = dict(zip(names, numbers, strict=True))
    return made


def levels(steering: Steering, name: str) -> Sequence[float | None]:
    """Return the numbers that a dimension is asked for, lowest first; the last one is the best."""
    if steering.weighted:
        return WEIGHTS
    return steering.dimension(name).ratings() if steering.takes_numbers else [None]


def asked_for(name: str, number: float | None) -> str:
    """Return the name of an ask for one dimension."""
    return name if number is None else f"{name}={number:g}"


def measure(
    engine: Engine, base: Any, run: RunSettings, known: Sequence[Answered], seed: int
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Return a model's measures but for `ordering`, and the mean attributes of every ask.

    Args:
        engine: with the trained model.
        base: the base model.
        known: held-out questions.
        seed: of the answers that are drawn.
    """
    config = run.config
    steering, chat = steering_of(config), base_model.chat()
    wanted = asks(config)
    questions = [one.question for one in known]
    prompts: list[list[int]] = []
    owners: list[tuple[str, str]] = []  # ask, question
    texts: dict[tuple[str, str], list[int]] = {}
    for name, settings in wanted.items():
        for question in questions:
            key = steering.instruction(settings), question
            if key not in texts:
                texts[key] = chat.prompt_ids(steering.messages(messages(question), settings))
            for _ in range(ANSWERS.get(name, 1)):
                prompts.append(texts[key])
                owners.append((name, question))
    drawn = base_model.generate(engine.model, prompts, drawn_seed("measured", seed))

    found: dict[str, list[dict[str, float]]] = {name: [] for name in wanted}
    for (name, question), answer in zip(owners, drawn, strict=True):
        found[name].append(language.attributes(question, answer.text))
    means = {
        name: {a: float(np.mean([one[a] for one in values])) for a in language.ATTRIBUTES}
        for name, values in found.items()
    }

    names = config.dimension_names
    obtained = {name: means["best"][name] for name in names}
    made = {"score": float(np.mean([*obtained.values()])), "worst": min(obtained.values())}
    made |= {f"{ask}/{a}": means[ask][a] for ask in ("best", "plain") for a in means[ask]}
    places = [i for i, (name, _) in enumerate(owners) if name == "best"]
    answers = [drawn[i] for i in places]
    made |= {
        "ungrammatical": float(np.mean([language.parse(a.text) is None for a in answers])),
        "words": float(np.mean([len(a.text.split()) for a in answers])),
        "repetition": float(np.mean([language.repetition(a.text) for a in answers])),
        "entropy": float(np.mean([-a.logp for a in answers])),
    }
    under_base = answer_logps(base, [prompts[i] for i in places], [a.ids for a in answers])
    made["kl"] = float(np.mean([a.logp for a in answers]) - np.mean(under_base))
    return made | _steering(config, found, means) | _front(config, means), means


def _steering(
    config: AMoPOConfig,
    found: Mapping[str, list[dict[str, float]]],
    means: Mapping[str, dict[str, float]],
) -> dict[str, float]:
    steering, names = steering_of(config), config.dimension_names
    made: dict[str, float] = {}
    if not config.has_instructions:
        return made
    top = {name: means[asked_for(name, levels(steering, name)[-1])] for name in names}
    if len(names) > 1:
        for name in names:
            others = [top[other][name] for other in names if other != name]
            made[f"pull/{name}"] = top[name][name] - float(np.mean(others))
        made["pull"] = float(np.mean([made[f"pull/{name}"] for name in names]))
    if not steering.takes_numbers:
        return made
    for name in names:
        asked: list[float] = []
        obtained: list[float] = []
        for number in levels(steering, name):
            values = [one[name] for one in found[asked_for(name, number)]]
            asked += [float(number or 0.0)] * len(values)
            obtained += values
        seen = steered(asked, obtained)
        made |= {
            f"steer/{name}/rank": seen.rank_correlation,
            f"steer/{name}/monotone": float(seen.monotone),
            f"steer/{name}/span": seen.span,
        }
        if not steering.weighted:
            made[f"steer/{name}/error"] = seen.error
    made["steer"] = float(np.mean([made[f"steer/{name}/rank"] for name in names]))
    return made


def _front(config: AMoPOConfig, means: Mapping[str, dict[str, float]]) -> dict[str, float]:
    names = config.dimension_names
    low, high = ([bound] * len(names) for bound in SCALE)
    asked = [ask for ask in means if ask == "best" or ask in names or ask.startswith("front")]
    points = [[means[ask][name] for name in names] for ask in asked]
    possible = [[one[name] for name in names] for one in language.possible()]
    return {
        "front": hypervolume(points, low, high),
        "front_ideal": hypervolume(possible, low, high),
        "score_ideal": max(float(np.mean(one)) for one in possible),
        "worst_ideal": max(map(min, possible)),
    }


def answer_logps(
    model: Any, prompts: Sequence[list[int]], answers: Sequence[list[int]]
) -> list[float]:
    """Return log pi(answer | prompt) of each, in nats."""
    alone = [
        Example(
            prompts=[prompt],
            responses=[answer],
            follows=[[0]],
            comparisons=[(0, 0)],
            reads=[[0]],
            signs=[[0]],
            ratings=[[torch.nan]],
            points=[torch.nan],
        )
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return [float(sums[0, 0]) for sums in Engine(model, alone[:2]).sums(alone, size=64)]


def ordering_examples(run: RunSettings, known: Sequence[Answered]) -> list[Example]:
    """Return the held-out answers, compared by their exact attributes.

    Every dimension reads all pairs under the prompt that asks for it at its best.
    """
    config, chat = run.config, base_model.chat()
    steering, names = steering_of(config), config.dimension_names
    wanted: list[Settings] = [
        {name: levels(steering, name)[-1]} if config.has_instructions else {} for name in names
    ]
    made = []
    for one in known:
        asked = messages(one.question)
        ids = [tuple(chat.prompt_ids(steering.messages(asked, settings))) for settings in wanted]
        texts = list(dict.fromkeys(ids))
        exact = [language.attributes(one.question, answer) for answer in one.answers]
        pairs = list(combinations(range(len(one.answers)), 2))
        signs = [
            [int(np.sign(exact[first][name] - exact[second][name])) for name in names]
            for first, second in pairs
        ]
        if not any(flat(signs)):
            continue
        low, high = SCALE
        made.append(
            Example(
                prompts=[list(text) for text in texts],
                responses=[chat.response_ids(asked, answer) for answer in one.answers],
                follows=[[texts.index(text)] * len(one.answers) for text in ids],
                comparisons=pairs,
                reads=[list(range(len(names))) for _ in pairs],
                signs=signs,
                ratings=[[(e[name] - low) / (high - low) for name in names] for e in exact],
                points=[high - low] * len(names),
                weights=[1 / len(names)] * len(names),
            )
        )
    return made


@torch.no_grad()
def ordering(
    engine: Engine,
    run: RunSettings,
    examples: Sequence[Example],
    references: list[list[torch.Tensor]],
    size: int = 16,
) -> dict[str, float]:
    """Return how often the implicit rewards are in the order of the exact attributes.

    Args:
        engine: with the trained model.
        run: its settings.
        examples: of `ordering_examples`.
        references: of them, as the objective needs them.
    """
    objective, names = run.objective, run.config.dimension_names
    right = torch.zeros(len(names), dtype=torch.float64)
    count = torch.zeros(len(names), dtype=torch.float64)
    engine.model.eval()
    for start in range(0, len(examples), size):
        batch = make_batch(examples[start : start + size])
        found = engine.run(batch)
        places = range(start, start + len(found.logps))
        reference = stacked(references, places, found.logps)
        given = responses(batch, found.logps, found.mask, reference=reference)
        rewards = objective(given, None).rewards
        chosen, rejected = given.winner_first(rewards).unbind(-1)
        said = given.signs != 0
        share = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()
        right += (share * said).sum(0)
        count += said.sum(0)
    shares = (right / count.clamp(min=1)).tolist()
    made = {f"ordering/{name}": share for name, share in zip(names, shares, strict=True)}
    return made | {"ordering": float(np.mean(shares))}
