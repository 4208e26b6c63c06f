"""Dense 3D and 3D+t hearts from a routine cine MRI study."""
__version__ = "0.1.0"

# What a user imports from here, and the module that holds it. Looked up on first use (PEP 562), so that
# `import mgdcr` costs nothing: torch is imported when something needs it.
_LAZY = {"reconstruct": "inverse", "load_subject": "inverse", "Reconstruction": "inverse", "Study": "study"}
__all__ = [*_LAZY]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'mgdcr' has no attribute {name!r}")
    from importlib import import_module
    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value    # the next look-up finds it without coming here
    return value


def __dir__():
    return sorted({*globals(), *_LAZY})
