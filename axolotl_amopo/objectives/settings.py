"""Settings beside the objective: what there is, in which order it applies, and what goes together.

    outcome = objective(responses, draw)
    for setting in settings:
        outcome = setting(outcome, responses)

Fields of a setting are keys of the `amopo:` block, as an objective's are.
"""

from collections.abc import Sequence

from axolotl_amopo.objectives.base import Objective, Setting
from axolotl_amopo.objectives.gradients import Gradients
from axolotl_amopo.objectives.terms import Anchor, Contrast, Offset
from axolotl_amopo.objectives.weights import Scalarization

#: In the order in which they apply: losses, then their weights, then terms that use the weights.
SETTINGS: tuple[type[Setting], ...] = (Offset, Scalarization, Anchor, Contrast, Gradients)

#: Which objectives admit which; an objective that is not here admits none.
ADMITTED: dict[str, frozenset[type[Setting]]] = {
    "amopo": frozenset({Offset, Scalarization, Anchor, Contrast}),
    "simpo": frozenset({Offset, Scalarization, Anchor, Contrast}),
    "dpo": frozenset({Offset, Scalarization, Anchor, Contrast, Gradients}),
    # A square has no margin to shift.
    "ipo": frozenset({Scalarization, Anchor, Contrast, Gradients}),
    # The rating gap is in its loss already.
    "mappo": frozenset({Scalarization, Anchor, Contrast, Gradients}),
    # One criterion is trained on, with a margin from ratings.
    "modpo": frozenset({Anchor, Contrast}),
    # The step is made of the criteria's gradients, and a term or a weight per example has no place.
    "raco": frozenset({Offset, Gradients}),
    "mgda": frozenset({Offset, Gradients}),
    "mgda_decoupled": frozenset({Offset, Gradients}),
    # The weights in the prompt are those of the losses.
    "cos_dpo": frozenset({Offset, Anchor, Contrast}),
    "mrpo": frozenset({Offset, Scalarization, Anchor, Contrast}),
    # No pairs: nothing wins.
    "lambda_dpo": frozenset(),
    "ric": frozenset(),
}


def admitted(objective: str) -> list[type[Setting]]:
    """Return the settings that go with an objective, in the order in which they apply."""
    allowed = ADMITTED.get(objective, frozenset())
    return [setting for setting in SETTINGS if setting in allowed]


def check_together(objective: Objective, settings: Sequence[Setting]) -> None:
    """Check that the settings go with each other and with the objective's fields.

    Raises:
        ValueError: in a sentence for the user.
    """
    combined = next((s.gradients for s in settings if isinstance(s, Gradients)), "sum")
    for setting in settings:
        if isinstance(setting, Anchor) and setting.needs - objective.needs:
            raise ValueError(
                "anchor_form: reference is for objectives with a reference; write mean or sum"
            )
        if combined == "sum" or isinstance(setting, Gradients | Offset):
            continue
        if setting != type(setting)():
            switch = next(iter(vars(setting)))
            raise ValueError(
                f"{switch}: does not go with gradients: {combined}, which combines the gradients "
                f"of the criteria's plain losses; remove one of the two"
            )
