"""Bytes stay whole, or aside; never half, never over another file."""

import errno
import io
import os
import stat
import threading

import pytest

from langchain_cogview.images.formats import ImageInfo
from langchain_cogview.images.store import PictureFile, write_whole

PNG = ImageInfo("image/png", ".png", 1, 1)


class Full(io.FileIO):
    """A disk with room for some bytes: takes a part of a write, then none."""

    room = 100

    def write(self, chunk):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = super().write(chunk[: self.room])
        self.room -= taken
        return taken


def test_a_full_disk_moves_every_byte_aside(tmp_path):
    kept = PictureFile(tmp_path)
    kept.file.close()
    kept.file = Full(tmp_path / "part", "w+b")
    for piece in (b"a" * 70, b"b" * 70, b"c" * 70):
        kept.write(piece)
    assert kept.read() == b"a" * 70 + b"b" * 70 + b"c" * 70
    assert kept.keep(PNG) is None
    assert kept.problem == "No space left on device"
    assert kept.size == 210
    kept.close()


def test_the_same_bytes_at_the_same_moment_get_two_files(tmp_path):
    paths = set()
    for _ in range(3):
        kept = PictureFile(tmp_path)
        kept.write(b"same")
        paths.add(kept.keep(PNG))
        kept.close()
    assert set(tmp_path.iterdir()) == paths
    assert len(paths) == 3


def test_a_file_that_is_not_kept_leaves_nothing(tmp_path):
    kept = PictureFile(tmp_path)
    kept.write(b"half")
    kept.close()
    assert list(tmp_path.iterdir()) == []


def test_without_unnamed_files_a_temporary_one_takes_their_place(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    kept = PictureFile(tmp_path)
    kept.write(b"bytes")
    assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
    path = kept.keep(PNG)
    kept.close()
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"bytes"
    PictureFile(tmp_path).close()
    assert list(tmp_path.iterdir()) == [path]


def test_files_have_the_rights_that_the_user_asks_of_new_ones(tmp_path):
    before = os.umask(0o027)
    try:
        kept = PictureFile(tmp_path)
        kept.write(b"x")
        path = kept.keep(PNG)
        kept.close()
        write_whole(tmp_path / "named.png", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "named.png").stat().st_mode) == 0o640


def test_an_explicit_save_replaces_a_file_and_writes_to_a_device(tmp_path):
    target = tmp_path / "k.png"
    target.write_bytes(b"old")
    write_whole(target, b"new")
    assert target.read_bytes() == b"new"
    write_whole(type(target)("/dev/null"), b"new")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(OSError):
        write_whole(target / "below", b"x")


async def test_a_local_file_is_kept_alike_in_an_event_loop(tmp_path):
    before = threading.active_count()
    kept = PictureFile(tmp_path)
    kept.write(b"bytes")
    path = await kept.akeep(PNG)
    kept.close()
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"bytes"
    assert threading.active_count() == before


def test_when_every_name_is_taken_the_bytes_stay_aside(tmp_path, monkeypatch):
    monkeypatch.setattr(PictureFile, "_names", lambda kept, info: iter(["taken.png"]))
    (tmp_path / "taken.png").write_bytes(b"a letter")
    kept = PictureFile(tmp_path)
    kept.write(b"bytes")
    assert kept.keep(PNG) is None
    assert kept.problem == "File exists"
    assert kept.read() == b"bytes"
    assert (tmp_path / "taken.png").read_bytes() == b"a letter"
    kept.close()
