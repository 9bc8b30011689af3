"""Widehead's recipe: `conan create packaging/conan --build=missing` builds this checkout and tests the package.

Programs that link the package need no header of what it is built with.
"""

import re
from pathlib import Path

from conan import ConanFile
from conan.errors import ConanInvalidConfiguration
from conan.tools.cmake import CMake, CMakeDeps, CMakeToolchain, cmake_layout
from conan.tools.files import copy
from conan.tools.gnu import PkgConfigDeps

SOURCES = ("CMakeLists.txt", "LICENSE", "bench/suites.json", "cli/*", "cmake/*", "data/*", "include/*", "packaging/*",
           "src/*", "tests/cases/*", "verify/*")


class Widehead(ConanFile):
    name = "widehead"
    description = "Exact attention for any head dimension and context length, planned before it runs"
    license = "Apache-2.0"
    package_type = "shared-library"
    settings = "os", "arch", "compiler", "build_type"
    options = {"cuda": [True, False]}
    default_options = {"cuda": False}

    @property
    def _checkout(self):
        return Path(self.recipe_folder).parent.parent

    def set_version(self):
        text = (self._checkout / "CMakeLists.txt").read_text()
        self.version = re.search(r"project\(widehead VERSION ([0-9.]+)", text)[1]

    def export_sources(self):
        for pattern in SOURCES:
            copy(self, pattern, self._checkout, self.export_sources_folder)

    def requirements(self):
        for package in ("cli11/[>=2.3]", "fmt/[>=9]", "highway/[>=1.0]", "nlohmann_json/[>=3.11]", "onetbb/[>=2021.5]",
                        "openblas/[>=0.3.20]"):
            self.requires(package)  # not transitive: no header of ours includes theirs

    def validate(self):
        if self.settings.os != "Linux":
            raise ConanInvalidConfiguration(f"widehead runs on Linux, not on {self.settings.os}")

    def layout(self):
        cmake_layout(self)

    def generate(self):
        toolchain = CMakeToolchain(self)
        toolchain.cache_variables |= {"WIDEHEAD_BUILD_TESTS": False,
                                      "WIDEHEAD_CUDA": "ON" if self.options.cuda else "OFF"}
        toolchain.generate()
        CMakeDeps(self).generate()
        PkgConfigDeps(self).generate()

    def build(self):
        cmake = CMake(self)
        cmake.configure()
        cmake.build()

    def package(self):
        copy(self, "LICENSE", self.source_folder, Path(self.package_folder) / "licenses")
        CMake(self).install()

    def package_info(self):
        self.cpp_info.libs = ["widehead"]
        self.cpp_info.set_property("cmake_target_name", "widehead::widehead")
        self.cpp_info.set_property("pkg_config_name", "widehead")
