"""A data set's repository on the Hub: checked before work begins, then made and filled in one commit.

Speaks through `huggingface_hub`, so HF_ENDPOINT, HF_TOKEN and `hf auth login` count. A failure is one line that holds
neither the token nor a request's headers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchored.errors import DataError
from anchored.hub.card import DATA_FILE
from anchored.runs import one_line

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_MOST_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class Repository:
    """ORG/NAME, seen by its owners alone unless it is `public`."""

    name: str
    public: bool = False

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise DataError(f"--push-to-hub {self.name}: is no repository; name it as ORG/NAME")

    def check(self, force: bool) -> None:
        """Find out, before anything is sent, that the token is good and that nobody's data is in the way."""
        with self._told():
            api = _api()
            api.whoami()
            found = self._found(api)
        if found is None:
            return
        if not force:
            raise DataError(
                f"{self.name}: exists on the Hub already; choose another name, or add a commit with --force"
            )
        if not found.private and not self.public:
            raise DataError(f"{self.name}: is public on the Hub; add --public if the data may be seen by all")
        if found.private and self.public:
            raise DataError(f"{self.name}: is private on the Hub; open it there, or leave --public out")

    def push(self, file: Path, card: str) -> str:
        """Send the file and its card, in place of the split that stands there; where to look at them."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        with self._told():
            api = _api()
            found = self._found(api)
            if found is None:
                api.create_repo(self.name, repo_type="dataset", private=not self.public)
            api.create_commit(
                self.name,
                [
                    *(CommitOperationDelete(path) for path in _replaced(found)),
                    CommitOperationAdd(DATA_FILE, file),
                    CommitOperationAdd("README.md", card.encode()),
                ],
                commit_message="Pairs and their card, written by Anchored",
                repo_type="dataset",
            )
            return f"{api.endpoint}/datasets/{self.name}"

    def _found(self, api: Any) -> Any:
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            return api.dataset_info(self.name)
        except RepositoryNotFoundError:
            return None

    @contextmanager
    def _told(self) -> Iterator[None]:
        from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

        try:
            yield
        except LocalTokenNotFoundError:
            raise DataError(
                f"--push-to-hub {self.name}: nobody is logged in to the Hub; run `hf auth login`, or set HF_TOKEN"
            ) from None
        except OfflineModeIsEnabled:
            raise DataError(f"--push-to-hub {self.name}: HF_HUB_OFFLINE is set; unset it to reach the Hub") from None
        except HfHubHTTPError as error:
            status = error.response.status_code
            raise DataError(f"--push-to-hub {self.name}: {_WAYS_OUT.get(status, _brief(error))} ({status})") from None
        except DataError:
            raise
        except Exception as error:  # the library raises of every kind: network, files, limits
            raise DataError(
                f"--push-to-hub {self.name}: the Hub cannot be reached or refuses ({_brief(error)})"
            ) from None


_WAYS_OUT = {
    401: "the Hub does not know the token; run `hf auth login --force`, or set HF_TOKEN to one that may write",
    403: "the token may not write there; use one with write access to that organization",
}


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(library_name="anchored")


def _replaced(found: Any) -> list[str]:
    """Files of the same split that stand in the repository under another name."""
    files = [sibling.rfilename for sibling in (found.siblings or [])] if found else []
    return [name for name in files if name.startswith("data/train-") and name != DATA_FILE]


def _brief(error: Exception) -> str:
    return one_line(error)[:_MOST_CHARACTERS]
