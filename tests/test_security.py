"""What a store, a run or a network cannot do: run code, learn or spread credentials, reach outside of its root."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from stores import FINGERPRINT, SEGMENTS, write_store

import actcache
from actcache.cli import main
from actcache.errors import CorruptStoreError, InputError
from actcache.store import StoreWriter, open_store
from actcache.store.claims import Claims
from actcache.store.commit_record import encode_record
from actcache.store.far_path import check_address, path_at, without_secrets
from actcache.store.patience import Patience
from actcache.store.storage import LocalStorage, open_storage
from actcache.study.run_folder import RunFolder, absolute_place

PACKAGE = Path(actcache.__file__).parent

# ---- no code from data ---------------------------------------------------------------------------------------------

# Modules that run what they read, or make objects of it.
LOADERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "yaml"}
# Calls that do so unless they are told not to.
CALLS = {"torch.load", "torch.hub", "pd.read_pickle", "pandas.read_pickle", "eval", "exec", "compile", "__import__"}


def dangers(code: str) -> list[str]:
    """What of a module's code may run what it reads."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in LOADERS]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in LOADERS:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            told = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if name in CALLS or name.startswith("torch.hub"):
                found.append(name)
            if name in ("np.load", "numpy.load") and told.get("allow_pickle") != "False":
                found.append(name)
            if told.get("allow_pickle", "False") != "False" or told.get("trust_remote_code", "False") != "False":
                found.append(name)
            if told.get("weights_only", "True") != "True":
                found.append(name)
    return found


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load(path, weights_only=True)",
        "np.load(path)",
        "np.load(path, allow_pickle=flag)",
        "AutoModel.from_pretrained(path, trust_remote_code=given)",
        "eval(text)",
    ],
)
def test_what_may_run_what_it_reads_is_found(code):
    assert dangers(code)
    assert not dangers("np.load(path, allow_pickle=False)\nmodel.eval()\nre.compile('x')")


def test_nothing_of_the_package_unpickles_or_runs_what_it_reads():
    """Ray sends jobs to its own actors by pickle, by itself; docs/guarantees.md says whom that trusts."""
    for path in PACKAGE.rglob("*.py"):
        assert dangers(path.read_text(encoding="utf-8")) == [], path


# ---- credentials ---------------------------------------------------------------------------------------------------

CANARY = "canary0Secret"
SECRETIVE = [
    f"s3://user:{CANARY}@bucket/run",
    f"s3://{CANARY}@bucket/run",
    f"s3://bucket/run?X-Amz-Signature={CANARY}",
    f"https://account.blob.core.windows.net/container/run?sv=1&sig={CANARY}",
    f"gs://bucket/run#{CANARY}",
    f"abfss://container:{CANARY}@account.dfs.core.windows.net/run",
]


def outcome(words: list[str]) -> int | str | None:
    """The exit code of a command."""
    try:
        return main(words)
    except SystemExit as ended:
        return ended.code


@pytest.mark.parametrize("url", SECRETIVE)
def test_an_address_with_a_secret_is_refused_and_not_shown(url, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for refuse in (check_address, path_at, RunFolder, open_storage, actcache.open_store, actcache.Run):
        with pytest.raises(InputError, match="credentials by the environment") as refused:
            refuse(url)
        assert CANARY not in str(refused.value)
    with pytest.raises(InputError, match="credentials by the environment"):
        absolute_place(url)
    capture = ["--pt", "pt", "--it", "it", "--prompts", "p.jsonl"]
    for words in (
        ["run", *capture, "--out", url],
        ["grid", url],
        ["depth", url],
        ["effects", url],
        ["report", url],
        ["across", f"a={url}", "b=RUN", "--out", "OUT"],
        ["inspect", url],
        ["verify", url],
        ["compact", url],
        ["export", url, "--to", "npy", "--out", "OUT"],
    ):
        assert outcome(words) == 2
        said = "".join(capfd.readouterr())
        assert "credentials by the environment" in said, words
        assert CANARY not in said, words
    written = [path for path in tmp_path.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]
    assert written == []


def test_an_address_of_a_container_is_taken():
    check_address("abfss://container@account.dfs.core.windows.net/run")
    check_address("s3://bucket/a run/with=signs&more")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"GET https://h:9/x/key?sig={CANARY} in 1 s", "GET https://h:9/x/key?... in 1 s"),
        (f'HTTPStore("https://user:{CANARY}@h/x?a={CANARY}")', 'HTTPStore("https://...@h/x?...")'),
        ("s3://bucket/key: 404?", "s3://bucket/key: 404?"),
    ],
)
def test_what_a_client_says_is_shown_without_secrets(text, shown):
    assert without_secrets(text) == shown


def test_the_error_of_a_signed_address_does_not_show_its_signature():
    obstore = pytest.importorskip("obstore.store")
    # Nothing listens at this port.
    objects = obstore.HTTPStore(
        f"http://127.0.0.1:9/x?sig={CANARY}", client_options={"allow_http": True}, retry_config={"max_retries": 0}
    )
    storage = open_storage(objects)
    storage.patience = Patience(total_s=0)
    assert CANARY not in str(storage)
    with pytest.raises(OSError, match=r"127\.0\.0\.1") as failed:
        storage.read("key")
    assert CANARY not in str(failed.value)


# ---- the root of a store -------------------------------------------------------------------------------------------

OUTSIDE = ("../outside/file", "segments/../../outside/file", "/etc/hostname", "..")


def calls_upon(storage: Any, key: str) -> dict[str, Callable[[], object]]:
    """Everything that reads or changes a key."""

    def create() -> None:
        with storage.creating(key) as publish:
            publish(b"1")

    def fill() -> None:
        with storage.new_folder(key, ["a"]) as write:
            write("a", [b"1"])

    return {
        "read": lambda: storage.read(key),
        "ranges": lambda: storage.read_ranges(key, [(0, 4)]),
        "size": lambda: storage.size(key),
        "stamp": lambda: storage.stamp(key),
        "names": lambda: storage.names(key),
        "sizes": lambda: storage.sizes(key),
        "put": lambda: storage.put(key, b"1"),
        "create": create,
        "fill": fill,
        "make": lambda: storage.make_folder(key),
        "clear": lambda: storage.remove_files(key, ["file"]),
        "remove": lambda: storage.remove(key),
        "move": lambda: storage.move(key, "here"),
        "move to": lambda: storage.move("there", key),
    }


@pytest.mark.parametrize("key", OUTSIDE)
def test_nothing_outside_of_a_folder_is_read_or_changed(key, tmp_path):
    outside = tmp_path / "outside" / "file"
    outside.parent.mkdir()
    outside.write_bytes(b"theirs")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "there").write_bytes(b"1")
    for name, call in calls_upon(LocalStorage(tmp_path / "root"), key).items():
        with pytest.raises(InputError, match="does not lie in"):
            call()
        assert outside.read_bytes() == b"theirs", name
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "outside", "root", "there"]


def test_nothing_is_changed_through_a_link(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"theirs")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(outside)
    (tmp_path / "root" / "linked").symlink_to(outside / "file")
    (tmp_path / "root" / "there").write_bytes(b"1")
    storage = LocalStorage(tmp_path / "root")
    changes = ("put", "create", "fill", "clear", "remove", "move", "move to")
    for key in ("link/file", "link/new/file"):
        for name, call in calls_upon(storage, key).items():
            if name in changes:
                with pytest.raises(InputError, match="is a link"):
                    call()
    with pytest.raises(InputError, match="is a link"):
        storage.put("linked", b"1")
    with pytest.raises(InputError, match="is a link"), Claims(storage, "link") as claims:
        claims.claim("unit")
    assert [(path.name, path.read_bytes()) for path in outside.iterdir()] == [("file", b"theirs")]


def test_nothing_outside_of_a_prefix_is_asked_for():
    obstore = pytest.importorskip("obstore.store")
    objects = obstore.MemoryStore()
    storage = open_storage(objects)
    for key in ("../outside", "a/../../outside", "./a", "a//b"):
        for name, call in calls_upon(storage, key).items():
            with suppress(ValueError, TypeError, OSError):  # or it does nothing
                call()
            assert objects.list().collect() == [], name
    storage.put("%2e%2e/a", b"1")  # a name like any other
    assert storage.names("") == ["%2e%2e"]
    path = path_at("s3://bucket/run")
    for key in ("../other", "/other", "a/../../other"):
        with pytest.raises(InputError, match="does not lie in s3://bucket/run"):
            path / key


@pytest.mark.parametrize("folder", ["../outside", "/outside", "%2e%2e%2foutside", "s-1/../s-0", "s-0/", "s-1", ".", ""])
def test_a_record_names_no_folder_but_its_own(folder, tmp_path):
    write_store(tmp_path / "store", FINGERPRINT, SEGMENTS)
    path = tmp_path / "store" / "commits" / "s-0.json"
    record = json.loads(path.read_bytes())
    del record["crc32c"]
    path.write_bytes(encode_record(record | {"folder": folder}))
    with pytest.raises(CorruptStoreError, match="folder"):
        open_store(tmp_path / "store")


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/b", "a.b", "%2e%2e", "", "a b"])
def test_a_segment_has_a_plain_name(name, tmp_path):
    writer = StoreWriter(tmp_path / "store", FINGERPRINT)
    with pytest.raises(InputError, match="segment name"):
        writer.append(name, SEGMENTS["s-0"])
