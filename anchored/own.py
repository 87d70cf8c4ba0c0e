"""What a recipe names that the package does not have, imported by `package.module:name`: an objective, a filter."""

from __future__ import annotations

import importlib
import os
import sys
import traceback

from anchored.errors import RecipeError
from anchored.runs import one_line

IMPORT_PATH = r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*"
"""What an import path looks like, as a regular expression."""


def import_attribute(path: str, setting: str) -> object:
    """What `path` names; modules are looked for among the installed packages, then in the current folder.

    `setting` is the key that holds the path, for the RecipeError where nothing can be imported.
    """
    module_name, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path:
        # for good, since the module may import its neighbours late; last, so that it hides nothing installed
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise RecipeError(f"{setting} is {path!r}, but {_why(error, module_name)}") from error
    if not hasattr(module, attribute):
        where = getattr(module, "__file__", None) or module_name
        raise RecipeError(f"{setting} is {path!r}, but {where} has no {attribute!r}; look at its spelling")
    return getattr(module, attribute)


def failure(error: BaseException) -> str:
    """What a function of one's own raised, and the line of its own file that did."""
    _, *frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    where = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {one_line(error)}{where}"


def _why(error: BaseException, module_name: str) -> str:
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing and (module_name == missing or module_name.startswith(f"{missing}.")):
        return (
            f"there is no module {missing!r}; it has to be an installed package or lie in the current folder "
            f"({os.getcwd()})"
        )
    return f"importing {module_name} fails: {type(error).__name__}: {one_line(error)}"
