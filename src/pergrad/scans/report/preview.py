"""How a person sees one example: a picture, a text, a label, and whatever else they named.

Owns: turning what `job.show(i)` returns into plain bytes and strings of bounded size, and back.
Does not know: the store's files, models, data sets, HTML.
"""

import base64
import io
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pergrad.errors import UsageError
from pergrad.extras import need

if TYPE_CHECKING:
    from numpy.typing import NDArray

IMAGE_PIXELS = 192  # of the longer side; a report shows it no larger
TEXT_CHARACTERS = 4_000
LABEL_CHARACTERS = 200
PNG_BYTES = 6_000  # a picture whose PNG is larger is kept as JPEG, if that is smaller


@dataclass(frozen=True)
class Preview:
    """What is kept of an example for a person to see; every part may be missing."""

    text: str | None = None
    label: str | None = None
    image: bytes | None = None  # PNG or JPEG
    more: dict[str, str] = field(default_factory=dict)
    error: str | None = None  # why there is none

    @classmethod
    def of(cls, shown: Any) -> "Preview":
        """The preview of what a job's `show` returned.

        Args:
            shown: a PIL image, an array of one, a string, or a dict. Of a dict, "image", "text" and
                "label" are shown as such, other keys as lines "key: value". Pictures are shrunk to
                192 pixels and texts cut after 4,000 characters, and the cut is marked.

        Raises:
            UsageError: it is none of these.
            MissingExtraError: it is a picture, and Pillow is not installed.
        """
        if isinstance(shown, str):
            return cls(text=_cut(shown, TEXT_CHARACTERS))
        if isinstance(shown, dict):
            parts = {str(name): part for name, part in shown.items() if part is not None}
            image, text, label = (parts.pop(name, None) for name in ("image", "text", "label"))
            return cls(
                text=None if text is None else _cut(str(text), TEXT_CHARACTERS),
                label=None if label is None else _cut(str(label), LABEL_CHARACTERS),
                image=None if image is None else _encode(image),
                more={
                    _cut(name, LABEL_CHARACTERS): _cut(str(part), LABEL_CHARACTERS)
                    for name, part in parts.items()
                },
            )
        return cls(image=_encode(shown))

    @classmethod
    def from_stored(cls, kind: str, label: str | None, data: bytes) -> "Preview":
        """The inverse of `stored`."""
        if kind == "image":
            return cls(image=data, label=label)
        text = data.decode("utf-8", errors="replace")
        if kind == "text":
            return cls(text=text, label=label)
        if kind == "error":
            return cls(error=text, label=label)
        parts = json.loads(text)
        image = parts.get("image")
        return cls(
            text=parts.get("text"),
            label=label,
            image=None if image is None else base64.b64decode(image),
            more=parts.get("more", {}),
        )

    def stored(self) -> tuple[str, str | None, bytes]:
        """(kind, label, data) for the store; kind is "image", "text", "dict" or "error"."""
        if self.error is not None:
            return "error", self.label, _utf8(self.error)
        if self.image is not None and self.text is None and not self.more:
            return "image", self.label, self.image
        if self.text is not None and self.image is None and not self.more:
            return "text", self.label, _utf8(self.text)
        image = None if self.image is None else base64.b64encode(self.image).decode()
        parts = {"text": self.text, "image": image, "more": self.more}
        return "dict", self.label, json.dumps(parts).encode()

    def image_url(self) -> str | None:
        """The picture as a data: address, or None."""
        if self.image is None:
            return None
        kind = "png" if self.image.startswith(b"\x89PNG") else "jpeg"
        return f"data:image/{kind};base64,{base64.b64encode(self.image).decode()}"


def _utf8(text: str) -> bytes:
    """UTF-8 also of text with lone surrogates, which would be refused."""
    return text.encode("utf-8", errors="replace")


def _cut(text: str, characters: int) -> str:
    """The text, or its beginning and how much was left out. Free of lone surrogates."""
    text = _utf8(text).decode()
    if len(text) <= characters:
        return text
    return f"{text[:characters]}… ({len(text) - characters:,} more characters)"


def _encode(image: Any) -> bytes:
    """A PIL image, or an array of one, as PNG or JPEG of at most 192 pixels a side."""
    need("report", "PIL")
    from PIL import Image

    drawn = isinstance(image, Image.Image)
    if not drawn or image.mode.startswith(("I", "F")):  # these modes' numbers go beyond a byte
        image = _image_of(image)
    image = image.copy()  # the user's image stays as it is
    if image.mode not in ("1", "L", "LA", "RGB", "RGBA"):
        image = image.convert("RGBA")
    image.thumbnail((IMAGE_PIXELS, IMAGE_PIXELS))
    png = _bytes(image, "PNG", optimize=True)
    if len(png) <= PNG_BYTES or image.mode in ("LA", "RGBA"):
        return png
    jpeg = _bytes(image.convert("RGB"), "JPEG", quality=85)
    return min(png, jpeg, key=len)


def _image_of(array: Any) -> Any:
    """An array or tensor, (H, W), (H, W, C) or (C, H, W), as a PIL image.

    Bytes are taken as they are; other numbers from their smallest (black) to their largest (white).
    """
    need("report", "PIL", "numpy")
    import numpy as np
    from PIL import Image

    tensor = hasattr(array, "detach")
    array = array.detach().cpu() if tensor else array
    readable = hasattr(array, "__array__") or hasattr(array, "__array_interface__")
    values: NDArray[Any] = np.asarray(array) if readable else np.empty(())
    shape = values.shape
    # where both ends could be channels, each library's habit decides
    if len(shape) == 3 and shape[0] in (1, 3, 4) and (tensor or shape[-1] not in (1, 3, 4)):
        values = np.moveaxis(values, 0, -1)
    if values.ndim == 3 and values.shape[-1] == 1:
        values = values[..., 0]
    drawable = values.ndim == 2 or (values.ndim == 3 and values.shape[-1] in (3, 4))
    if not drawable or values.dtype.kind not in "buif":
        kind = f"{type(array).__module__}.{type(array).__qualname__}"
        raise UsageError(
            f"`show` returned, or has as its 'image', a {kind}"
            f"{f' of shape {shape}' if shape else ''}, which a report cannot draw. Return a PIL "
            "image, an array (height, width), (height, width, 3) or (3, height, width), a str, or "
            "a dict with the keys 'image', 'text', 'label'."
        )
    if values.dtype != np.uint8:
        values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        low, high = (values.min(), values.max()) if values.size else (0.0, 0.0)
        values = ((values - low) * (255 / (high - low) if high > low else 0.0)).round()
    return Image.fromarray(values.astype(np.uint8))


def _bytes(image: Any, kind: str, **options: Any) -> bytes:
    """The bytes of an image file, without the metadata that the image carries."""
    image.info = {}
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
