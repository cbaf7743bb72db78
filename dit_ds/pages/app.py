"""`dit-ds app`: a page on this machine to try a model. All that it asks for comes from here."""

from __future__ import annotations

import ipaddress
import json
import logging
import secrets
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from werkzeug.exceptions import (
    BadRequest,
    Forbidden,
    HTTPException,
    MisdirectedRequest,
    NotFound,
    RequestEntityTooLarge,
    UnsupportedMediaType,
)
from werkzeug.routing import Map, Rule
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

from dit_ds.data.picture import picture_size, turned_picture
from dit_ds.errors import UserError
from dit_ds.pages.app_model import AppModel, Sample, preview
from dit_ds.pages.html import asset, templates

_log = logging.getLogger("dit_ds")

MOST_BYTES = 32 * 2**20  # of a picture's file
_MOST_PIXELS = 50_000_000  # of a picture
_MOST_TEXT = 64 * 2**10  # bytes of a request to segment
_MOST_POINTS = 100
_KEPT = 4  # pictures that were sent; older ones are forgotten
_THUMBNAIL = 160  # pixels
_BACKLOG = 16  # connections that wait while the model is loaded
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_ASSETS = {"app.js": "text/javascript", "app.css": "text/css"}


class App:
    """The page and what it asks, as a WSGI application.

    Requests whose Host is a name that this machine was not asked to answer to are refused: a page elsewhere could let
    its own name lead here, and read the answers.

    Args:
        model: answers.
        samples: to choose from.
        host: the name or address that the server was given.
    """

    def __init__(self, model: AppModel, samples: list[Sample], host: str):
        self.model, self.samples = model, samples
        self._hosts = {"localhost", host.lower(), socket.gethostname().lower()}
        self._pictures: OrderedDict[str, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        self._routes = Map(
            [
                Rule("/", endpoint=self._page, methods=["GET"]),
                Rule("/<any('app.js', 'app.css'):name>", endpoint=self._asset, methods=["GET"]),
                Rule("/pictures/<name>", endpoint=self._picture, methods=["GET"]),
                Rule("/pictures", endpoint=self._take, methods=["POST"]),
                Rule("/segment", endpoint=self._segment, methods=["POST"]),
            ]
        )

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer one request; errors are JSON with one line."""
        request = Request(environ)
        try:
            self._check_origin(request)
            endpoint, values = self._routes.bind_to_environ(environ).match()
            response = endpoint(request, **values)
        except UserError as e:
            response = _json({"error": " ".join(str(e).split())}, 400)
        except HTTPException as e:
            response = _json({"error": e.description}, e.code or 500)
        response.headers.update(_HEADERS)
        return response(environ, start_response)

    def _check_origin(self, request: Request) -> None:
        """Refuse requests by another name than this machine's, and those that pages of other places make."""
        try:
            name = urlsplit(f"//{request.host}").hostname or ""
        except ValueError:
            name = ""
        if not (_is_address(name) or name in self._hosts):
            raise MisdirectedRequest(f"this is not {request.host}")
        origin = request.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != request.host:
            raise Forbidden(f"not for pages of {origin}")

    def _page(self, _: Request) -> Response:
        settings = self.model.describe() | {
            "most_bytes": MOST_BYTES,
            "samples": [{"id": f"sample-{i}", "text": s.text} | _size(s.pixels) for i, s in enumerate(self.samples)],
        }
        return Response(templates().get_template("app.html").render(settings=settings), mimetype="text/html")

    def _asset(self, _: Request, name: str) -> Response:
        text = asset("base.css") + asset(name) if name == "app.css" else asset(name)
        return Response(text, mimetype=_ASSETS[name])

    def _picture(self, request: Request, name: str) -> Response:
        small = "small" in request.args
        return Response(preview(self._pixels(name), *([_THUMBNAIL] if small else [])), mimetype="image/jpeg")

    def _pixels(self, name: str) -> np.ndarray:
        kind, _, number = name.partition("-")
        if kind == "sample" and number.isdecimal() and int(number) < len(self.samples):
            return self.samples[int(number)].pixels
        with self._lock:
            if name not in self._pictures:
                raise NotFound("the picture is not kept any more: choose it again")
            self._pictures.move_to_end(name)
            return self._pictures[name]

    def _take(self, request: Request) -> Response:
        """Keep a picture that the page sends, and tell its name and size."""
        data = _body(request, "application/octet-stream", MOST_BYTES)
        try:
            height, width = picture_size(data)
        except ValueError as e:
            raise UserError(f"cannot read the picture ({e})") from None
        if height * width > _MOST_PIXELS:
            raise UserError(
                f"the picture has {height * width:,} pixels, at most {_MOST_PIXELS:,} are read: make it smaller"
            )
        pixels = turned_picture(data, "that was sent")
        name = secrets.token_urlsafe(12)
        with self._lock:
            self._pictures[name] = pixels
            while len(self._pictures) > _KEPT:
                self._pictures.popitem(last=False)
        return _json({"id": name} | _size(pixels))

    def _segment(self, request: Request) -> Response:
        asked = _asked(_body(request, "application/json", _MOST_TEXT))
        return _json(self.model.answer(self._pixels(asked["picture"]), asked["text"], asked["points"], asked["box"]))


def serve(
    path: str, *, host: str, port: int, split: str | None, data_root: str | None, ready: Callable[[str], None]
) -> None:
    """Serve the page until the process is interrupted.

    Args:
        path: as for `load_model`.
        host, port: to listen at; port 0 takes a free one.
        split: whose pictures the page offers; by default the one that the run is evaluated on.
        data_root: where its shards are, if they moved since training.
        ready: called with the page's address once it answers.
    Raises:
        UserError: the port is in use or the host is not of this machine, or as of `load_model`.
    """
    listening = _listen(host, port)  # first: what is wrong is said before the model is loaded
    with listening:
        model = AppModel(path)
        model.warm_up()
        address, port = listening.getsockname()[:2]
        app = App(model, model.samples(split, data_root), host)
        server = make_server(address, port, app, threaded=True, request_handler=_Handler, fd=listening.fileno())
        if not ipaddress.ip_address(address).is_loopback:
            _log.warning(f"warning: whoever reaches port {port} of this machine can use the model")
        shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(address, f"[{address}]" if ":" in address else address)
        ready(f"http://{shown}:{port}/")
        server.serve_forever()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as e:
        raise UserError(f"--host {host} is no address of this machine ({e}): leave it out, or give another") from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError as e:
        listening.close()
        raise UserError(f"cannot listen at {host} port {port} ({e.strerror}): choose another with --port") from None
    return listening


class _Handler(WSGIRequestHandler):
    """No line for each request; connections that say nothing are closed."""

    timeout = 60  # seconds

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _json(value: dict[str, Any], status: int = 200) -> Response:
    return Response(json.dumps(value), status, mimetype="application/json")


def _size(pixels: np.ndarray) -> dict[str, int]:
    return {"width": pixels.shape[1], "height": pixels.shape[0]}


def _body(request: Request, mimetype: str, most: int) -> bytes:
    """A request's body; kinds of body that a page elsewhere could send without asking are refused."""
    if request.mimetype != mimetype:
        raise UnsupportedMediaType(f"send it as {mimetype}")
    if (request.content_length or 0) > most:
        raise RequestEntityTooLarge(f"it has more than {most / 2**20:g} MiB: make it smaller")
    request.max_content_length = most
    return request.get_data()


def _asked(body: bytes) -> dict[str, Any]:
    """What a request to segment says: `picture`, `text`, `points` and `box`."""
    try:
        read = json.loads(body)
        text, points, box = read.get("text", ""), read.get("points", []), read.get("box")
        if not (isinstance(read["picture"], str) and isinstance(text, str) and len(points) <= _MOST_POINTS):
            raise ValueError
        return {
            "picture": read["picture"],
            "text": text,
            "points": [(float(x), float(y)) for x, y in points],
            "box": None if box is None else tuple(float(v) for _, v in zip(range(4), box, strict=True)),
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise BadRequest(
            "it does not read {picture, text, points: [[x, y], ..], box: [x0, y0, x1, y1] or null}"
        ) from None
