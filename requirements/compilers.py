"""Print, as requirements of pip, which of XLA's compilers for GPU and TPU belong to the jax that is installed here."""

from importlib.metadata import requires

from packaging.requirements import Requirement

_EXTRAS = {"jax-cuda12-plugin": "cuda12-local", "libtpu": "tpu"}

for _requirement in map(Requirement, requires("jax") or ()):
    _extra = _EXTRAS.get(_requirement.name)
    if _extra and _requirement.marker and _requirement.marker.evaluate({"extra": _extra}):
        print(f"{_requirement.name}{_requirement.specifier}")
        if _requirement.name == "jax-cuda12-plugin":
            # Its own requirement, at the same version.
            print(f"jax-cuda12-pjrt{_requirement.specifier}")
