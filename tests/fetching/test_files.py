"""Folders that only this user can write to, and files that are there as a whole or not at all."""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path

import pytest

from fetching.files import SharedFolderError, private_folder, temporary_folder, write_atomically
from tests.cancelling import cancelled_after


def test_a_folder_is_made_for_this_user_alone(tmp_path: Path) -> None:
    folder = private_folder(tmp_path / "a" / "b")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert private_folder(folder) == folder


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o702])
def test_a_folder_that_others_can_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(SharedFolderError) as caught:
        private_folder(folder)
    assert caught.value.strerror == f"other users can write to it (mode {mode:04o})"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    os.chown(tmp_path, 12345, -1)
    with pytest.raises(SharedFolderError) as caught:
        private_folder(tmp_path)
    assert caught.value.strerror == "it belongs to another user (uid 12345)"
    os.chown(tmp_path, 0, -1)


def test_a_link_is_judged_by_the_folder_that_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "shared")
    with pytest.raises(SharedFolderError):
        private_folder(tmp_path / "link")


def test_a_folder_whose_parent_others_can_change_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As a volume of a container usually is: its owner may be root and its mode 0777."""
    tmp_path.chmod(0o777)
    private_folder(tmp_path / "cache")
    assert f"{tmp_path}: other users can rename what is in it, cache included" in caplog.text


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "y").touch()
    with pytest.raises(OSError, match=r"directory"):
        write_atomically(tmp_path / "x", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_cancellation_while_a_folder_is_removed_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    chance = random.Random(0)

    def work() -> None:
        while True:
            with temporary_folder("flux-") as folder:
                for index in range(20):
                    (folder / str(index)).touch()

    for _ in range(60):
        cancelled_after(chance.uniform(0, 0.003), work)
        assert list(tmp_path.iterdir()) == []
