from __future__ import annotations

import os
import threading

from tensorway_fs.disk import Disk
from tensorway_fs.handles import Handles


class Counting(Disk):
    """Knows what is open."""

    def __init__(self):
        self.open_now, self.most = set(), 0

    def open(self, path, flags):
        file = super().open(path, flags)
        self.open_now.add(file)
        self.most = max(self.most, len(self.open_now))
        return file

    def close(self, file):
        self.open_now.remove(file)
        super().close(file)


def test_only_so_many_are_open_and_what_is_used_is_not_closed(tmp_path):
    disk = Counting()
    handles = Handles(disk, 4)
    paths = [tmp_path / str(number) for number in range(30)]
    for path in paths:
        path.write_text(path.name)
    with handles.reading(paths[0]) as first:
        for path in paths:
            with handles.reading(path) as file:
                assert path.name.encode() == os.pread(file, 9, 0)
        assert b"0" == os.pread(first, 9, 0)
    assert disk.most <= 6
    assert len(disk.open_now) <= 4
    handles.close()
    assert set() == disk.open_now


def test_what_is_forgotten_is_closed_when_the_last_is_done(tmp_path):
    disk, path = Counting(), tmp_path / "file"
    handles = Handles(disk, 4)
    path.write_text("old")
    with handles.reading(path) as old:
        handles.forget(path)
        path.unlink()
        path.write_text("new")
        assert b"old" == os.pread(old, 9, 0)
        with handles.reading(path) as new:
            assert b"new" == os.pread(new, 9, 0)
    handles.close()
    assert set() == disk.open_now


def test_threads_share_it(tmp_path):
    disk = Counting()
    handles = Handles(disk, 3)
    paths = [tmp_path / str(number) for number in range(12)]
    for path in paths:
        path.write_text(path.name)
    wrong = []

    def work(offset):
        for number in range(300):
            path = paths[(number * 5 + offset) % 12]
            with handles.reading(path) as file:
                if os.pread(file, 9, 0) != path.name.encode():
                    wrong.append(path)
            if number % 50 == 0:
                handles.forget(path)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handles.close()
    assert [] == wrong
    assert set() == disk.open_now
