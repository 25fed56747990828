"""When two ways to write a place mean the same one."""

from __future__ import annotations

from pathlib import Path

from elastictrain.job import place_of


def test_the_home_of_nobody_is_a_folder_like_others() -> None:
    assert place_of("~nobody-of-this-name/kept") == str(Path.cwd() / "~nobody-of-this-name/kept")
    assert place_of("~/kept") == place_of("file://~/kept") == str(Path.home() / "kept")


def test_a_place_in_a_store_is_what_its_address_says() -> None:
    assert place_of("s3://bucket/kept/") == place_of("s3://bucket/kept") != place_of("gs://bucket/kept")
