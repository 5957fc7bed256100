"""Scripts that users import with --import, to register heads and tasks that are not part of this program."""

import importlib.util
import sys
import traceback
from pathlib import Path

from kernels.errors import UserError
from train.files.reading import require_file


def import_script(path: Path) -> None:
    """Runs a file as an import does: not as ``__main__``, and with its folder on the path for what it imports itself.
    UserError, with the line, where it fails."""
    require_file(path)
    path = path.resolve()
    name = f"imported_{path.stem}"  # the file may have the name of another module
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--import {path}: the name of a script ends in .py")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"--import {path}{_line(error, path)} fails ({reason}): correct it") from error


def _line(error: BaseException, path: Path) -> str:
    """Where in the file an error arose; "" where it is not known."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f", line {lines[-1]}," if lines else ""
