"""Project quotas: where they are, and what the kernel of this machine says of them.

That a full one is full takes a file system that is mounted with ``prjquota``: ``HYPHA_QUOTA_DIR`` names it.
"""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from hypha.config.environment import variable
from hypha.files.beneath import directory_below
from hypha.worker.limits import quotas
from hypha.worker.limits.quotas import ProjectQuotas, find_volume, set_project, usable_quotas

MOUNTS = """\
22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw,prjquota
23 22 8:2 / /data rw,relatime shared:1 - xfs /dev/sdb1 rw,attr2,pquota
24 22 8:3 / /data/plain rw,relatime - ext4 /dev/sdc1 rw,errors=remount-ro
25 22 0:5 / /tmp rw - tmpfs tmpfs rw,size=1024k
26 22 8:4 / /with\\040space rw - xfs /dev/sdd1 rw,prjquota
"""


@pytest.mark.parametrize(
    ("directory", "found"),
    [
        ("/var/lib/hypha", ("ext4", "/dev/sda1")),
        ("/data/work", ("xfs", "/dev/sdb1")),
        ("/data", ("xfs", "/dev/sdb1")),
        ("/database", ("ext4", "/dev/sda1")),
        ("/data/plain/work", None),
        ("/tmp/work", None),
        ("/with space/work", ("xfs", "/dev/sdd1")),
    ],
)
def test_the_file_system_of_a_directory(directory: str, found: tuple[str, str] | None) -> None:
    assert find_volume(directory, MOUNTS) == found


def test_a_device_without_quotas_says_so() -> None:
    with pytest.raises(OSError, match="quotactl of /dev/null") as caught:
        ProjectQuotas("ext4", "/dev/null").used_bytes(1)
    assert caught.value.errno in (errno.ENOTBLK, errno.ENOSYS, errno.EPERM)


def project_of(directory: Path) -> int:
    """0: none."""
    with directory_below(directory) as descriptor:
        found = quotas._ioctl(descriptor, quotas._GET_ATTRIBUTES)
    return int(quotas._ATTRIBUTES.unpack(found)[3])


def test_a_directory_belongs_to_no_project_until_it_is_told(tmp_path: Path) -> None:
    """The kernel understands what it is asked, whether it can do it or not."""
    try:
        before = project_of(tmp_path)
    except OSError as exc:
        pytest.skip(f"this file system has no attributes: {exc}")
    assert before == 0
    told = 1 << 24
    try:
        set_project(tmp_path, told)
    except OSError:
        told = 0
    assert project_of(tmp_path) == told


@pytest.mark.skipif(variable("HYPHA_QUOTA_DIR") is None, reason="no file system with project quotas is named")
def test_what_is_more_than_the_quota_is_refused_and_links_go_on() -> None:
    usable = usable_quotas(Path(variable("HYPHA_QUOTA_DIR") or "."))
    assert usable is not None
    one, other = (Path(variable("HYPHA_QUOTA_DIR") or ".") / name for name in ("quota-one", "quota-other"))
    for directory in (one, other):
        directory.mkdir()
    project = usable.bound([one, other], 10**6)
    try:
        (one / "file").write_bytes(b"x" * 500_000)
        (one / "file").rename(other / "file")
        with pytest.raises(OSError, match="quota") as caught:
            (one / "more").write_bytes(b"x" * 800_000)
        assert caught.value.errno == errno.EDQUOT
        assert usable.used_bytes(project) >= 500_000
    finally:
        usable.release(project)
        for directory in (one, other):
            for path in directory.iterdir():
                path.unlink()
            directory.rmdir()
