"""What pyproject.toml cannot say: some files of `bench/` are scripts of the repository, not modules of the wheel."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Builds every module of the listed packages, except the files of `bench/` that are run by themselves."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules: list[tuple[str, str, str]] = super().find_package_modules(package, package_dir)
        if package != "edgetube.bench":
            return modules
        return [m for m in modules if '__name__ == "__main__"' not in Path(m[2]).read_text("utf-8")]


setup(cmdclass={"build_py": BuildPy})
