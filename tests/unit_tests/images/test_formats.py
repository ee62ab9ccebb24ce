"""What a user relies on: an image that passed `inspect` is whole, of the stated size, and nothing else."""

from __future__ import annotations

import contextlib
import io
import random
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from langchain_cogview.images.formats import MAX_PARTS, MAX_PIXELS, ImageFormatError, ImageInfo, inspect, sniff

PILLOW_MIME = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
EXTENSION = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}

WAYS = [
    ("PNG", "1", {}),
    ("PNG", "L", {"optimize": True}),
    ("PNG", "LA", {}),
    ("PNG", "P", {}),
    ("PNG", "RGB", {"dpi": (72, 72)}),
    ("PNG", "RGBA", {}),
    ("PNG", "I;16", {}),
    ("JPEG", "L", {}),
    ("JPEG", "RGB", {}),
    ("JPEG", "RGB", {"progressive": True, "quality": 95}),
    ("JPEG", "RGB", {"optimize": True, "subsampling": 0, "comment": b"\xff\xd9 not the end"}),
    ("JPEG", "RGB", {"restart_marker_blocks": 1}),
    ("JPEG", "CMYK", {}),
    ("WEBP", "RGB", {}),
    ("WEBP", "RGB", {"lossless": True}),
    ("WEBP", "RGBA", {}),
    ("WEBP", "RGBA", {"lossless": True, "exact": True}),
    ("WEBP", "RGB", {"icc_profile": b"profile"}),
]


def encoded_image(way, width=9, height=7, seed=0) -> bytes:
    kind, mode, options = way
    noise = random.Random(seed).randbytes(width * height * 4)
    base = Image.frombytes("RGBA", (width, height), noise)
    image = base.convert("L").convert("I;16") if mode == "I;16" else base.convert(mode)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


class Counted(io.BytesIO):
    """A file that counts the bytes of each read."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.sizes = []

    def read(self, size: int | None = -1) -> bytes:
        found = super().read(size)
        self.sizes.append(len(found))
        return found


def look(data: bytes) -> ImageInfo:
    return inspect(io.BytesIO(data))


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width=1, height=1, *, depth=8, between=b"", pixels=b"x") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    middle = chunk(b"IDAT", pixels) if pixels is not None else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + between + middle + chunk(b"IEND", b"")


def webp(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for name, data in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def vp8x(width: int, height: int) -> tuple[bytes, bytes]:
    return b"VP8X", b"\0" * 4 + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")


def vp8l(width: int, height: int) -> tuple[bytes, bytes]:
    return b"VP8L", b"\x2f" + ((width - 1) | (height - 1) << 14).to_bytes(4, "little") + b"pixels"


ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join([way[0], way[1], *way[2]]))


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(WAYS), st.integers(1, 200), st.integers(1, 200), st.integers(0, 1000))
def test_format_and_dimensions_are_those_that_pillow_sees(way, width, height, seed):
    data = encoded_image(way, width, height, seed)
    with Image.open(io.BytesIO(data)) as oracle:
        expected = ImageInfo(PILLOW_MIME[oracle.format], EXTENSION[oracle.format], *oracle.size)
    assert look(data) == expected
    assert sniff(data[:12]) == expected.mime_type


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_is_an_image(kind):
    frames = [Image.new("RGB", (20, 10), (i * 60, 0, 0)) for i in range(4)]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    info = inspect(file)
    assert (info.mime_type, info.width, info.height) == (PILLOW_MIME[kind], 20, 10)


@ways
def test_every_cut_is_noticed(way):
    data = encoded_image(way)
    look(data)
    for length in range(len(data)):
        with pytest.raises(ImageFormatError):
            look(data[:length])


@settings(deadline=None)
@given(st.sampled_from(WAYS), st.binary(min_size=1, max_size=200))
def test_anything_behind_the_end_is_noticed(way, suffix):
    with pytest.raises(ImageFormatError):
        look(encoded_image(way) + suffix)


@ways
def test_two_images_in_one_file_are_refused(way):
    with pytest.raises(ImageFormatError, match=r"behind the image's end"):
        look(encoded_image(way) * 2)


def test_a_cut_is_called_a_cut():
    with pytest.raises(ImageFormatError, match="cut short"):
        look(encoded_image(WAYS[4])[:-5])
    with pytest.raises(ImageFormatError, match="empty"):
        look(b"")


@settings(deadline=None, max_examples=300)
@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\x10\0\0\0WEBP", b"RIFF\x10\0\0\0WEBPVP8X"]),
)
def test_any_bytes_are_an_image_or_an_image_format_error(data, magic):
    try:
        outcome = look(magic + data)
    except ImageFormatError as error:
        outcome = error
    assert isinstance(outcome, ImageInfo) or 0 < len(str(outcome)) < 120


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(WAYS), st.lists(st.tuples(st.integers(0, 10_000), st.binary(max_size=3)), min_size=1, max_size=4)
)
def test_a_damaged_image_is_an_image_or_an_image_format_error(way, edits):
    data = bytearray(encoded_image(way))
    for position, replacement in edits:
        position %= len(data)
        data[position : position + 2] = replacement
    try:
        info = look(bytes(data))
    except ImageFormatError:
        return
    assert 0 < info.width * info.height <= MAX_PIXELS


@settings(deadline=None)
@given(st.sampled_from([way for way in WAYS if way[0] == "PNG"]), st.integers(0, 10_000), st.integers(1, 255))
def test_one_wrong_byte_in_a_png_is_noticed(way, position, change):
    data = bytearray(encoded_image(way))
    data[position % len(data)] ^= change
    with pytest.raises(ImageFormatError):
        look(bytes(data))


@pytest.mark.parametrize(
    "data",
    [
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"GIF89a\1\0\1\0\0\0\0;",
        b"<!doctype html><title>502</title>",
        b'{"RetCode":-148654,"ErrMsg":"file not exist"}',
        b"RIFF\x24\0\0\0WAVEfmt ",
        b"BM" + b"\0" * 60,
        b"\xff\xd8",
    ],
)
def test_other_formats_are_refused(data):
    assert sniff(data) is None
    with pytest.raises(ImageFormatError, match="not a PNG, JPEG or WebP"):
        look(data)


@pytest.mark.parametrize("size", [(1_000_000, 1_000_000), (MAX_PIXELS + 1, 1), (7072, 7071)])
def test_a_pixel_bomb_is_refused(size):
    with pytest.raises(ImageFormatError, match="more than the 50,000,000 allowed"):
        look(png(*size))
    with pytest.raises(ImageFormatError, match="more than"):
        look(webp(vp8x(16_000, 16_000), vp8l(16_000, 16_000)))
    assert look(png(MAX_PIXELS, 1)).width == MAX_PIXELS


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_an_image_without_pixels_is_refused(size):
    with pytest.raises(ImageFormatError, match="no pixels"):
        look(png(*size))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (png(pixels=None), "ends before its pixels"),
        (png(pixels=b""), "ends before its pixels"),
        (png(depth=3), "header is wrong"),
        (png(between=chunk(b"IHDR", b"\0" * 13)), "not at its start"),
        (b"\x89PNG\r\n\x1a\n" + chunk(b"IDAT", b"x") + png()[8:], "not at its start"),
        (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", b"\0" * 12) + png()[33:], "header is wrong"),
        (png(between=chunk(b"a\0bc", b"")), "impossible chunk"),
        (png(between=b"\xff\xff\xff\xfftEXt"), "impossible chunk"),
        (png(between=chunk(b"tEXt", b"") * MAX_PARTS), "too many chunks"),
        (b"\xff\xd8\xff\xd9", "ends before its pixels"),
        (b"\xff\xd8\xff\xd0\xff\xd9", "out of place"),
        (b"\xff\xd8\xff\x01\xff\xd8\xff\xd9", "out of place"),
        (b"\xff\xd8\xff\xe0\0\1\xff\xd9", "header is wrong"),
        (b"\xff\xd8\xff\xe0\0\2xx", "marker is missing"),
        (b"\xff\xd8\xff\xc0\0\4\x08\0\xff\xd9", "header is wrong"),
        (b"\xff\xd8\xff\xda\0\2\0\xff\xd9", "not before its pixels"),
        (b"\xff\xd8" + b"\xff\xfe\0\2" * MAX_PARTS + b"\xff\xd9", "too many segments"),
        (webp((b"VP8X", b"short")), "header is wrong"),
        (webp((b"VP8L", b"\x2f")), "header is wrong"),
        (webp((b"VP8 ", b"\0" * 10)), "header is wrong"),
        (webp(vp8x(5, 5)), "no pixels"),
        (webp(), "no pixels"),
        (webp(vp8x(5, 5), vp8l(5, 6)), "sizes disagree"),
        (webp((b"EXIF", b"x"), vp8l(5, 5)), "not at its start"),
        (webp(vp8l(5, 5), *[(b"EXIF", b"")] * MAX_PARTS), "too many chunks"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_structure_is_refused_with_its_reason(data, why):
    with pytest.raises(ImageFormatError, match=why):
        look(data)


def test_a_thumbnail_inside_a_jpeg_does_not_pass_for_the_image():
    thumbnail = encoded_image(("JPEG", "RGB", {}), 3, 2)
    data = encoded_image(("JPEG", "RGB", {}), 90, 50)
    segment = (
        b"\xff\xff\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    )  # with fill bytes before the marker
    info = look(data[:2] + segment + data[2:])
    assert (info.width, info.height) == (90, 50)


@pytest.mark.parametrize("gap", range(65_500, 65_600))
def test_a_marker_on_the_edge_of_two_reads_is_found(gap):
    head = b"\xff\xd8\xff\xc0\0\x08\x08\0\x05\0\x07\x01\xff\xda\0\2"
    filling = (b"\0" * (gap - len(head)))[:-2] + b"\xff\0"
    assert look(head + filling + b"\xff\xd9") == ImageInfo("image/jpeg", ".jpg", 7, 5)


def test_the_file_is_read_in_pieces_of_at_most_64_kb():
    class CountingFile(io.BytesIO):
        longest = total = 0

        def read(self, size=-1):
            found = super().read(size)
            assert size >= 0
            self.longest, self.total = max(self.longest, len(found)), self.total + len(found)
            return found

    for way in (
        ("PNG", "RGB", {"compress_level": 0}),
        ("JPEG", "RGB", {"quality": 95}),
        ("WEBP", "RGB", {"lossless": True}),
    ):
        file = CountingFile(encoded_image(way, 400, 400))
        inspect(file)
        assert file.longest <= 65_536
        assert file.total <= 2.5 * len(file.getvalue())


def test_a_real_file_can_be_inspected(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(encoded_image(WAYS[8], 33, 44))
    with path.open("rb") as file:
        file.seek(10)
        assert inspect(file) == ImageInfo("image/jpeg", ".jpg", 33, 44)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xd8\xff\xc0\0\x08\x08\0\x05\0\x07\x01\xff\xda\0\2" + b"\xff\0" * 8_000_000 + b"\xff\xd9",
        b"\xff\xd8\xff\xc0\0\x08\x08\0\x05\0\x07\x01\xff\xda\0\2" + b"\xff" * 16_000_000 + b"\xd9",
        png(between=chunk(b"tEXt", b"x") * 99_000),
    ],
    ids=["stuffing", "fill bytes", "chunks"],
)
def test_a_hostile_file_is_read_about_once_in_large_pieces(data):
    file = Counted(data)
    with contextlib.suppress(ImageFormatError):
        inspect(file)
    assert 0 < sum(file.sizes) <= len(data) + len(data) // 10 + 3 * 65_536
    assert len(file.sizes) <= len(data) // 60_000 + 5
