"""Make a trained model's chat template steer."""

from axolotl_amopo.commands.kit.models import TrainedModel, chat_template, load_tokenizer
from axolotl_amopo.steering.steering import Settings
from axolotl_amopo.steering.template import check, steered


def steered_template(trained: TrainedModel, settings: Settings | None = None) -> str:
    """Return a chat template that steers, compared with what training rendered.

        steered_template(find_model("outputs/adapter"), {"helpfulness": 5})

    Args:
        trained: from `find_model`.
        settings: what a conversation asks for that says nothing else.

    Raises:
        AMoPOError: for a model without a tokenizer, chat template or steering, for settings that it
            can't be asked for, or where the template would render another text than training did.
    """
    tokenizer = load_tokenizer(trained)
    own = chat_template(tokenizer, trained.folder)
    made = steered(own, trained.steering, settings)
    check(tokenizer, made, trained.steering)
    return made
