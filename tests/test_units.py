"""Sizes as people write and read them."""

import pytest

from kvq.units import format_bytes, format_ratio, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24GiB", 24 * 2**30),
        ("80 GB", 80 * 10**9),
        ("1.5tib", 3 * 2**39),
        (" .5KiB ", 512),
        ("7B", 7),
        ("2KB", 2000),
    ],
)
def test_a_size_is_read(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "24", "24G", "GiB", "-1GiB", "0B", "0.1B", "1e3GB", "nan GiB", "24GiB!", "٣GiB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match=r"is not a size in bytes; write .* 24GiB"):
        parse_bytes(text)


def test_a_size_is_shown():
    shown = [format_bytes(count) for count in (0, 1023, 1024, 3 * 2**19, 5000 * 2**30)]
    assert shown == ["0 B", "1023 B", "1.0 KiB", "1.5 MiB", "5000.00 GiB"]
    assert (format_ratio(2.5), format_ratio(0.5)) == ("2.50x smaller", "2.00x larger")
