"""Ratings by judges, reward models, functions and formulas, and the command that writes them."""

import time

import pytest
from chat_server import ChatServer

from axolotl_amopo.endpoint import Completion, Endpoint, Refusal, Request
from axolotl_amopo.errors import AMoPOError

# The server.


def ask(text: str) -> Request:
    return Request([{"role": "user", "content": text}], {"max_tokens": 5})


def test_requests_are_limited_and_keep_their_places():
    def reply(body):
        time.sleep(0.03)
        return f"echo {body['messages'][0]['content']}"

    with ChatServer(reply) as server:
        endpoint = Endpoint(server.url, "m", concurrency=3, options={"seed": 1, "max_tokens": 9})
        endpoint.check()
        got = dict(endpoint.complete(ask(str(i)) for i in range(9)))
    assert {i: one.text for i, one in got.items()} == {i: f"echo {i}" for i in range(9)}
    assert server.most_at_once == 3
    assert got[0][1:] == (True, 1, 2, None)
    assert server.bodies[0]["seed"] == 1 and server.bodies[0]["max_tokens"] == 5


def test_a_busy_server_is_asked_again():
    replies = [429, None, "yes"]
    with ChatServer(lambda body: replies.pop(0)) as server:
        [(place, reply)] = Endpoint(server.url, "m", retries=2).complete([ask("a")])
    assert (place, reply.text, replies) == (0, "yes", [])


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        (401, "wants another key; name the environment variable that holds it"),
        (404, "not found there; look at the model's name and the URL"),
        (500, "failed with status 500, also after 0 retries: status 500"),
        (None, "does not answer"),
        ((200, "<html>"), "is no chat completion; is the URL right"),
        ((200, {"choices": []}), "is no chat completion"),
    ],
)
def test_a_server_that_fails_says_how(reply, sentence):
    with (
        ChatServer(lambda body: reply) as server,
        pytest.raises(AMoPOError, match=sentence) as error,
    ):
        list(Endpoint(server.url, "m", retries=0, concurrency=1).complete([ask("a")] * 5))
    assert server.url in str(error.value) and len(server.bodies) == 1


def test_no_server():
    with ChatServer(lambda body: "") as server:
        url = server.url
    endpoint = Endpoint(url, "m", retries=0)
    for call in (endpoint.check, lambda: list(endpoint.complete([ask("a")]))):
        with pytest.raises(AMoPOError, match=r"does not answer \(.*refused\); is the server"):
            call()


def test_what_came_before_a_server_stops_is_kept():
    def reply(body):
        if body["messages"][0]["content"] != "3":
            time.sleep(0.05)  # so that another one is under way when the server fails
            return "ok"
        return None

    got = []
    with ChatServer(reply) as server:
        replies = Endpoint(server.url, "m", retries=0, concurrency=2).complete(
            ask(str(i)) for i in range(9)
        )
        with pytest.raises(AMoPOError, match="stopped answering after 3 answers"):
            got.extend(replies)
    assert sorted(place for place, _ in got) == [0, 1, 2] and len(server.bodies) == 4


def test_one_request_may_be_refused_and_all_may_not():
    with ChatServer(lambda body: 400 if "1" in body["messages"][0]["content"] else "ok") as server:
        got = dict(Endpoint(server.url, "m").complete([ask("0"), ask("1"), ask("2")]))
    assert got[1] == Refusal("status 400")
    assert isinstance(got[0], Completion) and isinstance(got[2], Completion)
    refuses = pytest.raises(AMoPOError, match="refused the first 8 requests: status 422")
    with ChatServer(lambda body: 422) as server, refuses:
        list(Endpoint(server.url, "m", concurrency=1).complete([ask("a")] * 99))
    assert len(server.bodies) == 8


def test_a_key_goes_to_the_server_it_is_for_and_nowhere_else(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-everybody")
    monkeypatch.setenv("MY_KEY", "sk-mine")
    told = (401, {"error": {"message": "wrong key: sk-mine"}})
    with ChatServer(lambda body: "ok") as server:
        list(Endpoint(server.url, "m").complete([ask("a")]))
        assert server.keys == {"Bearer none"}
        list(Endpoint(server.url, "m", key_env="MY_KEY").complete([ask("a")]))
        assert "Bearer sk-mine" in server.keys
        server.reply = lambda body: told
        with pytest.raises(AMoPOError, match=r"look at MY_KEY \(wrong key: \(hidden\)\)"):
            list(Endpoint(server.url, "m", key_env="MY_KEY").complete([ask("a")]))
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(AMoPOError, match="the environment variable MY_KEY"):
        Endpoint("http://x/v1", "m", key_env="MY_KEY")
