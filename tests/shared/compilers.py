"""Compilers that do not work."""


def take_broken_compiler(monkeypatch, folder):
    """From here on the C++ compiler fails with "it broke"; kernels go to `folder`/cache."""
    fake = folder / "g++"
    fake.write_text("#!/bin/sh\necho it broke >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
