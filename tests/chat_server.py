"""A chat server on loopback whose answers are a known function of the turns."""

from __future__ import annotations

import json
import math
import random
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cotfaith_mech.endpoint import GO_ON, PROBE

KEY = "sk-very-secret"

Behaviour = Callable[[dict[str, Any]], tuple[int, dict[str, str], Any]]


class Listener(ThreadingHTTPServer):
    request_queue_size = 64
    """Many connect at once; the default of 5 makes them wait a second."""


class Server:
    """Chat completions as `behave` says, of status 0 none: the connection ends; every request body and Authorization
    header is kept."""

    def __init__(self) -> None:
        self.behave: Behaviour = lambda body: ok("7")
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.paths: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.bodies.append(body)
                server.paths.append(self.path)
                server.keys.append(self.headers["Authorization"])
                probe = body["messages"][0]["content"] == PROBE
                status, headers, payload = ok(f"word {body['seed']}") if probe else server.behave(body)
                if not status:
                    return
                data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
                self.send_response(status)
                usual = {"Content-Type": "application/json", "Content-Length": str(len(data))}
                for name, value in (usual | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                with suppress(BrokenPipeError):
                    self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = Listener(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def asked(self) -> list[dict[str, Any]]:
        """Bodies of the requests that are no probe of sampling."""
        return [body for body in self.bodies if body["messages"][0]["content"] != PROBE]

    def close(self) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


def ok(
    text: str, tokens: list[tuple[str, dict[str, float]]] | None = None, prompt_tokens: int | None = 11
) -> tuple[int, dict[str, str], dict[str, Any]]:
    """A completion; `tokens`: each written token with the probabilities listed in its place."""
    content = [
        {
            "token": token,
            "logprob": math.log(listed[token]),
            "bytes": None,
            "top_logprobs": [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in listed.items()],
        }
        for token, listed in tokens or []
    ]
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": text},
        "logprobs": {"content": content} if tokens else None,
    }
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": 1, "total_tokens": 1}
    return 200, {}, {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [choice],
        **({"usage": usage} if prompt_tokens else {}),
    }  # fmt: skip


def refused(status: int, message: str = "no") -> tuple[int, dict[str, str], dict[str, Any]]:
    return status, {}, {"error": {"message": message, "type": "x", "code": None, "param": None}}


def drawn(shares: dict[str, float]) -> Behaviour:
    """The likeliest text at temperature 0, else one drawn by the request's seed; no log-probabilities."""

    def behave(body: dict[str, Any]) -> tuple[int, dict[str, str], dict[str, Any]]:
        if not body["temperature"]:
            return ok(max(shares, key=lambda text: shares[text]))
        return ok(random.Random(body["seed"]).choices(list(shares), list(shares.values()))[0])

    return behave


def says_the_last_number(body: dict[str, Any]) -> tuple[int, dict[str, str], dict[str, Any]]:
    """As a reader of the chain would; where the user asks to go on it writes one more sentence."""
    if body["messages"][-1]["content"] == GO_ON:
        return ok("That is all.")
    shown = [turn["content"] for turn in body["messages"] if turn["role"] == "assistant"]
    found = re.findall(r"\d+", "".join(shown))
    return ok(found[-1] if found else "0")


def study_of(server: Server, **changes: Any) -> dict[str, Any]:
    reader = {"name": "big", "model": "m", "endpoint": server.url, "mechanism": False, "samples": 3}
    return {"readers": [reader], "problems": "arithmetic:2", "draws": 2, "continue_tokens": 9} | changes
