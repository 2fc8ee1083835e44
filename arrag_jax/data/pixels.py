"""From the bytes of an image file, whatever PIL reads, to the pixels that a tokenizer takes.

The first frame, turned as its EXIF data say, as 8-bit RGB on white; then the shorter side is scaled to the tokenizer's
(bilinear with antialiasing) and the middle is cut out, as the reference does with torchvision's Resize and CenterCrop.
Colour profiles are not applied. Grey of 16 bits is scaled, not clipped. HEIC is read where pillow-heif is installed.
"""

import contextlib
import io
import warnings

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageCms

from arrag_jax.data.examples import BadImage
from arrag_jax.json_files import LFS_POINTER

# PIL warns of sizes and of odd metadata; what can't be read is said in one line by us, what can is no news.
warnings.filterwarnings("ignore", module=r"PIL\.")

HEIF = (".heic", ".heics", ".heif", ".heifs", ".hif")
HEIF_PACKAGE = "pillow-heif"


def _register_heif() -> None:
    """Adds HEIC to PIL's formats, if the package that reads it is there."""
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()


Image.init()
_register_heif()
# Without the formats that run another program (EPS: Ghostscript) and those that PIL knows by name alone.
FORMATS = sorted(set(Image.OPEN) - {"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5"})
SUFFIXES = tuple(sorted(suffix for suffix, name in Image.registered_extensions().items() if name in {*FORMATS, "MPO"}))
LONGEST = 16  # long sides beyond so many short ones are cut before scaling, lest a line become gigabytes
SIXTEEN_BITS = 65535
_TURNS: dict[int | None, Image.Transpose] = {  # EXIF orientation → what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes, size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """Pixels of an image file, h x w = ``size``.

    A JPEG four or more times too large is decoded at a half, quarter or eighth that is still twice as large.

    Raises:
      BadImage: not an image, a damaged one, or one of more pixels than PIL takes for harmless.
    """
    if not data:
        raise BadImage("empty file")
    if data.startswith(LFS_POINTER):
        raise BadImage("a pointer of Git LFS in the place of the image; fetch it: git lfs pull")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.draft(None, (2 * size[1], 2 * size[0]))
            most = Image.MAX_IMAGE_PIXELS
            if most is not None and image.width * image.height > most:
                raise BadImage(f"too large: {image.width:,} x {image.height:,} pixels, more than {most:,}")
            return np.array(fitted(to_rgb(turned(image)), size))
    except BadImage:
        raise
    except Image.UnidentifiedImageError:
        raise BadImage("not an image that PIL reads") from None
    except Image.DecompressionBombError as error:
        raise BadImage(f"too large: {error}") from error
    except Exception as error:  # plugins raise anything; the pixels cannot be had
        raise BadImage(" ".join(f"damaged image: {error or type(error).__name__}".split())) from error


def turned(image: Image.Image) -> Image.Image:
    """The image as its EXIF orientation shows it; unreadable EXIF data count as none."""
    image.load()
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # PIL's parser raises anything; the pixels are there
        return image
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, on white where the image is transparent.

    Raises:
      BadImage: pixels without a known white: integers outside 16 bits, numbers that are negative or not finite.
    """
    if image.mode.startswith("I"):  # 16 bits, or 32 that should hold 16
        return _from_numbers(np.asarray(image), SIXTEEN_BITS)
    if image.mode == "F":  # white is the least of the usual whites that no pixel exceeds
        numbers = np.asarray(image)
        return _from_numbers(numbers, next((white for white in (1, 255) if numbers.max() <= white), SIXTEEN_BITS))
    if image.mode == "LAB":
        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
        assert converted is not None  # as it is in place
        return converted
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _from_numbers(numbers: np.ndarray, white: int) -> Image.Image:
    low, high = numbers.min(), numbers.max()
    if not 0 <= low <= high <= white:  # false of NaN too
        raise BadImage(f"its pixels run from {low} to {high}: outside 0 to {white}, so that no white is known")
    return Image.fromarray(np.round(numbers / (white / 255)).astype(np.uint8)).convert("RGB")


def fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scaled until it just covers h x w = ``size``, and the middle of that cut out."""
    height, width = size
    limit = LONGEST * min(image.size)
    if max(image.size) > limit:
        image = _middle(image, min(image.height, limit), min(image.width, limit))
    if image.width * height <= image.height * width:  # the width decides; the other side is cut off as torchvision does
        scaled = (width, max(height, width * image.height // image.width))
    else:
        scaled = (max(width, height * image.width // image.height), height)
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.BILINEAR)
    return _middle(image, height, width)


def _middle(image: Image.Image, height: int, width: int) -> Image.Image:
    if image.size == (width, height):
        return image
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
