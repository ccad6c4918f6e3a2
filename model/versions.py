"""The installed packages that decide what the devices compute. Loads none of them."""

from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("llm-score-serve", "jax", "jaxlib", "flax", "libtpu", "jax-cuda12-plugin", "jax-cuda12-pjrt")


def versions() -> dict[str, str]:
    """The version of each of them that is installed."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
