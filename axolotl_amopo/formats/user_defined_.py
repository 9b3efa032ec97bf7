"""`type: amopo.user_defined`: rows of any shape, described in the YAML.

    datasets:
      - path: data.jsonl
        type: amopo.user_defined
        template: "{{ context }}\\n\\n{{ question }}"      # Jinja, of the row's fields
        responses:                                        # a path for the text and each rating
          - {text: answers.a.text, helpfulness: judges.0.a, safety: answers.a.safe}
          - {text: answers.b.text, helpfulness: judges.0.b, safety: answers.b.safe}

Without `template` the prompt is the row's `prompt` (or `messages`), or what `fields:` names. Where
a row has a list of responses, whatever their number, `fields:` says where it is, and where text
and ratings are in each of them:

        fields: {responses: candidates, text: answer.text, helpfulness: scores.help}
"""

from typing import Any

from axolotl_amopo.data.format import DatasetFormat
from axolotl_amopo.data.rows import RatedPrompt, Response, Row


class UserDefined(DatasetFormat):
    takes = frozenset({"template", "responses"})

    def read(self, row: Row) -> RatedPrompt:
        if self.options.responses:
            responses = [self.response(row, paths) for paths in self.options.responses]
        else:
            responses = [self.listed(row, *item) for item in row.items("responses")]
        if self.options.template:
            messages = row.check_prompt(row.rendered(self.options.template), "template")
        else:
            messages = row.conversation("prompt", "messages")
        return RatedPrompt(messages, responses, [row.number], tools=row.tools())

    @staticmethod
    def response(row: Row, paths: dict[str, str]) -> Response:
        path = paths["text"]
        ratings = {row.key(name): row.at(path) for name, path in paths.items() if name != "text"}
        return Response(row.response(row.at(path), path), row.ratings(ratings, path))

    @staticmethod
    def listed(row: Row, item: Any, key: str) -> Response:
        path = row.key("text")
        turn = row.response(row.at(path, item), f"{key}.{path}")
        return Response(turn, row.ratings(item, key))


load = UserDefined
