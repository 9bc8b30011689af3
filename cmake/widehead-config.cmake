include("${CMAKE_CURRENT_LIST_DIR}/widehead-targets.cmake")
