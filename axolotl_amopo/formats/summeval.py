"""`type: amopo.summeval`: SummEval as published, many responses a row, the ratings in columns.

    {"text": "...", "machine_summaries": ["...", ...], "coherence": [1.3, ...],
     "consistency": [5.0, ...], "fluency": [...], "relevance": [...]}

The prompt is the article behind a short request; `template:` in the dataset's entry replaces it, a
Jinja template of the row's fields (https://huggingface.co/datasets/mteb/summeval).
"""

from axolotl_amopo.data.format import DatasetFormat
from axolotl_amopo.data.rows import RatedPrompt, Response, Row

TEMPLATE = "Summarise this text in a few sentences.\n\n{{ text }}"


class SummEval(DatasetFormat):
    scale = (1, 5)
    takes = frozenset({"template"})

    def read(self, row: Row) -> RatedPrompt:
        key = row.key("machine_summaries")
        texts = row.items("machine_summaries", str)
        columns = {row.key(name): row.find(name) for name in row.source.dimensions}
        for name, ratings in columns.items():
            if ratings is not None and not (
                isinstance(ratings, list) and len(ratings) == len(texts)
            ):
                raise row.error(name, f"must be a list of {len(texts)} ratings, as {key} is.")
        responses = [
            Response(
                row.check_text(text, where),
                row.ratings(
                    {name: column and column[i] for name, column in columns.items()}, where
                ),
            )
            for i, (text, where) in enumerate(texts)
        ]
        prompt = row.rendered(self.options.template or TEMPLATE)
        return RatedPrompt(row.check_prompt(prompt, "template"), responses, [row.number])


load = SummEval
