"""Decodes the bytes of an image file, in any format of PIL, to the pixels that a tokenizer takes.

The first frame is rotated by its EXIF orientation and converted to 8-bit RGB on a white background. Then the image is
scaled (bilinear with antialiasing) until it just covers the tokenizer's size, and its centre is cropped. The reference
does the same with torchvision's Resize and CenterCrop. Colour profiles are not applied. 16-bit grey values are scaled,
not clipped. HEIC is read if pillow-heif is installed.
"""

import contextlib
import io
import warnings

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageCms

from arrag_jax.data.examples import BadImage
from arrag_jax.json_files import LFS_POINTER

# PIL warns about large images and odd metadata. Images that cannot be read are reported elsewhere, in one line each.
warnings.filterwarnings("ignore", module=r"PIL\.")

HEIF = (".heic", ".heics", ".heif", ".heifs", ".hif")
HEIF_PACKAGE = "pillow-heif"


def _register_heif() -> None:
    """Adds HEIC to PIL's formats if pillow-heif is installed."""
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()


Image.init()
_register_heif()
# Excludes formats that run another program (EPS runs Ghostscript) and formats that PIL identifies but cannot read.
FORMATS = sorted(set(Image.OPEN) - {"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5"})
SUFFIXES = tuple(sorted(suffix for suffix, name in Image.registered_extensions().items() if name in {*FORMATS, "MPO"}))
LONGEST = 16  # maximum ratio of the sides; a longer image is cropped before scaling, or it would need gigabytes
SIXTEEN_BITS = 65535
_TURNS: dict[int | None, Image.Transpose] = {  # EXIF orientation → transposition that reverts it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes, size: tuple[int, int] | None) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the pixels of an image file, with h x w = ``size``; None = of its own size.

    A JPEG of at least four times the size is decoded at 1/2, 1/4 or 1/8 scale, which is still at least twice the size.

    Raises:
      BadImage: if the data are not an image, are damaged, or have more pixels than PIL considers safe.
    """
    if not data:
        raise BadImage("empty file")
    if data.startswith(LFS_POINTER):
        raise BadImage("a pointer of Git LFS in the place of the image; fetch it: git lfs pull")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if size is not None:
                image.draft(None, (2 * size[1], 2 * size[0]))
            most = Image.MAX_IMAGE_PIXELS
            if most is not None and image.width * image.height > most:
                raise BadImage(f"too large: {image.width:,} x {image.height:,} pixels, more than {most:,}")
            whole = to_rgb(turned(image))
            return np.array(whole if size is None else fitted(whole, size))
    except BadImage:
        raise
    except Image.UnidentifiedImageError:
        raise BadImage("not an image that PIL reads") from None
    except Image.DecompressionBombError as error:
        raise BadImage(f"too large: {error}") from error
    except Exception as error:  # PIL's plugins raise any type of error for damaged data
        raise BadImage(" ".join(f"damaged image: {error or type(error).__name__}".split())) from error


def turned(image: Image.Image) -> Image.Image:
    """Returns the image rotated by its EXIF orientation; unreadable EXIF data are ignored."""
    image.load()
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # PIL's EXIF parser raises any type of error, and the pixels are good
        return image
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns the image as 8-bit RGB; transparent parts become white.

    Raises:
      BadImage: if the value of white is unknown: integers outside 16 bits, or negative or non-finite numbers.
    """
    if image.mode.startswith("I"):  # 16 bits, or 32 bits that should hold 16-bit values
        return _from_numbers(np.asarray(image), SIXTEEN_BITS)
    if image.mode == "F":  # white is the smallest of 1, 255 and 65535 that no pixel exceeds
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
    if not 0 <= low <= high <= white:  # also false for NaN
        raise BadImage(f"its pixels run from {low} to {high}: outside 0 to {white}, so that no white is known")
    return Image.fromarray(np.round(numbers / (white / 255)).astype(np.uint8)).convert("RGB")


def fitted(image: Image.Image, size: tuple[int, int], by: Image.Resampling = Image.Resampling.BILINEAR) -> Image.Image:
    """Returns the image scaled (``by``) until it just covers h x w = ``size``, then cropped to its centre."""
    height, width = size
    limit = LONGEST * min(image.size)
    if max(image.size) > limit:
        image = _middle(image, min(image.height, limit), min(image.width, limit))
    if image.width * height <= image.height * width:  # the other side is rounded down, as in torchvision
        scaled = (width, max(height, width * image.height // image.width))
    else:
        scaled = (max(width, height * image.width // image.height), height)
    if scaled != image.size:
        image = image.resize(scaled, by)
    return _middle(image, height, width)


def _middle(image: Image.Image, height: int, width: int) -> Image.Image:
    if image.size == (width, height):
        return image
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
