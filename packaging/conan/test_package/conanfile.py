"""The consumer project of the tests, against the package."""

from pathlib import Path

from conan import ConanFile
from conan.tools.build import can_run
from conan.tools.cmake import CMake, cmake_layout


class Consumer(ConanFile):
    settings = "os", "arch", "compiler", "build_type"
    generators = "CMakeDeps", "CMakeToolchain"
    test_type = "explicit"

    def requirements(self):
        self.requires(self.tested_reference_str)

    def layout(self):
        cmake_layout(self)

    def build(self):
        cmake = CMake(self)
        cmake.configure(build_script_folder=str(Path(self.recipe_folder).parents[2] / "tests" / "consumer"))
        cmake.build()

    def test(self):
        if can_run(self):
            for program in ("from_c", "from_cpp"):
                self.run(str(Path(self.build_folder) / program), env="conanrun")
