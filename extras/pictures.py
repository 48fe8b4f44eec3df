"""
Read a picture as a viewer shows it: turned by its EXIF tag, 16 bits as 8, transparency on white.

Folders of episodes and imports read pictures through `open_picture`.
"""
import contextlib, logging, os, warnings

import numpy as np
from PIL import Image, ImageOps

# Pillow knows more formats; some of them start other programs (EPS starts Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# 200 MB as RGB. A small file can claim any size.
MAX_PIXELS = 2**26
# Pillow's own limit warns on stderr, or raises before the size is known.
Image.MAX_IMAGE_PIXELS = None
# It also logs on stderr what it raises.
logging.getLogger("PIL").setLevel(logging.CRITICAL)

class PictureError(ValueError):
    """What is wrong with a picture: the end of a sentence that begins with the name of its file."""

@contextlib.contextmanager
def reading(path):
    """Open a picture within a `with` block; whatever goes wrong in the block is a PictureError."""
    # A named pipe would hang.
    if not os.path.isfile(path):
        raise PictureError("is missing or no picture")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width:,} x {image.height:,}"
                raise PictureError(f"has {size} pixels, more than the limit of {MAX_PIXELS:,}")
            yield image
    except PictureError:
        raise
    # Pillow has many errors for a damaged file.
    except Exception as error:
        raise PictureError(f"is missing or no picture ({type(error).__name__})")

def open_picture(path):
    """Open a picture, or the first frame of an animation, as RGB."""
    with reading(path) as image:
        return as_shown(image)

def verify_picture(path):
    """Check that a picture is whole, without unpacking it if its format has checksums."""
    with reading(path) as image:
        if image.format == "PNG":
            image.verify()
        else:
            as_shown(image)

def as_shown(image):
    """Turn an open picture into what a viewer shows of it."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        image = scale_to_8_bits(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image.convert("RGB")

def scale_to_8_bits(image):
    """Scale grey levels of 16 bits to 8; Pillow would cut them off at 255."""
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise PictureError("has grey levels of more than 16 bits")
    scaled = (levels * 255 + 32767) // 65535
    if "transparency" in image.info:
        scaled[levels == image.info["transparency"]] = 255
    return Image.fromarray(scaled.astype(np.uint8))
