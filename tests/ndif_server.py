"""A stand-in for NDIF: nnsight's protocol on loopback around a model in a folder, for tests.

It is a process of its own in which cotfaith_mech cannot be imported, as on the real server. Prints its port.
Each request's key, model and environment are appended to a file of JSON lines.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import queue
import struct
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import nnsight
import torch
import zstandard
from nnsight.schema.request import RequestModel
from nnsight.schema.response import ResponseModel, Status
from nnsight.tracing.backend import Backend

sys.modules["cotfaith_mech"] = None  # pyright: ignore[reportArgumentType]
FOLDER, LOG = sys.argv[1:]
MODEL: Any = nnsight.TransformersModel(FOLDER, task="text-generation", dispatch=True, dtype=torch.float32)
REPLIES: dict[str, queue.Queue[bytes]] = {}


class Collecting(Backend):
    """Runs a trace and keeps what it saved: what its frame holds afterwards and was not sent."""

    def __call__(self, tracer: Any) -> None:
        frame, sent = tracer.info.frame, dict(tracer.info.frame.f_locals)
        tracer.execute(tracer.info.code)
        self.saved = {name: value for name, value in frame.f_locals.items() if value is not sent.get(name)}


def answer(request: RequestModel, blob: bytes) -> ResponseModel:
    try:
        MODEL._remoteable_set_env(request.env)
        tracer = RequestModel.deserialize(blob, MODEL._remoteable_persistent_objects(), compress=request.compress)
        tracer.backend = Collecting()
        with torch.no_grad():
            tracer.__exit__(None, None, None)
        file = io.BytesIO()
        torch.save(tracer.backend.saved, file)
        data = zstandard.ZstdCompressor().compress(file.getvalue()) if request.compress else file.getvalue()
        return ResponseModel(id="1", status=Status.COMPLETED, data=data)
    except Exception as error:
        return ResponseModel(id="1", status=Status.ERROR, description=f"{type(error).__name__}: {error}")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """/subscribe: a web socket that carries the session's name and then the result."""
        accept = (self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(accept).digest()).decode())
        self.end_headers()
        session = str(len(REPLIES))
        REPLIES[session] = queue.Queue()
        self._frame(1, json.dumps({"session_id": session}).encode())
        self._frame(2, REPLIES[session].get())
        self.close_connection = True

    def _frame(self, opcode: int, payload: bytes) -> None:
        self.wfile.write(bytes([128 + opcode, 127]) + struct.pack(">Q", len(payload)) + payload)

    def do_POST(self) -> None:
        """/request: the form's field `data` says what model, its file `blob` is the trace."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        boundary = b"--" + self.headers["Content-Type"].partition("boundary=")[2].encode()
        heads = [part.partition(b"\r\n\r\n")[::2] for part in body.split(boundary)[1:-1]]
        data, blob = (
            next(value[:-2] for head, value in heads if b'name="%b"' % name in head) for name in (b"data", b"blob")
        )
        request = RequestModel.model_validate_json(data)
        with open(LOG, "a") as log:
            row = {"key": self.headers["ndif-api-key"], "model_key": request.model_key, "env": request.env}
            log.write(json.dumps(row) + "\n")
        told = ResponseModel(id="1", status=Status.RECEIVED).model_dump_json().encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)
        self.wfile.flush()
        REPLIES[request.session_id].put(answer(request, blob).pickle())

    def log_message(self, format: str, *args: Any) -> None:
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
