import hashlib
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from fgaif.data.images import PixelCache, check_image, image_ref, load_image, read_image
from fgaif.errors import DataError
from fgaif.types import ImageRef


def write_image(path: Path, size: tuple[int, int] = (8, 6), **options: object) -> Path:
    Image.new("RGB", size, (200, 10, 30)).save(path, **options)
    return path


def ref_to(path: Path) -> ImageRef:
    return ImageRef(path=str(path), sha256="0" * 64)


def test_ref_is_the_absolute_path_and_the_hash_of_the_content(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png")
    ref = image_ref("a.png", tmp_path)
    assert ref.path == str(path.resolve())
    assert ref.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert check_image("a.png", tmp_path) == ref


@pytest.mark.parametrize("name", ["../secret.png", "link.png", "/etc/hostname"])
def test_nothing_outside_the_root_is_opened(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    write_image(tmp_path / "secret.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match="lies outside"):
        image_ref(name, root)


def test_a_link_within_the_root_is_followed(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    (tmp_path / "link.png").symlink_to("a.png")
    assert image_ref("link.png", tmp_path) == image_ref("a.png", tmp_path)


def test_missing_folder_and_impossible_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png: no such file"):
        image_ref("gone.png", tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        image_ref(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        image_ref("a\0b.png", tmp_path)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_a_truncated_image_is_refused_when_checked_and_when_loaded(
    tmp_path: Path, name: str
) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / name
    Image.fromarray(noise).save(path)
    check_image(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=f"{name}: cannot be decoded"):
        check_image(path)
    with pytest.raises(DataError, match=f"{name}: cannot be decoded"):
        load_image(ref_to(path))


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]
)
def test_what_is_no_image_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be decoded"):
        load_image(ref_to(path))


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG header of any size without pixels behind it."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT"


def test_size_is_checked_before_decoding(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_that_claims(9000, 9000))
    with pytest.raises(DataError, match=r"9000 x 9000 pixels.*max_image_pixels = 50000000"):
        load_image(ref_to(path))
    path.write_bytes(png_that_claims(100_000, 100_000))
    with pytest.raises(DataError, match="cannot be decoded"):  # Pillow's own limit comes first
        load_image(ref_to(path))


def test_the_pixel_limit_is_inclusive(tmp_path: Path) -> None:
    ref = image_ref(write_image(tmp_path / "a.png", (8, 6)))
    assert load_image(ref, 48).size == (8, 6)
    with pytest.raises(DataError, match="8 x 6"):
        load_image(ref, 47)


def test_images_load_upright_and_on_white(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned = write_image(tmp_path / "turned.jpg", (8, 6), exif=exif)
    assert load_image(ref_to(turned)).size == (6, 8)
    glass = tmp_path / "glass.png"
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(glass)
    assert load_image(ref_to(glass)).getpixel((0, 0)) == (255, 255, 255)
    for mode in ("L", "P", "1", "CMYK"):
        buffer = io.BytesIO()
        Image.new(mode, (3, 3)).save(buffer, format="TIFF")
        other = tmp_path / "other.tiff"
        other.write_bytes(buffer.getvalue())
        assert load_image(ref_to(other)).mode == "RGB"


def test_cache_keeps_the_most_recently_used_within_its_bytes() -> None:
    cache, made = PixelCache(max_bytes=24), []

    def get(key: str) -> float:
        def make() -> dict[str, np.ndarray]:
            made.append(key)
            value = np.full(1, ord(key), dtype=np.float32)
            return {"pixels": value, "sizes": np.zeros(2, np.float32)}  # 12 bytes

        return float(cache.get(key, make)["pixels"][0])

    assert [get(key) for key in "abacab"] == [97.0, 98.0, 97.0, 99.0, 97.0, 98.0]
    assert made == ["a", "b", "c", "b"]  # c pushed b out, because a was used after it
    assert cache.nbytes == 24
    assert len(cache) == 2


def test_cache_does_not_keep_what_is_larger_than_itself() -> None:
    cache = PixelCache(max_bytes=8)
    assert cache.get("a", lambda: {"pixels": np.zeros(100)})["pixels"].shape == (100,)
    assert (len(cache), cache.nbytes) == (0, 0)


def test_a_file_is_read_only_as_it_was_listed(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png")
    ref = check_image(path)
    file = read_image(ref)
    assert (file.format, file.width, file.height, file.upright) == ("PNG", 8, 6, True)
    assert file.content == path.read_bytes()
    write_image(path, (9, 6))
    with pytest.raises(DataError, match=r"a\.png: changed since it was listed"):
        read_image(ref)


def test_a_rotated_photograph_is_told_apart(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = write_image(tmp_path / "a.jpg", exif=exif)
    assert not read_image(image_ref(path)).upright
    assert load_image(image_ref(path)).size == (6, 8)


def exif_block(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF as in a JPEG: little-endian TIFF with (tag, type, count, value or offset) entries."""
    body = struct.pack("<H", len(entries))
    for tag, kind, count, value in entries:
        body += struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + body + bytes(4) + struct.pack("<II", 1, 2)


def test_a_tag_of_the_wrong_type_costs_no_photograph(tmp_path: Path) -> None:
    """The maker as a fraction: writing the tags anew, as Pillow's transposition does, fails."""
    end = 8 + 2 + 2 * 12 + 4
    exif = exif_block((0x010F, 5, 1, struct.pack("<I", end)), (0x0112, 3, 1, struct.pack("<H", 6)))
    path = write_image(tmp_path / "a.jpg", (8, 6), exif=exif)
    assert load_image(check_image(path)).size == (6, 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_does(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.arange(48, dtype=np.uint8).reshape(6, 8)
    Image.fromarray(pixels, "L").save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert (np.asarray(load_image(image_ref(tmp_path / "a.png"))) == upright).all()


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (np.array([[0, 256, 32768, 65535]], dtype=np.uint16), [0, 1, 128, 255]),
        (np.array([[0, 256, 32768, 65535]], dtype=np.int32), [0, 1, 128, 255]),
        (np.array([[0, 0.2, 0.5, 1.0]], dtype=np.float32), [0, 51, 128, 255]),
        (np.array([[0, 20, 51, 255]], dtype=np.float32), [0, 20, 51, 255]),
    ],
)
def test_deep_grey_images_are_scaled_and_not_clipped(
    tmp_path: Path, pixels: np.ndarray, expected: list[int]
) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    image = load_image(check_image(tmp_path / "a.tif"))
    assert np.asarray(image)[0, :, 0].tolist() == expected


@pytest.mark.parametrize("value", [-1.0, 256.0, float("nan")])
def test_pixels_of_unknown_range_are_refused(tmp_path: Path, value: float) -> None:
    Image.fromarray(np.array([[value, 0.5]], dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="outside 0 to"):
        check_image(tmp_path / "a.tif")


def png_chunk(name: bytes, data: bytes, crc: int | None = None) -> bytes:
    right = zlib.crc32(name + data)
    return (
        struct.pack(">I", len(data))
        + name
        + data
        + struct.pack(">I", right if crc is None else crc)
    )


@pytest.mark.parametrize(
    "chunk", [png_chunk(b"eXIf", b"no tiff"), png_chunk(b"tEXt", b"a\0b", crc=1)]
)
def test_pixels_of_a_png_decide_over_its_metadata(tmp_path: Path, chunk: bytes) -> None:
    content = write_image(tmp_path / "a.png").read_bytes()
    head = 8 + 12 + 13  # signature and IHDR
    (tmp_path / "b.png").write_bytes(content[:head] + chunk + content[head:])
    assert load_image(check_image(tmp_path / "b.png")).getpixel((0, 0)) == (200, 10, 30)


def test_a_decoder_may_raise_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_image(tmp_path / "a.png")

    def fail(*_: object) -> None:
        raise TypeError("odd")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(DataError, match="cannot be decoded"):
        check_image(path)


@pytest.mark.parametrize("size", [(1, 60), (60, 1), (101, 2)])
def test_a_strip_is_refused_by_its_header(tmp_path: Path, size: tuple[int, int]) -> None:
    with pytest.raises(DataError, match="crop it"):
        check_image(write_image(tmp_path / "a.png", size))


def test_a_pipe_and_a_file_too_large_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match="not a file"):
        image_ref(tmp_path / "pipe.png")
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(20 * 2**30)
    with pytest.raises(DataError, match="bytes, more than"):
        image_ref(tmp_path / "sparse.png")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("data:image/png;base64," + "A" * 600_000, "save it to a file"),
        ("https://a.example/b.jpg", "download it"),
        ("file:///a/b.jpg", "without file://"),
        ("a\\b.jpg", "written with /"),
    ],
)
def test_what_is_no_path_is_named_in_few_words(path: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        image_ref(path)
    assert len(str(caught.value)) < 1000
