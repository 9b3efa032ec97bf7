"""A server on this machine that speaks OpenAI's chat API, for tests: says what a test tells it to.

    with ChatServer(lambda body: "4") as server:
        Endpoint(server.url, "any")

A reply is a text; a list of (token, {alternative: probability}) for one with log-probabilities; a
status code; `(status, body)`; or None, which breaks the connection.
"""

import json
import math
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ChatServer:
    def __init__(self, reply: Callable[[dict[str, Any]], Any]):
        self.reply = reply
        self.bodies: list[dict[str, Any]] = []  # of the requests, in order
        self.keys: set[str] = set()
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> "ChatServer":
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                self._send(200, {"object": "list", "data": []})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with owner._lock:
                    owner.bodies.append(body)
                    owner.keys.add(self.headers.get("Authorization", ""))
                    owner._at_once += 1
                    owner.most_at_once = max(owner.most_at_once, owner._at_once)
                try:
                    reply = owner.reply(body)
                finally:
                    with owner._lock:
                        owner._at_once -= 1
                if reply is None:
                    self.close_connection = True
                elif isinstance(reply, int):
                    self._send(reply, {"error": {"message": f"status {reply}"}})
                elif isinstance(reply, tuple):
                    self._send(*reply)
                else:
                    self._send(200, completion(body, reply))

            def _send(self, status: int, body: Any) -> None:
                text = body if isinstance(body, str) else json.dumps(body)
                self.send_response(status)
                kind = "text/html" if isinstance(body, str) else "application/json"
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

        return Handler


def completion(body: dict[str, Any], reply: str | list[Any]) -> dict[str, Any]:
    """Return a chat completion; its tokens count as words do."""
    text = reply if isinstance(reply, str) else "".join(token for token, _ in reply)
    choice: dict[str, Any] = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": text},
    }
    if not isinstance(reply, str):
        choice["logprobs"] = {
            "content": [
                {
                    "token": token,
                    "logprob": math.log(others[token]),
                    "top_logprobs": [
                        {"token": other, "logprob": math.log(share)}
                        for other, share in others.items()
                    ],
                }
                for token, others in reply
            ]
        }
    asked = sum(len(message["content"].split()) for message in body["messages"])
    usage = {"prompt_tokens": asked, "completion_tokens": len(text.split())}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": body["model"],
        "choices": [choice],
        "usage": usage | {"total_tokens": sum(usage.values())},
    }
