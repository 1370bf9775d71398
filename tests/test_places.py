import pytest

from pipeline import places


@pytest.mark.parametrize(("kind", "expected"), [("nfs", True), ("nfs4", True), ("lustre", True), ("ext2/ext3", False)])
def test_some_file_systems_are_other_machines(kind, expected, tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    stat.write_text(f"#!/bin/sh\necho {kind}\n")
    stat.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert places.is_on_network(tmp_path) is expected


def test_this_machines_own_is_not(tmp_path):
    assert not places.is_on_network("/proc")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("s3://bucket/a", True), ("https://host:80/a", True), ("memory://a", True), ("data/a", False), ("/a//b", False)],
)
def test_a_url_has_a_scheme(name, expected):
    assert places.is_url(name) is expected
