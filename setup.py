"""Packages that pyproject.toml cannot express: folders at the repository root shipped inside `fdfo_engine`."""

from setuptools import find_packages, setup

kernel_packages = ["fdfo_engine.kernels"] + [f"fdfo_engine.kernels.{name}" for name in find_packages("kernels")]

setup(
    packages=[*find_packages(include=["fdfo_engine", "fdfo_engine.*"]), *kernel_packages, "fdfo_engine.configs"],
    package_dir={"fdfo_engine.kernels": "kernels", "fdfo_engine.configs": "configs"},
    package_data={
        "fdfo_engine": ["py.typed"],
        "fdfo_engine.shapes": ["base/**/*", "base/*"],
        "fdfo_engine.report": ["*.html"],
        "fdfo_engine.configs": ["*.yaml"],
    },
)
