"""Placeholder images: a landscape for every prompt, marked SANDBOX, written as PNG with nothing but zlib.

No colour is stored for each pixel. PNG's filter "Up" stores each row as its difference from the row above, and a landscape
seen column by column (sky, hill, nearer hill) changes only a few times from top to bottom. So the rows start as zeros, one
number is written where a column changes its colour, and zlib compresses the zeros.

The palette is ordered so that these numbers are simple: the sky has `_BANDS` colours from top to horizon, and as many again
for each ring of glow and for the sun. One band down is +1 in every ring, one ring inwards is +`_BANDS`.
"""

from __future__ import annotations

import functools
import hashlib
import math
import random
import struct
import zlib
from typing import Final, NamedTuple

_SOURCE: Final = b"langchain-cogview sandbox"

_BANDS: Final = 54
_RINGS: Final = 3  # two rings of glow, and the sun
_HILLS: Final = 5
_HILL: Final = _BANDS * (_RINGS + 1)  # palette index of the farthest hill; the nearest is _HILL + _HILLS - 1
_EDGES: Final = [[_HILL + _HILLS + near * (near + 1) // 2 + far for far in range(near + 1)] for near in range(_HILLS)]
"""Palette index of the half-covered pixel between a hill and a farther one; at its own index, between the hill and the sky."""
_CAPTION: Final = _EDGES[-1][-1] + 1

Colour = tuple[int, int, int]


class _Theme(NamedTuple):
    zenith: Colour
    horizon: Colour
    sun: Colour
    far: Colour
    near: Colour


_THEMES: Final = (
    _Theme((58, 96, 168), (252, 214, 170), (255, 244, 214), (190, 170, 190), (30, 42, 78)),  # morning
    _Theme((52, 38, 92), (250, 140, 104), (255, 226, 150), (196, 98, 112), (36, 18, 52)),  # dusk
    _Theme((84, 170, 220), (228, 244, 238), (255, 250, 222), (150, 196, 190), (26, 84, 78)),  # noon
    _Theme((14, 20, 48), (70, 96, 150), (240, 240, 226), (62, 86, 132), (8, 14, 34)),  # moonlight
    _Theme((120, 178, 190), (253, 226, 180), (255, 246, 220), (226, 164, 110), (92, 40, 32)),  # autumn
    _Theme((96, 84, 160), (246, 190, 206), (255, 240, 232), (182, 140, 186), (52, 34, 88)),  # heather
    _Theme((38, 118, 128), (246, 232, 190), (255, 252, 230), (140, 182, 158), (16, 54, 60)),  # mist
    _Theme((200, 84, 70), (254, 206, 120), (255, 248, 208), (222, 118, 82), (66, 20, 44)),  # ember
)

# Five dots wide, seven high, one bit for a dot, from the top.
_LETTERS: Final = {
    "S": (0b01111, 0b10000, 0b10000, 0b01110, 0b00001, 0b00001, 0b11110),
    "A": (0b01110, 0b10001, 0b10001, 0b11111, 0b10001, 0b10001, 0b10001),
    "N": (0b10001, 0b11001, 0b11001, 0b10101, 0b10011, 0b10011, 0b10001),
    "D": (0b11110, 0b10001, 0b10001, 0b10001, 0b10001, 0b10001, 0b11110),
    "B": (0b11110, 0b10001, 0b10001, 0b11110, 0b10001, 0b10001, 0b11110),
    "O": (0b01110, 0b10001, 0b10001, 0b10001, 0b10001, 0b10001, 0b01110),
    "X": (0b10001, 0b01010, 0b01010, 0b00100, 0b01010, 0b01010, 0b10001),
}
_WORD: Final = "SANDBOX"
_WORD_DOTS: Final = len(_WORD) * 7 - 2  # five dots and a gap of two for each letter but the last
_CAPTION_DOTS: Final = 13  # seven, with a margin of three above and below


def seed_of(prompt: str) -> bytes:
    """Return the 32 bytes that determine the image of a prompt."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest()


def draw(prompt: str, width: int, height: int) -> bytes:
    """Draw the placeholder of a prompt: the same prompt always has the same image, other prompts have others.

    Args:
        prompt: Any text.
        width: Pixels, 64 to 4096.
        height: Pixels, 64 to 4096.

    Returns:
        The bytes of a PNG.

    Raises:
        ValueError: A side is out of bounds.
    """
    return draw_seed(seed_of(prompt), width, height)


def draw_seed(seed: bytes, width: int, height: int) -> bytes:
    """Draw the placeholder of a prompt from its `seed_of`.

    Args:
        seed: The result of `seed_of`.
        width: Pixels, 64 to 4096.
        height: Pixels, 64 to 4096.

    Returns:
        The bytes of a PNG.

    Raises:
        ValueError: A side is out of bounds.
    """
    if not (64 <= width <= 4096 and 64 <= height <= 4096):  # noqa: PLR2004
        raise ValueError(f"A sandbox image cannot have {width}x{height} pixels. Use sides of 64 to 4096 pixels.")
    chance = random.Random(seed)
    theme = _THEMES[int(chance.random() * len(_THEMES))]
    dot = max(1, min(width // (_WORD_DOTS + 10), height // 100))
    rows = bytearray((width + 1) * height)
    rows[:: width + 1] = b"\x02" * height  # the filter "Up"
    _paint_landscape(rows, width, height - _CAPTION_DOTS * dot, chance)
    _paint_caption(rows, width, height, dot)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
            _chunk(b"PLTE", _palette(theme)),
            _chunk(b"tEXt", b"Source\0" + _SOURCE),
            _chunk(b"tEXt", b"Prompt-SHA256\0" + seed.hex().encode()),
            _chunk(b"IDAT", _compress(rows)),
            _chunk(b"IEND", b""),
        )
    )


def _compress(rows: bytearray) -> bytes:
    # Nearly all bytes are zeros: looking only for runs compresses better than the default strategy, and as fast.
    packer = zlib.compressobj(1, strategy=zlib.Z_RLE)
    return packer.compress(rows) + packer.flush()


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(name)))


def _mix(one: Colour, other: Colour, share: float) -> Colour:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue


@functools.cache
def _palette(theme: _Theme) -> bytes:
    sky = [_mix(theme.zenith, theme.horizon, (band / (_BANDS - 1)) ** 0.9) for band in range(_BANDS)]
    colours = [*sky]
    for share in (0.16, 0.34):
        colours += [_mix(colour, theme.sun, share) for colour in sky]
    colours += [_mix(theme.sun, colour, 0.12) for colour in sky]
    hills = [_mix(theme.far, theme.near, hill / (_HILLS - 1)) for hill in range(_HILLS)]
    colours += hills
    for near, hill in enumerate(hills):
        colours += [_mix(hill, behind, 0.5) for behind in (*hills[:near], sky[-8])]
    colours += [_mix(theme.near, (0, 0, 0), 0.35), _mix(theme.sun, theme.horizon, 0.2)]
    return bytes(channel for colour in colours for channel in colour)


def _hill_tops(width: int, height: int, chance: random.Random) -> list[list[float]]:
    """Return the row in which each hill begins, by column, from the farthest hill to the nearest."""
    unit, segment = min(width, height), 8
    shares = range(segment)
    hills = []
    for hill in range(_HILLS):
        base = height * (0.52 + 0.105 * hill + 0.02 * (chance.random() - 0.5))
        swell = unit * (0.075 - 0.006 * hill) * (0.7 + 0.6 * chance.random())
        wave = (1.1 + 0.9 * chance.random()) * math.tau / (unit * (0.8 + 0.12 * hill))
        ripple = wave * (2.3 + chance.random())
        start, other = chance.random() * math.tau, chance.random() * math.tau
        tops: list[float] = []
        left = 0.0
        for x in range(-segment, width + segment, segment):
            right = base - swell * (math.sin(wave * x + start) + 0.34 * math.sin(ripple * x + other))
            slope = (right - left) / segment
            if x > -segment:
                tops += [left + slope * share for share in shares]
            left = right
        hills.append(tops[:width])
    return hills


def _plant_pines(tops: list[float], unit: int, chance: random.Random) -> None:
    """Put pines on a hill, as part of its outline."""
    ground, centre, width = tops.copy(), 0.0, len(tops)
    while centre < width:
        tall = unit * (0.03 + 0.05 * chance.random())
        half = tall * 0.24
        left, right = max(0, math.ceil(centre - half)), min(width, math.ceil(centre + half))
        for x in range(left, right):
            slope = 1 - abs(x - centre) / half
            tops[x] = min(tops[x], ground[x] - tall * (slope * 0.75 + 0.25 * (slope * 3 % 1)))
        centre += half * (1.2 + 7 * chance.random() ** 2)


def _paint_landscape(rows: bytearray, width: int, height: int, chance: random.Random) -> None:
    unit = min(width, height)
    centre = width * (0.22 + 0.56 * chance.random()), height * (0.24 + 0.2 * chance.random())
    radius = unit * (0.06 + 0.04 * chance.random())
    tops = _hill_tops(width, height, chance)
    if chance.random() < 0.6:  # noqa: PLR2004
        _plant_pines(tops[_HILLS - 1 - int(chance.random() * 2)], unit, chance)
    skyline = [max(1, int(top)) for top in map(min, *tops)]
    band_rows = height * 0.66 / _BANDS
    bands = bytes([min(_BANDS - 1, int((row - 1) / band_rows)) for row in skyline])
    _paint_sky(rows, bands, [math.ceil(band * band_rows) for band in range(_BANDS)])
    sky = list(bands)
    for ring in (radius * 2.6, radius * 1.7, radius):
        _paint_ring(rows, skyline, sky, centre, ring)
    _paint_hills(rows, height, tops, sky)


def _paint_sky(rows: bytearray, bands: bytes, starts: list[int]) -> None:
    """Start the next band in each of the rows `starts`, in the columns where the sky reaches that far."""
    width = len(bands)
    for band in range(1, max(bands) + 1):
        index = starts[band] * (width + 1) + 1
        rows[index : index + width] = bands.translate(bytes(band) + b"\x01" * (256 - band))


def _paint_ring(
    rows: bytearray, skyline: list[int], sky: list[int], centre: tuple[float, float], radius: float
) -> None:
    """Go one ring inwards in a circle. Where the skyline cuts it, `sky` is updated to the colour above the hill."""
    width = len(skyline)
    for x in range(max(0, math.ceil(centre[0] - radius)), min(width, math.ceil(centre[0] + radius))):
        reach = math.sqrt(radius * radius - (x - centre[0]) ** 2)
        first, last = max(0, int(centre[1] - reach)), int(centre[1] + reach)
        limit = skyline[x]
        if first >= limit or first == last:
            continue
        index = first * (width + 1) + x + 1
        rows[index] = (rows[index] + _BANDS) & 255
        if last < limit:
            index = last * (width + 1) + x + 1
            rows[index] = (rows[index] - _BANDS) & 255
        else:
            sky[x] += _BANDS


def _paint_hills(rows: bytearray, height: int, tops: list[list[float]], sky: list[int]) -> None:
    """Write the outlines of the hills, column by column from the nearest hill up to the sky."""
    stride, low = len(sky) + 1, height - 2.0
    above_all = [-1.0] * len(sky)  # the sky, as a hill behind all others
    for x, highest, limit, *farther in zip(range(1, stride), sky, *reversed(tops), above_all, strict=True):
        hill = near = _HILLS - 1
        limit = limit if limit < low else low  # noqa: PLW2901, FURB136  half the time of min()
        for top in farther:
            hill -= 1
            if top >= limit - 1:
                continue
            behind = _HILL + hill if hill >= 0 else highest
            row = int(limit)
            index = row * stride + x
            uncovered = limit - row
            if uncovered > 0.75:  # noqa: PLR2004
                index += stride
            elif uncovered > 0.25:  # noqa: PLR2004
                edge = _EDGES[near][hill]
                rows[index] = (rows[index] + edge - behind) & 255
                index += stride
                behind = edge
            rows[index] = (rows[index] + _HILL + near - behind) & 255
            near, limit = hill, top  # noqa: PLW2901


def _paint_caption(rows: bytearray, width: int, height: int, dot: int) -> None:
    """Write SANDBOX on a strip along the bottom; its rows are stored as they are, not as differences."""
    first = height - _CAPTION_DOTS * dot
    ground, ink = bytes([_CAPTION]), bytes([_CAPTION + 1])
    plain = b"\x00" + ground * width
    margin = (width - _WORD_DOTS * dot) // 2
    for line in range(7):
        bits = "00".join(f"{_LETTERS[letter][line]:05b}" for letter in _WORD)
        text = b"".join((ink if bit == "1" else ground) * dot for bit in bits)
        index = (first + (3 + line) * dot) * (width + 1)
        rows[index : index + width + 1] = b"\x00" + ground * margin + text + ground * (width - margin - len(text))
    for row in (first, first + 10 * dot):
        rows[row * (width + 1) : (row + 1) * (width + 1)] = plain
