"""Templates, static files, and the headers of every answer.

Everything on the page comes from strangers or the ledger: templates escape, and the content security policy allows scripts and
styles from files of our own only, and none inside the markup.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from coordinator.web.words import credits_text, percent, quantity, short_key, utc

FOLDER = Path(__file__).parent
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
STATIC = {
    "style.css": "text/css; charset=utf-8",
    "live.js": "text/javascript; charset=utf-8",
    "proof.js": "text/javascript; charset=utf-8",
    "check.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}


class Static(NamedTuple):
    """A file of ours, named by its contents for caches."""

    content: bytes
    media_type: str
    etag: str


def load_static() -> dict[str, Static]:
    """All files that browsers may ask for."""
    read = {name: (FOLDER / "static" / name).read_bytes() for name in STATIC}
    return {
        name: Static(content, STATIC[name], f'"{hashlib.blake2b(content, digest_size=8).hexdigest()}"')
        for name, content in read.items()
    }


def static_response(file: Static, request: Request) -> Response:
    """The file, unless the browser has it already."""
    headers = {**HEADERS, "Cache-Control": "no-cache", "ETag": file.etag}
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)


class Renderer:
    """Fills templates in."""

    def __init__(self, base: str = "", **everywhere: object) -> None:
        self.base = base
        self._templates = Environment(
            loader=FileSystemLoader(FOLDER / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            auto_reload=False,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters.update(
            credits=credits_text, utc=utc, short=short_key, quantity=quantity, percent=percent, grouped="{:,}".format
        )
        self._templates.globals.update(everywhere, base=base)

    def page(self, template: str, status: int = 200, **values: object) -> HTMLResponse:
        """An HTML answer."""
        return HTMLResponse(self._templates.get_template(template).render(values), status, HEADERS)

    def sorry(self, status: int, title: str, text: str) -> HTMLResponse:
        """A page that says why there is nothing to see."""
        return self.page("sorry.html", status, title=title, text=text)
