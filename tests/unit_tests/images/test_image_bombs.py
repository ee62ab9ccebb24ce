"""A small file that decodes to gigabytes costs neither memory nor time: it is refused, or shown as a text."""

import io
import struct
import subprocess
import sys
import zlib

import pytest
from PIL import Image

from langchain_cogview import CogViewStorageError, GeneratedImage
from langchain_cogview.images.formats import ImageRefusedError, inspect
from langchain_cogview.notebook.previews import make_preview
from langchain_cogview.result import with_content
from tests.unit_tests.notebook.displayed import photo

SIDE = 7040
WEBP = bytes.fromhex(  # 7040x7040 pixels of one colour
    "5249464626000000574542505650384c190000002f7fdbdf16075081540820000a1a02495bbced8f8f88e87f0000"
)


def jpeg(side=64, mode="RGB", scans=0, **options):
    """A JPEG, its last scan written again until there are so many."""
    out = io.BytesIO()
    Image.new(mode, (side, side)).save(out, "JPEG", **options)
    data = out.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * max(0, scans - data.count(b"\xff\xda")) + data[-2:]


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(side, depth=8, colour=6, *, interlaced=0, extra=b"", row=8):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, interlaced))
    rows = zlib.compressobj(9)
    pixels = b"".join(rows.compress(bytes(side * row + 16)) for _ in range(side)) + rows.flush()
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def packed(count):
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(count)) + packer.flush()


def test_the_scans_of_a_jpeg_are_bounded_and_those_of_encoders_pass():
    for mode, options in (("RGB", {}), ("RGB", {"subsampling": 0}), ("L", {}), ("CMYK", {})):
        for progressive in (True, False):
            inspect(io.BytesIO(jpeg(mode=mode, progressive=progressive, **options)))
    inspect(io.BytesIO(jpeg(scans=64, progressive=True)))
    with pytest.raises(ImageRefusedError, match="more than the 64 scans"):
        inspect(io.BytesIO(jpeg(scans=65, progressive=True)))


@pytest.mark.parametrize(
    "content", [WEBP, jpeg(scans=3000, progressive=True), photo(1, 64)[:-9], b"\x89PNG\r\n\x1a\n"], ids=range(4)
)
def test_to_pil_gives_our_error_and_a_preview_gives_nothing(content):
    image = with_content(GeneratedImage(id="a", request_id="a", model="m", prompt="p"), content)
    with pytest.raises(CogViewStorageError, match="is not decoded|cannot be decoded") as caught:
        image.to_pil()
    assert len(str(caught.value)) < 300
    assert make_preview(content) is None
    assert "<img" not in image._repr_mimebundle_()["text/html"]


def test_large_images_of_ordinary_kinds_are_decoded():
    image = with_content(GeneratedImage(id="a", request_id="a", model="m", prompt="p"), jpeg(2048, quality=10))
    assert image.to_pil().size == (2048, 2048)
    assert make_preview(jpeg(SIDE, quality=10)).mime_type == "image/jpeg"


MEASURE = """
import sys
import PIL.Image, PIL.JpegImagePlugin, PIL.PngImagePlugin, PIL.WebPImagePlugin
from langchain_cogview import GeneratedImage
from langchain_cogview.result import with_content
from langchain_cogview.errors import CogViewError
from langchain_cogview.notebook.previews import make_preview
from langchain_cogview.result import with_content

def peak():  # of this program alone: ru_maxrss begins with the parent's
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) // 1024

content = sys.stdin.buffer.read()
image = with_content(GeneratedImage(id="a", request_id="a", model="m", prompt="p"), content)
make_preview(content)
image._repr_mimebundle_()
after_preview = peak()
try:
    image.to_pil()
except CogViewError:
    pass
print(after_preview, peak())
"""

BOMBS = {
    "progressive, 3,000 scans": lambda: jpeg(SIDE, scans=3000, progressive=True),
    "progressive, 64 scans": lambda: jpeg(SIDE, scans=64, progressive=True),
    "progressive, 4:4:4": lambda: jpeg(SIDE, progressive=True, subsampling=0),
    "progressive, 16 megapixels": lambda: jpeg(4096, scans=64, progressive=True, subsampling=0),
    "progressive CMYK": lambda: jpeg(SIDE, "CMYK", progressive=True),
    "baseline CMYK": lambda: jpeg(SIDE, "CMYK"),
    "16-bit RGBA, interlaced": lambda: png(SIDE, 16, 6, interlaced=1),
    "RGBA": lambda: png(SIDE, 8, 6, row=4),
    "RGBA of 17 megapixels": lambda: png(4100, 8, 6, row=4),
    "16-bit gray": lambda: png(SIDE, 16, 0, row=2),
    "a colour profile of a gigabyte": lambda: png(64, extra=chunk(b"iCCP", b"x\0\0" + packed(1024))),
    "a text of a gigabyte": lambda: png(64, extra=chunk(b"zTXt", b"x\0\0" + packed(1024))),
    "many texts": lambda: png(64, extra=b"".join(chunk(b"zTXt", b"k%d\0\0" % n + packed(1)) for n in range(300))),
    "WebP": lambda: WEBP,
}


on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="The peak is read from /proc.")


@on_linux
@pytest.mark.heavy
@pytest.mark.parametrize("name", BOMBS)
def test_no_preview_and_no_decoding_takes_more_than_300_mb(name):
    done = subprocess.run([sys.executable, "-c", MEASURE], input=BOMBS[name](), capture_output=True, timeout=400)
    assert done.returncode == 0, done.stderr
    after_preview, after_decoding = map(int, done.stdout.split())
    assert after_preview < 300
    assert after_decoding < 330


@on_linux
def test_the_jpeg_with_three_thousand_scans_takes_no_memory():
    content = jpeg(1024, scans=3000, progressive=True)
    done = subprocess.run([sys.executable, "-c", MEASURE], input=content, capture_output=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert max(map(int, done.stdout.split())) < 150


def test_a_terminal_is_sent_no_image_that_takes_gigabytes():
    from langchain_cogview.cli.output import Terminal, inline_image

    assert inline_image(Terminal.KITTY, WEBP, (SIDE, SIDE), (80, 24)) == ""
    assert inline_image(Terminal.KITTY, jpeg(), (64, 64), (80, 24)).startswith("\x1b_G")
