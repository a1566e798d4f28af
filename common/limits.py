"""How large a picture may be."""

# The limit of Pillow, and of this project's files.
MAX_PIXELS = 178_956_970


def refuse_too_large(width: int, height: int) -> None:
    """Refuse a picture of more than `MAX_PIXELS` pixels.

    Raises:
        ValueError: it is larger; says its size and the limit.
    """
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels: at most {MAX_PIXELS} can be coded; shrink it")
