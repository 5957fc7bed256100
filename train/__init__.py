"""Training, evaluation and prediction: what users run."""

import sys
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

COMMAND = sys.argv[:1] == ["-m"]  # what Python puts there until it has found the module of ``python -m``


def _quiet(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Says "interrupted" where an interrupt ends a command, and shows every other exception as usual."""
    if kind is KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _hiding(package: str) -> str:
    """The file that hides our ``package`` from imports, "" if none does. It is not run."""
    found, own = find_spec(package), Path(__file__).resolve().parents[1] / package / "__init__.py"
    if found is None:  # importing it says so
        return ""
    if found.origin is None or Path(found.origin).resolve() != own:
        return found.origin or str(found.submodule_search_locations)
    foreign = package == "kernels" and "FASTMOE_LORA" not in own.read_text(encoding="utf-8")  # installed over ours
    return str(own) if foreign else ""


def _require_own_packages() -> None:
    """Ends a command in one line where a file beside the user's script, or Hugging Face's kernels, hides a package."""
    for package in ("kernels", "fastmoe_lora", "model"):
        if path := _hiding(package):
            theirs = "; if it is Hugging Face's kernels, uninstall that, then reinstall fastmoe_lora"
            remedy = f"rename it{theirs if package == 'kernels' else ''}"
            message = f"{path} hides the package {package} of fastmoe_lora: {remedy}"
            if not COMMAND:
                raise ImportError(message)
            print(f"error: {message}", file=sys.stderr)
            raise SystemExit(2)


_require_own_packages()
# A command takes a second to import its libraries, before it can handle an interrupt itself.
if COMMAND:
    sys.excepthook = _quiet
