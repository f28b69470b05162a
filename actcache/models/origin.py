"""Origin: what a user gives for a checkpoint, and the folders that it names.

A folder; ``org/name`` or ``org/name@revision`` of the Hugging Face Hub; or ``BASE+ADAPTER``, each of them one of these.
A folder that is there wins over an id, whatever its name. Of the Hub, exactly the files that are read are downloaded:
configs, tokenizer and safetensors. Knows folders and the Hub's cache; opens no model.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from actcache.errors import InputError

_NAME = r"\w[\w.-]*"
_ID = re.compile(rf"(?P<id>{_NAME}/{_NAME})(?:@(?P<revision>{_NAME}(?:/{_NAME})*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json"),
    *("*.tiktoken", "chat_template.jinja", "chat_template.json"),
)
_DEFINE = ("config.json", "adapter_config.json")  # one of them is in every repository that can be given
_SMALL = (*_DEFINE, "generation_config.json", "model.safetensors.index.json", *_TOKENIZER)


class Recorded(str):
    """What a record says of where a checkpoint is. It leads to folders and into the Hub's cache, never to a download:
    only what a person gives does that."""


@dataclass(frozen=True)
class Place:
    """A folder or an id.

    Attributes:
        folder: whose files are read: of an id, its snapshot in the Hub's cache.
        text: what finds the same again from anywhere: an absolute folder, or ``org/name@commit``.
    """

    folder: Path
    text: str

    @property
    def said(self) -> str:
        """For messages: a folder as it was given, or the id."""
        return str(self.folder) if Path(self.text).is_absolute() else self.text

    @property
    def name(self) -> str:
        """Of the folder, or the last part of the id."""
        return re.sub(r"@.*", "", self.text).rpartition("/")[2]


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint comes from, found by :meth:`find`.

    Attributes:
        given: what the user gave, for messages.
        base: the model's folder.
        adapter: that of an adapter to merge into it, where one is given.
    """

    given: str
    base: Place
    adapter: Place | None = None

    @classmethod
    def find(cls, given: str | Path, *, with_weights: bool = True) -> Origin:
        """Find the folders; what is missing of an id is downloaded first, weights only if told so.

        Raises:
            InputError: there is no such folder nor id, the id is not in the cache while the Hub cannot be asked, or a
                ``+`` may be read in two ways.
        """
        text = str(given)
        base, adapter = _split(text)
        hub = _Hub(may_download=not isinstance(given, Recorded), with_weights=with_weights)
        return cls(text, hub.place(base), None if adapter is None else hub.place(adapter, is_adapter=True))

    @property
    def text(self) -> str:
        """What opens the same checkpoint again, from any folder; see :attr:`Place.text`."""
        return "+".join(place.text for place in (self.base, self.adapter) if place is not None)


def _folder(given: str) -> Path:
    """A shell leaves ``~`` as it is after a ``+``."""
    return Path(given).expanduser() if given.startswith("~/") else Path(given)


def _split(given: str) -> tuple[str, str | None]:
    """Base and adapter."""
    if "+" not in given or Path(given).exists():
        return given, None

    def names(half: str) -> bool:
        return half != "" and (_folder(half).is_dir() or _ID.fullmatch(half) is not None)

    halves = [(given[:at], given[at + 1 :]) for at, letter in enumerate(given) if letter == "+"]
    found = [pair for pair in halves if all(map(names, pair))]
    if len(found) == 1:
        return found[0]
    if found:
        readings = " or as ".join(f"{base} and {adapter}" for base, adapter in found)
        raise InputError(f"{given} may be read as {readings}; give folders without a '+' in their names")
    missing = next(half for half in halves[0] if not names(half))
    raise InputError(
        f"{given} is not a folder, and as BASE+ADAPTER its {missing!r} is neither a folder nor an id as org/name"
    )


@dataclass(frozen=True)
class _Hub:
    """The Hub's cache, and the Hub where it may be asked."""

    may_download: bool
    with_weights: bool

    def place(self, given: str, *, is_adapter: bool = False) -> Place:
        """Of one side."""
        folder, named = _folder(given), _ID.fullmatch(given)
        if named is not None and not folder.exists():
            folder = self._snapshot(given, named["id"], named["revision"], is_adapter)
            return Place(folder, f"{named['id']}@{folder.name}")
        return Place(folder, str(folder.resolve()))

    def _snapshot(self, given: str, repo: str, revision: str | None, is_adapter: bool) -> Path:
        """The folder of an id in the cache, with what is read of it.

        A commit that is there is not asked for again. Of a branch, the Hub says where it is, if it can be asked.
        """
        from huggingface_hub import constants

        offline = constants.HF_HUB_OFFLINE or not self.may_download
        cached = _cached(repo, revision)
        if cached is not None and (
            offline or (_COMMIT.fullmatch(revision or "") and self._is_whole(cached, is_adapter))
        ):
            return cached
        if not self.may_download:
            raise InputError(
                f"{given} is not in the Hub's cache any more; give it by --checkpoint LABEL={given}, to download it"
            )
        if offline:
            raise InputError(
                f"{given} is not a folder, and not in the Hub's cache ({constants.HF_HUB_CACHE}); HF_HUB_OFFLINE is "
                "set: download it where the Hub can be asked, or give a local model folder"
            )
        return self._downloaded(given, repo, revision, is_adapter, cached)

    def _is_whole(self, folder: Path, is_adapter: bool) -> bool:
        return not self.with_weights or all((folder / name).is_file() for name in _weights(folder, is_adapter))

    def _downloaded(self, given: str, repo: str, revision: str | None, is_adapter: bool, cached: Path | None) -> Path:
        """What the Hub has; where it cannot be asked, what the cache has."""
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        from actcache.models.checkpoint_files import no_weights, one_line

        def fetch(patterns: Iterable[str]) -> Path:
            return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))

        try:
            folder = fetch(_SMALL)
            if self._is_whole(folder, is_adapter):
                return folder
            names, there = _weights(folder, is_adapter), HfApi().list_repo_files(repo, revision=folder.name)
            if not set(names) <= set(there):
                raise no_weights(given, there)
            return fetch(map(glob.escape, names))
        except InputError:
            raise
        except GatedRepoError as error:
            raise InputError(f"{given}: the Hub gives it to those only who asked for access and log in") from error
        except RevisionNotFoundError as error:
            raise InputError(f"{given}: the Hub has {repo}, and no such revision of it") from error
        except RepositoryNotFoundError as error:
            raise InputError(
                f"{given} is not a folder, and not a model of the Hub that you may read; give a local model folder, or "
                "an id as org/name"
            ) from error
        except Exception as error:  # those of the library, and those of its transport, which has its own
            if cached is not None:
                return cached
            raise InputError(
                f"{given} is not a folder, and the Hub cannot be asked for it ({one_line(error.__cause__ or error)}); "
                "give a local model folder"
            ) from error


def known_folder(named: str) -> Path | None:
    """A folder that a file names, absolutely or by an id: where it is here already. Nothing is downloaded for it."""
    try:
        if Path(named).is_absolute():
            return Path(named) if Path(named).is_dir() else None
    except OSError:  # a name that is too long
        return None
    match = _ID.fullmatch(named)
    return None if match is None else _cached(match["id"], match["revision"])


def _cached(repo: str, revision: str | None) -> Path | None:
    """The snapshot of an id that holds a config."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = [try_to_load_from_cache(repo, name, revision=revision) for name in _DEFINE]
    except ValueError:  # an id that the Hub does not give
        return None
    return next((Path(file).parent for file in found if isinstance(file, str)), None)


def _weights(folder: Path, is_adapter: bool) -> list[str]:
    """The files that hold the weights of a repository whose configs are in this folder."""
    from actcache.models.checkpoint_files import indexed_names

    if is_adapter and not (folder / "adapter_config.json").exists():
        return []
    if is_adapter or not (folder / "config.json").exists():
        return ["adapter_model.safetensors"]
    index = folder / "model.safetensors.index.json"
    return indexed_names(index) if index.exists() else ["model.safetensors"]
