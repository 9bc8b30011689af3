# An overlay port of this checkout: `vcpkg install widehead --overlay-ports=packaging/vcpkg`.
# One that a registry holds names a release with vcpkg_from_github() in place of the first command.
get_filename_component(SOURCE_PATH "${CMAKE_CURRENT_LIST_DIR}/../.." ABSOLUTE)
vcpkg_check_linkage(ONLY_DYNAMIC_LIBRARY)
vcpkg_cmake_configure(SOURCE_PATH "${SOURCE_PATH}"
  OPTIONS -DWIDEHEAD_BUILD_TESTS=OFF -DWIDEHEAD_CUDA=OFF)
vcpkg_cmake_install()
vcpkg_cmake_config_fixup(CONFIG_PATH lib/cmake/widehead)
vcpkg_fixup_pkgconfig()
vcpkg_copy_tools(TOOL_NAMES widehead AUTO_CLEAN)
file(REMOVE_RECURSE "${CURRENT_PACKAGES_DIR}/debug/include" "${CURRENT_PACKAGES_DIR}/debug/share")
vcpkg_install_copyright(FILE_LIST "${SOURCE_PATH}/LICENSE")
