"""Images by URL: only public addresses, however the name, the redirect or the size tries."""

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Callable

import httpx2
import pytest

from fgaif.serving.api_errors import ApiError
from fgaif.serving.fetch import fetch, is_public

PUBLIC = "93.184.216.34"


def reply(content: bytes) -> httpx2.Response:
    async def chunks() -> AsyncIterator[bytes]:
        yield content

    return httpx2.Response(200, content=chunks())


def get(
    url: str,
    handler: Callable[[httpx2.Request], httpx2.Response] | None = None,
    *,
    addresses: dict[str, list[str]] | None = None,
    limit: int = 100,
) -> bytes:
    async def resolve(host: str) -> list[str]:
        return (addresses or {}).get(host, [PUBLIC])

    transport = httpx2.MockTransport(handler or (lambda _: reply(b"ok")))
    return asyncio.run(
        fetch(url, max_bytes=limit, timeout_s=1.0, resolve=resolve, transport=transport)
    )


def refusal(url: str, *args: object, **more: object) -> ApiError:
    with pytest.raises(ApiError) as caught:
        get(url, *args, **more)  # type: ignore[arg-type]
    assert caught.value.field == "image"
    return caught.value


def test_the_connection_goes_to_the_checked_address_under_the_right_name() -> None:
    seen: list[httpx2.Request] = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        seen.append(request)
        return reply(b"image")

    assert get("https://a.example/x.png?size=2", handler) == b"image"
    (request,) = seen
    assert str(request.url) == f"https://{PUBLIC}/x.png?size=2"
    assert request.headers["host"] == "a.example"
    assert request.extensions["sni_hostname"] == "a.example"


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "0.0.0.0", "224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1",
        "::1", "::", "fe80::1", "fc00::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
        "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:1::1", "2001:db8::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    assert "not public" in str(refusal("https://a.example/", addresses={"a.example": [address]}))
    both = {"a.example": [PUBLIC, address]}  # one good address does not help
    assert "not public" in str(refusal("https://a.example/", addresses=both))


@pytest.mark.parametrize("address", [PUBLIC, "2606:2800:220:1::1", "::ffff:93.184.216.34"])
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))
    assert get("https://a.example/", addresses={"a.example": [address]}) == b"ok"


@pytest.mark.parametrize(
    "url",
    [
        "http://a.example/", "ftp://a.example/", "https://", "https:///x", "https://[::1",
        "https://a.example:8443/", "https://user:key@a.example/", "https://a.example:x/",
    ],
)  # fmt: skip
def test_urls_that_are_not_fetched(url: str) -> None:
    assert refusal(url).status == 422


def test_redirects_are_checked_like_the_first_url() -> None:
    def to(target: str) -> Callable[[httpx2.Request], httpx2.Response]:
        def handler(request: httpx2.Request) -> httpx2.Response:
            if request.url.path == "/end":
                return reply(b"image")
            return httpx2.Response(302, headers={"Location": target})

        return handler

    inside = {"inside.example": ["10.0.0.1"]}
    assert get("https://a.example/", to("/end")) == b"image"
    assert get("https://a.example/", to("https://b.example/end")) == b"image"
    assert "not public" in str(
        refusal("https://a.example/", to("https://inside.example/end"), addresses=inside)
    )
    assert "only https" in str(refusal("https://a.example/", to("http://a.example/end")))
    assert "redirects" in str(refusal("https://a.example/", to("/again")))


def test_size_status_and_failures_are_told() -> None:
    large = refusal("https://a.example/", lambda _: reply(b"x" * 101))
    assert (large.status, large.type) == (413, "too_large")
    assert "404" in str(refusal("https://a.example/", lambda _: httpx2.Response(404)))

    def fail(_: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError("to 10.0.0.1")

    assert str(refusal("https://a.example/", fail)) == "URL: cannot be fetched (ConnectError)"
