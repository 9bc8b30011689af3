# Debian packages by CPack: libwidehead0, libwidehead-dev and widehead, the command line. Configure
# with -DCMAKE_INSTALL_PREFIX=/usr, build, and run `cpack -G DEB`; tools/check_packages does, and
# installs them in a bare system. The maintainer is whoever builds them, as $DEBFULLNAME <$DEBEMAIL>.
find_program(HELP2MAN help2man)
if(NOT CMAKE_INSTALL_PREFIX STREQUAL "/usr" OR NOT HELP2MAN)
  return()
endif()

set(CPACK_GENERATOR DEB)
set(CPACK_PACKAGE_CONTACT "$ENV{DEBFULLNAME} <$ENV{DEBEMAIL}>")
set(CPACK_PACKAGING_INSTALL_PREFIX /usr)
set(CPACK_STRIP_FILES ON)
set(CPACK_INSTALL_DEFAULT_DIRECTORY_PERMISSIONS OWNER_READ OWNER_WRITE OWNER_EXECUTE
  GROUP_READ GROUP_EXECUTE WORLD_READ WORLD_EXECUTE)
set(CPACK_COMPONENTS_ALL library development program)
set(CPACK_DEB_COMPONENT_INSTALL ON)
set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
set(CPACK_DEBIAN_PACKAGE_RELEASE 1)
set(CPACK_DEBIAN_PACKAGE_SHLIBDEPS ON)

set(CPACK_DEBIAN_LIBRARY_PACKAGE_NAME libwidehead${PROJECT_VERSION_MAJOR})
set(CPACK_DEBIAN_LIBRARY_PACKAGE_SECTION libs)
# Not CPack's: those call ldconfig in scripts, where a trigger is the custom.
file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/debian/shlibs
  "libwidehead ${PROJECT_VERSION_MAJOR} ${CPACK_DEBIAN_LIBRARY_PACKAGE_NAME} (>= ${PROJECT_VERSION})\n")
file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/debian/triggers "activate-noawait ldconfig\n")
set(CPACK_DEBIAN_LIBRARY_PACKAGE_CONTROL_EXTRA
  ${CMAKE_CURRENT_BINARY_DIR}/debian/shlibs ${CMAKE_CURRENT_BINARY_DIR}/debian/triggers)
file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/debian/control "Source: widehead\n\nPackage: libwidehead\nArchitecture: any\n")
configure_file(cmake/library-depends.cmake.in library-depends.cmake @ONLY)
set(CPACK_PROJECT_CONFIG_FILE ${CMAKE_CURRENT_BINARY_DIR}/library-depends.cmake)
set(CPACK_DEBIAN_LIBRARY_PACKAGE_SHLIBDEPS OFF)
set(CPACK_DEBIAN_LIBRARY_PACKAGE_CONTROL_STRICT_PERMISSION ON)
set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_NAME libwidehead-dev)
set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_SECTION libdevel)
set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_SHLIBDEPS OFF)
set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_DEPENDS
  "${CPACK_DEBIAN_LIBRARY_PACKAGE_NAME} (= ${PROJECT_VERSION}-${CPACK_DEBIAN_PACKAGE_RELEASE})")
set(CPACK_DEBIAN_PROGRAM_PACKAGE_NAME widehead)
set(CPACK_DEBIAN_PROGRAM_PACKAGE_SECTION science)

# The first line of a description is its summary.
set(devices "CPUs")
if(use_cuda)
  string(APPEND devices " and NVIDIA GPUs")
endif()
set(about "Exact scaled dot-product attention for any head dimension and any
context length, on ${devices}. Before it runs it says which kernel
will run, why every other one will not, how many workspace bytes it takes and
about how long. It never falls back silently.
.
")
set(CPACK_COMPONENT_LIBRARY_DESCRIPTION
  "exact attention for any head dimension\n${about}This package has the shared library.")
set(CPACK_COMPONENT_DEVELOPMENT_DESCRIPTION
  "exact attention for any head dimension, development files\n${about}This package has the headers for C and C++, and what CMake and pkg-config read.")
set(CPACK_COMPONENT_PROGRAM_DESCRIPTION
  "plan, run and measure exact attention\n${about}This package has the command line.")

# Man pages say what --help says.
foreach(page IN ITEMS widehead plan run check bench tune list)
  set(command $<TARGET_FILE:widehead_cli>)
  set(name widehead)
  set(summary "exact attention, planned before it runs")
  if(NOT page STREQUAL "widehead")
    string(APPEND command " ${page}")
    set(name widehead-${page})
    set(summary "see widehead(1)")
  endif()
  add_custom_command(OUTPUT man/${name}.1.gz
    COMMAND ${CMAKE_COMMAND} -E make_directory man
    COMMAND ${HELP2MAN} --no-info --version-string ${PROJECT_VERSION} --name ${summary}
      --include ${PROJECT_SOURCE_DIR}/packaging/widehead.h2m --output man/${name}.1 ${command}
    COMMAND sed -i "s/^widehead ${page} /${name} /" man/${name}.1
    COMMAND gzip -9nf man/${name}.1
    DEPENDS widehead_cli ${PROJECT_SOURCE_DIR}/packaging/widehead.h2m VERBATIM)
  list(APPEND pages ${CMAKE_CURRENT_BINARY_DIR}/man/${name}.1.gz)
endforeach()
add_custom_target(widehead_man ALL DEPENDS ${pages})
install(FILES ${pages} DESTINATION share/man/man1 COMPONENT program)
install(FILES packaging/completion/widehead.bash RENAME widehead
  DESTINATION share/bash-completion/completions COMPONENT program)

string(TIMESTAMP package_date "%a, %d %b %Y %H:%M:%S +0000" UTC)
configure_file(packaging/debian/changelog.in debian/changelog.Debian @ONLY)
foreach(pair IN ITEMS debian/changelog.Debian=${CMAKE_CURRENT_BINARY_DIR}/debian/changelog.Debian
    debian/changelog=${PROJECT_SOURCE_DIR}/CHANGELOG.md)
  string(REPLACE "=" ";" pair ${pair})
  list(GET pair 0 output)
  list(GET pair 1 input)
  execute_process(COMMAND gzip -9nc ${input} OUTPUT_FILE ${CMAKE_CURRENT_BINARY_DIR}/${output}.gz
    COMMAND_ERROR_IS_FATAL ANY)
endforeach()
foreach(component IN LISTS CPACK_COMPONENTS_ALL)
  string(TOUPPER ${component} upper)
  install(FILES packaging/debian/copyright ${CMAKE_CURRENT_BINARY_DIR}/debian/changelog.gz
    ${CMAKE_CURRENT_BINARY_DIR}/debian/changelog.Debian.gz
    DESTINATION share/doc/${CPACK_DEBIAN_${upper}_PACKAGE_NAME} COMPONENT ${component})
endforeach()
include(CPack)
