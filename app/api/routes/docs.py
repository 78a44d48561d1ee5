"""The interactive reference: Swagger UI over the OpenAPI document, served from here, so that it needs no internet.

Swagger UI (Apache-2.0) comes with the package fastapi-offline, of which nothing else is used. Addresses in the page are
relative, so that it works behind a prefix.
"""

from __future__ import annotations

from pathlib import Path

import fastapi_offline
from fastapi import APIRouter
from fastapi.responses import FileResponse, HTMLResponse, Response

router = APIRouter(include_in_schema=False)
FILES = Path(fastapi_offline.__file__).parent / "static"
PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Unstir: HTTP API</title>
<link rel="icon" type="image/svg+xml" href="docs/icon.svg">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
# Without validatorUrl, Swagger UI would send the document's address to a service of its makers.
START = """\
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  showExtensions: true,
  validatorUrl: null,
});
"""
ICON = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><path fill="#2b2d42" d="M0 0h8v8H0z"/>\
<path fill="#edf2f4" d="M1 1h1v4h1v1h2V5h1V1h1v5H6v1H2V6H1z"/></svg>
"""
# Of this page alone. Swagger UI sets styles by attribute and has its images as data; results are shown from blobs.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
CACHED = {"Cache-Control": "max-age=3600"}  # another version of Swagger UI is seen within an hour


@router.get("/docs")
async def docs() -> Response:
    """The page."""
    return HTMLResponse(PAGE, headers={"Content-Security-Policy": POLICY})


@router.get("/docs/start.js")
async def docs_start() -> Response:
    """The script of the page, in a file because its policy allows none in the page."""
    return Response(START, media_type="text/javascript", headers=CACHED)


@router.get("/docs/icon.svg")
async def docs_icon() -> Response:
    """The page's icon: a U of pixels."""
    return Response(ICON, media_type="image/svg+xml", headers=CACHED)


@router.get("/docs/swagger-ui-bundle.js")
async def docs_bundle() -> Response:
    """Swagger UI."""
    return FileResponse(FILES / "swagger-ui-bundle.js", media_type="text/javascript", headers=CACHED)


@router.get("/docs/swagger-ui.css")
async def docs_style() -> Response:
    """Its style."""
    return FileResponse(FILES / "swagger-ui.css", media_type="text/css", headers=CACHED)
