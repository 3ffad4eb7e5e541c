"""Kernels are built with this processor's instructions, or not at all."""

import ctypes
import platform

import pytest

from hrmtext.errors import BackendError
from hrmtext.runtime.native import build, compiler

SOURCE = """
#include "threads.h"
extern "C" int answer() { return 42; }
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "kernel.cpp"
    file.write_text(SOURCE)
    return file


def take_compiler(monkeypatch, folder, refused):
    """From here on a compiler that refuses one flag, and otherwise is the real one."""
    real, fake = compiler(), folder / "g++"
    fake.write_text(
        f'#!/bin/sh\ncase "$*" in *{refused}*) echo "no {refused}" >&2; exit 1;; esac\n'
        f'exec {real} "$@"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))


@pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
def test_a_kernel_is_built_once_and_anew_when_a_header_beside_it_changes(source):
    assert build.load_kernel(source, "this test").answer() == 42
    (built,) = (source.parent / "cache" / "hrm-text").glob("*.so")
    build.load_kernel.cache_clear()
    build.load_kernel(source, "this test")
    assert list(built.parent.glob("*.so")) == [built]
    (source.parent / "own.h").write_text("// what the kernel may include\n")
    build.load_kernel.cache_clear()
    build.load_kernel(source, "this test")
    assert len(list(built.parent.glob("*.so"))) == 2


@pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_x86_never_gets_a_kernel_without_its_instructions(source, monkeypatch, tmp_path, machine):
    if machine != "x86_64" and platform.machine() != "x86_64":
        pytest.skip("this compiler knows -mcpu=native by itself")
    take_compiler(monkeypatch, tmp_path, "-march=native")
    monkeypatch.setattr(platform, "machine", lambda: machine)
    build.load_kernel.cache_clear()
    if machine == "x86_64":
        with pytest.raises(BackendError, match="no -march=native"):
            build.load_kernel(source, "this test")
    else:  # there the second flag says the same
        assert isinstance(build.load_kernel(source, "this test"), ctypes.CDLL)
