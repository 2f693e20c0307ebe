"""Imports of peers: where they are installed, or from a path that the user gives."""

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class Absent(ImportError):
    """A peer that is simply not here: no news for the table."""


def load(name: str, path: Path | None) -> types.ModuleType:
    """A module: installed, from a file, or from a folder or wheel.

    Raises:
        Absent: no path was given, and it is not installed.
    """
    # jax-triton sets an empty name, with which Triton by itself finds no folder.
    if os.environ.get("TRITON_CACHE_DIR") == "":
        del os.environ["TRITON_CACHE_DIR"]
    if path is None:
        return _installed(name)
    if not path.exists():
        raise FileNotFoundError(path)
    if path.suffix == ".py":
        return _file(name.replace(".", "_"), path)
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
    return importlib.import_module(name)


def _installed(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise Absent(f"{name} is not installed") from error
        raise


@functools.cache
def _file(name: str, path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Triton looks its kernels' modules up there
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def stand_in(
    package: str, names: Mapping[str, Any], root: Path | None = None
) -> Iterator[None]:
    """Within, every module of a package can be imported, without the package itself.

    Its modules are files under `root` where there are such files; packages' own
    `__init__.py` do not run. All others have nothing but `names`, and are forgotten
    afterwards.
    """
    stood_in = set()

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name.split(".")[0] != package:
                return None
            if root is not None:
                file = root.joinpath(*name.split(".")).with_suffix(".py")
                if file.is_file():
                    return importlib.util.spec_from_file_location(name, file)
            stood_in.add(name)
            return importlib.machinery.ModuleSpec(name, Loader(), is_package=True)

    class Loader(importlib.abc.Loader):
        def exec_module(self, module):
            vars(module).update(names)

    sys.meta_path.insert(0, Finder)
    try:
        yield
    finally:
        sys.meta_path.remove(Finder)
        for name in stood_in:
            sys.modules.pop(name, None)
