"""How large a picture may be."""

# What Pillow opens and this project's files hold.
MAX_PIXELS = 178_956_970


def refuse_too_large(width: int, height: int) -> None:
    """Refuse a picture of more than `MAX_PIXELS` pixels.

    Raises:
        ValueError: it says how large the picture is, and what can be.
    """
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels: at most {MAX_PIXELS} can be coded; shrink it")
