"""Corrupted copies of images: fog, blur and noise at five strengths, for robustness tests.

Kinds and strengths are those of ImageNet-C (Hendrycks and Dietterich, ICLR 2019). Blur and noise
come from scikit-image. The fog is written here, because the packages that carry it do not run with
current numpy, or ignore that its roughness depends on the strength: x' = (x + c P) max(x) /
(max(x) + c), where P in [0, 1] is a plasma fractal. It is haze over the whole picture and knows no
depth; fog that thickens with distance, as in Foggy Cityscapes, needs depth maps and is not made
here. Sigma of the blur is in pixels of the file, so the same strength weighs less in a larger one.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fgaif.data.images import image_ref, load_image
from fgaif.data.prompts import Skipped
from fgaif.errors import ConfigError, DataError
from fgaif.types import ImageRef

CorruptionKind = Literal["fog", "blur", "noise"]
KINDS: tuple[CorruptionKind, ...] = get_args(CorruptionKind)
MANIFEST = "corrupted.jsonl"

_FOG = ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))
"""Thickness c, and how fast the fractal's detail fades from one scale to the next."""
_BLUR_SIGMA = (1.0, 2.0, 3.0, 4.0, 6.0)
_NOISE_STD = (0.08, 0.12, 0.18, 0.26, 0.38)
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}

Pixels = NDArray[np.float64]
"""(H, W, 3) in [0, 1]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Corruption:
    """A kind at a strength from 1 to 5; the same seed and image give the same result."""

    kind: CorruptionKind
    strength: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"corruption {self.kind!r}: unknown; known: {', '.join(KINDS)}")
        if not 1 <= self.strength <= 5:
            raise ConfigError(f"corruption strength {self.strength}: give a number from 1 to 5")

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> Self:
        """Read ``KIND:STRENGTH``, as in ``fog:3``.

        Raises:
            ConfigError: another form, kind or strength.
        """
        kind, _, strength = text.partition(":")
        if not strength.isdecimal():
            raise ConfigError(f"corruption {text!r}: write KIND:STRENGTH, for example fog:3")
        return cls(kind=kind, strength=int(strength), seed=seed)  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        """Kind, strength and seed, fit for a folder."""
        return f"{self.kind}-{self.strength}-{self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrupted:
    """How many copies were ``made`` now or ``kept`` from before, and the images without one."""

    made: int
    kept: int
    skipped: tuple[Skipped, ...]


def corrupt_image(image: Image.Image, corruption: Corruption, key: str) -> Image.Image:
    """Corrupt an RGB image; ``key`` (as a rule its content hash) and the seed set what is drawn."""
    from skimage.filters import gaussian  # brings scipy: not for who only scores
    from skimage.util import random_noise

    digest = hashlib.sha256(f"{corruption.name} {key}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    pixels = np.asarray(image, dtype=np.float64) / 255
    level = corruption.strength - 1
    if corruption.kind == "fog":
        changed = fog(pixels, *_FOG[level], rng)
    elif corruption.kind == "blur":
        changed = gaussian(pixels, sigma=_BLUR_SIGMA[level], channel_axis=-1)
    else:
        changed = random_noise(pixels, mode="gaussian", var=_NOISE_STD[level] ** 2, rng=rng)
    return Image.fromarray(np.round(np.clip(changed, 0, 1) * 255).astype(np.uint8))


def fog(pixels: Pixels, thickness: float, decay: float, rng: np.random.Generator) -> Pixels:
    """Lay plasma haze over an image: (x + c P) max(x) / (max(x) + c), each (H, W, 3)."""
    height, width = pixels.shape[:2]
    haze = plasma(1 << (max(height, width, 2) - 1).bit_length(), decay, rng)[:height, :width, None]
    brightest = float(pixels.max())
    return (pixels + thickness * haze) * brightest / (brightest + thickness)


def plasma(size: int, decay: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw a fractal (size, size) in [0, 1] by diamond-square on a torus; ``size`` a power of two.

    At each scale, points between known ones get their mean and a displacement whose range shrinks
    by ``decay ** 2`` from scale to scale.
    """
    field, step, spread = np.zeros((size, size)), size, 1.0

    def between(*neighbours: NDArray[np.float64]) -> NDArray[np.float64]:
        mean = sum(neighbours) / len(neighbours)
        return np.asarray(mean + rng.uniform(-spread, spread, neighbours[0].shape))

    while step > 1:
        half = step // 2
        corners = field[::step, ::step]
        right, below = np.roll(corners, -1, axis=1), np.roll(corners, -1, axis=0)
        centres = between(corners, right, below, np.roll(right, -1, axis=0))
        field[half::step, half::step] = centres
        field[::step, half::step] = between(corners, right, centres, np.roll(centres, 1, axis=0))
        field[half::step, ::step] = between(corners, below, centres, np.roll(centres, 1, axis=1))
        step, spread = half, spread / decay**2
    field -= field.min()
    return np.asarray(field / field.max())


def corrupted_ref(ref: ImageRef, corruption: Corruption, cache: Path) -> ImageRef:
    """Return the corrupted copy of an image, kept as ``cache/NAME/SHA256.png``.

    Raises:
        DataError: the image cannot be read.
    """
    target = cache / corruption.name / f"{ref.sha256}.png"
    if not target.is_file():
        _save(corrupt_image(load_image(ref), corruption, ref.sha256), target)
    return image_ref(target)


def corrupt_folder(
    images: Path,
    out: Path,
    corruption: Corruption,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Corrupted:
    """Write a corrupted copy of every image under ``images``, with the same names, into ``out``.

    Copies that an earlier call made of the same content with the same settings are kept. Images
    that cannot be read are left out and returned.

    Raises:
        DataError: no such folder, no image in it, or ``out`` is the folder itself.
    """
    if not images.is_dir() or out.resolve() == images.resolve():
        raise DataError(f"corrupt {images} to {out}: give an existing folder and another one")
    names = sorted(
        path.relative_to(images)
        for path in images.rglob("*")
        if path.suffix.lower() in _SUFFIXES and out.resolve() not in path.resolve().parents
    )
    if not names:
        raise DataError(f"{images}: holds no images ({', '.join(sorted(_SUFFIXES))})")
    out.mkdir(parents=True, exist_ok=True)
    known = _read_manifest(out / MANIFEST)
    made, skipped = 0, []

    def work(name: Path) -> str | DataError | None:
        try:
            ref = image_ref(images / name)
            key = f"{corruption.name} {ref.sha256}"
            if known.get(str(name)) == key and (out / name).is_file():
                return None
            _save(corrupt_image(load_image(ref), corruption, ref.sha256), out / name)
            return key
        except DataError as error:
            return error

    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        (out / MANIFEST).open("a", encoding="utf-8") as manifest,
    ):
        for index, (name, result) in enumerate(zip(names, pool.map(work, names), strict=True)):
            if isinstance(result, DataError):
                skipped.append(Skipped(row=str(name), reason=str(result)))
            elif result is not None:
                made += 1
                manifest.write(json.dumps({"image": str(name), "made_of": result}) + "\n")
            progress(index + 1, len(names))
    return Corrupted(made=made, kept=len(names) - made - len(skipped), skipped=tuple(skipped))


def _read_manifest(path: Path) -> dict[str, str]:
    """Images and what they were made of; a line cut short by an interruption counts for nothing."""
    known = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
            known[row["image"]] = row["made_of"]
        except ValueError:
            continue
    return known


def _save(image: Image.Image, target: Path) -> None:
    stream = io.BytesIO()
    suffix = target.suffix.lower()
    image.save(stream, format=Image.registered_extensions()[suffix], quality=95)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.part")
    aside.write_bytes(stream.getvalue())
    aside.replace(target)
