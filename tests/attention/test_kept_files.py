"""Files that are kept between processes: how long one may be."""

from pathlib import Path

from kvq.attention.machine.kept_files import keep_file, read_private_file


class Growing(type(Path())):
    """A file to which another process adds right after somebody has asked how long it is."""

    def lstat(self):
        facts = super().lstat()
        self.write_bytes(b"longer")
        return facts


def test_a_file_is_read_up_to_its_limit(tmp_path):
    keep_file(tmp_path / "file", b"whole")
    assert read_private_file(tmp_path / "file", 5) == read_private_file(tmp_path / "file", 6) == b"whole"
    assert read_private_file(tmp_path / "file", 4) is None
    assert read_private_file(tmp_path / "absent", 4) is None


def test_a_file_that_grows_meanwhile_is_no_longer_than_its_limit(tmp_path):
    keep_file(tmp_path / "file", b"whole")
    assert read_private_file(Growing(tmp_path / "file"), 5) is None
