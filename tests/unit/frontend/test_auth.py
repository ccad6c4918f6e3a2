"""API keys: their sources, the comparison, and a file that changes while the service runs."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import subprocess
from pathlib import Path

import pytest

from serve_app.errors import AuthenticationError
from serve_app.frontend import auth
from serve_app.frontend.auth import ApiKeyError, ApiKeys, read_keys

SECURITY = Path(__file__).parents[3] / "docs" / "security.md"


@pytest.fixture(autouse=True)
def no_keys_in_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(auth.VARIABLE, raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("# of the team\n\nfirst-key\n  second/key=  \r\n")
    return path


def opens(keys: ApiKeys, key: str) -> bool:
    try:
        keys.check(f"Bearer {key}")
    except AuthenticationError:
        return False
    return True


def test_there_may_be_no_key():
    assert read_keys(None) == []
    assert not ApiKeys(None)


def test_keys_come_from_the_environment_and_a_file(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(auth.VARIABLE, "one, two,")
    assert [key.digest for key in read_keys(str(file))] == [
        hashlib.sha256(key).digest() for key in (b"one", b"two", b"first-key", b"second/key=")
    ]
    keys = ApiKeys(str(file))
    assert len(keys) == 4
    assert all(opens(keys, key) for key in ("one", "two", "first-key", "second/key="))


def test_a_file_has_hashes_beside_keys_each_with_a_name(file: Path):
    hashed = hashlib.sha256(b"third-key").hexdigest()
    file.write_text(f"first-key\nteam-b: sec:ond\nalice:\tsha256:{hashed}\nalice: sha256:{'AB' * 32}\n")
    keys = ApiKeys(str(file))
    names = [keys.check(f"Bearer {key}") for key in ("first-key", "sec:ond", "third-key")]
    assert names == ["key-" + hashlib.sha256(b"first-key").hexdigest()[:12], "team-b", "alice"]
    assert not any(opens(keys, key) for key in (hashed, f"sha256:{hashed}", f"alice: sha256:{hashed}"))
    assert "first-key" not in repr(read_keys(str(file)))


def test_the_documented_command_makes_a_line_with_a_hash(tmp_path: Path):
    command = re.search(r"^key=.*$", SECURITY.read_text(), re.MULTILINE)
    assert command
    run = subprocess.run(["sh", "-c", command[0]], cwd=tmp_path, capture_output=True, text=True, check=True)
    keys = ApiKeys(str(tmp_path / "keys"))
    assert keys.check(f"Bearer {run.stdout.strip()}") == "alice"
    assert run.stdout.strip() not in (tmp_path / "keys").read_text()


def test_keys_of_one_name_are_one_tenant_while_they_are_rotated(file: Path, caplog: pytest.LogCaptureFixture):
    file.write_text("alice: old\nalice: new\n")
    keys = ApiKeys(str(file))
    assert keys.check("Bearer old") == keys.check("Bearer new") == "alice"
    file.write_text("alice: new\n")
    caplog.set_level(logging.INFO, "ray.serve")
    caplog.handler.setLevel(logging.INFO)
    auth.logger.addHandler(caplog.handler)  # Ray's logger does not propagate
    try:
        assert [opens(keys, key) for key in ("old", "new")] == [False, True]
    finally:
        auth.logger.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records] == [
        f"{file} has changed; 1 API keys are valid now, of alice"
    ]


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", "first-key", "Basic first-key", "Bearer first-ke", "Bearer first-key2", "Bearer #",
     "Bearer FIRST-KEY", "Bearer first-key second/key=", "Bearer \u00e9\u00ff", "Bearer " + "x" * 100_000],
)  # fmt: skip
def test_invalid_keys_are_refused(file: Path, header: str):
    with pytest.raises(AuthenticationError) as caught:
        ApiKeys(str(file)).check(header)
    assert "first-key" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("header", ["Bearer first-key", "bearer first-key", "BEARER   second/key= "])
def test_the_schemes_case_and_spaces_do_not_matter(file: Path, header: str):
    ApiKeys(str(file)).check(header)


def test_all_keys_are_compared_in_constant_time(file: Path, monkeypatch: pytest.MonkeyPatch):
    compared: list[tuple[int, int]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return a == b

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for key in ("first-key", "second/key=", "x", "x" * 1000):
        opens(ApiKeys(str(file)), key)
    assert compared == [(32, 32)] * 8


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has no key; write one per line"),
        (b"# all gone\n\n", "has no key"),
        (b"good\ntwo words\n", "API key 2 of .* has a space"),
        ("schl\u00fcssel\n".encode(), "API key 1 of .* outside ASCII"),
        (b"alice: good\nb/b: words\n", "API key 2 of .* has a space .* after a name of letters, digits"),
        (b"alice: sha256:words\n", "API key 1 of .* begins with sha256: but has no 64 hexadecimal digits .* sha256sum"),
        (b"\xff\xfe\n", "cannot be read"),
    ],
)
def test_an_unusable_file_is_refused_at_the_start_by_name(tmp_path: Path, content: bytes, said: str):
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(ApiKeyError, match=said) as caught:
        ApiKeys(str(path))
    assert str(path) in str(caught.value)
    assert "words" not in str(caught.value)


def test_a_missing_file_is_refused_at_the_start(tmp_path: Path):
    with pytest.raises(ApiKeyError, match=r"nothing cannot be read: .*No such file"):
        ApiKeys(str(tmp_path / "nothing"))


def test_a_changed_file_is_read_again(file: Path):
    keys = ApiKeys(str(file))
    file.write_text("third-key\n")
    assert [opens(keys, key) for key in ("first-key", "third-key")] == [False, True]
    other = file.with_name("new")
    other.write_text("fourthkey\n")
    other.replace(file)  # editors and Kubernetes do so
    assert [opens(keys, key) for key in ("third-key", "fourthkey")] == [False, True]


@pytest.mark.parametrize("content", [None, "", "two words\n"])
def test_a_file_that_goes_bad_is_logged_once_and_its_keys_stay(
    file: Path, content: str | None, caplog: pytest.LogCaptureFixture
):
    keys = ApiKeys(str(file))
    caplog.set_level(logging.ERROR, "ray.serve")
    caplog.handler.setLevel(logging.ERROR)
    auth.logger.addHandler(caplog.handler)  # Ray's logger does not propagate
    try:
        if content is None:
            file.unlink()
        else:
            file.write_text(content)
        assert [opens(keys, key) for key in ("first-key", "other", "second/key=")] == [True, False, True]
        assert len([record for record in caplog.records if "stay valid" in record.getMessage()]) == 1
        file.write_text("fresh\n")
        assert [opens(keys, key) for key in ("first-key", "fresh")] == [False, True]
    finally:
        auth.logger.removeHandler(caplog.handler)
