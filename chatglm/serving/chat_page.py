"""The chat page, as the server sends it."""

import importlib.resources

from fastapi import FastAPI
from fastapi.responses import Response
from starlette.exceptions import HTTPException

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The chat page loads its own files and calls its own server, and no script in an answer runs."""
PAGE_FILES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}


def add_page(app: FastAPI) -> None:
    """GET / and the files that the page asks for."""
    folder = importlib.resources.files(__package__) / "page"
    headers = {
        "Content-Security-Policy": PAGE_POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    def part(name: str) -> Response:
        kind = PAGE_FILES[name[name.rindex(".") :]]
        return Response((folder / name).read_bytes(), media_type=kind, headers=headers)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> Response:
        """The chat page."""
        return part("index.html")

    names = {file.name for file in folder.iterdir() if file.is_file()}

    @app.get("/page/{name}", include_in_schema=False)
    async def file_of_page(name: str) -> Response:
        """Its files."""
        if name not in names:
            raise HTTPException(404, f"the page has no file {name!r}")
        return part(name)
