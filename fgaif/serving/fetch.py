"""Fetches images by URL, never from an address that only this machine or its network reaches.

The name is resolved once, every address that it has is checked, and the connection goes to a
checked address, so that a second answer of the name server cannot lead elsewhere. The certificate
is checked against the name. Redirects are followed a few times, each checked like the first.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable
from urllib.parse import urljoin, urlsplit

import httpx2

from fgaif.serving.api_errors import ApiError, invalid

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str], Awaitable[list[str]]]

_REDIRECTS = 3
_PORT = 443
_TEREDO = ipaddress.ip_network("2001::/32")
_SIX_TO_FOUR = ipaddress.ip_network("2002::/16")
_NAT64 = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))


async def fetch(
    url: str,
    *,
    max_bytes: int,
    timeout_s: float,
    resolve: Resolve | None = None,
    transport: httpx2.AsyncBaseTransport | None = None,
) -> bytes:
    """Content of an https URL.

    Args:
        resolve: addresses of a name; default: the system's resolver.
        transport: for tests.

    Raises:
        ApiError: 422 for what cannot be fetched, 413 for more than ``max_bytes``.
    """
    try:
        async with (
            asyncio.timeout(timeout_s),
            httpx2.AsyncClient(trust_env=False, transport=transport) as client,
        ):
            for _ in range(_REDIRECTS + 1):
                content, url = await _get(client, url, max_bytes, resolve or _resolve)
                if content is not None:
                    return content
    except TimeoutError:
        raise _refused(f"no answer within {timeout_s:g} s") from None
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        raise _refused(f"cannot be fetched ({type(error).__name__})") from None
    raise _refused(f"more than {_REDIRECTS} redirects")


async def _get(
    client: httpx2.AsyncClient, url: str, max_bytes: int, resolve: Resolve
) -> tuple[bytes | None, str]:
    """The content, or None and where a redirect leads."""
    host, address, target = await _checked(url, resolve)
    shown = f"[{address}]" if address.version == 6 else str(address)
    request = client.build_request(
        "GET",
        f"https://{shown}{target}",
        headers={"Host": host, "Accept": "image/*", "Accept-Encoding": "identity"},
        extensions={"sni_hostname": host},
    )
    response = await client.send(request, stream=True, follow_redirects=False)
    try:
        if response.is_redirect:
            return None, urljoin(url, response.headers.get("location", ""))
        if response.status_code != 200:
            raise _refused(f"the server answered {response.status_code}")
        content = bytearray()
        async for chunk in response.aiter_raw():
            content += chunk
            if len(content) > max_bytes:
                raise ApiError(
                    413, "too_large", f"more than {max_bytes} bytes behind the URL", field="image"
                )
        return bytes(content), url
    finally:
        await response.aclose()


async def _checked(url: str, resolve: Resolve) -> tuple[str, Address, str]:
    """Name, checked address and the path with its query."""
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").encode("idna").decode(), parts.port
    except ValueError:
        raise _refused("not a URL") from None
    if parts.scheme != "https" or not host or port not in (None, _PORT):
        raise _refused("only https on port 443 is fetched")
    if parts.username is not None or parts.password is not None:
        raise _refused("a name or password in a URL is not sent")
    addresses = [ipaddress.ip_address(text) for text in await resolve(host)]
    if not addresses or not all(is_public(address) for address in addresses):
        raise _refused("the host has no address, or one that is not public")
    return host, addresses[0], (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public internet, also behind IPv6's ways to IPv4."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if any(address in network for network in (_TEREDO, _SIX_TO_FOUR, *_NAT64)):
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved)


async def _resolve(host: str) -> list[str]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, _PORT, type=socket.SOCK_STREAM)
    return [str(info[4][0]) for info in found]


def _refused(reason: str) -> ApiError:
    return invalid(f"URL: {reason}", "image")
