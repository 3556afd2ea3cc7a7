"""A small chat server on the loopback: answers, fails, stalls and garbles as it is told."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image


class ChatServer(ThreadingHTTPServer):
    """What it was asked, and what it shall do with the requests of each picture, by width."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.plan: dict[int, list[str]] = {}
        self.asked: list[dict[str, Any]] = []
        self.stolen: list[str | None] = []  # keys that a redirect would have led away
        self.at_once = self.most_at_once = 0
        self.guard = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def of_width(self, width: int) -> list[dict[str, Any]]:
        return [entry for entry in self.asked if entry["image"].width == width]


@contextmanager
def chat_server() -> Iterator[ChatServer]:
    with ChatServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.stolen.append(self.headers.get("Authorization"))
        self._send(200, b"{}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][-1]["content"]
        uri = next(part["image_url"]["url"] for part in content if part["type"] == "image_url")
        data = base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))
        entry = {"path": self.path, "body": body, "data": data, "headers": dict(self.headers)}
        entry["image"] = Image.open(io.BytesIO(data))
        server = self.server
        with server.guard:
            server.asked.append(entry)
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
            plan = server.plan.get(entry["image"].width, [])
            step = plan.pop(0) if plan else "ok"
        try:
            time.sleep(0.05)
            self._answer(step, body, entry)
        finally:
            with server.guard:
                server.at_once -= 1

    def _answer(self, step: str, body: dict[str, Any], entry: dict[str, Any]) -> None:
        text = f"A picture of {entry['image'].width} pixels lies on a table."
        if step == "slow":
            time.sleep(2.5)
        elif step == "redirect":
            self._send(302, b"", Location=f"{self.server.url}/steal")
            return
        elif step.isdigit():
            said = f"no: {entry['headers'].get('Authorization', '')}"
            self._send(int(step), json.dumps({"error": {"message": said}}).encode())
            return
        elif step == "busy":
            self._send(429, b"busy", **{"Retry-After": "0.2"})
            return
        elif step == "garbled":
            self._send(200, b'{"choices": [{"mess')
            return
        elif step == "cut":
            self._send(200, b'{"choices"', **{"Content-Length": "500"})
            return
        texts = {"empty": "", "refusal": "I'm sorry, but I cannot help with that."}
        texts |= {"loop": "a dog " * 30}
        message: Any = texts.get(step, text)
        if step == "parts":
            message = [{"type": "text", "text": text[:9]}, {"type": "text", "text": text[9:]}]
        choice = {"message": {"role": "assistant", "content": message}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1000, "completion_tokens": 10}
        answer = {"choices": [] if step == "none" else [choice], "usage": usage}
        self._send(200, json.dumps(answer).encode())

    def _send(self, status: int, data: bytes, **headers: str) -> None:
        try:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(data))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            pass  # the caller has hung up
