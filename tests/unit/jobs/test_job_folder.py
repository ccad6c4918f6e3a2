"""A job's folder: finished work stays finished, and no other files are touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from serve_app.jobs.files import JobError
from serve_app.jobs.folder import Done, JobFolder, appearing

JOB: dict[str, Any] = {"files": [["/a", 1]], "item": "{text}", "request": {"apply_softmax": True, "labels": [" yes"]}}


def test_finished_work_is_found_again(tmp_path: Path):
    folder = JobFolder(tmp_path / "new" / "out")
    with folder.opened(JOB) as done:
        assert done == {}
        folder.finish_block(3, Done(5, 1, 70, 30))
    with folder.opened(JOB) as done:
        assert done == {3: Done(5, 1, 70, 30)}
    assert sum([Done(5, 1, 70, 30), Done(1, 1, 1, 1)], Done()) == Done(6, 2, 71, 31)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"item": "{body}"}, r'started with item = "\{text\}", and this job has "\{body\}"; repeat the original'),
        ({"request": {"apply_softmax": False, "labels": [" yes"]}}, "with request.apply_softmax = true, .* has false"),
        ({"request": {"labels": [" yes"]}}, "with request.apply_softmax = true, and this job has null"),
        ({"files": [["/a", 2]]}, "started with files = "),
        ({"more": "x" * 1_000}, 'started with more = null, and this job has "x+\\.\\.\\.'),
    ],
)
def test_another_job_is_refused_with_the_differences(tmp_path: Path, changed: dict[str, Any], said: str):
    with JobFolder(tmp_path).opened(JOB):
        pass
    with pytest.raises(JobError, match=said), JobFolder(tmp_path).opened(JOB | changed):
        pass
    with JobFolder(tmp_path).opened(JOB):
        pass


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path):
    def write(*, stopped: bool) -> None:
        with appearing(tmp_path / "part") as path:
            path.write_text("half")
            assert not (tmp_path / "part").exists()
            if stopped:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(stopped=True)
    assert not (tmp_path / "part").exists()
    write(stopped=False)
    assert (tmp_path / "part").read_text() == "half"
    assert [each.name for each in tmp_path.iterdir()] == ["part"]
    with JobFolder(tmp_path / "out").opened(JOB):
        pass
    left = tmp_path / "out" / "bad" / "part-000001.jsonl.77.tmp"
    left.touch()
    with JobFolder(tmp_path / "out").opened(JOB):
        assert not left.exists()


def test_a_folder_that_is_not_the_jobs_is_refused(tmp_path: Path):
    folder, other = JobFolder(tmp_path / "out"), JobFolder(tmp_path / "out")
    with folder.opened(JOB), pytest.raises(JobError, match="another process is writing to"), other.opened(JOB):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(JobError, match=r"make sure that .* is a folder"), JobFolder(tmp_path / "file").opened(JOB):
        pass
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(JobError, match=r"other files \(thesis.tex\)"), JobFolder(tmp_path / "full").opened(JOB):
        pass
