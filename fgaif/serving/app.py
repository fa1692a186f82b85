"""The web application: routes, OpenAPI, page. It knows its models only as a ``Backend``."""

import re
from collections.abc import Callable
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from fastapi import FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.websockets import WebSocket

from fgaif import __version__
from fgaif.config import Config
from fgaif.data.images import ImageBytes
from fgaif.serving.api_errors import ApiError, from_validation, invalid
from fgaif.serving.middleware import RELOAD, InFlight, RequestLimits
from fgaif.serving.prometheus import CONTENT_TYPE
from fgaif.serving.schema import (
    MAX_TEXTS,
    NOT_BLANK,
    SMALL_NUMBER,
    BatchRequest,
    BatchResponse,
    ErrorResponse,
    GenerateRequest,
    GenerateResponse,
    HealthResponse,
    ModelsResponse,
    RankRequest,
    RankResponse,
    ReloadRequest,
    ReloadResponse,
    RewardRequest,
    RewardResponse,
    ScoreRequest,
    ScoreResponse,
)
from fgaif.serving.service import Backend, ScoringService
from fgaif.serving.streaming import ScoreStreams

_DESCRIPTION = """Says for each sub-sentence of a text about an image how likely it contains a
hallucinated object, attribute or relation. `WS /v1/score/stream` scores sub-sentences while the
text is being written: send `StreamStart`, any number of `{"delta": "..."}`, then `{"end": true}`;
back come `{"ready": true, "model": ...}`, `{"segment": ...}` for each sub-sentence as soon as it is
finished, and last `{"result": ...}`. Sizes and numbers are limited; errors name the field."""
_FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 413, 422, 429, 500, 503, 504)
}
_FORM = {
    "type": "object",
    "required": ["text", "image"],
    "properties": {
        "text": {"type": "array", "items": {"type": "string", "pattern": NOT_BLANK}, "minItems": 1},
        "image": {"type": "string", "format": "binary"},
        "prompt": {"type": "string"},
        "facts": {"type": "string", "enum": ["true", "false"]},
        "min_words": {"type": "string", "pattern": SMALL_NUMBER},
    },
    "additionalProperties": False,
}
_SCORE_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/ScoreRequest"}},
            "multipart/form-data": {
                "schema": _FORM,
                "encoding": {"image": {"contentType": "image/png, image/jpeg, image/webp"}},
            },
        },
    }
}
_PAGE = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}


def create_app(backend: Backend, config: Config, *, key: str | None) -> FastAPI:
    """Make the application.

    Args:
        backend: the models.
        config: ``config.serve`` limits requests.
        key: the API key; None lets everyone in.
    """
    service = ScoringService(backend, config)

    app = FastAPI(
        title="FGAIF hallucination scores",
        version=__version__,
        description=_DESCRIPTION,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
    )
    in_flight = app.state.in_flight = InFlight()
    app.add_middleware(
        RequestLimits, config=config.serve, key=key, metrics=service.metrics, in_flight=in_flight
    )
    if config.serve.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.serve.cors),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["Retry-After"],
        )
    app.add_exception_handler(ApiError, _error_response)
    app.add_exception_handler(RequestValidationError, _error_response)
    app.add_exception_handler(HTTPException, _error_response)
    _add_scores(app, service)
    _add_models(app, service)
    _add_page(app)
    streams = ScoreStreams(service, in_flight, key)

    @app.websocket("/v1/score/stream")
    async def stream(socket: WebSocket) -> None:
        await streams.serve(socket)

    return app


def _add_scores(app: FastAPI, service: ScoringService) -> None:
    protected: dict[str, Any] = {
        "responses": _FAILURES,
        "dependencies": [Security(HTTPBearer(auto_error=False))],
    }

    @app.post("/v1/score", response_model=ScoreResponse, openapi_extra=_SCORE_BODY, **protected)
    async def score(request: Request) -> ScoreResponse:
        """Score one text, or several, about an image."""
        return await service.score(*await _score_request(request, service))

    @app.post("/v1/score/batch", **protected)
    async def batch(request: BatchRequest) -> BatchResponse:
        """Score several images; each item gets its answer or its error."""
        return await service.batch(request)

    @app.post("/get_reward", **protected)
    async def get_reward(request: RewardRequest) -> RewardResponse:
        """Rewards for OpenRLHF's `--remote_rm_url`."""
        return await service.rewards(request)

    @app.post("/v1/generate", **protected)
    async def generate(request: GenerateRequest) -> GenerateResponse:
        """Let the served policy describe an image; 422 where none is served.

        With `best_of` the reward models choose among several answers; with `guard` sub-sentences
        that are likely hallucinated are sampled again, or the answer is cut.
        """
        return await service.generate(request)

    @app.post("/v1/rank", **protected)
    async def rank(request: RankRequest) -> RankResponse:
        """Put texts about an image in order, the best first."""
        return await service.rank(request)


def _add_models(app: FastAPI, service: ScoringService) -> None:
    protected: dict[str, Any] = {
        "responses": _FAILURES,
        "dependencies": [Security(HTTPBearer(auto_error=False))],
    }

    @app.get("/v1/models", **protected)
    async def models() -> ModelsResponse:
        """The loaded reward models with their cards."""
        return await service.backend.models()

    @app.post(RELOAD, **protected)
    async def reload(request: ReloadRequest) -> ReloadResponse:
        """Load what the served folder holds now, beside the present models, then swap.

        Requests go on being answered throughout; nothing happens where the folder is unchanged.
        """
        return await service.backend.reload(request.version)

    @app.get("/healthz", responses={503: {"model": HealthResponse}, **_only(500, 504)})
    async def healthz(response: Response) -> HealthResponse:
        """Alive, and ready where the models have just scored a probe; else 503."""
        version = await service.ready()
        response.status_code = 503 if version is None else 200
        status = "unready" if version is None else "ok"
        return HealthResponse(status=status, ready=version is not None, version=version)

    @app.get("/metrics", response_class=Response, **protected)
    async def metrics() -> Response:
        """Counters of this ingress replica, as Prometheus text."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)


def _add_page(app: FastAPI) -> None:
    folder = files("fgaif.serving") / "page"
    for path, name in _PAGE.items():
        if (folder / name).is_file():
            app.add_api_route(path, _static(folder / name), include_in_schema=False)


def _static(file: Traversable) -> Callable[[], Response]:
    content, kind = file.read_bytes(), _TYPES[file.name.rpartition(".")[2]]

    def static() -> Response:
        return Response(content, media_type=kind)

    return static


def _only(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: _FAILURES[status] for status in statuses}


async def _score_request(
    request: Request, service: ScoringService
) -> tuple[ScoreRequest, ImageBytes | None]:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _from_form(await _form(request), service)
    if kind != "application/json":
        raise ApiError(
            400, "invalid_request", "Content-Type must be application/json or multipart/form-data"
        )
    try:
        return ScoreRequest.model_validate_json(await request.body()), None
    except ValidationError as error:
        raise from_validation(error) from None


async def _form(request: Request) -> FormData:
    try:
        return await request.form(max_files=1, max_fields=MAX_TEXTS + 8)
    except HTTPException:
        raise ApiError(400, "invalid_request", "the form cannot be read") from None
    except (ValueError, LookupError, TypeError) as error:  # what the parser lets through
        raise ApiError(400, "invalid_request", "the form cannot be read") from error


async def _from_form(
    form: FormData, service: ScoringService
) -> tuple[ScoreRequest, ImageBytes | None]:
    fields: dict[str, Any] = {}
    image = None
    for name in form:
        values = form.getlist(name)
        if name != "text" and len(values) > 1:
            raise invalid("given more than once", name)
        fields[name] = values if name == "text" and len(values) > 1 else values[0]
    if fields.get("facts") in ("true", "false"):
        fields["facts"] = fields["facts"] == "true"
    words = fields.get("min_words")
    if isinstance(words, str) and re.fullmatch(SMALL_NUMBER, words):
        fields["min_words"] = int(words)
    upload = fields.get("image")
    if isinstance(upload, UploadFile):
        image = await service.images.check(await upload.read())
        fields["image"] = "file"
    try:
        return ScoreRequest.model_validate(fields), image
    except ValidationError as error:
        raise from_validation(error) from None


async def _error_response(_: Request, error: Exception) -> JSONResponse:
    if isinstance(error, RequestValidationError):
        return from_validation(error.errors()).response()
    if isinstance(error, HTTPException):
        told = ApiError(error.status_code, "invalid_request", str(error.detail)).response()
        told.headers.update(error.headers or {})
        return told
    assert isinstance(error, ApiError)
    return error.response()
