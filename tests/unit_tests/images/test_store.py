"""Bytes stay whole, or aside; never half, never over another file."""

import contextlib
import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from langchain_cogview.images.formats import ImageInfo
from langchain_cogview.images.store import ImageFile, write_whole

PNG = ImageInfo("image/png", ".png", 1, 1)


def _no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_moves_every_byte_into_memory(tmp_path):
    with resource_limit(resource.RLIMIT_FSIZE, 100):
        file = ImageFile(tmp_path)
        for piece in (b"a" * 70, b"b" * 70, b"c" * 70):
            file.write(piece)
        assert file.read() == b"a" * 70 + b"b" * 70 + b"c" * 70
        assert file.save(PNG) is None
        assert file.problem == "File too large"
        assert file.size == 210
        file.close()
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def resource_limit(which, value):
    """A limit of this process, which the system answers with an error and not with a signal."""
    before, handler = resource.getrlimit(which), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(which, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(which, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_the_same_bytes_at_the_same_moment_get_two_files(tmp_path):
    paths = set()
    for _ in range(3):
        file = ImageFile(tmp_path)
        file.write(b"same")
        paths.add(file.save(PNG))
        file.close()
    assert set(tmp_path.iterdir()) == paths
    assert len(paths) == 3


def test_a_file_that_is_not_kept_leaves_nothing(tmp_path):
    file = ImageFile(tmp_path)
    file.write(b"half")
    file.close()
    assert list(tmp_path.iterdir()) == []


def test_without_unnamed_files_a_temporary_one_takes_their_place(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    file = ImageFile(tmp_path)
    file.write(b"bytes")
    assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
    path = file.save(PNG)
    file.close()
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"bytes"
    ImageFile(tmp_path).close()
    assert list(tmp_path.iterdir()) == [path]


def test_files_have_the_rights_that_the_user_asks_of_new_ones(tmp_path):
    before = os.umask(0o027)
    try:
        file = ImageFile(tmp_path)
        file.write(b"x")
        path = file.save(PNG)
        file.close()
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


@pytest.mark.parametrize("unnamed", [True, False], ids=["unnamed", "temporary"])
@pytest.mark.parametrize("renames", [True, False], ids=["renameat2", "without"])
@pytest.mark.parametrize("code", ["EPERM", "EOPNOTSUPP", "ENOSYS", "EXDEV", "EMLINK", "EACCES", "EINVAL", "ENOENT"])
def test_without_hard_links_files_are_whole_and_never_over_another(tmp_path, monkeypatch, code, renames, unnamed):
    _without_hard_links(monkeypatch, code, renames=renames, unnamed=unnamed)
    monkeypatch.setattr(time, "strftime", lambda *_: "20260101T000000Z")
    paths = []
    for _ in range(3):
        file = ImageFile(tmp_path, label="label")
        file.write(b"same")
        paths.append(file.save(PNG))
        assert file.problem is None
        file.close()
    assert set(tmp_path.iterdir()) == set(paths)
    assert [path.read_bytes() for path in paths] == [b"same"] * 3
    paths[0].write_text("a letter")
    file = ImageFile(tmp_path, label="label")
    file.write(b"same")
    assert file.save(PNG) not in paths
    file.close()
    assert paths[0].read_text() == "a letter"
    write_whole(tmp_path / "saved.png", b"saved")
    assert (tmp_path / "saved.png").read_bytes() == b"saved"
    assert not list(tmp_path.glob(".*"))


def _without_hard_links(monkeypatch, code, *, renames=True, unnamed=True):
    def link(*_, **__):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(os, "link", link)
    if not renames:
        monkeypatch.setattr(sys, "platform", "freebsd")
    if not unnamed:
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)


@pytest.mark.parametrize("renames", [True, False], ids=["renameat2", "without"])
def test_without_hard_links_two_threads_never_get_one_name(tmp_path, monkeypatch, renames):
    _without_hard_links(monkeypatch, "EPERM", renames=renames)
    start = threading.Barrier(8)
    paths = []

    def save():
        file = ImageFile(tmp_path)
        file.write(b"same")
        start.wait(30)
        paths.append(file.save(PNG))
        file.close()

    threads = [threading.Thread(target=save) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 8
    assert set(tmp_path.iterdir()) == set(paths)


def test_a_disk_that_is_full_when_the_file_is_named_costs_no_byte(tmp_path, monkeypatch):
    _without_hard_links(monkeypatch, "EPERM", renames=False)
    monkeypatch.setattr("langchain_cogview.images.store.rename_new", _no_space)
    for unnamed in (True, False):
        if not unnamed:
            monkeypatch.delattr(os, "O_TMPFILE", raising=False)
        file = ImageFile(tmp_path)
        file.write(b"bytes")
        assert file.save(PNG) is None
        assert file.problem == "No space left on device"
        assert file.read() == b"bytes"
        file.close()
        assert list(tmp_path.iterdir()) == []


def test_a_kill_where_there_are_no_hard_links_leaves_whole_or_empty_files(tmp_path):
    program = f"""
        import errno, os, sys, signal, threading
        from pathlib import Path
        from langchain_cogview.images.formats import ImageInfo
        from langchain_cogview.images.store import ImageFile
        def link(*_, **__): raise OSError(errno.EPERM, "no")
        os.link = link
        del os.O_TMPFILE
        sys.platform = "freebsd"
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
        while True:
            file = ImageFile(Path({str(tmp_path)!r}))
            file.write(b"x" * 100_000)
            file.save(ImageInfo("image/png", ".png", 1, 1))
            file.close()
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False, timeout=400)
    assert ended.returncode == -signal.SIGKILL
    sizes = {path.stat().st_size for path in tmp_path.glob("*.png")}
    assert 100_000 in sizes
    assert sizes <= {0, 100_000}


def test_a_file_that_was_closed_takes_nothing_more_and_opens_nothing(tmp_path):
    file = ImageFile(tmp_path / "below")
    file.close()
    file.write(b"late")
    assert list(tmp_path.iterdir()) == []


def test_when_every_name_is_in_use_the_bytes_stay_aside(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "names", lambda file, info: iter(["taken.png"]))
    (tmp_path / "taken.png").write_bytes(b"a letter")
    file = ImageFile(tmp_path)
    file.write(b"bytes")
    assert file.save(PNG) is None
    assert file.problem == "File exists"
    assert file.read() == b"bytes"
    assert (tmp_path / "taken.png").read_bytes() == b"a letter"
    file.close()
