"""Ask a server that speaks OpenAI's chat API: vLLM, llama.cpp, `transformers serve`, or a paid one.

Retries with backoff, timeouts and the protocol are the `openai` client's; here are the limit on
concurrent requests, the order of what comes back, and errors in one sentence.

Example:

    endpoint = Endpoint("http://localhost:8000/v1", "Qwen/Qwen2.5-7B-Instruct")
    requests = [Request([{"role": "user", "content": "Is tea healthy?"}], {"max_tokens": 200})]
    for place, reply in endpoint.complete(requests):
        print(place, reply.text if isinstance(reply, Completion) else reply.reason)
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

from axolotl_amopo.config.redact import redact_urls
from axolotl_amopo.errors import AMoPOError

# So many requests refused, and none answered: the server means all of them.
REFUSALS = 8


class Request(NamedTuple):
    """Hold a conversation to go on with, and how."""

    messages: list[dict[str, Any]]
    # Of the API's body: max_tokens, temperature, top_p, seed, logprobs, ... None leaves a key out.
    options: Mapping[str, Any] = {}


class Token(NamedTuple):
    """Hold a token of an answer, and the likeliest ones at its place with their log-probability."""

    text: str
    alternatives: dict[str, float]  # nats


class Completion(NamedTuple):
    """Hold what a server answered."""

    text: str
    finished: bool  # false where `max_tokens` cut the answer off
    prompt_tokens: int  # 0 where the server does not count
    completion_tokens: int
    tokens: list[Token] | None  # None where the server gives no log-probabilities


class Refusal(NamedTuple):
    """Say why a server takes one request and no other: too long, filtered, ..."""

    reason: str


class Endpoint:
    """Ask a model behind a URL.

    Args:
        url: up to and with `/v1`.
        model: its name there.
        key_env: the environment variable that holds the key; None for a server that needs none. No
            other variable's key is sent.
        concurrency: how many requests may be under way at once.
        retries: how often the client asks again, waiting longer each time (0.5 to 8 s, or what the
            server says), after a broken connection, a timeout, or status 408, 409, 429 or 5xx.
        timeout: seconds for one answer.
        options: of every request's body; a request's own come first.

    Raises:
        AMoPOError: where the variable that holds the key is not set.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_env: str | None = None,
        concurrency: int = 8,
        retries: int = 5,
        timeout: float = 600.0,
        options: Mapping[str, Any] | None = None,
    ):
        from openai import OpenAI

        self.url, self.model, self.key_env = url, model, key_env
        self.concurrency, self.retries = concurrency, retries
        self.options = dict(options or {})
        self._key = os.environ.get(key_env, "") if key_env else ""
        if key_env and not self._key:
            raise AMoPOError(
                f"{redact_urls(url)}: the environment variable {key_env}, which is to hold its "
                f"key, is not set; write export {key_env}=... first."
            )
        # With a key of None the client would send the one in OPENAI_API_KEY, to any server.
        self.client = OpenAI(
            base_url=url, api_key=self._key or "none", max_retries=retries, timeout=timeout
        )

    def check(self) -> None:
        """Ask for the list of models, which costs nothing; a server without one may answer so.

        Raises:
            AMoPOError: where nothing answers, or the key is refused.
        """
        import openai

        try:
            self.client.with_options(max_retries=0, timeout=30).models.list()
        except openai.APIConnectionError as error:
            raise self._unreachable(error, 0) from None
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise self._wrong_key(error) from None
        except (openai.OpenAIError, ValueError):
            pass  # it is there

    def complete(self, requests: Iterable[Request]) -> Iterator[tuple[int, Completion | Refusal]]:
        """Yield each request's place and what came back, as soon as it does.

        Requests are taken from the iterable as there is room for them. When the server fails, what
        is under way is waited for and yielded before the error is raised.

        Raises:
            AMoPOError: where the server can't be reached (any more), refuses key or model, or has
                refused all of the first requests.
        """
        waiting = enumerate(requests)
        running: dict[Future[Completion], int] = {}
        answered, refused = 0, 0
        failed: Exception | None = None
        with ThreadPoolExecutor(self.concurrency) as pool:
            while True:
                while failed is None and len(running) < self.concurrency:
                    if (one := next(waiting, None)) is None:
                        break
                    running[pool.submit(self._ask, one[1])] = one[0]
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    place = running.pop(future)
                    reply: Completion | Refusal
                    try:
                        reply = future.result()
                        answered += 1
                    except _Refused as error:
                        reply = Refusal(str(error))
                        refused += 1
                        if refused >= REFUSALS and not answered:
                            failed = failed or self._refuses(refused, reply)
                    except Exception as error:
                        failed = failed or error
                        continue
                    yield place, reply
        if isinstance(failed, AMoPOError):
            raise failed
        if failed:  # which AXOLOTL_AMOPO_TRACEBACK=1 shows beside the sentence
            raise self._sentence(failed, answered) from failed

    def _ask(self, request: Request) -> Completion:
        import openai

        body = self.options | dict(request.options)
        body = {name: value for name, value in body.items() if value is not None}
        try:
            # `extra_body` takes whatever a server knows beside OpenAI's own names.
            reply = self.client.chat.completions.create(
                model=self.model, messages=request.messages, extra_body=body
            )
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            raise _Refused(self._words(error)) from None
        except openai.APIStatusError as error:
            if error.status_code == 413:
                raise _Refused(self._words(error)) from None
            raise
        choices = getattr(reply, "choices", None)
        if not choices:
            raise AMoPOError(
                f"{self._name}: its answer is no chat completion; is the URL right (it ends in "
                "/v1, mostly)?"
            )
        usage = getattr(reply, "usage", None)
        return Completion(
            text=choices[0].message.content or "",
            finished=choices[0].finish_reason != "length",
            prompt_tokens=getattr(usage, "prompt_tokens", None) or 0,
            completion_tokens=getattr(usage, "completion_tokens", None) or 0,
            tokens=_tokens(choices[0].logprobs),
        )

    @property
    def _name(self) -> str:
        return f"{redact_urls(self.url)} ({self.model})"

    def _sentence(self, error: Exception, answered: int) -> AMoPOError:
        import openai

        match error:
            case openai.APIConnectionError():
                return self._unreachable(error, answered)
            case openai.AuthenticationError() | openai.PermissionDeniedError():
                return self._wrong_key(error)
            case openai.NotFoundError():
                return AMoPOError(
                    f"{self._name}: not found there; look at the model's name and the URL, which "
                    f"ends in /v1, mostly ({self._words(error)})."
                )
            case openai.APIStatusError():
                return AMoPOError(
                    f"{self._name}: failed with status {error.status_code}, also after "
                    f"{self.retries} retries: {self._words(error)}"
                )
        return AMoPOError(f"{self._name}: sent what can't be read ({self._words(error)}).")

    def _refuses(self, count: int, last: Refusal) -> AMoPOError:
        return AMoPOError(f"{self._name}: refused the first {count} requests: {last.reason}")

    def _unreachable(self, error: Exception, answered: int) -> AMoPOError:
        why = error.__cause__ or error
        when = f"stopped answering after {answered} answers" if answered else "does not answer"
        return AMoPOError(
            f"{self._name}: {when} ({self._words(why)}); is the server running there?"
        )

    def _wrong_key(self, error: Exception) -> AMoPOError:
        hint = "look at" if self.key_env else "name the environment variable that holds it, not"
        return AMoPOError(
            f"{self._name}: wants another key; {hint} {self.key_env or 'the key itself'} "
            f"({self._words(error)})."
        )

    def _words(self, error: BaseException) -> str:
        """Return what the server says, in one line, without the key that it may repeat."""
        body = getattr(error, "body", None)
        if isinstance(body, dict):
            body = body.get("message") or body.get("detail") or body
        text = " ".join(str(body or error or type(error).__name__).split())[:300]
        return text.replace(self._key, "(hidden)") if self._key else text


class _Refused(Exception):
    """Leave a thread with what a server said of one request."""


def _tokens(logprobs: Any) -> list[Token] | None:
    content = getattr(logprobs, "content", None)
    if not content:
        return None
    return [
        Token(one.token, {other.token: other.logprob for other in one.top_logprobs or ()})
        for one in content
    ]
